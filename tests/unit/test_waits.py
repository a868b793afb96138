"""The wait graph: what waits is named with whom it waits for, and cycles are found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from guests import Guest
from guests import make_engine as fresh_engine
from hypothesis import given
from hypothesis import strategies as st

from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.engine import Engine
from rmemd.engine.migrate import BATCH_PAGES, Outcome
from rmemd.engine.programme import Opcode
from rmemd.engine.waits import REFUSALS_MAX, Edge, WaitFor, deadlock
from rmemd.errors import Busy, RmemError
from rmemd.units import PAGE_SIZE

PATIENCE = 20.0


class Held:
    """Holds the first operation that comes to a step, in its own thread, until let go."""

    def __init__(self, core: Core, step: str) -> None:
        self._core, self._step = core, step
        self._arrived, self._go = threading.Event(), threading.Event()

    def __call__(self, step: str) -> None:
        if step == self._step and not self._arrived.is_set():
            self._arrived.set()
            assert self._go.wait(PATIENCE)

    @contextmanager
    def running(self, operation: Callable[[], Any]) -> Iterator[None]:
        """Run an operation until it comes to the step; let it go at the end of the block."""
        self._core.hold = self
        thread = threading.Thread(target=operation)
        thread.start()
        try:
            assert self._arrived.wait(PATIENCE)
            yield
        finally:
            self._go.set()
            thread.join(PATIENCE)
            self._core.hold = None
        assert not thread.is_alive()


@contextmanager
def waiting(engine: Engine, operation: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run an operation that has to wait; the block begins when it does."""
    result: list[Any] = []
    waits = threading.Event()
    begun = engine.core.waits.waiting

    @contextmanager
    def told(*args: Any) -> Iterator[None]:
        with begun(*args):
            waits.set()
            yield

    engine.core.waits.waiting = told  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: result.append(operation()))
    thread.start()
    try:
        assert waits.wait(PATIENCE)
        yield result
    finally:
        engine.core.waits.waiting = begun  # type: ignore[method-assign]
    thread.join(PATIENCE)
    assert not thread.is_alive()


def edges(engine: Engine) -> list[Edge]:
    return engine.read(lambda core: core.waits.graph(core.ledger))[1].edges


def test_who_waits_for_a_range_in_progress_names_whose_it_is(engine: Engine) -> None:
    guest = Guest(engine, "tdx-relocate", npages=8)
    guest.fill(0, 4, seed=1)
    held = Held(engine.core, "migrate")
    with waiting_on(engine, guest, held) as revision:
        (edge,) = edges(engine)
    assert edge.waiter.startswith("call ")
    assert edge.waiter.endswith(" fallocate")
    assert edge.holder.endswith(" migrate")
    assert (edge.why, edge.waiting) == ("range in progress", True)
    assert edge.pages == f"file/{guest.file} pgoff 0x0+0x4"
    assert edge.revision == revision
    assert edges(engine) == []


@contextmanager
def waiting_on(engine: Engine, guest: Guest, held: Held) -> Iterator[int]:
    """A migration held at its bytes, and a punch that waits for it; the revision meanwhile."""
    with (
        waiting_then(engine, lambda: guest.punch(1)) as start,
        held.running(lambda: engine.migrate(guest.pfns(0, 4))),
    ):
        start()
        yield engine.revision
    assert int(guest.frames(1)[0]) == -1


