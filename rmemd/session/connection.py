"""One client's connection: its socket, its process, and what it is yet to be told.

Owns the state that the session's thread, the watcher and whoever ends it share. Whoever claims the
end first carries it out; the descriptors are opened and closed by the watcher alone, so that a
number never means another's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from rmemd.engine.listeners import Ended, News
from rmemd.model.sessions import SessionInfo
from rmemd.session.notices import Notice, NoticeKey
from rmemd.session.peer import Peer
from rmemd.session.wire import DATAGRAM_MAX, notice_of, notices

HELLO_SECONDS = 3.0
# what a client that does not read may keep its session's thread waiting for
SEND_SECONDS = 10.0
NOTICES_MAX = 1024
NOTICES_AT_ONCE = 64
_TIMEVAL = struct.Struct("@ll")


class Connection:
    """A connection.

    Attributes:
        sock: blocking; the session's thread receives from it.
        peer: the process at the other end.
        number: its session, 0 before there is one.
        why: how it ends, "" while it does not.
        ended_at: when that was noticed, seconds of the monotonic clock.
        blocked_since: when its notices began to wait for it to read, None if they do not.
    """

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        sock.setblocking(True)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 2 * DATAGRAM_MAX)
        _timeout(sock, socket.SO_RCVTIMEO, HELLO_SECONDS)
        _timeout(sock, socket.SO_SNDTIMEO, SEND_SECONDS)
        self.sock = sock
        self.peer = peer
        self.number = 0
        self.why = ""
        self.ended_at = 0.0
        self.blocked_since: float | None = None
        self._lock = threading.Lock()
        self._outbox: deque[Notice] = deque()
        self._welcomed = False
        self._over = False
        # the session's thread, and whoever releases what it held
        self._busy = 2

    def is_over(self) -> bool:
        """Return whether it ends."""
        return bool(self.why)

    # --- its session -------------------------------------------------------------------------
    def adopt(self, info: SessionInfo) -> bool:
        """Take a session on; return whether the client was still there for it."""
        with self._lock:
            if not self.why:
                self.number = info.session
            return bool(self.number)

    def welcomed(self) -> None:
        """The client has its answer: it may wait for ever now, and be told of things."""
        _timeout(self.sock, socket.SO_RCVTIMEO, 0)
        self._welcomed = True

    def claim_end(self, why: str) -> bool:
        """Say how it ends; return whether nobody has before."""
        with self._lock:
            if self.why:
                return False
            self.why = why
            self.ended_at = time.monotonic()
            return True

    def shut(self) -> None:
        """Have the session's thread, and the client, see its end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def leave(self) -> bool:
        """Say that one of the two who use the descriptors is through; return whether both are."""
        with self._lock:
            self._busy -= 1
            return not self._busy

    def close(self) -> None:
        """Close its descriptors."""
        self.sock.close()
        os.close(self.peer.pidfd)

    # --- notices -----------------------------------------------------------------------------
    def hear(self, news: News, key: NoticeKey | None) -> None:
        """Take news of the session, for the watcher to send; ``key`` is that of their note."""
        self._outbox.append((notice_of(news), key))
        self._over |= isinstance(news, Ended)

    def post(self, notices: list[Notice]) -> None:
        """Take encoded notices, to be sent."""
        self._outbox.extend(notices)

    def flush(self, now: float, delivered: Callable[[NoticeKey], None]) -> bool:
        """Send what fits; return whether the rest must wait for the client to read.

        ``delivered`` is told of those that have a note, once the client has them.
        """
        while self._outbox and self._welcomed and not self.why:
            some = [self._outbox[i] for i in range(min(len(self._outbox), NOTICES_AT_ONCE))]
            try:
                self.sock.send(notices([one for one, _ in some]), socket.MSG_DONTWAIT)
            except BlockingIOError:
                if self.blocked_since is None:
                    self.blocked_since = now
                return True
            except OSError:
                # it has gone, which its own thread sees
                break
            for _, key in some:
                self._outbox.popleft()
                if key is not None:
                    delivered(key)
        self.blocked_since = None
        return False

    @property
    def is_told_of_its_end(self) -> bool:
        """Return whether somebody else ended the session, and the client has been told."""
        return self._over and not (self._outbox and self._welcomed)

    @property
    def is_swamped(self) -> bool:
        """Return whether more notices wait than it may leave unread."""
        return len(self._outbox) > NOTICES_MAX


def _timeout(sock: socket.socket, option: int, seconds: float) -> None:
    whole = int(seconds)
    sock.setsockopt(
        socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, int((seconds - whole) * 1_000_000))
    )
