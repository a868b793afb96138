"""What a watch tells, and where one goes on that lost its connection.

Owns the items of ``client.watch`` and the position in the stream, for both halves of this library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc

from rmem.v1 import types_pb2, watch_pb2

from .calls import daemon_of
from .errors import MemoryLost


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        revision: the revision that made it.
        kind: what, "folio_migrated".
        vm: the VM, 0 if none.
        operation: the operation that it was part of.
        fields: its particulars; never a page's content.
    """

    revision: int
    kind: str
    vm: int = 0
    operation: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Nothing more happened up to this revision; also the first item, once the watch is set."""

    revision: int


@dataclass(frozen=True)
class Lost:
    """The watcher was too slow: so many events are lost, up to this item."""

    count: int


WatchItem: TypeAlias = Event | Progress | Lost


class Position:
    """How far a watch has come, so that another stream can go on from there.

    Attributes:
        revision: the newest revision seen, at first that which was asked for.
    """

    def __init__(self, start_revision: int, kinds: Iterable[str], vm: int) -> None:
        self.revision = start_revision
        self._kinds, self._vm = tuple(kinds), vm
        # One revision can have many events, and a stream may end amid them. Those seen of the
        # newest revision are not told again by the next stream, which must begin before it.
        self._seen_of_newest = 0
        self._skip = 0
        self._resumed = False
        self._daemon = ""

    def request(self) -> watch_pb2.WatchRequest:
        """Return the request for the first stream, or for one that goes on where it ended."""
        self._skip = self._seen_of_newest
        start = self.revision - 1 if self._skip else self.revision
        return watch_pb2.WatchRequest(start_revision=start, kinds=self._kinds, vm=self._vm)

    def resume(self) -> watch_pb2.WatchRequest:
        """Return the request for a stream that goes on where the last one ended."""
        self._resumed = self.revision > 0
        return self.request()

    def check_daemon(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """Compare a stream's first metadata with that of the stream before.

        Raises:
            MemoryLost: it is another daemon, whose revisions count other events.
        """
        told = daemon_of(metadata)
        if told and self._daemon and told != self._daemon:
            raise MemoryLost(
                "the connection was lost, and the daemon was started anew in between",
                code=grpc.StatusCode.DATA_LOSS,
                reason="MEMORY_LOST",
                refusal=types_pb2.Refusal(
                    remedy="List the objects again and watch from the revision of that reply."
                ),
            )
        self._daemon = told or self._daemon

    def advance(self, message: watch_pb2.WatchResponse) -> WatchItem | None:
        """Return what a message tells.

        ``None`` for what was seen already, and for a kind that a newer daemon has added.
        """
        item = _item(message)
        match item:
            case Event(revision=revision):
                if self._skip and revision == self.revision:
                    self._skip -= 1
                    return None
                newer = revision > self.revision
                self._seen_of_newest = 1 if newer else self._seen_of_newest + 1
                self._skip = 0
                self.revision = max(self.revision, revision)
            case Progress(revision=revision):
                if self._resumed:
                    # the first one of a resumed stream says where it began: the reader knows
                    self._resumed = False
                    return None
                if revision >= self.revision:
                    self._seen_of_newest = self._skip = 0
                    self.revision = revision
        return item


def _item(message: watch_pb2.WatchResponse) -> WatchItem | None:
    match message.WhichOneof("message"):
        case "event":
            event = message.event
            return Event(event.revision, event.kind, event.vm, event.operation, dict(event.fields))
        case "progress_revision":
            return Progress(message.progress_revision)
        case "lost":
            return Lost(message.lost)
        case _:
            return None
