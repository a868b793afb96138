"""Every RPC with every sort of nonsense: a typed refusal or an answer, and nothing changed.

Requests are made from the descriptors, so that an RPC or a field that is added is covered at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from daemons import METHODS, Answer, Daemon, Rpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from rpc_world import PAGE, World, whole_state

ALL = sorted(METHODS)
EXAMPLES = int(os.environ.get("RMEMD_FUZZ_EXAMPLES", "20"))
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED,
}  # fmt: skip
# what was executed or done before a refusal stays: progress PREFIX
KEEPS_A_PREFIX = {"RunVcpu", "Populate", "WriteGuest"}
HANDLES = {"vm", "file", "pin", "rule", "vcpu", "session"}


# --- messages from descriptors -------------------------------------------------------------------
@dataclass(frozen=True)
class Handle:
    """A place for one of the world's handles: which is only known once there is a world."""

    field: str
    index: int


def edges(bits: int, signed: bool) -> list[int]:
    """Return the numbers that break things: extremes, their neighbours, and page sizes."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    marks = [0, 1, 2, 4, 8, 255, 256, 511, PAGE, 1 << 20, 1 << 24, 1 << 31, 1 << 32]
    marks += [1 << 40, 1 << 51, 1 << 52, 1 << 62, (1 << 63) - PAGE, 1 << 63, (1 << 64) - PAGE]
    near = {n + d for n in [*marks, high] for d in (-PAGE, -1, 0, 1, PAGE)}
    near |= {-n for n in near} | {low, low + 1, low + PAGE}
    return sorted(n for n in near if low <= n <= high)


def _integers(bits: int, signed: bool) -> st.SearchStrategy[int]:
    known = edges(bits, signed)
    small = st.integers(0, 40)
    return small | small.map(lambda n: n * PAGE) | st.sampled_from(known)


TEXTS = (
    st.sampled_from(["", "tdx-today", "DMA", "map", "\x00", "\n", "x" * 60_000, "é" * 20_000])
    | st.text(max_size=80)
)  # fmt: skip
BYTES = st.sampled_from([0, 1, 23, 24, PAGE - 1, PAGE, 2 * PAGE, 60_000]).map(
    lambda n: b"\xa5" * n
) | st.binary(max_size=96)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_INT64: _integers(64, True),
    FieldDescriptor.TYPE_UINT64: _integers(64, False),
    FieldDescriptor.TYPE_INT32: _integers(32, True),
    FieldDescriptor.TYPE_UINT32: _integers(32, False),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: BYTES,
}


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Return what one value of a field may be."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return fields_of(field.message_type)
    if field.type == FieldDescriptor.TYPE_ENUM:
        known = [value.number for value in field.enum_type.values]
        return st.sampled_from([*known, max(known) + 1, (1 << 31) - 1, -1, -(1 << 31)])
    plain = SCALARS[field.type]
    if field.name in HANDLES and not field.is_repeated:
        real = st.integers(0, 3).map(lambda index: Handle(field.name, index))
        return st.one_of(real, real, plain)
    return plain


def fields_of(message: Descriptor) -> st.SearchStrategy[dict[str, Any]]:
    """Return strategies for any subset of a message's fields, by name."""
    optional = {}
    for field in message.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            optional[field.name] = st.dictionaries(TEXTS, TEXTS, max_size=3)
        elif field.is_repeated:
            optional[field.name] = st.lists(_values(field), max_size=4)
        else:
            optional[field.name] = _values(field)
    return st.fixed_dictionaries({}, optional=optional)


def fill(message: Message, fields: dict[str, Any], world: World) -> None:
    """Set the fields that were drawn, handles being the world's."""
    for name, value in fields.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        if isinstance(value, Handle):
            known = world.handles(value.field)
            setattr(message, name, known[value.index % len(known)])
        elif isinstance(value, dict) and field.is_repeated:
            getattr(message, name).update(value)
        elif isinstance(value, list):
            message.ClearField(name)
            target = getattr(message, name)
            for one in value:
                if isinstance(one, dict):
                    fill(target.add(), one, world)
                else:
                    target.append(one)
        elif isinstance(value, dict):
            fill(getattr(message, name), value, world)
            getattr(message, name).SetInParent()
        else:
            setattr(message, name, value)


