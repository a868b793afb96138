"""Where the lines of a recording go: memory that has an end.

Owns the bytes and the bound. They lie in a memfd, so that a long trace is no burden on the daemon's
heap and is gone with it; who exports reads as far as there is, while more is written.
"""

from __future__ import annotations

import os
import threading

from rmemd.store.system import growing
from rmemd.trace.format import STOP, Line, encode


class Sink:
    """The lines so far. Safe from any thread.

    Attributes:
        limit_bytes: how long the trace may be; its last line comes on top.
        size: bytes written.
        stopped: why nothing more is written, "" while something is.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._fd = growing("rmemd-trace")
        self.size = 0
        self.stopped = ""

    def write(self, line: Line) -> bool:
        """Write a line; return whether there was room. Where there was none, that is the end."""
        data = encode(line)
        with self._lock:
            if self.stopped:
                return False
            if self.size + len(data) > self.limit_bytes:
                self._end("full")
                return False
            self._append(data)
            return True

    def end(self, why: str) -> None:
        """Write the last line, if nothing ended it before."""
        with self._lock:
            if not self.stopped:
                self._end(why)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes from an offset on, fewer at the end."""
        with self._lock:
            return os.pread(self._fd, min(length, max(self.size - offset, 0)), offset)

    def close(self) -> None:
        """Let the bytes go."""
        os.close(self._fd)

    def _end(self, why: str) -> None:
        self.stopped = why
        self._append(encode({STOP: why}))

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, self.size)
            self.size += written
            view = view[written:]
