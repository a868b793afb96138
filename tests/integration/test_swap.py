"""A consumer replaced under a running guest: all of it, or as if nothing had happened."""

from __future__ import annotations

import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guests import Guest, consumers, make_engine
from msgspec.structs import replace

from rmemd.engine import swap
from rmemd.engine.driver import Step
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.programme import Instruction, Opcode, Pattern
from rmemd.engine.swaprules import NEEDS
from rmemd.errors import (
    BAD_REQUEST,
    MEMLOCK,
    NO_SUCH_CONSUMER,
    OP_NOT_IMPLEMENTED_BY_CONSUMER,
    PLUGIN_NONSENSE,
    PLUGIN_RAISED,
    SWAP_FOREIGN,
    SWAP_SCHEMA,
    SWAP_STATE_LEFT,
    SWAP_UNSAFE,
    VM_DEAD,
    PluginFault,
    Reason,
    RmemError,
)
from rmemd.hooks import ENTRY_POINTS
from rmemd.hooks.tables import same_state
from rmemd.units import PAGE_SIZE

TEMPLATE = Path(__file__).parents[2] / "plugins" / "template"
TDX = ("tdx-today", "tdx-2022", "tdx-relocate")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine with the vendor of ``swappable`` beside the installed ones."""
    monkeypatch.syspath_prepend(TEMPLATE)
    engine = make_engine()
    core = engine.core
    with core.locked(), core.tx("load") as tx:
        point = EntryPoint("swappable", "swappable:Platform", ENTRY_POINTS)
        (found,) = core.registry.load(tx, core.options.nframes, [point])
    assert not found.error
    yield engine
    engine.close()
    for name in ("swappable", "rmemd_template"):
        sys.modules.pop(name, None)


def launched(engine: Engine, consumer: str, **options: Any) -> Guest:
    """A guest that wrote to its first 8 pages; 8 to 12 are mapped."""
    guest = Guest(engine, consumer, **options)
    guest.fault(0, 12)
    guest.fill(0, 8, seed=5)
    return guest


def unchanged(engine: Engine, guest: Guest, act: Callable[[], Any]) -> RmemError:
    """Do what must be refused, and find everything as it was."""
    before, consumer = engine.core.space.snapshot(), guest.consumer
    revision = engine.revision
    with pytest.raises(RmemError) as caught:
        act()
    assert same_state(before, engine.core.space.snapshot()) == []
    assert engine.revision == revision
    assert guest.consumer is consumer
    assert check(engine.core) == []
    return caught.value


# --- what is carried over ------------------------------------------------------------------------
def relatives() -> list[tuple[str, str]]:
    """Return each consumer with each that can take over from it at any time."""
    names = consumers()
    same = [(name, name) for name in names]
    pairs = [(a, b) for kin in (TDX, ("pkvm-today", "pkvm-gmem")) for a in kin for b in kin]
    return same + [(a, b) for a, b in pairs if a != b]


@pytest.mark.parametrize(("one", "other"), relatives())
def test_the_guest_goes_on_with_its_bytes_and_its_ids(engine: Engine, one: str, other: str) -> None:
    guest = launched(engine, one)
    core = engine.core
    key = core.host.vm_keys[guest.vm]
    platform = {name: table for name, table in core.space.snapshot().items()
                if name.startswith("platform/")}  # fmt: skip
    own = f"vm/{guest.vm}/{guest.platform}/"
    tables = {n: t for n, t in core.space.snapshot().items() if n.startswith(own)}
    swapped = engine.swap_consumer(guest.vm, other)
    after = core.space.snapshot()
    assert same_state(platform, {n: t for n, t in after.items() if n.startswith("platform/")}) == []
    assert same_state(tables, {n: t for n, t in after.items() if n.startswith(own)}) == []
    assert core.host.vm_keys[guest.vm] == key
    info = core.vms.get(guest.vm).info
    assert (info.consumer, swapped.previous, swapped.consumer) == (other, one, other)
    assert guest.consumer.ops == core.consumers[guest.vm].ops
    assert guest.holds(0, 8, seed=5)
    guest.fault(12, 4)
    guest.fill(12, 4, seed=6)
    assert guest.holds(12, 4, seed=6)
    assert check(core) == []
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)
    assert check(core) == []


def test_what_is_told_of_a_swap(engine: Engine) -> None:
    guest = launched(engine, "tdx-today")
    begun = engine.revision
    to_relocate = engine.swap_consumer(guest.vm, "tdx-relocate")
    assert (to_relocate.gained, to_relocate.lost) == (("migrate_folio",), ())
    assert (to_relocate.reclassified_pages, to_relocate.held_pages) == (12, 0)
    assert (to_relocate.kind, to_relocate.version) == ("tdx", 1)
    td = guest.consumer.made.td  # type: ignore[attr-defined]
    sparse = sum(table.touched(0, 1 << 52).size for table in (td.sept, td.hpa))
    assert to_relocate.entries == sparse + len(td.fields) > 12
    to_2022 = engine.swap_consumer(guest.vm, "tdx-2022")
    assert (to_2022.gained, to_2022.lost) == (("pin", "unpin"), ("migrate_folio",))
    assert (to_2022.held_pages, to_2022.reclassified_pages) == (12, 12)
    back = engine.swap_consumer(guest.vm, "tdx-today")
    assert (back.released_pages, back.held_pages, back.reclassified_pages) == (12, 0, 0)
    events = engine.core.journal.events_after(begun)
    told = [e.fields["consumer"] for e in events if e.kind == "consumer_swapped"]
    assert told == ["tdx-relocate", "tdx-2022", "tdx-today"]
    assert {e.vm for e in events if e.kind == "consumer_swapped"} == {guest.vm}


def test_movability_follows_the_consumer(engine: Engine) -> None:
    guest = launched(engine, "tdx-today")
    before = guest.pfns(0, 12)
    assert engine.migrate(before).moves[0].refusal.reason.name == "FOLIO_UNMOVABLE"  # type: ignore[union-attr]
    engine.swap_consumer(guest.vm, "tdx-relocate")
    report = engine.migrate(before)
    assert {m.outcome.name for m in report.moves} == {"MOVED"}
    assert not np.isin(guest.pfns(0, 12), before).any()
    assert guest.holds(0, 8, seed=5)


def test_holds_follow_the_consumer(engine: Engine) -> None:
    guest = launched(engine, "tdx-today")
    ledger, pfn = engine.core.ledger, int(guest.pfns(0)[0])
    assert ledger.holders(pfn) == ()
    engine.swap_consumer(guest.vm, "tdx-2022")
    (holder,) = ledger.holders(pfn)
    assert (holder.name, holder.purpose) == (f"vm/{guest.vm}", "secure EPT")
    # the hold is the new consumer's own: unmapping drops it
    guest.convert(0, 4, private=False)
    assert ledger.holders(pfn) == ()
    engine.swap_consumer(guest.vm, "tdx-relocate")
    assert not any(ledger.count(entry) for entry in ledger.entries())


def test_a_hold_of_another_kind_is_exchanged(host: Engine) -> None:
    guest = launched(host, "full")
    pfn = int(guest.pfns(0)[0])
    assert host.core.ledger.holders(pfn)[0].longterm
    swapped = host.swap_consumer(guest.vm, "PinsOtherwise")
    (holder,) = host.core.ledger.holders(pfn)
    assert (holder.purpose, holder.longterm) == ("plainly", False)
    assert (swapped.held_pages, swapped.released_pages) == (0, 0)


def test_pins_over_the_locked_memory_limit_are_refused(engine: Engine) -> None:
    engine_vm = engine.create_vm("pkvm-gmem", memlock_pages=4).info.vm
    guest = Guest(engine, "pkvm-gmem")
    # the same guest, with a limit below what it has mapped
    guest.fault(0, 12)
    guest.fill(0, 8, seed=5)
    core = engine.core
    with core.tx("limit") as tx:
        core.vms.update(tx, core.vms.get(guest.vm), memlock_pages=4)
    refused = unchanged(engine, guest, lambda: engine.swap_consumer(guest.vm, "pkvm-today"))
    assert refused.reason is MEMLOCK
    assert guest.holds(0, 8, seed=5)
    engine.destroy_vm(engine_vm)


def test_options_are_carried_over_and_fixed_ones_cannot_change(engine: Engine) -> None:
    guest = launched(engine, "tdx-today", config={"sept_ve_disable": "1"})
    engine.swap_consumer(guest.vm, "tdx-2022")
    assert engine.core.vms.get(guest.vm).info.config == {"sept_ve_disable": "1"}
    debug = {"sept_ve_disable": "1", "debug": "1"}
    refused = unchanged(engine, guest, lambda: engine.swap_consumer(guest.vm, "tdx-today", debug))
    assert (refused.reason, refused.details.state) == (SWAP_UNSAFE, "DEBUG=0")
    unknown = unchanged(
        engine, guest, lambda: engine.swap_consumer(guest.vm, "tdx-today", {"no": "1"})
    )
    assert unknown.reason is BAD_REQUEST


def test_a_measurement_goes_on_across_a_swap(engine: Engine) -> None:
    pages = [bytes([n]) * PAGE_SIZE for n in (1, 2)]
    plain, swapped = (Guest(engine, "tdx-today", finalized=False) for _ in range(2))
    for guest in (plain, swapped):
        guest.populate(0, pages[0])
    engine.swap_consumer(swapped.vm, "tdx-2022")
    for guest in (plain, swapped):
        guest.populate(1, pages[1])
    assert engine.finalize(plain.vm) == engine.finalize(swapped.vm)


# --- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("one", "other"), [("snp-move", "snp-swap-disable"), ("snp-swap-disable", "snp-move")]
)
def test_a_swap_that_contradicts_the_attested_policy_is_refused(
    engine: Engine, one: str, other: str
) -> None:
    guest = launched(engine, one)
    refused = unchanged(engine, guest, lambda: engine.swap_consumer(guest.vm, other))
    assert refused.reason is SWAP_UNSAFE
    assert refused.details.state.startswith("policy 0x")
    assert refused.details.rule == "snp.md §9 rule 25"
    assert guest.holds(0, 8, seed=5)


def test_a_swap_between_names_of_one_policy_is_none_of_the_guests_business(engine: Engine) -> None:
    """PAGE_SWAP_DISABLE asked for by snp-move is what snp-swap-disable stands for."""
    guest = launched(engine, "snp-move", config={"policy": "0x2030000"})
    swapped = engine.swap_consumer(guest.vm, "snp-swap-disable")
    assert swapped.gained == swapped.lost == ()
    assert guest.holds(0, 8, seed=5)


@pytest.mark.parametrize(
    ("one", "other"), [("tdx-today", "snp-move"), ("sw-protected", "gup"), ("gup", "sw-protected")]
)
def test_another_platform_or_kind_of_vm_is_refused(engine: Engine, one: str, other: str) -> None:
    guest = launched(engine, one)
    refused = unchanged(engine, guest, lambda: engine.swap_consumer(guest.vm, other))
    assert refused.reason is SWAP_FOREIGN
    assert one in str(refused)


def test_who_is_not_there_or_dead_is_not_swapped(engine: Engine) -> None:
    guest = launched(engine, "tdx-today")
    refused = unchanged(engine, guest, lambda: engine.swap_consumer(guest.vm, "tdx-never"))
    assert refused.reason is NO_SUCH_CONSUMER
    with engine.core.tx("kill") as tx:
        engine.core.kill(tx, guest.vm, "for a test")
    dead = unchanged(engine, guest, lambda: engine.swap_consumer(guest.vm, "tdx-2022"))
    assert dead.reason is VM_DEAD


def test_the_second_half_of_the_pair_is_missing(host: Engine) -> None:
    guest = launched(host, "full")
    refused = unchanged(host, guest, lambda: host.swap_consumer(guest.vm, "no-export_state"))
    assert refused.reason is OP_NOT_IMPLEMENTED_BY_CONSUMER
    other = launched(host, "no-export_state")
    refused = unchanged(host, other, lambda: host.swap_consumer(other.vm, "full"))
    assert (refused.reason, refused.errno) == (OP_NOT_IMPLEMENTED_BY_CONSUMER, 95)


# --- an op that is lost ---------------------------------------------------------------------------
def in_place(engine: Engine) -> Guest:
    return launched(engine, "full", in_place=True)


def mapped(engine: Engine) -> Guest:
    return launched(engine, "full")


def building(engine: Engine) -> Guest:
    return Guest(engine, "full", finalized=False)


def waiting(engine: Engine) -> Guest:
    guest = launched(engine, "full")
    exited = guest.run(guest.do(Opcode.SHARE, 0, 2))
    assert exited.reason.name == "HYPERCALL"
    return guest


def poisoned(engine: Engine) -> Guest:
    guest = launched(engine, "full")
    engine.poison(int(guest.pfns(11)[0]))
    return guest


def kept(engine: Engine) -> Guest:
    guest = launched(engine, "full")
    guest.fault(15)
    guest.convert(15, 1, private=False)
    return guest


LOSSES: dict[str, tuple[Callable[[Engine], Guest], str, Callable[[Engine, Guest], Any]]] = {
    "convert": (in_place, r"12 pages of file/\d+ are private", lambda e, g: g.punch(0, 64)),
    "guest_access": (mapped, "12 private pages are mapped", lambda e, g: g.convert(0, 64, False)),
    "map": (mapped, r"vm/\d+/swappable/entries has 12 entries",
            lambda e, g: g.convert(0, 64, False)),
    "prepare": (mapped, r"vm/\d+/swappable/entries has 12 entries",
                lambda e, g: g.convert(0, 64, False)),
    "populate": (building, r"vm/\d+ is not finalized", lambda e, g: e.finalize(g.vm)),
    "finalize": (building, r"vm/\d+ is not finalized", lambda e, g: e.finalize(g.vm)),
    "guest_call": (waiting, "vCPU 0 waits for the answer to its call",
                   lambda e, g: e.run_vcpu(g.vm, 0)),
    "error": (poisoned, r"pfn 0x[0-9a-f]+ of file/\d+ is poisoned", lambda e, g: g.punch(11)),
}  # fmt: skip


def test_every_need_has_its_case() -> None:
    assert set(LOSSES) == set(NEEDS)


@pytest.mark.parametrize("op", LOSSES)
def test_an_op_that_live_state_needs_is_not_lost(host: Engine, op: str) -> None:
    make, says, end = LOSSES[op]
    guest = make(host)
    refused = unchanged(host, guest, lambda: host.swap_consumer(guest.vm, f"no-{op}"))
    assert (refused.reason, refused.errno) == (SWAP_UNSAFE, 16)
    assert re.fullmatch(says + ".*", refused.details.state)
    assert f"has no {op}" in refused.message
    # and when the state has come to its end, nothing is in the way
    end(host, guest)
    assert op in host.swap_consumer(guest.vm, f"no-{op}").lost


@pytest.mark.parametrize("op", ["migrate_folio", "enter", "page_state"])
def test_an_op_that_no_state_needs_is_lost_and_told(host: Engine, op: str) -> None:
    guest = launched(host, "full")
    swapped = host.swap_consumer(guest.vm, f"no-{op}")
    assert op in swapped.lost
    assert swapped.reclassified_pages == (12 if op == "migrate_folio" else 0)
    assert guest.holds(0, 8, seed=5)


def test_a_page_that_cannot_be_let_go_keeps_its_consumer(host: Engine) -> None:
    guest = kept(host)
    refused = unchanged(host, guest, lambda: host.swap_consumer(guest.vm, "no-pin"))
    assert refused.reason is SWAP_UNSAFE
    (holder,) = refused.details.holders
    assert (holder.name, holder.purpose, holder.longterm) == (f"vm/{guest.vm}", "swappable", True)
    assert re.fullmatch("pfn 0x[0-9a-f]+", refused.details.page)
    # one that has an unpin takes the hold over
    assert host.swap_consumer(guest.vm, "full").released_pages == 0


# --- what fails -----------------------------------------------------------------------------------
FAILURES: dict[str, tuple[Reason, str]] = {
    "RaisesOnImport": (PLUGIN_RAISED, "import_state raised KeyError"),
    "ExitsOnImport": (PLUGIN_RAISED, "import_state raised SystemExit"),
    "AnswersNonsense": (PLUGIN_NONSENSE, "import_state answered State"),
    "LeavesItUnread": (SWAP_STATE_LEFT, "swappable/entries does not hold what it held"),
    "MakesItUp": (SWAP_STATE_LEFT, "swappable/entries does not hold what it held"),
    "NamesBytes": (PLUGIN_NONSENSE, "named bytes"),
    "ChangesTheKey": (PLUGIN_NONSENSE, "another key"),
    "OfAnotherKind": (SWAP_SCHEMA, r"is 'template' version 1, .* takes 'other' version 1"),
    "OfAnotherVersion": (SWAP_SCHEMA, r"is 'template' version 1, .* takes 'template' version 2"),
}


@pytest.mark.parametrize("consumer", FAILURES)
def test_an_import_that_fails_is_rolled_back(host: Engine, consumer: str) -> None:
    guest = launched(host, "full")
    reason, says = FAILURES[consumer]
    refused = unchanged(host, guest, lambda: host.swap_consumer(guest.vm, consumer))
    assert refused.reason is reason
    assert re.search(says, refused.message)
    assert guest.holds(0, 8, seed=5)
    guest.fill(8, 4, seed=6)
    assert host.swap_consumer(guest.vm, "full").entries > 0


def test_an_export_that_fails_is_rolled_back(host: Engine) -> None:
    guest = launched(host, "RaisesOnExport")
    refused = unchanged(host, guest, lambda: host.swap_consumer(guest.vm, "full"))
    assert refused.reason is PLUGIN_RAISED
    assert guest.holds(0, 8, seed=5)


@pytest.mark.parametrize("how", ["before", "after", "nonsense"])
@pytest.mark.parametrize("consumer", consumers())
def test_every_import_that_fails_changes_nothing(engine: Engine, consumer: str, how: str) -> None:
    """As test_hook_faults does for the ops of a consumer that is at work."""
    guest = launched(engine, consumer)

    def broken(made: Any) -> None:
        whole = made.ops.import_state

        def import_state(tx: Any, state: Any) -> Any:
            if how != "before":
                whole(tx, state)
            if how != "nonsense":
                raise ZeroDivisionError("broken")
            return state

        made.ops = replace(made.ops, import_state=import_state)

    engine.core.registry.made = broken
    fault = unchanged(engine, guest, lambda: engine.swap_consumer(guest.vm))
    assert isinstance(fault, PluginFault)
    assert fault.details.where == f"{consumer}(vm/{guest.vm}).import_state"
    engine.core.registry.made = lambda made: None
    engine.swap_consumer(guest.vm)
    assert guest.holds(0, 8, seed=5)


# --- under way ------------------------------------------------------------------------------------
def test_a_swap_waits_for_pages_that_move(engine: Engine) -> None:
    """A migration whose bytes are on their way: nobody exports half of it."""
    guest = launched(engine, "tdx-relocate")
    core = engine.core
    before = guest.pfns(0, 12)
    begun: list[Any] = []

    def hold(step: str) -> None:
        if step != "migrate" or begun:
            return
        assert core.space.holders
        one = core.unit(lambda: swap.swap_consumer(core, guest.vm, "tdx-today", {}))
        at: Step = next(one)
        assert at.wait
        assert at.on is not None
        assert "gfn 0x100" in at.on.pages
        assert core.vms.get(guest.vm).info.consumer == "tdx-relocate"
        begun.append(one)

    core.hold = hold
    report = engine.migrate(before)
    core.hold = None
    assert begun
    assert {m.outcome.name for m in report.moves} == {"MOVED"}
    swapped = core.run(lambda: begun[0])
    assert (swapped.consumer, swapped.lost) == ("tdx-today", ("migrate_folio",))
    assert not np.isin(guest.pfns(0, 12), before).any()
    assert guest.holds(0, 8, seed=5)
    assert check(core) == []


def test_a_fault_that_looked_up_before_asks_the_new_consumer(engine: Engine) -> None:
    guest = launched(engine, "tdx-today")
    engine.core.hold = lambda step: (
        engine.swap_consumer(guest.vm, "tdx-2022") and None
        if step == "fault: looked up" and guest.consumer.ops.pin is None
        else None
    )
    guest.fault(20, 2)
    engine.core.hold = None
    for pfn in guest.pfns(20, 2).tolist():
        (holder,) = engine.core.ledger.holders(pfn)
        assert (holder.purpose, holder.count) == ("secure EPT", 1)


@pytest.mark.parametrize("consumer", ["tdx-today", "snp-move", "pkvm-gmem"])
def test_vcpus_are_out_while_the_consumer_changes(engine: Engine, consumer: str) -> None:
    guest = launched(engine, consumer)
    core = engine.core
    seen: list[tuple[bool, bool]] = []

    def hold(step: str) -> None:
        if step == "guest" and not seen:
            before = core.vms.get(guest.vm).vcpu(0).inside
            engine.swap_consumer(guest.vm)
            seen.append((before, core.vms.get(guest.vm).vcpu(0).inside))

    core.hold = hold
    assert guest.holds(0, 8, seed=5)
    core.hold = None
    assert seen == [(True, False)]
    assert check(core) == []


def test_a_guest_runs_on_through_a_hundred_swaps(capsys: pytest.CaptureFixture[str]) -> None:
    """The guest checks its own bytes all the time; none of them is lost."""
    engine = make_engine()
    engine.core.guard.clock = time.monotonic
    guest = launched(engine, "tdx-today")
    check_all = guest.do(Opcode.CHECK, 0, 8, pattern=Pattern.WORDS, value=5)
    again = Instruction(Opcode.LOOP, value=0, times=1 << 30)
    engine.set_programme(guest.vm, 0, (check_all, again))
    over = threading.Event()
    came: list[Any] = []
    runner = threading.Thread(
        target=lambda: came.append(engine.run_vcpu(guest.vm, 0, cancelled=over.is_set))
    )
    runner.start()
    pauses = []
    for n in range(100):
        pauses.append(engine.swap_consumer(guest.vm, TDX[(n + 1) % 3]).pause_us)
        # the guest goes on before the next one
        engine.core.wait_for_revision(engine.revision, timeout=30)
    over.set()
    runner.join(60)
    (exited,) = came
    assert exited.reason.name == "INTR"
    assert exited.vcpu.mismatched == 0
    assert exited.vcpu.checked >= 100
    assert guest.holds(0, 8, seed=5)
    assert check(engine.core) == []
    assert all(pause > 0 for pause in pauses)
    with capsys.disabled():
        median, checked = statistics.median(pauses), exited.vcpu.checked
        print(f"\n100 swaps: a pause of {median:.0f} µs at the median, {max(pauses)} µs at most; "
              f"{checked} pages checked by the guest meanwhile")  # fmt: skip
    engine.close()