# --- what must hold ------------------------------------------------------------------------------
class Bench:
    """A daemon under fire: the world in it, and its state as last seen."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.rpc: Rpc = daemon.rpc()
        self.world = World(self.rpc)
        self.catalogue = {r.reason for r in self.rpc.call("ExplainReason").reply.reasons}
        # None: not known, since a check failed
        self.state: dict[str, Any] | None = whole_state(self.rpc)

    def fire(self, name: str, data: bytes | Message) -> Answer:
        """Make a call, and check all that must hold of its answer and of the state after it."""
        if self.state is None:
            self.renew()
        before, self.state = self.state, None
        raw = data if isinstance(data, bytes) else data.SerializeToString()
        # a programme may loop for ever: then RunVcpu ends before the deadline
        deadline = 0.5 if name == "RunVcpu" else 20
        answer = self.rpc.call_raw(name, raw, deadline, self.world.sent_with(name))
        assert self.daemon.process.poll() is None, self.daemon.log[-4000:]
        if answer.ok:
            if self.world.intact:
                self.state = whole_state(self.rpc)
            else:
                self.renew()
            return answer
        self.check_refusal(answer)
        now = whole_state(self.rpc)
        if name not in KEEPS_A_PREFIX:
            changed = [key for key, value in now.items() if value != before[key]]
            assert not changed, f"{name} was refused ({answer.message}) and changed {changed}"
        self.state = now
        return answer

    def check_refusal(self, answer: Answer) -> None:
        """A refusal is typed, named, explained, and tells nothing of the daemon's insides."""
        said = f"{answer.method}: {answer.code.name} {answer.message}"
        assert answer.code in REFUSALS, f"{said}\n{self.daemon.log[-4000:]}"
        for leak in ("Traceback", 'File "', ".py", "object at 0x"):
            assert leak not in str(answer.status), said
        assert answer.refusal is not None, said
        assert answer.info is not None, said
        assert answer.info.domain == "rmemd"
        assert answer.reason == answer.info.reason
        assert answer.reason in self.catalogue, said
        assert answer.message.startswith(f"{answer.reason}: "), said
        assert answer.refusal.remedy, said
        if answer.code is grpc.StatusCode.INVALID_ARGUMENT:
            assert answer.refusal.field, said
            assert names_a_field(METHODS[answer.method].input_type, answer.refusal.field), (
                f"{said}: no field {answer.refusal.field}"
            )
            details = [d for d in answer.status.details if d.Is(BAD_REQUEST)]
            assert details, said

    def renew(self) -> None:
        """Make the world anew, in an empty host."""
        for vm in self.world.must("ListVms").vms:
            self.rpc.call("DestroyVm", _request("DestroyVm", vm=vm.vm))
        for file in self.world.must("ListFiles").files:
            self.rpc.call("CloseFile", _request("CloseFile", file=file.file))
        for session in self.world.must("ListSessions").sessions:
            self.rpc.call("CloseSession", _request("CloseSession", session=session.session))
        for pin in self.world.must("ListPins").pins:
            self.rpc.call("UnpinPages", _request("UnpinPages", pin=pin.pin))
        self.world.must("LoadPlugins")
        self.rpc.call("Online", _request("Online", pfns={"start": 0, "npages": 16384}))
        self.world = World(self.rpc)
        self.state = whole_state(self.rpc)


BAD_REQUEST = error_details_pb2.BadRequest.DESCRIPTOR


def _request(name: str, **fields: Any) -> Message:
    made: Message = GetMessageClass(METHODS[name].input_type)(**fields)
    return made


