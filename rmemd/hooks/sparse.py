"""Sparse arrays: values over 2^52 indices that cost what was touched.

Owns ``Sparse``, one of the shapes that state can take. It keeps one value per uniform leaf of 4096
entries, one per uniform node of 4096 leaves, and bytes only where values are mixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rmemd.hooks.writes import TableSpec, Write
from rmemd.units import I64

LEAF_SHIFT = 12
LEAF = 1 << LEAF_SHIFT
NODE_SHIFT = 12
LEAVES = 1 << NODE_SHIFT
NODE_PAGES_SHIFT = LEAF_SHIFT + NODE_SHIFT

Array = NDArray[Any]


class _Node:
    """4096 leaves: a value per uniform leaf, and bytes for the mixed ones."""

    __slots__ = ("mixed", "uniform")

    def __init__(self, dtype: DTypeLike, value: int) -> None:
        self.uniform: Array = np.full(LEAVES, value, dtype=dtype)
        self.mixed: dict[int, Array] = {}


class Sparse:
    """An array over 2^52 indices that holds ``fill`` wherever nothing was written."""

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.dtype = np.dtype(spec.dtype)
        self.fill_value = spec.fill
        self._nodes: dict[int, int | _Node] = {}

    # --- reading -----------------------------------------------------------------------------
    def at(self, index: int) -> int:
        """Return one value as a Python int."""
        node = self._nodes.get(index >> NODE_PAGES_SHIFT, self.fill_value)
        if not isinstance(node, _Node):
            return node
        leaf = (index >> LEAF_SHIFT) & (LEAVES - 1)
        mixed = node.mixed.get(leaf)
        return int(node.uniform[leaf] if mixed is None else mixed[index & (LEAF - 1)])

    def get(self, indices: I64) -> Array:
        """Return the values at ``indices`` (int64, any order), same shape."""
        out = np.full(indices.shape, self.fill_value, dtype=self.dtype)
        if indices.size == 0:
            return out
        for leaf_id, mask in _by_leaf(indices):
            node = self._nodes.get(leaf_id >> NODE_SHIFT, self.fill_value)
            if not isinstance(node, _Node):
                if node != self.fill_value:
                    out[mask] = node
                continue
            mixed = node.mixed.get(leaf_id & (LEAVES - 1))
            if mixed is None:
                out[mask] = node.uniform[leaf_id & (LEAVES - 1)]
            else:
                out[mask] = mixed[indices[mask] & (LEAF - 1)]
        return out

    def slice(self, start: int, n: int) -> Array:
        """Return the ``n`` values from ``start``: O(n) memory, so for mapped ranges only."""
        out = np.empty(n, dtype=self.dtype)
        starts, counts, values = self.runs(start, n)
        if starts.size * 8 < n:
            for begin, count, value in zip(starts, counts, values, strict=True):
                out[begin - start : begin - start + count] = value
            return out
        return np.repeat(values, counts)

    def runs(self, start: int, n: int) -> tuple[I64, I64, Array]:
        """Return the maximal runs of equal value in [start, start+n): starts, counts, values."""
        if n == 0:
            empty = np.empty(0, dtype=np.int64)
            return empty, empty, np.empty(0, dtype=self.dtype)
        pieces = list(self._pieces(start, start + n))
        starts = np.concatenate([piece[0] for piece in pieces])
        values = np.concatenate([piece[1] for piece in pieces])
        starts[0] = start
        keep = np.ones(starts.size, dtype=np.bool_)
        keep[1:] = values[1:] != values[:-1]
        starts, values = starts[keep], values[keep]
        counts = np.diff(np.append(starts, start + n))
        return starts, counts, values

    def equals(self, start: int, n: int, value: int) -> bool:
        """Return whether every entry of [start, start+n) is ``value``."""
        _, counts, values = self.runs(start, n)
        return n == 0 or (counts.size == 1 and int(values[0]) == value)

    def touched(self, start: int, n: int) -> I64:
        """Return the indices in [start, start+n) that differ from ``fill``, ascending."""
        found = []
        end = start + n
        for node_id in self._node_ids(start, end):
            node = self._nodes[node_id]
            base = node_id << NODE_PAGES_SHIFT
            if not isinstance(node, _Node):
                if node != self.fill_value:
                    lo, hi = max(base, start), min(base + (1 << NODE_PAGES_SHIFT), end)
                    found.append(np.arange(lo, hi, dtype=np.int64))
                continue
            first = max(start - base, 0) >> LEAF_SHIFT
            last = min((end - base - 1) >> LEAF_SHIFT, LEAVES - 1)
            leaves = set(
                (np.flatnonzero(node.uniform[first : last + 1] != self.fill_value) + first).tolist()
            )
            leaves.update(leaf for leaf in node.mixed if first <= leaf <= last)
            for leaf in sorted(leaves):
                mixed = node.mixed.get(leaf)
                at = base + (leaf << LEAF_SHIFT)
                hit = (
                    np.arange(LEAF, dtype=np.int64)
                    if mixed is None
                    else np.flatnonzero(mixed != self.fill_value)
                ) + at
                found.append(hit[(hit >= start) & (hit < end)])
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _node_ids(self, start: int, end: int) -> list[int]:
        first, last = start >> NODE_PAGES_SHIFT, (end - 1) >> NODE_PAGES_SHIFT
        if last - first > len(self._nodes):
            return sorted(i for i in self._nodes if first <= i <= last)
        return [i for i in range(first, last + 1) if i in self._nodes]

    def _pieces(self, start: int, end: int) -> Iterator[tuple[I64, Array]]:
        """Yield (run starts, values) left to right; the first start may lie before ``start``."""
        at = start
        for node_id in self._node_ids(start, end):
            base = node_id << NODE_PAGES_SHIFT
            if at < base:
                yield self._one(at, self.fill_value)
            node = self._nodes[node_id]
            node_end = min(base + (1 << NODE_PAGES_SHIFT), end)
            if isinstance(node, _Node):
                yield from self._node_pieces(node, base, max(at, base), node_end)
            else:
                yield self._one(max(at, base), node)
            at = node_end
        if at < end:
            yield self._one(at, self.fill_value)

    def _node_pieces(
        self, node: _Node, base: int, start: int, end: int
    ) -> Iterator[tuple[I64, Array]]:
        first, last = (start - base) >> LEAF_SHIFT, (end - 1 - base) >> LEAF_SHIFT
        at = first
        for leaf in sorted(leaf for leaf in node.mixed if first <= leaf <= last):
            if at < leaf:
                yield self._uniform_piece(node, base, at, leaf)
            lo = base + (leaf << LEAF_SHIFT)
            part = node.mixed[leaf][max(start - lo, 0) : min(end - lo, LEAF)]
            breaks = np.flatnonzero(np.diff(part)) + 1
            breaks = np.concatenate((np.zeros(1, dtype=np.int64), breaks))
            yield breaks + max(start, lo), part[breaks]
            at = leaf + 1
        if at <= last:
            yield self._uniform_piece(node, base, at, last + 1)

    def _uniform_piece(self, node: _Node, base: int, lo: int, hi: int) -> tuple[I64, Array]:
        leaves = np.arange(lo, hi, dtype=np.int64)
        return (leaves << LEAF_SHIFT) + base, node.uniform[lo:hi].copy()

    def _one(self, start: int, value: int) -> tuple[I64, Array]:
        return np.array([start], dtype=np.int64), np.array([value], dtype=self.dtype)

    # --- writing -----------------------------------------------------------------------------
    def apply(self, op: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        """Apply one write and return its inverse."""
        if op == "put":
            indices, values = args
            old = self.get(indices)
            self._put(indices, np.asarray(values, dtype=self.dtype))
            return "put", (indices, old)
        if op == "store":
            start, values = args
            indices = np.arange(start, start + len(values), dtype=np.int64)
            old = self.get(indices)
            self._put(indices, np.asarray(values, dtype=self.dtype))
            return "store", (start, old)
        if op == "fill":
            start, n, value = args
            return "restore", (start, n, self._fill(start, start + n, int(value)))
        start, n, pieces = args
        for piece in pieces:
            self._restore(piece)
        return "restore", (start, n, [])

    def _node(self, node_id: int) -> _Node:
        node = self._nodes.get(node_id, self.fill_value)
        if not isinstance(node, _Node):
            node = self._nodes[node_id] = _Node(self.dtype, node)
        return node

    def _put(self, indices: I64, values: Array) -> None:
        values = np.broadcast_to(values, indices.shape)
        for leaf_id, mask in _by_leaf(indices):
            node = self._node(leaf_id >> NODE_SHIFT)
            leaf = leaf_id & (LEAVES - 1)
            mixed = node.mixed.get(leaf)
            if mixed is None:
                mixed = np.full(LEAF, node.uniform[leaf], dtype=self.dtype)
                node.mixed[leaf] = mixed
            mixed[indices[mask] & (LEAF - 1)] = values[mask]

    def _fill(self, start: int, end: int, value: int) -> list[tuple[Any, ...]]:
        pieces: list[tuple[Any, ...]] = []
        for node_id in range(start >> NODE_PAGES_SHIFT, ((end - 1) >> NODE_PAGES_SHIFT) + 1):
            base = node_id << NODE_PAGES_SHIFT
            lo, hi = max(start - base, 0), min(end - base, 1 << NODE_PAGES_SHIFT)
            if lo == 0 and hi == 1 << NODE_PAGES_SHIFT:
                pieces.append((node_id, self._nodes.get(node_id)))
                self._nodes[node_id] = value
                continue
            pieces.append(self._fill_in_node(node_id, lo, hi, value))
        return pieces

    def _fill_in_node(self, node_id: int, lo: int, hi: int, value: int) -> tuple[Any, ...]:
        node = self._node(node_id)
        first, last = lo >> LEAF_SHIFT, (hi - 1) >> LEAF_SHIFT
        saved_uniform = node.uniform[first : last + 1].copy()
        saved_mixed: dict[int, Array] = {}
        edges = {}
        for leaf in {first, last}:
            at = leaf << LEAF_SHIFT
            begin, stop = max(lo - at, 0), min(hi - at, LEAF)
            if stop - begin < LEAF:
                old = node.mixed.get(leaf)
                new = (
                    np.full(LEAF, node.uniform[leaf], dtype=self.dtype)
                    if old is None
                    else old.copy()
                )
                new[begin:stop] = value
                edges[leaf] = new
        inside = [leaf for leaf in node.mixed if first <= leaf <= last]
        for leaf in inside:
            saved_mixed[leaf] = node.mixed.pop(leaf)
        node.uniform[first : last + 1] = value
        for leaf, new in edges.items():
            node.uniform[leaf] = saved_uniform[leaf - first]
            node.mixed[leaf] = new
        return node_id, first, last, saved_uniform, saved_mixed

    def _restore(self, piece: tuple[Any, ...]) -> None:
        if len(piece) == 2:
            node_id, old = piece
            if old is None:
                self._nodes.pop(node_id, None)
            else:
                self._nodes[node_id] = old
            return
        node_id, first, last, uniform, mixed = piece
        node = self._node(node_id)
        for leaf in [leaf for leaf in node.mixed if first <= leaf <= last]:
            del node.mixed[leaf]
        node.uniform[first : last + 1] = uniform
        node.mixed.update(mixed)

    def snapshot(self) -> list[tuple[int, int, int]]:
        """Return the runs that differ from ``fill``: equal exactly when the contents are."""
        if not self._nodes:
            return []
        first, last = min(self._nodes), max(self._nodes) + 1
        starts, counts, values = self.runs(
            first << NODE_PAGES_SHIFT, (last - first) << NODE_PAGES_SHIFT
        )
        keep = values != self.fill_value
        return list(
            zip(starts[keep].tolist(), counts[keep].tolist(), values[keep].tolist(), strict=True)
        )

    def content(self) -> Iterator[Write]:
        """Yield the writes that make this table of nothing: uniform runs, then mixed leaves.

        Their values are views of it: encode each write before the table changes.
        """
        yield Write("", "create", (self.spec,))
        for start, n, value in self._uniform_runs():
            if value != self.fill_value:
                yield Write(self.name, "fill", (start, n, value))
        for node_id, node in sorted(self._nodes.items(), key=itemgetter(0)):
            if isinstance(node, _Node):
                for leaf, values in sorted(node.mixed.items(), key=itemgetter(0)):
                    start = (node_id << NODE_PAGES_SHIFT) + (leaf << LEAF_SHIFT)
                    yield Write(self.name, "store", (start, values))

    def _uniform_runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield runs (start, n, value) as if no leaf were mixed: those are written afterwards."""
        begin, end, value = 0, 0, self.fill_value
        for start, n, next_value in self._uniform_pieces():
            if start == end and next_value == value:
                end += n
                continue
            yield begin, end - begin, value
            begin, end, value = start, start + n, next_value
        yield begin, end - begin, value

    def _uniform_pieces(self) -> Iterator[tuple[int, int, int]]:
        for node_id, node in sorted(self._nodes.items(), key=itemgetter(0)):
            base = node_id << NODE_PAGES_SHIFT
            if not isinstance(node, _Node):
                yield base, 1 << NODE_PAGES_SHIFT, node
                continue
            breaks = np.flatnonzero(np.diff(node.uniform)) + 1
            for lo, hi in pairwise([0, *breaks.tolist(), LEAVES]):
                yield base + (lo << LEAF_SHIFT), (hi - lo) << LEAF_SHIFT, int(node.uniform[lo])


def _by_leaf(indices: I64) -> Iterator[tuple[int, Any]]:
    """Yield (leaf id, selector) so that each leaf's entries are handled at once."""
    leaves = indices >> LEAF_SHIFT
    first = int(leaves[0])
    if indices.size == 1 or (leaves == first).all():
        yield first, slice(None)
        return
    if (np.diff(leaves) >= 0).all():
        bounds = np.flatnonzero(np.diff(leaves)) + 1
        edges = [0, *bounds.tolist(), indices.size]
        for lo, hi in pairwise(edges):
            yield int(leaves[lo]), slice(lo, hi)
        return
    for leaf in np.unique(leaves).tolist():
        yield leaf, np.flatnonzero(leaves == leaf)
