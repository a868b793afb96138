"""The shapes that state can take: dense arrays, sparse arrays and records, named by a space.

Owns ``Dense``, ``Records`` and ``Space`` (``Sparse`` has its own module). Engine and plugins read
tables directly; nobody writes one except through a transaction (``hooks.tx``), because a write
here answers with its inverse and remembers nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, ValuesView
from typing import Any

import numpy as np

from rmemd.hooks.sparse import Sparse
from rmemd.hooks.writes import TableSpec, Write
from rmemd.units import I64, NDArray, coalesce

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

    Attributes:
        at: returns one value, by its index, as a Python int.
    """

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self._a: Array = (
            np.zeros(spec.length, dtype=spec.dtype)
            if spec.fill == 0
            else np.full(spec.length, spec.fill, dtype=spec.dtype)
        )
        # NumPy's own, as a call of ours around it would take three times as long
        self.at: Callable[[int], int] = self._a.item
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

    def where(self, value: int) -> I64:
        """Return the indices that hold a value, not the fill, ascending.

        It costs what was ever written, not the length.
        """
        found = [
            np.flatnonzero(self._a[start:end] == value) + start
            for start, end in self._written_runs()
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def reach(self, start: int, end: int) -> int:
        """Return where a tail of [start, end) begins in which nothing was ever written."""
        self._mark()
        first = start >> CHUNK_SHIFT
        chunks = np.flatnonzero(self._written[first : ((end - 1) >> CHUNK_SHIFT) + 1])
        return min((int(chunks[-1]) + first + 1) << CHUNK_SHIFT, end) if chunks.size else start

    def _written_runs(self) -> list[tuple[int, int]]:
        self._mark()
        starts, counts = coalesce(np.flatnonzero(self._written).astype(np.int64))
        ends = starts + counts
        return list(
            zip((starts << CHUNK_SHIFT).tolist(), (ends << CHUNK_SHIFT).tolist(), strict=True)
        )

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
    """Immutable values by key, in the order in which the keys came.

    It can be asked for the keys of a group (``grouped``), at the cost of those.

    Attributes:
        get: returns the value of a key, or a default (None).
        has: returns whether a key is there, as ``in`` does.
        values: returns the values, in no order.
    """

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.name = spec.name
        # one dictionary for good, so that its own methods can be had without a call around them
        self._d: dict[Hashable, Any] = {}
        self.get: Callable[..., Any] = self._d.get
        self.has: Callable[[Hashable], bool] = self._d.__contains__
        self.values: Callable[[], ValuesView[Any]] = self._d.values
        # when each key came; a key that is put back goes to where it was
        self._came: dict[Hashable, int] = {}
        self._last = 0
        self._in_order = True
        self._group: Callable[[Any, Any], Hashable] | None = None
        self._groups: dict[Hashable, dict[Any, None]] = {}

    def __getitem__(self, key: Hashable) -> Any:
        return self._d[key]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._d

    def __len__(self) -> int:
        return len(self._d)

    def items(self) -> list[tuple[Any, Any]]:
        """Return the (key, value) pairs, in order of insertion."""
        items = list(self._d.items())
        return items if self._in_order else sorted(items, key=lambda item: self._came[item[0]])

    def group_by(self, group: Callable[[Any, Any], Hashable]) -> None:
        """Have ``grouped`` find keys by what ``group`` says of each and its value.

        It must say the same as long as the key is there, whatever value it is given.
        """
        self._group = group
        self._groups = {}
        for key, value in self._d.items():
            self._groups.setdefault(group(key, value), {})[key] = None

    def grouped(self, group: Hashable) -> list[Any]:
        """Return the keys of a group, in order of insertion."""
        return sorted(self._groups.get(group, ()), key=self._came.__getitem__)

    def apply(self, op: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
        """Apply one write and return its inverse."""
        key = args[0]
        there = key in self._d
        if op == "drop":
            if not there:
                return "drop", (key,)
            self._of_group(key, self._d[key], there=False)
            return "insert", (key, self._d.pop(key), self._came.pop(key))
        inverse: tuple[str, tuple[Any, ...]] = (
            ("set", (key, self._d[key])) if there else ("drop", (key,))
        )
        if not there:
            self._place(key, args[2] if op == "insert" else 0)
            self._of_group(key, args[1], there=True)
        self._d[key] = args[1]
        return inverse

    def _place(self, key: Hashable, came: int) -> None:
        """Give a key that is not there its place: the one that it had, or the last."""
        if came:
            self._in_order = False
        else:
            if not self._in_order:
                items = self.items()
                self._d.clear()
                self._d.update(items)
                self._in_order = True
            came = self._last = self._last + 1
        self._came[key] = came

    def _of_group(self, key: Any, value: Any, there: bool) -> None:
        if self._group is None:
            return
        group = self._group(key, value)
        if there:
            self._groups.setdefault(group, {})[key] = None
            return
        keys = self._groups[group]
        del keys[key]
        if not keys:
            del self._groups[group]

    def snapshot(self) -> dict[Hashable, Any]:
        """Return a copy that compares equal exactly when the contents do."""
        return dict(self.items())

    def content(self) -> Iterator[Write]:
        """Yield the writes that make this table of nothing, keys in their order."""
        yield Write("", "create", (self.spec,))
        for key, value in self.items():
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
        self._below: dict[str, dict[str, None]] = {}

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

    def below(self, owner: str) -> list[str]:
        """Return the names of an owner's tables ("vm/12"), in order, at the cost of those."""
        return list(self._below.get(owner, ()))

    def apply(self, write: Write) -> Write:
        """Apply one write and return its inverse."""
        if write.table:
            op, args = self.tables[write.table].apply(write.op, write.args)
            return Write(write.table, op, args)
        if write.op == "create":
            spec: TableSpec = write.args[0]
            if spec.name in self.tables:
                raise KeyError(f"table {spec.name} exists")
            return self._attach(_KINDS[spec.kind](spec))
        if write.op == "destroy":
            return Write("", "attach", (self._detach(write.args[0]),))
        return self._attach(write.args[0])

    def _attach(self, table: Table) -> Write:
        self.tables[table.name] = table
        self._below.setdefault(_owner(table.name), {})[table.name] = None
        return Write("", "destroy", (table.name,))

    def _detach(self, name: str) -> Table:
        mine = self._below[_owner(name)]
        del mine[name]
        if not mine:
            del self._below[_owner(name)]
        return self.tables.pop(name)

    def snapshot(self) -> dict[str, Any]:
        """Return every table's snapshot: what "the whole state" means when states are compared."""
        return {name: table.snapshot() for name, table in sorted(self.tables.items())}


def _owner(name: str) -> str:
    """Return whose a table is: "vm/12" of "vm/12/tdx/septe"."""
    return "/".join(name.split("/", 2)[:2])


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