@contextmanager
def waiting_then(engine: Engine, operation: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Give a function that starts an operation and returns when it waits; then wait for its end."""
    stack: list[Any] = []

    def start() -> None:
        stack.append(waiting(engine, operation))
        stack[0].__enter__()

    yield start
    stack[0].__exit__(None, None, None)


def test_who_waits_for_bytes_names_whose_they_are(engine: Engine) -> None:
    """Population holds the allocator's counts while its bytes move."""
    other = Guest(engine, "null", npages=16)
    builder = Guest(engine, "tdx-today", finalized=False)
    held = Held(engine.core, "populate")
    with (
        waiting_then(engine, lambda: other.allocate(0)) as start,
        held.running(lambda: builder.populate(0, b"\x5a" * (16 * PAGE_SIZE))),
    ):
        start()
        (edge,) = edges(engine)
    assert edge.holder.endswith(" populate")
    assert (edge.why, edge.waiting) == ("bytes in flight", True)
    assert edge.pages.startswith("pfn 0x")
    assert edges(engine) == []


def test_a_vcpu_is_named_by_its_vm(engine: Engine) -> None:
    guest = Guest(engine, "tdx-relocate", npages=8)
    guest.fill(0, 4, seed=1)
    touch = guest.do(Opcode.TOUCH, 0, 4)
    engine.set_programme(guest.vm, 0, (touch,))
    held = Held(engine.core, "migrate")
    with (
        waiting_then(engine, lambda: engine.run_vcpu(guest.vm, 0)) as start,
        held.running(lambda: engine.migrate(guest.pfns(0, 4))),
    ):
        start()
        (edge,) = edges(engine)
    assert edge.waiter == f"vm/{guest.vm} vcpu 0"


def test_a_step_says_what_it_waits_for_and_one_that_does_not_is_named(engine: Engine) -> None:
    go = threading.Event()

    def wait(on: WaitFor | None) -> Steps[None]:
        while not go.is_set():
            yield Step("page fault", wait=True, on=on)

    core = engine.core
    handler = WaitFor("session 9", "page fault handler", "vm/3 gfn 0x10+0x1")
    with waiting_then(engine, lambda: core.run(lambda: wait(handler), "vm/3 vcpu 0")) as start:
        start()
        with waiting_then(engine, lambda: core.run(lambda: wait(None))) as begin:
            begin()
            first, second = edges(engine)
            # they look again whenever something changes, and wait since they began to
            guest = Guest(engine, "null", npages=1)
            guest.fault(0)
            assert {edge.revision for edge in edges(engine)} == {first.revision}
            go.set()
            core.wake()
    assert first == Edge(
        "vm/3 vcpu 0", "session 9", "page fault handler", "vm/3 gfn 0x10+0x1", True, first.revision
    )
    assert (second.holder, second.why) == ("", "page fault")


def test_a_range_is_its_owners_whoever_ran_in_between(
    make_engine: Callable[..., Engine],
) -> None:
    """The first goes on to its second batch while the other is held in its first."""
    npages = 2 * BATCH_PAGES
    engine = make_engine(nframes=8 * npages)
    guest, other = Guest(engine, "tdx-relocate", npages=npages), Guest(engine, "null", npages=4)
    guest.fill(0, npages, seed=1)
    # a fault on pages that have frames touches nothing that the migration holds
    other.allocate(0, 4)
    steps = {"first": "migrate", "other": "fault: looked up"}
    arrived = {"first": threading.Semaphore(0), "other": threading.Semaphore(0)}
    go = {"first": threading.Semaphore(0), "other": threading.Semaphore(0)}

    def hold(step: str) -> None:
        name = threading.current_thread().name
        if step == steps.get(name):
            arrived[name].release()
            assert go[name].acquire(timeout=PATIENCE)

    engine.core.hold = hold
    frames = guest.pfns(0, npages)
    threads = [
        threading.Thread(target=lambda: engine.migrate(frames), name="first"),
        threading.Thread(target=lambda: other.fault(0, 4), name="other"),
    ]
    try:
        threads[0].start()
        assert arrived["first"].acquire(timeout=PATIENCE)
        threads[1].start()
        assert arrived["other"].acquire(timeout=PATIENCE)
        go["first"].release()
        assert arrived["first"].acquire(timeout=PATIENCE)
        with waiting_then(engine, lambda: guest.punch(BATCH_PAGES)) as start:
            start()
            (edge,) = edges(engine)
            go["first"].release()
    finally:
        for semaphore in go.values():
            semaphore.release(4)
        for thread in threads:
            thread.join(PATIENCE)
    numbers = [int(label.split()[1]) for label in (edge.holder, edge.waiter)]
    # the first, the other, the punch: called one after the other
    assert numbers[0] == numbers[1] - 2


# --- refusals -----------------------------------------------------------------------------------
def test_the_holders_of_a_busy_folio_are_named_until_they_let_go(engine: Engine) -> None:
    guest = Guest(engine, "pkvm-gmem", npages=4)
    guest.convert(0, 4, private=False)
    guest.allocate(0, 4)
    one = engine.pin(guest.file, 0, PAGE_SIZE, "DMA", "device/1")
    two = engine.pin(guest.file, 0, PAGE_SIZE, "DMA", "device/2")
    pfn = guest.frames(0)
    for _ in range(3):
        report = engine.migrate(pfn)
        assert report.count(Outcome.BUSY) == 1
    found = edges(engine)
    assert [edge.holder for edge in found] == [f"device/1 pin {one}", f"device/2 pin {two}"]
    assert {(edge.why, edge.waiting) for edge in found} == {("pins", False)}
    assert {edge.pages for edge in found} == {f"pfn {int(pfn[0]):#x}"}
    engine.unpin(one)
    assert [edge.holder for edge in edges(engine)] == [f"device/2 pin {two}"]
    engine.unpin(two)
    assert edges(engine) == []


def test_a_refused_conversion_names_who_holds_the_page(engine: Engine) -> None:
    guest = Guest(engine, "pkvm-gmem", npages=4)
    guest.convert(0, 4, private=False)
    pin = engine.pin(guest.file, PAGE_SIZE, PAGE_SIZE, "DMA", "device/1")
    with pytest.raises(Busy):
        guest.convert(0, 4, private=True)
    (edge,) = edges(engine)
    assert edge.waiter.endswith(" convert file")
    assert (edge.holder, edge.pages) == (f"device/1 pin {pin}", "pgoff 0x1")


def test_refusals_are_bounded_and_the_last_ones_stay(engine: Engine) -> None:
    npages = REFUSALS_MAX + 8
    guest = Guest(engine, "pkvm-gmem", npages=npages)
    guest.convert(0, npages, private=False)
    for page in range(npages):
        engine.pin(guest.file, page * PAGE_SIZE, PAGE_SIZE, "DMA", f"device/{page}")
    for page in range(npages):
        engine.migrate(guest.frames(page))
    found = edges(engine)
    assert len(found) == REFUSALS_MAX
    assert found[-1].holder.startswith(f"device/{npages - 1} ")


def test_an_operation_that_never_waits_leaves_nothing(engine: Engine) -> None:
    guest = Guest(engine, "tdx-today", npages=8)
    guest.fill(0, 4, seed=1)
    engine.migrate(guest.pfns(0, 4))
    waits = engine.core.waits
    assert not waits._waiting
    assert not waits._before
    assert not waits._suspended
    with pytest.raises(RmemError):
        engine.destroy_vm(77)
    assert edges(engine) == []


# --- deadlock -----------------------------------------------------------------------------------
def arc(waiter: str, holder: str, waiting: bool = True) -> Edge:
    return Edge(waiter, holder, "range in progress", "", waiting, 1)


def test_a_cycle_is_found_and_refusals_are_no_waits() -> None:
    assert deadlock([arc("a", "b"), arc("b", "c")]) == []
    assert deadlock([arc("x", "a"), arc("a", "b"), arc("b", "c"), arc("c", "a")]) == ["a", "b", "c"]
    assert deadlock([arc("a", "b"), arc("b", "a", waiting=False)]) == []
    assert deadlock([arc("a", "a")]) == ["a"]


def test_a_long_chain_is_followed_without_recursion() -> None:
    chain = [arc(str(i), str(i + 1)) for i in range(5000)]
    assert deadlock(chain) == []
    assert deadlock([*chain, arc("5000", "4998")]) == ["4998", "4999", "5000"]


ARCS = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("abcde")), max_size=10)


