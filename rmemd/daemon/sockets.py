"""Where the daemon listens, and how it says that it does.

Owns the socket directory (locked, so that one daemon serves it; private, or shared, which lets
other users through to its sockets and to nothing else), readiness by descriptor and by sd_notify.
Bind first, then announce. The lock and the session socket's listener outlive a daemon that is kept:
its successor takes both over, so that nobody comes in between and nobody is turned away.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path

from rmemd.keeper.protocol import NOTIFY_SOCKET, address_of

SOCKET_NAME = "rmemd.sock"
SESSION_NAME = "session.sock"
LOCK_NAME = "rmemd.lock"
KEEPER_NAME = "keeper.sock"
PRIVATE_MODES = (0o700, 0o600)
# others pass through by name, and may neither list nor change it
SHARED_MODES = (0o711, 0o666)


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
    """A directory that this daemon alone serves.

    Args:
        path: the directory; made if it is not there.
        shared: whether others may connect. Then it has mode 0711 and its sockets 0666, otherwise
            0700 and 0600.
        lock: the lock's descriptor, where an earlier daemon has left it.
        has_listener: whether it has left the session socket's too, which stays then.

    Attributes:
        lock: the lock's descriptor.

    Raises:
        UnsafeDirectory: it is not ours alone.
        AlreadyServed: another daemon serves it.
        OSError: it cannot be made.
    """

    # as what a keeper has them
    LOCK, LISTENER = "lock", "listener"

    def __init__(
        self,
        path: Path,
        shared: bool = False,
        lock: int | None = None,
        has_listener: bool = False,
    ) -> None:
        self.path = path.absolute()
        mode, self.socket_mode = SHARED_MODES if shared else PRIVATE_MODES
        made = _make(self.path)
        info = self.path.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            raise UnsafeDirectory(f"{self.path} is not a directory of uid {os.getuid()}")
        if made and shared:
            self.path.chmod(mode)
        elif info.st_mode & 0o777 & ~mode:
            raise UnsafeDirectory(f"{self.path} is open to others: chmod {mode:o} {self.path}")
        elif shared and info.st_mode & 0o777 != mode:
            raise UnsafeDirectory(f"{self.path} is closed to others: chmod {mode:o} {self.path}")
        self.lock = self._locked(lock)
        # a socket left by a daemon that was killed: nobody listens, we hold the lock
        for left in (self.socket,) if has_listener else (self.socket, self.session):
            left.unlink(missing_ok=True)

    def _locked(self, left: int | None) -> int:
        path = self.path / LOCK_NAME
        if left is not None:
            if path.exists() and os.path.samestat(os.fstat(left), path.stat()):
                return left
            os.close(left)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise AlreadyServed(f"another rmemd serves {self.path}") from error
        return lock

    @property
    def socket(self) -> Path:
        """Return the path of the gRPC socket."""
        return self.path / SOCKET_NAME

    @property
    def session(self) -> Path:
        """Return the path of the session socket."""
        return self.path / SESSION_NAME

    @property
    def keeper(self) -> Path:
        """Return the path of the keeper's notification socket."""
        return self.path / KEEPER_NAME

    def let_in(self) -> None:
        """Give the sockets, once bound, the mode by which others are let in or kept out."""
        for bound in (self.socket, self.session):
            bound.chmod(self.socket_mode)

    def close(self) -> None:
        """Remove the sockets and let the directory go."""
        for bound in (self.socket, self.session):
            bound.unlink(missing_ok=True)
        os.close(self.lock)


def _make(path: Path) -> bool:
    """Make a private directory; return whether it was not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_symlink() and not path.is_dir():
            raise
        return False
    return True


def announce(ready_fd: int | None, path: Path) -> None:
    """Tell whoever started us that we serve: a line on ``ready_fd``, READY=1 to systemd."""
    if ready_fd is not None:
        os.write(ready_fd, f"{path}\n".encode())
        os.close(ready_fd)
    notify("READY=1")


def notify(message: str) -> None:
    """Send a message to systemd, where there is one ($NOTIFY_SOCKET)."""
    address = os.environ.get(NOTIFY_SOCKET)
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(message.encode(), address_of(address))
