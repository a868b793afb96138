"""Packed records: the arrays that bulk calls carry in place of thousands of sub-messages.

Owns the two layouts of rmem.v1 that are arrays of 64-bit little-endian words: attribute ranges
(``SetMemoryAttributesRequest.packed``) and frame runs (``GetPageMapResponse.packed``), and how
what is too long for one message is cut. Needs nothing beyond the standard library; with numpy,
``np.frombuffer(reply.packed, "<i8")`` does too.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple


class Range(NamedTuple):
    """A range of guest physical addresses in bytes, and its attributes (PRIVATE = 8, or 0)."""

    gpa: int
    size_bytes: int
    attributes: int


class Frames(NamedTuple):
    """Consecutive frames of one use: ``vm`` is 0 without one, ``gfn`` -1 if not bound."""

    pfn: int
    npages: int
    use: int
    vm: int
    gfn: int


RANGE_BYTES = 8 * len(Range._fields)

# The daemon takes messages of 1 MiB; half of that leaves room for any message's own bytes.
PIECE_BYTES = 512 * 1024


def pack_ranges(ranges: Iterable[Range | tuple[int, int, int]]) -> bytes:
    """Pack attribute ranges: little-endian uint64 gpa, size, attributes for each."""
    words = array("Q", chain.from_iterable(ranges))
    _to_little_endian(words)
    return words.tobytes()


def unpack_ranges(packed: bytes) -> list[Range]:
    """Undo ``pack_ranges``; raises ValueError if the length is not one of whole records."""
    return [Range(*row) for row in _rows("Q", packed, len(Range._fields))]


def unpack_frames(packed: bytes) -> list[Frames]:
    """Unpack a page map: little-endian int64 pfn, npages, use, vm, gfn for each run."""
    return [Frames(*row) for row in _rows("q", packed, len(Frames._fields))]


def pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut ``total`` into (start, length) of at most ``size``; nothing is one piece of length 0.

    The empty piece is sent, so that the daemon and not the client says what is wrong with it.
    """
    yield 0, min(total, size)
    for start in range(size, total, size):
        yield start, min(size, total - start)


def _rows(typecode: str, packed: bytes, width: int) -> Iterable[tuple[int, ...]]:
    if len(packed) % (8 * width):
        raise ValueError(f"{len(packed)} bytes are no whole number of {8 * width}-byte records")
    words = array(typecode, packed)
    _to_little_endian(words)
    columns = iter(words)
    return zip(*[columns] * width, strict=True)


def _to_little_endian(words: array[int]) -> None:
    if sys.byteorder == "big":
        words.byteswap()
