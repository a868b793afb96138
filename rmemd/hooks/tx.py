"""The transaction: every change of state, the engine's or a vendor's, is a write through one.

Owns undo, redo and suspension. A write takes effect in memory at once; ``rollback`` takes the
writes back in reverse order; the engine commits by appending ``redo`` to the journal. While bytes
are copied without the engine's lock, a transaction is *suspended*: its writes are taken out of
memory, and what they touch is held, so that nobody sees or disturbs them until ``resume``.

Bytes are only named here (``byte_ops``); the memory controller moves them after every hook of the
step has agreed.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rmemd.errors import SWAP_SCHEMA
from rmemd.hooks.tables import Dense, Records, Space, Sparse, Table, TableSpec, Write
from rmemd.hooks.types import KeySpec
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


@dataclass(frozen=True)
class ByteOp:
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


@dataclass(frozen=True)
class Mark:
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
        reopening: whether a table that is there is handed back instead of made: the state was
            read from a journal.
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
        self._undo: list[Write] = []
        self._again: list[Write] = []
        self._hooks: list[tuple[int, int, str]] = []

    def hook(self, where: str) -> None:
        """Know that a hook ("tdx-today(vm/1).map") is called now; what follows is its doing."""
        self._hooks.append((len(self.redo), len(self.events), where))

    def hook_of(self, writes: int, events: int) -> str:
        """Return which hook was called last before so many writes and events, "" if none was."""
        return next(
            (where for w, e, where in reversed(self._hooks) if w <= writes and e <= events), ""
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


class HookServices(Protocol):
    """What the engine does for a hook while it runs."""

    def kick(self, tx: Tx, vm: int) -> None:
        """Have the VM's vCPUs leave the guest."""

    def vcpu_count(self, vm: int) -> int:
        """Count the VM's vCPUs."""

    def kill(self, tx: Tx, vm: int, reason: str) -> None:
        """Mark the VM dead."""

    def injected(self, tx: Tx, vm: int, point: str) -> str:
        """Return what a fault rule says should go wrong at ``point`` now, "" for nothing."""


class HookTx:
    """The transaction as a hook sees it: its own tables, its keys, named bytes, a kick.

    A hook that writes a table of somebody else raises ``PermissionError``, which the engine
    reports as a fault of the plugin.
    """

    def __init__(self, tx: Tx, prefixes: tuple[str, ...], vm: int, services: HookServices) -> None:
        self._tx = tx
        self._prefixes = prefixes
        self._vm = vm
        self._services = services

    def fill(self, table: Dense | Sparse, start: int, n: int, value: int) -> None:
        """Set ``n`` entries from ``start`` to one value."""
        self._own(table.name)
        self._tx.fill(table, start, n, value)

    def put(self, table: Dense | Sparse, indices: I64, values: Any) -> None:
        """Set the entries at ``indices`` to ``values`` (a scalar, or an array as long)."""
        self._own(table.name)
        self._tx.put(table, indices, values)

    def set(self, table: Records, key: Hashable, value: Any) -> None:
        """Set a record."""
        self._own(table.name)
        self._tx.set(table, key, value)

    def drop(self, table: Records, key: Hashable) -> None:
        """Remove a record."""
        self._own(table.name)
        self._tx.drop(table, key)

    def kick(self) -> None:
        """Have every vCPU of the VM that is in the guest leave it (``leave`` runs for each)."""
        self._services.kick(self._tx, self._vm)

    def kill(self, reason: str) -> None:
        """Mark the VM dead (kvm_vm_dead), while what the hook did stands."""
        self._services.kill(self._tx, self._vm, reason)

    @property
    def vcpu_count(self) -> int:
        """Return how many vCPUs the VM has."""
        return self._services.vcpu_count(self._vm)

    def injected(self, point: str) -> str:
        """Return what a fault rule wants to go wrong at ``point`` ("TDH_MEM_PAGE_REMOVE") now.

        "" almost always. Each call counts as one passage of the point.
        """
        return self._services.injected(self._tx, self._vm, point)

    def content_keys(self, pfns: I64) -> I64:
        """Return the id of the key that each frame's bytes were last written under (0: none)."""
        keys: Any = self._tx.space.tables[FRAME_KEYS]
        return np.asarray(keys.get(pfns), dtype=np.int64)

    def new_key(self, *, plain: bool = False, integrity: bool = False) -> int:
        """Make a fresh memory key and return its id."""
        key_id = self._tx.next_id("key")
        keys = self._tx.space.records(KEYS)
        self._tx.set(keys, key_id, KeySpec(key_id, f"vm/{self._vm}", plain, integrity))
        return key_id

    def use_key(self, key_id: int) -> None:
        """Have the VM's private accesses go through this key from now on."""
        vm_keys = self._tx.space.records(VM_KEYS)
        self._tx.set(vm_keys, self._vm, key_id)

    def copy_in(self, pfns: I64, key_id: int, rows: U8) -> None:
        """Write plaintext ``rows`` (n, 4096) into frames that hold nothing yet, under a key."""
        self._tx.name_bytes(ByteOp("copy_in", pfns, key_id, rows=rows))

    def zero(self, pfns: I64, key_id: int) -> None:
        """Have frames read as zeros under a key, whatever they held."""
        self._tx.name_bytes(ByteOp("zero", pfns, key_id))

    def relocate(self, src: I64, dst: I64, key_id: int) -> None:
        """Move the content of ``src`` to ``dst``, re-encrypted for the new address."""
        self._tx.name_bytes(ByteOp("relocate", dst, key_id, src=src))

    def scrub(self, pfns: I64) -> None:
        """Clear frames with full-line writes: raw zeros, no key, no owner, no poison."""
        self._tx.name_bytes(ByteOp("scrub", pfns))

    def emit(self, kind: str, **fields: Any) -> None:
        """Tell watchers, once the transaction commits; ``vm`` and ``file`` are handles."""
        for handle in fields.keys() & {"vm", "file"}:
            fields[handle] = operator.index(fields[handle])
        self._tx.emit(kind, **fields)

    def _own(self, name: str) -> None:
        if not name.startswith(self._prefixes):
            raise PermissionError(f"table {name} is not the plugin's own")


