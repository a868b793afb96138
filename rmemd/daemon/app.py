"""The composition root: start reading here.

Owns the order of things: directory and lock, engine, gRPC bound and started, readiness announced,
signals, drain. ``Daemon`` is what ``rmemd serve`` runs and what a test can run in its own process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from functools import partial
from importlib.metadata import version

import structlog

from rmemd.access.callers import Access, policy_of
from rmemd.consumers.guard import Guard
from rmemd.daemon import logs
from rmemd.daemon.config import Config, DaemonSection, TenantLimits
from rmemd.daemon.configload import Sources
from rmemd.daemon.observers import Observers
from rmemd.daemon.reload import read_anew
from rmemd.daemon.selfcheck import SelfCheck
from rmemd.daemon.sockets import SocketDir, announce, notify
from rmemd.daemon.tcp import TcpServer
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.quotas import Limits
from rmemd.model.host import frames_for
from rmemd.rpc.dispatch import Front
from rmemd.rpc.doors import UnixDoor
from rmemd.rpc.jobs import Jobs
from rmemd.rpc.server import UNIX_OPTIONS, RpcServer, make_services
from rmemd.session.server import SessionServer
from rmemd.units import PAGE_SIZE

DRAIN_SECONDS = 5.0
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
    """

    def __init__(self, config: Config, sources: Sources | None = None) -> None:
        self.config = config
        self._sources = sources
        settings = config.daemon
        # not an Event: a signal that comes just before the main thread sleeps on a lock wakes
        # nobody; a byte in a pipe stays (``signal.set_wakeup_fd`` has the system put it there)
        self._stop, self.wakeup_fd = os.pipe()
        os.set_blocking(self.wakeup_fd, False)
        self._ending = False
        self.directory = SocketDir(settings.socket_dir, shared=config.access.mode == "shared")
        guard = Guard(time.perf_counter, settings.hook_deadline_seconds, report=_report)
        options = Options(
            nframes=frames_for(settings.host_memory_bytes),
            nnodes=settings.nodes,
            seed=settings.seed,
            binding_overlap_errno=BINDING_OVERLAP_ERRNO[settings.linux_release],
        )
        self.engine = Engine(options, guard)
        for found in self.engine.core.registry.found:
            if found.error:
                log.warning("plugin_quarantined", plugin=found.name, error=found.error)
        self.engine.core.breathe = _breathe
        # a step that a fault rule delays does not delay the end
        self._draining = threading.Event()
        self.engine.core.pause = partial(_pause, self._draining)
        self.self_check = SelfCheck(self.engine)
        self.access = Access(self.engine, clock=time.monotonic)
        self.observers = Observers(config, self.engine, version("rmemd"))
        self._put_in_force(config)
        self.jobs = Jobs(self.engine)
        self.sessions = SessionServer(
            self.engine, self.access, self.directory.session, observers=self.observers.all
        )
        self.services = make_services(
            self.engine, self.access, version("rmemd"), self.sessions.fds_passed, self.jobs
        )
        front = Front(self.engine, UnixDoor(self.access), self.observers.all)
        self.rpc = RpcServer(front, self.services, UNIX_OPTIONS, reflect=True)
        self.tcp: TcpServer | None = None
        if config.tcp.listen:
            self.tcp = TcpServer(config.tcp, self.access, front, self.services)

    @property
    def settings(self) -> DaemonSection:
        """Return the [daemon] section."""
        return self.config.daemon

    def start(self, ready_fd: int | None = None) -> None:
        """Bind, serve, announce."""
        self.observers.start()
        self.rpc.bind(f"unix:{self.directory.socket}")
        self.sessions.bind()
        self.directory.let_in()
        self.rpc.start()
        self.sessions.start()
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

    def stop(self) -> None:
        """Ask the daemon to end; safe in a signal handler."""
        # where the pipe is full of reloads, the byte is lost and this is not
        self._ending = True
        with contextlib.suppress(OSError):
            os.write(self.wakeup_fd, b"\0")

    def wait(self) -> None:
        """Wait until asked to end, then drain and let everything go; reload as often as asked."""
        # each byte is a signal's number, or 0 by ``stop``
        while not self._ending:
            if os.read(self._stop, 1)[0] == signal.SIGHUP and not self._ending:
                self.reload()
        self.close()

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
        self.self_check.every(config.daemon.check_every_seconds)

    def close(self) -> None:
        """Drain and let everything go."""
        notify("STOPPING=1")
        log.info("draining", seconds=DRAIN_SECONDS)
        self._draining.set()
        self.self_check.close()
        doors = [self.rpc, *([self.tcp.rpc] if self.tcp is not None else [])]
        for door in doors:
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
        for fd in (self._stop, self.wakeup_fd):
            os.close(fd)
        self.wakeup_fd = -1
        log.info("stopped", revision=self.engine.revision)


def _limits(of: TenantLimits) -> Limits:
    return Limits(of.frames, of.pinned_pages, of.sessions, of.fds, of.watches)


def _breathe() -> None:
    """Give the interpreter away between two steps of a guest.

    A thread that keeps giving it up for a moment, as one that makes system calls does, is never
    asked to let others in, and takes it back before they have woken: a single running vCPU made
    every other call take a second. It takes a real pause, however short.
    """
    time.sleep(BREATH_SECONDS)


def _pause(draining: threading.Event, seconds: float) -> None:
    draining.wait(seconds)


def _report(where: str, error: BaseException) -> None:
    log.error("hook_raised", hook=where, exc_info=error)
