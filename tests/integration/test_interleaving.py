"""What meets a suspended transaction waits for it; what it meets at the bytes stays unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from guests import Guest

from rmemd.engine import compact, memory, pins
from rmemd.engine.driver import Steps
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.migrate import Outcome, Report
from rmemd.model.host import Use
from rmemd.units import PAGE_SIZE


def _others(engine: Engine, guest: Guest) -> dict[str, Callable[[], Steps[Any]]]:
    core = engine.core
    handle = engine.pin(guest.file, 0, PAGE_SIZE, "DMA", "device/1")
    core.run(lambda: compact.offline(core, 300, 4, Report()))
    return {
        "pin": lambda: pins.pin(core, guest.file, 5 * PAGE_SIZE, PAGE_SIZE, "DMA", "device/2"),
        "unpin": lambda: pins.unpin(core, handle),
        "online": lambda: compact.online(core, 300, 4),
        "allocate": lambda: guest_allocation(core, guest),
        "close": lambda: memory.close(core, guest.file),
    }


def guest_allocation(core: Any, guest: Guest) -> Steps[int]:
    return memory.fallocate(core, guest.file, 1, 8 * PAGE_SIZE, PAGE_SIZE)


@pytest.mark.parametrize("name", ["pin", "unpin", "online", "allocate", "close"])
def test_an_operation_waits_for_bytes_on_their_way(engine: Engine, name: str) -> None:
    """Population holds the allocator's counts while its bytes move; the other one waits."""
    other = Guest(engine, "null", npages=16)
    other.fill(1, 2, seed=1)
    if name == "unpin":
        # the pin is the last reference, so that letting go frees the frame
        steps = _others(engine, other)[name]
        engine.close_file(other.file)
    else:
        steps = _others(engine, other)[name]
    builder = Guest(engine, "tdx-today", finalized=False)
    core = engine.core
    waiting: list[Steps[Any]] = []

    def hold(step: str) -> None:
        if step != "populate" or waiting:
            return
        assert core.space.holders
        one = core.and_scrub(steps)
        waiting.append(one)
        with core.locked():
            at = next(one)
            while not at.wait:
                if at.work is not None:
                    at.work()
                at = one.send(None)

    core.hold = hold
    builder.populate(0, b"\x5a" * (16 * PAGE_SIZE))
    core.hold = None
    assert waiting
    core.run(lambda: waiting[0])
    assert check(core) == []
    assert not (core.host.use.view == Use.SCRUBBING).any()


def test_a_frame_that_fails_while_it_is_scrubbed_is_not_given_back(engine: Engine) -> None:
    guest = Guest(engine, "null", npages=4)
    guest.fill(0, 1, seed=1)
    pfn = int(guest.pfns(0)[0])
    engine.core.hold = lambda step: engine.poison(pfn) and None if step == "scrub" else None
    guest.punch(0)
    engine.core.hold = None
    assert engine.page(pfn)[1].use is Use.POISONED
    assert check(engine.core) == []


def test_a_frame_that_fails_offline_does_not_come_online(engine: Engine) -> None:
    engine.offline(8, 4)
    engine.poison(9)
    assert engine.online(8, 4) == 3
    assert engine.page(9)[1].use is Use.POISONED
    assert check(engine.core) == []


def test_what_cannot_move_does_not_keep_the_rest_from_moving(engine: Engine) -> None:
    """EACH: private pages without migrate_folio, a poisoned page, and shared pages in one call."""
    guest = Guest(engine, "tdx-today", npages=16)
    guest.fault(0, 4)
    guest.convert(4, 4, private=False)
    guest.write(4, 4, seed=1, private=False)
    private, shared = guest.pfns(0, 4), guest.pfns(4, 4)
    engine.poison(int(shared[0]))
    report = engine.migrate(np.concatenate((private, shared)))
    outcomes = {int(pfn): m.outcome for m in report.moves for pfn in m.src}
    assert [outcomes[pfn] for pfn in private.tolist()] == [Outcome.UNMOVABLE] * 4
    assert [outcomes[pfn] for pfn in shared.tolist()] == [Outcome.FAILED] + [Outcome.MOVED] * 3
    assert guest.holds(5, 3, seed=1, private=False)
    assert check(engine.core) == []
