"""The kernel's conformance cases as data: each row has a runner here, or a reason to be left out.

Owns the reading of ``cases.csv`` (a copy of the reference) and ``left_out.csv``, and the registry
that ``runs`` fills. A row is found by (file, test, case), spelt exactly as in the table; where the
table repeats one, the later row's case has " (2)" after it.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from helpers import MakeEngine

from rmemd.engine.engine import Engine

HERE = Path(__file__).parent
CASES = HERE / "cases.csv"
LEFT_OUT = HERE / "left_out.csv"
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Case:
    """A row of the reference."""

    file: str
    test: str
    case: str
    expect: str

    @property
    def key(self) -> Key:
        """Return what the row is found by."""
        return self.file, self.test, self.case

    @property
    def id(self) -> str:
        """Return the test's name."""
        return f"{self.file}::{self.test}[{self.case}]"


@dataclass(frozen=True)
class Bench:
    """What a runner works with: an engine of its own, and a way to make others."""

    engine: Engine
    make_engine: MakeEngine


Runner = Callable[[Bench], None]
RUNNERS: dict[Key, Runner] = {}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def read_cases() -> list[Case]:
    """Return every row of the reference, in its order."""
    cases: list[Case] = []
    seen: Counter[Key] = Counter()
    for case in (Case(**row) for row in _rows(CASES)):
        seen[case.key] += 1
        again = seen[case.key]
        cases.append(replace(case, case=f"{case.case} ({again})") if again > 1 else case)
    return cases


def read_left_out() -> dict[Key, str]:
    """Return the rows that are left out, each with its reason."""
    rows = [((row["file"], row["test"], row["case"]), row["reason"]) for row in _rows(LEFT_OUT)]
    found = dict(rows)
    if len(found) != len(rows):
        raise ValueError(f"{LEFT_OUT.name} names a row twice")
    return found


_KNOWN = {case.key for case in read_cases()}


def runs(file: str, test: str, case: str) -> Callable[[Runner], Runner]:
    """Register the function as the runner of a row."""
    key = (file, test, case)
    if key not in _KNOWN:
        raise LookupError(f"{CASES.name} has no row {key}")
    if key in RUNNERS:
        raise LookupError(f"{key} has a runner already")

    def register(runner: Runner) -> Runner:
        RUNNERS[key] = runner
        return runner

    return register
