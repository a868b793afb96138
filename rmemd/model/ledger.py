"""Who holds which frame, and why: references and long-term pins by (holder, purpose).

Owns the ``ledger`` records and one sparse count per entry. A frame's references are the sum over
the entries, kept in ``host/refs`` and ``host/pins`` by the same writes; a holder that is gone is
one subtraction; and every refusal can name who is in the way. The page cache's own reference is
not an entry: it is the frame's owner.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.errors import Holder
from rmemd.hooks.tables import Records, Sparse, TableSpec
from rmemd.hooks.tx import Tx
from rmemd.model.host import Host
from rmemd.units import I64, Bools, distinct

_NOBODY: I64 = np.empty(0, dtype=np.int64)
# what is added to a count; they wrap
_ONE_MORE, _ONE_LESS = np.uint32(1), np.uint32(0xFFFFFFFF)
# the kernel's GUP_PIN_COUNTING_BIAS: what one long-term pin adds to the count it shows
PIN_BIAS = 1024


class Entry(Struct, frozen=True):
    """One holder's reason to hold frames; ``table`` counts by pfn."""

    holder: str
    purpose: str
    longterm: bool

    @property
    def table(self) -> str:
        """Return the name of the entry's count table."""
        return f"ledger/{self.holder}/{self.purpose}"


class Ledger:
    """References by holder and purpose."""

    def __init__(self, host: Host, tx: Tx) -> None:
        self._host = host
        self._space = tx.space
        made: Any = tx.create(TableSpec("ledger", "records"))
        self._entries: Records = made
        self._entries.group_by(lambda entry, _: entry.holder)

    def hold(self, tx: Tx, entry: Entry, pfns: I64) -> None:
        """Add one reference (or long-term pin) per frame; ``pfns`` are distinct."""
        self._add(tx, entry, pfns, _ONE_MORE)

    def drop(self, tx: Tx, entry: Entry, pfns: I64) -> None:
        """Take one away per frame; each must be held."""
        self._add(tx, entry, pfns, _ONE_LESS)

    def held(self, entry: Entry, pfns: I64) -> Bools:
        """Return which frames the entry holds."""
        if entry not in self._entries:
            return np.zeros(pfns.size, dtype=np.bool_)
        held: Bools = self._counts(entry).get(pfns) > 0
        return held

    def move(self, tx: Tx, src: I64, dst: I64, holder: str) -> None:
        """Carry a holder's references over from frames to frames."""
        for entry in self.entries_of(holder):
            mask = self.held(entry, src)
            if mask.any():
                self.drop(tx, entry, src[mask])
                self.hold(tx, entry, dst[mask])

    def forget(self, tx: Tx, holder: str) -> I64:
        """Release everything that a holder has; return the frames it held."""
        held = [self._release(tx, entry) for entry in self._entries.grouped(holder)]
        return _distinct(held)

    def _release(self, tx: Tx, entry: Entry) -> I64:
        counts = self._counts(entry)
        pfns = counts.touched(0, self._host.nframes)
        column = self._host.pins if entry.longterm else self._host.refs
        tx.put(column, pfns, column.get(pfns) - counts.get(pfns))
        tx.destroy(entry.table)
        tx.drop(self._entries, entry)
        return pfns

    def holders(self, pfn: int) -> tuple[Holder, ...]:
        """Return who holds a frame, the page cache not included."""
        found = ((entry, self._counts(entry).at(pfn)) for entry in self.entries())
        return tuple(
            Holder(entry.holder, entry.purpose, n, entry.longterm) for entry, n in found if n
        )

    def frames(self, holder: str) -> I64:
        """Return the frames that a holder holds, ascending."""
        mine = [self._counts(entry) for entry in self._entries.grouped(holder)]
        return _distinct([counts.touched(0, self._host.nframes) for counts in mine])

    def count(self, entry: Entry) -> int:
        """Return how many frames the entry holds."""
        if entry not in self._entries:
            return 0
        return int(self._counts(entry).touched(0, self._host.nframes).size)

    def _add(self, tx: Tx, entry: Entry, pfns: I64, change: np.uint32) -> None:
        if not pfns.size:
            return
        if entry not in self._entries:
            tx.create(TableSpec(entry.table, "sparse", "u4"))
            tx.set(self._entries, entry, True)
        counts = self._counts(entry)
        tx.put(counts, pfns, counts.get(pfns) + change)
        column = self._host.pins if entry.longterm else self._host.refs
        tx.put(column, pfns, column.get(pfns) + change)

    def entries(self) -> list[Entry]:
        """Return every (holder, purpose) there is."""
        return [entry for entry, _ in self._entries.items()]

    def entries_of(self, holder: str) -> list[Entry]:
        """Return a holder's entries."""
        return self._entries.grouped(holder)

    def _counts(self, entry: Entry) -> Sparse:
        return self._space.sparse(entry.table)


def _distinct(held: list[I64]) -> I64:
    """Return the frames of several entries, ascending, as those of each are."""
    return held[0] if len(held) == 1 else distinct(np.concatenate([_NOBODY, *held]))
