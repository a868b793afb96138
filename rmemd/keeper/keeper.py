"""The keeper: holds what a daemon has deposited, and starts it again when it dies.

Owns the loop over three things to wait for: messages, signals and the daemon's end. It is a small
stand-in for a service manager with a descriptor store, and does nothing that could fail: it never
looks into what it holds. A daemon that says STOPPING=1, or that was asked to end, ends on purpose;
then everything is let go and the keeper ends as it did. Any other end is a death, unless the daemon
has never served: then there is nothing to keep, and who started it is told how it ended.

At the first start this runs in the process that forked the daemon, which is larger than it needs to
be; once the daemon serves, and no longer waits for a processor, that process executes itself anew
as nothing but a keeper (``slim_down``).
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from rmemd.keeper.charge import Charge
from rmemd.keeper.child import FORWARDED, Child, Ended, start
from rmemd.keeper.log import Log
from rmemd.keeper.protocol import (
    EX_SUCCESSOR,
    KEEPER,
    NOTIFY_SOCKET,
    address_of,
    encode,
)
from rmemd.keeper.store import Message, Store, receive

# before the second restart in a row; each further one waits twice as long
DELAY_SECONDS = 0.1
# a daemon that has lived so long begins a new row
SETTLED_SECONDS = 10.0
# what is between the daemon and us, and not for our own service manager
OURS = frozenset({"FDSTORE", "FDSTOREREMOVE", "FDNAME", "FDPOLL", "BARRIER", "MAINPID"})
ENDING = (signal.SIGTERM, signal.SIGINT)


def delay(deaths: int, longest: float) -> float:
    """Return the seconds to let pass before a restart, after so many deaths in a row."""
    if deaths <= 1:
        return 0.0
    # bounded before it is a number that floats do not have
    return min(DELAY_SECONDS * 2.0 ** min(deaths - 2, 32), longest)


class Keeper:
    """One daemon's keeper, from its charge to the daemon's end.

    Args:
        charge: what to keep.
        slim_down: executes a keeper in this one's place, which is given another charge; None:
            this one stays.
    """

    def __init__(self, charge: Charge, slim_down: Callable[[Charge], None] | None = None) -> None:
        self._charge = charge
        self._slim_down = slim_down
        self._log = Log(charge.log_json, charge.log_level)
        self._sock = socket.socket(fileno=charge.socket)
        self._sock.setblocking(False)
        self._store = Store(charge.kept)
        self._child: Child | None = Child(charge.pid, charge.pidfd, charge.is_child)
        for fd in (charge.socket, charge.pidfd, *(fd for _, fd in charge.kept)):
            os.set_inheritable(fd, False)
        self._has_served = charge.has_served
        self._started_at = time.monotonic()
        self._deaths = 0
        self._died: dict[str, object] = {}
        self._asked: list[int] = []
        self._is_stopping = False
        self._restart_at = 0.0
        # what the daemon deposits must find room here, whatever its own limit is
        resource.setrlimit(resource.RLIMIT_NOFILE, (charge.limits[1], charge.limits[1]))

    def run(self) -> Ended:
        """Keep the daemon until it ends on purpose, and return how it ended."""
        told, tell = os.pipe()
        for fd in (told, tell):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        for one in FORWARDED:
            signal.signal(one, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        if not self._charge.is_child:
            self._log.write("warning", "keeper_adopts", keeper=os.getpid(), pid=self._charge.pid)
        while True:
            ready = self._wait(told)
            if told in ready:
                self._pass_on(os.read(told, 64))
            if self._sock.fileno() in ready:
                self._receive_all()
            if self._child is None:
                if self._asked:
                    return Ended(status=0)
                self._restart_if_due()
            elif self._child.pidfd in ready:
                ended = self._bury(self._child)
                if ended is not None:
                    return ended
            elif self._slim_down is not None and self._has_served:
                self._become_slim(told, self._slim_down, self._child)

    def close(self) -> None:
        """Let everything go."""
        try:
            os.unlink(self._charge.path)  # noqa: PTH108 - pathlib is half the size of us
        except OSError:
            return

    def _become_slim(self, told: int, slim_down: Callable[[Charge], None], child: Child) -> None:
        """Go on as a smaller process; what was signalled meanwhile, that one is told."""
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        with suppress(BlockingIOError):
            self._pass_on(os.read(told, 64))
        # one that ends is not worth it
        if not self._asked and not self._is_stopping:
            # which may be a successor already: the one we were charged with can have died before
            served = self._charge._replace(pid=child.pid, pidfd=child.pidfd, has_served=True)
            slim_down(served._replace(kept=tuple(self._store.kept)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        self._slim_down = None

    def _wait(self, told: int) -> set[int]:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(told, select.POLLIN)
        timeout = None
        if self._child is None:
            timeout = max(self._restart_at - time.monotonic(), 0.0) * 1e3
        else:
            poll.register(self._child.pidfd, select.POLLIN)
        return {fd for fd, _ in poll.poll(timeout)}

    # --- signals -----------------------------------------------------------------------------
    def _pass_on(self, numbers: bytes) -> None:
        for number in numbers:
            if number in ENDING:
                self._end(number)
            elif number in FORWARDED and self._child is not None:
                self._child.send(number)

    def _end(self, number: int) -> None:
        self._asked.append(number)
        if self._child is None:
            return
        # a second one ends it at once; the daemon itself takes no notice of repetitions, because
        # one typed at a terminal, or sent to all of a group, comes to it directly and by us
        self._child.send(number if len(self._asked) == 1 else signal.SIGKILL)

    # --- messages ----------------------------------------------------------------------------
    def _receive_all(self) -> None:
        while True:
            try:
                message = receive(self._sock)
            except BlockingIOError:
                return
            self._hear(message)

    def _hear(self, message: Message) -> None:
        if self._child is None or message.pid != self._child.pid:
            for fd in message.fds:
                os.close(fd)
            self._log.write("warning", "stranger_not_heard", pid=message.pid)
            return
        if not self._store.take(message):
            self._log.write("warning", "deposit_refused", fields=sorted(message.fields))
        if message.fields.get("READY") == "1":
            self._has_served = True
        if message.fields.get("STOPPING") == "1":
            self._is_stopping = True
        self._tell_ours(message.fields)

    def _tell_ours(self, fields: dict[str, str]) -> None:
        """Tell our own service manager, where there is one, what the daemon says of itself."""
        name = os.environ.get(NOTIFY_SOCKET)
        passed = [(key, value) for key, value in fields.items() if key not in OURS]
        if not name or not passed:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(encode(*passed), address_of(name))
            except OSError as error:
                self._log.write("warning", "not_told", error=str(error))

    # --- the daemon's end --------------------------------------------------------------------
    def _bury(self, child: Child) -> Ended | None:
        """Note the daemon's end; return how it ended if that was on purpose."""
        # it may have deposited with its last breath
        self._receive_all()
        ended = child.reap()
        self._child = None
        if len(self._asked) > 1:
            return Ended(signal=self._asked[-1])
        if self._asked or self._is_stopping or not self._has_served:
            return ended
        if ended.status == EX_SUCCESSOR:
            self._deaths = 0
        else:
            self._count_death(child.pid, ended)
        pause = delay(self._deaths, self._charge.delay_max_seconds)
        self._restart_at = time.monotonic() + pause
        if pause:
            self._tell_of_death()
        return None

    def _count_death(self, pid: int, ended: Ended) -> None:
        if time.monotonic() - self._started_at >= SETTLED_SECONDS:
            self._deaths = 0
        self._deaths += 1
        self._died = {
            "pid": pid, "signal": ended.signal, "status": ended.status,
            "deaths": self._deaths, "kept": len(self._store.kept),
        }  # fmt: skip

    def _tell_of_death(self) -> None:
        if self._died:
            self._log.write("error", "daemon_died", **self._died)
            self._died = {}

    def _restart_if_due(self) -> None:
        if time.monotonic() < self._restart_at:
            return
        self._started_at = time.monotonic()
        environment = {
            **os.environ, NOTIFY_SOCKET: self._charge.path, KEEPER: str(os.getpid()),
        }  # fmt: skip
        try:
            self._child = start(
                self._charge.command, environment, self._store.kept, self._charge.limits
            )
        except OSError as error:
            self._tell_of_death()
            self._deaths += 1
            self._restart_at = time.monotonic() + max(
                delay(self._deaths, self._charge.delay_max_seconds), DELAY_SECONDS
            )
            self._log.write("error", "not_restarted", error=str(error))
            return
        # the successor need not wait for that to be written
        self._tell_of_death()
        self._log.write("info", "daemon_restarted", pid=self._child.pid, kept=len(self._store.kept))
