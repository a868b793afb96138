"""The composition root: start reading here.

Owns the order of things: directory and lock, engine, gRPC bound and started, readiness announced,
signals, drain. ``Daemon`` is what ``rmemd serve`` runs and what a test can run in its own process.

It ends in two ways. ``close`` lets everything go. ``leave`` makes way for a successor that finds
all of it: no new call is taken, those under way end or stop between two steps, and the process
goes as it would by a kill, because coming back from that is the only way in that there is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import asdict

from rmemd.access.callers import Access, policy_of
from rmemd.consumers.discovery import version_of
from rmemd.consumers.guard import Guard
from rmemd.daemon import logs
from rmemd.daemon.config import Config, DaemonSection, TenantLimits
from rmemd.daemon.configload import Sources
from rmemd.daemon.kept import Kept
from rmemd.daemon.observers import Observers
from rmemd.daemon.reload import read_anew
from rmemd.daemon.selfcheck import SelfCheck
from rmemd.daemon.sockets import SocketDir, announce, notify
from rmemd.daemon.starts import Starts
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.quotas import Limits
from rmemd.keeper.protocol import EX_SUCCESSOR
from rmemd.model.host import frames_for
from rmemd.rpc.dispatch import Front
from rmemd.rpc.doors import UnixDoor
from rmemd.rpc.jobs import Jobs
from rmemd.rpc.lifecycle import KeptBy, Lifecycle
from rmemd.rpc.server import UNIX_OPTIONS, RpcServer, make_services
from rmemd.session.server import SessionServer
from rmemd.store.helper import told
from rmemd.units import PAGE_SIZE

if TYPE_CHECKING:
    from rmemd.daemon.tcp import TcpServer

DRAIN_SECONDS = 5.0
# told to the main thread by a byte, where signals tell their numbers
MAKE_WAY = 255
# the kernel's timer slack makes about 70 µs of it, which is what a waking thread needs
BREATH_SECONDS = 1e-5
EEXIST, EINVAL = 17, 22
# the release whose errno is answered where a file range is bound twice
BINDING_OVERLAP_ERRNO = {"6.18": EINVAL, "7.2": EEXIST}

log = structlog.get_logger("rmemd")


class Daemon:
    """An engine served on a socket directory.

    Args:
        config: what it is told; the defaults with another ``socket_dir`` make a daemon.
        sources: where ``config`` is from, so that SIGHUP can read it anew.
        kept: under whose keeping; nobody's by default.
    """

    def __init__(
        self, config: Config, sources: Sources | None = None, kept: Kept | None = None
    ) -> None:
        self.config = config
        self._kept = kept or Kept()
        self._sources = sources
        settings = config.daemon
        # not an Event: a signal that comes just before the main thread sleeps on a lock wakes
        # nobody; a byte in a pipe stays (``signal.set_wakeup_fd`` has the system put it there)
        self._stop, self.wakeup_fd = os.pipe()
        os.set_blocking(self.wakeup_fd, False)
        self._ending = False
        keeping = self._kept.keeping
        self.directory = self._kept.directory(settings, shared=config.access.mode == "shared")
        self._kept.watch(self.directory, settings)
        self.starts = Starts(keeping)
        guard = Guard(time.perf_counter, settings.hook_deadline_seconds, report=_report)
        options = Options(
            nframes=frames_for(settings.host_memory_bytes),
            nnodes=settings.nodes,
            seed=settings.seed,
            binding_overlap_errno=BINDING_OVERLAP_ERRNO[settings.linux_release],
            journalled=bool(self._kept.by),
            life=uuid.uuid4().hex,
        )
        self.engine = Engine(options, guard, keeping)
        self._tell_what_was_recovered()
        self._enter_safe_mode_if_due()
        for found in self.engine.core.registry.found:
            if found.error:
                log.warning("plugin_quarantined", plugin=found.name, error=found.error)
        self.engine.core.breathe = _breathe
        # a step that a fault rule delays does not delay the end
        self._draining = threading.Event()
        self.engine.core.pause = partial(_pause, self._draining)
        self.self_check = SelfCheck(self.engine)
        self.access = Access(self.engine, clock=time.monotonic)
        release = version_of("rmemd")
        self.observers = Observers(config, self.engine, release)
        self._put_in_force(config)
        self.lifecycle = Lifecycle(
            # neither of these holds the daemon, whose idle workers end when it is forgotten
            kept_by=partial(_kept_by, self._kept),
            starts_in_a_row=self.starts.in_a_row,
            make_way=partial(_make_way, self.wakeup_fd),
        )
        self.jobs = Jobs(self.engine)
        self.sessions = SessionServer(
            self.engine, self.access, self.directory.session, observers=self.observers.all
        )
        self.services = make_services(
            self.engine, self.access, release, self.sessions.fds_passed, self.jobs,
            self.lifecycle,
        )  # fmt: skip
        front = Front(
            self.engine, UnixDoor(self.access), self.observers.all, life=self.engine.core.life,
            lifecycle=self.lifecycle,
        )  # fmt: skip
        self.rpc = RpcServer(front, self.services, UNIX_OPTIONS, reflect=True)
        self.tcp: TcpServer | None = None
        if config.tcp.listen:
            # as few daemons do, and none that is on its own
            from rmemd.daemon.tcp import TcpServer

            self.tcp = TcpServer(config.tcp, self.access, front, self.services)

    @property
    def settings(self) -> DaemonSection:
        """Return the [daemon] section."""
        return self.config.daemon

    def start(self, ready_fd: int | None = None) -> None:
        """Bind, serve, announce."""
        self.observers.start()
        self.rpc.bind(f"unix:{self.directory.socket}")
        self._bind_sessions()
        self.directory.let_in()
        self.rpc.start(is_healthy=not self.engine.core.read_only)
        self.sessions.start()
        self._kept.settle()
        tcp = self.tcp.start() if self.tcp is not None else ""
        log.info(
            "serving",
            socket=str(self.directory.socket),
            tcp=tcp,
            seed=self.settings.seed,
            host_memory_bytes=self.engine.core.host.nframes * PAGE_SIZE,
            nodes=self.settings.nodes,
            consumers=sorted(self.engine.core.registry.offers),
            mock=True,
        )
        announce(ready_fd, self.directory.socket)
        # it is loaded by this, so that readiness does not wait for it, and no client either
        log.info("bulk_work", helper=told())

    def stop(self) -> None:
        """Ask the daemon to end; safe in a signal handler."""
        # where the pipe is full of reloads, the byte is lost and this is not
        self._ending = True
        with contextlib.suppress(OSError):
            os.write(self.wakeup_fd, b"\0")

    def wait(self) -> int:
        """Wait until asked to end, then drain and let everything go; reload as often as asked.

        Returns:
            The process's exit status: 0, or EX_SUCCESSOR.
        """
        # each byte is a signal's number, or one of ours
        while not self._ending:
            told = os.read(self._stop, 1)[0]
            if told == MAKE_WAY and not self._ending:
                self.leave()
                return EX_SUCCESSOR
            if told == signal.SIGHUP and not self._ending:
                self.reload()
        self.close()
        return 0

    def reload(self) -> None:
        """Read the configuration anew; apply all that has changed, or nothing (``reload``)."""
        if self._sources is None:
            log.error("reload_refused", why="this daemon was not configured from sources")
            return
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        wanted = read_anew(self._sources, self.config)
        if wanted is not None:
            self.config = wanted
            self._put_in_force(wanted)
        notify("READY=1")

    def _put_in_force(self, config: Config) -> None:
        """Apply what may change while the daemon runs: the reloadable keys, and no others."""
        logs.set_level(config.daemon.log_level)
        core = self.engine.core
        core.guard.deadline_seconds = config.daemon.hook_deadline_seconds
        access = config.access
        self.access.policy = policy_of(access.mode == "shared", os.getuid(), access.admins)
        tenants = {name: _limits(one) for name, one in config.limits.tenants.items()}
        core.quotas.set(_limits(config.limits), tenants)
        self.self_check.every(config.daemon.check_every_seconds, config.daemon.watched_transactions)

    def close(self) -> None:
        """Drain and let everything go."""
        notify("STOPPING=1")
        log.info("draining", seconds=DRAIN_SECONDS)
        self._draining.set()
        self.self_check.close()
        for door in self._doors():
            door.announce_end()
        self.engine.drain()
        self.sessions.stop(DRAIN_SECONDS)
        self.jobs.close(DRAIN_SECONDS)
        self.rpc.stop(DRAIN_SECONDS)
        if self.tcp is not None:
            self.tcp.stop(DRAIN_SECONDS)
        self.observers.close()
        self.engine.close()
        self.directory.close()
        self._kept.close(ending=True)
        self.starts.close()
        for fd in (self._stop, self.wakeup_fd):
            os.close(fd)
        self.wakeup_fd = -1
        log.info("stopped", revision=self.engine.revision)

    # --- making way --------------------------------------------------------------------------
    def leave(self) -> None:
        """Take no more calls, have those under way end, and keep everything for a successor."""
        self.lifecycle.hand_over()
        notify("STATUS=making way for a successor")
        log.info("making_way", seconds=DRAIN_SECONDS)
        self._draining.set()
        self.self_check.close()
        self.engine.drain()
        for door in self._doors():
            door.announce_end()
        # The doors stay open to the end of the process: a server that stops cancels calls that it
        # has not looked at, which their clients take for an answer. What goes on after that time
        # is interrupted as by a death, and resumed as after one.
        if not self.lifecycle.wait_idle(DRAIN_SECONDS):
            log.warning("calls_interrupted")
        # their listener is kept, where those who come back wait for the successor
        self.sessions.stop(DRAIN_SECONDS)
        self.observers.close()
        self.starts.forget()
        self._kept.close(ending=False)
        log.info("made_way", revision=self.engine.revision)

    def _bind_sessions(self) -> None:
        keeping = self._kept.keeping
        listener = self.sessions.bind(keeping.take(SocketDir.LISTENER))
        keeping.keep(SocketDir.LISTENER, listener)

    def _tell_what_was_recovered(self) -> None:
        recovered = self.engine.recovered
        if recovered is not None:
            tell = log.error if recovered.lost else log.info
            tell("recovered", life=self.engine.core.life, **asdict(recovered))

    def _enter_safe_mode_if_due(self) -> None:
        limit, row = self.settings.crash_loop_starts, self.starts.in_a_row
        if limit and row >= limit:
            self.engine.core.read_only = f"safe mode after {row} starts in a row"
            log.error("safe_mode", starts_in_a_row=row, leave_by="rmemctl host upgrade")

    def _doors(self) -> list[RpcServer]:
        return [self.rpc, *([self.tcp.rpc] if self.tcp is not None else [])]


def _limits(of: TenantLimits) -> Limits:
    return Limits(of.frames, of.pinned_pages, of.sessions, of.fds, of.watches)


def _breathe() -> None:
    """Give the interpreter away between two steps of a guest.

    A thread that keeps giving it up for a moment, as one that makes system calls does, is never
    asked to let others in, and takes it back before they have woken: a single running vCPU made
    every other call take a second. It takes a real pause, however short.
    """
    time.sleep(BREATH_SECONDS)


def _kept_by(kept: Kept) -> KeptBy:
    return KeptBy(kept.by, kept.keeper)


def _make_way(wakeup_fd: int) -> None:
    with contextlib.suppress(OSError):
        os.write(wakeup_fd, bytes([MAKE_WAY]))


def _pause(draining: threading.Event, seconds: float) -> None:
    draining.wait(seconds)


def _report(where: str, error: BaseException) -> None:
    log.error("hook_raised", hook=where, exc_info=error)
