"""The connection to one daemon: channel, deadline, readiness, reconnection, readable errors.

Owns the gRPC channel. The service wrappers call through ``Connection.call``; nothing else in this
library but ``watch`` catches ``grpc.RpcError``. ``aio/connection.py`` is its twin, by hand.
"""

from __future__ import annotations

import threading
import time
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .address import Address, Token
from .calls import CLOSED, DEFAULT_DEADLINE_S, Metadata, daemon_of, identity, metadata_of
from .errors import DaemonUnreachable, RmemError, decode, is_lost, makes_way, sent_again
from .pauses import DEFAULT_RECONNECT_S, pauses, remaining

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")


class Connection:
    """A channel to the daemon, with one deadline for all unary calls.

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
        self.closed = threading.Event()
        self.channel = _open(address)
        # whether anybody ever answered, who gave the token: if not, there is nothing to get back
        self.met = bool(token)

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self.closed.set()
        self.channel.close()

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
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
            reply = self._send(method, request, metadata, timeout)
        except grpc.RpcError as error:
            # all that gRPC knows is in the typed error; its own dump of it would only bury that
            if not self.can_return(error):
                self.met = self.met or not is_lost(error)
                raise self.error(error) from None
            reply = self._again(method, request, metadata, end)
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
        return self.met or self._is_there()

    def come_back(self, pause_s: float, end: float) -> None:
        """Let ``pause_s`` seconds pass, then wait until there is a connection again.

        Raises:
            DaemonUnreachable: there is none by ``end``, or this side was closed.
        """
        if self.closed.wait(min(pause_s, remaining(end))):
            raise DaemonUnreachable(self.address, CLOSED)
        self._wait_connected(end)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the daemon says that it serves; raise DaemonUnreachable if it does not.

        Waits for events, never by asking again and again: for a connection, then for what the
        health service's Watch tells. A daemon that goes away in between is waited for once more.
        """
        end = time.monotonic() + timeout_s
        while True:
            self._wait_connected(end)
            try:
                return self._wait_serving(end)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    what = f"it listens, but did not say SERVING within {timeout_s:g} s"
                    raise DaemonUnreachable(self.address, what) from None
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise self.error(error) from None

    def _send(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        metadata: Metadata | None,
        timeout: float,
    ) -> Response:
        if self.daemon:
            return method(request, timeout=timeout, metadata=metadata)
        reply, call = method.with_call(request, timeout=timeout, metadata=metadata)
        self.daemon = daemon_of(call.trailing_metadata())
        return reply

    def _again(
        self,
        method: grpc.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        metadata: Metadata | None,
        end: float,
    ) -> Response:
        """Send a call again whose connection was lost, until there is an answer."""
        give_up = min(end, time.monotonic() + self.reconnect_s)
        for pause_s in pauses():
            try:
                self.come_back(pause_s, give_up)
                return self._send(method, request, metadata, remaining(end))
            except DaemonUnreachable as error:
                raise sent_again(error) from None
            except grpc.RpcError as error:
                if not self.can_return(error) or not remaining(give_up):
                    raise sent_again(self.error(error)) from None
        raise AssertionError("unreachable: there is always another pause")

    def _is_there(self) -> bool:
        """Say whether anybody answers now, on a channel that has no broken connection yet."""
        with _open(self.address) as channel:
            code = _ask(channel, self.reconnect_s, wait=False)
        return code is not grpc.StatusCode.UNAVAILABLE

    def _wait_connected(self, end: float) -> None:
        code = _ask(self.channel, remaining(end), wait=True)
        if self.closed.is_set():
            raise DaemonUnreachable(self.address, CLOSED)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise DaemonUnreachable(self.address)

    def _wait_serving(self, end: float) -> None:
        health: Any = health_pb2_grpc.HealthStub(self.channel)  # its published types lack Watch
        watch = health.Watch(
            health_pb2.HealthCheckRequest(), timeout=remaining(end), metadata=identity(self.token)
        )
        try:
            for reply in watch:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    self.met = True
                    return
        finally:
            watch.cancel()
        # a server that drains ends the stream in order: treat it as gone
        raise DaemonUnreachable(self.address, "it stopped while it was waited for")


def _open(address: Address) -> grpc.Channel:
    if address.tls is None:
        return grpc.insecure_channel(address.target, options=address.options())
    return grpc.secure_channel(address.target, address.tls.credentials(), address.options())


def _ask(channel: grpc.Channel, timeout_s: float, *, wait: bool) -> grpc.StatusCode:
    """Call the health service, to learn whether anybody is there; ``wait`` until somebody is.

    Subscribing to the channel's states would do, too, but for that gRPC starts a thread, which
    raises if the channel is closed at the wrong moment.
    """
    health: Any = health_pb2_grpc.HealthStub(channel)  # its published types lack Check
    try:
        health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=wait)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    except ValueError:  # the channel is closed
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.OK
