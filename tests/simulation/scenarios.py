"""What rows of the fault matrix do to an engine: each injection, and what must be true after it.

A scenario makes its own engine, has one thing go wrong at every place where it can, and asserts.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from guests import Guest
from msgspec.structs import replace

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.migrate import Outcome
from rmemd.engine.stepwise import Stepwise
from rmemd.errors import PluginFault, RmemError
from rmemd.hooks.tables import same_state
from rmemd.model.host import Use
from rmemd.model.sessions import Owner
from rmemd.units import PAGE_SIZE

from .faults import MISDEEDS, SHORT, Clock, FaultyConsumers, FaultySystem

TENANT = "uid:1"
# more places than any operation here has
PLACES = 40
KINDS = (
    ("sw-protected", True),
    ("sw-protected", False),
    ("tdx-relocate", False),
    ("snp-move", False),
)


class Bench:
    """An engine whose system and consumers can be made to fail, with one guest of a session."""

    def __init__(self, kind: tuple[str, bool] = KINDS[0]) -> None:
        self.clock, self.system = Clock(), FaultySystem()
        self.faulty = FaultyConsumers(self.clock)
        options = Options(nframes=512, seed=3, system=self.system, kept_records=64)
        self.engine = Engine(options, Guard(self.clock))
        self.core = self.engine.core
        self.core.registry.made = self.faulty.watch
        self.session = self.engine.open_session(TENANT, "host", "socket").session
        self.guest = Guest(self.engine, kind[0], npages=8, in_place=kind[1])
        self.guest.fill(0, 4, seed=5)
        self.guest.convert(4, 2, private=False)
        self.engine.write_shared(self.guest.file, 4 * PAGE_SIZE, b"x" * 64)

    def operations(self) -> dict[str, Callable[[Engine], Any]]:
        """Return calls of every sort, each of which can be made now."""
        guest, size = self.guest, PAGE_SIZE
        by = Owner(TENANT, self.session)
        return {
            "allocate": lambda e: e.fallocate(guest.file, 1, 6 * size, 2 * size),
            "punch": lambda e: e.fallocate(guest.file, 3, 0, 2 * size),
            "to shared": lambda e: guest.convert(0, 2, private=False),
            "to private": lambda e: guest.convert(4, 2, private=True),
            "pre-fault": lambda e: e.pre_fault(guest.vm, guest.gpa(6), 2 * size),
            "migrate": lambda e: e.migrate(guest.frames(0, 2)),
            "pin": lambda e: e.pin(guest.file, 4 * size, size, "DMA", "device/1", by),
            "host write": lambda e: e.write_shared(guest.file, 5 * size, b"y" * 64),
            "guest write": lambda e: e.write_guest(guest.vm, 0, guest.gpa(1), b"z" * 64, True),
            "swap": lambda e: e.swap_consumer(guest.vm),
            "compact": lambda e: e.compact(0),
        }

    def require_sound(self) -> None:
        """Require that every invariant holds, and that nothing is held or in limbo."""
        assert check(self.core) == []
        assert self.core.space.holders == []
        assert not (self.core.host.use.view == Use.SCRUBBING).any()

    def close(self) -> None:
        """Let the engine go."""
        self.engine.close()


@contextmanager
def _bench(kind: tuple[str, bool] = KINDS[0]) -> Iterator[Bench]:
    bench = Bench(kind)
    try:
        yield bench
    finally:
        bench.close()


def _each_place(
    kind: tuple[str, bool], inject: Callable[[Bench, int], None], struck: Callable[[Bench], int],
    after: Callable[[Bench, Exception | None, dict[str, Any]], None],
) -> int:  # fmt: skip
    """Have a fault strike at each place of each operation; return at how many it did."""
    places = 0
    names = tuple(Bench(kind).operations())
    for name in names:
        for nth in range(1, PLACES):
            with _bench(kind) as bench:
                before, had = bench.core.space.snapshot(), struck(bench)
                inject(bench, nth)
                error = _refusal(lambda: bench.operations()[name](bench.engine))  # noqa: B023
                if struck(bench) == had:
                    break
                places += 1
                inject(bench, 0)
                after(bench, error, before)
    return places


def _refusal(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except (RmemError, OSError) as error:
        return error
    return None


# --- the system --------------------------------------------------------------------------------
def each_system_call_fails() -> None:
    """ENOSPC, ENOMEM, EINTR, a short count at the Nth call: refused or done, nothing between."""

    def after(bench: Bench, error: Exception | None, before: dict[str, Any]) -> None:
        bench.core.run(bench.core.scrub)
        bench.require_sound()
        # what it did before is what it would have done anyway: at most pages that are there now
        strays, missing = bench.core.controller.strays()
        assert not strays.size
        assert not missing.size
        assert bench.guest.holds(2, 2, seed=5)

    for kind in KINDS:
        for failure in (errno.ENOSPC, errno.ENOMEM, errno.EINTR, SHORT):
            places = _each_place(
                kind, lambda bench, nth, f=failure: bench.system.fail(nth, f),  # type: ignore[misc]
                lambda bench: bench.system.struck, after,
            )  # fmt: skip
            assert places > 3


def interrupted_and_short_calls_are_gone_on_with() -> None:
    """EINTR and short counts are nobody's refusal."""
    for failure in (errno.EINTR, SHORT):
        with _bench() as bench:
            for nth in range(1, 5):
                for call in bench.operations().values():
                    bench.system.fail(nth, failure)
                    error = _refusal(lambda: call(bench.engine))  # noqa: B023
                    assert not isinstance(error, OSError)


