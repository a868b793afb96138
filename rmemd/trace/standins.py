"""A replay's private bytes: stand-ins, and knowing which frames hold them.

Owns the memory controller of a replay. A guest that compares such bytes with what it expects would
find them all wrong; where a frame holds them, what the guest found when it was recorded counts.
"""

from __future__ import annotations

import numpy as np

from rmemd.hooks.tx import ByteOp, Tx
from rmemd.model.host import Stored
from rmemd.store.controller import Contents, MemoryController
from rmemd.trace.values import stand_in_rows
from rmemd.units import I64, U8, Bools, distinct

CHUNK_PAGES = 2048


class StandInController(MemoryController):
    """The controller of an engine that replays, in place of the one it was made with.

    Attributes:
        brought: whether the bytes of the operation under way were its caller's, and so are
            stand-ins.
    """

    def __init__(self, instead_of: MemoryController) -> None:
        vars(self).update(vars(instead_of))
        self.brought = False
        self._unknown = np.zeros(self._host.nframes, dtype=np.bool_)

    def are_stand_ins(self, pfns: I64) -> Bools:
        """Return which frames hold bytes that are not the recorded ones."""
        found: Bools = self._unknown[pfns]
        return found

    def seal(self, tx: Tx, pfns: I64) -> None:
        """Have frames that hold bytes hold stand-ins, under their keys and with codes that fit."""
        host = self._host
        pfns = pfns[host.stored.get(pfns) == Stored.BYTES]
        for key_id in distinct(host.key.get(pfns)).tolist():
            mine = pfns[host.key.get(pfns) == key_id]
            for at in range(0, mine.size, CHUNK_PAGES):
                part = mine[at : at + CHUNK_PAGES]
                contents, raw = self.write_plan(part, stand_in_rows(part), key_id)
                self._arena.write(part, raw)
                tx.put(host.mac, part, contents.mac)
        self._unknown[pfns] = True

    def store_raw(self, pfns: I64, raw: U8) -> None:
        """Put bytes on the bus."""
        super().store_raw(pfns, raw)
        if self.brought:
            self._unknown[pfns] = True

    def _perform(self, op: ByteOp) -> list[Contents]:
        if op.kind == "copy_in":
            self._unknown[op.pfns] = self.brought
        elif op.src is not None:
            self._unknown[op.pfns] = self._unknown[op.src]
        else:
            self._unknown[op.pfns] = False
        return super()._perform(op)
