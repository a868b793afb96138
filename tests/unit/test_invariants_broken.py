"""Each of I1-I25 is broken once, in the state or on the way to it, and that one alone is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from guests import Guest

from rmemd.engine import bracket, convert, fault, frames, memory, pageinvariants
from rmemd.engine.bracket import View, invalidating, unmap
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.fault import LOST_RACE
from rmemd.engine.invariants import check
from rmemd.engine.quotas import Limits
from rmemd.hooks.tx import ByteOp, Tx
from rmemd.hooks.types import Runs, Why
from rmemd.model import buddy
from rmemd.model.host import KEPT, POISON, Stored, Use
from rmemd.model.sessions import GrantRange
from rmemd.store.controller import Contents, MemoryController
from rmemd.units import PAGE_SIZE, pages

Break = Callable[[Engine, Guest, pytest.MonkeyPatch], None]
BREAKS: list[tuple[str, str, str, Break]] = []
FREE = np.array([700])


def breaks(number: str, consumer: str = "null") -> Callable[[Break], Break]:
    """Add a way to break one invariant, on a guest that has written to its first 8 pages."""

    def add(function: Break) -> Break:
        BREAKS.append((number, consumer, function.__name__, function))
        return function

    return add


@contextmanager
def changing(engine: Engine, label: str = "break") -> Iterator[tuple[Core, Tx]]:
    """Change the state behind the engine's back, and yet by a transaction."""
    with engine.core.locked(), engine.core.tx(label) as tx:
        yield engine.core, tx


def opened(engine: Engine, tenant: str = "one") -> Any:
    return engine.open_session(tenant, "host", "socket")


