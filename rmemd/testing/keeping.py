"""A keeper in this process: what is kept of an engine, and the engine that finds it after a kill.

Owns ``Kept`` and ``reopened``. A kill -9 leaves the memfds as they are at that moment; so what is
reopened is a copy of them, and the engine that was not killed goes on beside it.
"""

from __future__ import annotations

import os
from fcntl import F_ADD_SEALS, F_GET_SEALS, fcntl
from pathlib import Path

from msgspec.structs import replace

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.store.keeping import Keeping


class Kept(Keeping):
    """Keeps descriptors of its own, as a keeper's process does."""

    def __init__(self, found: dict[str, int] | None = None) -> None:
        super().__init__(found)
        self.fds = {name: os.dup(fd) for name, fd in self.found.items()}

    def keep(self, name: str, fd: int) -> None:
        """Keep a descriptor."""
        self.drop(name)
        self.fds[name] = os.dup(fd)

    def drop(self, name: str) -> None:
        """Let go of it."""
        if name in self.fds:
            os.close(self.fds.pop(name))

    def copied(self) -> dict[str, int]:
        """Return what is kept now as memfds of their own, which the present engine cannot reach."""
        return {name: _copy(fd) for name, fd in self.fds.items()}

    def close(self) -> None:
        """Let go of everything."""
        for name in list(self.fds):
            self.drop(name)


def _copy(fd: int) -> int:
    size = os.fstat(fd).st_size
    name = Path(f"/proc/self/fd/{fd}").readlink().name.partition(":")[2].split()[0]
    made = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(made, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(fd, at, os.SEEK_HOLE)
        while at < end:
            at += os.pwrite(made, os.pread(fd, min(end - at, 1 << 20), at), at)
    os.fchmod(made, os.fstat(fd).st_mode)
    fcntl(made, F_ADD_SEALS, fcntl(fd, F_GET_SEALS))
    return made


def kept_engine(kept: Kept, options: Options) -> Engine:
    """Make an engine whose memory outlives it; with the same ``kept`` again, it is reopened."""
    return Engine(replace(options, journalled=True), Guard(clock=lambda: 0.0), kept)


def reopened(kept: Kept, options: Options) -> Engine:
    """Return the engine that comes after a kill at this moment; the present one is not touched.

    Raises:
        Exception: whatever a plugin raises, or what is wrong with the state.
    """
    copy = Kept(kept.copied())
    try:
        return kept_engine(copy, options)
    finally:
        copy.close()
