"""The session socket's listener: connections as they come, and what to do when none can be taken.

Owns the listening socket and a spare descriptor: a process that has used up its descriptors cannot
even refuse whoever connects, so it gives the spare one up to do that.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

BACKLOG = 128
ACCEPTED_AT_ONCE = 32
# when the process was out of descriptors: until it looks again whether one is free
RETRY_SECONDS = 0.1
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Listener:
    """A socket that listens, in a watcher's epoll.

    Args:
        path: where it is bound.
        inherited: that of an earlier process, with those who wait in it.
        epoll: where the watcher waits.
        clock: seconds.
        refuse: tells a connection why it is not taken, and closes it.

    Attributes:
        retry_at: by the clock, when ``listen_again`` is due; None while it listens.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(
        self,
        path: Path,
        inherited: int | None,
        epoll: select.epoll,
        clock: Callable[[], float],
        refuse: Callable[[socket.socket, str], None],
    ) -> None:
        self.retry_at: float | None = None
        self._epoll = epoll
        self._clock = clock
        self._refuse = refuse
        self._spare = _spare()
        if inherited is None:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._sock.bind(str(path))
            self._sock.listen(BACKLOG)
        else:
            self._sock = socket.socket(fileno=inherited)
        self._sock.setblocking(False)
        self._epoll.register(self._sock, select.EPOLLIN)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._sock.fileno()

    def accept(self) -> Iterator[socket.socket]:
        """Give the connections that wait, up to so many that the watcher is not kept."""
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in NO_DESCRIPTORS:
                    self._turn_away(error)
                # else it has gone again: ECONNABORTED
                return
            yield sock

    def listen_again(self) -> None:
        """Once it is due, see whether there are descriptors again."""
        if self.retry_at is None or self._clock() < self.retry_at:
            return
        try:
            self._spare = _spare()
        except OSError:
            self.retry_at = self._clock() + RETRY_SECONDS
        else:
            self.retry_at = None
            self._epoll.register(self._sock, select.EPOLLIN)

    def close(self) -> None:
        """Listen no more."""
        self._sock.close()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    def _turn_away(self, error: OSError) -> None:
        """With no descriptor left, give the spare one up to tell whoever waits; get it back."""
        os.close(self._spare)
        try:
            sock, _ = self._sock.accept()
        except OSError:
            pass
        else:
            self._refuse(sock, os.strerror(error.errno or 0))
        try:
            self._spare = _spare()
        except OSError:
            # another thread was faster: nobody is let in until it has given it back
            self._spare = -1
            self._epoll.unregister(self._sock)
            self.retry_at = self._clock() + RETRY_SECONDS


def _spare() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
