"""Watching what happens, by revision (``client.watch``).

A watch is an asynchronous iterator. Nothing is missed silently: a watcher that was too slow is told
how many events it lost, and one whose connection was lost goes on from the last revision that it
saw::

    async with client.watch(start_revision=revision, kinds=["folio_migrated"]) as watch:
        async for item in watch:
            match item:
                case Event(kind=kind, revision=revision): ...
                case Lost(count): ...
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable

import grpc

from rmem.v1 import watch_pb2, watch_pb2_grpc

from ..calls import identity
from ..errors import DaemonUnreachable, MemoryLost, RmemError, sent_again
from ..events import Event, Lost, Position, Progress, WatchItem
from ..pauses import pauses
from .connection import Connection

__all__ = ["Event", "Lost", "Progress", "Watch", "WatchItem", "open_watch"]


class Watch(AsyncIterator[WatchItem]):
    """An open watch. Closing it, from any task, ends the iteration.

    A lost connection is got back as for calls, and the watch goes on where it was; a daemon that
    cannot tell what came between refuses that with a typed error.

    Attributes:
        last_revision: the newest revision seen.
    """

    def __init__(self, connection: Connection, position: Position) -> None:
        self._connection = connection
        self._position = position
        self._closed = False
        self._first: WatchItem | None = None
        self._resumed = False
        self._pauses = pauses()
        self._open(position.request())

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def __anext__(self) -> WatchItem:
        if self._first is not None:
            item, self._first = self._first, None
            return item
        return await self._receive()

    @property
    def last_revision(self) -> int:
        """The newest revision seen: where another watch goes on."""
        return self._position.revision

    async def start(self) -> int:
        """Wait until the watch is in place and return its revision; what it read is not lost.

        Whatever happens after this returns is seen.
        """
        if self._first is None:
            try:
                self._first = await self._receive()
            except StopAsyncIteration:
                what = "it ended the watch before it was in place"
                raise DaemonUnreachable(self._connection.address, what) from None
        return self.last_revision

    async def close(self) -> None:
        """End the watch; closing twice is fine."""
        self._closed = True
        self._stream.cancel()

    def _open(self, request: watch_pb2.WatchRequest) -> None:
        connection = self._connection
        stub = watch_pb2_grpc.WatchServiceStub(connection.channel)
        # no deadline: a watch lasts until one side closes it
        self._stream = stub.Watch(request, metadata=identity(connection.token))
        self._new = True

    async def _receive(self) -> WatchItem:
        while True:
            try:
                message = await self._stream.read()
            except asyncio.CancelledError:
                # that of the stream, or that of the task which waits for it
                if self._is_closed() and self._stream.cancelled():
                    raise StopAsyncIteration from None
                raise
            except grpc.RpcError as error:
                if self._is_closed():
                    raise StopAsyncIteration from None
                if not self._connection.can_return(error):
                    raise await self._typed(error) from None
                await self._resume()
                continue
            if not isinstance(message, watch_pb2.WatchResponse):  # grpc.aio.EOF
                raise StopAsyncIteration
            if self._new:
                await self._greet()
            item = self._position.advance(message)
            if item is not None:
                return item

    async def _greet(self) -> None:
        """Note that a stream has begun to tell, and whose it is."""
        self._connection.met = True
        self._new, self._resumed, self._pauses = False, False, pauses()
        try:
            self._position.check_daemon(await self._stream.initial_metadata())
        except MemoryLost:
            await self.close()
            raise

    async def _typed(self, error: grpc.RpcError) -> RmemError:
        typed = self._connection.error(error)
        if not self._resumed:
            return typed
        try:
            self._position.check_daemon(await self._stream.initial_metadata())
        except MemoryLost as other:
            return other
        return sent_again(typed)

    async def _resume(self) -> None:
        end = time.monotonic() + self._connection.reconnect_s
        try:
            await self._connection.come_back(next(self._pauses), end)
        except DaemonUnreachable as error:
            if self._is_closed():
                raise StopAsyncIteration from None
            raise sent_again(error) from None
        if self._is_closed():
            raise StopAsyncIteration
        self._resumed = True
        self._open(self._position.resume())

    def _is_closed(self) -> bool:
        return self._closed or self._connection.closed.is_set()


def open_watch(connection: Connection, start_revision: int, kinds: Iterable[str], vm: int) -> Watch:
    """Open a watch; ``Client.watch`` documents the arguments."""
    return Watch(connection, Position(start_revision, kinds, vm))