# --- consumers ---------------------------------------------------------------------------------
def a_consumer_misbehaves(misdeed: str) -> None:
    """A hook raises, or answers nonsense, at the Nth call: the transaction has not happened."""

    def after(bench: Bench, error: Exception | None, before: dict[str, Any]) -> None:
        assert error is None or isinstance(error, (PluginFault, RmemError))
        bench.require_sound()
        assert bench.core.consumers[bench.guest.vm] is not None

    for kind in KINDS:
        assert _each_place(
            kind, lambda bench, nth: bench.faulty.fail(nth, misdeed),
            lambda bench: bench.faulty.struck, after,
        )  # fmt: skip


def a_consumer_raises() -> None:
    """It raises an exception, or asks the process to exit."""
    a_consumer_misbehaves("raises")
    a_consumer_misbehaves("exits")


def a_consumer_answers_nonsense() -> None:
    """It answers with what its hook's answer cannot be."""
    a_consumer_misbehaves("nonsense")


def a_consumer_is_overdue() -> None:
    """It takes longer than its deadline: its VM stands still, and no other does."""
    with _bench() as bench:
        other = Guest(bench.engine, "null", npages=2)
        bench.faulty.fail(1, "overdue")
        bench.guest.punch(0)
        states = {vm.info.vm: vm.info.state for vm in bench.core.vms.all()}
        assert states[bench.guest.vm] == "frozen"
        assert states[other.vm] != "frozen"
        other.fault(0)
        bench.require_sound()


def a_consumer_lies_about_a_move() -> None:
    """It agrees to migrate_folio and moves nothing: who watches sees that the digests differ."""
    with _bench(("tdx-relocate", False)) as bench:
        consumer = bench.core.consumers[bench.guest.vm]
        consumer.ops = replace(consumer.ops, migrate_folio=lambda tx, gfns, src, dst: None)
        bench.engine.watch()
        bench.engine.migrate(bench.guest.frames(0, 2))
        assert any(line.startswith("I10") for line in check(bench.core))


# --- clients -----------------------------------------------------------------------------------
def a_client_dies_in_each_step() -> None:
    """Its session is closed while a call of it stands at any step: nothing of it stays behind."""
    for name in Bench().operations():
        for stands in range(6):
            with _bench() as bench:
                bench.core.hold = lambda step: None
                pin = bench.engine.pin(
                    bench.guest.file,
                    5 * PAGE_SIZE,
                    PAGE_SIZE,
                    "DMA",
                    "x",
                    Owner(TENANT, bench.session),
                )
                steps = Stepwise(bench.engine)
                task = steps.start(bench.operations()[name])
                over = False
                for _ in range(stands):
                    over = over or not steps.advance(task)
                task.cancel()
                closing = steps.start(lambda e: e.close_session(bench.session))
                steps.finish()
                closing.value()
                assert bench.session not in {one.session for one in bench.core.sessions.all()}
                assert pin not in {one.pin for one in bench.core.sessions.pins()}
                bench.require_sound()
                if over:
                    break


def a_client_punches_and_scribbles() -> None:
    """It does as it likes with its own shared memfd: only its own pages are other ones."""
    for in_place in (False, True):
        with _bench(("sw-protected", in_place)) as bench:
            guest = bench.guest
            memfd = bench.core.shared_memory(bench.core.files.get(guest.file))
            memfd.punch(np.array([4]))
            memfd.write(np.array([0, 1, 5, 7]), np.full((4, PAGE_SIZE), 7, dtype=np.uint8))
            assert guest.holds(0, 4, seed=5)
            guest.convert(0, 8, private=True)
            assert guest.holds(2, 2, seed=5)
            bench.require_sound()


# --- memory that fails -------------------------------------------------------------------------
def memory_fails_around_a_copy() -> None:
    """hwpoison on the source or on a destination, before or during a copy: one event, one owner."""
    for when, which in (("before", 0), ("during", 0), ("before", 1), ("during", 1)):
        with _bench(("tdx-relocate", False)) as bench:
            _poison_around(bench, when, which)


def _poison_around(bench: Bench, when: str, which: int) -> None:
    src = bench.guest.frames(0, 1)
    free = np.flatnonzero(bench.core.host.use.view == Use.FREE)
    hit = int(src[0] if which == 0 else free[0])
    bench.core.hold = lambda step: None
    steps = Stepwise(bench.engine)
    if when == "before":
        bench.engine.poison(hit)
    task = steps.start(lambda e: e.migrate(src))
    steps.advance(task)
    striking = steps.start(lambda e: e.poison(hit)) if when == "during" else None
    steps.finish()
    assert striking is None or striking.over
    bench.core.hold = None
    moved = [move for move in task.value().moves if move.outcome is Outcome.MOVED]
    assert all(hit not in move.dst.tolist() or when == "during" for move in moved)
    assert bench.core.host.use.at(hit) == Use.POISONED or bench.core.host.owner.at(hit)
    told = [e for e in bench.core.journal.events_after(0) if e.kind == "poisoned"]
    assert len(told) == 1
    bench.require_sound()


def nothing_is_changed_by(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Return whether two snapshots are the same."""
    return not same_state(before, after)


assert set(MISDEEDS) == {"raises", "nonsense", "overdue", "exits"}
