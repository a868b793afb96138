"""Who is at the other end of a Unix socket, as the kernel knows it.

Owns credentials and pidfds. Both are of the process that connected, whoever else may have
inherited its socket: a client's children do not keep it alive.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

from msgspec import Struct

# not in Python's socket module; Linux 6.5
SO_PEERPIDFD = 77
_UCRED = struct.Struct("=iII")


class Peer(Struct, frozen=True):
    """A process. ``pidfd`` becomes readable when it ends; whoever has this closes it."""

    pid: int
    uid: int
    gid: int
    pidfd: int

    @property
    def tenant(self) -> str:
        """Return the tenant that its user is."""
        return f"uid:{self.uid}"


def identify(sock: socket.socket) -> Peer:
    """Return who connected.

    Raises:
        OSError: it has ended, is not to be seen from here, or no descriptor is left.
    """
    pid, uid, gid = credentials(sock)
    if pid <= 0:
        raise ProcessLookupError(errno.ESRCH, "the peer is not in our process namespace")
    return Peer(pid, uid, gid, _pidfd(sock, pid))


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of who connected."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(data)
    return pid, uid, gid


def _pidfd(sock: socket.socket, pid: int) -> int:
    try:
        fd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return _pidfd_by_number(sock, pid)
    os.set_inheritable(fd, False)
    return fd


def _pidfd_by_number(sock: socket.socket, pid: int) -> int:
    """Open a pidfd where the kernel does not give the peer's own.

    The number may have gone to another process meanwhile. Then the peer's end is shut, unless a
    child of its has inherited it, which a kernel before 6.5 cannot tell.
    """
    fd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    if poll.poll(0):
        os.close(fd)
        raise ProcessLookupError(errno.ESRCH, "the peer has gone")
    return fd
