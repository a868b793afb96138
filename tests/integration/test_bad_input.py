"""Bad input, case by case: the kernel's errno where it has one, the field, and nothing changed.

``test_fuzz`` throws nonsense at every RPC; here each refusal of restrictedmem.md §2 goes through
the wire, in the kernel's order of checks, and clients misbehave in ways that no message can.
"""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from daemons import DEBUGGABLE, METHODS, PATIENCE_SECONDS, Answer, Daemon, Rpc, eventually
from google.protobuf.message import Message
from rpc_world import GUEST_MEMFD, PAGE, PRIVATE, World, whole_state

from rmem.v1 import file_pb2, host_pb2, session_pb2, types_pb2, vcpu_pb2, vm_pb2
from rmem_client import Event, RmemError, vcpus

TOP = 1 << 63
U64 = 1 << 64
SMALL_LIMIT, BULK_LIMIT = 1 << 16, (1 << 20) + (1 << 16)
BULK = {"WriteShared", "WritePhysical", "Populate", "SetMemoryAttributes", "SetProgramme"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon for the tests that change nothing, which is most of them."""
    daemon = Daemon(tmp_path_factory.mktemp("bad"), "--host-memory", "64M").start()
    try:
        yield daemon
        daemon.stop()
    finally:
        if daemon.process.poll() is None:
            daemon.kill()
    assert "Traceback" not in daemon.log


@pytest.fixture(scope="module")
def world(shared: Daemon) -> World:
    """The guests in it."""
    return World(shared.rpc())


def refused(world: World, name: str, request: Message) -> Answer:
    """Make a call that must be refused, and change nothing."""
    before = whole_state(world.rpc)
    answer = world.rpc.call(name, request, metadata=world.sent_with(name))
    assert not answer.ok, f"{name} was taken: {request}"
    assert answer.refusal is not None, answer.message
    assert whole_state(world.rpc) == before, f"{name}: {answer.message}"
    return answer


@dataclass(frozen=True)
class Case:
    """A bad request: ``fields`` over the valid one, and what the kernel says of it."""

    method: str
    fields: dict[str, Any]
    reason: str
    errno: int
    field: str = ""

    def request(self, world: World) -> Message:
        """Return the request; a field that is a function is asked."""
        request = world.valid(self.method)
        for name, value in self.fields.items():
            setattr(request, name, value(world) if callable(value) else value)
        return request

    def __str__(self) -> str:
        shown = (f"{k}={v:#x}" for k, v in self.fields.items() if isinstance(v, int))
        return "-".join((self.method, self.reason, *shown))


def tdx(world: World) -> int:
    """Return the VM that converts by attributes."""
    return world.tdx.vm


def fallocate(reason: str, number: int, field: str, mode: int, offset: int, length: int) -> Case:
    """Return a case of fallocate()."""
    fields = {"mode": mode, "offset_bytes": offset, "length_bytes": length}
    return Case("Fallocate", fields, reason, number, field)


def region(reason: str, number: int, field: str, **fields: Any) -> Case:
    """Return a case of KVM_SET_USER_MEMORY_REGION2 for a slot with a restricted file."""
    whole = {
        "slot": 2, "flags": GUEST_MEMFD, "gpa": 1 << 30, "size_bytes": 4 * PAGE,
        "file": lambda world: world.tdx.file, **fields,
    }  # fmt: skip
    return Case("SetMemoryRegion", whole, reason, number, field)


EINVAL, EEXIST, EBADF, EFAULT = errno.EINVAL, errno.EEXIST, errno.EBADF, errno.EFAULT
EOPNOTSUPP, EFBIG, ENOTTY, ENODEV = errno.EOPNOTSUPP, errno.EFBIG, errno.ENOTTY, errno.ENODEV
OFFSET, LENGTH, SIZE = "offset_bytes", "length_bytes", "size_bytes"
CASES = [
    # fallocate, in the order of its checks
    fallocate("BAD_RANGE", EINVAL, OFFSET, 1, -PAGE, PAGE),
    fallocate("BAD_RANGE", EINVAL, OFFSET, 0xFF, -1, 0),
    fallocate("BAD_RANGE", EINVAL, LENGTH, 1, 0, 0),
    fallocate("BAD_RANGE", EINVAL, LENGTH, 0xFF, 0, -PAGE),
    fallocate("FALLOCATE_MODE", EOPNOTSUPP, "mode", 2, 0, PAGE),
    fallocate("FALLOCATE_MODE", EOPNOTSUPP, "mode", 0x4000_0000, 0, PAGE),
    fallocate("FALLOCATE_MODE", EOPNOTSUPP, "mode", 2, TOP - PAGE, TOP - PAGE),
    fallocate("OFFSET_TOO_BIG", EFBIG, LENGTH, 1, TOP - PAGE, 2 * PAGE),
    fallocate("OFFSET_TOO_BIG", EFBIG, LENGTH, 3, 1, TOP - 1),
    fallocate("OFFSET_TOO_BIG", EFBIG, LENGTH, 0, TOP - PAGE, 2 * PAGE),
    fallocate("FALLOCATE_MODE", EOPNOTSUPP, "mode", 0, 0, PAGE),
    fallocate("FALLOCATE_MODE", EOPNOTSUPP, "mode", 17, 1, PAGE),
    fallocate("NOT_PAGE_ALIGNED", EINVAL, OFFSET, 1, 1, PAGE),
    fallocate("NOT_PAGE_ALIGNED", EINVAL, LENGTH, 3, 0, PAGE - 1),
    fallocate("BAD_RANGE", EINVAL, LENGTH, 1, 31 * PAGE, 2 * PAGE),
    fallocate("BAD_RANGE", EINVAL, LENGTH, 1, TOP - PAGE * 2, PAGE),
    # create: flags, then the size
    Case("CreateFile", {"flags": 4, "size_bytes": 0}, "UNKNOWN_FLAG", EINVAL, "flags"),
    Case("CreateFile", {"flags": 1 << 63}, "UNKNOWN_FLAG", EINVAL, "flags"),
    Case("CreateFile", {"size_bytes": 0}, "BAD_RANGE", EINVAL, SIZE),
    Case("CreateFile", {"size_bytes": -PAGE}, "BAD_RANGE", EINVAL, SIZE),
    Case("CreateFile", {"size_bytes": 1}, "NOT_PAGE_ALIGNED", EINVAL, SIZE),
    Case("CreateFile", {"size_bytes": TOP - 1}, "NOT_PAGE_ALIGNED", EINVAL, SIZE),
    # bind
    region("SLOT_INVALID", EINVAL, "flags", flags=GUEST_MEMFD | 2),
    region("SLOT_INVALID", EINVAL, "flags", flags=GUEST_MEMFD | 1),
    region("SLOT_INVALID", EINVAL, "flags", flags=8),
    region("SLOT_INVALID", EINVAL, SIZE, size_bytes=1),
    region("SLOT_INVALID", EINVAL, "gpa", gpa=1),
    region("SLOT_INVALID", EINVAL, "userspace_addr", userspace_addr=1),
    region("SLOT_INVALID", EINVAL, "file_offset_bytes", file_offset_bytes=1),
    region("SLOT_INVALID", EINVAL, "file_offset_bytes", file_offset_bytes=U64 - PAGE),
    region("SLOT_INVALID", EINVAL, "gpa", gpa=U64 - PAGE),
    region("NO_SLOT_NUMBERS", EINVAL, "slot", slot=32764),
    region("SLOT_IMMUTABLE", EINVAL, "slot", slot=0),
    region("SLOT_OVERLAP", EEXIST, "gpa", gpa=31 * PAGE, file=-1),
    region("NO_SUCH_FILE", EBADF, "file", file=-1),
    region("NO_SUCH_FILE", EBADF, "file", file=0),
    region("BINDING_FOREIGN", EINVAL, "file", file=lambda world: world.sw.file),
    region("SLOT_INVALID", EINVAL, "file_offset_bytes", file_offset_bytes=30 * PAGE),
    region("SLOT_INVALID", EINVAL, "file_offset_bytes", file_offset_bytes=TOP - PAGE),
    region("BINDING_OVERLAP", EINVAL, "file_offset_bytes", file_offset_bytes=28 * PAGE),
    region("NO_SUCH_SLOT", EINVAL, "slot", slot=7, size_bytes=0),
    # conversion by the other interface, and in place
    Case("ConvertFile", {"file": lambda w: w.tdx.file}, "WRONG_PERSONALITY", ENOTTY, "file"),
    Case("ConvertFile", {"flags": 1}, "UNKNOWN_FLAG", EINVAL, "flags"),
    Case("ConvertFile", {"attributes": 1}, "ATTRIBUTES_UNSUPPORTED", EINVAL, "attributes"),
    Case("ConvertFile", {"size_bytes": 0}, "BAD_RANGE", EINVAL, SIZE),
    Case("ConvertFile", {"offset_bytes": -PAGE}, "BAD_RANGE", EINVAL, SIZE),
    Case("ConvertFile", {"offset_bytes": 1}, "NOT_PAGE_ALIGNED", EINVAL, OFFSET),
    Case("ConvertFile", {"size_bytes": 25 * PAGE}, "BAD_RANGE", EINVAL, SIZE),
    Case("SetMemoryAttributes", {"vm": lambda w: w.sw.vm}, "WRONG_PERSONALITY", ENOTTY),
    Case("SetMemoryAttributes", {"flags": 1}, "UNKNOWN_FLAG", EINVAL, "flags"),
    Case("SetMemoryAttributes", {"packed": b"x" * 23}, "BAD_REQUEST", EINVAL, "packed"),
    # population, faults
    Case("Populate", {"gpa": 1}, "NOT_PAGE_ALIGNED", EINVAL, "gpa"),
    Case("Populate", {"source": b"x"}, "NOT_PAGE_ALIGNED", EINVAL, "gpa"),
    Case("Populate", {"source": b""}, "BAD_RANGE", EINVAL, "source"),
    Case("Populate", {"gpa": U64 - PAGE}, "BAD_RANGE", EINVAL, "source"),
    Case("Populate", {"gpa": 1 << 40}, "NOT_PRIVATE", EINVAL, "gpa"),
    Case("PreFault", {"gpa": 1}, "NOT_PAGE_ALIGNED", EINVAL, "gpa"),
    Case("PreFault", {"size_bytes": 0}, "BAD_RANGE", EINVAL, SIZE),
    Case("PreFault", {"gpa": U64 - PAGE}, "BAD_RANGE", EINVAL, SIZE),
    Case("PreFault", {"gpa": 1 << 40}, "NO_MEMSLOT", errno.ENOENT, "gpa"),
    # the host's mapping: SIGBUS, which GUP says as EFAULT
    Case("ReadShared", {"offset_bytes": 32 * PAGE}, "HOST_SIGBUS", EFAULT, OFFSET),
    Case("ReadShared", {"offset_bytes": 31 * PAGE + 1}, "HOST_SIGBUS", EFAULT, OFFSET),
    Case("ReadShared", {"offset_bytes": 4 * PAGE}, "HOST_SIGBUS", EFAULT),
    Case("ReadShared", {"length_bytes": 0}, "BAD_RANGE", EINVAL, OFFSET),
    Case("ReadShared", {"length_bytes": 1 << 40}, "MESSAGE_TOO_BIG", errno.EMSGSIZE, LENGTH),
    Case("WriteShared", {"offset_bytes": 3 * PAGE + 1}, "HOST_SIGBUS", EFAULT),
    Case("WriteShared", {"data": b""}, "BAD_RANGE", EINVAL, OFFSET),
    Case("PinPages", {"purpose": ""}, "BAD_REQUEST", EINVAL, "purpose"),
    Case("PinPages", {"purpose": "p" * 65}, "BAD_REQUEST", EINVAL, "purpose"),
    Case("PinPages", {"holder": "\n"}, "BAD_REQUEST", EINVAL, "holder"),
    Case("SetPolicy", {"policy": 999}, "BAD_REQUEST", EINVAL, "policy"),
    # frames
    Case("ReadPhysical", {"pfn": 16384}, "BAD_RANGE", EINVAL, "pfn"),
    Case("ReadPhysical", {"npages": 257}, "BAD_RANGE", EINVAL, "npages"),
    Case("ReadPhysical", {"agent": 0}, "BAD_REQUEST", EINVAL, "agent"),
    Case("ReadPhysical", {"agent": 99}, "BAD_REQUEST", EINVAL, "agent"),
    Case("ReadPhysical", {"level": 99}, "BAD_REQUEST", EINVAL, "level"),
    Case("WritePhysical", {"data": b"x"}, "BAD_REQUEST", EINVAL, "data"),
    Case("CopyPhysical", {"dst_pfn": 16384}, "BAD_RANGE", EINVAL, "dst_pfn"),
    Case("Compact", {"node": 1}, "BAD_NODE", EINVAL, "node"),
    Case("Migrate", {"node": 1}, "BAD_NODE", EINVAL, "node"),
    # VMs and vCPUs
    Case("CreateVm", {"consumer": "sev"}, "NO_SUCH_CONSUMER", errno.ENOENT, "consumer"),
    Case("CreateVm", {"personality": 9}, "BAD_REQUEST", EINVAL, "personality"),
    Case("CreateVm", {"memlock_pages": -1}, "BAD_REQUEST", EINVAL, "memlock_pages"),
    Case("CreateVm", {"name": "\x1b[2J"}, "BAD_REQUEST", EINVAL, "name"),
    Case("CreateVcpu", {"vcpu": 0}, "EXISTS", EEXIST, "vcpu"),
    Case("CreateVcpu", {"vcpu": 1024}, "BAD_REQUEST", EINVAL, "vcpu"),
    Case("RunVcpu", {"vcpu": 9}, "NO_SUCH_VCPU", errno.ENOENT, "vcpu"),
    Case("RunVcpu", {"max_instructions": -1}, "BAD_REQUEST", EINVAL, "max_instructions"),
    # wrong state
    Case("RunVcpu", {"vm": tdx}, "NOT_FINALIZED", EINVAL),
    Case("Finalize", {"vm": lambda w: w.gup}, "OP_NOT_IMPLEMENTED_BY_CONSUMER", EOPNOTSUPP),
    Case("Populate", {"vm": lambda w: w.gup}, "OP_NOT_IMPLEMENTED_BY_CONSUMER", EOPNOTSUPP),
    Case("PreFault", {"vm": tdx, "gpa": 8 * PAGE}, "PRE_FAULT_TOO_EARLY", EOPNOTSUPP),
    Case("Watch", {"start_revision": TOP - 1}, "BAD_REQUEST", EINVAL, "start_revision"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_s_errno(world: World, case: Case) -> None:
    if case.method == "RunVcpu" and case.reason == "NOT_FINALIZED":
        programme = vcpu_pb2.SetProgrammeRequest(
            vm=world.tdx.vm, programme=[vcpus.touch(0, PAGE, private=True)]
        )
        world.must("SetProgramme", programme)
    answer = refused(world, case.method, case.request(world))
    said = (answer.reason, answer.refusal.errno, answer.refusal.errno_name)
    name = "" if not case.errno else errno.errorcode[case.errno]
    name = "EOPNOTSUPP" if name == "ENOTSUP" else name
    assert said == (case.reason, case.errno, name), answer.message
    assert answer.refusal.field == case.field


ATTRIBUTES = [
    ("ATTRIBUTES_UNSUPPORTED", "attributes", 0, PAGE, 1),
    ("ATTRIBUTES_UNSUPPORTED", "attributes", 1, 0, PRIVATE | 1),
    ("BAD_RANGE", "size_bytes", 0, 0, PRIVATE),
    ("BAD_RANGE", "size_bytes", U64 - PAGE, 2 * PAGE, PRIVATE),
    ("NOT_PAGE_ALIGNED", "gpa", 1, PAGE, PRIVATE),
    ("NOT_PAGE_ALIGNED", "size_bytes", 0, PAGE + 1, PRIVATE),
]


@pytest.mark.parametrize("packed", [False, True], ids=["readable", "packed"])
@pytest.mark.parametrize(("reason", "field", "gpa", "size", "attributes"), ATTRIBUTES)
def test_attributes_are_checked_before_any_is_set(
    world: World, packed: bool, reason: str, field: str, gpa: int, size: int, attributes: int
) -> None:
    """The range at fault is the third; the first two must not be set either."""
    ranges = [(0, PAGE, 0), (PAGE, PAGE, 0), (gpa, size, attributes)]
    request = vm_pb2.SetMemoryAttributesRequest(vm=world.tdx.vm)
    if packed:
        request.packed = b"".join(n.to_bytes(8, "little") for r in ranges for n in r)
    else:
        for one in ranges:
            request.ranges.add(gpa=one[0], size_bytes=one[1], attributes=one[2])
    answer = refused(world, "SetMemoryAttributes", request)
    assert (answer.reason, answer.refusal.errno) == (reason, EINVAL)
    assert answer.refusal.field == f"ranges[2].{field}"
    runs = world.must(
        "GetMemoryAttributes", vm_pb2.GetMemoryAttributesRequest(vm=world.tdx.vm, size_bytes=PAGE)
    ).runs
    assert [run.attributes for run in runs] == [PRIVATE]


def test_private_needs_a_vm_with_private_memory(world: World) -> None:
    request = vm_pb2.SetMemoryAttributesRequest(vm=world.gup)
    request.ranges.add(gpa=0, size_bytes=PAGE, attributes=PRIVATE)
    answer = refused(world, "SetMemoryAttributes", request)
    assert (answer.reason, answer.refusal.errno) == ("ATTRIBUTES_UNSUPPORTED", EINVAL)
    # 0 over a valid range is a no-op
    request.ranges[0].attributes = 0
    assert world.must("SetMemoryAttributes", request).unchanged_ranges == 1


def test_in_place_conversion_names_who_holds_the_page(world: World) -> None:
    request = file_pb2.ConvertFileRequest(
        file=world.sw.file, size_bytes=4 * PAGE, attributes=PRIVATE
    )
    answer = refused(world, "ConvertFile", request)
    said = answer.refusal
    assert (said.reason, said.errno_name, said.error_offset_bytes) == ("FOLIO_BUSY", "EAGAIN", PAGE)
    assert answer.code is grpc.StatusCode.ABORTED
    assert (said.page, said.state) == ("pgoff 0x1", "shared")
    (holder,) = said.holders
    assert (holder.name, holder.purpose, holder.count) == (f"device pin {world.pin}", "DMA", 1)


def test_a_file_without_mmap_has_no_mapping(world: World) -> None:
    create = file_pb2.CreateFileRequest(vm=world.sw.vm, size_bytes=PAGE)
    file = world.must("CreateFile", create).file
    read = file_pb2.ReadSharedRequest(file=file, length_bytes=1)
    answer = refused(world, "ReadShared", read)
    assert (answer.reason, answer.refusal.errno) == ("NOT_MAPPABLE", ENODEV)
    world.must("CloseFile", file_pb2.CloseFileRequest(file=file))


def test_releases_differ_in_one_errno(daemons: Callable[..., Daemon]) -> None:
    world = World(daemons("--linux-release", "7.2").rpc())
    request = world.slot(world.tdx.vm, world.tdx.file, 4, slot=2, gpa=1 << 30)
    answer = refused(world, "SetMemoryRegion", request)
    assert (answer.reason, answer.refusal.errno) == ("BINDING_OVERLAP", EEXIST)


def test_a_closed_file_and_a_finalized_vm(daemon: Daemon) -> None:
    world = World(daemon.rpc())
    world.must("Finalize", world.valid("Finalize"))
    for name in ("Populate", "Finalize"):
        answer = refused(world, name, world.valid(name))
        assert (answer.reason, answer.refusal.errno) == ("NOT_PAUSED", EINVAL), name
        assert answer.code is grpc.StatusCode.FAILED_PRECONDITION
    world.must("CloseFile", file_pb2.CloseFileRequest(file=world.sw.file))
    answer = refused(world, "PreFault", world.valid("PreFault"))
    assert (answer.reason, answer.refusal.errno) == ("FILE_GONE", EFAULT)


# --- handles -------------------------------------------------------------------------------------
KINDS = {
    "vm": ("NO_SUCH_VM", errno.ENOENT), "file": ("NO_SUCH_FILE", EBADF),
    "session": ("NO_SUCH_SESSION", errno.ENOENT),
    "pin": ("NO_SUCH_PIN", errno.ENOENT), "rule": ("NO_SUCH_RULE", errno.ENOENT),
}  # fmt: skip
# 0 means all or any, or the handle is an output, or a filter for what is gone as well
FREE = {
    ("GetAccounting", "vm"): {0}, ("AddFaultRule", "rule.vm"): {0},
    ("AddFaultRule", "rule.rule"): 0, ("Watch", "vm"): 0, ("ListPins", "file"): {0},
    # 0 is the caller's own
    ("CloseSession", "session"): {0},
}  # fmt: skip


def _paths(message: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in message.fields:
        path = prefix + field.name
        if field.name in KINDS and field.type == field.TYPE_INT64:
            yield path, field.name
        elif field.message_type is not None and not field.is_repeated:
            yield from _paths(field.message_type, path + ".")


HANDLES = [
    (name, path, kind)
    for name in sorted(METHODS)
    for path, kind in _paths(METHODS[name].input_type)
    if FREE.get((name, path)) != 0
]


@pytest.fixture(scope="module")
def stale(world: World) -> dict[str, int]:
    """Handles that were good once."""
    gone = world.guest("null", 4)
    world.must("DestroyVm", vm_pb2.DestroyVmRequest(vm=gone.vm))
    world.must("CloseFile", file_pb2.CloseFileRequest(file=gone.file))
    pin = world.must("PinPages", world.valid("PinPages")).pin
    world.must("UnpinPages", file_pb2.UnpinPagesRequest(pin=pin))
    rule = world.must("AddFaultRule", world.valid("AddFaultRule")).rule
    world.must("RemoveFaultRule", host_pb2.RemoveFaultRuleRequest(rule=rule))
    session = world.must("OpenSession").session.session
    world.must("CloseSession", session_pb2.CloseSessionRequest(session=session))
    return {"vm": gone.vm, "file": gone.file, "pin": pin, "rule": rule, "session": session}


@pytest.mark.parametrize(("name", "path", "kind"), HANDLES)
def test_unknown_and_stale_handles(
    world: World, stale: dict[str, int], name: str, path: str, kind: str
) -> None:
    reason, number = KINDS[kind]
    for handle in (0, -1, 1 << 62, -TOP, TOP - 1, stale[kind]):
        if handle in (FREE.get((name, path)) or ()):
            continue
        request: Any = world.valid(name)
        if (name, path) == ("SetMemoryRegion", "file"):
            request.flags = GUEST_MEMFD
        target = request
        for step in path.split(".")[:-1]:
            target = getattr(target, step)
        setattr(target, path.rpartition(".")[2], handle)
        answer = refused(world, name, request)
        assert answer.code is grpc.StatusCode.NOT_FOUND, f"{handle}: {answer.message}"
        assert (answer.reason, answer.refusal.errno) == (reason, number)


def test_a_page_of_somebody_else_is_not_found(world: World) -> None:
    """A guest frame is looked up in its own VM: no frame there is no frame at all."""
    address = host_pb2.PageAddress(guest=host_pb2.GuestPage(vm=world.gup, gfn=0x1234))
    answer = refused(world, "GetPage", host_pb2.GetPageRequest(page=address))
    assert answer.reason == "FRAME_NOT_OWNED"


# --- sizes ---------------------------------------------------------------------------------------
def _padded(size: int) -> bytes:
    """Return a message of ``size`` bytes that parses: one field that nobody knows."""
    head = b"\xc2\x3e"
    length = size - len(head) - 3
    return head + bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + b"x" * (
        length
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(METHODS))
def test_oversized_messages(world: World, name: str) -> None:
    if name not in BULK:
        answer = world.rpc.call_raw(name, _padded(SMALL_LIMIT))
        assert answer.reason != "MESSAGE_TOO_BIG", answer.message
        answer = world.rpc.call_raw(name, _padded(SMALL_LIMIT + 1))
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (answer.reason, answer.refusal.errno_name) == ("MESSAGE_TOO_BIG", "EMSGSIZE")
    else:
        answer = world.rpc.call_raw(name, _padded(SMALL_LIMIT + 1))
        assert answer.reason != "MESSAGE_TOO_BIG", answer.message
        # beyond what any call takes, gRPC itself refuses: nothing is received, so no detail
        answer = world.rpc.call_raw(name, _padded(BULK_LIMIT + 1))
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert world.rpc.call("GetHost").ok


def test_what_a_client_sent_never_keeps_the_refusal_from_arriving(world: World) -> None:
    """Clients take 8 KiB of metadata, and a refusal quotes the request."""
    for text in ("x" * 60_000, "é" * 30_000, "\U0001f600" * 15_000):
        for name, request in (
            ("CreateVm", vm_pb2.CreateVmRequest(consumer=text)),
            ("CreateVm", vm_pb2.CreateVmRequest(consumer="null", config={text: ""})),
            ("ExplainReason", host_pb2.ExplainReasonRequest(reason=text)),
        ):
            answer = refused(world, name, request)
            size = len(answer.message.encode()) + answer.status.ByteSize() * 4 / 3
            assert size < 8192
            assert text[:20].upper() in answer.message.upper()


def test_pages_named_over_and_over_are_not_counted_out(world: World) -> None:
    """8000 times the whole host would be gigabytes of page numbers."""
    request = host_pb2.MigrateRequest(pfns=[types_pb2.PageRange(start=0, npages=16384)] * 8000)
    answer = refused(world, "Migrate", request)
    assert (answer.reason, answer.refusal.field) == ("BAD_RANGE", "pfns")


# --- a full host ---------------------------------------------------------------------------------
def test_a_full_host(daemon: Daemon) -> None:
    client = daemon.client()
    world = World(daemon.rpc())
    vm = client.vms.create("null")
    file = client.files.create(vm, 1 << 30)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=1 << 30, file=file)
    free = client.host.get().free_pages
    client.files.allocate(file, 0, (free - 2) * PAGE)
    assert client.host.get().free_pages == 2
    guest_pages = client.vms.get(world.sw.vm)

    allocate = file_pb2.FallocateRequest(
        file=file, mode=1, offset_bytes=1 << 29, length_bytes=3 * PAGE
    )
    prefault = vm_pb2.PreFaultRequest(vm=vm, gpa=1 << 29, size_bytes=PAGE)
    write = file_pb2.WriteSharedRequest(file=file, data=b"x" * 3 * PAGE)
    answer = refused(world, "WriteShared", write)
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (answer.reason, answer.refusal.errno) == ("NO_FRAMES", errno.ENOMEM)
    # an allocation keeps the pages before the one that it was refused
    answer = world.rpc.call("Fallocate", allocate, metadata=world.sent_with("Fallocate"))
    assert (answer.ok, answer.reason) == (False, "NO_FRAMES")
    assert (answer.refusal.errno, answer.refusal.progress_pages) == (errno.ENOMEM, 2)
    assert client.host.get().free_pages == 0
    assert client.files.punch(file, 1 << 29, 3 * PAGE) == 2
    # what fits still fits, and the others go on
    assert world.must("PreFault", prefault).done_pages == 1
    assert world.must("ReadShared", world.valid("ReadShared")).data.startswith(b"shared bytes")
    prefault.gpa += PAGE
    assert world.must("PreFault", prefault).done_pages == 1
    prefault.gpa += PAGE
    assert refused(world, "PreFault", prefault).reason == "NO_FRAMES"
    # a guest that runs out of memory exits, and can go on when there is some
    client.vcpus.create(vm, 0)
    client.vcpus.set_programme(vm, 0, [vcpus.touch(1 << 28, PAGE, private=True), vcpus.halt()])
    exited = client.vcpus.run(vm, 0)
    assert exited.exit_reason == vcpu_pb2.EXIT_REASON_INTERNAL_ERROR
    assert exited.refusal.reason == "NO_FRAMES"
    assert client.vms.get(world.sw.vm) == guest_pages
    assert client.files.punch(file, 0, PAGE) == 1
    assert client.vcpus.run(vm, 0).exit_reason == vcpu_pb2.EXIT_REASON_HLT


# --- clients that go away ------------------------------------------------------------------------
GO_AWAY = """
import sys
from rmem_client import Client, Event, vcpus
client = Client(sys.argv[1], deadline_s=600)
watch = client.watch()
watch.start()
print("watching", flush=True)
client.vcpus.run(int(sys.argv[2]), 0)
"""


def _looping(daemon: Daemon) -> tuple[Any, int]:
    client = daemon.client()
    vm = client.vms.create("gup")
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=2 * PAGE)
    client.vcpus.create(vm, 0)
    # once before, so that the slot's memfd is there
    client.vcpus.set_programme(vm, 0, [vcpus.touch(0, PAGE), vcpus.halt()])
    assert client.vcpus.run(vm, 0).exit_reason == vcpu_pb2.EXIT_REASON_HLT
    client.vcpus.set_programme(vm, 0, [vcpus.touch(PAGE, PAGE), vcpus.loop(0, TOP - 1)])
    return client, vm


def _is_idle(client: Any, vm: int) -> bool:
    """Return whether the vCPU is out: a running one takes no programme."""
    try:
        client.vcpus.set_programme(vm, 0, [vcpus.halt()])
    except RmemError as error:
        if error.reason != "VCPU_BUSY":
            raise
        return False
    return True


@pytest.mark.parametrize("how", ["killed", "closed", "deadline"])
def test_a_client_that_goes_away_mid_call(daemons: Callable[..., Daemon], how: str) -> None:
    daemon = daemons(*DEBUGGABLE)
    client, vm = _looping(daemon)
    other, other_vm = _looping(daemon)
    baseline = len(daemon.fds())
    with ThreadPoolExecutor() as pool, other.watch(vm=vm, kinds=["mapped"]) as watch:
        watch.start()
        running = pool.submit(other.vcpus.run, other_vm, 0)
        if how == "killed":
            command = [sys.executable, "-c", GO_AWAY, str(daemon.socket_dir), str(vm)]
            goer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert goer.stdout is not None
            assert goer.stdout.readline() == "watching\n"
        else:
            leaver = daemon.client()
            leaver_watch = leaver.watch()
            leaver_watch.start()
            deadline = 3.0 if how == "deadline" else 600.0
            gone = pool.submit(leaver.vcpus.run, vm, 0, deadline_s=deadline)
        next(item for item in watch if isinstance(item, Event))
        if how != "deadline":
            assert not _is_idle(client, vm)
        if how == "killed":
            goer.send_signal(signal.SIGKILL)
            goer.wait(PATIENCE_SECONDS)
            goer.stdout.close()
        elif how == "closed":
            leaver_watch.close()
            leaver.close()
            assert isinstance(gone.exception(PATIENCE_SECONDS), Exception)
        else:
            # just before the deadline the daemon answers, so that nothing of the run is lost
            assert gone.result(PATIENCE_SECONDS).exit_reason == vcpu_pb2.EXIT_REASON_INTR
            leaver_watch.close()
            leaver.close()
        assert eventually(lambda: _is_idle(client, vm)), "the vCPU still runs"
        assert not running.done(), "the other client's call goes on"
        assert not _is_idle(client, other_vm)
        assert eventually(lambda: client.host.get() and len(daemon.fds()) == baseline), daemon.fds()
        # a slot that goes makes the guest exit
        client.vms.delete_memory_region(other_vm, 0)
        assert running.result(PATIENCE_SECONDS).exit_reason == vcpu_pb2.EXIT_REASON_MMIO
    client.vms.destroy(vm)
    client.vms.destroy(other_vm)


@pytest.mark.parametrize("guests", [1, 3])
def test_running_guests_do_not_starve_the_others(daemon: Daemon, guests: int) -> None:
    """Fifty calls took a minute while one vCPU ran, a millisecond each without one."""
    looping = [_looping(daemon) for _ in range(guests)]
    caller = daemon.client()
    with ThreadPoolExecutor() as pool:
        running = []
        for client, vm in looping:
            with client.watch(vm=vm, kinds=["mapped"]) as watch:
                watch.start()
                running.append(pool.submit(client.vcpus.run, vm, 0))
                next(item for item in watch if isinstance(item, Event))
        begun = time.monotonic()
        for _ in range(50):
            caller.host.get()
        took = time.monotonic() - begun
        for client, vm in looping:
            client.vms.delete_memory_region(vm, 0)
        for one in running:
            assert one.result(PATIENCE_SECONDS).exit_reason == vcpu_pb2.EXIT_REASON_MMIO
    assert took < 2, f"{took:.1f} s"


def test_a_client_that_watches_and_reads_nothing(daemons: Callable[..., Daemon]) -> None:
    """Sixteen streams are open at most; calls go on, and a stream that ends makes room."""
    daemon = daemons("--set", "limits.watches=-1")
    stalled = daemon.rpc()
    streams = [stalled.channel.unary_stream("/rmem.v1.WatchService/Watch")(b"") for _ in range(16)]
    for stream in streams:
        next(stream)
    rpc: Rpc = daemon.rpc()
    answer = rpc.call("Watch")
    assert (answer.reason, answer.code) == ("TOO_MANY", grpc.StatusCode.RESOURCE_EXHAUSTED)
    for _ in range(50):
        assert rpc.call("CreateVm", vm_pb2.CreateVmRequest(consumer="null")).ok
    streams[0].cancel()
    assert eventually(lambda: rpc.call("Watch").ok)


def test_hundreds_of_silent_connections_do_not_stop_the_others(daemon: Daemon) -> None:
    """At most 256 connections; those who say nothing are cut off, and nothing is leaked."""
    import socket

    rpc = daemon.rpc()
    assert rpc.call("GetHost").ok
    silent = []
    for _ in range(200):
        one = socket.socket(socket.AF_UNIX)
        one.connect(str(daemon.socket))
        silent.append(one)
    assert rpc.call("GetHost").ok
    assert daemon.rpc().call("GetHost").ok
    for one in silent:
        one.close()
    assert rpc.call("GetHost").ok
