"""The store of answers: each call once, for its own caller, within its bounds."""

from __future__ import annotations

import threading
import tracemalloc
import uuid
from collections.abc import Callable
from random import Random

import grpc
import pytest
from google.longrunning import operations_pb2
from hypothesis import given
from hypothesis import strategies as st

from rmem.v1 import (
    consumer_pb2,
    file_pb2,
    host_pb2,
    job_pb2,
    session_pb2,
    trace_pb2,
    vcpu_pb2,
    vm_pb2,
    watch_pb2,
)
from rmem_client import calls
from rmemd.errors import InvalidArgument, Unavailable
from rmemd.rpc import replies
from rmemd.rpc.replies import KEPT_SECONDS, Refused, Replies, Turn, mutates

METHOD = "VmService/CreateVm"
SERVICES = [
    service
    for module in (
        consumer_pb2,
        file_pb2,
        host_pb2,
        job_pb2,
        operations_pb2,
        session_pb2,
        trace_pb2,
        vcpu_pb2,
        vm_pb2,
        watch_pb2,
    )
    for service in module.DESCRIPTOR.services_by_name.values()
]
READS = {
    "ListConsumers", "GetOps", "GetFile", "ListFiles", "ReadShared", "GetPolicy", "ListPins",
    "GetHost", "GetPageMap", "GetPage", "ReadPhysical", "GetAccounting", "ListFaultRules",
    "CheckHost", "ListFaultPoints", "ExplainReason", "GetWaitGraph", "ListOperations",
    "GetOperation", "WaitOperation", "WhoAmI",
    "ListSessions", "ReadGuest", "GetVm", "ListVms", "GetMemoryAttributes", "GetTrace",
}  # fmt: skip
STREAMS = {"Watch", "ExportTrace"}
MUTATIONS = {
    "LoadPlugins", "UnloadPlugin", "ReloadPlugin", "CreateFile", "CloseFile", "Fallocate",
    "ConvertFile", "WriteShared", "SetPolicy", "PinPages", "UnpinPages", "WritePhysical",
    "CopyPhysical", "Migrate", "Compact", "Offline", "Online", "Poison", "AddFaultRule",
    "RemoveFaultRule", "StartMigrate", "StartCompact", "StartOffline", "DeleteOperation",
    "StartTrace", "StopTrace",
    "CancelOperation", "OpenSession", "RenewSession", "CloseSession", "CreateTicket",
    "RevokeGrants", "CreateVcpu", "SetProgramme", "RunVcpu", "WriteGuest", "CreateVm", "DestroyVm",
    "SetMemoryRegion", "SetMemoryAttributes", "Populate", "Finalize", "PreFault", "SwapConsumer",
    "Upgrade",
}  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Context:
    """As much of a ServicerContext as the store asks for."""

    def __init__(self, *ids: str) -> None:
        self._metadata = [("user-agent", "x"), *((replies.REQUEST_ID, one) for one in ids)]
        self._tell: list[Callable[[], None]] = []
        self.waits = threading.Event()
        self.active = True

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def is_active(self) -> bool:
        return self.active

    def add_callback(self, tell: Callable[[], None]) -> bool:
        self._tell.append(tell)
        self.waits.set()
        return self.active

    def end(self) -> None:
        self.active = False
        for tell in self._tell:
            tell()


def refusal(code: grpc.StatusCode, nbytes: int = 10) -> grpc.Status:
    class Status(grpc.Status):
        pass

    made = Status()
    made.code, made.details = code, "no"
    made.trailing_metadata = (("grpc-status-details-bin", bytes(nbytes)),)
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Replies:
    return Replies(clock)


def ask(
    store: Replies, number: str, data: bytes = b"", *, tenant: str = "uid:1", session: int = 0
) -> Turn | bytes | None:
    return store.turn(tenant, session, METHOD, data, Context(number))  # type: ignore[arg-type]


def do(store: Replies, number: str, reply: bytes, **whose: object) -> None:
    turn = ask(store, number, **whose)  # type: ignore[arg-type]
    assert isinstance(turn, Turn)
    turn.replied(reply)


def new_id() -> str:
    return str(uuid.uuid4())


# --- which calls ---------------------------------------------------------------------------------
def test_every_rpc_is_in_one_class() -> None:
    methods = [method for service in SERVICES for method in service.methods]
    assert {m.name for m in methods if m.server_streaming} == STREAMS
    assert not any(m.client_streaming for m in methods)
    unary = {m.name for m in methods if not m.server_streaming}
    assert {name for name in unary if not mutates(name)} == READS
    assert {name for name in unary if mutates(name)} == MUTATIONS


