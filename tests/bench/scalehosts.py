"""The hosts that ``scale`` measures: one of each size, with operations that leave it as it was.

Owns what stands around an operation and what is measured on it. Engines have their journal; their
cost is this process's CPU. Of a daemon it is the daemon's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rmem_client.session import Session
from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.journal import CHECKPOINT_BYTES, CHECKPOINT_RATIO
from rmemd.model.sessions import HOST
from rmemd.units import PAGE_SIZE, PMD_PAGES
from tests.bench.harness import rmemd
from tests.guests import Guest, consumers

GIB_PAGES = 1 << 18
CONSUMERS = consumers()
# one whose pages can move, and that converts by attributes
MOVABLE = "tdx-relocate"
# a host with room for all that most axes put there
FRAMES = 4 * GIB_PAGES
# operations of one measurement, cheap ones more often: some milliseconds in all
FEW, MANY = 16, 48
MOVED = 16
TURNS = 64

Costs = Mapping[str, Callable[[], float]]


def per_op(operation: Callable[[], object], times: int) -> Callable[[], float]:
    """Return a function that does it so often and returns the median's seconds of CPU."""

    def once() -> float:
        begun = time.process_time()
        operation()
        return time.process_time() - begun

    return lambda: statistics.median(once() for _ in range(times))


@contextmanager
def _engine(nframes: int) -> Iterator[Engine]:
    options = Options(nframes=nframes, seed=1, journalled=True, life="scale")
    engine = Engine(options, Guard(time.perf_counter))
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def of_guest_size(folder: Path, gib: int) -> Iterator[Costs]:
    """A guest of all of its host's memory, 2 MiB of which are dealt with."""
    with _engine(gib * GIB_PAGES) as engine:
        npages = gib * GIB_PAGES
        guest = Guest(engine, MOVABLE, npages)
        yield {
            "launch and end a guest": per_op(lambda: _launch(engine, npages), FEW),
            **_usual(engine, guest, PMD_PAGES),
        }


@contextmanager
def of_vms(folder: Path, count: int) -> Iterator[Costs]:
    """Other VMs around one: each has 16 pages, half of them shared, and one pinned."""
    with _engine(FRAMES) as engine:
        for _ in range(count):
            other = Guest(engine, "sw-protected", 64, in_place=False)
            other.fault(0, 8)
            other.convert(8, 8, private=False)
            other.fault(8, 8)
            engine.pin(other.file, 8 * PAGE_SIZE, PAGE_SIZE, "dma", "nic")
        guest = Guest(engine, MOVABLE, 4 * PMD_PAGES)
        yield {
            "launch and end a guest": per_op(lambda: _launch(engine, PMD_PAGES), FEW),
            "open and close a session": per_op(lambda: _session(engine), MANY),
            "fault and punch, with the checkpoints": _with_checkpoint(
                engine, lambda: _fault_and_punch(guest, 3 * PMD_PAGES + 64)
            ),
            **_usual(engine, guest, 64),
        }


