"""The system calls by which bytes reach memfds, as one object that can be exchanged.

Owns ``System``: the real calls. A simulation hands in one whose Nth call fails, or does less than
it was asked for, as the kernel's may; ``whole`` is what makes up for the latter. Lists of ranges go
through the compiled helper where there is one.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

from rmemd.store.helper import helper
from rmemd.units import I64

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

    def fallocate_each(self, fd: int, mode: int, offsets: I64, lengths: I64) -> None:
        """Allocate or punch ranges (bytes, int64, shape (n,)) in order, up to one that fails.

        EINTR is no failure: the range is begun again, after the signal's handler has run.
        """
        done = 0
        while done < offsets.size:
            more, number = self._fallocate_some(fd, mode, offsets[done:], lengths[done:])
            done += more
            if number not in (0, errno.EINTR):
                raise OSError(number, os.strerror(number))

    def _fallocate_some(self, fd: int, mode: int, offsets: I64, lengths: I64) -> tuple[int, int]:
        """Return how many ranges were done, and the errno of the one that was not, else 0."""
        for done, range_ in enumerate(zip(offsets.tolist(), lengths.tolist(), strict=True)):
            try:
                self.fallocate(fd, mode, *range_)
            except OSError as error:
                if error.errno is None:
                    raise
                return done, error.errno
        return offsets.size, 0


class WholeLists(System):
    """The same calls, those of a list by the compiled helper where there is one.

    A simulation has ``System`` as its base instead, which makes each call by itself.
    """

    def _fallocate_some(self, fd: int, mode: int, offsets: I64, lengths: I64) -> tuple[int, int]:
        compiled = helper()
        make = super()._fallocate_some if compiled is None else compiled.fallocate
        return make(fd, mode, offsets, lengths)


SYSTEM = WholeLists()


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
