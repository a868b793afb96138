"""Runs the kernel's conformance cases: one test per row of cases.csv that the model covers."""

from __future__ import annotations

import pytest
from helpers import MakeEngine
from kernel import conversions, guest_memfd, memory_regions, pre_fault, private_memory
from kernel.catalogue import RUNNERS, Bench, Case, read_cases, read_left_out

from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check

# importing the modules registers their runners
RUNNER_MODULES = (conversions, guest_memfd, memory_regions, pre_fault, private_memory)
COVERED = [case for case in read_cases() if case.key in RUNNERS]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in COVERED])
@pytest.mark.usefixtures("count_case")
def test_kernel_case(case: Case, engine: Engine, make_engine: MakeEngine) -> None:
    RUNNERS[case.key](Bench(engine, make_engine))
    assert check(engine.core) == []


def test_every_row_is_either_run_or_left_out_with_a_reason() -> None:
    keys = [case.key for case in read_cases()]
    left_out = read_left_out()
    assert len(set(keys)) == len(keys)
    assert set(keys) == RUNNERS.keys() | left_out.keys()
    assert not RUNNERS.keys() & left_out.keys()
    assert all(reason.strip() for reason in left_out.values())
