"""The journal: every committed transaction, in order, and the events it makes.

Owns the revision, and what is written to the log when. A record holds the writes of one
transaction, so that applying the records of a log gives the state back (``engine.reopen``). They
are buffered and written as one frame by ``flush``, which the core calls before it lets the lock
go, before bytes are destroyed or written in place, and before an operation's caller is answered;
so what anybody was told is in the log, and a frame is all of a piece. Events are kept for those
who watch, bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

from msgspec import Struct

from rmemd.errors import PLUGIN_NONSENSE, REVISION_COMPACTED, RmemError
from rmemd.hooks.tx import Tx
from rmemd.store.codec import NoteEntry, Record, encode_note, encode_record
from rmemd.store.log import Log

KEPT_EVENTS = 65536
# events that a checkpoint carries over for those who watch across a restart
CHECKPOINT_EVENTS = 1024
# a log this much longer than its checkpoint gets a new one; a large state is worth more log
CHECKPOINT_BYTES = 16 << 20
CHECKPOINT_RATIO = 4
# events are kept as they were told, and made texts for who asks: few are ever looked at
UNCHANGING = frozenset((str, int, bool))
_Kept = tuple[int, str, str, dict[str, Any]]
# of a record's key, in a message
KEY_MAX = 64
# what the codec raises of a value that is not plain
NOT_PLAIN = (TypeError, RecursionError)


class Event(Struct, frozen=True):
    """Something that happened, for watchers; never carries a page's content."""

    revision: int
    operation: str
    kind: str
    vm: int
    fields: dict[str, str]


class Journal:
    """Records and events by revision.

    Args:
        log: where the records go; None: nowhere, and the state goes with the process.
        header: what each generation of the log begins with.
        kept_records: how many of the newest are kept in memory too, None for all.

    Attributes:
        revision: of the last committed transaction, 0 before the first.
        records: the newest ones, as many as are kept.
        checkpoint: gives the entries that a new generation of the log begins with, encoded.
    """

    def __init__(
        self,
        log: Log | None = None,
        header: Mapping[str, Any] | None = None,
        kept_records: int | None = 0,
    ) -> None:
        self.revision = 0
        self.records: deque[Record] = deque(maxlen=kept_records)
        self.checkpoint: Callable[[], Iterator[bytes]] = lambda: iter(())
        self._keeps = kept_records != 0
        self._log = log
        self._header = dict(header or {})
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._checkpoint_bytes = 0
        self._events: deque[_Kept] = deque(maxlen=KEPT_EVENTS)
        self._compacted = 0

    def append(self, tx: Tx) -> int:
        """Record a transaction and return its revision.

        Raises:
            OSError: the system has no memory left for the log; nothing is recorded.
            PluginFault: PLUGIN_NONSENSE; a hook wrote what is not plain, nothing is recorded.
        """
        revision = self.revision + 1
        record = Record(revision, tx.label, tuple(tx.redo), tuple(tx.events), tuple(tx.in_place))
        if self._log is not None:
            try:
                entry = encode_record(record)
            except NOT_PLAIN as error:
                fault = fault_of(tx)
                if fault is None:
                    raise
                raise fault from error
            self._buffer(entry)
        self.revision = revision
        if self._keeps:
            self.records.append(record)
        self._keep_events(record)
        return revision

    def note(self, entry: NoteEntry, flush: bool) -> None:
        """Record a note (``engine.notes``).

        Raises:
            OSError: the system has no memory left for the log; nothing is recorded.
        """
        if self._log is not None:
            self._buffer(encode_note(entry))
            if flush:
                self.flush()

    def flush(self) -> None:
        """Have all that was recorded be in the log: one frame."""
        if not self._pending:
            return
        assert self._log is not None
        self._log.append(b"".join(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    def settle(self) -> None:
        """Flush at the end of an operation, and begin the log anew if it has become long.

        Not where bytes still follow their record: what tells whether they came is in the record.
        """
        self.flush()
        if self._log is None:
            return
        worth = max(CHECKPOINT_BYTES, CHECKPOINT_RATIO * self._checkpoint_bytes)
        if self._log.since_checkpoint_bytes > worth:
            # the log that there is goes on, and it is tried again
            with suppress(OSError):
                self.begin_generation()

    def begin_generation(self) -> None:
        """Begin the log anew with a checkpoint of the state; the older part is let go.

        Raises:
            OSError: the system has no memory left; the log goes on as it is.
        """
        assert self._log is not None
        assert not self._pending
        with self._log.begin_checkpoint(self._header) as opened:
            for entries in self.checkpoint():
                opened.write(entries)
            opened.commit()
        self._checkpoint_bytes = self._log.size_bytes

    def restore(self, record: Record) -> None:
        """Take a record over from a log that is read; its writes are the caller's to apply."""
        if not self.revision:
            self._compacted = record.revision - 1
        self.revision = record.revision
        self._keep_events(record)

    def close(self) -> None:
        """Let go of the log."""
        if self._log is not None:
            self._log.close()

    # --- events ------------------------------------------------------------------------------
    def newest_events(self) -> Iterator[Record]:
        """Return records of no writes that carry the newest events over to a checkpoint."""
        newest = list(islice(reversed(self._events), CHECKPOINT_EVENTS))[::-1]
        for (revision, operation), events in groupby(newest, itemgetter(0, 1)):
            yield Record(revision, operation, (), tuple(event[2:] for event in events))

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

    def _buffer(self, entry: bytes) -> None:
        assert self._log is not None
        # so that nothing can fail between the commit in memory and the frame
        nbytes = self._pending_bytes + len(entry)
        self._log.reserve(nbytes)
        self._pending.append(entry)
        self._pending_bytes = nbytes

    def _keep_events(self, record: Record) -> None:
        for kind, fields in record.events:
            if len(self._events) == KEPT_EVENTS:
                self._compacted = self._events[0][0]
            if not UNCHANGING.issuperset(map(type, fields.values())):
                fields = {key: str(value) for key, value in fields.items()}
            self._events.append((record.revision, record.label, kind, fields))

    def _newest(self, revision: int) -> Iterator[Event]:
        for kept in reversed(self._events):
            if kept[0] <= revision:
                return
            yield _event(*kept)


def _event(revision: int, operation: str, kind: str, fields: dict[str, Any]) -> Event:
    named = {key: str(value) for key, value in fields.items() if key != "vm"}
    return Event(revision, operation, kind, int(fields.get("vm", 0)), named)


def fault_of(tx: Tx) -> RmemError | None:
    """Return the fault of the hook that wrote or told what is not plain, None if no hook did."""
    for at, write in enumerate(tx.redo):
        where, why = tx.hook_of(at, len(tx.events)), _not_plain(Record(0, "", (write,)))
        if where and why:
            table = write.table or getattr(write.args[0], "name", "")
            key = f" under {write.args[0]!r}"[:KEY_MAX] if write.op == "set" else ""
            return PLUGIN_NONSENSE(f"{where} wrote into {table}{key}: {why}", where=where)
    for at, event in enumerate(tx.events):
        where, why = tx.hook_of(len(tx.redo), at), _not_plain(Record(0, "", (), (event,)))
        if where and why:
            return PLUGIN_NONSENSE(f"{where} told {event[0]!r}: {why}", where=where)
    return None


def _not_plain(record: Record) -> str:
    try:
        encode_record(record)
    except NOT_PLAIN as error:
        return str(error)
    return ""
