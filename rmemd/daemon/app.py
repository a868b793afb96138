"""The composition root: start reading here.

Owns the order of things: directory and lock, engine, gRPC bound and started, readiness announced,
signals, drain. ``Daemon`` is what ``rmemd serve`` runs and what a test can run in its own process.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import structlog

from rmemd.consumers.guard import DEADLINE_SECONDS, Guard
from rmemd.daemon.sockets import SocketDir, announce, notify
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.model.host import frames_for
from rmemd.rpc.server import RpcServer
from rmemd.units import PAGE_SIZE

DRAIN_SECONDS = 5.0
# the kernel's timer slack makes about 70 µs of it, which is what a waking thread needs
BREATH_SECONDS = 1e-5
EEXIST, EINVAL = 17, 22
# the release whose errno is answered where a file range is bound twice
BINDING_OVERLAP_ERRNO = {"6.18": EINVAL, "7.2": EEXIST}

log = structlog.get_logger("rmemd")


@dataclass(frozen=True)
class Settings:
    """What a daemon is started with."""

    socket_dir: Path
    host_memory_bytes: int
    nodes: int = 1
    seed: int = 0
    linux_release: str = "6.18"
    hook_deadline_seconds: float = DEADLINE_SECONDS


class Daemon:
    """An engine served on a socket directory."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # not an Event: a signal that comes just before the main thread sleeps on a lock wakes
        # nobody; a byte in a pipe stays (``signal.set_wakeup_fd`` has the system put it there)
        self._stop, self.wakeup_fd = os.pipe()
        os.set_blocking(self.wakeup_fd, False)
        self.directory = SocketDir(settings.socket_dir)
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
        self.rpc = RpcServer(self.engine, version("rmemd"))

    def start(self, ready_fd: int | None = None) -> None:
        """Bind, serve, announce."""
        self.rpc.bind(f"unix:{self.directory.socket}")
        self.rpc.start()
        announce(ready_fd, self.directory.socket)
        log.info(
            "serving",
            socket=str(self.directory.socket),
            seed=self.settings.seed,
            host_memory_bytes=self.engine.core.host.nframes * PAGE_SIZE,
            nodes=self.settings.nodes,
            consumers=sorted(self.engine.core.registry.offers),
            mock=True,
        )

    def stop(self) -> None:
        """Ask the daemon to end; safe in a signal handler."""
        with contextlib.suppress(OSError):
            os.write(self.wakeup_fd, b"\0")

    def wait(self) -> None:
        """Wait until asked to end, then drain and let everything go."""
        os.read(self._stop, 1)
        self.close()

    def close(self) -> None:
        """Drain and let everything go."""
        notify("STOPPING=1")
        log.info("draining", seconds=DRAIN_SECONDS)
        self.rpc.drain(DRAIN_SECONDS)
        self.engine.close()
        self.directory.close()
        for fd in (self._stop, self.wakeup_fd):
            os.close(fd)
        self.wakeup_fd = -1
        log.info("stopped", revision=self.engine.revision)


def _breathe() -> None:
    """Give the interpreter away between two steps of a guest.

    A thread that keeps giving it up for a moment, as one that makes system calls does, is never
    asked to let others in, and takes it back before they have woken: a single running vCPU made
    every other call take a second. It takes a real pause, however short.
    """
    time.sleep(BREATH_SECONDS)


def _report(where: str, error: BaseException) -> None:
    log.error("hook_raised", hook=where, exc_info=error)
