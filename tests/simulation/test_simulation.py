"""Simulated runs, as many as the suite has time for; ``make sim`` makes a million steps.

RMEMD_SIM_SEEDS says how many.
"""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
from oracle.oracle import Difference, Oracle

from rmemd.consumers.guard import Guard
from rmemd.engine import migrate
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from simulation import lockstep, runs
from simulation.actions import make_run, shape
from simulation.checks import Accesses, Checks, watching
from simulation.runs import explain, play, run_of, shrink, total

SEEDS = int(os.environ.get("RMEMD_SIM_SEEDS", "12"))
LENGTH = 800


@pytest.mark.timeout(max(300, SEEDS * 20))
def test_whatever_goes_wrong_when_all_that_must_be_true_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = []
    for seed in range(SEEDS):
        played = play(seed, make_run(seed, LENGTH))
        if played.failure:
            pytest.fail(explain(seed, LENGTH) or played.failure)
        figures.append(played.figures)
    steps, faults = total(figures)
    with capsys.disabled():
        print(f"\nsimulation: {steps} steps, {faults.total()} faults, {SEEDS} seeds: 0 violations")
    assert steps > SEEDS * 100
    ended: Counter[tuple[str, str]] = sum((one.ended for one in figures), Counter())
    assert {name for name, how in ended if how == "ok"} > {
        "create_vm", "convert", "punch", "pre_fault", "guest_write", "guest_check", "host_write",
        "migrate", "pin", "unpin", "swap", "close_session",
    }  # fmt: skip
    assert {"system", "consumer", "poison", "rule", "die", "cancel", "crash"} <= (+faults).keys()


def test_a_run_is_made_of_its_seed_alone() -> None:
    crashing = next(seed for seed in range(99) if shape(seed).crashes and shape(seed).watched)
    one, other = (play(crashing, make_run(crashing, 400)).figures for _ in range(2))
    assert (one.trace, one.steps, one.faults) == (other.trace, other.steps, other.faults)
    assert play(crashing + 1, make_run(crashing + 1, 400)).figures.trace != one.trace


def test_alone_operations_do_what_the_oracle_says_before_and_after_crashes_and_faults() -> None:
    faults: Counter[str] = Counter()
    for seed in range(3, 24, lockstep.EVERY):
        plays, ops = run_of(seed)
        played = plays(seed, ops)
        assert not played.failure, explain(seed, runs.LENGTH)
        assert played.figures.compared > 250
        faults.update(played.figures.faults)
    assert {"crash", "rule"} <= (+faults).keys()


def test_a_difference_from_the_oracle_is_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Oracle, "judge", lambda self, op, *_: [Difference(op, "", "", "")])
    played = lockstep.play(3, lockstep.make_run(3, 20))
    assert (played.figures.differences, played.figures.compared) == (1, 0)


def test_a_part_of_the_check_is_done_again_when_what_it_read_is_written() -> None:
    """Break a table that nothing else is about, behind the engine's back."""
    accesses = Accesses()
    with watching(accesses):
        engine = Engine(Options(nframes=512, nnodes=1, seed=1), Guard(lambda: 0.0))
        checks = Checks(engine.core, accesses)
        assert checks.broken() == checks.broken() == []
        engine.core.host.refs.apply("put", (np.array([3]), np.array([1])))
        assert any("I2" in line for line in checks.broken())
        assert any("I2" in line for line in checks.broken()), "and it stays broken"
        engine.core.host.refs.apply("put", (np.array([3]), np.array([0])))
        assert checks.broken() == []
        engine.close()


def test_a_mistake_is_seen_and_told_with_few_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that was moved leaves its old frame in use."""
    monkeypatch.setattr(migrate, "_retire", lambda *_: [])
    for seed in range(20):
        actions = make_run(seed, LENGTH)
        found = play(seed, actions)
        if found.failure:
            short = shrink(seed, actions, found.kind, tries_max=60)
            assert len(short) < len(actions) / 4
            assert play(seed, short).kind == found.kind
            return
    pytest.fail("nobody saw it")
