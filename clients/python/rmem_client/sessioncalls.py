"""What can be asked for on the session socket: one function an op, each of which makes a ``Call``.

Owns the way from arguments to a record and from its result to a value. ``Session`` makes a call at
once, ``Batch`` many in one datagram.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

from .sessionwire import KEEP, PRIVATE, READ_ONLY, Op, Record, Result

T = TypeVar("T")


class Converted(NamedTuple):
    """What an in-place conversion did: pages that changed, and what they hold now."""

    changed_pages: int
    content: str


class Call(Generic[T]):
    """A record, and what its result means."""

    def __init__(self, record: Record, convert: Callable[[Result], T]) -> None:
        self.record = record
        self.convert = convert


def _value(result: Result) -> int:
    return result.value


def _data(result: Result) -> bytes:
    return result.data


def _nothing(result: Result) -> None:
    return None


def get(file: int, offset_bytes: int, length_bytes: int) -> Call[list[int]]:
    """Take a reference on each page; the frames."""
    return Call(
        Record(Op.GET, file, offset_bytes, length_bytes),
        lambda result: list(struct.unpack(f"<{result.value}q", result.data)),
    )


def put(pfns: Iterable[int]) -> Call[int]:
    """Drop references that ``get`` took; how many."""
    numbers = list(pfns)
    payload = struct.pack(f"<{len(numbers)}q", *numbers)
    return Call(Record(Op.PUT, payload=payload), _value)


def pin(file: int, offset_bytes: int, length_bytes: int, purpose: str) -> Call[int]:
    """Pin pages; the handle."""
    payload = purpose.encode()
    return Call(Record(Op.PIN, file, offset_bytes, length_bytes, payload=payload), _value)


def unpin(handle: int) -> Call[None]:
    """Let a pin go."""
    return Call(Record(Op.UNPIN, handle), _nothing)


def fault(vm: int, gpa: int, size_bytes: int) -> Call[int]:
    """Fault a guest range in; how many pages."""
    return Call(Record(Op.FAULT, vm, gpa, size_bytes), _value)


def convert(vm: int, gpa: int, size_bytes: int, private: bool) -> Call[bool]:
    """Set a guest range's attributes; whether that changed anything."""
    attributes = 8 if private else 0
    return Call(
        Record(Op.CONVERT, vm, gpa, size_bytes, attributes), lambda result: not result.value
    )


def convert_file(file: int, offset_bytes: int, size_bytes: int, private: bool) -> Call[Converted]:
    """Convert a file's range in place."""
    attributes = 8 if private else 0
    return Call(
        Record(Op.CONVERT_FILE, file, offset_bytes, size_bytes, attributes),
        lambda result: Converted(result.value, result.data.decode()),
    )


def read_shared(file: int, offset_bytes: int, length_bytes: int) -> Call[bytes]:
    """Read shared bytes."""
    return Call(Record(Op.READ_SHARED, file, offset_bytes, length_bytes), _data)


def write_shared(file: int, offset_bytes: int, data: bytes) -> Call[None]:
    """Write shared bytes."""
    return Call(Record(Op.WRITE_SHARED, file, offset_bytes, payload=data), _nothing)


def read_guest(
    vm: int, vcpu: int, gpa: int, length_bytes: int, private: bool = True
) -> Call[bytes]:
    """Read the guest's memory as the guest."""
    flags = PRIVATE if private else 0
    return Call(Record(Op.READ_GUEST, vm, gpa, length_bytes, vcpu, flags), _data)


def write_guest(vm: int, vcpu: int, gpa: int, data: bytes, private: bool = True) -> Call[None]:
    """Write the guest's memory as the guest."""
    flags = PRIVATE if private else 0
    return Call(Record(Op.WRITE_GUEST, vm, gpa, 0, vcpu, flags, data), _nothing)


def fd(file: int, read_only: bool = False) -> Call[None]:
    """Have a descriptor of the file's shared half sent along."""
    return Call(Record(Op.FD, file, flags=READ_ONLY if read_only else 0), _nothing)


def create(vm: int, size_bytes: int, flags: int, spare: int) -> Call[int]:
    """Make a file, and have a descriptor of its shared half sent along; the file.

    None is sent where the memory of ``spare`` serves again, a file that was closed to be kept.
    """
    return Call(Record(Op.CREATE, vm, spare, size_bytes, flags), _value)


def close(file: int, keep: bool) -> Call[int]:
    """Close a file, its shared memory kept for the session's next; the pages freed."""
    return Call(Record(Op.CLOSE, file, flags=KEEP if keep else 0), _value)


def register_faults(file: int, offset_bytes: int, length_bytes: int) -> Call[int]:
    """Have faults on holes of a range told to this session; the registration's handle."""
    return Call(Record(Op.USERFAULT_REGISTER, file, offset_bytes, length_bytes), _value)


def unregister_faults(userfault: int) -> Call[None]:
    """Let a registered range go."""
    return Call(Record(Op.USERFAULT_UNREGISTER, userfault), _nothing)


def resolve_copy(file: int, offset_bytes: int, data: bytes) -> Call[int]:
    """Fill shared holes with bytes; how many pages."""
    return Call(Record(Op.USERFAULT_COPY, file, offset_bytes, payload=data), _value)


def resolve_zero(file: int, offset_bytes: int, length_bytes: int) -> Call[int]:
    """Fill shared holes with zeros; how many pages."""
    return Call(Record(Op.USERFAULT_ZERO, file, offset_bytes, length_bytes), _value)


def resolve_continue(
    file: int, offset_bytes: int, length_bytes: int, private: bool = False
) -> Call[int]:
    """Have faults go on, on the pages that they would have got; how many pages."""
    flags = PRIVATE if private else 0
    return Call(
        Record(Op.USERFAULT_CONTINUE, file, offset_bytes, length_bytes, flags=flags), _value
    )


def wake_faults(file: int, offset_bytes: int, length_bytes: int) -> Call[None]:
    """Have what waits in a range fault again."""
    return Call(Record(Op.USERFAULT_WAKE, file, offset_bytes, length_bytes), _nothing)
