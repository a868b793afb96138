"""The figure: two runs' journals, one begun anew again and again, cut, flipped and had back.

Owns ``run``, which the tests and `make journal` share.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from .cutting import check_journal
from .recorded import NEVER, OFTEN, record
from .reopening import Reopenings

# at the end of each 50th frame an engine is had back, and from each part of a few
EVERY, WITHIN = 50, 4


@dataclass
class Journal:
    """What one run's journal came to; attributes as in ``cutting.Figure``.

    Attributes:
        reopened: engines that were had back.
    """

    operations: int
    frames: int
    nbytes: int
    generations: int
    cuts: int
    flips: int
    reads: int
    reopened: int
    wrong: list[str]


@dataclass
class Figure:
    """What came of both runs."""

    operations: int
    flips: int
    seconds: float = 0.0
    journals: list[Journal] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Return what is wrong, a line each."""
        return [line for one in self.journals for line in one.wrong]

    @property
    def holds(self) -> bool:
        """Return whether it is what was promised."""
        whole = all(
            one.cuts == one.nbytes + one.generations and one.flips == self.flips and one.reopened
            for one in self.journals
        )
        turns = max(one.generations for one in self.journals)
        return not self.wrong and whole and turns > 1

    def __str__(self) -> str:
        lines = [
            f"journal of {one.operations} operations, {one.frames} frames, {one.nbytes} bytes in"
            f" {one.generations} generations: {one.cuts} cuts, {one.flips} flips,"
            f" {one.reads} read in whole, {one.reopened} engines had back, {len(one.wrong)} wrong"
            for one in self.journals
        ]
        frames, nbytes, cuts, flips = (
            sum(getattr(one, what) for one in self.journals)
            for what in ("frames", "nbytes", "cuts", "flips")
        )
        lines.append(
            f"{self.operations} operations, {frames} frames, {nbytes} bytes: {cuts} cuts,"
            f" {flips} flips, {len(self.wrong)} wrong, {self.seconds:.0f} s"
        )
        return "\n".join(lines)


def run(operations: int, flips: int, seed: int, often: int = OFTEN, within: int = WITHIN) -> Figure:
    """Run both; without checkpoints, and with one after each ``often`` bytes."""
    begun = time.monotonic()
    tasks = [(operations, flips, seed, each, within) for each in (NEVER, often)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        figure = Figure(operations, flips, journals=list(pool.map(check, tasks)))
    figure.seconds = time.monotonic() - begun
    return figure


def check(task: tuple[int, int, int, int, int]) -> Journal:
    """Make one run and check its journal: operations, flips, seed, checkpoint bytes, frames cut."""
    operations, flips, seed, checkpoint_bytes, within = task
    seen = Reopenings(EVERY, within)
    recorded = record(operations, seed, checkpoint_bytes, seen.look)
    found = check_journal(recorded, flips, seed)
    return Journal(
        operations, recorded.frames, recorded.nbytes, len(recorded.generations), found.cuts,
        found.flips, found.reads, seen.cuts, [*seen.wrong, *found.wrong],
    )  # fmt: skip
