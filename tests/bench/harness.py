"""One harness for every figure: ours and its floor in turn, round by round, in one run.

Owns the pairing. A figure is the median of the rounds' ratios with their spread, never a time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROUNDS = 7


@dataclass(frozen=True)
class Figure:
    """One goal's outcome; ``ours`` and ``floor`` are medians in ``unit``."""

    goal: str
    ours: float
    floor: float
    unit: str
    ratio_median: float
    ratio_min: float
    ratio_max: float
    rounds: int
    bar: float | None
    holds: bool | None


def paired(
    goal: str,
    ours: Callable[[], object],
    floor: Callable[[], object],
    *,
    per: int = 1,
    bar: float | None = None,
    rounds: int = ROUNDS,
) -> Figure:
    """Time both in turn, after one uncounted round; ``per`` operations are in one call."""
    ours()
    floor()
    pairs = [(_time(ours) / per, _time(floor) / per) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    median = statistics.median(ratios)
    return Figure(
        goal,
        statistics.median(a for a, _ in pairs) * 1e6,
        statistics.median(b for _, b in pairs) * 1e6,
        "us/op",
        median,
        ratios[0],
        ratios[-1],
        rounds,
        bar,
        None if bar is None else median <= bar,
    )


def write(figures: list[Figure], path: Path) -> None:
    """Write a JSON line per figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(figure)) + "\n" for figure in figures))


def _time(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun
