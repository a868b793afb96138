"""The connection to one daemon: channel, deadline, readiness, and errors made readable.

Owns the gRPC channel. The service wrappers call through ``Connection.call``; nothing else in
this library catches ``grpc.RpcError``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .errors import DaemonUnreachable, RmemError, decode
from .paths import SOCKET_NAME, default_socket_dir, grpc_target

DEFAULT_DEADLINE_S = 30.0

# The daemon takes messages of 1 MiB; half of that leaves room for any message's own bytes.
PIECE_BYTES = 512 * 1024

CHANNEL_OPTIONS = [
    # a daemon that has just been started is found at once, not after gRPC's second
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # two clients in one process share neither connection nor backoff
    ("grpc.use_local_subchannel_pool", 1),
]

Request = TypeVar("Request")
Response = TypeVar("Response")


class Connection:
    """A channel to the daemon's socket, with one deadline for all unary calls.

    Args:
        socket_dir: the directory that has the socket; default: ``default_socket_dir()``.
        deadline_s: seconds that a call may take.
    """

    def __init__(self, socket_dir: str | Path | None, deadline_s: float) -> None:
        directory = default_socket_dir() if socket_dir is None else Path(socket_dir)
        self.socket = directory.absolute() / SOCKET_NAME
        self.deadline_s = deadline_s
        self.last_revision = 0
        self.closed = threading.Event()
        self.channel = grpc.insecure_channel(grpc_target(self.socket), options=CHANNEL_OPTIONS)

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

        Args:
            method: the stub's method.
            request: its request.
            deadline_s: seconds that it may take; default: the connection's.
        """
        try:
            reply = method(request, timeout=self.deadline_s if deadline_s is None else deadline_s)
        except grpc.RpcError as error:
            # all that gRPC knows is in the typed error; its own dump of it would only bury that
            raise self.error(error) from None
        self.last_revision = max(self.last_revision, getattr(reply, "revision", 0))
        return reply

    def error(self, error: grpc.RpcError) -> RmemError:
        """Return the typed error for one of gRPC's."""
        return decode(error, self.socket)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the daemon says that it serves; raise DaemonUnreachable if it does not.

        Waits for events, never by asking again and again: the channel's readiness, then the
        health service's Watch. A daemon that goes away in between is waited for once more.
        """
        end = time.monotonic() + timeout_s
        while True:
            self._wait_connected(end)
            try:
                return self._wait_serving(end)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    what = f"it listens, but did not say SERVING within {timeout_s:g} s"
                    raise DaemonUnreachable(self.socket, what) from None
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise self.error(error) from None

    def _wait_connected(self, end: float) -> None:
        ready = grpc.channel_ready_future(self.channel)
        try:
            ready.result(timeout=max(0.0, end - time.monotonic()))
        except grpc.FutureTimeoutError:
            raise DaemonUnreachable(self.socket) from None
        finally:
            ready.cancel()

    def _wait_serving(self, end: float) -> None:
        health: Any = health_pb2_grpc.HealthStub(self.channel)  # its published types lack Watch
        watch = health.Watch(
            health_pb2.HealthCheckRequest(), timeout=max(0.0, end - time.monotonic())
        )
        try:
            for reply in watch:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        finally:
            watch.cancel()
        # a server that drains ends the stream in order: treat it as gone
        raise DaemonUnreachable(self.socket, "it stopped while it was waited for")


def pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut ``total`` into (start, length) of at most ``size``; nothing is one piece of length 0.

    The empty piece is sent, so that the daemon and not the client says what is wrong with it.
    """
    yield 0, min(total, size)
    for start in range(size, total, size):
        yield start, min(size, total - start)
