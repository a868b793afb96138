"""The transaction: every change of state, the engine's or a vendor's, is a write through one.

Owns undo, redo and suspension. A write takes effect in memory at once; ``rollback`` takes the
writes back in reverse order; the engine commits by appending ``redo`` to the journal. While bytes
are copied without the engine's lock, a transaction is *suspended*: its writes are taken out of
memory, and what they touch is held, so that nobody sees or disturbs them until ``resume``.

Bytes are only named here (``byte_ops``); the memory controller moves them after every hook of the
step has agreed. What a hook sees of a transaction is ``hooks.hooktx``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.errors import SWAP_SCHEMA
from rmemd.hooks.tables import Dense, Records, Space, Sparse, Table, TableSpec, Write
from rmemd.units import I64, U8, U64

KEYS = "host/keys"
VM_KEYS = "host/vm_keys"
FRAME_KEYS = "host/key"
COUNTERS = "host/counters"


class Held(Exception):
    """A write touched what a suspended transaction holds: undo, wait for it, and run again.

    Attributes:
        holder: that transaction, ``None`` if nobody said.
        write: the write that touched it.
    """

    def __init__(
        self, text: str = "", holder: Tx | None = None, write: Write | None = None
    ) -> None:
        super().__init__(text)
        self.holder = holder
        self.write = write


class ByteOp(Struct, frozen=True):
    """A named movement of bytes: "copy_in", "zero", "relocate" or "scrub".

    Attributes:
        pfns: int64 frames that the operation writes.
        key_id: the key that the bytes are to be under (0: none).
        src: for "relocate", the frames read, parallel to ``pfns``.
        rows: for "copy_in", uint8 plaintext of shape (len(pfns), 4096).
    """

    kind: str
    pfns: I64
    key_id: int = 0
    src: I64 | None = None
    rows: U8 | None = None


class Mark(Struct, frozen=True):
    """A point in a transaction that it can be rolled back to."""

    writes: int
    byte_ops: int
    freed: int
    events: int


class Tx:
    """An open transaction on a space.

    Attributes:
        label: the operation that it is part of.
        redo: the writes, in order.
        byte_ops: byte movements named to the memory controller.
        freed: frames whose bytes are to be destroyed once the record is written.
        events: what watchers are told on commit.
        in_place: (frames, sums of their bytes) of writes in place, which follow the record.
        hooks: (writes, events) before each hook that was called, and its name.
        written: frames that nobody owns yet and that byte movements may have reached.
        reopening: whether a table that is there is handed back instead of made: the state was
            read from a journal.
        views: what hooks are given of it, by consumer; whoever opened it lets go of them at its
            end, since they hold it.
    """

    def __init__(self, space: Space, label: str, reopening: bool = False) -> None:
        self.label = label
        self.space = space
        self.reopening = reopening
        self.redo: list[Write] = []
        self.byte_ops: list[ByteOp] = []
        self.freed: list[I64] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.in_place: list[tuple[I64, U64]] = []
        self.written: list[I64] = []
        self.views: dict[object, Any] = {}
        self._undo: list[Write] = []
        self._again: list[Write] = []
        self.hooks: list[tuple[int, int, str]] = []

    def hook(self, where: str) -> None:
        """Know that a hook ("tdx-today(vm/1).map") is called now; what follows is its doing."""
        self.hooks.append((len(self.redo), len(self.events), where))

    def hook_of(self, writes: int, events: int) -> str:
        """Return which hook was called last before so many writes and events, "" if none was."""
        return next(
            (where for w, e, where in reversed(self.hooks) if w <= writes and e <= events), ""
        )

    # --- writes ------------------------------------------------------------------------------
    def fill(self, table: Dense | Sparse, start: int, n: int, value: int) -> None:
        """Set ``n`` entries from ``start`` to one value."""
        if n:
            self._do(Write(table.name, "fill", (start, n, value)))

    def put(self, table: Dense | Sparse, indices: I64, values: Any) -> None:
        """Set the entries at ``indices`` to ``values`` (a scalar, or an array as long)."""
        if indices.size:
            self._do(Write(table.name, "put", (indices, values)))

    def set(self, table: Records, key: Hashable, value: Any) -> None:
        """Set a record."""
        self._do(Write(table.name, "set", (key, value)))

    def drop(self, table: Records, key: Hashable) -> None:
        """Remove a record."""
        self._do(Write(table.name, "drop", (key,)))

    def create(self, spec: TableSpec) -> Any:
        """Create a table and return it.

        Raises:
            Refused: SWAP_SCHEMA; reopening, and the table that is there is of another shape.
        """
        there = self.space.tables.get(spec.name) if self.reopening else None
        if there is not None:
            return handed_back(there, spec)
        self._do(Write("", "create", (spec,)))
        return self.space.tables[spec.name]

    def destroy(self, name: str) -> None:
        """Remove a table with all it holds."""
        self._do(Write("", "destroy", (name,)))

    def repeat(self, write: Write) -> None:
        """Do a write that another transaction recorded."""
        self._do(write)

    def next_id(self, counter: str) -> int:
        """Return the next number of a counter, from 1: a handle that is never used again."""
        counters = self.space.records(COUNTERS)
        number: int = counters.get(counter, 0) + 1
        self.set(counters, counter, number)
        return number

    def emit(self, kind: str, **fields: Any) -> None:
        """Tell watchers, once the transaction commits."""
        self.events.append((kind, fields))

    def name_bytes(self, op: ByteOp) -> None:
        """Name a movement of bytes for the memory controller."""
        if op.pfns.size:
            self.byte_ops.append(op)

    # --- undo --------------------------------------------------------------------------------
    def mark(self) -> Mark:
        """Return a point that ``rollback`` can return to."""
        return Mark(len(self.redo), len(self.byte_ops), len(self.freed), len(self.events))

    def rollback(self, mark: Mark | None = None) -> None:
        """Take back every write, byte movement and event since ``mark`` (default: all)."""
        mark = mark or Mark(0, 0, 0, 0)
        for write in reversed(self._undo[mark.writes :]):
            self.space.apply(write)
        del self.redo[mark.writes :], self._undo[mark.writes :]
        del self.byte_ops[mark.byte_ops :], self.freed[mark.freed :], self.events[mark.events :]

    # --- suspension --------------------------------------------------------------------------
    def suspend(self) -> None:
        """Take the writes out of memory, but hold what they touch."""
        for i in reversed(range(len(self._undo))):
            inverse = self.space.apply(self._undo[i])
            self._again.append(inverse if inverse.op == "attach" else self.redo[i])
        self._undo.clear()
        self.space.holders.append(self)

    def resume(self) -> None:
        """Put the writes back; nothing they touch has changed meanwhile."""
        self.space.holders.remove(self)
        self._undo = [self.space.apply(write) for write in reversed(self._again)]
        self._again.clear()

    def release(self) -> None:
        """Give up a suspended transaction: its writes are out of memory already."""
        self.space.holders.remove(self)
        self.redo.clear()
        self.byte_ops.clear()
        self.freed.clear()
        self.events.clear()
        self.in_place.clear()

    def _do(self, write: Write) -> None:
        for holder in self.space.holders:
            if any(_overlap(write, held) for held in holder.redo):
                raise Held(f"{write.table} is held by {holder.label}", holder, write)
        self._undo.append(self.space.apply(write))
        self.redo.append(write)


def handed_back(there: Table, spec: TableSpec) -> Table:
    """Return a table that is asked for as it was made.

    Raises:
        Refused: SWAP_SCHEMA; it is asked for otherwise.
    """
    if there.spec != spec:
        raise SWAP_SCHEMA(f"{spec.name} is {there.spec}, the new code asks for {spec}")
    return there


def _overlap(one: Write, other: Write) -> bool:
    if one.table != other.table:
        # a table must not go while something else is written in it
        whole, part = (other, one) if one.table else (one, other)
        return not whole.table and whole.op == "destroy" and bool(_key(whole) == part.table)
    if not one.table or one.op in ("set", "drop"):
        return bool(_key(one) == _key(other))
    a, b = _extent(one), _extent(other)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a[0] < b[1] and b[0] < a[1]
    if isinstance(a, tuple):
        a, b = b, a
    assert not isinstance(a, tuple)
    if isinstance(b, tuple):
        return bool(((a >= b[0]) & (a < b[1])).any())
    return bool(np.isin(a, b).any())


def _key(write: Write) -> Hashable:
    key: Hashable = write.args[0]
    return key.name if isinstance(key, TableSpec) else key


def _extent(write: Write) -> tuple[int, int] | I64:
    if write.op == "put":
        indices: I64 = write.args[0]
        return indices
    n = write.args[1] if write.op == "fill" else len(write.args[1])
    return write.args[0], write.args[0] + n
