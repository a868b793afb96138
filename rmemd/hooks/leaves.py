"""What sparse arrays are made of: leaves of 4096 entries, and nodes of 4096 leaves.

Owns the shape, and what is asked of a node as arrays: the entries of its mixed leaves lie in one
array, so that scattered ones are one gather, however many leaves they are of. What an array holds
is ``sparse``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from rmemd.units import I64, NDArray, distinct

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

LEAF_SHIFT = 12
LEAF = 1 << LEAF_SHIFT
NODE_SHIFT = 12
LEAVES = 1 << NODE_SHIFT
NODE_PAGES_SHIFT = LEAF_SHIFT + NODE_SHIFT
IN_LEAF, IN_NODE = LEAF - 1, (1 << NODE_PAGES_SHIFT) - 1
# the shift of a leaf that is not mixed: by it every place is less than 0
UNIFORM = -LEAVES

Array = NDArray[Any]


class Node:
    """4096 leaves: a value per uniform leaf, and the entries of the mixed ones in one array.

    Attributes:
        uniform: the value of each leaf that is not mixed.
        entries: what the mixed leaves hold, and room; it is another array once there are more.
        shifts: by how many leaves each lies further on in ``entries`` than in the node; int16.
        shift_of, raw: the memory of shifts and entries, of which a few are read and written in
            half of an array's time.
    """

    __slots__ = ("_free", "entries", "raw", "shift_of", "shifts", "uniform")

    def __init__(self, dtype: DTypeLike, value: int) -> None:
        self.uniform: Array = np.full(LEAVES, value, dtype=dtype)
        # one more, by which what goes on into another node meets a leaf that is not mixed
        self.shifts: NDArray[np.int16] = np.full(LEAVES + 1, UNIFORM, dtype=np.int16)
        self.shift_of: memoryview[int] = self.shifts.data
        self._hold(np.empty(0, dtype=dtype))
        self._free: list[int] = []

    def get(self, indices: I64, first: int, last: int) -> Array:
        """Return the values at ``indices``, all of this node and of leaves first to last."""
        places = self._together(indices, first, last)
        if places is not None:
            return self.entries.take(places)
        places = self._places(indices)
        mixed = places >= 0
        values: Array = self.uniform.take((indices & IN_NODE) >> LEAF_SHIFT)
        values[mixed] = self.entries.take(places[mixed])
        return values

    def put(self, indices: I64, values: Array, first: int, last: int) -> Array:
        """Set entries, all of this node and of leaves first to last; return what was there."""
        places = self._together(indices, first, last)
        if places is None:
            places = self._places(indices)
            if _lowest(places) < 0:
                uniform = distinct((indices[places < 0] & IN_NODE) >> LEAF_SHIFT)
                self.set_rows(uniform, self.uniform[uniform][:, None])
                places = self._places(indices)
        old: Array = self.entries.take(places)
        self.entries[places] = values
        return old

    def _together(self, indices: I64, first: int, last: int) -> I64 | None:
        """Return where in ``entries`` indices lie if all of their leaves lie together there."""
        lo, hi = first & (LEAVES - 1), last & (LEAVES - 1)
        shift = self.shift_of[lo]
        if shift == UNIFORM or (lo < hi and np.count_nonzero(self.shifts[lo : hi + 1] != shift)):
            return None
        return indices + (shift + lo - first << LEAF_SHIFT)

    def _places(self, indices: I64) -> I64:
        """Return where in ``entries`` indices lie, less than 0 of uniform leaves."""
        places: I64 = indices & IN_NODE
        places += self.shifts.take(places >> LEAF_SHIFT).astype(np.int64) << LEAF_SHIFT
        return places

    def fill(self, lo: int, hi: int, value: int) -> tuple[int, int, Array, I64, Array]:
        """Set entries [lo, hi) of the node, and return what ``restore`` takes that back by."""
        first, last = lo >> LEAF_SHIFT, (hi - 1) >> LEAF_SHIFT
        edges = [
            (leaf, self._edge(leaf, lo, hi, value))
            for leaf in {first, last}
            if lo > leaf << LEAF_SHIFT or hi < (leaf + 1) << LEAF_SHIFT
        ]
        leaves = self.mixed(first, last)
        uniform, rows = self.uniform[first : last + 1].copy(), self.rows(leaves)
        self.unmix(leaves)
        self.uniform[first : last + 1] = value
        for leaf, entries in edges:
            self.own(leaf)[:] = entries
        return first, last, uniform, leaves, rows

    def _edge(self, leaf: int, lo: int, hi: int, value: int) -> Array:
        """Return what a leaf is to hold of which only the part in [lo, hi) is filled."""
        at, row = leaf << LEAF_SHIFT, self.row(leaf)
        entries: Array = (
            np.full(LEAF, self.uniform[leaf], dtype=self.uniform.dtype)
            if row is None else row.copy()
        )  # fmt: skip
        entries[max(lo - at, 0) : hi - at] = value
        return entries

    def restore(self, first: int, last: int, uniform: Array, leaves: I64, rows: Array) -> None:
        """Have the leaves of [first, last] be what they were before a ``fill``."""
        self.unmix(self.mixed(first, last))
        self.uniform[first : last + 1] = uniform
        self.set_rows(leaves, rows)

    def pieces(self, base: int, start: int, end: int) -> Iterator[tuple[I64, Array]]:
        """Yield (run starts, values) of [start, end), left to right; ``base`` is the first index.

        The first start may lie before ``start``, and runs are not maximal.
        """
        first, last = (start - base) >> LEAF_SHIFT, (end - 1 - base) >> LEAF_SHIFT
        at = first
        for leaf in self.mixed(first, last).tolist():
            if at < leaf:
                yield self._uniform_piece(base, at, leaf)
            lo = base + (leaf << LEAF_SHIFT)
            row = self.row(leaf)
            assert row is not None
            part = row[max(start - lo, 0) : min(end - lo, LEAF)]
            breaks = np.flatnonzero(np.diff(part)) + 1
            breaks = np.concatenate((np.zeros(1, dtype=np.int64), breaks))
            yield breaks + max(start, lo), part[breaks]
            at = leaf + 1
        if at <= last:
            yield self._uniform_piece(base, at, last + 1)

    def _uniform_piece(self, base: int, lo: int, hi: int) -> tuple[I64, Array]:
        leaves = np.arange(lo, hi, dtype=np.int64)
        return (leaves << LEAF_SHIFT) + base, self.uniform[lo:hi].copy()

    def mixed(self, first: int, last: int) -> I64:
        """Return the mixed leaves in [first, last], ascending."""
        found: I64 = (self.shifts[first : last + 1] != UNIFORM).nonzero()[0] + first
        return found

    def row(self, leaf: int) -> Array | None:
        """Return a view of a mixed leaf's entries, valid until another becomes mixed."""
        place = leaf + self.shift_of[leaf] << LEAF_SHIFT
        return None if place < 0 else self.entries[place : place + LEAF]

    def own(self, leaf: int) -> Array:
        """Return a view of the entries of a leaf that is mixed from now on."""
        row = self.row(leaf)
        if row is None:
            self._make_room(1)
            slot = self._free.pop()
            self.shift_of[leaf] = slot - leaf
            row = self.entries[slot << LEAF_SHIFT : (slot + 1) << LEAF_SHIFT]
            row.fill(self.uniform[leaf])
        return row

    def rows(self, leaves: I64) -> Array:
        """Return a copy of what mixed leaves hold, shape (len(leaves), 4096)."""
        found: Array = self.entries.reshape(-1, LEAF)[self._slots(leaves)]
        return found

    def set_rows(self, leaves: I64, rows: Array) -> None:
        """Have uniform leaves hold ``rows``, shape (len(leaves), 4096)."""
        self._make_room(leaves.size)
        past = len(self._free) - leaves.size
        # ascending, so that leaves that follow one another lie together
        slots = np.array(self._free[past:][::-1], dtype=np.int64)
        del self._free[past:]
        self.shifts[leaves] = slots - leaves
        self.entries.reshape(-1, LEAF)[slots] = rows

    def unmix(self, leaves: I64) -> None:
        """Have mixed leaves be uniform again."""
        self._free += self._slots(leaves)[::-1].tolist()
        self.shifts[leaves] = UNIFORM
        if 2 * LEAF * len(self._free) > self.entries.size:
            self._close_up()

    def _hold(self, entries: Array) -> None:
        self.entries = entries
        self.raw = entries.data

    def _make_room(self, nleaves: int) -> None:
        lacking = nleaves - len(self._free)
        if lacking <= 0:
            return
        # doubled, as leaves come one by one; what is never written to takes no memory
        there = self.entries.size >> LEAF_SHIFT
        room = max(lacking, min(there, LEAVES - there))
        more = np.empty(room << LEAF_SHIFT, dtype=self.entries.dtype)
        self._hold(np.concatenate((self.entries, more)) if there else more)
        self._free += reversed(range(there, there + room))

    def _close_up(self) -> None:
        """Give back the room that most of the entries are."""
        leaves = self.mixed(0, LEAVES - 1)
        self._hold(self.rows(leaves).reshape(-1))
        self.shifts[leaves] = np.arange(leaves.size) - leaves
        self._free = []

    def _slots(self, leaves: I64) -> I64:
        """Return which 4096 of the entries each of some mixed leaves has."""
        slots: I64 = self.shifts[leaves] + leaves
        return slots


# without the method around them, which is in Python
_lowest, _highest = np.minimum.reduce, np.maximum.reduce


def leaves_of(indices: I64) -> tuple[int, int]:
    """Return the ids of the first and the last leaf that ``indices``, at least one, are of.

    The low bits of an id are a leaf's place in its node, the others the node's own id.
    """
    return int(_lowest(indices)) >> LEAF_SHIFT, int(_highest(indices)) >> LEAF_SHIFT


def by_node(indices: I64) -> Iterator[tuple[int, Any]]:
    """Yield (node id, selector) so that each node's entries are handled at once."""
    nodes = indices >> NODE_PAGES_SHIFT
    if (nodes[1:] >= nodes[:-1]).all():
        bounds = np.flatnonzero(nodes[1:] != nodes[:-1]) + 1
        for lo, hi in pairwise([0, *bounds.tolist(), indices.size]):
            yield nodes.item(lo), slice(lo, hi)
        return
    for node in distinct(nodes).tolist():
        yield node, np.flatnonzero(nodes == node)
