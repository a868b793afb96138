"""Fault rules: which passages they hit, what they refuse, and the points that there are."""

from __future__ import annotations

import importlib
import math
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Guest, halted, make_guest, touch, write
from msgspec.structs import replace

from rmemd.engine import faultpoints
from rmemd.engine.engine import Engine
from rmemd.engine.faultpoints import STEPS, Sort
from rmemd.engine.faultrules import DELAY_MAX_MS, POINTS_MAX, FaultRules, Rule, at_step
from rmemd.engine.migrate import Outcome
from rmemd.engine.programme import Instruction
from rmemd.errors import InvalidArgument, RmemError
from rmemd.hooks.ops import NotifierOps
from rmemd.units import PAGE_SIZE

ENGINE = Path(faultpoints.__file__).parent
BOOM = Rule(0, 0, "map", "boom")


def hits(rules: FaultRules, passages: int, vm: int = 1) -> list[int]:
    """Return which of so many passages went wrong, from 1."""
    return [n for n in range(1, passages + 1) if rules.passage(vm, "map")]


# --- which passages are hit ----------------------------------------------------------------------
def test_from_the_nth_passage_on_and_so_many_times() -> None:
    rules = FaultRules()
    rules.add(replace(BOOM, nth=3, times=2))
    assert hits(rules, 2) == []
    (waiting,) = rules.all()
    assert (waiting.passages, waiting.hits, waiting.nth, waiting.times) == (2, 0, 3, 2)
    assert hits(rules, 5) == [1, 2]
    assert rules.all() == []
    assert rules.passed["map"] == 7


def test_only_a_rules_own_vm_and_point_count() -> None:
    rules = FaultRules()
    made = rules.add(replace(BOOM, vm=2))
    assert hits(rules, 3, vm=1) == []
    assert rules.passage(2, "unpin") == ""
    assert rules.all() == [made]
    assert hits(rules, 3, vm=2) == [1]


def test_chance_is_drawn_from_seed_rule_and_passage_alone() -> None:
    wanted = replace(BOOM, probability=0.25, times=10**9)

    def drawn(seed: int, others: int = 0) -> list[int]:
        rules = FaultRules(seed)
        for _ in range(others):
            rules.remove(rules.add(BOOM).rule)
        rules.add(wanted)
        return hits(rules, 4000)

    once = drawn(7)
    assert drawn(7) == once
    assert drawn(8) != once
    # another handle is another rule
    assert drawn(7, others=1) != once
    # four standard deviations of what a fair draw gives
    assert abs(len(once) - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75)


def test_chance_begins_at_the_nth_and_ends_after_so_many_hits() -> None:
    every = FaultRules(7)
    every.add(replace(BOOM, probability=0.25, times=10**9))
    from_tenth = [n for n in hits(every, 400) if n >= 10]
    some = FaultRules(7)
    some.add(replace(BOOM, probability=0.25, nth=10, times=3))
    assert hits(some, 400) == from_tenth[:3]
    assert some.all() == []


def test_the_least_probability_hits_next_to_never_and_1_always() -> None:
    rules = FaultRules()
    rules.add(replace(BOOM, probability=5e-324, times=10**9))
    assert hits(rules, 1000) == []
    rules.add(replace(BOOM, probability=1.0, times=10**9))
    assert len(hits(rules, 1000)) == 1000


def test_points_that_a_plugin_makes_up_are_not_counted_without_end() -> None:
    rules = FaultRules()
    for n in range(POINTS_MAX + 10):
        rules.passage(0, f"point {n}")
    assert len(rules.passed) == POINTS_MAX


