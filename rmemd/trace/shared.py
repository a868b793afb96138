"""Shared bytes as inputs: what was read of them is recorded, and given to a replay.

Owns the two views of a file's shared memfd. Clients write there without the engine's knowing, so
what an operation reads of it is not a consequence of other operations.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rmemd.store.memfd import Memfd
from rmemd.trace.format import Line
from rmemd.trace.values import numbers_of, runs_of
from rmemd.units import I64, PAGE_SIZE, U8

Tell = Callable[[dict[str, Any]], None]
Find = Callable[[dict[str, Any]], Line | None]
PAGES, BYTES, PRESENT = "pages", "bytes", "present"


def packed(data: bytes) -> str:
    """Return bytes as text; zeros take nothing."""
    return base64.b64encode(zlib.compress(data, 1)).decode() if any(data) else ""


def unpacked(text: str, length: int) -> bytes:
    """Return the bytes again."""
    return zlib.decompress(base64.b64decode(text)) if text else bytes(length)


class RecordedMemfd(Memfd):
    """A memfd, reads of which are told."""

    def __init__(self, memfd: Memfd, tell: Tell) -> None:
        vars(self).update(vars(memfd))
        self._tell = tell

    def read(self, numbers: I64) -> U8:
        """Read pages."""
        rows = super().read(numbers)
        self._tell({PAGES: runs_of(numbers), "data": packed(rows.tobytes())})
        return rows

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Read bytes."""
        data = super().read_bytes(offset, length)
        self._tell({BYTES: [offset, length], "data": packed(data)})
        return data

    def present(self, start: int, npages: int) -> I64:
        """Return the pages that are not holes."""
        found = super().present(start, npages)
        self._tell({PRESENT: [start, npages], "found": runs_of(found)})
        return found


class FedMemfd(Memfd):
    """A memfd that becomes what a recording read of it, as if clients had just written that."""

    def __init__(self, memfd: Memfd, find: Find) -> None:
        vars(self).update(vars(memfd))
        self._find = find

    def read(self, numbers: I64) -> U8:
        """Read pages."""
        line = self._find({PAGES: runs_of(numbers)})
        if line is not None:
            data = unpacked(line["data"], numbers.size * PAGE_SIZE)
            rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE)
            differs = (rows != super().read(numbers)).any(axis=1)
            self.write(numbers[differs], rows[differs])
        return super().read(numbers)

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Read bytes."""
        line = self._find({BYTES: [offset, length]})
        if line is not None:
            data = unpacked(line["data"], length)
            if data != super().read_bytes(offset, length):
                self.write_bytes(offset, data)
        return super().read_bytes(offset, length)

    def present(self, start: int, npages: int) -> I64:
        """Return the pages that are not holes."""
        line = self._find({PRESENT: [start, npages]})
        if line is not None:
            wanted, there = numbers_of(line["found"]), super().present(start, npages)
            self.allocate(np.setdiff1d(wanted, there))
            self.punch(np.setdiff1d(there, wanted))
        return super().present(start, npages)
