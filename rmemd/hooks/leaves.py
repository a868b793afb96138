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

Array = NDArray[Any]


class Node:
    """4096 leaves: a value per uniform leaf, and the entries of the mixed ones in one array.

    Attributes:
        uniform: the value of each leaf that is not mixed.
        slots: which 4096 entries of ``entries`` a leaf has, -1 if it is uniform; int16.
        entries: what the mixed leaves hold, and room; it is another array once there are more.
        slot_of, raw: the memory of either, of which a few are read and written in half of an
            array's time.
    """

    __slots__ = ("_free", "entries", "raw", "slot_of", "slots", "uniform")

    def __init__(self, dtype: DTypeLike, value: int) -> None:
        self.uniform: Array = np.full(LEAVES, value, dtype=dtype)
        self.slots: NDArray[np.int16] = np.full(LEAVES, -1, dtype=np.int16)
        self.slot_of: memoryview[int] = self.slots.data
        self._hold(np.empty(0, dtype=dtype))
        self._free: list[int] = []

    def get(self, indices: I64) -> Array:
        """Return the values at ``indices``, all of this node."""
        leaves = (indices >> LEAF_SHIFT) & (LEAVES - 1)
        slots = self.slots.take(leaves)
        if slots.min() >= 0:
            return self.entries.take(_places(slots, indices))
        values: Array = self.uniform.take(leaves)
        mixed = slots >= 0
        values[mixed] = self.entries.take(_places(slots[mixed], indices[mixed]))
        return values

    def put(self, indices: I64, values: Array) -> Array:
        """Set entries, all of this node, and return what was there."""
        leaves = (indices >> LEAF_SHIFT) & (LEAVES - 1)
        slots = self.slots.take(leaves)
        if slots.min() < 0:
            uniform = distinct(leaves[slots < 0])
            self.set_rows(uniform, self.uniform[uniform][:, None])
            slots = self.slots.take(leaves)
        places = _places(slots, indices)
        old: Array = self.entries.take(places)
        self.entries[places] = values
        return old

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

    def mixed(self, first: int, last: int) -> I64:
        """Return the mixed leaves in [first, last], ascending."""
        return (self.slots[first : last + 1] >= 0).nonzero()[0] + first

    def row(self, leaf: int) -> Array | None:
        """Return a view of a mixed leaf's entries, valid until another becomes mixed."""
        slot = self.slot_of[leaf]
        return None if slot < 0 else self.entries[slot << LEAF_SHIFT : (slot + 1) << LEAF_SHIFT]

    def own(self, leaf: int) -> Array:
        """Return a view of the entries of a leaf that is mixed from now on."""
        row = self.row(leaf)
        if row is None:
            self._make_room(1)
            self.slots[leaf] = slot = self._free.pop()
            row = self.entries[slot << LEAF_SHIFT : (slot + 1) << LEAF_SHIFT]
            row.fill(self.uniform[leaf])
        return row

    def rows(self, leaves: I64) -> Array:
        """Return a copy of what mixed leaves hold, shape (len(leaves), 4096)."""
        found: Array = self.entries.reshape(-1, LEAF)[self.slots[leaves]]
        return found

    def set_rows(self, leaves: I64, rows: Array) -> None:
        """Have uniform leaves hold ``rows``, shape (len(leaves), 4096)."""
        self._make_room(leaves.size)
        past = len(self._free) - leaves.size
        self.slots[leaves] = slots = self._free[past:]
        del self._free[past:]
        self.entries.reshape(-1, LEAF)[slots] = rows

    def unmix(self, leaves: I64) -> None:
        """Have mixed leaves be uniform again."""
        self._free += self.slots[leaves].tolist()
        self.slots[leaves] = -1
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
        self._free += range(there, there + room)

    def _close_up(self) -> None:
        """Give back the room that most of the entries are."""
        leaves = self.mixed(0, LEAVES - 1)
        self._hold(self.rows(leaves).reshape(-1))
        self.slots[leaves] = np.arange(leaves.size)
        self._free = []


def _places(slots: NDArray[np.int16], indices: I64) -> I64:
    places: I64 = (slots.astype(np.int64) << LEAF_SHIFT) | (indices & (LEAF - 1))
    return places


def in_one_leaf(indices: I64) -> bool:
    """Return whether all of ``indices``, at least one, are of the same leaf: most are."""
    leaf = indices.item(0) >> LEAF_SHIFT
    if indices.item(-1) >> LEAF_SHIFT != leaf:
        return False
    return not np.count_nonzero((indices >> LEAF_SHIFT) != leaf)


def by_node(indices: I64) -> Iterator[tuple[int, Any]]:
    """Yield (node id, selector) so that each node's entries are handled at once."""
    nodes = indices >> NODE_PAGES_SHIFT
    first = nodes.item(0)
    if not np.count_nonzero(nodes != first):
        yield first, slice(None)
        return
    if (nodes[1:] >= nodes[:-1]).all():
        bounds = np.flatnonzero(nodes[1:] != nodes[:-1]) + 1
        for lo, hi in pairwise([0, *bounds.tolist(), indices.size]):
            yield nodes.item(lo), slice(lo, hi)
        return
    for node in distinct(nodes).tolist():
        yield node, np.flatnonzero(nodes == node)