def test_the_client_means_the_same() -> None:
    """The client goes by the request's type: one type must not be of both classes."""
    from google.protobuf.message_factory import GetMessageClass

    for service in SERVICES:
        for method in service.methods:
            if not method.server_streaming:
                request_class = GetMessageClass(method.input_type)
                assert calls.mutates(request_class) == mutates(method.name), method.name
    assert calls.REQUEST_ID == replies.REQUEST_ID


@pytest.mark.parametrize("method", ["HostService/GetHost", "Operations/WaitOperation"])
def test_reads_are_done_anew(store: Replies, method: str) -> None:
    assert store.turn("", 0, method, b"", Context("no uuid")) is None  # type: ignore[arg-type]
    assert len(store) == 0


def test_without_an_id_there_is_nothing_to_remember(store: Replies) -> None:
    assert store.turn("", 0, METHOD, b"", Context()) is None  # type: ignore[arg-type]


# --- once ----------------------------------------------------------------------------------------
def test_a_repeat_gets_the_very_bytes(store: Replies) -> None:
    number = new_id()
    do(store, number, b"\x08\x07")
    assert ask(store, number) == ask(store, number.upper()) == b"\x08\x07"


def test_a_repeat_of_a_refused_call_gets_its_status(store: Replies) -> None:
    number, status = new_id(), refusal(grpc.StatusCode.NOT_FOUND)
    turn = ask(store, number)
    assert isinstance(turn, Turn)
    turn.refused(status)
    with pytest.raises(Refused) as caught:
        ask(store, number)
    assert caught.value.status is status


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, None])
def test_what_passes_is_tried_anew(store: Replies, code: grpc.StatusCode | None) -> None:
    number = new_id()
    for _ in range(2):
        turn = ask(store, number)
        assert isinstance(turn, Turn)
        turn.refused(refusal(code) if code else None)
    assert len(store) == store.nbytes == 0


def test_other_contents_under_an_id_are_refused(store: Replies) -> None:
    number = new_id()
    running = ask(store, number, b"a")
    for _ in range(2):  # while it is at work, and after
        with pytest.raises(InvalidArgument, match="REQUEST_ID_REUSED") as caught:
            ask(store, number, b"b")
        assert caught.value.details.field == "rmem-request-id"
        assert isinstance(running, Turn)
        running.replied(b"r")
    with pytest.raises(InvalidArgument, match="REQUEST_ID_REUSED"):
        store.turn("uid:1", 0, "VmService/DestroyVm", b"a", Context(number))  # type: ignore[arg-type]
    assert ask(store, number, b"a") == b"r"


@given(
    st.sampled_from((1, 15, 16, 17, 4096, 200_000)), st.randoms(use_true_random=False), st.data()
)
def test_contents_differ_by_any_bit_and_by_their_length(
    nbytes: int, random: Random, draw: st.DataObject
) -> None:
    contents = random.randbytes(nbytes)
    at, bit = draw.draw(st.integers(0, nbytes - 1)), draw.draw(st.integers(0, 7))
    flipped = bytearray(contents)
    flipped[at] ^= 1 << bit
    store, number = Replies(), new_id()
    do(store, number, b"r", data=contents)
    for other in (bytes(flipped), contents[:at], contents + b"\0", b"\0" + contents):
        with pytest.raises(InvalidArgument, match="REQUEST_ID_REUSED"):
            ask(store, number, other)
    assert ask(store, number, bytes(bytearray(contents))) == b"r"


def test_an_id_belongs_to_its_tenant_and_session(store: Replies) -> None:
    number = new_id()
    do(store, number, b"mine")
    for whose in ({"tenant": "uid:2"}, {"session": 3}, {"tenant": "uid:2", "session": 3}):
        do(store, number, b"theirs", data=b"other", **whose)
    assert ask(store, number) == b"mine"


@pytest.mark.parametrize(
    "ids",
    [
        [""],
        ["x"],
        ["{" + str(uuid.UUID(int=5)) + "}"],
        [uuid.UUID(int=5).hex],
        [str(uuid.UUID(int=5)) + "0"],
        [str(uuid.UUID(int=5)), str(uuid.UUID(int=6))],
    ],
)
def test_a_malformed_id_is_refused(store: Replies, ids: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="BAD_REQUEST"):
        store.turn("", 0, METHOD, b"", Context(*ids))  # type: ignore[arg-type]


