"""Watching what happens, by revision (``client.watch``).

A watch is an iterator. Nothing is missed silently: a watcher that was too slow is told how many
events it lost, and ``last_revision`` is where the next watch goes on::

    with client.watch(start_revision=revision, kinds=["folio_migrated"]) as watch:
        for item in watch:
            match item:
                case Event(kind=kind, revision=revision): ...
                case Lost(count): ...
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import grpc

from rmem.v1 import watch_pb2, watch_pb2_grpc

from .connection import Connection
from .errors import DaemonUnreachable


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


class Watch(Iterator[WatchItem]):
    """An open watch. Closing it, from any thread, ends the iteration.

    Attributes:
        last_revision: the newest revision seen.
    """

    def __init__(self, connection: Connection, request: watch_pb2.WatchRequest) -> None:
        self.last_revision = request.start_revision
        self._connection = connection
        # no deadline: a watch lasts until one side closes it
        self._stream = watch_pb2_grpc.WatchServiceStub(connection.channel).Watch(request)
        self._closed = threading.Event()
        self._first: WatchItem | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __next__(self) -> WatchItem:
        if self._first is not None:
            item, self._first = self._first, None
            return item
        return self._receive()

    def start(self) -> int:
        """Wait until the watch is in place and return its revision; what it read is not lost.

        Whatever happens after this returns is seen.
        """
        if self._first is None:
            try:
                self._first = self._receive()
            except StopIteration:
                what = "it ended the watch before it was in place"
                raise DaemonUnreachable(self._connection.socket, what) from None
        return self.last_revision

    def close(self) -> None:
        """End the watch; closing twice is fine."""
        self._closed.set()
        self._stream.cancel()

    def _receive(self) -> WatchItem:
        while True:
            try:
                message = next(self._stream)
            except grpc.RpcError as error:
                if self._closed.is_set() or self._connection.closed.is_set():
                    raise StopIteration from None
                raise self._connection.error(error) from None
            item = _item(message)
            if item is not None:
                self.last_revision = max(self.last_revision, getattr(item, "revision", 0))
                return item


def open_watch(connection: Connection, start_revision: int, kinds: Iterable[str], vm: int) -> Watch:
    """Open a watch; ``Client.watch`` documents the arguments."""
    return Watch(
        connection, watch_pb2.WatchRequest(start_revision=start_revision, kinds=kinds, vm=vm)
    )


def _item(message: watch_pb2.WatchResponse) -> WatchItem | None:
    """Return what a message says, ``None`` for a kind that a newer daemon has added."""
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
