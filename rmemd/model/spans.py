"""Ranges of pages, few and long or many and short, and how tables are asked about them.

Owns the choice between going range by range and page by page: what thousands of ranges of a page
each cost must be arrays of pages, and a range of a terabyte must not become one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from msgspec import Struct

from rmemd.hooks.tables import Sparse
from rmemd.hooks.tx import Tx
from rmemd.units import I64, U8, Bools, expand

# pages a range up to which an array of them costs less than a turn of a loop
SHORT_PAGES = 64


class Spans(Struct, frozen=True, dict=True):
    """Ranges ``starts[i] .. starts[i]+counts[i]``: int64, ascending, none empty, none overlap."""

    starts: I64
    counts: I64

    @cached_property
    def total(self) -> int:
        """Return how many pages they have."""
        return int(np.add.reduce(self.counts))

    @cached_property
    def ends(self) -> I64:
        """Return where each ends."""
        return self.starts + self.counts

    @property
    def first(self) -> int:
        """Return the first page of all."""
        return int(self.starts[0])

    @property
    def extent(self) -> int:
        """Return how many pages there are from the first to the last of all."""
        return int(self.starts[-1] + self.counts[-1] - self.starts[0])

    @property
    def are_short(self) -> bool:
        """Return whether they are many and short, so that arrays of their pages are the way."""
        return self.starts.size > 1 and self.total <= SHORT_PAGES * self.starts.size

    @property
    def are_near(self) -> bool:
        """Return whether what lies between them is no more than they are worth looking past."""
        return self.extent <= SHORT_PAGES * self.total

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts.tolist(), self.counts.tolist(), strict=True)

    @cached_property
    def pages(self) -> I64:
        """Return every page number, int64, shape (total,)."""
        return self.starts if self.total == self.starts.size else expand(self.starts, self.counts)

    @cached_property
    def pieces(self) -> int:
        """Return how many ranges they are where adjacent ones are one."""
        return self.starts.size - int(np.count_nonzero(self.starts[1:] == self.ends[:-1]))

    def where(self, which: Bools) -> Spans:
        """Return some of them."""
        return Spans(self.starts[which], self.counts[which])

    def merged(self) -> Spans:
        """Return the same pages in as few ranges as can be."""
        if self.pieces == self.starts.size:
            return self
        apart = self.starts[1:] != self.ends[:-1]
        starts = self.starts[np.append(True, apart)]
        return Spans(starts, self.ends[np.append(apart, True)] - starts)

    def handled(self) -> Spans:
        """Return the same pages as they are handled best: merged, unless they stay short then."""
        stay_short = self.pieces > 1 and self.total <= SHORT_PAGES * self.pieces
        return self if stay_short else self.merged()

    def within(self, start: int, npages: int) -> Spans:
        """Return the parts of them in a range."""
        starts, ends = np.maximum(self.starts, start), np.minimum(self.ends, start + npages)
        inside = starts < ends
        return Spans(starts[inside], (ends - starts)[inside])

    def shifted(self, by: int) -> Spans:
        """Return them under other page numbers."""
        return Spans(self.starts + by, self.counts)

    def meet(self, start: int, npages: int) -> bool:
        """Return whether any of them has a page of a range."""
        after = int(np.searchsorted(self.starts, start + npages))
        return after > 0 and int(self.starts[after - 1] + self.counts[after - 1]) > start

    def hold(self, numbers: I64) -> Bools:
        """Return which page numbers are in one of them."""
        at = np.searchsorted(self.starts, numbers, side="right") - 1
        return (at >= 0) & (numbers < self.ends[at])

    def are(self, table: Sparse, values: U8) -> Bools:
        """Return of which the table holds ``values[i]`` on every page of range ``i``."""
        if self.total == self.starts.size:
            same: Bools = table.get(self.starts) == values
            return same
        if not self.are_short:
            each = zip(self, values.tolist(), strict=True)
            return np.array([table.equals(start, n, value) for (start, n), value in each])
        same = table.get(self.pages) == np.repeat(values, self.counts)
        return np.logical_and.reduceat(same, np.cumsum(self.counts) - self.counts)

    def touched(self, table: Sparse) -> I64:
        """Return the pages of which a table holds something else than its fill, ascending."""
        if not self.are_short:
            return np.concatenate([table.touched(start, n) for start, n in self])
        return table.touched_among(self.pages)

    def write(self, tx: Tx, table: Sparse, value: int) -> None:
        """Set every page of them to one value."""
        if self.are_short:
            tx.put(table, self.pages, value)
            return
        for start, n in self:
            tx.fill(table, start, n, value)
