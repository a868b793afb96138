"""Under whose keeping the daemon runs, and what happens when that one is lost.

Owns the beginning: the process that the user started forks the daemon, before anything heavy is
imported, keeps it, and once it serves becomes a smaller keeper by executing ``rmemd.keeper``. Under
a service manager that has a descriptor store, that one is the keeper, and nothing is forked. And
owns the lifeline, a thread that waits for our keeper's end and makes another, which adopts the
daemon and is given everything anew.
"""

from __future__ import annotations

import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from rmemd import keeper
from rmemd.daemon import logs
from rmemd.daemon.config import DaemonSection
from rmemd.daemon.fdstore import FdStore
from rmemd.daemon.sockets import SocketDir
from rmemd.keeper.charge import Charge
from rmemd.keeper.child import FORWARDED, end_like
from rmemd.keeper.keeper import Keeper
from rmemd.keeper.protocol import (
    FDSTORE,
    KEEPER,
    LISTEN_FDS_START,
    NOTIFY_SOCKET,
    listening,
)
from rmemd.store.keeping import Keeping

NOBODY, OWN, MANAGER = "", "keeper", "service manager"
# between two attempts to get a keeper, doubled each time
RETRY_SECONDS = 0.1
RETRY_MAX_SECONDS = 5.0
# a keeper that has lived so long was no failure
SETTLED_SECONDS = 1.0

log = structlog.get_logger("rmemd.keeper")


class Kept:
    """A daemon's side of its keeping.

    Args:
        by: NOBODY, OWN or MANAGER.
        keeping: what is kept.
        keeper: process of our keeper, 0 without one.
        first: whether this is the process that the user started, or was forked by it.
        directory: what the daemon is to serve in, if that is made already.

    Attributes:
        by: as above.
        keeper: as above; another one after the first was lost.
        is_first: as ``first``.
    """

    def __init__(
        self,
        by: str = NOBODY,
        keeping: Keeping | None = None,
        keeper: int = 0,
        first: bool = True,
        directory: SocketDir | None = None,
    ) -> None:
        self.by = by
        self.keeping = keeping or Keeping()
        self.keeper = keeper
        self.is_first = first
        self._directory = directory
        self._lifeline: Lifeline | None = None

    def directory(self, settings: DaemonSection, shared: bool) -> SocketDir:
        """Return the directory that is to be served; see ``SocketDir`` for what it raises."""
        made = self._directory or SocketDir(
            settings.socket_dir, shared, self.keeping.take(SocketDir.LOCK), self._has_listener()
        )
        self.keeping.keep(SocketDir.LOCK, made.lock)
        return made

    def watch(self, directory: SocketDir, settings: DaemonSection) -> None:
        """See to it that there always is a keeper, if it is ours."""
        if self.by == OWN and isinstance(self.keeping, FdStore):
            renew = Renewal(self.keeping, directory, settings)
            self._lifeline = Lifeline(self.keeper, renew, self._changed)

    def settle(self) -> None:
        """Let go of what an earlier process left and nobody has taken."""
        if isinstance(self.keeping, FdStore):
            rest = self.keeping.let_go_of_the_rest()
            if rest:
                log.warning("deposits_unclaimed", names=rest)

    def close(self, ending: bool) -> None:
        """Stop watching; ``ending``: have everything let go, as this end is meant to be one."""
        if self._lifeline is not None:
            self._lifeline.close()
        if isinstance(self.keeping, FdStore):
            # our own keeper does so anyway; a service manager may be told to hold on to it
            if ending:
                self.keeping.let_go()
            self.keeping.close()

    def _has_listener(self) -> bool:
        return SocketDir.LISTENER in self.keeping.found

    def _changed(self, keeper: int) -> None:
        self.keeper = keeper


# --- the beginning --------------------------------------------------------------------------------
def begin(settings: DaemonSection, shared: bool, ready_fd: int | None) -> Kept:
    """Have the daemon kept as it is configured; may return in another process, a child.

    Raises:
        AlreadyServed, UnsafeDirectory, OSError: as ``SocketDir``.
    """
    given = _given()
    address = os.environ.get(NOTIFY_SOCKET, "")
    parent = os.environ.pop(KEEPER, "")
    if parent and parent == str(os.getppid()):
        return Kept(OWN, FdStore(address, given), int(parent), first=False)
    by = wanted(settings.keeper, os.environ)
    if by == MANAGER:
        return Kept(MANAGER, FdStore(address, given))
    for _, fd in given:
        os.close(fd)
    return Kept() if by == NOBODY else _fork(settings, shared, ready_fd)


def wanted(configured: str, environment: Mapping[str, str]) -> str:
    """Return who is to keep the daemon: NOBODY, OWN or MANAGER."""
    if configured == "auto":
        has_store = environment.get(NOTIFY_SOCKET) and environment.get(FDSTORE, "0") != "0"
        return MANAGER if has_store else OWN
    return OWN if configured == "on" else NOBODY


def _given() -> list[tuple[str, int]]:
    names = listening(os.environ, os.getpid())
    given = list(zip(names, range(LISTEN_FDS_START, LISTEN_FDS_START + len(names)), strict=True))
    for _, fd in given:
        os.set_inheritable(fd, False)
    return given


def _fork(settings: DaemonSection, shared: bool, ready_fd: int | None) -> Kept:
    """Return in a child; this process becomes the keeper."""
    directory = SocketDir(settings.socket_dir, shared)
    sock = _bind(directory)
    keeper_pid = os.getpid()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        sock.close()
        os.environ[NOTIFY_SOCKET] = str(directory.keeper)
        return Kept(OWN, FdStore(str(directory.keeper)), keeper_pid, directory=directory)
    if ready_fd is not None:
        with suppress(OSError):
            os.close(ready_fd)
    os.close(directory.lock)
    charge = _charge(settings, directory, sock, pid, os.pidfd_open(pid), is_child=True)
    first = Keeper(charge, _become_keeper)
    ended = first.run()
    first.close()
    end_like(ended)


