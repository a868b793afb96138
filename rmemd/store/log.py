"""The log: frames in two memfds that take turns, so that a killed daemon has lost nothing.

Owns the frames and the checkpoints. Generation g lies in memfd g % 2: a header, the frames of its
checkpoint, a closing frame, and what was appended since. The next generation is written into the
other memfd; it counts once its closing frame is in, and only then the older one is emptied. So
whatever byte a crash comes at, one complete generation can be read.

A frame is (length u32, crc32 u32) and its payload, the first byte of which says what it is. Each
crc goes on from the crc of the frame before, so that no frame is valid behind one that is not.
Only positioned reads and writes are used, as everywhere in the store: a mapping could be torn by a
kill.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import crc32

from msgspec import Struct, field

from rmemd.store import codec
from rmemd.store.codec import JournalUnreadable
from rmemd.store.memfd import FALLOC_FL_KEEP_SIZE
from rmemd.store.system import SYSTEM, growing

FORMAT = 1
MAGIC = b"rmemdlog"
MAX_FRAME_BYTES = (1 << 32) - 1
# memory that is had ahead of the log's end
RESERVE_BYTES = 1 << 20
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_HEAD = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
# what the crc is of, before the payload; and what lies before the payload
_BEGIN = struct.Struct("<Ic").pack
_OPEN = struct.Struct("<IIc").pack
# magic, format of frames, format of entries, generation, boot id; then the caller's header
_HEADER = struct.Struct("<8sIIQ16s")
_OPENING, _CHECKPOINT, _CLOSING, _APPENDED = b"H", b"C", b"E", b"A"


def boot_id() -> bytes:
    """Return the id of this boot of the machine, 16 bytes."""
    return UUID(BOOT_ID.read_text().strip()).bytes


class Found(Struct, frozen=True):
    """What a log holds: the longest valid prefix of its newest complete generation.

    Attributes:
        header: what the caller gave when the generation's checkpoint was begun.
        generation: its number, from 1.
        checkpoint: how many of the frames are the checkpoint's.
        cut: how many bytes after the valid prefix are dropped.
    """

    header: dict[str, Any]
    generation: int
    checkpoint: int
    cut: int
    _scan: _Scan

    @property
    def frames(self) -> Iterator[bytes]:
        """Yield the payloads, the checkpoint's first; to be read before the next checkpoint."""
        for at, length in self._scan.payloads:
            yield _read(self._scan.fd, at, length)


