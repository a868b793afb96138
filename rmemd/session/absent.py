"""Sessions whose clients are away: the daemon that they came to died, and they may come back.

Owns what the watcher does for them until then: it waits for the end of their processes as it does
for the others', and keeps their news. Who may have such a session is ``session.expected``'s to say.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence

import structlog

from rmemd.engine.core import Core
from rmemd.engine.listeners import Ended, News
from rmemd.session.expected import Expected
from rmemd.session.notices import Undelivered
from rmemd.session.ops import forget_results

# why a session ends: its process has ended
PIDFD = "pidfd"

log = structlog.get_logger("rmemd.session")


class Absent:
    """The sessions that wait for their clients. Used by the watcher, and before it runs.

    Those of an earlier process are taken over at once, so that whoever keeps descriptors can tell
    which are of nobody.

    Args:
        core: the engine's.
        expected: who is expected, and for what.
        undelivered: where news of them is kept.
        epoll: where the watcher waits.
        wake: has it look again; from any thread.
        reap: ends a session that has no connection, and says why.
        forget: lets go of what is kept of sessions beside their state.
    """

    def __init__(
        self,
        core: Core,
        expected: Expected,
        undelivered: Undelivered,
        epoll: select.epoll,
        wake: Callable[[], None],
        reap: Callable[[int, str], None],
        forget: Callable[[Sequence[int]], None],
    ) -> None:
        self._core = core
        self._expected = expected
        self._undelivered = undelivered
        self._epoll = epoll
        self._wake = wake
        self._reap = reap
        self._forget = forget
        self._without_process = expected.take_over()
        self._by_pidfd: dict[int, int] = {}
        # ended while their clients were away; handed to the watcher, in a set, which is atomic
        self._ended: set[int] = set()

    def start(self) -> None:
        """Wait for those who can come back, and end the sessions of those who cannot."""
        awaited, gone = self._expected.all(), self._without_process
        for one in awaited:
            forget_results(self._core, one.session, but_newest=True)
            self._await(one.session, one.pidfd)
        self._forget(self._expected.ended())
        # in safe mode nothing is let go
        if not self._core.read_only:
            for session in gone:
                self._reap(session, PIDFD)
        if awaited or gone:
            log.info("sessions_taken_over", awaited=[one.session for one in awaited], gone=gone)

    def is_of_one(self, fd: int) -> bool:
        """Return whether a descriptor is the pidfd of somebody who is away."""
        return fd in self._by_pidfd

    def died(self, pidfd: int) -> None:
        """End the session of a process that has ended."""
        session = self._by_pidfd[pidfd]
        one = self._expected.give_up(session)
        # else it came, and its new connection knows that it died
        if one is not None:
            self._reap(session, PIDFD)
            self._stop_awaiting(pidfd)

    def settle(self) -> None:
        """Close the pidfds of sessions whose client has come, or that have ended."""
        for one in self._expected.came():
            self._stop_awaiting(one.pidfd)
        while self._ended:
            session = self._ended.pop()
            given_up = self._expected.give_up(session)
            if given_up is not None:
                self._core.listeners.remove(session)
                self._stop_awaiting(given_up.pidfd)
                self._forget((session,))

    def close(self) -> None:
        """Wait for nobody; the sessions stay."""
        for pidfd in list(self._by_pidfd):
            self._stop_awaiting(pidfd)

    def _await(self, session: int, pidfd: int) -> None:
        def hear(news: News) -> None:
            if isinstance(news, Ended):
                self._ended.add(session)
                self._wake()
            else:
                self._undelivered.keep(session, news)

        self._by_pidfd[pidfd] = session
        self._epoll.register(pidfd, select.EPOLLIN)
        self._core.listeners.add(session, hear)

    def _stop_awaiting(self, pidfd: int) -> None:
        # it may have fired already
        if self._by_pidfd.pop(pidfd, None) is not None:
            self._epoll.unregister(pidfd)
            os.close(pidfd)