# --- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"point": ""}, "point", "BAD_REQUEST"),
        ({"point": "x" * 257}, "point", "BAD_REQUEST"),
        ({"error": "x" * 257}, "error", "BAD_REQUEST"),
        ({"error": ""}, "error", "BAD_REQUEST"),
        ({"nth": 0}, "nth", "BAD_REQUEST"),
        ({"times": -1}, "times", "BAD_REQUEST"),
        ({"probability": 0.0}, "probability", "BAD_REQUEST"),
        ({"probability": -0.5}, "probability", "BAD_REQUEST"),
        ({"probability": 1.0000001}, "probability", "BAD_REQUEST"),
        ({"probability": math.nan}, "probability", "BAD_REQUEST"),
        ({"probability": math.inf}, "probability", "BAD_REQUEST"),
        ({"point": "step/guest", "error": "", "delay_ms": -1}, "delay_ms", "BAD_REQUEST"),
        (
            {"point": "step/guest", "error": "", "delay_ms": DELAY_MAX_MS + 1},
            "delay_ms",
            "BAD_REQUEST",
        ),
        ({"point": "step/guest", "delay_ms": 5}, "error", "BAD_REQUEST"),
        ({"point": "step/guest"}, "error", "BAD_REQUEST"),
        ({"point": "step/nowhere", "error": "", "delay_ms": 5}, "point", "BAD_REQUEST"),
        ({"point": "step/scrub", "error": "", "delay_ms": 5, "vm": 1}, "vm", "BAD_REQUEST"),
        # under the lock: the whole host would wait
        ({"error": "", "delay_ms": 5}, "delay_ms", "POINT_NOT_A_STEP"),
        ({"point": "lost_race", "error": "", "delay_ms": 5}, "delay_ms", "POINT_NOT_A_STEP"),
        ({"point": "TDH_MEM_TRACK", "error": "", "delay_ms": 5}, "delay_ms", "POINT_NOT_A_STEP"),
    ],
)
def test_a_rule_that_cannot_be_names_its_field(
    engine: Engine, fields: dict[str, Any], field: str, reason: str
) -> None:
    make_guest(engine, "null")
    rule = {"vm": 0, "point": "map", "error": "boom", **fields}
    with pytest.raises(InvalidArgument) as caught:
        engine.add_fault_rule(**rule)
    assert caught.value.details.field == f"rule.{field}"
    assert caught.value.reason.name == reason
    assert engine.core.rules.all() == []


def test_the_refusal_of_a_delay_names_the_steps(engine: Engine) -> None:
    with pytest.raises(RmemError) as caught:
        engine.add_fault_rule(0, "map", "", delay_ms=5)
    assert all(name in str(caught.value) for name in STEPS)


# --- the points ----------------------------------------------------------------------------------
def named_steps() -> set[str]:
    """Return the names of the engine's steps at which the lock is let go without a wait."""
    found = set()
    for path in ENGINE.glob("*.py"):
        for name, rest in re.findall(
            r"(?<!class )\bStep\((\w+|\"[^\"]+\")([^\n]*)", path.read_text()
        ):
            if "wait=True" not in rest and "wait=True" not in name:
                constant = name.strip('"') if name[0] == '"' else None
                module = importlib.import_module(f"rmemd.engine.{path.stem}")
                found.add(constant or getattr(module, name))
    return found


def test_the_steps_are_those_of_the_engine() -> None:
    assert {at_step(name) for name in named_steps()} == set(STEPS)


def test_points_are_derived_from_the_ops_table_and_the_plugins(engine: Engine) -> None:
    points = faultpoints.every(engine.core)
    names = [point.name for point in points]
    assert len(set(names)) == len(names)
    ops = [point for point in points if point.sort is Sort.OP]
    every = list(NotifierOps.__struct_fields__)
    # these have no transaction, and so no passage
    passed = [name for name in every if name not in ("page_state", "resume")]
    assert [op.name for op in ops] == passed
    assert all(op.means for op in ops)
    vendors = {(point.plugin, point.name) for point in points if point.sort is Sort.VENDOR}
    for known in (
        ("tdx", "TDH_MEM_TRACK"),
        ("snp", "RMPUPDATE"),
        ("pkvm", "__pkvm_host_donate_guest"),
    ):
        assert known in vendors


