"""What a transaction and its record cost: in an engine, in the codec, and in the log.

The floors know less than they would have to: a journal that encodes nothing, MessagePack of values
that are plain lists already, a crc and a copy that no kill has to leave whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from msgspec import Struct, msgpack
from msgspec.structs import astuple

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.hooks.writes import Write
from rmemd.model.files import FLAG_INIT_SHARED, FLAG_MMAP
from rmemd.store.codec import Record, decode, encode_record
from rmemd.store.log import Log
from rmemd.units import PAGE_SIZE, PMD_PAGES
from tests.bench.harness import Figure, on_cpus, paired

PAGES = 64
# pins that stay beside those that are measured
OTHERS, MANY = 64, 4096
# what does not grow, give or take the processor's caches
CONSTANT = 1.5
WIDE = 8192
PAYLOAD = bytes(range(256)) * 2


class Pinning:
    """An engine with pins that stay, beside what is pinned and unpinned."""

    def __init__(self, pages: int, journalled: bool = True, others: int = OTHERS) -> None:
        options = Options(nframes=PMD_PAGES, seed=1, journalled=journalled, kept_records=1)
        self.engine = Engine(options, Guard(time.perf_counter))
        vm = self.engine.create_vm("sw-protected").info.vm
        flags = FLAG_MMAP | FLAG_INIT_SHARED
        self._file = self.engine.create_file(vm, PAGES * PAGE_SIZE, flags).info.file
        self._owner = self.engine.open_session("bench", "host", "socket").owner
        self._bytes = PAGE_SIZE
        self.engine.write_shared(self._file, 0, bytes(PAGES * PAGE_SIZE))
        for _ in range(others):
            self.pin()
        self._bytes = pages * PAGE_SIZE

    def pin(self) -> int:
        """Pin the pages, and return the handle."""
        return self.engine.pin(self._file, 0, self._bytes, "dma", "bench", self._owner)

    def often(self, n: int) -> None:
        """Pin and unpin the pages."""
        for _ in range(n):
            self.engine.unpin(self.pin())


def figures(folder: Path, quick: bool) -> Iterator[Figure]:
    """Yield what there is to watch, and the bar of what must not grow with what there is."""
    n = 200 if quick else 2000
    with on_cpus(1):
        for pages in (1, PAGES):
            name = f"records: a pin or an unpin of {pages} pages / the same with no log"
            yield _pins(name, n, Pinning(pages), Pinning(pages, journalled=False))
        name = f"records: a pin or an unpin among {MANY} others / among {OTHERS}"
        yield _pins(name, n, Pinning(1, others=MANY), Pinning(1), bar=CONSTANT)
        for record in _records():
            yield from _codec(record, max(4 * n // len(record.writes), 1))
        yield _append(10 * n)


def _pins(name: str, n: int, ours: Pinning, floor: Pinning, bar: float | None = None) -> Figure:
    try:
        return paired(name, partial(ours.often, n), partial(floor.often, n), per=2 * n, bar=bar)
    finally:
        ours.engine.close()
        floor.engine.close()


def _records() -> Iterator[Record]:
    """Yield the record of a pin of one page, of one of many, and one of many writes."""
    for pages in (1, PAGES):
        pinning = Pinning(pages)
        pinning.pin()
        yield pinning.engine.core.journal.records[-1]
        pinning.engine.close()
    fills = tuple(Write("vm/1/attributes", "fill", (2 * at, 1, 1)) for at in range(WIDE))
    yield Record(1, "set attributes", fills)


def _often(once: Callable[[], object], n: int) -> None:
    for _ in range(n):
        once()


def _codec(record: Record, n: int) -> Iterator[Figure]:
    data, plain = encode_record(record), _plain(record)
    packed = msgpack.encode(plain)
    name = f"{record.label}, {len(record.writes)} writes, {len(data)} bytes"
    yield paired(
        f"records: encoding {name} / msgpack of lists",
        lambda: _often(partial(encode_record, record), n),
        lambda: _often(partial(msgpack.encode, plain), n), per=n,
    )  # fmt: skip
    yield paired(
        f"records: reading {name} / msgpack to lists",
        lambda: _often(partial(decode, data), n),
        lambda: _often(partial(msgpack.decode, packed), n), per=n,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """Return what a record says without a class or an array."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, Struct):
        return _plain(astuple(value))
    return value


def _append(n: int) -> Figure:
    """Append a record's bytes to the log, against a crc and a copy of them."""
    log = Log()
    log.begin_checkpoint({}).commit()
    room = memoryview(bytearray(n * len(PAYLOAD)))

    def append() -> None:
        for _ in range(n):
            log.reserve(len(PAYLOAD))
            log.append(PAYLOAD)
        # what the log would become, round by round
        log.begin_checkpoint({}).commit()

    def copy() -> None:
        crc = 0
        for at in range(0, len(room), len(PAYLOAD)):
            crc = crc32(PAYLOAD, crc)
            room[at : at + len(PAYLOAD)] = PAYLOAD

    try:
        name = f"records: append of {len(PAYLOAD)} bytes to the log / crc32 and a copy"
        return paired(name, append, copy, per=n)
    finally:
        log.close()
