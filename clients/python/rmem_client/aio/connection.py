"""The connection to one daemon: channel, deadline, readiness, reconnection, readable errors.

Owns the gRPC channel. The service wrappers call through ``Connection.call``; nothing else in this
package but ``watch`` catches ``grpc.RpcError``. ``../connection.py`` is its twin, by hand.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..address import Address, Token
from ..calls import CLOSED, DEFAULT_DEADLINE_S, Metadata, daemon_of, identity, metadata_of
from ..errors import DaemonUnreachable, RmemError, decode, is_lost, makes_way, sent_again
from ..pauses import DEFAULT_RECONNECT_S, pauses, remaining

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")


class Connection:
    """A channel to the daemon, with one deadline for all unary calls; belongs to one event loop.

    Args:
        address: where the daemon is.
        token: what calls carry to say whose they are; a callable is asked at each call.
        deadline_s: seconds that a call may take.
        reconnect_s: seconds that a call may try to get a lost connection back; 0: it does not.
    """

    def __init__(
        self,
        address: Address,
        token: Token = "",
        deadline_s: float = DEFAULT_DEADLINE_S,
        reconnect_s: float = DEFAULT_RECONNECT_S,
    ) -> None:
        self.address = address
        self.token = token
        self.deadline_s = deadline_s
        self.reconnect_s = reconnect_s
        self.last_revision = 0
        # which memory the handles are of that this client has, "" as long as nobody has said
        self.daemon = ""
        self.closed = asyncio.Event()
        self.channel = _open(address)
        # whether anybody ever answered, who gave the token: if not, there is nothing to get back
        self.met = bool(token)

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self.closed.set()
        await self.channel.close()

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        deadline_s: float | None = None,
    ) -> Response:
        """Make a call; raise the typed error if it is refused.

        A call whose connection is lost is sent again, under the same request id, as long as its
        deadline and ``reconnect_s`` allow. A daemon that has not the memory of the first one that
        answered refuses every call (``MemoryLost``).

        Args:
            method: the stub's method.
            request: its request.
            deadline_s: seconds that it may take; default: the connection's.
        """
        timeout = self.deadline_s if deadline_s is None else deadline_s
        end = time.monotonic() + timeout
        metadata = metadata_of(request, self.token, self.daemon)
        try:
            reply = await self._send(method, request, metadata, timeout)
        except grpc.RpcError as error:
            # all that gRPC knows is in the typed error; its own dump of it would only bury that
            if not self.can_return(error):
                self.met = self.met or not is_lost(error)
                raise self.error(error) from None
            reply = await self._again(method, request, metadata, end)
        self.met = True
        self.last_revision = max(self.last_revision, getattr(reply, "revision", 0))
        return reply

    def error(self, error: grpc.RpcError) -> RmemError:
        """Return the typed error for one of gRPC's."""
        return decode(error, self.address)

    def can_return(self, error: grpc.RpcError) -> bool:
        """Say whether ``error`` is a lost connection that is worth waiting for."""
        if not is_lost(error) or self.closed.is_set() or self.reconnect_s <= 0:
            return False
        self.met = self.met or makes_way(error)
        # what is lost leaves the channel idle
        return self.met or self.channel.get_state() is not _FAILED

    async def come_back(self, pause_s: float, end: float) -> None:
        """Let ``pause_s`` seconds pass, then wait until there is a connection again.

        Raises:
            DaemonUnreachable: there is none by ``end``, or this side was closed.
        """
        if await self._happens(self.closed, min(pause_s, remaining(end))):
            raise DaemonUnreachable(self.address, CLOSED)
        await self._wait_connected(end)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the daemon says that it serves; raise DaemonUnreachable if it does not.

        Waits for events, never by asking again and again: for a connection, then for what the
        health service's Watch tells. A daemon that goes away in between is waited for once more.
        """
        end = time.monotonic() + timeout_s
        while True:
            await self._wait_connected(end)
            try:
                return await self._wait_serving(end)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    what = f"it listens, but did not say SERVING within {timeout_s:g} s"
                    raise DaemonUnreachable(self.address, what) from None
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise self.error(error) from None

    async def _send(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        metadata: Metadata | None,
        timeout: float,
    ) -> Response:
        call = method(request, timeout=timeout, metadata=metadata)
        reply = await call
        if not self.daemon:
            self.daemon = daemon_of(await call.trailing_metadata())
        return reply

    async def _again(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        metadata: Metadata | None,
        end: float,
    ) -> Response:
        """Send a call again whose connection was lost, until there is an answer."""
        give_up = min(end, time.monotonic() + self.reconnect_s)
        for pause_s in pauses():
            try:
                await self.come_back(pause_s, give_up)
                return await self._send(method, request, metadata, remaining(end))
            except DaemonUnreachable as error:
                raise sent_again(error) from None
            except grpc.RpcError as error:
                if not self.can_return(error) or not remaining(give_up):
                    raise sent_again(self.error(error)) from None
        raise AssertionError("unreachable: there is always another pause")

    async def _wait_connected(self, end: float) -> None:
        # closing the channel does not end the waiting for it
        ready = asyncio.ensure_future(self.channel.channel_ready())
        closed = asyncio.ensure_future(self.closed.wait())
        try:
            await asyncio.wait(
                {ready, closed}, timeout=remaining(end), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()
            closed.cancel()
            await asyncio.gather(ready, closed, return_exceptions=True)
        if self.closed.is_set():
            raise DaemonUnreachable(self.address, CLOSED)
        if ready.cancelled():
            raise DaemonUnreachable(self.address)
        ready.result()

    async def _wait_serving(self, end: float) -> None:
        health: Any = health_pb2_grpc.HealthStub(self.channel)  # its published types lack Watch
        watch = health.Watch(
            health_pb2.HealthCheckRequest(), timeout=remaining(end), metadata=identity(self.token)
        )
        try:
            async for reply in watch:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    self.met = True
                    return
        finally:
            watch.cancel()
        # a server that drains ends the stream in order: treat it as gone
        raise DaemonUnreachable(self.address, "it stopped while it was waited for")

    @staticmethod
    async def _happens(event: asyncio.Event, within_s: float) -> bool:
        try:
            return await asyncio.wait_for(event.wait(), within_s)
        except TimeoutError:
            return False


_FAILED = grpc.ChannelConnectivity.TRANSIENT_FAILURE


def _open(address: Address) -> grpc.aio.Channel:
    if address.tls is None:
        return grpc.aio.insecure_channel(address.target, options=address.options())
    return grpc.aio.secure_channel(address.target, address.tls.credentials(), address.options())
