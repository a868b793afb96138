"""The shapes that state can take: dense arrays, sparse arrays and records, named by a space.

Owns ``Dense``, ``Records`` and ``Space`` (``Sparse`` has its own module). Engine and plugins read
tables directly; nobody writes one except through a transaction (``hooks.tx``), because a write
here answers with its inverse and remembers nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rmemd.hooks.sparse import Sparse
from rmemd.hooks.writes import TableSpec, Write
from rmemd.units import I64, coalesce

Array = NDArray[Any]

CHUNK_SHIFT = 12
CHUNK = 1 << CHUNK_SHIFT
# entries per write of a dense table's content: enough for speed, little enough to be framed
CONTENT_CHUNKS = 64
# indices that are remembered as they are, and how often, before the map of chunks is marked
_FEW = 64
_NOTED = 256


class Dense:
    """An array by index 0..length, zero pages of which cost nothing until written.

    It knows which chunks of 4096 entries were ever written, so that ``content`` need not look at
    the others.
    """

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self._a: Array = (
            np.zeros(spec.length, dtype=spec.dtype)
            if spec.fill == 0
            else np.full(spec.length, spec.fill, dtype=spec.dtype)
        )
        self._written = np.zeros((spec.length >> CHUNK_SHIFT) + 1, dtype=np.bool_)
        self._noted: list[bytes] = []

    @property
    def view(self) -> Array:
        """Return a read-only view of the whole array (no copy)."""
        view = self._a.view()
        view.flags.writeable = False
        return view

    def get(self, indices: I64) -> Array:
        """Return the values at ``indices``, shape as ``indices``."""
        return self._a[indices]

    def at(self, index: int) -> int:
        """Return one value as a Python int."""
        return int(self._a[index])

    def apply(self, op: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        """Apply one write and return its inverse."""
        if op == "put":
            indices, values = args
            old = self._a[indices]
            self._a[indices] = values
            self._note(indices)
            return "put", (indices, old)
        start = args[0]
        n, value = args[1:] if op == "fill" else (len(args[1]), args[1])
        old = self._a[start : start + n].copy()
        self._a[start : start + n] = value
        self._written[start >> CHUNK_SHIFT : (start + n - 1 >> CHUNK_SHIFT) + 1] = True
        return "store", (start, old)

    def snapshot(self) -> Array:
        """Return a copy that compares equal exactly when the contents do."""
        return self._a.copy()

    def content(self) -> Iterator[Write]:
        """Yield the writes that make this table of nothing.

        Their values are views of it: encode each write before the table changes.
        """
        yield Write("", "create", (self.spec,))
        self._mark()
        starts, counts = coalesce(np.flatnonzero(self._written).astype(np.int64))
        for first, count in zip(starts.tolist(), counts.tolist(), strict=True):
            for chunk in range(first, first + count, CONTENT_CHUNKS):
                past = min(chunk + CONTENT_CHUNKS, first + count)
                values = self.view[chunk << CHUNK_SHIFT : past << CHUNK_SHIFT]
                if (values != self.spec.fill).any():
                    yield Write(self.name, "store", (chunk << CHUNK_SHIFT, values))

    def _note(self, indices: I64) -> None:
        """Remember that entries were written; most puts are small, and marking costs 1 µs."""
        if indices.size > _FEW or indices.itemsize != 8:
            self._written[np.asarray(indices, dtype=np.int64) >> CHUNK_SHIFT] = True
            return
        self._noted.append(indices.tobytes())
        if len(self._noted) == _NOTED:
            self._mark()

    def _mark(self) -> None:
        indices = np.frombuffer(b"".join(self._noted), dtype=np.int64)
        self._written[indices >> CHUNK_SHIFT] = True
        self._noted.clear()


class Records:
    """Immutable values by key."""

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self._d: dict[Hashable, Any] = {}

    def get(self, key: Hashable, default: Any = None) -> Any:
        """Return the value of ``key``, or ``default``."""
        return self._d.get(key, default)

    def __getitem__(self, key: Hashable) -> Any:
        return self._d[key]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._d

    def __len__(self) -> int:
        return len(self._d)

    def items(self) -> list[tuple[Any, Any]]:
        """Return the (key, value) pairs, in order of insertion."""
        return list(self._d.items())

    def apply(self, op: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        """Apply one write and return its inverse."""
        if op == "reorder":
            self._d = dict(args[0])
            return "reorder", (args[0],)
        key = args[0]
        before = list(self._d.items()) if op == "drop" and key in self._d else None
        inverse: tuple[str, tuple[Any, ...]] = (
            ("set", (key, self._d[key])) if key in self._d else ("drop", (key,))
        )
        if op == "set":
            self._d[key] = args[1]
        else:
            self._d.pop(key, None)
        return ("reorder", (before,)) if before is not None else inverse

    def snapshot(self) -> dict[Hashable, Any]:
        """Return a copy that compares equal exactly when the contents do."""
        return dict(self._d)

    def content(self) -> Iterator[Write]:
        """Yield the writes that make this table of nothing, keys in their order."""
        yield Write("", "create", (self.spec,))
        for key, value in self._d.items():
            yield Write(self.name, "set", (key, value))


Table = Dense | Sparse | Records
_KINDS: dict[str, type[Dense] | type[Sparse] | type[Records]] = {
    "dense": Dense, "sparse": Sparse, "records": Records,
}  # fmt: skip


class Space:
    """All state there is: tables by name. Comparable as a whole, replayable from writes."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self.holders: list[Any] = []

    def sparse(self, name: str) -> Sparse:
        """Return a sparse table."""
        table = self.tables[name]
        assert isinstance(table, Sparse), name
        return table

    def records(self, name: str) -> Records:
        """Return a table of records."""
        table = self.tables[name]
        assert isinstance(table, Records), name
        return table

    def apply(self, write: Write) -> Write:
        """Apply one write and return its inverse."""
        if write.table:
            op, args = self.tables[write.table].apply(write.op, write.args)
            return Write(write.table, op, args)
        if write.op == "create":
            spec: TableSpec = write.args[0]
            if spec.name in self.tables:
                raise KeyError(f"table {spec.name} exists")
            self.tables[spec.name] = _KINDS[spec.kind](spec)
            return Write("", "destroy", (spec.name,))
        if write.op == "destroy":
            return Write("", "attach", (self.tables.pop(write.args[0]),))
        table: Table = write.args[0]
        self.tables[table.name] = table
        return Write("", "destroy", (table.name,))

    def snapshot(self) -> dict[str, Any]:
        """Return every table's snapshot: what "the whole state" means when states are compared."""
        return {name: table.snapshot() for name, table in sorted(self.tables.items())}


def same_state(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the tables in which two snapshots differ (empty: the same state)."""
    names = one.keys() | other.keys()
    return sorted(
        name for name in names
        if name not in one or name not in other or not _same(one[name], other[name])
    )  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b)


__all__ = ["Dense", "Records", "Space", "Sparse", "Table", "TableSpec", "Write", "same_state"]
