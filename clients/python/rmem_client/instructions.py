"""Instructions of guest programmes, one function each; addresses and lengths are in bytes.

``rmem_client.vcpus`` shows them too, beside the service that takes them.
"""

from __future__ import annotations

from rmem.v1 import vcpu_pb2

Instruction = vcpu_pb2.Instruction


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
