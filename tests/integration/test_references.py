"""References and pins of one page at each step of its life: the table of pkvm.md §7.

Columns: (a) an ordinary VM, (b) no lasting reference (null, sw-protected, tdx-today), (c) TDX as of
2022, (d) pKVM today. Each number pair is (references, long-term pins); a pin shows as 1024
references in the kernel and is counted apart here.
"""

from __future__ import annotations

import pytest
from guests import Guest

from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.migrate import Outcome
from rmemd.errors import FOLIO_BUSY, FOLIO_UNMOVABLE, RmemError
from rmemd.model.host import Use
from rmemd.model.sessions import Owner
from rmemd.units import PAGE_SIZE

STEPS = ("present", "lookup", "installed", "released")
TABLE = {
    "gup": ((1, 0), (2, 0), (2, 0), (1, 0)),
    "null": ((1, 0), (2, 0), (2, 0), (1, 0)),
    "sw-protected": ((1, 0), (2, 0), (2, 0), (1, 0)),
    "tdx-today": ((1, 0), (2, 0), (2, 0), (1, 0)),
    "tdx-2022": ((1, 0), (2, 0), (3, 0), (2, 0)),
    "pkvm-today": ((1, 0), (1, 1), (1, 1), (1, 1)),
}
# step 5: what a migration attempt says
MIGRATION = {
    "gup": Outcome.MOVED,
    "null": Outcome.UNMOVABLE,
    "sw-protected": Outcome.UNMOVABLE,
    "tdx-today": Outcome.UNMOVABLE,
    "tdx-2022": Outcome.UNMOVABLE,
    "pkvm-today": Outcome.UNMOVABLE,
}
every_column = pytest.mark.parametrize("consumer", TABLE)


def _counts(engine: Engine, pfn: int) -> tuple[int, int]:
    page = engine.page(pfn)[1]
    return page.references, page.pins


def _mapped(engine: Engine, consumer: str) -> tuple[Guest, int]:
    guest = Guest(engine, consumer, npages=8)
    guest.fault(0)
    return guest, int(guest.pfns(0)[0])


@every_column
def test_steps_0_to_4_a_fault(engine: Engine, consumer: str) -> None:
    guest = Guest(engine, consumer, npages=8)
    done = engine.pre_fault(guest.vm, guest.gpa(0), PAGE_SIZE, traced=True)
    expected = [(step, *counts) for step, counts in zip(STEPS, TABLE[consumer], strict=True)]
    assert done.trace.steps == expected
    assert done.retries == 0
    assert _counts(engine, int(guest.pfns(0)[0])) == TABLE[consumer][-1]


@every_column
def test_step_2_a_lost_race_leaves_nothing_held_and_retries(engine: Engine, consumer: str) -> None:
    guest = Guest(engine, consumer, npages=8)
    engine.add_fault_rule(guest.vm, "lost_race", "LOST", nth=1, times=1)
    done = engine.pre_fault(guest.vm, guest.gpa(0), PAGE_SIZE, traced=True)
    steps = {step: (refs, pins) for step, refs, pins in done.trace.steps}
    assert done.retries == 1
    assert steps["lost race"] == (1, 0)
    assert [step for step, *_ in done.trace.steps].count("lookup") == 2
    assert _counts(engine, int(guest.pfns(0)[0])) == TABLE[consumer][-1]
    assert check(engine.core) == []


@every_column
def test_step_5_a_migration_attempt(engine: Engine, consumer: str) -> None:
    guest, pfn = _mapped(engine, consumer)
    report = engine.migrate([pfn])
    assert [move.outcome for move in report.moves] == [MIGRATION[consumer]]
    if MIGRATION[consumer] is Outcome.MOVED:
        moved = int(report.moves[0].dst[0])
        assert _counts(engine, moved) == (1, 0)
        assert guest.pfns(0)[0] == -1  # zapped; the next fault finds the new frame
        guest.fault(0)
        assert guest.pfns(0)[0] == moved
    else:
        assert report.moves[0].refusal.reason is FOLIO_UNMOVABLE
        assert _counts(engine, pfn) == TABLE[consumer][-1]


def test_step_5_an_extra_reference_is_named(engine: Engine) -> None:
    guest, pfn = _mapped(engine, "gup")
    handle = engine.pin(guest.file, 0, PAGE_SIZE, "DMA", "device/1")
    report = engine.migrate([pfn])
    assert report.moves[0].refusal.reason is FOLIO_BUSY
    assert [str(h) for h in report.moves[0].refusal.details.holders] == [
        f"device/1 pin {handle} (DMA, pins: 1)"
    ]
    engine.unpin(handle)
    assert engine.migrate([pfn]).count(Outcome.MOVED) == 1


@pytest.mark.parametrize("consumer", ["null", "sw-protected", "tdx-today", "tdx-2022"])
def test_step_6_a_zap_drops_the_mappings_hold(engine: Engine, consumer: str) -> None:
    guest, pfn = _mapped(engine, consumer)
    guest.convert(0, 1, private=False)
    assert guest.pfns(0)[0] == -1
    assert _counts(engine, pfn) == (1, 0)


@pytest.mark.parametrize("consumer", ["null", "sw-protected", "tdx-today", "tdx-2022"])
def test_step_6_truncation_frees_the_page(engine: Engine, consumer: str) -> None:
    guest, pfn = _mapped(engine, consumer)
    guest.punch(0)
    assert _counts(engine, pfn) == (0, 0)
    assert engine.page(pfn)[1].use is Use.FREE


