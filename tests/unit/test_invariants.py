"""The table of invariants says what is checked, and a check says what it found and what it cost."""

from __future__ import annotations

import inspect
import queue
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from guests import Guest
from helpers import Clock, make_guest
from structlog.testing import capture_logs

from rmemd.consumers.guard import Guard
from rmemd.daemon.selfcheck import LOGGED_MAX, SelfCheck, report
from rmemd.engine import holderinvariants, invariants, pageinvariants, transitions
from rmemd.engine.core import Core, Options
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import Checked, Invariant, Status
from rmemd.engine.quotas import UNLIMITED, Limits
from rmemd.rpc import dispatch
from rmemd.session.descriptors import Passed
from rmemd.store.keeping import Keeping
from rmemd.units import PAGE_SIZE


def break_it(core: Core, pfn: int = 3) -> None:
    """Have a free frame be referenced, which no operation does."""
    with core.tx("break") as tx:
        tx.fill(core.host.refs, pfn, 1, 1)


# --- the table -----------------------------------------------------------------------------------
def listed(engine: Engine) -> dict[str, Invariant]:
    return {one.number: one for one in engine.listed(engine.check())}


def test_all_25_are_there_in_order_each_with_a_line(engine: Engine) -> None:
    found = listed(engine)
    assert list(found) == [f"I{number}" for number in range(1, 26)]
    for one in found.values():
        assert one.meaning, one.number
        assert "\n" not in one.meaning


def test_every_part_says_of_itself_what_it_can_name_and_no_more() -> None:
    # what is yielded: f"I3: ...", or named by its number alone
    for part in (*invariants.PARTS, *invariants.SAMPLES, *invariants.WATCHED):
        uttered = _uttered(part)
        assert set(dict(invariants.said(part))) == uttered, part.__name__
        assert uttered, part.__name__


def _uttered(part: Callable[..., object]) -> set[str]:
    """Return the numbers in a function's source, and in that of the helpers it calls."""
    source, text = vars(sys.modules[part.__module__]), inspect.getsource(part)
    helpers = [source[name] for name in re.findall(r"from (_\w+)\(", text) if name in source]
    found = set(re.findall(r"\"(I\d+)[:\"]", text))
    return found.union(*map(_uttered, helpers))


def test_no_part_is_left_out_of_the_table() -> None:
    for module in (pageinvariants, holderinvariants):
        source = inspect.getsource(module)
        parts = set(re.findall(r"^def ([a-z]\w+)\(core: Core\) -> Iterator", source, re.MULTILINE))
        assert parts == {
            part.__name__ for part in (*invariants.PARTS, *invariants.SAMPLES)
            if part.__module__ == module.__name__
        }  # fmt: skip
    source = inspect.getsource(transitions)
    watching = set(
        re.findall(r"^def ([a-z]\w+)\(t: Transition\) -> Iterator", source, re.MULTILINE)
    )
    assert watching == {monitor.__name__ for monitor in transitions.MONITORS}


def test_what_two_parts_check_is_said_of_both(engine: Engine) -> None:
    meaning = listed(engine)["I3"].meaning
    assert "a free frame is nobody's" in meaning
    assert "the slot map" in meaning


def test_where_nobody_watched_it_is_said(clock: Clock) -> None:
    engine = Engine(Options(nframes=512), Guard(clock))
    found = listed(engine)
    assert {one.number for one in found.values() if one.status is Status.UNWATCHED} == {
        "I6", "I8", "I10", "I11", "I19", "I25",
    }  # fmt: skip
    assert found["I1"].status is Status.CHECKED
    assert found["I24"].status is Status.SAMPLED
    engine.watch(1)
    engine.create_vm("null")
    assert engine.check().watched == 1
    assert listed(engine)["I8"].status is Status.SAMPLED
    engine.create_vm("null")
    assert engine.check().watched == 1
    break_it(engine.core)
    assert listed(engine)["I3"].status is Status.VIOLATED
    engine.close()


def test_what_was_seen_stays_when_the_watch_is_over(clock: Clock) -> None:
    engine = Engine(Options(nframes=512), Guard(clock))
    engine.watch(2)
    with engine.core.tx("break") as tx:
        tx.emit("poisoned", pfn=3)
    engine.create_vm("null")
    assert engine.core.watch is None
    assert any(line.startswith("I13: ") for line in engine.check().violated)
    engine.watch(1)
    assert any(line.startswith("I13: ") for line in engine.check().violated)
    engine.close()


def test_parts_from_above_the_engine_are_checked_and_listed(engine: Engine) -> None:
    def part(core: Core) -> Iterator[str]:
        """I18: a door's own."""
        yield "I18: too many"

    engine.core.parts.append(part)
    assert engine.check().violated == ("I18: too many",)
    assert "a door's own" in listed(engine)["I18"].meaning
    assert listed(engine)["I18"].status is Status.VIOLATED


def test_a_transaction_that_is_half_over_is_not_judged_by_what_nobody_saw(
    engine: Engine,
) -> None:
    """The watch begins while a migration has its bracket open."""
    guest = Guest(engine, "snp-move")
    guest.fill(0, 16, seed=1)
    assert engine.core.watch is not None
    engine.core.watch.end()
    engine.core.hold = lambda step: engine.watch() if step == "migrate" else None
    engine.migrate(guest.pfns(0, 16))
    engine.core.hold = None
    assert engine.core.watch is not None
    assert engine.check().violated == ()