@given(ARCS)
def test_a_cycle_is_found_exactly_where_there_is_one(pairs: list[tuple[str, str]]) -> None:
    known = set(pairs)
    cycles = [
        order
        for n in range(1, 6)
        for order in permutations("abcde", n)
        if all((order[i], order[(i + 1) % n]) in known for i in range(n))
    ]
    found = deadlock(arc(*pair) for pair in pairs)
    assert tuple(found) in cycles if cycles else found == []


def test_two_calls_that_wait_for_each_other_are_told(engine: Engine) -> None:
    """The engine's own operations never do; a plugin's waits could."""
    go = threading.Event()

    def wait(holder: str) -> Steps[None]:
        while not go.is_set():
            yield Step("wait", wait=True, on=WaitFor(holder, "page fault handler"))

    core = engine.core
    with waiting_then(engine, lambda: core.run(lambda: wait("two"), "one")) as start:
        start()
        with waiting_then(engine, lambda: core.run(lambda: wait("one"), "two")) as begin:
            begin()
            graph = engine.read(lambda core: core.waits.graph(core.ledger))[1]
            go.set()
            core.wake()
    assert graph.deadlock == ["one", "two"]


def test_same_requests_same_names() -> None:
    """Numbers of calls are counted, not drawn: replaying a test gives the same graph."""
    seen = []
    for _ in range(2):
        engine = fresh_engine()
        guest = Guest(engine, "pkvm-gmem", npages=4)
        guest.convert(0, 4, private=False)
        engine.pin(guest.file, 0, PAGE_SIZE, "DMA", "device/1")
        engine.migrate(np.asarray(guest.frames(0)))
        seen.append(edges(engine))
        engine.close()
    assert seen[0] == seen[1] != []
