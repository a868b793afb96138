"""The session socket: who comes in, and how each leaves.

Owns one thread per session, and the watcher: a thread that waits for connections (``listener``),
for the end of their processes (pidfds), for notices to send and for leases to run out. A session is
released by a thread of its own, whatever the session's thread is doing: that one gets nothing more.
Sessions whose daemon died are watched like the others, until their clients come back (``absent``).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import structlog

from rmemd.access.callers import Access
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.listeners import News
from rmemd.engine.sessions import Closed
from rmemd.errors import TOO_MANY, RmemError
from rmemd.rpc.observe import Observer
from rmemd.session.absent import PIDFD, Absent
from rmemd.session.connection import Connection
from rmemd.session.descriptors import Passed
from rmemd.session.expected import Expected
from rmemd.session.listener import Listener
from rmemd.session.notices import Undelivered
from rmemd.session.ops import forget_results
from rmemd.session.peer import identify
from rmemd.session.talk import SLOW, STOP, Gone, Talk, refused_frame
from rmemd.session.wire import fault_notice

# connections of one user that have not said who they are, each of which has a thread
UNKNOWN_MAX = 16
CONNECTIONS_MAX = 4096
# a client that leaves notices unread for so long loses its session
SLOW_SECONDS = 5.0
# why a session ends, beside those of its conversation and of its process
CLOSED, LEASE, FAILED = "closed", "lease", "error"

log = structlog.get_logger("rmemd.session")


class SessionServer:
    """Sessions of one engine on one socket.

    Args:
        engine: the engine.
        access: tokens, tickets and leases.
        path: where the socket is bound; the caller has seen to it that nothing is there, and
            gives it the mode by which others may connect.
        clock: seconds, for leases and slow readers; that of ``access``.
        observers: told of each record as of a call.
    """

    def __init__(
        self,
        engine: Engine,
        access: Access,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._observers = observers
        self._engine = engine
        self._access = access
        self._path = path
        self._clock = clock
        self._passed = Passed(engine.core.quotas, engine.core.notes)
        engine.core.parts.append(self._passed.invariant)
        self._expected = Expected(engine.core)
        self._undelivered = Undelivered(engine.core.notes)
        self._lock = threading.Lock()
        self._stopping = False
        self._all: set[Connection] = set()
        self._unknown: Counter[int] = Counter()
        self._by_number: dict[int, Connection] = {}
        self._by_pidfd: dict[int, Connection] = {}
        self._blocked: dict[int, Connection] = {}
        # handed to the watcher by others; a deque or set of each, whose methods are atomic
        self._gone: set[Connection] = set()
        self._news: set[Connection] = set()
        self._faulted: set[int] = set()
        self._reaped: set[int] = set()

    # --- life --------------------------------------------------------------------------------
    def bind(self, listener: int | None = None) -> int:
        """Make the socket and listen; whoever connects waits until ``start``.

        Args:
            listener: that of an earlier process, with those who wait in it.

        Returns:
            The listener's descriptor, which stays this server's.

        Raises:
            OSError: it cannot be made.
        """
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._listener = Listener(self._path, listener, self._epoll, self._clock, self._refuse)
        self._epoll.register(self._wakeup, select.EPOLLIN)
        self._absent = Absent(
            self._engine.core, self._expected, self._undelivered, self._epoll, self.wake,
            self._reap, self._forget_sessions,
        )  # fmt: skip
        return self._listener.fileno()

    def start(self) -> None:
        """Serve; sessions that a daemon before this one had are waited for, or ended."""
        self._engine.on_userfault(self._on_fault)
        self._access.on_lease = self.wake
        self._absent.start()
        self._watcher = threading.Thread(target=self._watch, name="sessions", daemon=True)
        self._watcher.start()

    def stop(self, seconds: float) -> None:
        """Let nobody in and end the conversations; the sessions themselves go with the memory."""
        self._stopping = True
        self.wake()
        self._watcher.join(seconds)
        if self._watcher.is_alive():
            log.warning("sessions_left", sessions=sorted(self._by_number))
        else:
            self._close()

    def wake(self) -> None:
        """Have the watcher look at everything again; from any thread, and never blocking."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._wakeup >= 0:
                os.eventfd_write(self._wakeup, 1)

    def fds_passed(self, tenant: str) -> int:
        """Return how many descriptors a tenant was given by sessions that live."""
        return self._passed.of(tenant)

    # --- the watcher -------------------------------------------------------------------------
    def _watch(self) -> None:
        meant: float | None = None
        while not (self._stopping and self._finish()):
            over, lease_left = self._access.due(self._clock() if meant is None else meant)
            for session in over:
                self._reap(session, LEASE)
            timeout = self._until_next(lease_left)
            meant = None if timeout is None else self._clock() + timeout
            events = self._epoll.poll(timeout)
            try:
                self._look(events)
            except Exception as error:
                # whatever it was, nobody else would see clients die
                log.error("watcher_failed", exc_info=error)

    def _look(self, events: list[tuple[int, int]]) -> None:
        connecting = False
        for fd, _ in events:
            if fd == self._wakeup:
                os.eventfd_read(self._wakeup)
            elif fd == self._listener.fileno():
                connecting = True
            elif fd in self._by_pidfd:
                self._died(self._by_pidfd[fd])
            elif self._absent.is_of_one(fd):
                self._absent.died(fd)
            elif fd in self._blocked:
                self._news.add(self._blocked[fd])
        self._send_news()
        self._close_gone()
        self._absent.settle()
        # last: only here do descriptors get numbers, which then mean what they meant above
        if connecting and not self._stopping:
            for sock in self._listener.accept():
                self._take(sock)
        else:
            self._listener.listen_again()

    def _until_next(self, lease_left: float | None) -> float | None:
        now = self._clock()
        ends = [] if lease_left is None else [now + lease_left]
        ends += [one.blocked_since + SLOW_SECONDS for one in self._blocked.values()
                 if one.blocked_since is not None]  # fmt: skip
        ends += [] if self._listener.retry_at is None else [self._listener.retry_at]
        return max(min(ends) - now, 0.0) if ends else None

    # --- coming ------------------------------------------------------------------------------
    def _take(self, sock: socket.socket) -> None:
        try:
            peer = identify(sock)
        except OSError as error:
            self._refuse(sock, f"who it is cannot be told: {error.strerror}")
            return
        if self._unknown[peer.uid] >= UNKNOWN_MAX or len(self._all) >= CONNECTIONS_MAX:
            os.close(peer.pidfd)
            self._refuse(sock, "too many connections", uid=peer.uid)
            return
        connection = Connection(sock, peer)
        self._all.add(connection)
        with self._lock:
            self._unknown[peer.uid] += 1
        self._by_pidfd[peer.pidfd] = connection
        self._epoll.register(peer.pidfd, select.EPOLLIN)
        try:
            self._spawn("session", self._serve, connection)
        except RuntimeError:
            connection.claim_end(FAILED)
            self._known(connection)
            self._forget(connection)
            self._refuse(sock, "no thread is left")

    def _refuse(self, sock: socket.socket, why: str, **facts: object) -> None:
        log.warning("connection_refused", why=why, **facts)
        with sock, contextlib.suppress(OSError):
            refusal = TOO_MANY(f"no session: {why}")
            sock.send(refused_frame(refusal, self._engine.revision), socket.MSG_DONTWAIT)

    # --- a session's thread ------------------------------------------------------------------
    def _serve(self, connection: Connection) -> None:
        why = FAILED
        try:
            talk = Talk(
                connection, self._engine, self._access, self._passed, self._expected,
                self._observers,
            )  # fmt: skip
            try:
                talk.open()
                self._listen_for(connection)
            finally:
                self._known(connection)
            talk.greet()
            # what came before the client had its answer waits for this
            self._news.add(connection)
            self.wake()
            talk.serve()
        except Gone as gone:
            why = str(gone)
        except Exception as error:
            log.error("session_failed", session=connection.number, exc_info=error)
        finally:
            if connection.claim_end(why):
                self._release(connection)
            self._leave(connection)

    def _known(self, connection: Connection) -> None:
        with self._lock:
            self._unknown[connection.peer.uid] -= 1
            if not self._unknown[connection.peer.uid]:
                del self._unknown[connection.peer.uid]

    def _listen_for(self, connection: Connection) -> None:
        """Have the engine tell of the session; it may have ended since it was opened."""
        number = connection.number
        self._by_number[number] = connection

        def hear(news: News) -> None:
            connection.hear(news, self._undelivered.keep(number, news))
            self._news.add(connection)
            self.wake()

        def listen(core: Core) -> bool:
            connection.post(self._undelivered.of(number))
            core.listeners.add(number, hear)
            return core.sessions.exists(number)

        if not self._engine.read(listen)[1]:
            raise Gone(CLOSED)
        if connection.is_over():
            # released before we listened
            self._unlisten(number)
            raise Gone(connection.why)
        # what waited for it, it is told now: the faults of a pager that has come back
        self._on_fault(number)

    def _unlisten(self, number: int) -> None:
        self._engine.core.listeners.remove(number)
        self._by_number.pop(number, None)

    # --- notices -----------------------------------------------------------------------------
    def _on_fault(self, session: int) -> None:
        """Be told, under the engine's lock, that a session has faults to take."""
        self._faulted.add(session)
        self.wake()

    def _send_news(self) -> None:
        while self._faulted:
            connection = self._by_number.get(session := self._faulted.pop())
            if connection is not None:
                messages = self._engine.take_userfaults(session)
                revision = self._engine.revision
                connection.post([(fault_notice(message, revision), None) for message in messages])
                self._news.add(connection)
        while self._news:
            self._flush(self._news.pop())
        now = self._clock()
        for connection in list(self._blocked.values()):
            since = connection.blocked_since
            if since is not None and now - since >= SLOW_SECONDS:
                self._end(connection, SLOW)

    def _flush(self, connection: Connection) -> None:
        if connection not in self._all:
            return
        fd = connection.sock.fileno()
        blocked = connection.flush(self._clock(), self._undelivered.delivered)
        if blocked and fd not in self._blocked:
            self._blocked[fd] = connection
            self._epoll.register(fd, select.EPOLLOUT)
        elif not blocked and fd in self._blocked:
            self._unblock(fd)
        if connection.is_told_of_its_end:
            self._end(connection, CLOSED)
        elif connection.is_swamped:
            self._end(connection, SLOW)

    def _unblock(self, fd: int) -> None:
        del self._blocked[fd]
        self._epoll.unregister(fd)

    # --- going -------------------------------------------------------------------------------
    def _died(self, connection: Connection) -> None:
        # it stays readable, and has said all that it will
        del self._by_pidfd[connection.peer.pidfd]
        self._epoll.unregister(connection.peer.pidfd)
        self._end(connection, PIDFD)

    def _end(self, connection: Connection, why: str) -> None:
        """Have a connection end, if it does not yet."""
        if connection.sock.fileno() in self._blocked:
            self._unblock(connection.sock.fileno())
        if connection.claim_end(why):
            try:
                self._spawn("release", self._release, connection)
            except RuntimeError:
                # no thread is left; then here
                self._release(connection)

    def _release(self, connection: Connection) -> None:
        """Let go of everything that a session held, and say so."""
        if connection.number and connection.why == STOP:
            self._expected.leave(connection.number)
        connection.shut()
        number = connection.number
        if number:
            self._unlisten(number)
            self._close_session(number, connection.why, connection.ended_at)
        self._leave(connection)

    def _reap(self, session: int, why: str) -> None:
        """End a session that has no connection: its lease is over, or its process is gone."""
        if session not in self._reaped:
            self._reaped.add(session)
            self._spawn("reap", partial(self._close_reaped, why), session)

    def _close_reaped(self, why: str, session: int) -> None:
        self._close_session(session, why, time.monotonic())
        self._reaped.discard(session)
        # the end waits for it
        self.wake()

    def _close_session(self, number: int, why: str, since: float) -> None:
        """Close a session in the engine, unless it went with somebody else or the daemon goes."""
        closed = Closed((), 0, ())
        if why != STOP:
            try:
                closed = self._access.close(number)
            except RmemError:
                # somebody else has
                pass
            except Exception as error:
                log.error("release_failed", session=number, exc_info=error)
            self._forget_sessions((number, *closed.sessions))
        log.info(
            "session_closed", session=number, why=why, released_pages=closed.released_pages,
            vms=list(closed.vms), sessions=list(closed.sessions),
            ms=round((time.monotonic() - since) * 1e3, 3),
        )  # fmt: skip

    def _forget_sessions(self, ended: Sequence[int]) -> None:
        """Let go of what is kept of sessions beside their state."""
        for number in ended:
            self._expected.forget(number)
            self._undelivered.forget(number)
            self._passed.forget(number)
            forget_results(self._engine.core, number)

    def _leave(self, connection: Connection) -> None:
        if connection.leave():
            self._gone.add(connection)
            self.wake()

    def _close_gone(self) -> None:
        while self._gone:
            connection = self._gone.pop()
            if self._by_pidfd.pop(connection.peer.pidfd, None) is not None:
                self._epoll.unregister(connection.peer.pidfd)
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        fd = connection.sock.fileno()
        if fd in self._blocked:
            self._unblock(fd)
        self._all.discard(connection)
        self._news.discard(connection)
        connection.close()

    def _spawn(self, name: str, work: Callable[..., None], what: object) -> None:
        threading.Thread(target=work, args=(what,), name=name, daemon=True).start()

    # --- the end -----------------------------------------------------------------------------
    def _finish(self) -> bool:
        """Have every connection end; return whether all have."""
        for connection in self._all:
            self._end(connection, STOP)
        self._close_gone()
        return not self._all and not self._reaped

    def _close(self) -> None:
        self._engine.on_userfault(lambda session: None)
        self._access.on_lease = lambda: None
        self._absent.close()
        self._epoll.close()
        self._listener.close()
        with self._lock:
            if self._wakeup >= 0:
                os.close(self._wakeup)
            self._wakeup = -1