# --- a check -------------------------------------------------------------------------------------
def test_all_holds_over_a_guest_and_changes_nothing(engine: Engine) -> None:
    guest = make_guest(engine, "tdx-2022")
    engine.pre_fault(guest.vm, guest.gpa, guest.size)
    revision = engine.revision
    seen = revision - 1
    assert engine.check() == Checked(revision, (), 0.0, seen)
    assert (engine.revision, engine.checks) == (revision, 1)


def test_a_violation_is_told_with_the_revision_it_was_found_at(engine: Engine) -> None:
    break_it(engine.core)
    done = engine.check()
    assert done.revision == engine.revision
    assert any(line.startswith("I3: page 0x3 is free with") for line in done.violated)
    assert any(line.startswith("I2: page 0x3 ") for line in done.violated)
    assert engine.last_check is done


def test_what_cannot_even_be_read_is_a_violation(engine: Engine) -> None:
    guest = make_guest(engine, "tdx-2022")
    engine.pre_fault(guest.vm, guest.gpa, PAGE_SIZE)
    with engine.core.tx("break") as tx:
        # a frame that the host does not have
        tx.fill(engine.core.files.get(guest.file).frames, 0, 1, 1 << 30)
    assert "I1: cannot be checked, for IndexError" in engine.check().violated


def test_the_time_is_that_of_the_guards_clock(engine: Engine, clock: Clock) -> None:
    ticks = iter((10.0, 10.25))
    engine.core.guard.clock = lambda: next(ticks)
    assert engine.check().seconds == 0.25


# --- the daemon's own ----------------------------------------------------------------------------
def test_violations_are_logged_as_errors_a_line_each(engine: Engine) -> None:
    break_it(engine.core)
    with capture_logs() as logged:
        report(engine.check())
    (line,) = [line for line in logged if line["invariant"] == "I3"]
    assert (line["log_level"], line["event"]) == ("error", "invariant_violated")
    assert line["revision"] == engine.revision
    assert line["text"].startswith("page 0x3 is free with")


def test_a_state_in_ruins_does_not_fill_the_log() -> None:
    with capture_logs() as logged:
        report(Checked(7, tuple(f"I7: page {n:#x} is poisoned" for n in range(100)), 0.0))
    assert len(logged) == LOGGED_MAX + 1
    assert logged[-1]["violations"] == 100


def test_all_well_is_not_worth_a_line() -> None:
    with capture_logs() as logged:
        report(Checked(7, (), 0.0))
    assert logged == []


@pytest.mark.parametrize("before", [0.0, 3600.0])
def test_it_ends_at_once_whatever_it_waits_for(engine: Engine, before: float) -> None:
    own = SelfCheck(engine)
    own.every(before)
    own.every(3600.0)
    own.close()
    assert engine.checks == 0


def test_after_each_check_some_transactions_are_watched(engine: Engine) -> None:
    asked: queue.Queue[int | None] = queue.Queue()
    engine.watch = asked.put  # type: ignore[method-assign]
    own = SelfCheck(engine)
    own.every(0.001, watched=7)
    assert [asked.get(timeout=60) for _ in range(2)] == [7, 7]
    own.close()


# --- what is beside the state --------------------------------------------------------------------
def numbers(found: Iterator[str]) -> list[str]:
    return [line.partition(":")[0] for line in found]


def test_what_is_kept_is_what_there_is(engine: Engine) -> None:
    names = ["arena", "file.1", "journal.0", "listener"]

    class Known(Keeping):
        @property
        def names(self) -> list[str]:
            return names

    core = engine.core
    core.keeping = Known()
    guest = make_guest(engine, "null")
    engine.write_shared(guest.file, 0, b"x")
    assert guest.file == 1
    assert engine.check().violated == ()
    names.remove("arena")
    names[0] = "file.2"
    assert engine.check().violated == (
        "I20: arena is not kept, and would be lost", "I20: file.1 is not kept, and would be lost",
        "I20: file.2 is kept, and is nobody's",
    )  # fmt: skip


def test_a_tenant_keeps_what_it_got_under_a_higher_limit(engine: Engine) -> None:
    quotas = engine.core.quotas
    assert quotas.most("one").frames == UNLIMITED
    quotas.set(Limits(frames=5), {"one": Limits(frames=9, fds=1)})
    quotas.set(Limits(frames=3, fds=2), {"one": Limits(frames=4, fds=3)})
    assert (quotas.most("one").frames, quotas.most("one").fds) == (9, 3)
    assert (quotas.most("other").frames, quotas.most("other").fds) == (5, UNLIMITED)


def test_descriptors_and_watches_are_within_their_limits(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    quotas = engine.core.quotas
    quotas.set(Limits(fds=1, watches=1))
    passed = Passed(quotas)
    with passed.one_more("one", 1):
        assert numbers(passed.invariant(engine.core)) == []
    monkeypatch.setattr(quotas, "of", lambda tenant: Limits())
    with passed.one_more("one", 2):
        assert numbers(passed.invariant(engine.core)) == ["I18"]
    passed._by_session.clear()
    assert numbers(passed.invariant(engine.core)) == ["I18", "I18"]
    monkeypatch.setattr(dispatch._streams, "_open", Counter(one=2))
    assert numbers(dispatch.few_watches(engine.core)) == ["I18"]
