"""Deposits with whoever keeps our descriptors: our keeper, or the service manager.

Owns what is kept under which name, and the way there. Either is spoken to by $NOTIFY_SOCKET, and
gives everything back at the next start (``keeper.protocol``). A name can be given to another
descriptor: the new one is deposited before the old one is let go, each under a number of its own,
so that there is no moment at which a death would find neither. A deposit that fails is told to the
log and to nobody else: the daemon serves on, and only its own death would lose what it concerns.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import quote, unquote

import structlog

from rmemd.keeper.protocol import address_of, encode
from rmemd.store.keeping import Keeping

# a keeper that takes nothing for so long does not keep the daemon waiting any longer
SEND_SECONDS = 2.0
# what a name may have unquoted beside letters, digits and "_.-~"; ':' would end it
_PLAIN = " !@#/+=,"
_WIRE = re.compile(r"(?P<name>.*)~(?P<number>\d+)")

log = structlog.get_logger("rmemd.keeper")


class Deposit(NamedTuple):
    """A descriptor and the name that the store has it under."""

    wire: str
    fd: int
    inode: tuple[int, int]


class FdStore(Keeping):
    """Descriptors kept beyond the process. Safe from any thread.

    What is kept must be dropped before it is closed: a keeper that was lost is replaced by another,
    which is given all of it anew.

    Args:
        address: the notification socket, as in $NOTIFY_SOCKET.
        given: names and numbers of what the store handed back.
    """

    def __init__(self, address: str, given: Sequence[tuple[str, int]] = ()) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._kept: dict[str, Deposit] = {}
        self._number = 0
        stale = self._sort_out(given)
        super().__init__({name: deposit.fd for name, deposit in self._kept.items()})
        for deposit in stale:
            os.close(deposit.fd)
            self._remove(deposit)

    def keep(self, name: str, fd: int) -> None:
        """Have a descriptor kept under a name until ``drop``; it stays the caller's too."""
        with self._lock:
            before = self._kept.get(name)
            if before is not None and (before.fd, before.inode) == (fd, _inode(fd)):
                return
            self._number += 1
            wire = f"{quote(name, safe=_PLAIN)}~{self._number}"
            self._kept[name] = deposit = Deposit(wire, fd, _inode(fd))
            self._deposit(deposit)
            if before is not None:
                self._remove(before)

    def drop(self, name: str) -> None:
        """Have what is kept under a name let go."""
        with self._lock:
            deposit = self._kept.pop(name, None)
            if deposit is not None:
                self._remove(deposit)

    def let_go_of_the_rest(self) -> list[str]:
        """Close and drop what was found and nobody has taken; return the names."""
        rest = sorted(self.found)
        for name in rest:
            os.close(self.found.pop(name))
            self.drop(name)
        return rest

    def let_go(self) -> None:
        """Have everything let go; the descriptors stay their owners'."""
        for name in list(self._kept):
            self.drop(name)

    def deposit_all(self) -> None:
        """Deposit everything with a new keeper, which has the old one's address and nothing else.

        Blocks until the keeper has begun to read.
        """
        with self._lock:
            self._disconnect()
            for deposit in self._kept.values():
                self._deposit(deposit)

    @property
    def names(self) -> list[str]:
        """Return the names of all that is kept."""
        return sorted(self._kept)

    def close(self) -> None:
        """Say no more; what is kept stays kept."""
        with self._lock:
            self._disconnect()

    # --- names -------------------------------------------------------------------------------
    def _sort_out(self, given: Sequence[tuple[str, int]]) -> list[Deposit]:
        """Note the newest of each name; return those that a death left beside it."""
        numbered = []
        for wire, fd in given:
            matched = _WIRE.fullmatch(wire)
            if matched is None:
                log.warning("foreign_descriptor", name=wire)
                os.close(fd)
                continue
            numbered.append((int(matched["number"]), unquote(matched["name"]), wire, fd))
        stale = []
        for number, name, wire, fd in sorted(numbered):
            if name in self._kept:
                stale.append(self._kept[name])
            self._kept[name] = Deposit(wire, fd, _inode(fd))
            self._number = number
        return stale

    # --- messages ----------------------------------------------------------------------------
    def _deposit(self, deposit: Deposit) -> None:
        # FDPOLL=0: a listener or a pidfd that hangs up is not for the keeper to judge
        fields = (("FDSTORE", "1"), ("FDNAME", deposit.wire), ("FDPOLL", "0"))
        self._send(encode(*fields), deposit)

    def _remove(self, deposit: Deposit) -> None:
        self._send(encode(("FDSTOREREMOVE", "1"), ("FDNAME", deposit.wire)))

    def _send(self, data: bytes, deposit: Deposit | None = None) -> None:
        rights = []
        if deposit is not None:
            packed = deposit.fd.to_bytes(4, "little")
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)]
        try:
            self._connected().sendmsg([data], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            self._disconnect()
            log.warning("deposit_failed", message=data.decode().split("\n"), error=str(error))

    def _connected(self) -> socket.socket:
        """Return the socket; connected, so that a full queue is waited for and not asked anew."""
        if self._sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(SEND_SECONDS)
                sock.connect(address_of(self._address))
            except BaseException:
                sock.close()
                raise
            self._sock = sock
        return self._sock

    def _disconnect(self) -> None:
        if self._sock is not None:
            with suppress(OSError):
                self._sock.close()
            self._sock = None


def _inode(fd: int) -> tuple[int, int]:
    info = os.fstat(fd)
    return info.st_dev, info.st_ino
