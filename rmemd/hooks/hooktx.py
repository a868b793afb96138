"""What hooks are given: the transaction as they see it, and the makers of their tables.

Owns the bounds: a plugin writes its own tables, asks for keys and names bytes, and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np
from msgspec import Struct, field

from rmemd.hooks.tables import Dense, Records, Sparse, TableSpec
from rmemd.hooks.tx import FRAME_KEYS, KEYS, VM_KEYS, ByteOp, Tx, handed_back
from rmemd.hooks.types import KeySpec
from rmemd.units import I64, U8


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


class HookTx(Struct, eq=False, frozen=True):
    """The transaction as a hook sees it: its own tables, its keys, named bytes, a kick.

    A hook that writes a table of somebody else raises ``PermissionError``, which the engine
    reports as a fault of the plugin.
    """

    _tx: Tx
    _prefixes: tuple[str, ...]
    _vm: int
    _services: HookServices

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


class HostContext(Struct, frozen=True):
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


class VmContext(Struct, frozen=True):
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