@pytest.mark.parametrize("consumer", ["tdx-relocate", "tdx-2022", "snp-move", "pkvm-gmem"])
def test_a_plugin_declares_every_point_that_it_passes(engine: Engine, consumer: str) -> None:
    guest = make_guest(engine, consumer, npages=4, finalize=False)
    ops = engine.core.consumers[guest.vm].ops
    if ops.populate is not None:
        engine.populate(guest.vm, guest.gpa, b"x" * PAGE_SIZE)
    if ops.finalize is not None:
        engine.finalize(guest.vm)
    engine.pre_fault(guest.vm, guest.gpa, guest.size)
    run(engine, guest, touch(guest.gpa, guest.size))
    engine.migrate(np.array([guest.pfn(0)]))
    engine.fallocate(guest.file, 3, PAGE_SIZE, PAGE_SIZE)
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)
    passed = [p for p in faultpoints.every(engine.core) if p.sort is Sort.VENDOR and p.passages]
    assert passed
    assert [point.name for point in passed if not point.plugin] == []


def test_a_point_that_nobody_declares_is_listed_once_it_was_passed(engine: Engine) -> None:
    engine.core.rules.passage(0, "MADE_UP")
    (point,) = (p for p in faultpoints.every(engine.core) if p.name == "MADE_UP")
    assert (point.sort, point.plugin, point.passages) == (Sort.VENDOR, "", 1)


# --- delays --------------------------------------------------------------------------------------
def run(engine: Engine, guest: Guest, *programme: Instruction) -> None:
    """Run a programme to its end, accepting what the guest touches."""
    engine.set_programme(guest.vm, 0, programme, lazy_accept=True)
    halted(engine.run_vcpu(guest.vm, 0))


@pytest.mark.parametrize("step", ["fault: looked up", "migrate", "scrub", "guest"])
def test_a_delayed_step_is_without_the_lock_and_nobody_else_waits(
    engine: Engine, step: str
) -> None:
    guest = make_guest(engine, "tdx-relocate")
    engine.pre_fault(guest.vm, guest.gpa, PAGE_SIZE)
    engine.add_fault_rule(0, at_step(step), "", delay_ms=250)
    paused: list[tuple[float, bool]] = []

    def pause(seconds: float) -> None:
        others = threading.Thread(target=engine.create_vm, args=("null",), daemon=True)
        others.start()
        others.join(10)
        paused.append((seconds, not others.is_alive()))

    engine.core.pause = pause
    # one page each, which would move under the lock if nobody delayed it
    engine.pre_fault(guest.vm, guest.gpa + PAGE_SIZE, PAGE_SIZE)
    run(engine, guest, write(guest.gpa, PAGE_SIZE, 0x5A))
    assert engine.migrate(np.array([guest.pfn(0)])).count(Outcome.MOVED) == 1
    assert paused == [(0.25, True)]
    assert engine.core.rules.all() == []
    assert guest.sees(0, PAGE_SIZE, 0x5A)
    assert engine.check().violated == ()


def test_a_delay_is_for_its_vm_only(engine: Engine) -> None:
    one, other = make_guest(engine, "tdx-today"), make_guest(engine, "tdx-today")
    seconds: list[float] = []
    engine.core.pause = seconds.append
    engine.add_fault_rule(other.vm, "step/guest", "", delay_ms=40, times=100)
    run(engine, one, touch(one.gpa, PAGE_SIZE))
    assert seconds == []
    run(engine, other, touch(other.gpa, PAGE_SIZE))
    assert seconds
    assert set(seconds) == {0.04}


def test_an_op_and_a_step_of_one_name_are_two_points(engine: Engine) -> None:
    guest = make_guest(engine, "tdx-today", finalize=False)
    op = engine.add_fault_rule(0, "populate", "boom", nth=9)
    step = engine.add_fault_rule(0, "step/populate", "", nth=9, delay_ms=1)
    engine.populate(guest.vm, guest.gpa, b"x" * PAGE_SIZE)
    found = {rule.rule: rule.passages for rule in engine.core.rules.all()}
    assert found == {op.rule: 1, step.rule: 1}
