"""Simulate: ``make sim``; one run again: ``make sim SEED=17``; all night: ``make sim NIGHTLY=1``.

What is explored to its end comes first, since it takes less.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from .campaign import Goal, replay, run_until, tell
from .explore import SCOPES, run
from .runs import LENGTH, explain

PUSH = Goal(steps=1_000_000, faults=10_000, seeds=200)
NIGHTLY = Goal(steps=20_000_000, faults=200_000, seeds=4_000)


def main() -> int:
    """Run, and return the exit status."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="play one run, and explain it if it fails")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=0, help="at least so many steps")
    parser.add_argument("--explore", choices=("only", "no", "too"), default="too")
    args = parser.parse_args()
    if args.seed is not None:
        failure = explain(args.seed, LENGTH)
        print(failure or f"seed {args.seed}: 0 violations")
        return int(bool(failure))
    if args.explore != "no":
        explore_all()
    if args.explore == "only":
        return 0
    goal = NIGHTLY if os.environ.get("NIGHTLY") else PUSH
    if args.steps:
        goal = Goal(args.steps, args.steps // 100, max(1, args.steps * 200 // 1_000_000))
    done = run_until(goal, args.first)
    return tell(goal, done, replay(done) if not done.failures else [])


def explore_all() -> None:
    """Explore every scope; one that has a broken state ends it all with an exception."""
    for scope in SCOPES:
        began = time.monotonic()
        found = run(scope)
        place = "in place" if scope.in_place else "attributes"
        print(
            f"{scope.consumer}, {place}, {scope.vms} VMs x {scope.npages} pages, "
            f"{scope.frames} frames: {found.states} states, {found.transitions} transitions: "
            f"fixpoint, 0 violations ({time.monotonic() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