def _become_keeper(charge: Charge) -> None:
    for fd in (charge.socket, charge.pidfd, *(fd for _, fd in charge.kept)):
        os.set_inheritable(fd, True)
    command = keeper_command(charge)
    os.execv(command[0], command)


def keeper_command(charge: Charge) -> list[str]:
    """Return how a keeper is run."""
    main = Path(keeper.__file__).with_name("__main__.py")
    return [sys.executable, "-I", "-S", str(main), charge.encode()]


def _charge(
    settings: DaemonSection,
    directory: SocketDir,
    sock: socket.socket,
    pid: int,
    pidfd: int,
    is_child: bool,
) -> Charge:
    as_json = {"json": True, "console": False, "auto": not sys.stderr.isatty()}
    return Charge(
        command=(sys.executable, *sys.orig_argv[1:]), socket=sock.fileno(),
        path=str(directory.keeper), pid=pid, pidfd=pidfd, is_child=is_child,
        limits=resource.getrlimit(resource.RLIMIT_NOFILE), has_served=not is_child,
        delay_max_seconds=settings.restart_delay_max_seconds,
        log_json=as_json[settings.log_format], log_level=settings.log_level,
        debuggable=settings.debuggable,
    )  # fmt: skip


def _bind(directory: SocketDir) -> socket.socket:
    """Return a new notification socket, whose senders the kernel names."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        directory.keeper.unlink(missing_ok=True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind(str(directory.keeper))
        directory.keeper.chmod(0o600)
    except BaseException:
        sock.close()
        raise
    return sock


# --- another keeper -------------------------------------------------------------------------------
class Renewal:
    """Makes keepers that adopt this process."""

    def __init__(self, store: FdStore, directory: SocketDir, settings: DaemonSection) -> None:
        self._store = store
        self._directory = directory
        self._settings = settings

    def __call__(self) -> subprocess.Popen[bytes]:
        """Start a keeper and deposit everything with it.

        Raises:
            OSError: there is no process or descriptor left.
        """
        # bound before there is a keeper, and it has a pidfd of ours: whatever dies when, the
        # deposits are in its queue and it sees our end
        with _bind(self._directory) as sock:
            pidfd = os.pidfd_open(os.getpid())
            try:
                charge = _charge(
                    self._settings, self._directory, sock, os.getpid(), pidfd, is_child=False
                )
                # descriptor 2 may be a pipe that we read ourselves (``corelog``)
                process = subprocess.Popen(
                    keeper_command(charge), pass_fds=(sock.fileno(), pidfd),
                    stdin=subprocess.DEVNULL, stderr=logs.stream.fileno(), env=_environment(),
                )  # fmt: skip
            finally:
                os.close(pidfd)
        self._store.deposit_all()
        return process


def _environment() -> dict[str, str]:
    """Return the environment without our own notification socket, which is not the keeper's."""
    return {name: value for name, value in os.environ.items() if name != NOTIFY_SOCKET}


class Lifeline:
    """A thread that waits for the keeper's end and has another made.

    Args:
        keeper: process of the keeper that there is.
        renew: makes another.
        tell: is told its process.
    """

    def __init__(
        self, keeper: int, renew: Callable[[], subprocess.Popen[bytes]], tell: Callable[[int], None]
    ) -> None:
        self._renew = renew
        self._tell = tell
        self._told, self._closing = os.pipe2(os.O_CLOEXEC)
        self._process: subprocess.Popen[bytes] | None = None
        self._renewed_at = -math.inf
        self._pidfd = _pidfd_of_parent(keeper)
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        os.close(self._closing)
        self._thread.join()
        os.close(self._told)
        if self._pidfd is not None:
            os.close(self._pidfd)

    def _run(self) -> None:
        pause = RETRY_SECONDS
        while not self._is_closing():
            if self._process is not None:
                self._process.wait()
            log.warning("keeper_lost")
            if time.monotonic() - self._renewed_at > SETTLED_SECONDS:
                pause = RETRY_SECONDS
            elif self._waits(pause):
                return
            else:
                # one that dies at once is not made anew at once
                pause = min(2 * pause, RETRY_MAX_SECONDS)
            self._get_another()

    def _get_another(self) -> None:
        self._renewed_at = time.monotonic()
        try:
            self._process = self._renew()
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            log.error("no_keeper", error=str(error))
        else:
            self._tell(self._process.pid)
            log.info("keeper_renewed", keeper=self._process.pid)

    def _is_closing(self) -> bool:
        """Wait for the keeper's end or ours; return whether it is ours."""
        if self._pidfd is None:
            return self._waits(0.0)
        # not select(), which takes no descriptor above 1023
        poll = select.poll()
        for fd in (self._pidfd, self._told):
            poll.register(fd, select.POLLIN)
        closing = self._told in {fd for fd, _ in poll.poll()}
        if not closing:
            os.close(self._pidfd)
            self._pidfd = None
        return closing

    def _waits(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._told, select.POLLIN)
        return bool(poll.poll(seconds * 1e3))


def _pidfd_of_parent(pid: int) -> int | None:
    """Return a pidfd of our keeper, None if it has ended already."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    if os.getppid() == pid:
        return fd
    # the number is another's by now
    os.close(fd)
    return None
