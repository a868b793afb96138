"""The planted bugs still fit the code, every check passes without one, and a sample is killed.

All of them, by the checks they name: `make mutants`.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from planted.catalogue import MUTANTS
from planted.planting import Mutant, NotPlanted, rewrite, source_of
from planted.rows import ROWS
from planted.run import AT_ONCE, is_killed
from planted.watched_scenarios import SCENARIOS

ROOT = Path(__file__).parents[2]
SAMPLE = random.Random(4).sample(sorted(m.name for m in MUTANTS.values() if not m.is_by_test), 6)


def test_every_class_has_its_mutants() -> None:
    assert len(MUTANTS) >= 40
    assert {mutant.row for mutant in MUTANTS.values()} == set(ROWS)


@pytest.mark.parametrize("name", MUTANTS)
def test_it_fits_the_code(name: str) -> None:
    mutant = MUTANTS[name]
    compile(rewrite(mutant, source_of(mutant.module).read_text()), mutant.module, "exec")


@pytest.mark.parametrize("name", MUTANTS)
def test_its_check_is_there(name: str) -> None:
    mutant = MUTANTS[name]
    if not mutant.is_by_test:
        assert mutant.driver in SCENARIOS
        return
    file, function = mutant.driver.split("::")
    assert f"def {function.partition('[')[0]}(" in (ROOT / file).read_text()
    assert not mutant.check


@pytest.mark.parametrize("name", SCENARIOS)
def test_without_a_bug_nothing_is_found(name: str) -> None:
    SCENARIOS[name]()


@pytest.mark.parametrize("source", ["", "old old"])
def test_a_text_that_is_not_there_once_is_an_error(source: str) -> None:
    mutant = Mutant("m", "row", "module", "old", "new", "driver")
    with pytest.raises(NotPlanted, match="times, not once"):
        rewrite(mutant, source)


def test_a_sample_is_killed_by_name() -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, (killed, made) in zip(
            SAMPLE, pool.map(is_killed, [MUTANTS[name] for name in SAMPLE]), strict=True
        ):
            assert killed, f"{name}: {made}"
