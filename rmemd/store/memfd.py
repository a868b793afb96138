"""memfds: the only place where rmemd's bytes lie.

Owns the arena (every frame's bytes, never mapped, never handed out) and the shared memfd of a
file (sealed, mode 0600, handed out by descriptor). Only positioned reads and writes are used: a
mapping could be shrunk, torn by a kill or poisoned under us.
"""

from __future__ import annotations

import errno
import os
import stat
from fcntl import F_ADD_SEALS, F_GET_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, fcntl
from pathlib import Path

import numpy as np

from rmemd.store.system import MODE, SYSTEM, System, whole
from rmemd.units import I64, PAGE_SIZE, U8, coalesce

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL
# how the kernel names what may be passed on, and nothing else
SHARED_NAME = "rmemd-file-"


class Memfd:
    """A memfd of a fixed number of pages, read and written by page numbers.

    Args:
        kept: the descriptor of one that an earlier process made, instead of a new one.
        system: makes the system calls.

    Raises:
        OSError: the system refused; ENOSPC and ENOMEM included.
        ValueError: the one that was kept has another size.
    """

    def __init__(
        self, name: str, npages: int, kept: int | None = None, system: System = SYSTEM
    ) -> None:
        self.npages = npages
        self._system = system
        if kept is not None:
            if os.fstat(kept).st_size != npages * PAGE_SIZE:
                raise ValueError(f"{name} has {os.fstat(kept).st_size} bytes, not {npages} pages")
            self.fd = kept
            return
        self.fd = system.make(name)
        try:
            system.resize(self.fd, npages * PAGE_SIZE)
            os.fchmod(self.fd, MODE)
            fcntl(self.fd, F_ADD_SEALS, SEALS)
        except OSError:
            os.close(self.fd)
            raise

    def read(self, numbers: I64) -> U8:
        """Read pages by number: uint8, shape (n, 4096); holes read as zeros."""
        out = np.empty((numbers.size, PAGE_SIZE), dtype=np.uint8)
        at = 0
        for start, count in zip(*_runs(numbers), strict=True):
            view = out[at : at + count].data.cast("B")
            whole(self._system.read, self.fd, view, start * PAGE_SIZE)
            at += count
        return out

    def write(self, numbers: I64, rows: U8) -> None:
        """Write whole pages; ``rows`` is uint8 of shape (n, 4096)."""
        rows = np.ascontiguousarray(rows)
        at = 0
        for start, count in zip(*_runs(numbers), strict=True):
            view = rows[at : at + count].data.cast("B")
            whole(self._system.write, self.fd, view, start * PAGE_SIZE)
            at += count

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Read bytes."""
        data = bytearray(length)
        whole(self._system.read, self.fd, memoryview(data), offset)
        return bytes(data)

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Write bytes."""
        whole(self._system.write, self.fd, memoryview(data), offset)

    def punch(self, numbers: I64) -> None:
        """Free pages: they read as zeros, for everybody, at once."""
        self._fallocate(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, numbers)

    def allocate(self, numbers: I64) -> None:
        """Allocate pages that are holes; the others keep their bytes."""
        self._fallocate(FALLOC_FL_KEEP_SIZE, numbers)

    def present(self, start: int, npages: int) -> I64:
        """Return the pages of a range that are not holes, ascending."""
        found = []
        at, end = start * PAGE_SIZE, (start + npages) * PAGE_SIZE
        while at < end:
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            if data >= end:
                break
            at = min(os.lseek(self.fd, data, os.SEEK_HOLE), end)
            found.append(np.arange(data // PAGE_SIZE, at // PAGE_SIZE, dtype=np.int64))
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def open_anew(self, read_only: bool) -> int:
        """Return a descriptor to be passed on, which the caller closes.

        It is another open file: flags that its receiver sets on it (O_APPEND would divert our
        positioned writes) and its offset are not ours.
        """
        flags = os.O_RDONLY if read_only else os.O_RDWR
        return os.open(f"/proc/self/fd/{self.fd}", flags | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor; the bytes go with the last one."""
        os.close(self.fd)

    def _fallocate(self, mode: int, numbers: I64) -> None:
        starts, counts = coalesce(numbers)
        self._system.fallocate_each(self.fd, mode, starts * PAGE_SIZE, counts * PAGE_SIZE)


def _runs(numbers: I64) -> tuple[list[int], list[int]]:
    starts, counts = coalesce(numbers)
    return starts.tolist(), counts.tolist()


def is_sealed(fd: int) -> bool:
    """Return whether a memfd is sealed against shrinking, growing and unsealing, and 0600."""
    try:
        seals = fcntl(fd, F_GET_SEALS)
    except OSError:
        # a socket or a file has none at all
        seals = 0
    return seals & SEALS == SEALS and stat.S_IMODE(os.fstat(fd).st_mode) == MODE


def is_shared_half(fd: int) -> bool:
    """Return whether a descriptor is of a file's shared memfd; the arena is sealed like one."""
    return name_of(fd).startswith(f"/memfd:{SHARED_NAME}") and is_sealed(fd)


def name_of(fd: int) -> str:
    """Return what the kernel calls the file behind a descriptor: "/memfd:rmemd-arena (deleted)"."""
    return str(Path(f"/proc/self/fd/{fd}").readlink())
