"""The daemon's process, as its keeper has it: started, signalled, waited for.

Owns the order of things at a start (descriptors from 3 on, who they are for, signals as they were)
and what a process ended with. A daemon that was adopted is nobody's child here: how it ended is
not known, only that it did.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence

from rmemd.keeper.protocol import LISTEN_FDNAMES, LISTEN_FDS, LISTEN_FDS_START, LISTEN_PID
from rmemd.keeper.tuples import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# what is passed on to the daemon
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# as a shell says that it could not execute
EX_NOT_EXECUTED = 127


class Ended(NamedTuple):
    """How a process ended: by a signal or with a status; neither of one that was adopted."""

    signal: int = 0
    status: int | None = None


class Child:
    """A daemon.

    Args:
        pid: its process.
        pidfd: the same, which nobody else can come to be.
        is_ours: whether it is a child of this process, and not adopted.
    """

    def __init__(self, pid: int, pidfd: int, is_ours: bool) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self._is_ours = is_ours

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            return

    def reap(self) -> Ended:
        """Return how it ended, which it has."""
        os.close(self.pidfd)
        if not self._is_ours:
            return Ended()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ended(signal=-code) if code < 0 else Ended(status=code)


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    kept: Sequence[tuple[str, int]],
    limits: tuple[int, int],
) -> Child:
    """Start a daemon that finds descriptors as a service manager hands them over.

    Args:
        command: the executable's path, then its arguments.
        environment: all of its environment but $LISTEN_*.
        kept: the descriptors' names and numbers here.
        limits: its RLIMIT_NOFILE.

    Raises:
        OSError: no process could be made.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        pid = os.fork()
        if pid == 0:
            _become(command, environment, kept, limits)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    return Child(pid, os.pidfd_open(pid), is_ours=True)


def end_like(ended: Ended) -> NoReturn:
    """End this process as another has ended."""
    if ended.signal:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if ended.signal != signal.SIGKILL:
            signal.signal(ended.signal, signal.SIG_DFL)
        os.kill(os.getpid(), ended.signal)
    sys.exit(ended.status or 0)


def _become(
    command: Sequence[str],
    environment: Mapping[str, str],
    kept: Sequence[tuple[str, int]],
    limits: tuple[int, int],
) -> None:
    """Turn this process, just forked, into a daemon; never returns."""
    try:
        for number, fd in enumerate(_above([fd for _, fd in kept]), LISTEN_FDS_START):
            os.dup2(fd, number)
            os.close(fd)
        listen = {
            LISTEN_FDS: str(len(kept)),
            LISTEN_FDNAMES: ":".join(name for name, _ in kept),
            LISTEN_PID: str(os.getpid()),
        }
        signal.set_wakeup_fd(-1)
        for one in FORWARDED:
            signal.signal(one, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.execve(command[0], list(command), {**environment, **listen})
    finally:
        os._exit(EX_NOT_EXECUTED)


def _above(fds: list[int]) -> list[int]:
    """Return the descriptors, none of which has a number that one of them is to get."""
    end = LISTEN_FDS_START + len(fds)
    moved = []
    for fd in fds:
        if fd < end:
            moved.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, end))
            os.close(fd)
        else:
            moved.append(fd)
    return moved
