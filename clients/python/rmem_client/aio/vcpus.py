"""Virtual CPUs and the programmes they run (``client.vcpus``).

A guest programme is a list of instructions; the functions here build one each, with addresses
and lengths in bytes::

    client.vcpus.set_programme(vm, 0, [
        vcpus.accept(0, 0x200000, level=1),
        vcpus.write(0, 0x1000, seed=7, private=True),
        vcpus.check(0, 0x1000, seed=7, private=True),
        vcpus.halt(),
    ])
"""

from __future__ import annotations

from collections.abc import Iterable

from rmem.v1 import vcpu_pb2, vcpu_pb2_grpc

from ..constants import PAGE_BYTES
from ..errors import RmemError
from ..instructions import (
    Instruction,
    accept,
    check,
    copy,
    halt,
    loop,
    relinquish,
    rescind,
    share,
    signal,
    touch,
    unshare,
    validate,
    write,
)
from ..packed import pieces
from .connection import Connection

__all__ = [
    "Instruction",
    "Vcpus",
    "accept",
    "check",
    "copy",
    "halt",
    "loop",
    "relinquish",
    "rescind",
    "share",
    "signal",
    "touch",
    "unshare",
    "validate",
    "write",
]

# ReadGuest answers with 64 KiB at most, and WriteGuest's whole message has no more
GUEST_PIECE_BYTES = 32 * 1024


class Vcpus:
    """The vCPU service; a vCPU is named by its VM's handle and its index."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = vcpu_pb2_grpc.VcpuServiceStub(connection.channel)

    async def create(self, vm: int, vcpu: int = 0) -> vcpu_pb2.CreateVcpuResponse:
        """Make a vCPU, before finalize where the vendor wants that."""
        request = vcpu_pb2.CreateVcpuRequest(vm=vm, vcpu=vcpu)
        return await self._connection.call(self._stub.CreateVcpu, request)

    async def set_programme(
        self,
        vm: int,
        vcpu: int,
        programme: Iterable[Instruction],
        *,
        lazy_accept: bool = False,
    ) -> vcpu_pb2.SetProgrammeResponse:
        """Give a vCPU that is not running a new programme, from its first instruction.

        Args:
            vm: the VM.
            vcpu: the vCPU's index.
            programme: the instructions.
            lazy_accept: the guest accepts a page that it faults on, then goes on.
        """
        request = vcpu_pb2.SetProgrammeRequest(
            vm=vm, vcpu=vcpu, programme=programme, lazy_accept=lazy_accept
        )
        return await self._connection.call(self._stub.SetProgramme, request)

    async def run(
        self,
        vm: int,
        vcpu: int = 0,
        *,
        hypercall_result: int = 0,
        max_instructions: int = 0,
        deadline_s: float | None = None,
    ) -> vcpu_pb2.RunVcpuResponse:
        """Run until the guest exits, as KVM_RUN does.

        Args:
            vm: the VM.
            vcpu: the vCPU's index.
            hypercall_result: answer to the HYPERCALL exit before: 0 or an errno.
            max_instructions: stop with INTR after so many; 0: no limit.
            deadline_s: seconds that the run may take; default: the client's deadline.
        """
        request = vcpu_pb2.RunVcpuRequest(
            vm=vm,
            vcpu=vcpu,
            hypercall_result=hypercall_result,
            max_instructions=max_instructions,
        )
        return await self._connection.call(self._stub.RunVcpu, request, deadline_s)

    async def read_guest(
        self, vm: int, gpa: int, length_bytes: int, *, vcpu: int = 0, private: bool = True
    ) -> bytes:
        """Read guest memory as the guest does, 32 KiB per call; for the guest role alone.

        Args:
            vm: the VM.
            gpa: guest physical address in bytes.
            length_bytes: length in bytes.
            vcpu: index of the vCPU that reads.
            private: whether the guest addresses the memory as private.
        """
        data = bytearray()
        for start, length in pieces(length_bytes, GUEST_PIECE_BYTES):
            request = vcpu_pb2.ReadGuestRequest(
                vm=vm, vcpu=vcpu, gpa=gpa + start, length_bytes=length, private=private
            )
            reply = await self._connection.call(self._stub.ReadGuest, request)
            data += reply.data
        return bytes(data)

    async def write_guest(
        self, vm: int, gpa: int, data: bytes, *, vcpu: int = 0, private: bool = True
    ) -> int:
        """Write guest memory as the guest does; return the revision of the last write.

        For the guest role alone. Sent 32 KiB per call; what was written before a refusal stays,
        and the error's ``progress_pages`` counts the pages of earlier calls in.

        Args:
            vm: the VM.
            gpa: guest physical address in bytes.
            data: the bytes.
            vcpu: index of the vCPU that writes.
            private: whether the guest addresses the memory as private.
        """
        revision = 0
        for start, length in pieces(len(data), GUEST_PIECE_BYTES):
            request = vcpu_pb2.WriteGuestRequest(
                vm=vm,
                vcpu=vcpu,
                gpa=gpa + start,
                data=data[start : start + length],
                private=private,
            )
            try:
                reply = await self._connection.call(self._stub.WriteGuest, request)
            except RmemError as error:
                error.add_progress(start // PAGE_BYTES)
                raise
            revision = reply.revision
        return revision
