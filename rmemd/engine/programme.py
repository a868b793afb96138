"""Guest programmes: the small deterministic list of instructions that a vCPU executes.

Owns the instruction set, its checks, and how written bytes are made.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from msgspec import Struct

from rmemd.errors import BAD_RANGE, BAD_REQUEST, NOT_PAGE_ALIGNED, RmemError
from rmemd.hooks.types import GuestCall
from rmemd.units import I64, MAX_GFN, PAGE_SIZE, U8, is_page_aligned

INSTRUCTIONS_MAX = 4096


class Opcode(IntEnum):
    """What an instruction does; numbered as in vcpu.proto."""

    TOUCH = 1
    WRITE = 2
    CHECK = 3
    ACCEPT = 4
    VALIDATE = 5
    RESCIND = 6
    SHARE = 7
    UNSHARE = 8
    RELINQUISH = 9
    COPY = 10
    LOOP = 11
    HALT = 12
    SIGNAL = 13


class Pattern(IntEnum):
    """How bytes are made: one byte all over, or 64-bit words from a seed and the address."""

    BYTE = 1
    WORDS = 2


CALLS: dict[Opcode, GuestCall] = {
    Opcode.ACCEPT: GuestCall.ACCEPT, Opcode.VALIDATE: GuestCall.VALIDATE,
    Opcode.RESCIND: GuestCall.RESCIND, Opcode.SHARE: GuestCall.SHARE,
    Opcode.UNSHARE: GuestCall.UNSHARE, Opcode.RELINQUISH: GuestCall.RELINQUISH,
}  # fmt: skip
ACCESSES = (Opcode.TOUCH, Opcode.WRITE, Opcode.CHECK, Opcode.COPY)
LEVELS = (0, 1)


class Instruction(Struct, frozen=True):
    """One instruction; ``value`` is a byte, a seed, an address or an instruction's index."""

    opcode: Opcode
    gpa: int = 0
    length: int = 0
    pattern: Pattern = Pattern.BYTE
    value: int = 0
    private: bool = False
    level: int = 0
    times: int = 0


def check(programme: tuple[Instruction, ...]) -> None:
    """Refuse a programme that could not run.

    Raises:
        InvalidArgument: the first instruction at fault is named.
    """
    if len(programme) > INSTRUCTIONS_MAX:
        raise BAD_REQUEST(
            f"{len(programme)} instructions; at most {INSTRUCTIONS_MAX}", field="programme"
        )
    for index, instruction in enumerate(programme):
        error = _fault_of(instruction, len(programme))
        if error is not None:
            raise error.with_details(field=f"programme[{index}].{error.details.field}")


def _fault_of(instruction: Instruction, count: int) -> RmemError | None:
    opcode = instruction.opcode
    if opcode in CALLS or opcode in ACCESSES:
        for gpa in (instruction.gpa, *([instruction.value] if opcode is Opcode.COPY else [])):
            if instruction.length <= 0 or not 0 <= gpa <= MAX_GFN * PAGE_SIZE - instruction.length:
                return BAD_RANGE(f"{gpa:#x}+{instruction.length:#x} is no range", field="gpa")
    if opcode in CALLS:
        aligned = is_page_aligned(instruction.gpa) and is_page_aligned(instruction.length)
        if not aligned:
            return NOT_PAGE_ALIGNED("guest calls are about whole pages", field="gpa")
        if instruction.level not in LEVELS:
            return BAD_REQUEST(f"level {instruction.level} is neither 0 nor 1", field="level")
    if opcode is Opcode.COPY and not is_page_aligned(
        instruction.gpa | instruction.value | instruction.length
    ):
        return NOT_PAGE_ALIGNED("COPY is about whole pages", field="gpa")
    if opcode is Opcode.LOOP and not (0 <= instruction.value < count and instruction.times >= 0):
        return BAD_REQUEST(f"no instruction {instruction.value} to go back to", field="value")
    bytewise = instruction.pattern is Pattern.BYTE and opcode in (Opcode.WRITE, Opcode.CHECK)
    if bytewise and not 0 <= instruction.value <= 0xFF:
        return BAD_REQUEST(f"{instruction.value} is no byte", field="value")
    return None


def make_rows(pattern: Pattern, value: int, gfns: I64) -> U8:
    """Return the pattern's whole pages for guest frames: uint8, shape (n, 4096)."""
    if pattern is Pattern.BYTE:
        return np.full((gfns.size, PAGE_SIZE), value, dtype=np.uint8)
    words = np.arange(PAGE_SIZE // 8, dtype=np.uint64)[None, :]
    x = words + (gfns.astype(np.uint64) << np.uint64(9))[:, None]
    x = x + np.uint64(value * 0x9E37_79B9_7F4A_7C15 & 0xFFFF_FFFF_FFFF_FFFF)
    # splitmix64's finalizer: words that repeat nowhere within a guest
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    rows: U8 = (x ^ (x >> np.uint64(31))).view(np.uint8)
    return rows
