"""Sessions that outlived their daemon: their processes live, and are expected to connect anew.

Owns the table of them, and the answer to who may have one: the process that opened it, as the same
user, and nobody who has merely inherited its socket or its token. Their pidfds come from whoever
keeps descriptors; one that is missing or has fired ends its session at once, for a number alone
says nothing: the kernel gives numbers again.
"""

from __future__ import annotations

import os
import select
import threading
from pathlib import Path

from msgspec import Struct

from rmemd.access.callers import SOCKETED
from rmemd.engine.core import Core
from rmemd.errors import TOKEN_UNKNOWN, RmemError
from rmemd.session.peer import Peer

PIDFD_PREFIX = "pidfd."
# the kind of notes: by session, the user who opened it
PEERS = "peers"


class Awaited(Struct, frozen=True):
    """A session whose client is expected; ``pidfd`` is the watcher's to close."""

    session: int
    pidfd: int
    uid: int


class MakingWay(Exception):
    """This daemon has let go of the session; its successor will go on with it."""


class Expected:
    """The sessions that wait for their clients. Safe from any thread."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._by_session: dict[int, Awaited] = {}
        self._came: list[Awaited] = []
        self._left: set[int] = set()

    # --- what is kept ------------------------------------------------------------------------
    def remember(self, session: int, peer: Peer) -> None:
        """Have a session's process be known to the next daemon; before its client is answered."""
        self._core.notes.set(PEERS, session, peer.uid)
        self._core.keeping.keep(_name(session), peer.pidfd)

    def forget(self, session: int) -> None:
        """Let go of what is kept of a session that has ended."""
        if self._core.notes.get(PEERS, session) is not None:
            self._core.notes.drop(PEERS, session)
            self._core.keeping.drop(_name(session))

    # --- at the start ------------------------------------------------------------------------
    def take_over(self) -> list[int]:
        """Take the pidfds that were kept; return the sessions whose process is gone."""
        keeping, sessions = self._core.keeping, self._core.sessions
        gone = []
        for info in sessions.all():
            if info.door != SOCKETED or info.closing:
                continue
            pidfd = keeping.take(_name(info.session))
            uid = self._core.notes.get(PEERS, info.session)
            if pidfd is not None and (uid is None or has_ended(pidfd)):
                os.close(pidfd)
                pidfd = None
            if pidfd is None:
                gone.append(info.session)
            else:
                self._by_session[info.session] = Awaited(info.session, pidfd, uid)
        for name in [name for name in keeping.found if name.startswith(PIDFD_PREFIX)]:
            # of a session that has ended
            os.close(keeping.found.pop(name))
            keeping.drop(name)
        return gone

    def ended(self) -> list[int]:
        """Return the sessions of which something is kept, and that are no more."""
        sessions = self._core.sessions
        return [known for known, _ in self._core.notes.items(PEERS) if not sessions.exists(known)]

    # --- coming back -------------------------------------------------------------------------
    def leave(self, session: int) -> None:
        """Leave a session to the daemon after this one; before its client can notice."""
        with self._lock:
            self._left.add(session)

    def claim(self, session: int, peer: Peer) -> None:
        """Have a client take up its session again.

        Raises:
            MakingWay: it is too early: the daemon after this one is expected.
            Unauthenticated: TOKEN_UNKNOWN; nobody is expected for it, or somebody else is.
        """
        with self._lock:
            if session in self._left:
                raise MakingWay
            awaited = self._by_session.get(session)
            if awaited is None:
                raise _not_it(f"nobody is expected for session {session}")
            if awaited.uid != peer.uid or not same_process(awaited.pidfd, peer.pidfd):
                raise _not_it(
                    f"session {session} is of another process than {peer.pid} of uid {peer.uid}"
                )
            del self._by_session[session]
            self._came.append(awaited)

    def came(self) -> list[Awaited]:
        """Return, once, those who have come since: their old pidfds are of no more use."""
        with self._lock:
            came, self._came = self._came, []
            return came

    def give_up(self, session: int) -> Awaited | None:
        """Expect nobody for a session any more; return it if somebody was."""
        with self._lock:
            return self._by_session.pop(session, None)

    def all(self) -> list[Awaited]:
        """Return those who are still expected."""
        with self._lock:
            return list(self._by_session.values())


def has_ended(pidfd: int) -> bool:
    """Return whether a process has ended, by its pidfd."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def same_process(one: int, other: int) -> bool:
    """Return whether two pidfds are of one process that lives.

    Until a process is reaped nobody else has its number, so equal ones are the same.
    """
    number = _number(one)
    return number > 0 and number == _number(other) and not has_ended(one)


def _number(pidfd: int) -> int:
    """Return the number of a pidfd's process, 0 or less if it is reaped or not to be seen here."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Pid":
            return int(value)
    return 0


def _name(session: int) -> str:
    return f"{PIDFD_PREFIX}{session}"


def _not_it(why: str) -> RmemError:
    return TOKEN_UNKNOWN("no such session to go on with", field="ticket", for_log=why)
