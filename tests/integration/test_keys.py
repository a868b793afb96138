"""Memory keys end after their VMs: once no frame's bytes are under them, and not before."""

from __future__ import annotations

import numpy as np
import pytest
from guests import Guest, consumers
from helpers import MakeEngine
from keeping import Kept, kept_engine, reopened

from rmemd.engine.engine import Engine
from rmemd.engine.keys import MADE_BETWEEN
from rmemd.units import I64, PAGE_SIZE


def come_and_go(engine: Engine, vms: int, consumer: str = "snp-move") -> None:
    for _ in range(vms):
        guest = Guest(engine, consumer, npages=8)
        guest.fill(0, 1, seed=3)
        engine.destroy_vm(guest.vm)
        engine.close_file(guest.file)


def keys(engine: Engine) -> set[int]:
    return {number for number, _ in engine.core.host.keys.items()}


def keys_of(engine: Engine, pfns: I64) -> set[int]:
    return set(engine.core.host.key.get(pfns).tolist()) - {0}


@pytest.mark.parametrize("consumer", consumers())
def test_vms_that_are_gone_leave_nothing(engine: Engine, consumer: str) -> None:
    stays = Guest(engine, consumer, npages=8)
    stays.fill(0, 4, seed=7)
    come_and_go(engine, 4 * MADE_BETWEEN, consumer)
    assert len(keys(engine)) <= MADE_BETWEEN + 1
    assert len(engine.core.controller._keys) <= MADE_BETWEEN + 2
    assert len(engine.core.ranges._ranges) <= 2
    assert stays.holds(0, 4, seed=7)
    assert not engine.check().violated


def test_a_key_stays_for_as_long_as_bytes_are_under_it(engine: Engine) -> None:
    core = engine.core
    guests = [Guest(engine, name, npages=8) for name in ("null", "snp-move", "snp-swap-disable")]
    for one in guests:
        one.fill(0, 2, seed=9)
    pfns = np.concatenate([one.frames(0, 2) for one in guests])
    for one in guests:
        engine.destroy_vm(one.vm)
    under, seen = keys_of(engine, pfns), core.controller.raw(pfns)
    assert len(under) == len(guests)
    come_and_go(engine, 4 * MADE_BETWEEN)
    assert under <= keys(engine)
    assert (core.controller.raw(pfns) == seen).all()
    for one in guests:
        engine.close_file(one.file)
    come_and_go(engine, 4 * MADE_BETWEEN)
    assert not under & keys(engine)


def test_a_key_stays_for_a_page_that_is_only_referenced(engine: Engine) -> None:
    guest = Guest(engine, "null", npages=8)
    guest.fill(0, 1, seed=9)
    who = engine.open_session("uid:1", "host", "socket").owner
    pfns = engine.get_pages(guest.file, 0, PAGE_SIZE, who)
    under = keys_of(engine, pfns)
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)
    come_and_go(engine, 4 * MADE_BETWEEN)
    assert under
    assert under <= keys(engine)
    engine.put_pages(pfns, who)
    come_and_go(engine, 4 * MADE_BETWEEN)
    assert not under & keys(engine)


def test_nothing_is_forgotten_while_bytes_are_on_their_way(engine: Engine) -> None:
    """What is under way may bring bytes under a key that no frame has yet."""
    guest = Guest(engine, "sw-protected", npages=8, in_place=True)
    guest.fill(0, 1, seed=9)
    begun = []

    def meanwhile(step: str) -> None:
        if step == "convert":
            engine.core.hold = None
            begun.append(step)
            come_and_go(engine, 2 * MADE_BETWEEN)
            assert len(keys(engine)) == 2 * MADE_BETWEEN + 1

    engine.core.hold = meanwhile
    guest.convert(0, 1, private=False)
    assert begun
    come_and_go(engine, 1)
    # the last one's file was there when its VM went
    assert len(keys(engine)) == 2


def test_a_look_is_taken_less_often_where_many_keys_stay(make_engine: MakeEngine) -> None:
    """So that each key pays for a constant share of a look, which goes over all frames in use."""
    engine = make_engine()
    for _ in range(5 * MADE_BETWEEN):
        Guest(engine, "null", npages=1)
    come_and_go(engine, 1)
    stay = len(keys(engine))
    come_and_go(engine, stay - 1)
    assert len(keys(engine)) == 2 * stay - 1
    come_and_go(engine, 1)
    assert len(keys(engine)) == stay


def test_a_successor_looks_when_it_is_due() -> None:
    """The number is kept, as are the keys that bytes are under."""
    kept = Kept()
    engine = kept_engine(kept)
    guest = Guest(engine, "snp-move", npages=8)
    guest.fill(0, 2, seed=9)
    pfns = guest.frames(0, 2)
    engine.destroy_vm(guest.vm)
    come_and_go(engine, MADE_BETWEEN - 2)
    assert len(keys(engine)) == MADE_BETWEEN - 1
    seen = engine.core.controller.raw(pfns)
    later = reopened(kept)
    assert keys(later) == keys(engine)
    for one in (engine, later):
        come_and_go(one, 1)
        # the last one's file was there when its VM went
        assert keys(one) == keys_of(one, pfns) | {MADE_BETWEEN}
        assert (one.core.controller.raw(pfns) == seen).all()
        one.close()
