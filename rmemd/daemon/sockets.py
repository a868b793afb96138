"""Where the daemon listens, and how it says that it does.

Owns the socket directory (private, locked, so that one daemon serves it), readiness by descriptor
and by sd_notify. Bind first, then announce.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path

SOCKET_NAME = "rmemd.sock"
LOCK_NAME = "rmemd.lock"


class AlreadyServed(Exception):
    """Another daemon holds the directory's lock."""


class UnsafeDirectory(Exception):
    """The directory belongs to somebody else or others may write to it."""


def default_socket_dir() -> Path:
    """Return $RMEMD_SOCKET_DIR, else $XDG_RUNTIME_DIR/rmemd, /run/rmemd (root), /tmp/rmemd-UID."""
    named = os.environ.get("RMEMD_SOCKET_DIR")
    if named:
        return Path(named)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "rmemd"
    return Path("/run/rmemd") if os.getuid() == 0 else Path(f"/tmp/rmemd-{os.getuid()}")


class SocketDir:
    """A directory of mode 0700 that this daemon alone serves.

    Raises:
        UnsafeDirectory: it is not ours alone.
        AlreadyServed: another daemon serves it.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = self.path.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            raise UnsafeDirectory(f"{self.path} is not a directory of uid {os.getuid()}")
        if info.st_mode & 0o077:
            raise UnsafeDirectory(f"{self.path} is open to others: chmod 700 {self.path}")
        self._lock = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise AlreadyServed(f"another rmemd serves {self.path}") from error
        # a socket left by a daemon that was killed: nobody listens, we hold the lock
        self.socket.unlink(missing_ok=True)

    @property
    def socket(self) -> Path:
        """Return the path of the gRPC socket."""
        return self.path / SOCKET_NAME

    def close(self) -> None:
        """Remove the socket and let the directory go."""
        self.socket.unlink(missing_ok=True)
        os.close(self._lock)


def announce(ready_fd: int | None, path: Path) -> None:
    """Tell whoever started us that we serve: a line on ``ready_fd``, READY=1 to systemd."""
    if ready_fd is not None:
        os.write(ready_fd, f"{path}\n".encode())
        os.close(ready_fd)
    notify("READY=1")


def notify(message: str) -> None:
    """Send a message to systemd, where there is one ($NOTIFY_SOCKET)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(message.encode(), address)
