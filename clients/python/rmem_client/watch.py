"""Watching what happens, by revision (``client.watch``).

A watch is an iterator. Nothing is missed silently: a watcher that was too slow is told how many
events it lost, and one whose connection was lost goes on from the last revision that it saw::

    with client.watch(start_revision=revision, kinds=["folio_migrated"]) as watch:
        for item in watch:
            match item:
                case Event(kind=kind, revision=revision): ...
                case Lost(count): ...
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

import grpc

from rmem.v1 import watch_pb2, watch_pb2_grpc

from .calls import identity
from .connection import Connection
from .errors import DaemonUnreachable, MemoryLost, RmemError, sent_again
from .events import Event, Lost, Position, Progress, WatchItem
from .pauses import pauses

__all__ = ["Event", "Lost", "Progress", "Watch", "WatchItem", "open_watch"]


class Watch(Iterator[WatchItem]):
    """An open watch. Closing it, from any thread, ends the iteration.

    A lost connection is got back as for calls, and the watch goes on where it was; a daemon that
    cannot tell what came between refuses that with a typed error.

    Attributes:
        last_revision: the newest revision seen.
    """

    def __init__(self, connection: Connection, position: Position) -> None:
        self._connection = connection
        self._position = position
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._first: WatchItem | None = None
        self._resumed = False
        self._pauses = pauses()
        self._open(position.request())

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __next__(self) -> WatchItem:
        if self._first is not None:
            item, self._first = self._first, None
            return item
        return self._receive()

    @property
    def last_revision(self) -> int:
        """The newest revision seen: where another watch goes on."""
        return self._position.revision

    def start(self) -> int:
        """Wait until the watch is in place and return its revision; what it read is not lost.

        Whatever happens after this returns is seen.
        """
        if self._first is None:
            try:
                self._first = self._receive()
            except StopIteration:
                what = "it ended the watch before it was in place"
                raise DaemonUnreachable(self._connection.address, what) from None
        return self.last_revision

    def close(self) -> None:
        """End the watch; closing twice is fine."""
        with self._lock:
            self._closed.set()
            self._stream.cancel()

    def _open(self, request: watch_pb2.WatchRequest) -> None:
        connection = self._connection
        stub = watch_pb2_grpc.WatchServiceStub(connection.channel)
        with self._lock:
            # no deadline: a watch lasts until one side closes it
            self._stream = stub.Watch(request, metadata=identity(connection.token))
            self._new = True
            if self._closed.is_set():
                self._stream.cancel()

    def _receive(self) -> WatchItem:
        while True:
            try:
                message = next(self._stream)
            except grpc.RpcError as error:
                if self._is_closed():
                    raise StopIteration from None
                if not self._connection.can_return(error):
                    raise self._typed(error) from None
                self._resume()
                continue
            if self._new:
                self._greet()
            item = self._position.advance(message)
            if item is not None:
                return item

    def _greet(self) -> None:
        """Note that a stream has begun to tell, and whose it is."""
        self._connection.met = True
        self._new, self._resumed, self._pauses = False, False, pauses()
        try:
            self._position.check_daemon(self._stream.initial_metadata())
        except MemoryLost:
            self.close()
            raise

    def _typed(self, error: grpc.RpcError) -> RmemError:
        typed = self._connection.error(error)
        if not self._resumed:
            return typed
        try:
            self._position.check_daemon(self._stream.initial_metadata())
        except MemoryLost as other:
            return other
        return sent_again(typed)

    def _resume(self) -> None:
        end = time.monotonic() + self._connection.reconnect_s
        try:
            self._connection.come_back(next(self._pauses), end)
        except DaemonUnreachable as error:
            if self._is_closed():
                raise StopIteration from None
            raise sent_again(error) from None
        self._resumed = True
        self._open(self._position.resume())

    def _is_closed(self) -> bool:
        return self._closed.is_set() or self._connection.closed.is_set()


def open_watch(connection: Connection, start_revision: int, kinds: Iterable[str], vm: int) -> Watch:
    """Open a watch; ``Client.watch`` documents the arguments."""
    return Watch(connection, Position(start_revision, kinds, vm))
