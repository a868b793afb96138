"""Simulated runs: played from a seed, shortened where they fail, and explained."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from . import lockstep
from .actions import Shape, make_run, shape
from .figures import Figures, Played, failed
from .world import World

Action = tuple[Any, ...]
Player = Callable[[int, Sequence[Any]], Played]

# actions of a run, of which about two in three advance something by a step
LENGTH = 3000
TRIES_MAX = 150


def play(seed: int, actions: Sequence[Action], looks: Shape | None = None) -> Played:
    """Play actions on a new world."""
    world = World(seed, looks or shape(seed))
    at = 0
    try:
        for at, action in enumerate(actions):  # noqa: B007
            world.act(action)
        world.finish()
    except Exception as error:
        return failed(world.figures, error, at)
    finally:
        world.close()
        gc.collect()
    return Played(world.figures)


def run_of(seed: int, length: int = LENGTH) -> tuple[Player, list[Action]]:
    """Return what plays the run of a seed, and its actions."""
    if seed % lockstep.EVERY == lockstep.EVERY - 1:
        return lockstep.play, lockstep.make_run(seed, length * lockstep.LENGTH // LENGTH)
    return play, make_run(seed, length)


def shrink(
    seed: int,
    actions: Sequence[Action],
    kind: str,
    tries_max: int = TRIES_MAX,
    player: Player | None = None,
) -> list[Action]:
    """Take out whatever is not needed for a failure of a kind, by halves and then one by one."""
    plays = player or play
    best = list(actions)[: plays(seed, actions).at + 1]
    size, tries = max(len(best) // 2, 1), 0
    while size and tries < tries_max:
        at, smaller = 0, False
        while at < len(best) and tries < tries_max:
            candidate, tries = best[:at] + best[at + size :], tries + 1
            found = plays(seed, candidate)
            if found.kind == kind:
                best, smaller = candidate[: found.at + 1] if found.at else candidate, True
            else:
                at += size
        size = size if smaller and size == 1 else size // 2
    return best


def explain(seed: int, length: int) -> str:
    """Say a run's failure with few actions that show it; "" if it does not fail."""
    plays, actions = run_of(seed, length)
    found = plays(seed, actions)
    if not found.failure:
        return ""
    short = shrink(seed, actions, found.kind, player=plays)
    again = plays(seed, short)
    lines = [f"seed {seed}, step {found.figures.steps}: {found.failure}", f"of {shape(seed)}"]
    return "\n".join([*lines, f"{len(short)} actions show: {again.failure}", *map(str, short)])


def total(figures: Sequence[Figures]) -> tuple[int, Counter[str]]:
    """Return how many steps there were, and faults by kind."""
    faults: Counter[str] = Counter()
    for one in figures:
        faults.update(one.faults)
    return sum(one.steps for one in figures), faults
