"""Sparse arrays: values over 2^52 indices that cost what was touched.

Owns ``Sparse``, one of the shapes that state can take. It keeps one value per uniform leaf of 4096
entries, one per uniform node of 4096 leaves, and bytes only where values are mixed. Of a node in
which only a few entries were ever written it keeps those: most tables are of a few pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from rmemd.hooks.leaves import (
    IN_LEAF,
    IN_NODE,
    LEAF,
    LEAF_SHIFT,
    LEAVES,
    NODE_PAGES_SHIFT,
    NODE_SHIFT,
    UNIFORM,
    Array,
    Node,
    by_node,
    leaves_of,
)
from rmemd.hooks.writes import TableSpec, Write
from rmemd.units import I64

# up to so many entries are kept and handled one by one: numpy would cost more
FEW = 16
# every byte there is
_BYTES = tuple(bytes((value,)) for value in range(256))
# what is kept of a node: one value, a few entries by index while the rest is fill, or all
_Kept = int | dict[int, int] | Node


class Sparse:
    """An array over 2^52 indices that holds ``fill`` wherever nothing was written."""

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.dtype = np.dtype(spec.dtype)
        self.fill_value = spec.fill
        self._of_bytes = self.dtype == np.uint8
        self._nodes: dict[int, _Kept] = {}

    # --- reading -----------------------------------------------------------------------------
    def at(self, index: int) -> int:
        """Return one value as a Python int."""
        node = self._nodes.get(index >> NODE_PAGES_SHIFT, self.fill_value)
        if isinstance(node, int):
            return node
        if isinstance(node, dict):
            return node.get(index, self.fill_value)
        place = index & IN_NODE
        leaf = place >> LEAF_SHIFT
        place += node.shift_of[leaf] << LEAF_SHIFT
        value: int = node.uniform.item(leaf) if place < 0 else node.entries.item(place)
        return value

    def get(self, indices: I64) -> Array:
        """Return the values at ``indices`` (int64, any order), same shape."""
        if indices.shape == (1,):
            return np.array([self.at(indices.item())], dtype=self.dtype)
        if not self._nodes or not indices.size:
            return np.full(indices.shape, self.fill_value, dtype=self.dtype)
        first, last = leaves_of(indices)
        if first >> NODE_SHIFT == last >> NODE_SHIFT:
            return self._of_node(first, last, indices)
        out: Array = np.empty(indices.shape, dtype=self.dtype)
        for _, which in by_node(indices):
            part = indices[which]
            out[which] = self._of_node(*leaves_of(part), part)
        return out

    def _of_node(self, first: int, last: int, indices: I64) -> Array:
        """Return the values at ``indices``, of the leaves from first to last of one node."""
        node = self._nodes.get(first >> NODE_SHIFT, self.fill_value)
        if isinstance(node, Node):
            return node.get(indices, first, last)
        if isinstance(node, dict):
            return self._few_at(node, indices)
        return np.full(indices.shape, node, dtype=self.dtype)

    def _few_at(self, few: dict[int, int], indices: I64) -> Array:
        """Return the values at ``indices`` of a node of which a few are known."""
        if indices.size <= FEW:
            return np.array([few.get(at, self.fill_value) for at in indices.tolist()], self.dtype)
        out: Array = np.full(indices.shape, self.fill_value, dtype=self.dtype)
        for at, value in few.items():
            out[indices == at] = value
        return out

    def touched_among(self, indices: I64) -> I64:
        """Return those of ``indices`` whose values differ from ``fill``, in their order."""
        if not self._nodes:
            return indices[:0]
        found: I64 = indices[self.get(indices) != self.fill_value]
        return found

    def _leaf(self, leaf_id: int) -> int | Array:
        """Return the value of a uniform leaf, or the values of a mixed one."""
        node = self._nodes.get(leaf_id >> NODE_SHIFT, self.fill_value)
        if isinstance(node, int):
            return node
        assert not isinstance(node, dict)
        row = node.row(leaf_id & (LEAVES - 1))
        return int(node.uniform[leaf_id & (LEAVES - 1)]) if row is None else row

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
            if isinstance(node, dict):
                few = [at for at, value in node.items() if value != self.fill_value]
                found.append(np.array(sorted(at for at in few if start <= at < end), np.int64))
                continue
            if isinstance(node, int):
                if node != self.fill_value:
                    lo, hi = max(base, start), min(base + (1 << NODE_PAGES_SHIFT), end)
                    found.append(np.arange(lo, hi, dtype=np.int64))
                continue
            first = max(start - base, 0) >> LEAF_SHIFT
            last = min((end - base - 1) >> LEAF_SHIFT, LEAVES - 1)
            apart = (node.uniform[first : last + 1] != self.fill_value).nonzero()[0] + first
            leaves = {*apart.tolist(), *node.mixed(first, last).tolist()}
            for leaf in sorted(leaves):
                found.append(self._touched_in(base + (leaf << LEAF_SHIFT), start, end))
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _touched_in(self, at: int, start: int, end: int) -> I64:
        """Return the indices of the leaf from ``at`` that count, inside of [start, end)."""
        values = self._leaf(at >> LEAF_SHIFT)
        first, past = max(start - at, 0), min(end - at, LEAF)
        if isinstance(values, int):
            return np.arange(at + first, at + past, dtype=np.int64)
        hit: I64 = (values[first:past] != self.fill_value).nonzero()[0] + (at + first)
        return hit

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
            if isinstance(node, Node):
                yield from node.pieces(base, max(at, base), node_end)
            elif isinstance(node, dict):
                yield self._few_pieces(node, max(at, base), node_end)
            else:
                yield self._one(max(at, base), node)
            at = node_end
        if at < end:
            yield self._one(at, self.fill_value)

    def _few_pieces(self, few: dict[int, int], start: int, end: int) -> tuple[I64, Array]:
        runs = {start: self.fill_value}
        for at in sorted(at for at in few if start <= at < end):
            runs[at] = few[at]
            runs[at + 1] = self.fill_value
        runs.pop(end, None)
        return np.array(list(runs), np.int64), np.array(list(runs.values()), self.dtype)

    def _one(self, start: int, value: int) -> tuple[I64, Array]:
        return np.array([start], dtype=np.int64), np.array([value], dtype=self.dtype)

    # --- writing -----------------------------------------------------------------------------
    def apply(self, op: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        """Apply one write and return its inverse."""
        if op == "fill":
            start, n, value = args
            node = self._nodes.get(start >> NODE_PAGES_SHIFT)
            if type(node) is Node and self._of_bytes and n < LEAF:
                # as nearly always, and the way by others' functions would take longer
                place = start & IN_NODE
                shift = node.shift_of[place >> LEAF_SHIFT]
                # those of two leaves may lie together, too
                if shift == node.shift_of[(place + n - 1) >> LEAF_SHIFT] != UNIFORM:
                    place += shift << LEAF_SHIFT
                    part = node.raw[place : place + n]
                    old = part.tobytes()
                    part[:] = _BYTES[value] * n
                    return "store", (start, old)
            if n == 1 and type(node) is dict and len(node) < FEW:
                # as in the table of what a session holds
                old_value = node.get(start, self.fill_value)
                node[start] = int(value)
                return "fill", (start, 1, old_value)
            if n == LEAF or (start & IN_LEAF) + n > LEAF:
                return "restore", (start, n, self._fill(start, start + n, int(value)))
            return "store", (start, self._store(start, n, int(value)))
        if op == "put":
            indices, values = args
            return "put", (indices, self._put(indices, np.asarray(values, dtype=self.dtype)))
        if op == "store":
            start, values = args
            if type(values) is bytes:
                values = np.frombuffer(values, dtype=self.dtype)
            return "store", (start, self._store(start, len(values), np.asarray(values, self.dtype)))
        start, n, pieces = args
        for piece in pieces:
            self._restore(piece)
        return "restore", (start, n, [])

    def _node(self, node_id: int) -> Node:
        node = self._nodes.get(node_id, self.fill_value)
        if isinstance(node, Node):
            return node
        made = Node(self.dtype, node if isinstance(node, int) else self.fill_value)
        if isinstance(node, dict):
            at = np.array(list(node), np.int64)
            made.put(at, np.array(list(node.values()), self.dtype), *leaves_of(at))
        self._nodes[node_id] = made
        return made

    def _put_few(self, numbers: Sequence[int], values: Array | int) -> Array | None:
        """Put where only a few entries are kept; return what was there, None if it must be more."""
        node_id = numbers[0] >> NODE_PAGES_SHIFT
        few = self._nodes.get(node_id, {})
        if not isinstance(few, dict) or len(few) + len(numbers) > FEW:
            return None
        if any(number >> NODE_PAGES_SHIFT != node_id for number in numbers):
            return None
        fill = self.fill_value
        old = np.array([few.get(number, fill) for number in numbers], dtype=self.dtype)
        self._nodes[node_id] = few
        if isinstance(values, int) or not values.ndim:
            news = [int(values)] * len(numbers)
        else:
            news = values.tolist()
        few.update(zip(numbers, news, strict=True))
        return old

    def _put(self, indices: I64, values: Array) -> Array:
        """Set entries, and return what was there."""
        if indices.size == 1:
            return self._store(indices.item(), 1, values)
        if values.ndim and values.shape != indices.shape:
            values = np.broadcast_to(values, indices.shape)
        if 0 < indices.size <= FEW:
            few = self._put_few(indices.tolist(), values)
            if few is not None:
                return few
        if not indices.size:
            return np.empty(0, dtype=self.dtype)
        first, last = leaves_of(indices)
        if first >> NODE_SHIFT == last >> NODE_SHIFT:
            return self._node(first >> NODE_SHIFT).put(indices, values, first, last)
        old = np.empty(indices.shape, dtype=self.dtype)
        for node_id, which in by_node(indices):
            part, of_part = indices[which], values[which] if values.ndim else values
            old[which] = self._node(node_id).put(part, of_part, *leaves_of(part))
        return old

    def _store(self, start: int, n: int, values: Array | int) -> Array:
        """Set ``n`` entries from ``start``, and return what was there."""
        at = start & IN_LEAF
        if at + n > LEAF:
            return self._put(np.arange(start, start + n, dtype=np.int64), np.asarray(values))
        node = self._nodes.get(start >> NODE_PAGES_SHIFT)
        if type(node) is not Node:
            few = self._put_few(range(start, start + n), values) if n <= FEW else None
            if few is not None:
                return few
            node = self._node(start >> NODE_PAGES_SHIFT)
        part = node.own((start >> LEAF_SHIFT) & (LEAVES - 1))[at : at + n]
        old: Array = part.copy()
        part[:] = values
        return old

    def _fill(self, start: int, end: int, value: int) -> list[tuple[Any, ...]]:
        pieces: list[tuple[Any, ...]] = []
        for node_id in range(start >> NODE_PAGES_SHIFT, ((end - 1) >> NODE_PAGES_SHIFT) + 1):
            base = node_id << NODE_PAGES_SHIFT
            lo, hi = max(start - base, 0), min(end - base, 1 << NODE_PAGES_SHIFT)
            if lo == 0 and hi == 1 << NODE_PAGES_SHIFT:
                pieces.append((node_id, self._nodes.get(node_id)))
                self._nodes[node_id] = value
                continue
            pieces.append((node_id, None, *self._node(node_id).fill(lo, hi, value)))
        return pieces

    def _restore(self, piece: tuple[Any, ...]) -> None:
        node_id, old, *part = piece
        if part:
            self._node(node_id).restore(*part)
        elif old is None:
            self._nodes.pop(node_id, None)
        else:
            self._nodes[node_id] = old

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
            if isinstance(node, dict):
                at = np.array(list(node), np.int64)
                yield Write(self.name, "put", (at, np.array(list(node.values()), self.dtype)))
            elif isinstance(node, Node):
                for leaf in node.mixed(0, LEAVES - 1).tolist():
                    start = (node_id << NODE_PAGES_SHIFT) + (leaf << LEAF_SHIFT)
                    yield Write(self.name, "store", (start, node.row(leaf)))

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
            if not isinstance(node, Node):
                value = node if isinstance(node, int) else self.fill_value
                yield base, 1 << NODE_PAGES_SHIFT, value
                continue
            breaks = np.flatnonzero(np.diff(node.uniform)) + 1
            for lo, hi in pairwise([0, *breaks.tolist(), LEAVES]):
                yield base + (lo << LEAF_SHIFT), (hi - lo) << LEAF_SHIFT, int(node.uniform[lo])
