"""Getting a session's daemon back: a new socket, the first datagram on it, and what that brings.

Owns the attempts. The daemon's keeper holds its listening socket while the daemon starts, so one
usually connects at once and waits for the answer; where there is nobody at all, one tries again
with growing pauses.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from pathlib import Path

from .pauses import pauses, remaining
from .sessionwire import DATAGRAM_MAX, Datagram, decode


class GaveUp(Exception):
    """Nobody came back in time."""


def connect(path: Path) -> socket.socket:
    """Return a socket that is connected to a daemon's.

    Raises:
        OSError: there is none.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 2 * DATAGRAM_MAX)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return sock


def say_goodbye(path: Path, first: bytes) -> None:
    """Have a daemon that was started again end a session that nobody will use any more."""
    with contextlib.suppress(OSError), connect(path) as sock:
        sock.send(first)


class Return:
    """The wait for one daemon.

    Args:
        path: of its socket.
        first: the datagram that says who comes.
        seconds: how long it may take.
        closed: set when nobody wants it any more.
    """

    def __init__(self, path: Path, first: bytes, seconds: float, closed: threading.Event) -> None:
        self._path = path
        self._first = first
        self._give_up = time.monotonic() + seconds
        self._closed = closed
        self._pauses = pauses()
        self._sock: socket.socket | None = None

    def answer(self, seconds: float | None) -> tuple[socket.socket, Datagram] | None:
        """Return the connection and what the daemon says first; ``None`` if not within ``seconds``.

        Raises:
            GaveUp: it takes longer than it may, or nobody wants it any more.
            ProtocolError: what answers is no daemon.
        """
        end = self._give_up
        if seconds is not None:
            end = min(end, time.monotonic() + seconds)
        while True:
            if self._sock is None:
                self._try()
            sock = self._sock
            if sock is not None and self._says_something(sock, end):
                datagram = self._first_datagram(sock)
                if datagram is not None:
                    self._sock = None
                    return sock, datagram
            if self._closed.is_set() or not remaining(self._give_up):
                self.close()
                raise GaveUp("the daemon did not come back")
            if not remaining(end):
                return None
            if self._sock is None:
                self._closed.wait(min(next(self._pauses), remaining(end)))

    def close(self) -> None:
        """Let go of the attempt under way."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _try(self) -> None:
        try:
            sock = connect(self._path)
        except OSError:
            return
        try:
            sock.send(self._first)
        except OSError:
            sock.close()
        else:
            self._sock = sock

    def _says_something(self, sock: socket.socket, end: float) -> bool:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        # in short waits, as closing must be seen too
        while not poll.poll(min(remaining(end), _GLANCE_S) * 1000):
            if self._closed.is_set() or not remaining(end):
                return False
        return True

    def _first_datagram(self, sock: socket.socket) -> Datagram | None:
        """Read it; ``None`` if the daemon hung up, as one does that ends itself."""
        try:
            data = sock.recv(DATAGRAM_MAX + 1)
        except OSError:
            data = b""
        if not data:
            self.close()
            return None
        return decode(memoryview(data))


_GLANCE_S = 0.1
