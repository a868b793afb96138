"""Host memory as arrays by frame: owners, uses, content, and the NUMA nodes they lie in.

Owns the ``host/*`` tables. Everybody may read them; the buddy allocator, the ledger, the memory
controller and the engine write their own columns, through a transaction.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.hooks.tables import Dense, Records, Space, TableSpec
from rmemd.hooks.tx import COUNTERS, FRAME_KEYS, KEYS, VM_KEYS, Tx
from rmemd.units import I64, PAGE_SIZE, PMD_PAGES, Bools


class Use(IntEnum):
    """What a frame is used for."""

    FREE = 0
    PRIVATE = 1
    SHARED = 2
    SCRUBBING = 3
    LEAKED = 4
    OFFLINE = 5
    POISONED = 6


class Stored(IntEnum):
    """What the memory controller knows of a frame's bytes.

    RAW_ZERO: zeros on the bus, nothing in the arena counts. KEY_ZERO: zeros under ``host/key``.
    BYTES: the arena holds them, under ``host/key``. SHARED: they are in the owning file's shared
    memfd. TAINTED: reading them failed the integrity check, and that is sticky.
    """

    RAW_ZERO = 0
    KEY_ZERO = 1
    BYTES = 2
    SHARED = 3
    TAINTED = 4


POISON = np.uint8(1)
ARENA = np.uint8(2)
KEPT = np.uint8(4)


class NodeRange(Struct, frozen=True):
    """A NUMA node's frames: ``npages`` from ``first``, both multiples of 2 MiB."""

    node: int
    first: int
    npages: int

    @property
    def end(self) -> int:
        """Return the first frame past the node."""
        return self.first + self.npages


class Host:
    """The tables of host memory.

    Attributes:
        owner: uint32 file that owns the frame, 0 for none.
        pgoff: int64 page of that file.
        use: uint8 ``Use``.
        flags: uint8 POISON | ARENA (the arena holds a page there, of whatever worth) | KEPT (a
            vendor could not take it out of its tables: it is leaked when it would be freed).
        stored: uint8 ``Stored``.
        key: uint32 key that the bytes are under, 0 for none.
        mac: uint32 integrity code of the bytes, meaningful under a key with integrity.
        refs: uint32 references beyond the page cache's own: the sum over the ledger.
        pins: uint32 long-term pins: the same.
        free_in_block: uint16 free frames per 2 MiB block.
    """

    def __init__(self, space: Space, tx: Tx, nframes: int, nnodes: int) -> None:
        self.nframes = nframes
        per_node = nframes // nnodes // PMD_PAGES * PMD_PAGES
        self.nodes = tuple(
            NodeRange(i, i * per_node, per_node if i < nnodes - 1 else nframes - i * per_node)
            for i in range(nnodes)
        )
        self._per_node, self._last_node = self.nodes[0].npages, nnodes - 1
        self.counters = _records(tx, COUNTERS)
        self.keys = _records(tx, KEYS)
        self.vm_keys = _records(tx, VM_KEYS)
        self.owner = _dense(tx, "host/owner", "u4", nframes)
        self.pgoff = _dense(tx, "host/pgoff", "i8", nframes)
        self.use = _dense(tx, "host/use", "u1", nframes)
        self.flags = _dense(tx, "host/flags", "u1", nframes)
        self.stored = _dense(tx, "host/stored", "u1", nframes)
        self.key = _dense(tx, FRAME_KEYS, "u4", nframes)
        self.mac = _dense(tx, "host/mac", "u4", nframes)
        self.refs = _dense(tx, "host/refs", "u4", nframes)
        self.pins = _dense(tx, "host/pins", "u4", nframes)
        self.free_in_block = _dense(tx, "host/free_in_block", "u2", nframes // PMD_PAGES, PMD_PAGES)

    def node_of(self, pfn: int) -> int:
        """Return the node of a frame."""
        last = self._last_node
        return min(pfn // self._per_node, last) if last else 0

    def nodes_of(self, pfns: I64) -> I64:
        """Return the node of each frame."""
        nodes: I64 = np.minimum(pfns // self._per_node, self._last_node)
        return nodes

    def poisoned(self, pfns: I64) -> Bools:
        """Return which of the frames are poisoned."""
        poisoned: Bools = (self.flags.get(pfns) & POISON) != 0
        return poisoned

    def counts(self) -> dict[Use, int]:
        """Count frames by use."""
        free = self.free_in_block.view
        # only blocks that are not wholly free need to be looked at
        touched = self.use.view.reshape(-1, PMD_PAGES)[free < PMD_PAGES]
        found = np.bincount(touched.ravel(), minlength=len(Use))
        found[Use.FREE] = int(free.sum(dtype=np.int64))
        return {use: int(found[use]) for use in Use}


def frames_for(host_memory_bytes: int) -> int:
    """Return how many frames a host of so many bytes has, rounded down to 2 MiB."""
    return host_memory_bytes // PAGE_SIZE // PMD_PAGES * PMD_PAGES


def _dense(tx: Tx, name: str, dtype: str, length: int, fill: int = 0) -> Dense:
    table: Any = tx.create(TableSpec(name, "dense", dtype, fill, length))
    assert isinstance(table, Dense)
    return table


def _records(tx: Tx, name: str) -> Records:
    table: Any = tx.create(TableSpec(name, "records"))
    assert isinstance(table, Records)
    return table
