"""Pages, frames and half-open ranges: the units every other module counts in.

Owns the page size, the alignment test and the one range check. Imports nothing of ours.
A gfn (guest frame), a pfn (host frame) and a pgoff (page index in a file) are all int64 page
numbers; which one a value is, its name says.
"""

from __future__ import annotations

from typing import Any, NewType, TypeVar

import numpy as np

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PMD_ORDER = 9
PMD_PAGES = 1 << PMD_ORDER
MAX_ORDER = 18
GPA_BITS = 52
MAX_GFN = 1 << (GPA_BITS - PAGE_SHIFT)
LOFF_MAX = (1 << 63) - 1

Gfn = NewType("Gfn", int)
Pfn = NewType("Pfn", int)
Pgoff = NewType("Pgoff", int)
Scalar = TypeVar("Scalar", bound=np.generic)
# what ``numpy.typing`` calls so, without the thirtieth part of a start that importing it takes
NDArray = np.ndarray[tuple[Any, ...], np.dtype[Scalar]]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
Bools = NDArray[np.bool_]


def is_page_aligned(value_bytes: int) -> bool:
    """Return whether a byte count or address lies on a page boundary."""
    return value_bytes & (PAGE_SIZE - 1) == 0


def bytes_to_pages(value_bytes: int) -> int:
    """Convert page-aligned bytes to pages (the caller has checked the alignment)."""
    return value_bytes >> PAGE_SHIFT


def pages(start: int, npages: int) -> I64:
    """Return the page numbers ``start .. start+npages`` as int64, shape (npages,)."""
    return np.arange(start, start + npages, dtype=np.int64)


def expand(starts: I64, counts: I64) -> I64:
    """Expand runs ``(starts[i], counts[i])`` into one int64 array of page numbers, in order."""
    counts = np.asarray(counts, dtype=np.int64)
    if counts.size == 1:
        return pages(int(starts[0]), int(counts[0]))
    total = int(counts.sum())
    if total == 0:
        return np.empty(0, dtype=np.int64)
    offsets = np.repeat(
        np.asarray(starts, dtype=np.int64)
        - np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)[:-1])),
        counts,
    )
    return offsets + np.arange(total, dtype=np.int64)


def run_breaks(*columns: I64) -> I64:
    """Return the indices at which a new run begins, given parallel columns of page numbers.

    A run goes on while every column grows by exactly one.
    """
    n = columns[0].size
    if n == 0:
        return np.empty(0, dtype=np.int64)
    broken = np.zeros(n, dtype=np.bool_)
    broken[0] = True
    for column in columns:
        broken[1:] |= np.diff(column) != 1
    return np.flatnonzero(broken).astype(np.int64)


def coalesce(numbers: I64) -> tuple[I64, I64]:
    """Return ``(starts, counts)`` of the runs of consecutive numbers, in the given order."""
    breaks = run_breaks(numbers)
    counts = np.diff(np.append(breaks, numbers.size)).astype(np.int64)
    return numbers[breaks], counts


def distinct(numbers: NDArray[Any]) -> NDArray[Any]:
    """Return the distinct numbers, ascending, of an array of one dimension.

    As ``np.unique``, which hashes: a hundred times as long for pages, which seldom repeat.
    """
    ordered = np.sort(numbers)
    new = np.ones(ordered.size, dtype=np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]
