"""The session socket's conversation: one socket, any number of threads.

Owns the socket and who reads from it. Of the threads that wait for something, one reads and hands
every datagram to whom it is for; when it has its own, another takes over.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .paths import default_socket_dir
from .sessionwire import (
    DATAGRAM_MAX,
    Datagram,
    Kind,
    Notice,
    ProtocolError,
    Record,
    Result,
    Welcome,
    decode,
    hello,
    notices,
    refusal,
    request,
    results,
    welcome,
)

SESSION_NAME = "session.sock"
_FDS_ROOM = socket.CMSG_SPACE(struct.calcsize("i"))


class SessionSocket:
    """A connection to the daemon's session socket.

    Args:
        socket_dir: the daemon's directory; default: ``default_socket_dir()``.
        deadline_s: seconds that an answer may take.

    Attributes:
        path: of the socket.
    """

    def __init__(self, socket_dir: str | Path | None, deadline_s: float) -> None:
        directory = default_socket_dir() if socket_dir is None else Path(socket_dir)
        self.path = (directory / SESSION_NAME).absolute()
        self._deadline_s = deadline_s
        self._buffer = bytearray(DATAGRAM_MAX + 1)
        self._view = memoryview(self._buffer)
        self._turn = threading.Condition(threading.Lock())
        self._reading = False
        self._sequence = 0
        self._awaited: set[int] = set()
        self._replies: dict[int, tuple[Datagram, list[int]]] = {}
        self._welcome: Welcome | None = None
        self._notices: deque[Notice] = deque()
        self._lost: Callable[[], Exception] | None = None
        self._sock = self._connect()

    # --- what one asks -----------------------------------------------------------------------
    def open(self, role: str, ticket: bytes) -> Welcome:
        """Say who one wants to be; return the session."""
        self._send(hello(role, ticket))
        if not self._wait(lambda: self._welcome is not None, self._deadline_s):
            raise self._late()
        assert self._welcome is not None
        return self._welcome

    def call(self, records: list[Record], stop: bool = False) -> tuple[list[Result], list[int]]:
        """Send records in one datagram; return their results, and the descriptors that came.

        Raises:
            ValueError: they are too many, or too long, for one.
            DaemonUnreachable: the session has ended.
            DeadlineExceeded: no answer in time.
        """
        with self._turn:
            self._sequence = sequence = (self._sequence + 1) & 0xFFFFFFFF
        datagram = request(sequence, records, stop)
        self._awaited.add(sequence)
        try:
            self._send(datagram)
            if not self._wait(lambda: sequence in self._replies, self._deadline_s):
                raise self._late()
            reply, fds = self._replies.pop(sequence)
        finally:
            self._awaited.discard(sequence)
        return results(reply), fds

    def next_notice(self, timeout_s: float | None) -> Notice | None:
        """Return the next notice, or ``None`` if there is none in time.

        Raises:
            DaemonUnreachable: the session has ended, and all its notices were taken.
        """
        self._wait(lambda: bool(self._notices), timeout_s)
        try:
            return self._notices.popleft()
        except IndexError:
            return None

    def fileno(self) -> int:
        """Return the socket's descriptor, to poll for notices where no other thread reads."""
        return self._sock.fileno()

    def close(self) -> None:
        """End the session; whoever waits is told."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._turn:
            self._lost = self._lost or partial(self._ended, "this session was closed")
            while self._reading:
                self._turn.wait()
            self._sock.close()
            for _, fds in self._replies.values():
                _close_all(fds)
            self._replies.clear()

    # --- the socket --------------------------------------------------------------------------
    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 2 * DATAGRAM_MAX)
        try:
            sock.connect(str(self.path))
        except OSError as error:
            sock.close()
            raise self._ended("") from error
        return sock

    def _send(self, datagram: bytes) -> None:
        try:
            self._sock.send(datagram)
        except OSError as error:
            # what the daemon said before it hung up tells more
            self._wait(lambda: False, self._deadline_s)
            raise self._ended("the session has ended") from error

    def _wait(self, ready: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait, reading if nobody else does; return whether it is ready."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._turn:
            while not ready():
                if self._lost is not None:
                    raise self._lost()
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0 and timeout_s:
                    return False
                if self._reading:
                    if not self._turn.wait(left):
                        return ready()
                elif not self._read_one(left):
                    return ready()
            return True

    def _read_one(self, timeout_s: float | None) -> bool:
        """Read a datagram, with the others let go meanwhile; return whether one came."""
        self._reading = True
        self._turn.release()
        got: tuple[Datagram, list[int]] | None = None
        lost: Callable[[], Exception] | None = None
        try:
            got = self._receive(timeout_s)
        except (OSError, ProtocolError) as error:
            lost = partial(self._ended, f"the session has ended: {error}")
        finally:
            self._turn.acquire()
            self._reading = False
            self._turn.notify_all()
        if lost is not None:
            self._lost = self._lost or lost
            return True
        if got is not None:
            self._sort(*got)
        return got is not None

    def _receive(self, timeout_s: float | None) -> tuple[Datagram, list[int]] | None:
        if timeout_s is not None:
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            if not poll.poll(max(timeout_s, 0) * 1000):
                return None
        try:
            n, ancillary, flags, _ = self._take()
        except ConnectionResetError:
            # it hung up on what we had sent, which is told before what it said last
            n, ancillary, flags, _ = self._take()
        fds = _descriptors(ancillary)
        if n == 0:
            raise ConnectionResetError("the daemon hung up")
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError("a datagram was cut off")
            return decode(memoryview(bytes(self._view[:n]))), fds
        except ProtocolError:
            _close_all(fds)
            raise

    def _take(self) -> tuple[int, list[tuple[int, int, bytes]], int, object]:
        return self._sock.recvmsg_into([self._buffer], _FDS_ROOM, socket.MSG_CMSG_CLOEXEC)

    def _sort(self, datagram: Datagram, fds: list[int]) -> None:
        """Give a datagram to whom it is for."""
        if datagram.kind == Kind.REPLY and datagram.sequence in self._awaited:
            self._replies[datagram.sequence] = datagram, fds
            return
        _close_all(fds)
        if datagram.kind == Kind.NOTICE:
            self._notices.extend(notices(datagram))
        elif datagram.kind == Kind.WELCOME:
            self._welcome = welcome(datagram.body)
        elif datagram.kind == Kind.REFUSED:
            self._lost = partial(refusal, bytes(datagram.body), 0)

    def _ended(self, what: str) -> Exception:
        from .address import Address
        from .errors import DaemonUnreachable
        from .paths import grpc_target

        return DaemonUnreachable(Address(grpc_target(self.path), str(self.path), self.path), what)

    def _late(self) -> Exception:
        import grpc

        from .errors import DeadlineExceeded

        return DeadlineExceeded(
            f"no answer within {self._deadline_s:g} s", code=grpc.StatusCode.DEADLINE_EXCEEDED
        )


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
