"""A consumer's state between two objects: closed, plain data, and nothing of the plugin's own.

Owns ``State`` and the helpers by which a plugin's export_state and import_state are a line each.
A reload replaces the plugin's classes, so whatever is carried over must not be an instance of one:
arrays of numbers, and records of plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.errors import SWAP_SCHEMA
from rmemd.hooks.hooktx import HookTx
from rmemd.hooks.tables import Records, Sparse, Table
from rmemd.units import I64, NDArray

# past the last index that a sparse table can have
INDEX_END = 1 << 52
PLAIN = frozenset((int, str, bytes, bool, type(None)))


class SparseState(Struct, frozen=True, eq=False):
    """A sparse table's entries that differ from ``fill``: ascending int64 indices, and values."""

    indices: I64
    values: NDArray[Any]
    fill: int = 0


class RecordsState(Struct, frozen=True, eq=False):
    """A table of records as (key, value) pairs, in its order; both are plain (``is_plain``)."""

    items: tuple[tuple[Any, Any], ...]


TableState = SparseState | RecordsState


class State(Struct, frozen=True, eq=False):
    """All that one VM's consumer keeps.

    Attributes:
        kind: whose schema it is, "tdx": variants that can be swapped have the same.
        version: of the schema; a plugin raises it whenever a table changes its meaning.
        tables: each of the consumer's tables, by its name in VmContext.
    """

    kind: str
    version: int
    tables: Mapping[str, TableState]

    @property
    def entries(self) -> int:
        """Return how many entries and records it has."""
        return sum(map(entries_of, self.tables.values()))

    def require(self, kind: str, version: int) -> None:
        """Take the state only if it has the schema that the caller knows.

        Raises:
            Refused: SWAP_SCHEMA, with both.
        """
        if (self.kind, self.version) != (kind, version):
            raise SWAP_SCHEMA(
                f"the state is {self.kind!r} version {self.version}, and the new consumer takes "
                f"{kind!r} version {version}", state=f"{self.kind} version {self.version}",
            )  # fmt: skip


def export_tables(kind: str, version: int, *tables: Sparse | Records) -> State:
    """Return the state that a consumer's own tables hold."""
    return State(kind, version, {own_name(table): capture(table) for table in tables})


def import_tables(
    tx: HookTx, state: State, kind: str, version: int, *tables: Sparse | Records
) -> None:
    """Put a state into a consumer's own tables, which are empty.

    Raises:
        Refused: SWAP_SCHEMA; it has another schema, or other tables.
    """
    state.require(kind, version)
    mine = {own_name(table): table for table in tables}
    for name in sorted(mine.keys() ^ state.tables.keys()):
        lacks = "the state" if name in mine else "the new consumer"
        raise SWAP_SCHEMA(f"{lacks} has no table {name!r}", state=f"{kind} version {version}")
    for name, table in mine.items():
        _restore(tx, table, state.tables[name])


def own_name(table: Sparse | Records) -> str:
    """Return a consumer's table's name as its plugin gave it: "sept" of "vm/3/tdx/sept"."""
    return table.name.split("/", 3)[-1]


def capture(table: Table) -> TableState:
    """Return what a consumer's table holds."""
    if isinstance(table, Records):
        return RecordsState(tuple(table.items()))
    assert isinstance(table, Sparse), table.name
    indices = table.touched(0, INDEX_END)
    return SparseState(indices, table.get(indices), table.fill_value)


def same_table(one: TableState | None, other: TableState | None) -> bool:
    """Return whether two tables hold the same; one that is not there is as good as empty."""
    if one is None or other is None:
        return entries_of(one) == entries_of(other)
    if isinstance(one, SparseState) and isinstance(other, SparseState):
        return (
            one.fill == other.fill
            and np.array_equal(one.indices, other.indices)
            and np.array_equal(one.values, other.values)
        )
    if isinstance(one, RecordsState) and isinstance(other, RecordsState):
        return dict(one.items) == dict(other.items)
    return False


def entries_of(table: TableState | None) -> int:
    """Return how many entries or records a table has; one that is not there has none."""
    if table is None:
        return 0
    return len(table.items) if isinstance(table, RecordsState) else int(table.indices.size)


def is_plain(value: Any) -> bool:
    """Return whether a value is closed data: int, str, bytes, bool, None, or tuples of these."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return type(value) in PLAIN


def is_sound(answer: Any) -> bool:
    """Return whether an answer is a state in which nothing is of anybody's own class."""
    if type(answer) is not State:
        return False
    kind, version, tables = (getattr(answer, name) for name in ("kind", "version", "tables"))
    if type(kind) is not str or type(version) is not int or not isinstance(tables, Mapping):
        return False
    return all(type(name) is str for name in tables) and all(map(_sound_table, tables.values()))


def _sound_table(table: Any) -> bool:
    if type(table) is RecordsState:
        return is_plain(table.items) and all(len(pair) == 2 for pair in table.items)
    if type(table) is not SparseState or type(table.fill) is not int:
        return False
    indices: Any = table.indices
    values: Any = table.values
    if type(indices) is not np.ndarray or type(values) is not np.ndarray:
        return False
    numbers = indices.dtype == np.int64 and values.dtype.kind in "iu"
    flat = indices.ndim == 1 and indices.shape == values.shape
    return bool(numbers and flat and (np.diff(indices) > 0).all())


def _restore(tx: HookTx, table: Sparse | Records, state: TableState) -> None:
    if isinstance(table, Records) and isinstance(state, RecordsState):
        for key, value in state.items:
            tx.set(table, key, value)
    elif isinstance(table, Sparse) and isinstance(state, SparseState):
        there = (table.dtype, table.fill_value)
        if there != (state.values.dtype, state.fill):
            raise SWAP_SCHEMA(f"{own_name(table)} is {there}, the state's is another")
        tx.put(table, state.indices, state.values)
    else:
        raise SWAP_SCHEMA(f"{own_name(table)} is a table of another shape in the state")
