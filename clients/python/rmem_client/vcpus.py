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

from .connection import Connection

Instruction = vcpu_pb2.Instruction


class Vcpus:
    """The vCPU service; a vCPU is named by its VM's handle and its index."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = vcpu_pb2_grpc.VcpuServiceStub(connection.channel)

    def create(self, vm: int, vcpu: int = 0) -> vcpu_pb2.CreateVcpuResponse:
        """Make a vCPU, before finalize where the vendor wants that."""
        request = vcpu_pb2.CreateVcpuRequest(vm=vm, vcpu=vcpu)
        return self._connection.call(self._stub.CreateVcpu, request)

    def set_programme(
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
        return self._connection.call(self._stub.SetProgramme, request)

    def run(
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
        return self._connection.call(self._stub.RunVcpu, request, deadline_s)


def touch(gpa: int, length_bytes: int, *, private: bool = False) -> Instruction:
    """Read a range; the bytes go nowhere."""
    return Instruction(
        opcode=vcpu_pb2.OPCODE_TOUCH, gpa=gpa, length_bytes=length_bytes, private=private
    )


def write(
    gpa: int, length_bytes: int, *, byte: int = 0, seed: int | None = None, private: bool = False
) -> Instruction:
    """Write every byte as ``byte``, or a stream of words made from ``seed`` and the address."""
    return _patterned(vcpu_pb2.OPCODE_WRITE, gpa, length_bytes, byte, seed, private)


def check(
    gpa: int, length_bytes: int, *, byte: int = 0, seed: int | None = None, private: bool = False
) -> Instruction:
    """Compare a range with what ``write`` would have put there; the exit counts the pages."""
    return _patterned(vcpu_pb2.OPCODE_CHECK, gpa, length_bytes, byte, seed, private)


def accept(gpa: int, length_bytes: int, *, level: int = 0) -> Instruction:
    """Accept private pages (TDX); ``level`` 0 for 4K, 1 for 2M."""
    return _leveled(vcpu_pb2.OPCODE_ACCEPT, gpa, length_bytes, level)


def validate(gpa: int, length_bytes: int, *, level: int = 0) -> Instruction:
    """Validate private pages (SNP); ``level`` 0 for 4K, 1 for 2M."""
    return _leveled(vcpu_pb2.OPCODE_VALIDATE, gpa, length_bytes, level)


def rescind(gpa: int, length_bytes: int, *, level: int = 0) -> Instruction:
    """Take validation back (SNP); ``level`` 0 for 4K, 1 for 2M."""
    return _leveled(vcpu_pb2.OPCODE_RESCIND, gpa, length_bytes, level)


def share(gpa: int, length_bytes: int) -> Instruction:
    """Ask for a range to become shared."""
    return Instruction(opcode=vcpu_pb2.OPCODE_SHARE, gpa=gpa, length_bytes=length_bytes)


def unshare(gpa: int, length_bytes: int) -> Instruction:
    """Ask for a range to become private again."""
    return Instruction(opcode=vcpu_pb2.OPCODE_UNSHARE, gpa=gpa, length_bytes=length_bytes)


def relinquish(gpa: int, length_bytes: int) -> Instruction:
    """Give pages back."""
    return Instruction(opcode=vcpu_pb2.OPCODE_RELINQUISH, gpa=gpa, length_bytes=length_bytes)


def copy(gpa: int, length_bytes: int, *, to_gpa: int, private: bool = False) -> Instruction:
    """Copy a range to ``to_gpa``, which is how a guest publishes bytes."""
    return Instruction(
        opcode=vcpu_pb2.OPCODE_COPY,
        gpa=gpa,
        length_bytes=length_bytes,
        value=to_gpa,
        private=private,
    )


def loop(instruction: int, times: int) -> Instruction:
    """Go back to an instruction (index in the programme) so many times."""
    return Instruction(opcode=vcpu_pb2.OPCODE_LOOP, value=instruction, times=times)


def signal(value: int) -> Instruction:
    """Exit to the VMM with a value, then go on at the next instruction."""
    return Instruction(opcode=vcpu_pb2.OPCODE_SIGNAL, value=value)


def halt() -> Instruction:
    """End the programme."""
    return Instruction(opcode=vcpu_pb2.OPCODE_HALT)


def _patterned(
    opcode: vcpu_pb2.Opcode.ValueType,
    gpa: int,
    length_bytes: int,
    byte: int,
    seed: int | None,
    private: bool,
) -> Instruction:
    return Instruction(
        opcode=opcode,
        gpa=gpa,
        length_bytes=length_bytes,
        pattern=vcpu_pb2.PATTERN_BYTE if seed is None else vcpu_pb2.PATTERN_WORDS,
        value=byte if seed is None else seed,
        private=private,
    )


def _leveled(
    opcode: vcpu_pb2.Opcode.ValueType, gpa: int, length_bytes: int, level: int
) -> Instruction:
    return Instruction(opcode=opcode, gpa=gpa, length_bytes=length_bytes, level=level, private=True)
