"""A service manager's descriptor store, as strict as systemd's documents and source say it is.

Owns the notification socket and the store of one service (sd_pid_notify_with_fds(3), systemd 252
src/core/service.c): a message that it would not take is an error of the test. ``start`` runs the
service's main process as systemd does, with what is in the store from descriptor 3 on.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 30.0
NAME_MAX = 255
FDS_MAX = 253
VARIABLES = {
    "READY", "RELOADING", "STOPPING", "STATUS", "MONOTONIC_USEC", "FDSTORE", "FDSTOREREMOVE",
    "FDNAME", "FDPOLL", "BARRIER",
}  # fmt: skip
# as systemd's executor: the process that is to be the service has the descriptors' variables
_EXEC = """
import json, os, sys
fds, names, command = json.loads(sys.argv[1])
above = [os.dup(fd) for fd in fds]
while above and min(above) < 3 + len(fds):
    above = [os.dup(fd) for fd in above]
for at, fd in enumerate(above, 3):
    os.dup2(fd, at)
if fds:
    os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=":".join(names),
                      LISTEN_PID=str(os.getpid()))
os.closerange(3 + len(fds), 1024)
os.execv(command[0], command)
"""


class NotTaken(Exception):
    """systemd would not take this message, or not as its sender means it."""


class ServiceManager:
    """One service's notification socket and store."""

    def __init__(self, directory: Path, store_max: int = 512) -> None:
        self.address = str(directory / "notify")
        self._max = store_max
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.settimeout(PATIENCE_SECONDS)
        self._sock.bind(self.address)
        self.main_pid = os.getpid()
        # (name, descriptor, whether it goes when it hangs up); a name may be there many times
        self.store: list[tuple[str, int, bool]] = []
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def names(self) -> list[str]:
        """Return the names in the store."""
        return sorted(name for name, _, _ in self.store)

    def hear(self) -> dict[str, str]:
        """Take the next message, and return its variables."""
        data, ancillary, flags, _ = self._sock.recvmsg(1 << 16, 4096, socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        pid = 0
        for _, kind, payload in ancillary:
            if kind == socket.SCM_RIGHTS:
                fds += struct.unpack(f"{len(payload) // 4}i", payload)
            else:
                pid = struct.unpack("iII", payload)[0]
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > FDS_MAX:
            raise NotTaken(f"{len(data)} bytes, {len(fds)} descriptors")
        # NotifyAccess=main
        if pid != self.main_pid:
            raise NotTaken(f"process {pid} is not the main process")
        fields = dict(line.split("=", 1) for line in data.decode("ascii").split("\n"))
        if set(fields) - VARIABLES:
            raise NotTaken(f"unknown: {fields}")
        self._take(fields, fds)
        return fields

    def hear_until(self, field: str) -> None:
        """Take messages up to one that has a variable set to 1."""
        while self.hear().get(field) != "1":
            pass

    def hear_all(self) -> None:
        """Take what has been sent."""
        while select.select([self._sock], [], [], 0)[0]:
            self.hear()

    def start(self, command: Sequence[str], env: Mapping[str, str], **how: Any) -> None:
        """Start the service with what the store has."""
        fds = [fd for _, fd, _ in self.store]
        names = [name for name, _, _ in self.store]
        argument = json.dumps([fds, names, list(command)])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _EXEC, argument], pass_fds=fds,
            env={**env, "NOTIFY_SOCKET": self.address, "FDSTORE": str(self._max)}, **how,
        )  # fmt: skip
        self.main_pid = self.process.pid

    def stop_listening(self) -> None:
        """Be gone, for those who send."""
        self._sock.close()

    def close(self) -> None:
        """Stop the service and empty the store."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for _, fd, _ in self.store:
            os.close(fd)
        self._sock.close()

    def _take(self, fields: dict[str, str], fds: list[int]) -> None:
        if "BARRIER" in fields:
            if len(fields) > 1 or len(fds) != 1:
                raise NotTaken("a barrier stands alone, with one descriptor")
            os.close(fds[0])
        elif fields.get("FDSTOREREMOVE") == "1":
            self._remove(fields["FDNAME"])
        elif fields.get("FDSTORE") == "1":
            self._add(fields.get("FDNAME", "stored"), fds, fields.get("FDPOLL") != "0")
        elif fds:
            raise NotTaken(f"descriptors without FDSTORE=1: {fields}")

    def _add(self, name: str, fds: list[int], polled: bool) -> None:
        if not fds or not name or len(name) > NAME_MAX or not name.isascii():
            raise NotTaken(f"{len(fds)} descriptors under {name!r}")
        if not name.isprintable() or ":" in name:
            raise NotTaken(f"the name {name!r}")
        for fd in fds:
            if any(os.path.sameopenfile(fd, other) for _, other, _ in self.store):
                # systemd keeps the one that it has, under the name that this one has
                raise NotTaken(f"{name} is in the store already, and stays under its old name")
            if len(self.store) >= self._max:
                raise NotTaken("the store is full")
            self.store.append((name, fd, polled))

    def _remove(self, name: str) -> None:
        gone = [one for one in self.store if one[0] == name]
        if not gone:
            raise NotTaken(f"{name} is not in the store")
        self.store = [one for one in self.store if one not in gone]
        for _, fd, _ in gone:
            os.close(fd)

    def hang_up(self) -> None:
        """Let go of what has hung up and was to be watched for that."""
        poll = select.poll()
        for _, fd, polled in self.store:
            if polled:
                poll.register(fd, 0)
        over = {fd for fd, events in poll.poll(0) if events & (select.POLLHUP | select.POLLERR)}
        self.store = [one for one in self.store if one[1] not in over]
