"""What attributes and conversions cost: thousands of ranges a call, a GiB a call, a map of ranges.

Each is beside what it comes to below us: the same bytes echoed by a bare gRPC server, the kernel's
own punch and fallocate of as much of a memfd, a C loop of the same punches, and a SortedDict of
boundaries, which is what a map of ranges would be otherwise. Journal and hooks are on.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from sortedcontainers import SortedDict

from rmem_client import Client
from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.programme import Instruction, Opcode
from rmemd.hooks.tables import Sparse, TableSpec
from rmemd.store.helper import helper
from rmemd.store.memfd import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Memfd
from rmemd.units import I64, PAGE_SIZE, pages
from tests.bench.harness import (
    ROUNDS,
    Figure,
    LeftOut,
    alone,
    bare_grpc,
    busy,
    in_turn,
    on_cpus,
    paired,
    rmemd,
    timed,
)

RANGES = 8192
GUEST_PAGES = 1 << 18
PROMISED_OPS = 8e6
PRIVATE, SHARED = 8, 0
MAP_RANGES = 1_000_000
MAP_PAGES = 2 * MAP_RANGES
UPDATE = 64
UPDATES = 500


def figures(folder: Path, quick: bool) -> Iterator[Figure | LeftOut]:
    """Yield goals 4, 8 and 11."""
    yield from packed(folder, calls=5 if quick else 20)
    yield in_place(RANGES // 16 if quick else RANGES)
    npages = GUEST_PAGES // 16 if quick else GUEST_PAGES
    size = f"{npages * PAGE_SIZE >> 20} MiB"
    with _guest("tdx-today", npages) as guest:
        yield in_turn(
            f"8 convert {size} in place, populated / the kernel's punch and fallocate",
            partial(_emptied, guest), partial(_kernel, npages), unit="ms", bar=1.03,
        )  # fmt: skip
    for consumer in ("sw-protected", "tdx-today"):
        yield in_turn(
            f"8 convert {size} in place, {consumer}, nothing populated / the same",
            partial(_never_written, consumer, npages), partial(_kernel, npages),
            unit="ms", bar=0.20,
        )  # fmt: skip
    with _guest("sw-protected", npages) as guest:
        yield in_turn(
            f"convert {size} in place, every byte carried over / the same",
            partial(_carried, guest), partial(_kernel, npages), unit="ms",
        )  # fmt: skip
    yield from map_of_ranges()


# --- 4: thousands of ranges in a call ------------------------------------------------------------
def packed(folder: Path, calls: int) -> Iterator[Figure]:
    """Attributes of scattered pages of a guest of 1 GiB, the other way each time."""
    scattered = np.sort(np.random.default_rng(1).choice(GUEST_PAGES, RANGES, replace=False))
    batches = [_batch(scattered, attributes) for attributes in (SHARED, PRIVATE)]
    with on_cpus(1), rmemd(folder) as daemon, bare_grpc(folder) as channel:
        client = Client(daemon.socket_dir)
        vm = _attributes_vm(client)
        echo = channel.unary_unary("/bare.Bare/Echo")

        def ours() -> None:
            for call in range(calls):
                reply = client.vms.set_memory_attributes(vm, batches[call % 2])
                assert reply.done_ranges == RANGES

        client.vms.set_memory_attributes(vm, batches[1])
        yield paired(
            f"4 {RANGES} attribute ranges in one message / echo of the same bytes",
            ours, lambda: [echo(batches[0]) for _ in range(calls)], per=calls, bar=1.5,
        )  # fmt: skip
        yield alone(
            f"4 {RANGES} attribute ranges in one message, ranges a second",
            [calls * RANGES / timed(ours)() for _ in range(ROUNDS)], PROMISED_OPS, unit="ops/s",
        )  # fmt: skip
        client.close()


def _batch(gfns: I64, attributes: int) -> bytes:
    rows = np.empty((gfns.size, 3), dtype="<u8")
    rows[:, 0], rows[:, 1], rows[:, 2] = gfns * PAGE_SIZE, PAGE_SIZE, attributes
    return rows.tobytes()


def _attributes_vm(client: Client) -> int:
    vm = client.vms.create("sw-protected", personality=1)
    size = GUEST_PAGES * PAGE_SIZE
    file = client.files.create(vm, size)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=size, file=file)
    return vm


def in_place(ranges: int) -> Figure | LeftOut:
    """Every other page of a range has bytes; the range becomes shared, and they are destroyed."""
    goal = f"4 {ranges} scattered pages in place / a C loop of the same punches"
    compiled = helper()
    if compiled is None:
        return LeftOut(goal, "the compiled helper is not installed")
    at = pages(0, ranges) * 2 * PAGE_SIZE
    lengths = np.full(ranges, PAGE_SIZE, dtype=np.int64)
    memfd = Memfd("bench", 2 * ranges)

    def loop() -> float:
        memfd.allocate(pages(0, ranges) * 2)
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        return _busy(lambda: compiled.fallocate(memfd.fd, mode, at, lengths))

    def ours() -> float:
        with _guest("tdx-today", 2 * ranges) as guest:
            guest.write_every_other_page()
            return _busy(lambda: guest.convert(SHARED))

    try:
        return in_turn(goal, ours, loop, per=ranges, bar=1.3)
    finally:
        memfd.close()


# --- 8: a GiB in a call --------------------------------------------------------------------------
class _Guest:
    """A guest that converts in place, all of whose pages are there and private."""

    def __init__(self, engine: Engine, consumer: str, npages: int) -> None:
        self.engine, self.npages = engine, npages
        self.size = npages * PAGE_SIZE
        self.vm = engine.create_vm(consumer, in_place=True).info.vm
        self.file = engine.create_file(self.vm, self.size, 1).info.file
        engine.set_memory_region(self.vm, 0, 4, 0, self.size, self.file)
        engine.create_vcpu(self.vm, 0)
        if engine.core.consumers[self.vm].ops.finalize is not None:
            engine.finalize(self.vm)
        engine.fallocate(self.file, 1, 0, self.size)

    def convert(self, attributes: int) -> None:
        """Convert all of it."""
        self.engine.convert_file(self.file, 0, self.size, attributes)

    def write_every_other_page(self) -> None:
        """Have the guest accept each second page of its memory and write to it."""
        data = os.urandom(PAGE_SIZE)
        for gpa in range(0, self.size, 2 * PAGE_SIZE):
            accept = Instruction(Opcode.ACCEPT, gpa, PAGE_SIZE, private=True)
            self.engine.set_programme(self.vm, 0, (accept,))
            exited = self.engine.run_vcpu(self.vm, 0)
            assert exited.reason.name == "HLT", exited
            self.engine.write_guest(self.vm, 0, gpa, data, True)


@contextmanager
def _guest(consumer: str, npages: int) -> Iterator[_Guest]:
    engine = Engine(
        Options(nframes=npages + 4096, seed=1, journalled=True), Guard(time.perf_counter)
    )
    try:
        yield _Guest(engine, consumer, npages)
    finally:
        engine.close()


def _never_written(consumer: str, npages: int) -> float:
    with _guest(consumer, npages) as guest:
        return _busy(lambda: guest.convert(SHARED))


def _emptied(guest: _Guest) -> float:
    # to private it is scrambled, so that every page has bytes
    guest.convert(SHARED)
    guest.convert(PRIVATE)
    return _busy(lambda: guest.convert(SHARED))


def _carried(guest: _Guest) -> float:
    guest.convert(SHARED)
    core = guest.engine.core
    piece = os.urandom(1 << 20)
    for offset in range(0, guest.size, len(piece)):
        core.shared_memory(core.files.get(guest.file)).write_bytes(offset, piece)
    guest.convert(PRIVATE)
    return _busy(lambda: guest.convert(SHARED))


def _kernel(npages: int) -> float:
    """Punch as much out of a memfd, and allocate as much of another, as KVM does on conversion."""
    punched, allocated = Memfd("bench", npages), Memfd("bench", npages)
    every = pages(0, npages)
    punched.allocate(every)
    try:
        return _busy(lambda: (punched.punch(every), allocated.allocate(every)))
    finally:
        punched.close()
        allocated.close()


# --- 11: a map of a million ranges ---------------------------------------------------------------
def map_of_ranges() -> Iterator[Figure]:
    """Update 64 pages of the table that attributes are kept in, undo record included."""
    tracemalloc.start()
    table = Sparse(TableSpec("bench", "sparse", "u1", 1))
    table.apply("put", (pages(0, MAP_RANGES) * 2, 0))
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    starts, counts, _ = table.runs(0, MAP_PAGES)
    assert starts.size == MAP_PAGES
    assert counts.max() == 1
    boundaries = SortedDict((page, page % 2) for page in range(MAP_PAGES))
    taken: list[float] = []
    # each has its own pages each time: what was updated before is coarse, and costs the floor less
    turns, plain_turns = count(), count(1000)

    def ours() -> float:
        writes = [(page, UPDATE, page & 1) for page in _anywhere(next(turns))]
        taken.append(_busy(lambda: update_all(writes)))
        return taken[-1]

    def update_all(writes: Sequence[tuple[int, int, int]]) -> None:
        # what takes an update back lives as long as its transaction, which has one or two
        for args in writes:
            table.apply("fill", args)

    def plainly() -> float:
        at = _anywhere(next(plain_turns))
        return _busy(lambda: [_set(boundaries, page, page + UPDATE, page & 1) for page in at])

    update = f"11 update of {UPDATE} pages in a map of {MAP_RANGES} ranges"
    yield in_turn(f"{update} / SortedDict", ours, plainly, per=UPDATES, bar=0.01)
    yield alone(update, [took / UPDATES * 1e6 for took in taken[1:]], 1, unit="us/op")
    yield alone(
        f"11 bytes a page of a map of {MAP_RANGES} ranges", [nbytes / MAP_PAGES], 1, unit="bytes"
    )


def _anywhere(turn: int) -> list[int]:
    found: list[int] = np.random.default_rng(turn).integers(0, MAP_PAGES - UPDATE, UPDATES).tolist()
    return found


def _set(boundaries: SortedDict[int, int], start: int, end: int, value: int) -> None:
    """Set a range of a map that has a key wherever a value begins."""
    after = boundaries.peekitem(boundaries.bisect_right(end) - 1)[1]
    for key in list(boundaries.irange(start, end, inclusive=(True, False))):
        del boundaries[key]
    boundaries[start] = value
    boundaries[end] = after


def _busy(function: Callable[[], object]) -> float:
    """Return the processor seconds of this thread that a call takes: nothing here waits."""
    return busy(function)()