def names_a_field(message: Descriptor, path: str) -> bool:
    """Return whether a path such as "programme[3].gpa" leads to a field; "request" is the whole."""
    if path == "request":
        return True
    first, _, rest = path.partition(".")
    field = message.fields_by_name.get(first.partition("[")[0])
    if field is None:
        return False
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return True
    return not rest or (field.message_type is not None and names_a_field(field.message_type, rest))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One daemon for the whole module: it must survive all of it."""
    daemon = Daemon(tmp_path_factory.mktemp("fuzz"), "--host-memory", "64M").start()
    try:
        yield Bench(daemon)
        daemon.stop()
    finally:
        if daemon.process.poll() is None:
            daemon.kill()
    assert "Traceback" not in daemon.log
    assert not [line for line in daemon.log_lines if line["level"] == "error"]


# --- the tests -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ALL)
def test_valid_requests_are_taken(bench: Bench, name: str) -> None:
    """Otherwise the nonsense that is made from them would prove nothing."""
    bench.renew()
    answer = bench.fire(name, bench.world.valid(name))
    # nobody keeps this daemon's memory, so there is nobody to hand it over to
    taken = answer.ok or (name == "Upgrade" and answer.message.startswith("NO_KEEPER"))
    assert taken, f"{answer.code.name} {answer.message}"


@pytest.mark.parametrize("name", ALL)
def test_garbage_bytes(bench: Bench, name: str) -> None:
    garbage = {
        "no field number": b"\x00\x00",
        "a varint without end": b"\x08" + b"\xff" * 11,
        "cut in a length": b"\x0a\x7f\x01",
        "wire type 7": b"\x0f\x01",
        "a group that does not end": b"\x0b",
        "an end without a group": b"\x0c",
        "nested too deep": b"\x7b" * 20_000 + b"\x7c" * 20_000,
        "noise": bytes(range(255, 0, -1)) * 4,
    }
    for field in METHODS[name].input_type.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            garbage["no UTF-8"] = bytes([field.number << 3 | 2, 2, 0xC3, 0x28])
    if not METHODS[name].input_type.fields:
        # upb lets field 0 pass in messages without fields
        del garbage["no field number"]
    for what, data in garbage.items():
        answer = bench.fire(name, data)
        assert answer.code is grpc.StatusCode.INVALID_ARGUMENT, what
        assert (answer.reason, answer.refusal.field) == ("BAD_REQUEST", "request"), what


@pytest.mark.parametrize("name", ALL)
def test_unknown_fields_are_ignored_and_empty_requests_are_typed(bench: Bench, name: str) -> None:
    bench.fire(name, b"")
    # field 1000, as a later version of the API may have it
    bench.fire(name, b"\xc0\x3e\x01")


@pytest.mark.parametrize("name", ALL)
def test_random_fields(bench: Bench, name: str) -> None:
    descriptor = METHODS[name].input_type

    @settings(max_examples=EXAMPLES, database=None)
    @given(st.booleans(), fields_of(descriptor))
    def fire(from_valid: bool, fields: dict[str, Any]) -> None:
        request = bench.world.valid(name) if from_valid else GetMessageClass(descriptor)()
        fill(request, fields, bench.world)
        bench.fire(name, request)

    fire()


@pytest.mark.parametrize("name", ALL)
def test_one_wrong_field_in_a_valid_request(bench: Bench, name: str) -> None:
    """Every number at every edge, one at a time, in messages within messages too."""

    def each(message: Message, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        for field in message.DESCRIPTOR.fields:
            if field.type in SCALARS and not field.is_repeated:
                yield (*path, field.name)
            elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
                inner = getattr(message, field.name)
                if field.is_repeated and len(inner):
                    yield from each(inner[0], (*path, field.name, 0))
                elif not field.is_repeated and message.HasField(field.name):
                    yield from each(inner, (*path, field.name))

    for path in each(bench.world.valid(name), ()):
        for value in (0, 1, -1, PAGE, PAGE + 1, 1 << 31, 1 << 52, 1 << 62, 1 << 63, (1 << 64) - 1):
            request: Any = bench.world.valid(name)
            target = request
            for step in path[:-1]:
                target = target[step] if isinstance(step, int) else getattr(target, step)
            field = target.DESCRIPTOR.fields_by_name[path[-1]]
            if field.type not in BITS:
                continue
            bits, signed = BITS[field.type]
            if signed:
                value = (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
            setattr(target, path[-1], value % (1 << bits) if not signed else value)
            bench.fire(name, request)


BITS = {
    FieldDescriptor.TYPE_INT64: (64, True), FieldDescriptor.TYPE_UINT64: (64, False),
    FieldDescriptor.TYPE_INT32: (32, True), FieldDescriptor.TYPE_UINT32: (32, False),
}  # fmt: skip
