"""VcpuService: vCPUs. Decode, call the engine, encode; nothing else."""

from __future__ import annotations

from typing import cast

from rmem.v1 import vcpu_pb2 as pb
from rmemd.engine.engine import Engine
from rmemd.engine.programme import Instruction, Opcode, Pattern
from rmemd.engine.vcpu import Exited
from rmemd.errors import BAD_REQUEST, ROLE_DENIED
from rmemd.model.sessions import GUEST
from rmemd.rpc.dispatch import Call
from rmemd.rpc.status import refusal_of

U64_MAX = (1 << 64) - 1
OPCODES = frozenset(int(opcode) for opcode in Opcode)
PATTERNS = frozenset(int(pattern) for pattern in Pattern)


class VcpuService:
    """vCPUs by VM and index."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def CreateVcpu(self, request: pb.CreateVcpuRequest, call: Call) -> pb.CreateVcpuResponse:
        self._engine.create_vcpu(request.vm, request.vcpu)
        return pb.CreateVcpuResponse(revision=self._engine.answered)

    def SetProgramme(self, request: pb.SetProgrammeRequest, call: Call) -> pb.SetProgrammeResponse:
        programme = tuple(_decode(i, one) for i, one in enumerate(request.programme))
        self._engine.set_programme(request.vm, request.vcpu, programme, request.lazy_accept)
        return pb.SetProgrammeResponse(revision=self._engine.answered)

    def RunVcpu(self, request: pb.RunVcpuRequest, call: Call) -> pb.RunVcpuResponse:
        if request.max_instructions < 0:
            raise BAD_REQUEST("max_instructions is negative", field="max_instructions")
        exited = self._engine.run_vcpu(
            request.vm, request.vcpu, request.hypercall_result, request.max_instructions,
            call.cancelled,
        )  # fmt: skip
        return _encode(exited, self._engine.answered)

    def ReadGuest(self, request: pb.ReadGuestRequest, call: Call) -> pb.ReadGuestResponse:
        _require_guest(call)
        data = self._engine.read_guest(
            request.vm, request.vcpu, request.gpa, request.length_bytes, request.private,
            call.cancelled,
        )  # fmt: skip
        return pb.ReadGuestResponse(revision=self._engine.answered, data=data)

    def WriteGuest(self, request: pb.WriteGuestRequest, call: Call) -> pb.WriteGuestResponse:
        _require_guest(call)
        self._engine.write_guest(
            request.vm, request.vcpu, request.gpa, request.data, request.private, call.cancelled
        )
        return pb.WriteGuestResponse(revision=self._engine.answered)


def _require_guest(call: Call) -> None:
    """Refuse everybody but the guest, where its plaintext would leave: the table says so too."""
    if call.caller.role != GUEST:
        raise ROLE_DENIED(
            f"guest memory is not for the {call.caller.role} role",
            state=f"role {call.caller.role}", rule="DESIGN §4: no host-role reply has plaintext",
        )  # fmt: skip


def _decode(index: int, one: pb.Instruction) -> Instruction:
    if int(one.opcode) not in OPCODES:
        raise BAD_REQUEST(f"no opcode {one.opcode}", field=f"programme[{index}].opcode")
    pattern = int(one.pattern) or int(Pattern.BYTE)
    if pattern not in PATTERNS:
        raise BAD_REQUEST(f"no pattern {one.pattern}", field=f"programme[{index}].pattern")
    return Instruction(
        Opcode(one.opcode), one.gpa, one.length_bytes, Pattern(pattern), one.value, one.private,
        one.level, one.times,
    )  # fmt: skip


def _encode(exited: Exited, revision: int) -> pb.RunVcpuResponse:
    vcpu = exited.vcpu
    reply = pb.RunVcpuResponse(
        revision=revision, exit_reason=cast("pb.ExitReason.ValueType", int(exited.reason)),
        errno=exited.errno, flags=exited.flags,
        gpa=exited.gpa, size_bytes=exited.size, value=exited.value, text=exited.text,
        # a vendor's status may be negative (SMCCC's are): its bits travel
        vendor_status=exited.status & U64_MAX, instructions=vcpu.instructions,
        checked_pages=vcpu.checked, mismatched_pages=vcpu.mismatched,
        first_mismatch_gfn=vcpu.first_mismatch,
        call_status=vcpu.call_status & U64_MAX, call_status_name=vcpu.call_status_name,
    )  # fmt: skip
    if exited.refusal is not None:
        reply.refusal.CopyFrom(refusal_of(exited.refusal, revision))
    return reply