@dataclass(frozen=True)
class HostContext:
    """What a platform is given: how many frames there are, and a maker of its tables.

    ``reloading`` says that newer code takes over what older code kept: a table that is there is
    handed back with what it holds, if it is asked for as it was made. ``asked`` are those.
    """

    name: str
    nframes: int
    npackages: int
    tx: Tx
    reloading: bool = False
    asked: set[str] = field(default_factory=set)

    def dense(
        self, table: str, dtype: str = "u1", fill: int = 0, length: int | None = None
    ) -> Dense:
        """Create an array by pfn, or of another ``length``."""
        n = self.nframes if length is None else length
        made: Dense = self._table(table, "dense", dtype, fill, n)
        return made

    def sparse(self, table: str, dtype: str = "u1", fill: int = 0) -> Sparse:
        """Create an array that costs what was touched, by any index."""
        made: Sparse = self._table(table, "sparse", dtype, fill)
        return made

    def records(self, table: str) -> Records:
        """Create a table of records; plain values (``State``) survive a reload."""
        made: Records = self._table(table, "records")
        return made

    def _table(self, table: str, kind: str, *shape: Any) -> Any:
        spec = TableSpec(f"platform/{self.name}/{table}", kind, *shape)
        self.asked.add(spec.name)
        there = self.tx.space.tables.get(spec.name) if self.reloading else None
        return self.tx.create(spec) if there is None else handed_back(there, spec)


@dataclass(frozen=True)
class VmContext:
    """What a consumer is given: its VM's number and a maker of its tables.

    ``importing`` says that import_state comes next and brings what the VM has: ids, keys, entries.
    Make the tables, and take nothing that is the host's.
    """

    vm: int
    platform: str
    tx: Tx
    importing: bool = False

    @property
    def prefix(self) -> str:
        """Return the prefix of the consumer's own tables."""
        return f"vm/{self.vm}/{self.platform}/"

    def sparse(self, table: str, dtype: str = "u1", fill: int = 0) -> Sparse:
        """Create an array by gfn."""
        made: Sparse = self.tx.create(TableSpec(self.prefix + table, "sparse", dtype, fill))
        return made

    def records(self, table: str) -> Records:
        """Create a table of records; their keys and values are plain (see ``State``)."""
        made: Records = self.tx.create(TableSpec(self.prefix + table, "records"))
        return made


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