# --- the state -----------------------------------------------------------------------------------
@breaks("I1")
def a_frame_names_another_page(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        tx.put(core.host.pgoff, guest.pfns(0), 50)


@breaks("I2")
def somebody_unnamed_holds_a_page(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        tx.put(core.host.refs, guest.pfns(0), 1)


@breaks("I3")
def a_block_counts_wrongly(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        tx.fill(core.host.free_in_block, 3, 1, 511)


@breaks("I4")
def a_free_frame_is_under_a_key(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        tx.put(core.host.key, FREE, core.host.vm_keys[guest.vm])


@breaks("I5", "tdx-today")
def a_page_is_mapped_as_the_other(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        tx.fill(core.vms.get(guest.vm).attributes, guest.gfn, 1, 0)


@breaks("I7")
def a_guest_maps_another_page(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        vm = core.vms.get(guest.vm)
        tx.put(vm.mirror, pages(guest.gfn, 1), vm.mirror.get(pages(guest.gfn + 1, 1)))


@breaks("I9", "tdx-today")
def what_has_no_hook_is_to_move(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        pageinvariants, "movable_frames", lambda core, pfns: core.host.use.get(pfns) == Use.PRIVATE
    )


@breaks("I12")
def a_kept_frame_is_free(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        tx.put(core.host.flags, FREE, int(KEPT))


@breaks("I13")
def a_healthy_frame_is_out_of_use(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        buddy.take_exactly(core.host, tx, FREE, Use.POISONED)


@breaks("I14")
def a_session_leaves_its_vm(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    one = opened(engine)
    engine.create_vm("null", owner=one.owner)
    with changing(engine) as (core, tx):
        core.sessions.end(tx, one.session)


@breaks("I15")
def a_session_pins_anothers_page(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    one, other = opened(engine), opened(engine, "other")
    vm = engine.create_vm("null", owner=one.owner).info.vm
    file = engine.create_file(vm, PAGE_SIZE).info.file
    engine.pin(file, 0, PAGE_SIZE, "DMA", "x", other.owner)


@breaks("I16")
def a_counter_goes_back(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        tx.set(core.host.counters, "vm", 0)


@breaks("I16")
def bytes_are_under_a_key_that_is_gone(
    engine: Engine, guest: Guest, patch: pytest.MonkeyPatch
) -> None:
    with changing(engine) as (core, tx):
        tx.put(core.host.key, guest.pfns(0), 1 + core.host.counters["key"])


@breaks("I17")
def a_grant_is_past_its_file(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    one = opened(engine)
    with changing(engine) as (core, tx):
        core.sessions.update(tx, one, grants=(GrantRange(guest.file, 60, 5),))


@breaks("I18")
def a_tenant_is_past_its_quota(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    engine.core.quotas.set(Limits(), {"one": Limits(frames=2)})
    vm = engine.create_vm("null", owner=opened(engine).owner).info.vm
    file = engine.create_file(vm, 3 * PAGE_SIZE).info.file
    patch.setattr(engine.core.quotas, "charge_frames", lambda *args: None)
    engine.fallocate(file, 1, 0, 3 * PAGE_SIZE)


@breaks("I19")
def something_changes_without_a_record(
    engine: Engine, guest: Guest, patch: pytest.MonkeyPatch
) -> None:
    engine.core.host.mac.apply("put", (FREE, 7))


@breaks("I20")
def a_memfd_outlives_its_file(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    engine.core.shared.of(99, 1)


@breaks("I21")
def a_revision_is_left_out(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    engine.core.journal.revision += 1
    opened(engine)


@breaks("I23")
def anybody_can_reopen_a_memfd(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    engine.write_shared(guest.file, 0, b"x")
    os.fchmod(engine.core.shared.descriptors()[guest.file], 0o644)


@breaks("I24", "tdx-today")
def an_event_tells_a_page(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    host, pfn = engine.core.host, guest.pfns(0)
    rows, _ = engine.core.controller.read(pfn, host.key.at(int(pfn[0])))
    with changing(engine) as (_, tx):
        tx.emit("debugged", found=rows[0, :64].tobytes().hex())


# --- on the way ----------------------------------------------------------------------------------
@breaks("I6")
def a_frame_is_given_back_before_the_flush(
    engine: Engine, guest: Guest, patch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def late(core: Core, tx: Tx, views: list[View], why: Why) -> Iterator[None]:
        yield
        with invalidating(core, tx, views, why):
            pass

    patch.setattr(memory, "invalidating", late)
    guest.punch(0)


@breaks("I7", "tdx-2022")
def a_consumer_holds_what_it_let_go(
    engine: Engine, guest: Guest, patch: pytest.MonkeyPatch
) -> None:
    patch.setattr(bracket, "_unpin", lambda *args: None)
    guest.punch(0)


@breaks("I8")
def a_bracket_has_no_end(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def endless(core: Core, tx: Tx, views: list[View], why: Why) -> Iterator[None]:
        for view in views:
            unmap(core, tx, view, why)
        yield

    patch.setattr(memory, "invalidating", endless)
    guest.punch(0)


@breaks("I8")
def a_bracket_ends_over_other_pages(
    engine: Engine, guest: Guest, patch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def shorter(core: Core, tx: Tx, views: list[View], why: Why) -> Iterator[None]:
        for view in views:
            runs = unmap(core, tx, view, why)
            part = Runs.of_pages(runs.gfns()[1:], runs.pfns()[1:])
            core.consumer(view.vm).call(tx, "invalidate_end", part, why, True)
        yield

    patch.setattr(memory, "invalidating", shorter)
    guest.punch(0, 4)


@breaks("I8")
def a_fault_does_not_see_that_it_lost(
    engine: Engine, guest: Guest, patch: pytest.MonkeyPatch
) -> None:
    engine.add_fault_rule(guest.vm, LOST_RACE, "injected")
    patch.setattr(fault, "_lost_race", lambda *args: False)
    guest.fault(20, 1)


@breaks("I10", "snp-move")
def a_move_loses_the_page(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    def zeros(self: MemoryController, src: Any, dst: Any, key: int) -> list[Contents]:
        stored = np.full(dst.size, int(Stored.KEY_ZERO), dtype=np.uint8)
        return [Contents(dst, stored, key, np.zeros(dst.size, dtype=np.uint32))]

    patch.setattr(MemoryController, "_relocate", zeros)
    engine.migrate(guest.pfns(0, 2))


@breaks("I11", "tdx-relocate in place")
def a_pinned_page_turns_private(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    guest.convert(0, 2, private=False)
    engine.pin(guest.file, 0, PAGE_SIZE, "DMA", "device/1")
    patch.setattr(convert, "_require_unreferenced", lambda *args: None)
    guest.convert(0, 2, private=True)


@breaks("I12")
def a_leaked_frame_comes_back(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    with changing(engine) as (core, tx):
        buddy.take_exactly(core.host, tx, FREE, Use.LEAKED)
    with changing(engine) as (core, tx):
        buddy.give(core.host, tx, FREE)


@breaks("I13")
def poison_is_taken_off(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    engine.poison(int(FREE[0]))
    with changing(engine) as (core, tx):
        tx.put(core.host.flags, FREE, core.host.flags.get(FREE) & ~POISON)
        buddy.give(core.host, tx, FREE)


@breaks("I13")
def poison_is_told_twice(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    engine.poison(int(FREE[0]))
    with changing(engine) as (_, tx):
        tx.emit("poisoned", pfn=int(FREE[0]))


@breaks("I14")
def the_end_of_a_session_changes_a_file(
    engine: Engine, guest: Guest, patch: pytest.MonkeyPatch
) -> None:
    with changing(engine, "release session") as (core, tx):
        tx.fill(core.files.policies(tx, core.files.get(guest.file))[0], 60, 1, 0)


@breaks("I22")
def a_page_lies_on_another_node(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    engine.set_policy(guest.file, 40 * PAGE_SIZE, PAGE_SIZE, frames.MPOL_BIND, (1,))
    patch.setattr(
        frames, "_by_policy", lambda core, file, pgoffs: [(np.ones(pgoffs.size, bool), (0,))]
    )
    engine.read_shared(guest.file, 40 * PAGE_SIZE, 1)


@breaks("I24")
def a_record_has_a_canary(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    watched = engine.core.watched
    assert watched is not None
    watched.canaries = (b"the guest's own",)
    with changing(engine) as (core, tx):
        tx.set(core.host.counters, "the guest's own", 1)


@breaks("I25")
def a_hook_runs_outside_of_a_step(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    none = Runs.of_pages(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    core = engine.core
    with core.tx("break") as tx:
        core.consumers[guest.vm].call(tx, "invalidate_start", none, Why.PUNCH)
        core.consumers[guest.vm].call(tx, "invalidate_end", none, Why.PUNCH, True)
        core.ranges.invalidated(guest.vm)


@breaks("I25")
def bytes_move_under_the_lock(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    rows = np.zeros((9, PAGE_SIZE), dtype=np.uint8)
    with changing(engine) as (_, tx):
        tx.name_bytes(ByteOp("copy_in", pages(700, 9), 0, rows=rows))


@breaks("I25")
def an_overdue_hook_goes_on(engine: Engine, guest: Guest, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.core, "_freeze_overdue", lambda tx: None)
    engine.core.guard.overdue.append((guest.vm, "null.map", 3.0))
    opened(engine)


# --- each is named -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "consumer", "break_it"),
    [pytest.param(*row[:2], row[3], id=f"{row[0]}-{row[2]}") for row in BREAKS],
)
def test_what_is_broken_is_named_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, number: str, consumer: str, break_it: Break
) -> None:
    name, _, in_place = consumer.partition(" ")
    guest = Guest(engine, name, in_place=bool(in_place) or None)
    guest.fill(0, 8, seed=3)
    assert check(engine.core) == []
    break_it(engine, guest, monkeypatch)
    assert {line.partition(":")[0] for line in check(engine.core)} == {number}, check(engine.core)


def test_every_invariant_is_broken_by_some_test() -> None:
    assert {row[0] for row in BREAKS} == {f"I{number}" for number in range(1, 26)}
