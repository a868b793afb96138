"""The system calls by which bytes reach memfds, as one object that can be exchanged.

Owns ``System``: the real calls. A simulation hands in one whose Nth call fails, or does less than
it was asked for, as the kernel's may; ``whole`` is what makes up for the latter.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

# of every memfd: whoever keeps it has it, and another user does not open it anew by /proc
MODE = 0o600
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class System:
    """The calls of the running kernel. Each raises OSError as the kernel refuses."""

    def make(self, name: str) -> int:
        """Return the descriptor of a new, empty memfd that can be sealed (``memfd_create``)."""
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def resize(self, fd: int, nbytes: int) -> None:
        """Give a memfd its size (``ftruncate``)."""
        os.ftruncate(fd, nbytes)

    def read(self, fd: int, view: memoryview, offset: int) -> int:
        """Read at an offset; return how many bytes (``preadv``)."""
        return os.preadv(fd, [view], offset)

    def write(self, fd: int, view: memoryview, offset: int) -> int:
        """Write at an offset; return how many bytes (``pwritev``)."""
        return os.pwritev(fd, [view], offset)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Allocate or punch a range; EINTR too is raised."""
        if _fallocate(fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


SYSTEM = System()


def growing(name: str) -> int:
    """Return the descriptor of a new memfd for what grows, and nobody but us reads.

    It is no guest's memory, so no simulation has a word in it.

    Raises:
        OSError: the system has no descriptor or memory left.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.fchmod(fd, MODE)
    return fd


def whole(
    call: Callable[[int, memoryview, int], int], fd: int, view: memoryview, offset: int
) -> None:
    """Read or write all of ``view``, however little a call does at a time.

    Raises:
        OSError: the system refused, or a call did nothing (EIO); part may be done.
    """
    done = 0
    while done < view.nbytes:
        try:
            n = call(fd, view[done:], offset + done)
        except InterruptedError:
            continue
        if not n:
            raise OSError(errno.EIO, f"{done} of {view.nbytes} bytes")
        done += n
