"""When the daemon was started, across its deaths, and whether it dies again and again.

Owns the record: a memfd that is kept as the memory is, so that the count does not depend on who
starts the daemon. A crash loop is a row of starts, each less than ten seconds after the one before:
ten starts in ten seconds are one, and so are ten that a keeper has spread by its pauses.
"""

from __future__ import annotations

import array
import os
import time
from collections.abc import Callable

from rmemd.store.keeping import Keeping
from rmemd.store.system import growing

LIFE = "life"
ROW_SECONDS = 10.0
REMEMBERED = 1024
_ITEM = array.array("q").itemsize


def boot_clock() -> int:
    """Return nanoseconds since the boot, sleep included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Starts:
    """The starts of one life, this one included.

    Args:
        keeping: where the record is kept.
        clock: nanoseconds, the same for all processes.
    """

    def __init__(self, keeping: Keeping, clock: Callable[[], int] = boot_clock) -> None:
        found = keeping.take(LIFE)
        self._fd = growing("rmemd-life") if found is None else found
        self.times = [*self._read(), clock()][-REMEMBERED:]
        self._write(self.times)
        keeping.keep(LIFE, self._fd)

    @property
    def in_a_row(self) -> int:
        """Return how many starts there were up to this one, each soon after the one before."""
        row = 1
        for earlier, later in zip(self.times[-2::-1], self.times[:0:-1], strict=True):
            if later - earlier >= ROW_SECONDS * 1e9:
                break
            row += 1
        return row

    def forget(self) -> None:
        """Begin a new row with the next start."""
        self._write([])

    def close(self) -> None:
        """Let the record go, as far as this process has it."""
        os.close(self._fd)

    def _read(self) -> list[int]:
        data = os.pread(self._fd, REMEMBERED * _ITEM, 0)
        return list(array.array("q", data[: len(data) - len(data) % _ITEM]))

    def _write(self, times: list[int]) -> None:
        # shorter first: a death in between forgets starts, and makes none up
        os.ftruncate(self._fd, len(times) * _ITEM)
        os.pwrite(self._fd, array.array("q", times).tobytes(), 0)
