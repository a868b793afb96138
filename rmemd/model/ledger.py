"""Who holds which frame, and why: references and long-term pins by (holder, purpose).

Owns the ``ledger`` records, the tables in which their frames are counted, and what a client's pin
holds, which is taken and goes as a whole, and lies in the record of the pin. A frame's references
are the sum over entries and pins, kept in ``host/refs`` and ``host/pins`` by the same writes; a
holder that is gone is one subtraction; and every refusal can name who is in the way. The page
cache's own reference is not an entry: it is the frame's owner.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.errors import Holder
from rmemd.hooks.tables import Dense, Records, Sparse, TableSpec
from rmemd.hooks.tx import Tx
from rmemd.model.host import Host
from rmemd.model.sessions import PagePin, Sessions
from rmemd.units import I64, U32, Bools, coalesce, distinct, expand, pages

_NOBODY: I64 = np.empty(0, dtype=np.int64)
_ONE: I64 = np.ones(1, dtype=np.int64)
# bytes of a pin's frames that lie together
_ONE_RUN = 16
# what is added to a count; they wrap
_WRAP = 0xFFFFFFFF
_ONE_MORE, _ONE_LESS = np.uint32(1), np.uint32(_WRAP)
# the kernel's GUP_PIN_COUNTING_BIAS: what one long-term pin adds to the count it shows
PIN_BIAS = 1024


class Entry(Struct, frozen=True):
    """One holder's reason to hold frames; ``table`` counts them by pfn."""

    holder: str
    purpose: str
    longterm: bool

    @property
    def table(self) -> str:
        """Return the name of the entry's count table."""
        return f"ledger/{self.holder}/{self.purpose}"


