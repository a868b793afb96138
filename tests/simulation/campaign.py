"""Many simulated runs, by two processes, until there were enough steps, faults and seeds.

The trace of a run is a digest over every step of it. Some runs are played again by a process whose
strings hash otherwise, and must leave the same trace: what a seed shows, it shows again.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from multiprocessing import get_context

from .figures import Played
from .runs import LENGTH, explain, run_of

PROCESSES = 2
# of so many runs, one is played again
REPLAYED = 20
PROGRESS_SECONDS = 30.0


@dataclass(frozen=True)
class Goal:
    """How much there must be."""

    steps: int
    faults: int
    seeds: int


@dataclass
class Sum:
    """What the runs came to so far; ``traces`` by seed."""

    steps: int
    faults: Counter[str]
    verified: int
    traces: dict[int, str]
    failures: dict[int, str]
    compared: int = 0
    differences: int = 0

    def add(self, seed: int, played: Played) -> None:
        """Count a run."""
        self.steps += played.figures.steps
        self.faults.update(played.figures.faults)
        self.verified += played.figures.verified
        self.compared += played.figures.compared
        self.differences += played.figures.differences
        self.traces[seed] = played.figures.trace
        if played.failure:
            self.failures[seed] = played.failure

    def reaches(self, goal: Goal) -> bool:
        """Return whether there was enough."""
        enough = self.steps >= goal.steps and self.faults.total() >= goal.faults
        return enough and len(self.traces) >= goal.seeds

    def digest(self) -> str:
        """Return one digest of all traces, in order of seed."""
        lines = (f"{seed} {trace}\n" for seed, trace in sorted(self.traces.items()))
        return blake2b("".join(lines).encode(), digest_size=8).hexdigest()


def run_seed(seed: int, length: int = LENGTH) -> Played:
    """Play the run of a seed."""
    plays, actions = run_of(seed, length)
    return plays(seed, actions)


def run_until(goal: Goal, first_seed: int = 0) -> Sum:
    """Play one seed after the other until there was enough, or one of them fails."""
    done, seeds = Sum(0, Counter(), 0, {}, {}), count(first_seed)
    told = began = time.monotonic()
    with _pool("0") as pool:
        running: dict[Future[Played], int] = {}
        while running or not (done.reaches(goal) or done.failures):
            while len(running) < PROCESSES and not (done.reaches(goal) or done.failures):
                seed = next(seeds)
                running[pool.submit(run_seed, seed)] = seed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done.add(running.pop(future), future.result())
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                rate = done.steps / (told - began)
                print(
                    f"{done.steps} steps, {done.faults.total()} faults, {len(done.traces)} seeds: "
                    f"{rate:.0f} steps/s",
                    flush=True,
                )
    return done


def replay(done: Sum) -> list[int]:
    """Play some of the runs again, elsewhere; return those that went otherwise."""
    seeds = sorted(done.traces)[::REPLAYED]
    with _pool("1") as pool:
        again = pool.map(run_seed, seeds)
        pairs = zip(seeds, again, strict=True)
        return [seed for seed, played in pairs if played.figures.trace != done.traces[seed]]


def tell(goal: Goal, done: Sum, otherwise: list[int]) -> int:
    """Print what it came to; return the exit status."""
    for seed in sorted(done.failures):
        print(f"FAILED: seed {seed}: {done.failures[seed]}; now shortening it", flush=True)
        print(explain(seed, LENGTH), flush=True)
    for seed in otherwise:
        print(f"FAILED: seed {seed} went otherwise when it was played again")
    kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(done.faults.items()))
    same = "identical on replay" if not otherwise else "NOT identical on replay"
    print(f"faults: {kinds}; guests read {done.verified} pages back")
    print(
        f"{done.steps} steps, {done.faults.total()} faults, {len(done.traces)} seeds, "
        f"{done.compared} operations compared with the oracle: "
        f"{len(done.failures) - done.differences} violations, {done.differences} differences, "
        f"trace hash {done.digest()}, {same}"
    )
    return int(bool(done.failures or otherwise) or not done.reaches(goal))


@contextmanager
def _pool(hash_seed: str) -> Iterator[ProcessPoolExecutor]:
    """Yield processes whose strings hash by a seed."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = hash_seed
    try:
        with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
            yield pool
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before