@contextmanager
def of_ranges(folder: Path, count: int) -> Iterator[Costs]:
    """Attributes that change at every page, on both sides of what is dealt with."""
    before = -(-count // 2)
    window = -(-2 * before // PMD_PAGES) * PMD_PAGES
    behind = window + 4 * PMD_PAGES
    with _engine(FRAMES) as engine:
        guest = Guest(engine, MOVABLE, behind + 2 * (count - before) + PMD_PAGES)
        shared = np.concatenate((
            np.arange(0, 2 * before, 2, dtype=np.int64),
            np.arange(behind, behind + 2 * (count - before), 2, dtype=np.int64),
        ))  # fmt: skip
        with engine.core.tx("ranges") as tx:
            tx.put(engine.core.vms.get(guest.vm).attributes, guest.gfn + shared, 0)
        yield _usual(engine, guest, 64, at=window)


@contextmanager
def of_mapped(folder: Path, count: int) -> Iterator[Costs]:
    """A guest that has so many other pages mapped, and held by its consumer."""
    with _engine(FRAMES) as engine:
        guest = Guest(engine, "tdx-today", 2 * GIB_PAGES)
        guest.fault(4 * PMD_PAGES, count)
        yield _usual(engine, guest, 64)


@contextmanager
def of_consumers(folder: Path, count: int) -> Iterator[Costs]:
    """Guests of so many vendors, 64 pages of each mapped, around one of the smallest consumer."""
    with _engine(FRAMES) as engine:
        for name in CONSUMERS[:count]:
            other = Guest(engine, name, PMD_PAGES)
            other.fault(0, 64)
        guest = Guest(engine, MOVABLE, 4 * PMD_PAGES)
        yield {
            "launch and end a guest": per_op(lambda: _launch(engine, PMD_PAGES), FEW),
            **_usual(engine, guest, 64),
        }


@contextmanager
def of_clients(folder: Path, count: int) -> Iterator[Costs]:
    """Sessions, each with a gRPC client, of one daemon; they call in turn."""
    own = folder / f"clients-{count}"
    own.mkdir()
    with ExitStack() as stack:
        daemon = stack.enter_context(rmemd(own))
        pid = daemon.pid
        sessions = [stack.enter_context(Session.open(daemon.socket_dir)) for _ in range(count)]
        clients = [stack.enter_context(session.client()) for session in sessions]
        files = [
            stack.enter_context(session.create(client.vms.create("sw-protected"), PAGE_SIZE)).file
            for session, client in zip(sessions, clients, strict=True)
        ]

        def pin(i: int) -> None:
            sessions[i].unpin(sessions[i].pin(files[i], 0, PAGE_SIZE))

        def query(i: int) -> None:
            clients[i].host.page(file=files[i], pgoff=0)

        yield {
            "pin and unpin a page on the session socket": _by_turns(pid, pin, count),
            "query a page over gRPC": _by_turns(pid, query, count),
        }


def _by_turns(pid: int, call: Callable[[int], None], count: int) -> Callable[[], float]:
    """Have clients call one after the other; return the daemon's CPU seconds a call."""

    def turns() -> float:
        begun = _cpu_ns(pid)
        for turn in range(TURNS):
            call(turn % count)
        return (_cpu_ns(pid) - begun) / 1e9 / TURNS

    return lambda: statistics.median(turns() for _ in range(FEW))


def _cpu_ns(pid: int) -> int:
    """Return the CPU time of a process's threads so far; its own clock ticks too seldom."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads)


# --- operations --------------------------------------------------------------------------------
def _usual(engine: Engine, guest: Guest, n: int, at: int = 0) -> dict[str, Callable[[], float]]:
    """Return the operations of every axis, on ``n`` pages each: 8 MiB from page ``at`` on."""
    guest.convert(at, 4 * PMD_PAGES, private=True)
    empty, mapped, changing, shared = (at + i * PMD_PAGES for i in range(4))
    guest.fault(mapped, n)
    guest.convert(shared, 1, private=False)
    guest.fault(shared)

    def convert() -> None:
        guest.convert(changing, n, private=False)
        guest.convert(changing, n, private=True)

    def pin() -> None:
        engine.unpin(engine.pin(guest.file, shared * PAGE_SIZE, PAGE_SIZE, "dma", "nic"))

    size = f"{n} pages" if n < PMD_PAGES else "2 MiB"
    costs = {
        f"fault in and punch {size}": per_op(lambda: _fault_and_punch(guest, empty, n), FEW),
        f"convert {size}, and back": per_op(convert, FEW),
        "pin and unpin a page": per_op(pin, MANY),
        "query a page": per_op(lambda: engine.page(int(guest.pfns(mapped)[0])), MANY),
    }
    if guest.consumer.ops.migrate_folio is not None:
        costs[f"migrate {MOVED} pages"] = per_op(
            lambda: engine.migrate(guest.pfns(mapped, MOVED)), FEW
        )
    return costs


def _fault_and_punch(guest: Guest, page: int, n: int = 64) -> None:
    guest.fault(page, n)
    guest.punch(page, n)


def _launch(engine: Engine, npages: int) -> None:
    guest = Guest(engine, MOVABLE, npages)
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)


def _session(engine: Engine) -> None:
    engine.close_session(engine.open_session("", HOST, "unix").session)


def _with_checkpoint(engine: Engine, operation: Callable[[], object]) -> Callable[[], float]:
    """Return what an operation costs with its share of the checkpoints that its records bring."""
    journal = engine.core.journal
    log: Any = journal._log

    def cost() -> float:
        before = log.since_checkpoint_bytes
        own = per_op(operation, FEW)()
        written = (log.since_checkpoint_bytes - before) / FEW
        checkpoint = per_op(journal.begin_generation, 1)()
        worth = max(CHECKPOINT_BYTES, CHECKPOINT_RATIO * log.size_bytes)
        return own + checkpoint * float(written / worth)

    return cost