class Ledger:
    """References by holder and purpose."""

    def __init__(self, host: Host, sessions: Sessions, tx: Tx) -> None:
        self._host = host
        self._sessions = sessions
        self._space = tx.space
        made: Any = tx.create(TableSpec("ledger", "records"))
        self._entries: Records = made
        self._entries.group_by(lambda entry, _: entry.holder)

    def hold(self, tx: Tx, entry: Entry, pfns: I64) -> None:
        """Add one reference (or long-term pin) per frame; ``pfns`` are distinct."""
        self._add(tx, entry, pfns, _ONE_MORE)

    def hold_pin(self, tx: Tx, pin: PagePin, pfns: I64) -> None:
        """Have a new pin hold the distinct frames that it names, each once."""
        self._sessions.add_pin(tx, pin)
        _change(tx, self._host.pins, pfns, _ONE_MORE)

    def release_pin(self, tx: Tx, pin: PagePin) -> I64:
        """Release a pin; return the frames it held."""
        pfns = frames_of(pin)
        self._sessions.drop_pin(tx, pin.pin)
        _change(tx, self._host.pins, pfns, _ONE_LESS)
        return pfns

    def drop(self, tx: Tx, entry: Entry, pfns: I64) -> None:
        """Take one away per frame; each must be held."""
        self._add(tx, entry, pfns, _ONE_LESS)

    def held(self, entry: Entry, pfns: I64) -> Bools:
        """Return which frames the entry holds."""
        if entry not in self._entries:
            return np.zeros(pfns.size, dtype=np.bool_)
        held: Bools = self._table(entry).get(pfns) > 0
        return held

    def move(self, tx: Tx, src: I64, dst: I64, holder: str) -> None:
        """Carry a holder's references over from frames to frames."""
        for entry in self.entries_of(holder):
            mask = self.held(entry, src)
            if mask.any():
                self.drop(tx, entry, src[mask])
                self.hold(tx, entry, dst[mask])

    def forget(self, tx: Tx, holder: str) -> I64:
        """Release everything that a holder has, pins apart; return the frames it held."""
        held = [self._release(tx, entry) for entry in self._entries.grouped(holder)]
        return _distinct(held)

    def _release(self, tx: Tx, entry: Entry) -> I64:
        pfns, counts = self.counts(entry)
        self._add_to_column(tx, entry, pfns, np.negative(counts))
        tx.destroy(entry.table)
        tx.drop(self._entries, entry)
        return pfns

    def holders(self, pfn: int) -> tuple[Holder, ...]:
        """Return who holds a frame, the page cache not included."""
        counted = ((entry, self._table(entry).at(pfn)) for entry in self.entries())
        return (
            *(Holder(entry.holder, entry.purpose, n, entry.longterm) for entry, n in counted if n),
            *(
                Holder(pin.holder, pin.purpose, 1, longterm=True)
                for pin in self._sessions.pins()
                if _has(pin.frames, pfn)
            ),
        )

    def frames(self, holder: str) -> I64:
        """Return the frames that a holder holds, those of pins apart, ascending."""
        return _distinct([self.counts(entry)[0] for entry in self._entries.grouped(holder)])

    def count(self, entry: Entry) -> int:
        """Return how many frames the entry holds."""
        return self.counts(entry)[0].size if entry in self._entries else 0

    def counts(self, entry: Entry) -> tuple[I64, U32]:
        """Return the frames that an entry holds, ascending, and how often each; it is there."""
        table = self._table(entry)
        pfns = table.touched(0, self._host.nframes)
        return pfns, table.get(pfns)

    def _add(self, tx: Tx, entry: Entry, pfns: I64, change: np.uint32) -> None:
        if not pfns.size:
            return
        if entry not in self._entries:
            tx.create(TableSpec(entry.table, "sparse", "u4"))
            tx.set(self._entries, entry, None)
        _change(tx, self._table(entry), pfns, change)
        self._add_to_column(tx, entry, pfns, change)

    def _add_to_column(self, tx: Tx, entry: Entry, pfns: I64, change: U32 | np.uint32) -> None:
        column = self._host.pins if entry.longterm else self._host.refs
        _change(tx, column, pfns, change)

    def entries(self) -> list[Entry]:
        """Return every (holder, purpose) there is, pins apart."""
        return [entry for entry, _ in self._entries.items()]

    def entries_of(self, holder: str) -> list[Entry]:
        """Return a holder's entries."""
        return self._entries.grouped(holder)

    def _table(self, entry: Entry) -> Sparse:
        return self._space.sparse(entry.table)


def _change(tx: Tx, counts: Dense | Sparse, pfns: I64, change: U32 | np.uint32) -> None:
    """Add to the counts of frames."""
    if pfns.size == 1:
        # as most are, and numbers cost a tenth of arrays
        pfn = pfns.item()
        tx.fill(counts, pfn, 1, (counts.at(pfn) + change.item()) & _WRAP)
        return
    tx.put(counts, pfns, counts.get(pfns) + change)


def as_runs(pfns: I64) -> bytes:
    """Return distinct frames as a pin has them: where each run begins, then how long it is."""
    starts, counts = (pfns, _ONE) if pfns.size == 1 else coalesce(np.sort(pfns))
    return starts.tobytes() + counts.tobytes()


def frames_of(pin: PagePin) -> I64:
    """Return the frames that a pin holds."""
    if len(pin.frames) == _ONE_RUN:
        return pages(*memoryview(pin.frames).cast("q"))
    starts, counts = np.frombuffer(pin.frames, dtype=np.int64).reshape(2, -1)
    return expand(starts, counts)


def _has(runs: bytes, pfn: int) -> bool:
    """Return whether a frame is in one of the runs, at the cost of one frame."""
    numbers = memoryview(runs).cast("q")
    n = len(numbers) // 2
    at = bisect_right(numbers, pfn, 0, n) - 1
    return at >= 0 and pfn < numbers[at] + numbers[n + at]


def _distinct(held: list[I64]) -> I64:
    """Return the frames of several entries, ascending, as those of each are."""
    return held[0] if len(held) == 1 else distinct(np.concatenate([_NOBODY, *held]))
