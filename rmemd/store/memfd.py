"""memfds: the only place where rmemd's bytes lie.

Owns the arena (every frame's bytes, never mapped, never handed out) and the shared memfd of a
file (sealed, mode 0600, handed out by descriptor). Only positioned reads and writes are used: a
mapping could be shrunk, torn by a kill or poisoned under us.
"""

from __future__ import annotations

import ctypes
import errno
import os
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, fcntl

import numpy as np

from rmemd.units import I64, PAGE_SIZE, U8, coalesce

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Memfd:
    """A memfd of a fixed number of pages, read and written by page numbers.

    Raises:
        OSError: the system refused; ENOSPC and ENOMEM included.
    """

    def __init__(self, name: str, npages: int) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, npages * PAGE_SIZE)
        os.fchmod(self.fd, 0o600)
        fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
        self.npages = npages

    def read(self, numbers: I64) -> U8:
        """Read pages by number: uint8, shape (n, 4096); holes read as zeros."""
        out = np.empty((numbers.size, PAGE_SIZE), dtype=np.uint8)
        at = 0
        for start, count in zip(*_runs(numbers), strict=True):
            view = out[at : at + count].data.cast("B")
            _full(os.preadv(self.fd, [view], start * PAGE_SIZE), view.nbytes)
            at += count
        return out

    def write(self, numbers: I64, rows: U8) -> None:
        """Write whole pages; ``rows`` is uint8 of shape (n, 4096)."""
        rows = np.ascontiguousarray(rows)
        at = 0
        for start, count in zip(*_runs(numbers), strict=True):
            view = rows[at : at + count].data.cast("B")
            _full(os.pwritev(self.fd, [view], start * PAGE_SIZE), view.nbytes)
            at += count

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Read bytes."""
        data = os.pread(self.fd, length, offset)
        _full(len(data), length)
        return data

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Write bytes."""
        _full(os.pwrite(self.fd, data, offset), len(data))

    def punch(self, numbers: I64) -> None:
        """Free pages: they read as zeros, for everybody, at once."""
        for start, count in zip(*_runs(numbers), strict=True):
            self._fallocate(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, start, count)

    def allocate(self, numbers: I64) -> None:
        """Allocate pages that are holes; the others keep their bytes."""
        for start, count in zip(*_runs(numbers), strict=True):
            self._fallocate(FALLOC_FL_KEEP_SIZE, start, count)

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

    def reopen(self, read_only: bool) -> int:
        """Return a descriptor to be passed on, which the caller closes.

        It is another open file: flags that its receiver sets on it (O_APPEND would divert our
        positioned writes) and its offset are not ours.
        """
        flags = os.O_RDONLY if read_only else os.O_RDWR
        return os.open(f"/proc/self/fd/{self.fd}", flags | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor; the bytes go with the last one."""
        os.close(self.fd)

    def _fallocate(self, mode: int, start: int, count: int) -> None:
        while _fallocate(self.fd, mode, start * PAGE_SIZE, count * PAGE_SIZE) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))


def _runs(numbers: I64) -> tuple[list[int], list[int]]:
    starts, counts = coalesce(numbers)
    return starts.tolist(), counts.tolist()


def _full(done: int, asked: int) -> None:
    if done != asked:
        raise OSError(errno.EIO, f"{done} of {asked} bytes")
