"""The session socket's conversation: one socket, any number of threads.

Owns the socket and who reads from it. Of the threads that wait for something, one reads and hands
every datagram to whom it is for; when it has its own, another takes over. Who finds that the
connection is lost gets the daemon back and takes the session up again. Then each thread that still
waits for an answer sends its datagram once more, as it was: by its sequence the daemon knows what
it has done.
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
from itertools import count
from pathlib import Path

from .paths import default_socket_dir
from .pauses import remaining
from .sessionreturn import GaveUp, Return, connect, say_goodbye
from .sessionwire import (
    DATAGRAM_MAX,
    ONE_WAY,
    REPLY,
    STOP,
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
    resume,
    welcome,
)

SESSION_NAME = "session.sock"
MEMORY_LOST = "MEMORY_LOST"
# as plain numbers, since those of ``socket`` are slow to combine
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_FDS_ROOM = socket.CMSG_SPACE(struct.calcsize("i"))
_SEQUENCE_MAX = 0xFFFFFFFF
_TIMEVAL = struct.Struct("@ll")


class SessionSocket:
    """A connection to the daemon's session socket.

    Args:
        socket_dir: the daemon's directory; default: ``default_socket_dir()``.
        deadline_s: seconds that an answer may take.
        reconnect_s: seconds that it may take to get a lost daemon back; 0: none.

    Attributes:
        path: of the socket.
    """

    def __init__(
        self, socket_dir: str | Path | None, deadline_s: float, reconnect_s: float
    ) -> None:
        directory = default_socket_dir() if socket_dir is None else Path(socket_dir)
        self.path = (directory / SESSION_NAME).absolute()
        self._deadline_s = deadline_s
        self._reconnect_s = reconnect_s
        self._buffer = bytearray(DATAGRAM_MAX + 1)
        self._view = memoryview(self._buffer)
        # the condition's own: taken without it, as most of the time nobody waits
        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)
        self._waiting = 0
        self._reading = False
        # what it gives it gives once, to whichever thread
        self._sequences = count(1)
        self._awaited: set[int] = set()
        # how often the daemon came back; a datagram is sent once in each of these times. Held while
        # one is sent, or while the time changes
        self._times = 0
        self._sending = threading.Lock()
        self._replies: dict[int, tuple[Datagram, list[int]]] = {}
        # what says who comes: at first a HELLO, then that a session goes on
        self._first = b""
        self._return: Return | None = None
        self._closed = threading.Event()
        self._welcome: Welcome | None = None
        self._notices: deque[Notice] = deque()
        self._lost: Callable[[], Exception] | None = None
        try:
            self._sock = connect(self.path)
        except OSError as error:
            raise self._ended("") from error
        _wait_at_most(self._sock, deadline_s)
        # its number stays; one thread reads at a time
        self._readable = select.poll()
        self._readable.register(self._sock, select.POLLIN)

    # --- what one asks -----------------------------------------------------------------------
    def open(self, role: str, ticket: bytes) -> Welcome:
        """Say who one wants to be; return the session."""
        self._first = hello(role, ticket)
        with contextlib.suppress(OSError):
            # what the daemon said before it hung up tells more
            self._sock.send(self._first)
        if not self._wait(lambda: self._welcome is not None, self._deadline_s):
            raise self._late()
        assert self._welcome is not None
        return self._welcome

    def tell(self, records: list[Record]) -> None:
        """Send records in one datagram to which there is no reply.

        One that is lost with the daemon is not sent again, and refusals are told to nobody.
        """
        self._send(request(next(self._sequences) & _SEQUENCE_MAX, records, ONE_WAY))

    def call(self, records: list[Record], stop: bool = False) -> tuple[list[Result], list[int]]:
        """Send records in one datagram; return their results, and the descriptors that came.

        Raises:
            ValueError: they are too many, or too long, for one.
            DaemonUnreachable: the session has ended.
            DeadlineExceeded: no answer in time.
        """
        sequence = next(self._sequences) & _SEQUENCE_MAX
        datagram = request(sequence, records, STOP if stop else 0)
        end = time.monotonic() + self._deadline_s
        self._awaited.add(sequence)
        try:
            while sequence not in self._replies:
                sent_at = self._send(datagram)
                if not self._wait(partial(self._is_over, sequence, sent_at), remaining(end)):
                    raise self._late()
            reply, fds = self._replies.pop(sequence)
        finally:
            self._awaited.discard(sequence)
        return results(reply), fds

    def _is_over(self, sequence: int, sent_at: int) -> bool:
        """Return whether a datagram was answered, or its connection was lost."""
        return sequence in self._replies or sent_at != self._times

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
        self._closed.set()
        # whether there is a session for a daemon to go on with, which does not see this end
        away = self._welcome is not None and (self._return is not None or _hung_up(self._sock))
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._lost = self._lost or partial(self._ended, "this session was closed")
            while self._reading:
                self._wait_turn(None)
            self._sock.close()
            for _, fds in self._replies.values():
                _close_all(fds)
            self._replies.clear()
        if away and self._reconnect_s > 0:
            say_goodbye(self.path, self._first)

    # --- the socket --------------------------------------------------------------------------
    def _send(self, datagram: bytes) -> int:
        """Send it, where there is a connection; return in which time."""
        with self._sending:
            times = self._times
            if self._return is None:
                try:
                    self._sock.send(datagram)
                except OSError:
                    # that it is lost, and why, who reads will find out
                    return times
            return times

    def _wait(self, ready: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait, reading if nobody else does; return whether it is ready."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            while not ready():
                if self._lost is not None:
                    raise self._lost()
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0 and timeout_s:
                    return False
                if self._reading:
                    if not self._wait_turn(left):
                        return ready()
                elif not self._read_one(left):
                    return ready()
            return True

    def _wait_turn(self, timeout_s: float | None) -> bool:
        """Wait until whoever reads has read something; return whether it has."""
        self._waiting += 1
        try:
            return self._turn.wait(timeout_s)
        finally:
            self._waiting -= 1

    def _read_one(self, timeout_s: float | None) -> bool:
        """Read a datagram, with the others let go meanwhile; return whether one came."""
        self._reading = True
        self._lock.release()
        got: tuple[Datagram, list[int]] | None = None
        lost: Callable[[], Exception] | None = None
        before = self._return
        try:
            if before is None:
                got = self._receive(timeout_s)
            else:
                lost = self._come_back(before, timeout_s)
        except OSError as error:
            lost = self._broken(error)
        except (GaveUp, ProtocolError) as error:
            lost = partial(self._ended, f"the session has ended: {error}")
        finally:
            self._lock.acquire()
            self._reading = False
            if self._waiting:
                self._turn.notify_all()
        if lost is not None:
            self._lost = self._lost or lost
            return True
        if got is not None:
            self._sort(*got)
        # a connection that is lost, or there again, is worth another look
        return got is not None or self._return is not before

    def _broken(self, error: OSError) -> Callable[[], Exception] | None:
        """Begin to get the daemon back; return the error if that is not wanted."""
        if self._closed.is_set() or self._reconnect_s <= 0:
            return partial(self._ended, f"the session has ended: {error}")
        self._return = Return(self.path, self._first, self._reconnect_s, self._closed)
        return None

    def _come_back(self, wanted: Return, timeout_s: float | None) -> Callable[[], Exception] | None:
        """Wait for the daemon, and take the session up; return the error if it has ended."""
        answered = wanted.answer(timeout_s)
        if answered is None:
            return None
        sock, datagram = answered
        with sock:
            if datagram.kind == Kind.REFUSED:
                return self._not_taken_up(bytes(datagram.body))
            if datagram.kind != Kind.WELCOME:
                raise ProtocolError(f"kind {datagram.kind} where a WELCOME is expected")
            _wait_at_most(sock, self._deadline_s)
            with self._sending:
                # the number stays, for those who poll it
                os.dup2(sock.fileno(), self._sock.fileno(), inheritable=False)
                self._sort(datagram, [])
                self._times += 1
                self._return = None
        return None

    def _not_taken_up(self, body: bytes) -> Callable[[], Exception]:
        """Return the error for a session that the daemon does not go on with."""
        told = partial(refusal, body, 0)
        if self._welcome is None or told().reason == MEMORY_LOST:
            return told
        return partial(self._ended, "the session has ended: the daemon hung up")

    def _receive(self, timeout_s: float | None) -> tuple[Datagram, list[int]] | None:
        # who has just asked waits as long as the socket itself does, which saves a system call
        whole = self._deadline_s
        is_the_sockets = timeout_s is not None and 0.99 * whole < timeout_s <= whole
        if not (is_the_sockets or self._comes(timeout_s)):
            return None
        try:
            n, ancillary, flags, _ = self._take()
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # it hung up on what we had sent, which is told before what it said last
            n, ancillary, flags, _ = self._take()
        fds = _descriptors(ancillary) if ancillary else []
        if n == 0:
            raise ConnectionResetError("the daemon hung up")
        try:
            if flags & _CUT:
                raise ProtocolError("a datagram was cut off")
            return decode(memoryview(bytes(self._view[:n]))), fds
        except ProtocolError:
            _close_all(fds)
            raise

    def _comes(self, timeout_s: float | None) -> bool:
        """Wait for something to read."""
        return bool(self._readable.poll(None if timeout_s is None else max(timeout_s, 0) * 1000))

    def _take(self) -> tuple[int, list[tuple[int, int, bytes]], int, object]:
        return self._sock.recvmsg_into([self._buffer], _FDS_ROOM, _CLOSE_ON_EXEC)

    def _sort(self, datagram: Datagram, fds: list[int]) -> None:
        """Give a datagram to whom it is for."""
        if datagram.kind == REPLY and datagram.sequence in self._awaited:
            self._replies[datagram.sequence] = datagram, fds
            return
        _close_all(fds)
        if datagram.kind == Kind.NOTICE:
            self._notices.extend(notices(datagram))
        elif datagram.kind == Kind.WELCOME:
            self._welcome = welcome(datagram.body)
            self._first = resume(self._welcome.session, self._welcome.token)
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


def _wait_at_most(sock: socket.socket, seconds: float) -> None:
    """Have reads of a socket end after a time, as if nothing was there."""
    microseconds = max(int(seconds * 1e6), 1)
    sock.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(*divmod(microseconds, 10**6))
    )


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