class _Scan(Struct):
    """The valid prefix of one memfd."""

    fd: int
    size: int = 0
    end: int = 0
    crc: int = 0
    generation: int = 0
    header: bytes = b""
    closed_at: int = 0
    checkpoint: int = 0
    payloads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Return whether the checkpoint was closed."""
        return self.closed_at > 0

    @property
    def torn(self) -> bool:
        """Return whether the prefix ends as a crash ends it: with nothing, or part of a frame."""
        left = self.size - self.end
        if left < _HEAD.size:
            return True
        first = _read(self.fd, _HEAD.size, len(_OPENING + MAGIC))
        if not (_OPENING + MAGIC).startswith(first):
            return False
        length, _ = _HEAD.unpack(_read(self.fd, self.end, _HEAD.size))
        return bool(left < _HEAD.size + length)


class Log:
    """Frames, appended one by one, that outlive the process as long as somebody has the memfds.

    Args:
        fds: the memfds of an earlier process; None makes new ones, mode 0600.
        expected: whether a log was in them for sure: then none is damage, and no beginning.

    Attributes:
        fds: the memfds, for whoever keeps them.
        found: what was in them, None if nothing; what follows the valid prefix is cut off.
        generation: the present one, 0 before the first checkpoint.

    Raises:
        JournalUnreadable: the memfds hold a log that cannot be followed.
        OSError: the system refused.
    """

    def __init__(self, fds: tuple[int, int] | None = None, expected: bool = False) -> None:
        self.found = None if fds is None else Log.read(fds)
        if self.found is None and expected:
            raise JournalUnreadable("the log is damaged: there was one, and nothing of it is left")
        self.fds = _make() if fds is None else fds
        self.generation = 0
        self._pen = _Pen(self.fds[0])
        self._closed_at = 0
        self._checkpoint: Checkpoint | None = None
        if self.found is None:
            for fd in self.fds:
                os.ftruncate(fd, 0)
            return
        scan = self.found._scan
        self.generation, self._closed_at = scan.generation, scan.closed_at
        self._pen = _Pen(scan.fd, scan.end, scan.crc)
        os.ftruncate(scan.fd, scan.end)
        os.ftruncate(self.fds[(scan.generation + 1) % 2], 0)

    @staticmethod
    def read(fds: tuple[int, int]) -> Found | None:
        """Return what two memfds hold, and change nothing; None if no checkpoint was ever closed.

        Raises:
            JournalUnreadable: another boot or another version of rmemd wrote it, or no generation
                is complete though one must have been.
        """
        scans = [_scan(fd, parity) for parity, fd in enumerate(fds)]
        complete = [scan for scan in scans if scan.complete]
        if complete:
            newest = max(complete, key=lambda scan: scan.generation)
            header = codec.decode_value(newest.header)
            return Found(
                header, newest.generation, newest.checkpoint, newest.size - newest.end, newest
            )
        if any(scan.generation > 1 or not scan.torn for scan in scans):
            raise JournalUnreadable("the log is damaged: neither memfd holds a closed checkpoint")
        return None

    @property
    def size_bytes(self) -> int:
        """Return the bytes of the present generation."""
        return self._pen.end

    @property
    def since_checkpoint_bytes(self) -> int:
        """Return how many of them were appended after the checkpoint."""
        return self._pen.end - self._closed_at

    def reserve(self, nbytes: int) -> None:
        """Have memory for payloads of so many bytes, so that ``append`` will not want for any.

        Raises:
            OSError: the system refused; the log is as it was.
        """
        self._pen.reserve(nbytes)

    def append(self, payload: bytes) -> None:
        """Write one frame at the end: all of it is read again, or nothing.

        Raises:
            OSError: the system refused, ENOSPC included; the log is as it was.
            ValueError: no checkpoint was closed yet, one is being written, or the payload is
                longer than a frame can be.
        """
        if self.generation == 0 or self._checkpoint is not None:
            raise ValueError("a log takes frames between checkpoints only")
        self._pen.write(_APPENDED, payload)

    def begin_checkpoint(self, header: dict[str, Any]) -> Checkpoint:
        """Begin the next generation in the other memfd; the present one stays until ``commit``.

        Raises:
            OSError: the system refused; the log is as it was.
            ValueError: a checkpoint is being written already.
        """
        if self._checkpoint is not None:
            raise ValueError("a checkpoint is being written already")
        generation = self.generation + 1
        fd = self.fds[generation % 2]
        os.ftruncate(fd, 0)
        opening = _HEADER.pack(MAGIC, FORMAT, codec.FORMAT, generation, boot_id())
        checkpoint = Checkpoint(self, generation, _Pen(fd))
        checkpoint._pen.write(_OPENING, opening + codec.encode_value(header))
        self._checkpoint = checkpoint
        return checkpoint

    def close(self) -> None:
        """Close the memfds; the log goes with the last descriptors of them."""
        for fd in self.fds:
            os.close(fd)

    def _turn(self, checkpoint: Checkpoint) -> None:
        """Make a closed checkpoint the present generation, and empty the older memfd."""
        self.generation, self._pen = checkpoint.generation, checkpoint._pen
        self._closed_at = self._pen.end
        self._checkpoint = None
        # were it to stay it would only be older
        with suppress(OSError):
            os.ftruncate(self.fds[(self.generation + 1) % 2], 0)

    def _give_up(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = None
        with suppress(OSError):
            os.ftruncate(self.fds[checkpoint.generation % 2], 0)


class Checkpoint:
    """The next generation of a log while it is written; nothing can be appended meanwhile.

    After an OSError it is given up, and the log goes on with the present generation. As a context
    manager it is given up at the end, too, unless it was committed.
    """

    def __init__(self, log: Log, generation: int, pen: _Pen) -> None:
        self.generation = generation
        self._log = log
        self._pen = pen

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def write(self, payload: bytes) -> None:
        """Write one frame of the state at which the generation begins.

        Raises:
            OSError: the system refused; the checkpoint is given up.
            ValueError: the payload is longer than a frame can be, or the checkpoint is over.
        """
        self._write(_CHECKPOINT, payload)

    def commit(self) -> None:
        """Make this the generation that is read and appended to, and empty the older memfd.

        Raises:
            OSError: the system refused; the checkpoint is given up.
            ValueError: it is over already.
        """
        self._write(_CLOSING, b"")
        self._log._turn(self)

    def abandon(self) -> None:
        """Give it up; nothing happens if it is over already."""
        if self._log._checkpoint is self:
            self._log._give_up(self)

    def _write(self, kind: bytes, payload: bytes) -> None:
        if self._log._checkpoint is not self:
            raise ValueError("the checkpoint is over")
        try:
            self._pen.write(kind, payload)
        except OSError:
            self.abandon()
            raise


class _Pen:
    """Where the next frame goes in one memfd, and the crc that it begins with."""

    def __init__(self, fd: int, end: int = 0, crc: int = 0) -> None:
        self.fd = fd
        self.end = end
        self.crc = crc
        self._reserved = 0

    def reserve(self, nbytes: int) -> None:
        """Have memory for so many bytes more, in steps that make it rare to ask the system."""
        wanted = self.end + _HEAD.size + 1 + nbytes
        if wanted > self._reserved:
            ahead = wanted + RESERVE_BYTES - self.end
            SYSTEM.fallocate(self.fd, FALLOC_FL_KEEP_SIZE, self.end, ahead)
            self._reserved = self.end + ahead

    def write(self, kind: bytes, payload: bytes) -> None:
        """Write a frame; after an OSError the memfd ends where it ended."""
        length = 1 + len(payload)
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {length} bytes: {MAX_FRAME_BYTES} is the most")
        crc = crc32(payload, crc32(_BEGIN(length, kind), self.crc))
        try:
            _write(self.fd, [_OPEN(length, crc, kind), payload], self.end, _HEAD.size + length)
        except OSError:
            # if this fails, too, the next frame is written over what is there now
            with suppress(OSError):
                os.ftruncate(self.fd, self.end)
            self._reserved = 0
            raise
        self.end += _HEAD.size + length
        self.crc = crc


def _make() -> tuple[int, int]:
    return growing("rmemd-journal-0"), growing("rmemd-journal-1")


def _write(fd: int, buffers: list[bytes], at: int, nbytes: int) -> None:
    """Write buffers one after another, in one call unless the system takes less at a time."""
    left = nbytes - os.pwritev(fd, buffers, at)
    if left:
        rest = memoryview(b"".join(buffers))
        while left:
            left -= os.pwrite(fd, rest[len(rest) - left :], at + len(rest) - left)


def _read(fd: int, at: int, length: int) -> bytes:
    found = os.pread(fd, length, at)
    if len(found) == length:
        return found
    parts = [found]
    while found and sum(map(len, parts)) < length:
        found = os.pread(fd, length - sum(map(len, parts)), at + sum(map(len, parts)))
        parts.append(found)
    return b"".join(parts)


def _scan(fd: int, parity: int) -> _Scan:
    """Read a memfd up to the first frame that is not valid.

    Raises:
        JournalUnreadable: its header is valid, but this daemon cannot follow what it heads.
    """
    scan = _Scan(fd, os.fstat(fd).st_size)
    while frame := _next_frame(scan):
        payload, crc = frame
        kind = payload[:1]
        if scan.end == 0:
            if kind != _OPENING:
                raise JournalUnreadable("the memfd holds something else than a log of rmemd")
            scan.generation, scan.header = _opened(payload[1:])
            if scan.generation % 2 != parity:
                raise JournalUnreadable("the two memfds of the log have changed places")
        elif kind == _CLOSING:
            scan.checkpoint = len(scan.payloads)
            scan.closed_at = scan.end + _HEAD.size + len(payload)
        else:
            scan.payloads.append((scan.end + _HEAD.size + 1, len(payload) - 1))
        scan.end += _HEAD.size + len(payload)
        scan.crc = crc
    return scan


def _next_frame(scan: _Scan) -> tuple[bytes, int] | None:
    if scan.size - scan.end < _HEAD.size:
        return None
    length, crc = _HEAD.unpack(_read(scan.fd, scan.end, _HEAD.size))
    if length == 0 or scan.size - scan.end < _HEAD.size + length:
        return None
    payload = _read(scan.fd, scan.end + _HEAD.size, length)
    found = crc32(payload, crc32(_LENGTH.pack(length), scan.crc))
    return (payload, crc) if found == crc else None


def _opened(header: bytes) -> tuple[int, bytes]:
    """Return the generation and the caller's header.

    Raises:
        JournalUnreadable: another boot or another version wrote it.
    """
    if header[: len(MAGIC)] != MAGIC or len(header) < _HEADER.size:
        raise JournalUnreadable("the memfd holds something else than a log of rmemd")
    _, frames, entries, generation, boot = _HEADER.unpack_from(header)
    if (frames, entries) != (FORMAT, codec.FORMAT):
        raise JournalUnreadable(
            f"the log has format {frames}.{entries}, this rmemd reads {FORMAT}.{codec.FORMAT}"
        )
    if boot != boot_id():
        raise JournalUnreadable(
            f"the log was written in boot {UUID(bytes=boot)}, this is boot {UUID(bytes=boot_id())}"
        )
    return generation, header[_HEADER.size :]
