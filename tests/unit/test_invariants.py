"""The table of invariants says what is checked, and a check says what it found and what it cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import Clock, make_guest
from structlog.testing import capture_logs

from rmemd.daemon.selfcheck import LOGGED_MAX, SelfCheck, report
from rmemd.engine import invariants
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import Checked
from rmemd.units import PAGE_SIZE

SOURCE = Path(invariants.__file__).read_text()


def break_it(core: Core, pfn: int = 3) -> None:
    """Have a free frame be referenced, which no operation does."""
    with core.tx("break") as tx:
        tx.fill(core.host.refs, pfn, 1, 1)


# --- the table -----------------------------------------------------------------------------------
def test_every_number_that_can_be_violated_is_listed_and_no_other() -> None:
    # what is yielded: f"I3: ...", or named by its number alone
    uttered = set(re.findall(r"\"(I\d+)[:\"]", SOURCE))
    assert list(invariants.checked()) == sorted(uttered, key=lambda number: int(number[1:]))


def test_every_part_says_what_it_checks_in_its_docstring() -> None:
    for part in invariants.PARTS:
        assert invariants.SAID.findall(part.__doc__ or ""), part.__name__
    for number, meaning in invariants.checked().items():
        assert meaning, number
        assert "\n" not in meaning
    parts = re.findall(r"^def (_\w+)\(core: Core\) -> Iterator\[str\]", SOURCE, re.MULTILINE)
    assert {part.__name__ for part in invariants.PARTS} == set(parts)


def test_what_two_parts_check_is_said_of_both() -> None:
    assert "a free frame is nobody's" in invariants.checked()["I3"]
    assert "the slot map" in invariants.checked()["I3"]


# --- a check -------------------------------------------------------------------------------------
def test_all_holds_over_a_guest_and_changes_nothing(engine: Engine) -> None:
    guest = make_guest(engine, "tdx-2022")
    engine.pre_fault(guest.vm, guest.gpa, guest.size)
    revision = engine.revision
    assert engine.check() == Checked(revision, (), 0.0)
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