# --- at the same time ----------------------------------------------------------------------------
class Repeats:
    """Repeats on threads of their own, all of which wait when this is made."""

    def __init__(self, store: Replies, number: str, count: int) -> None:
        self.got: list[object] = []
        self.contexts = [Context(number) for _ in range(count)]
        self._store = store
        self._threads = [threading.Thread(target=self._ask, args=[c]) for c in self.contexts]
        for thread in self._threads:
            thread.start()
        for context in self.contexts:
            assert context.waits.wait(20)

    def _ask(self, context: Context) -> None:
        try:
            self.got.append(self._store.turn("uid:1", 0, METHOD, b"", context))  # type: ignore[arg-type]
        except Exception as error:
            self.got.append(error)

    def join(self) -> list[object]:
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        return self.got


@pytest.fixture
def first(store: Replies) -> tuple[str, Turn]:
    number = new_id()
    turn = ask(store, number)
    assert isinstance(turn, Turn)
    return number, turn


def test_repeats_wait_for_the_first(store: Replies, first: tuple[str, Turn]) -> None:
    number, turn = first
    waiting = Repeats(store, number, 8)
    assert not waiting.got
    turn.replied(b"r")
    assert waiting.join() == [b"r"] * 8


def test_if_the_first_leaves_nothing_one_of_the_repeats_is_next(
    store: Replies, first: tuple[str, Turn]
) -> None:
    number, turn = first
    waiting = Repeats(store, number, 1)
    turn.refused(refusal(grpc.StatusCode.UNAVAILABLE))
    (got,) = waiting.join()
    assert isinstance(got, Turn)


def test_a_repeat_whose_caller_leaves_waits_no_longer(
    store: Replies, first: tuple[str, Turn]
) -> None:
    number, turn = first
    waiting = Repeats(store, number, 1)
    waiting.contexts[0].end()
    (got,) = waiting.join()
    assert isinstance(got, Unavailable)
    assert got.reason.name == "INTERRUPTED"
    turn.replied(b"r")
    assert ask(store, number) == b"r"


def test_a_call_ends_once(store: Replies, first: tuple[str, Turn]) -> None:
    number, turn = first
    turn.replied(b"r")
    turn.refused(refusal(grpc.StatusCode.NOT_FOUND))
    assert ask(store, number) == b"r"
    assert (len(store), store.nbytes) == (1, 1)


# --- bounds --------------------------------------------------------------------------------------
def test_an_answer_is_kept_ten_minutes(store: Replies, clock: Clock) -> None:
    number = new_id()
    turn = ask(store, number)
    assert isinstance(turn, Turn)
    clock.now += 5000  # from its end, not from its beginning
    turn.replied(b"r")
    clock.now += KEPT_SECONDS - 1
    assert ask(store, number) == b"r"
    clock.now += 1
    assert isinstance(ask(store, number), Turn)


def test_what_is_old_goes_though_nobody_asks(store: Replies, clock: Clock) -> None:
    running = new_id()
    ask(store, running, tenant="uid:7")
    for index in range(100):
        do(store, new_id(), b"12345678", tenant=f"uid:{index % 10}")
    assert (len(store), store.nbytes) == (101, 800)
    clock.now += KEPT_SECONDS
    do(store, new_id(), b"1")
    assert (len(store), store.nbytes) == (2, 1)  # what is at work stays


@pytest.mark.parametrize("nbytes", [1, 500])
def test_who_has_most_loses_the_oldest(clock: Clock, nbytes: int) -> None:
    store = Replies(clock, entries_max=100, bytes_max=10_000)
    mine = [new_id() for _ in range(5)]
    for number in mine:
        do(store, number, bytes(nbytes), tenant="uid:1")
    theirs = [new_id() for _ in range(300)]
    for session, number in enumerate(theirs):
        do(store, number, bytes(nbytes), tenant="uid:2", session=session)
    assert len(store) == min(100, 10_000 // nbytes)
    assert store.nbytes == len(store) * nbytes
    assert all(ask(store, number) == bytes(nbytes) for number in mine)
    newest, oldest = len(theirs) - 1, 0
    assert ask(store, theirs[newest], tenant="uid:2", session=newest) == bytes(nbytes)
    assert isinstance(ask(store, theirs[oldest], tenant="uid:2", session=oldest), Turn)


def test_a_refusal_s_bytes_count(clock: Clock) -> None:
    store = Replies(clock, bytes_max=1000)
    for _ in range(5):
        turn = ask(store, new_id())
        assert isinstance(turn, Turn)
        turn.refused(refusal(grpc.StatusCode.NOT_FOUND, nbytes=400))
    assert (len(store), store.nbytes) == (2, 800)


def test_the_bookkeeping_of_an_answer_is_below_a_kibibyte() -> None:
    tracemalloc.start()
    store = Replies()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(2000):
        do(store, new_id(), b"", data=b"x")
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / 2000 < 1024
