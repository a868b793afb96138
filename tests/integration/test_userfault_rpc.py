"""Guest memory and waiting faults through gRPC: who may, what is logged, clients that go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from handlers import PATIENCE_SECONDS, Handler
from helpers import Guest, make_guest

from rmem.v1 import file_pb2, vcpu_pb2, vm_pb2
from rmemd.access.callers import UNIX, Caller, Ticket
from rmemd.daemon.app import Daemon
from rmemd.errors import Denied
from rmemd.model.sessions import ADMIN, DEVICE, GUEST, HOST, GrantRange
from rmemd.rpc.dispatch import Call
from rmemd.rpc.vcpus import VcpuService
from rmemd.units import PAGE_SIZE

CANARY = b"correct horse battery staple, 32"


@pytest.fixture
def channel(rmemd_in_process: Daemon) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{rmemd_in_process.directory.socket}") as made:
        yield made


@pytest.fixture
def guest(rmemd_in_process: Daemon) -> Guest:
    return make_guest(rmemd_in_process.engine, "sw-protected", 8, in_place=False)


def _token(daemon: Daemon, role: str, guest: Guest) -> str:
    """Return the token of a new session below nobody, of the VM's own tenant."""
    vm = guest.vm if role == GUEST else 0
    grants = (GrantRange(guest.file, 0, 1, read_only=False),) if role == DEVICE else ()
    tenant = daemon.engine.core.vms.get(guest.vm).info.owner.tenant
    admin = Caller(daemon.access.policy.local, ADMIN)
    ticket = daemon.access.issue(admin, Ticket(tenant, role, 0, vm, grants))
    return daemon.access.redeem(ticket, UNIX)[1]


def _stub(channel: grpc.Channel, method: str, reply: Any) -> Any:
    return channel.unary_unary(
        f"/rmem.v1.{method}",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=reply.FromString,
    )


def test_guest_memory_is_for_the_guest_alone(
    rmemd_in_process: Daemon, channel: grpc.Channel, guest: Guest, capfd: pytest.CaptureFixture[str]
) -> None:
    """I24: no host, device or admin reads a guest's plaintext; the guest's own session does."""
    write = _stub(channel, "VcpuService/WriteGuest", vcpu_pb2.WriteGuestResponse)
    read = _stub(channel, "VcpuService/ReadGuest", vcpu_pb2.ReadGuestResponse)
    at = {"vm": guest.vm, "gpa": guest.gpa + 4090, "private": True}
    put = vcpu_pb2.WriteGuestRequest(data=CANARY, **at)
    get = vcpu_pb2.ReadGuestRequest(length_bytes=len(CANARY), **at)
    mine = [("rmem-token", _token(rmemd_in_process, GUEST, guest))]
    reply = write(put, metadata=mine, timeout=PATIENCE_SECONDS)
    assert reply.revision == rmemd_in_process.engine.revision
    assert read(get, metadata=mine, timeout=PATIENCE_SECONDS).data == CANARY

    others: list[list[tuple[str, str]]] = [[]]
    others += [[("rmem-token", _token(rmemd_in_process, role, guest))] for role in (HOST, DEVICE)]
    for metadata in others:
        for call, request in ((read, get), (write, put)):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=metadata, timeout=PATIENCE_SECONDS)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            assert CANARY not in repr(caught.value).encode()
    # and what the guest itself is refused says nothing of its bytes either
    put.private = False
    with pytest.raises(grpc.RpcError) as caught:
        write(put, metadata=mine, timeout=PATIENCE_SECONDS)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    logged = "".join(capfd.readouterr())
    assert "refused" in logged
    assert "correct horse" not in logged


def test_the_service_itself_asks_for_the_role(rmemd_in_process: Daemon, guest: Guest) -> None:
    """Plaintext leaves in one place, which does not rely on the table of calls alone."""
    service = VcpuService(rmemd_in_process.engine)
    request = vcpu_pb2.ReadGuestRequest(vm=guest.vm, gpa=guest.gpa, length_bytes=1, private=True)
    put = vcpu_pb2.WriteGuestRequest(vm=guest.vm, gpa=guest.gpa, data=b"x", private=True)
    context: Any = None
    for role in (HOST, DEVICE, ADMIN):
        call = Call(context, Caller("uid:1", role, vm=guest.vm))
        with pytest.raises(Denied):
            service.ReadGuest(request, call)
        with pytest.raises(Denied):
            service.WriteGuest(put, call)


@pytest.mark.parametrize("what", ["ReadShared", "PreFault", "RunVcpu"])
def test_a_client_that_goes_away_ends_its_wait(
    rmemd_in_process: Daemon, channel: grpc.Channel, guest: Guest, what: str
) -> None:
    """The wait is told of the cancellation: nobody else does anything that would wake it."""
    engine = rmemd_in_process.engine
    handler = Handler(engine)
    handler.register(guest.file, 0, guest.npages)
    calls: dict[str, tuple[Any, Any]] = {
        "ReadShared": (
            _stub(channel, "FileService/ReadShared", file_pb2.ReadSharedResponse),
            file_pb2.ReadSharedRequest(file=guest.file, length_bytes=8),
        ),
        "PreFault": (
            _stub(channel, "VmService/PreFault", vm_pb2.PreFaultResponse),
            vm_pb2.PreFaultRequest(vm=guest.vm, gpa=guest.gpa, size_bytes=PAGE_SIZE),
        ),
        "RunVcpu": (
            _stub(channel, "VcpuService/RunVcpu", vcpu_pb2.RunVcpuResponse),
            vcpu_pb2.RunVcpuRequest(vm=guest.vm),
        ),
    }
    touch = vcpu_pb2.Instruction(
        opcode=vcpu_pb2.OPCODE_TOUCH, gpa=guest.gpa, length_bytes=8, private=True
    )
    programme = vcpu_pb2.SetProgrammeRequest(vm=guest.vm, programme=[touch])
    _stub(channel, "VcpuService/SetProgramme", vcpu_pb2.SetProgrammeResponse)(
        programme, timeout=PATIENCE_SECONDS
    )
    stub, request = calls[what]
    waiting = stub.future(request)
    assert handler.one().pgoff == 0
    core = engine.core
    with core._changed:
        assert waiting.cancel()
        idle = core._changed.wait_for(
            lambda: not core.pending_faults.waiting and not core.running, PATIENCE_SECONDS
        )
    assert idle
    assert engine.pending_userfaults() == []
