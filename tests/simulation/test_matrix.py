"""Goes through the fault matrix: runs each row's scenarios, and finds its tests."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from simulation.matrix import MATRIX, Row

TESTS = Path(__file__).parent.parent
SCENARIOS = [scenario for row in MATRIX for scenario in row.scenarios]


@cache
def _tests_of(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


@pytest.mark.parametrize("row", MATRIX, ids=lambda row: row.inject)
def test_each_row_is_driven_by_something_that_is_there(row: Row) -> None:
    assert row.scenarios or row.tests
    for named in row.tests:
        file, _, name = named.partition("::")
        assert name in _tests_of(file), named


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_what_is_expected_comes_true(scenario: Callable[[], None]) -> None:
    scenario()
