"""The journal: every committed transaction, in order, and the events it makes.

Owns the revision. A record holds the writes of one transaction, so that replaying the records on
an empty space gives the state back. It is kept in memory, bounded; the events are kept for those
who watch, bounded too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from rmemd.errors import REVISION_COMPACTED
from rmemd.hooks.tables import Space, Write
from rmemd.hooks.tx import Tx

KEPT_RECORDS = 4096
KEPT_BYTES = 16 << 20
KEPT_EVENTS = 65536


@dataclass(frozen=True)
class Record:
    """One committed transaction."""

    revision: int
    label: str
    writes: tuple[Write, ...]

    @property
    def nbytes(self) -> int:
        """Return roughly how much memory the record's arrays take."""
        arrays = (arg for write in self.writes for arg in write.args)
        return 256 * len(self.writes) + sum(getattr(arg, "nbytes", 0) for arg in arrays)


@dataclass(frozen=True)
class Event:
    """Something that happened, for watchers; never carries a page's content."""

    revision: int
    operation: str
    kind: str
    vm: int
    fields: dict[str, str]


class Journal:
    """Records and events by revision.

    Attributes:
        revision: of the last committed transaction, 0 before the first.
        records: the newest ones, bounded in number and bytes unless all are kept.
    """

    def __init__(self, kept_records: int | None = KEPT_RECORDS) -> None:
        self.revision = 0
        self.records: deque[Record] = deque(maxlen=kept_records)
        self._bytes = 0
        self._bounded = kept_records is not None
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._compacted = 0

    def append(self, tx: Tx) -> int:
        """Record a transaction and return its revision."""
        self.revision += 1
        self._keep(Record(self.revision, tx.label, tuple(tx.redo)))
        for kind, fields in tx.events:
            if len(self._events) == KEPT_EVENTS:
                self._compacted = self._events[0].revision
            vm = int(fields.get("vm", 0))
            named = {key: str(value) for key, value in fields.items() if key != "vm"}
            self._events.append(Event(self.revision, tx.label, kind, vm, named))
        return self.revision

    def events_after(self, revision: int) -> list[Event]:
        """Return the events after a revision, oldest first.

        Raises:
            OutOfRange: REVISION_COMPACTED; some of them are no longer kept.
        """
        if revision < self._compacted:
            raise REVISION_COMPACTED(
                f"events after revision {revision} are kept from {self._compacted + 1} on",
                field="start_revision", state=f"revision {self.revision}",
            )  # fmt: skip
        return list(self._newest(revision))[::-1]

    def oldest_revision(self) -> int:
        """Return the revision that a watch can start from at the earliest."""
        return self._compacted

    def _keep(self, record: Record) -> None:
        if self._bounded and len(self.records) == self.records.maxlen:
            self._bytes -= self.records.popleft().nbytes
        self.records.append(record)
        self._bytes += record.nbytes
        while self._bounded and self._bytes > KEPT_BYTES and len(self.records) > 1:
            self._bytes -= self.records.popleft().nbytes

    def _newest(self, revision: int) -> Iterator[Event]:
        for event in reversed(self._events):
            if event.revision <= revision:
                return
            yield event


def replay(records: Iterator[Record] | deque[Record]) -> Space:
    """Build the state that the records describe; they must begin with revision 1."""
    space = Space()
    for record in records:
        for write in record.writes:
            space.apply(write)
    return space
