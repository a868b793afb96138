"""What devices do with a chain: a block device and a checker, on memory that they do not trust.

Owns the requests' layouts. A device copies what a chain has it read, once, and judges the copy:
the guest may change shared memory at any time. What makes no sense is refused by ``BadChain``, and
the request comes back with nothing written.

The block device is virtio-blk (virtio 1.x, 5.2.6) on a file of its own. The checker verifies that
what it reads is the pattern of a seed, then answers with the same words under another seed: the
answer is made of the bytes read, so that one wrong bit in is many wrong bits out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Protocol

from . import pattern
from .ring import BadChain, Buffer, Chain, Regions

SECTOR_BYTES = 512
BLK_HEADER = struct.Struct("<IIQ")
BLK_IN, BLK_OUT, BLK_FLUSH = 0, 1, 4
BLK_OK, BLK_IOERR, BLK_UNSUPP = 0, 1, 2

# what to do, pages, gpa of the first word of the pattern, its seed, the answer's seed
CHECK_HEADER = struct.Struct("<IIQQQ")
CHECK_ECHO, CHECK_RECEIVE = 1, 2
# status, pages that were not the pattern
CHECK_STATUS = struct.Struct("<II")
CHECK_OK, CHECK_WRONG = 0, 1


class Device(Protocol):
    """A device, as its process drives it."""

    def handle(self, chain: Chain, regions: Regions) -> int | None:
        """Do what a chain asks; return how many bytes were written, ``None`` if it is kept.

        Raises:
            BadChain: it makes no sense.
        """
        ...

    def figures(self) -> dict[str, int]:
        """Return what it has counted."""
        ...


class BlockDevice:
    """virtio-blk on a file.

    Args:
        fd: the file.
        capacity_bytes: its size.
    """

    def __init__(self, fd: int, capacity_bytes: int) -> None:
        self._fd = fd
        self._capacity_bytes = capacity_bytes
        self._sectors = 0

    def figures(self) -> dict[str, int]:
        """Return the sectors that it read or wrote."""
        return {"sectors": self._sectors}

    def handle(self, chain: Chain, regions: Regions) -> int:
        """Read or write sectors, or flush."""
        header, data = _headed(chain, regions, BLK_HEADER.size)
        kind, _, sector = BLK_HEADER.unpack(header)
        *into, status = chain.writes or (None,)
        if status is None or status.size != 1:
            raise BadChain(chain.head, "the last buffer is no status byte")
        code, written = self._do(kind, sector * SECTOR_BYTES, data, into, regions)
        regions.store(status.address, bytes([code]))
        return written + 1

    def _do(
        self, kind: int, offset: int, data: bytes, into: Sequence[Buffer], regions: Regions
    ) -> tuple[int, int]:
        if kind == BLK_FLUSH:
            os.fsync(self._fd)
            return BLK_OK, 0
        size = sum(buffer.size for buffer in into) if kind == BLK_IN else len(data)
        if kind not in (BLK_IN, BLK_OUT):
            return BLK_UNSUPP, 0
        if size % SECTOR_BYTES or offset + size > self._capacity_bytes:
            return BLK_IOERR, 0
        self._sectors += size // SECTOR_BYTES
        if kind == BLK_OUT:
            return (BLK_OK if os.pwrite(self._fd, data, offset) == size else BLK_IOERR), 0
        for buffer in into:
            found = os.pread(self._fd, buffer.size, offset)
            if len(found) != buffer.size:
                return BLK_IOERR, 0
            regions.store(buffer.address, found)
            offset += buffer.size
        return BLK_OK, size


class Checker:
    """Verifies patterns and answers with them under another seed; keeps receive buffers.

    Attributes:
        pages: pages that it verified.
        wrong_pages: pages that were not what they should be.
        kept: chains that wait for something to be delivered, oldest first.
    """

    def __init__(self) -> None:
        self.pages = 0
        self.wrong_pages = 0
        self.kept: list[Chain] = []

    def figures(self) -> dict[str, int]:
        """Return the pages verified, and those of them that were wrong."""
        return {"pages": self.pages, "wrong_pages": self.wrong_pages}

    def handle(self, chain: Chain, regions: Regions) -> int | None:
        """Check and answer, or keep a buffer for what will be received."""
        header, data = _headed(chain, regions, CHECK_HEADER.size)
        fields: tuple[int, int, int, int, int] = CHECK_HEADER.unpack(header)
        kind, npages, gpa, seed, reply_seed = fields
        if len(chain.writes) != 2 or chain.writes[1].size != CHECK_STATUS.size:
            raise BadChain(chain.head, "it wants one buffer for the answer and one for the status")
        answer, status = chain.writes
        if kind == CHECK_RECEIVE:
            self.kept.append(chain)
            return None
        size = npages * pattern.PAGE_BYTES
        if kind != CHECK_ECHO or len(data) != size or answer.size != size:
            raise BadChain(chain.head, f"request {kind} of {npages} pages with {len(data)} bytes")
        wrong, reply = pattern.reseed(data, gpa, seed, reply_seed)
        self.pages += npages
        self.wrong_pages += wrong
        regions.store(answer.address, reply)
        regions.store(status.address, CHECK_STATUS.pack(CHECK_WRONG if wrong else CHECK_OK, wrong))
        return size + CHECK_STATUS.size

    def deliver(self, data: bytes, regions: Regions) -> tuple[Chain, int]:
        """Fill the oldest kept buffer with what came in; return its chain and what was written.

        Raises:
            BadChain: the buffer is too small for it.
        """
        chain = self.kept.pop(0)
        into, status = chain.writes
        if into.size < len(data):
            raise BadChain(chain.head, f"{len(data)} bytes for a buffer of {into.size}")
        regions.store(into.address, data)
        regions.store(status.address, CHECK_STATUS.pack(CHECK_OK, 0))
        return chain, len(data) + CHECK_STATUS.size


def _headed(chain: Chain, regions: Regions, size: int) -> tuple[bytes, bytes]:
    """Return the header, which the first buffer is, and a copy of the data behind it."""
    if not chain.reads or chain.reads[0].size != size:
        raise BadChain(chain.head, f"its first buffer is no header of {size} bytes")
    header = regions.load(chain.reads[0].address, size)
    rest = [regions.load(buffer.address, buffer.size) for buffer in chain.reads[1:]]
    return header, rest[0] if len(rest) == 1 else b"".join(rest)


def page_runs(chain: Chain) -> list[tuple[int, int]]:
    """Return the pages that a chain's buffers lie in, as (address, bytes), merged."""
    mask = pattern.PAGE_BYTES - 1
    ordered = sorted(
        (buffer.address & ~mask, (buffer.address + buffer.size + mask) & ~mask)
        for buffer in (*chain.reads, *chain.writes)
    )
    runs: list[list[int]] = []
    for lo, hi in ordered:
        if runs and lo <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], hi)
        else:
            runs.append([lo, hi])
    return [(lo, hi - lo) for lo, hi in runs]
