"""Who holds which frame, and why: references and long-term pins by (holder, purpose).

Owns the ``ledger`` records. An entry whose frames come and go counts them in a sparse table; one
that is taken as a whole and goes as a whole has its frames in its record. A frame's references are
the sum over the entries, kept in ``host/refs`` and ``host/pins`` by the same writes; a holder that
is gone is one subtraction; and every refusal can name who is in the way. The page cache's own
reference is not an entry: it is the frame's owner.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.errors import Holder
from rmemd.hooks.tables import Records, Sparse, TableSpec
from rmemd.hooks.tx import Tx
from rmemd.model.host import Host
from rmemd.model.spans import Spans
from rmemd.units import I64, U32, Bools, coalesce, distinct, expand

_NOBODY: I64 = np.empty(0, dtype=np.int64)
_ONE: I64 = np.ones(1, dtype=np.int64)
# the record of an entry that has a table
_COUNTED = b""
# what is added to a count; they wrap
_ONE_MORE, _ONE_LESS = np.uint32(1), np.uint32(0xFFFFFFFF)
# the kernel's GUP_PIN_COUNTING_BIAS: what one long-term pin adds to the count it shows
PIN_BIAS = 1024


class Entry(Struct, frozen=True):
    """One holder's reason to hold frames; ``table`` counts by pfn, if it has one."""

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

    def hold_whole(self, tx: Tx, entry: Entry, pfns: I64) -> None:
        """Have a new entry hold distinct frames, one at least, each once until it is forgotten."""
        tx.set(self._entries, entry, _as_runs(pfns))
        self._add_to_column(tx, entry, pfns, _ONE_MORE)

    def drop(self, tx: Tx, entry: Entry, pfns: I64) -> None:
        """Take one away per frame; each must be held."""
        self._add(tx, entry, pfns, _ONE_LESS)

    def held(self, entry: Entry, pfns: I64) -> Bools:
        """Return which frames the entry holds."""
        runs = self._entries.get(entry)
        if runs is None:
            return np.zeros(pfns.size, dtype=np.bool_)
        if runs:
            return Spans(*_starts_and_counts(runs)).hold(pfns)
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
        """Release everything that a holder has; return the frames it held."""
        held = [self._release(tx, entry) for entry in self._entries.grouped(holder)]
        return _distinct(held)

    def _release(self, tx: Tx, entry: Entry) -> I64:
        runs = self._entries[entry]
        if runs:
            pfns = _frames(runs)
            self._add_to_column(tx, entry, pfns, _ONE_LESS)
        else:
            pfns, counts = self.counts(entry)
            self._add_to_column(tx, entry, pfns, np.negative(counts))
            tx.destroy(entry.table)
        tx.drop(self._entries, entry)
        return pfns

    def holders(self, pfn: int) -> tuple[Holder, ...]:
        """Return who holds a frame, the page cache not included."""
        found = (
            (entry, int(_has(runs, pfn)) if runs else self._table(entry).at(pfn))
            for entry, runs in self._entries.items()
        )
        return tuple(
            Holder(entry.holder, entry.purpose, n, entry.longterm) for entry, n in found if n
        )

    def frames(self, holder: str) -> I64:
        """Return the frames that a holder holds, ascending."""
        return _distinct([self.counts(entry)[0] for entry in self._entries.grouped(holder)])

    def count(self, entry: Entry) -> int:
        """Return how many frames the entry holds."""
        return self.counts(entry)[0].size if entry in self._entries else 0

    def counts(self, entry: Entry) -> tuple[I64, U32]:
        """Return the frames that an entry holds, ascending, and how often each; it is there."""
        runs = self._entries[entry]
        if runs:
            pfns = _frames(runs)
            return pfns, np.ones(pfns.size, dtype=np.uint32)
        table = self._table(entry)
        pfns = table.touched(0, self._host.nframes)
        return pfns, table.get(pfns)

    def _add(self, tx: Tx, entry: Entry, pfns: I64, change: np.uint32) -> None:
        if not pfns.size:
            return
        runs = self._entries.get(entry)
        assert not runs, "it is held as a whole"
        if runs is None:
            tx.create(TableSpec(entry.table, "sparse", "u4"))
            tx.set(self._entries, entry, _COUNTED)
        table = self._table(entry)
        tx.put(table, pfns, table.get(pfns) + change)
        self._add_to_column(tx, entry, pfns, change)

    def _add_to_column(self, tx: Tx, entry: Entry, pfns: I64, change: U32 | np.uint32) -> None:
        column = self._host.pins if entry.longterm else self._host.refs
        tx.put(column, pfns, column.get(pfns) + change)

    def entries(self) -> list[Entry]:
        """Return every (holder, purpose) there is."""
        return [entry for entry, _ in self._entries.items()]

    def entries_of(self, holder: str) -> list[Entry]:
        """Return a holder's entries."""
        return self._entries.grouped(holder)

    def _table(self, entry: Entry) -> Sparse:
        return self._space.sparse(entry.table)


def _as_runs(pfns: I64) -> bytes:
    """Return distinct frames as a record has them: where each run begins, then how long it is."""
    starts, counts = (pfns, _ONE) if pfns.size == 1 else coalesce(np.sort(pfns))
    return starts.tobytes() + counts.tobytes()


def _starts_and_counts(runs: bytes) -> tuple[I64, I64]:
    numbers = np.frombuffer(runs, dtype=np.int64)
    n = numbers.size // 2
    return numbers[:n], numbers[n:]


def _frames(runs: bytes) -> I64:
    return expand(*_starts_and_counts(runs))


def _has(runs: bytes, pfn: int) -> bool:
    """Return whether a frame is in one of the runs, at the cost of one frame."""
    numbers = memoryview(runs).cast("q")
    n = len(numbers) // 2
    at = bisect_right(numbers, pfn, 0, n) - 1
    return at >= 0 and pfn < numbers[at] + numbers[n + at]


def _distinct(held: list[I64]) -> I64:
    """Return the frames of several entries, ascending, as those of each are."""
    return held[0] if len(held) == 1 else distinct(np.concatenate([_NOBODY, *held]))