def test_step_6_pkvm_today_is_not_zapped(engine: Engine) -> None:
    guest, pfn = _mapped(engine, "pkvm-today")
    with pytest.raises(RmemError):
        guest.punch(0)
    assert _counts(engine, pfn) == (1, 1)
    assert guest.pfns(0)[0] == pfn


def test_step_6_failed_removal_keeps_the_hold_and_leaks_the_page(engine: Engine) -> None:
    """Row 6': a REMOVE that is busy twice bugs the VM, and the page is nobody's for ever."""
    guest, pfn = _mapped(engine, "tdx-2022")
    engine.add_fault_rule(guest.vm, "TDH_MEM_PAGE_REMOVE", "TDX_OPERAND_BUSY", nth=1, times=2)
    guest.convert(0, 1, private=False)
    assert guest.pfns(0)[0] == -1
    assert _counts(engine, pfn) == (2, 0)
    guest.punch(0)
    page = engine.page(pfn)[1]
    assert (page.references, page.pins) == (1, 0)
    assert [(holder.purpose, holder.count) for holder in page.holders] == [("secure EPT", 1)]
    assert page.use is not Use.FREE
    with pytest.raises(RmemError, match="bugged"):
        guest.fault(1)
    engine.destroy_vm(guest.vm)
    assert engine.page(pfn)[1].use is Use.LEAKED
    assert check(engine.core) == []


def test_step_6_a_page_that_its_file_still_has_is_leaked_when_the_file_goes(
    engine: Engine,
) -> None:
    guest, pfn = _mapped(engine, "tdx-2022")
    engine.add_fault_rule(guest.vm, "TDH_MEM_PAGE_REMOVE", "TDX_OPERAND_BUSY", nth=1, times=2)
    guest.convert(0, 1, private=False)
    assert _counts(engine, pfn) == (2, 0)
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)
    assert engine.page(pfn)[1].use is Use.LEAKED
    assert check(engine.core) == []


def test_step_6_one_busy_removal_is_retried(engine: Engine) -> None:
    guest, pfn = _mapped(engine, "tdx-2022")
    engine.add_fault_rule(guest.vm, "TDH_MEM_PAGE_REMOVE", "TDX_OPERAND_BUSY", nth=1, times=1)
    guest.convert(0, 1, private=False)
    assert _counts(engine, pfn) == (1, 0)


@every_column
def test_step_7_teardown_leaves_the_files_own_reference(engine: Engine, consumer: str) -> None:
    guest, pfn = _mapped(engine, consumer)
    engine.destroy_vm(guest.vm)
    assert _counts(engine, pfn) == (1, 0)
    engine.close_file(guest.file)
    assert _counts(engine, pfn) == (0, 0)
    assert engine.page(pfn)[1].use is Use.FREE
    assert check(engine.core) == []


# --- one half, and every folio of a range: restrictedmem.md §2, flags and in-place conversion ----
@pytest.mark.parametrize("how", ["punch", "poison"])
@pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])
def test_what_happens_to_one_half_leaves_the_mapping_of_the_other(
    engine: Engine, how: str, private: bool
) -> None:
    """The invalidate filter: a punch is of the private half, poison of the half it is found in."""
    guest = Guest(engine, "sw-protected", npages=8, in_place=False)
    guest.allocate(0)
    if not private:
        guest.convert(0, 1, private=False)
    guest.fault(0)
    mapped = int(guest.pfns(0)[0])
    if how == "punch":
        guest.punch(0)
    else:
        engine.poison(int(guest.frames(0)[0]))
    assert guest.pfns(0)[0] == (-1 if private else mapped)
    if not private and how == "poison":
        engine.poison(mapped)
        assert guest.pfns(0)[0] == -1
    assert check(engine.core) == []


def test_in_place_a_punch_unmaps_what_is_shared_too(engine: Engine) -> None:
    guest = Guest(engine, "sw-protected", npages=8, in_place=True)
    guest.convert(0, 1, private=False)
    guest.fault(0)
    guest.punch(0)
    assert guest.pfns(0)[0] == -1


def test_in_place_every_folio_of_the_range_must_be_unreferenced(engine: Engine) -> None:
    """In-place conversion, 4: also those that are private already; the first in the way is told."""
    guest = Guest(engine, "sw-protected", npages=8, in_place=True)
    owner = Owner("uid:1000", engine.open_session("uid:1000", "host", "socket").session)
    pfns = engine.get_pages(guest.file, 2 * PAGE_SIZE, PAGE_SIZE, owner)
    guest.convert(0, 1, private=False)
    with pytest.raises(RmemError) as caught:
        guest.convert(0, 4, private=True)
    assert (caught.value.reason, caught.value.errno) == (FOLIO_BUSY, 11)
    assert caught.value.details.error_offset == 2 * PAGE_SIZE
    assert caught.value.details.state == "private"
    # nothing to convert is nothing to check, and to shared nobody asks
    guest.convert(1, 4, private=True)
    guest.convert(1, 4, private=False)
    guest.convert(2, 1, private=False)
    engine.put_pages(pfns, owner)
    guest.convert(0, 8, private=True)


@pytest.mark.parametrize("consumer", ["tdx-2022"])
def test_in_place_the_consumers_own_pin_is_nobody_elses_reference(
    engine: Engine, consumer: str
) -> None:
    guest = Guest(engine, consumer, npages=8, in_place=True)
    guest.fault(1)
    assert _counts(engine, int(guest.pfns(1)[0])) == (2, 0)
    guest.convert(0, 1, private=False)
    guest.convert(0, 2, private=True)
