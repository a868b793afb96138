"""What a daemon has deposited: descriptors by name, until it says otherwise.

Owns the notification socket's receiving end. A deposit is safe as soon as it is sent, because what
is in the socket's queue stays there when the sender dies. Only the daemon itself may deposit; the
kernel says who sends.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterable

from rmemd.keeper.protocol import FDS_MAX, MESSAGE_MAX, STORED, decode, is_name
from rmemd.keeper.tuples import NamedTuple

_UCRED = struct.Struct("=iII")
_ROOM = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)


class Message(NamedTuple):
    """A message: who sent it, its variables and descriptors, and whether all of it came."""

    pid: int
    fields: dict[str, str]
    fds: list[int]
    whole: bool


class Store:
    """Descriptors by name, in the order in which they came."""

    def __init__(self, kept: Iterable[tuple[str, int]] = ()) -> None:
        self.kept = list(kept)

    def take(self, message: Message) -> bool:
        """Do what a message says of descriptors, which are the store's now; say if it was sound."""
        fields, fds = message.fields, message.fds
        name = fields.get("FDNAME", STORED)
        wanted = fields.get("FDSTORE") == "1" and message.whole and is_name(name)
        if wanted:
            self.kept += [(name, fd) for fd in fds]
        else:
            # a barrier's too: that it is closed tells the sender that all before was taken
            for fd in fds:
                os.close(fd)
        if fields.get("FDSTOREREMOVE") == "1":
            self._remove(name)
        return wanted or (message.whole and (not fds or "BARRIER" in fields))

    def _remove(self, name: str) -> None:
        for other, fd in self.kept:
            if other == name:
                os.close(fd)
        self.kept = [one for one in self.kept if one[0] != name]


def receive(sock: socket.socket) -> Message:
    """Receive a message.

    Raises:
        BlockingIOError: there is none.
    """
    data, ancillary, flags, _ = sock.recvmsg(MESSAGE_MAX, _ROOM, socket.MSG_CMSG_CLOEXEC)
    pid, fds = 0, array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid = _UCRED.unpack(payload)[0]
    whole = not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    return Message(pid, decode(data), list(fds), whole)
