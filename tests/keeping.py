"""A keeper in the process of a test: what is kept, and what an engine finds after a crash."""

from __future__ import annotations

import os
from typing import Any

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
    made = os.memfd_create(os.readlink(f"/proc/self/fd/{fd}").partition(":")[2].split()[0])
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
    return made


def kept_engine(kept: Kept, **options: Any) -> Engine:
    """Make an engine whose memory outlives it; with the same ``kept`` again, it is reopened."""
    settings = {"nframes": 4096, "nnodes": 1, "seed": 1, "journalled": True, "life": "one", **options}
    return Engine(Options(**settings), Guard(clock=lambda: 0.0), kept)


def reopened(kept: Kept, **options: Any) -> Engine:
    """Return the engine that comes after a crash at this moment; the present one is not touched."""
    return kept_engine(Kept(kept.copied()), **options)
