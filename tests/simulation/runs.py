"""Simulated runs: played from a seed, shortened where they fail, and explained."""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .actions import Action, Shape, make_run, shape
from .world import Figures, ViolationError, World

# actions of a run, of which about two in three advance something by a step
LENGTH = 3000
TRIES_MAX = 400


@dataclass(frozen=True)
class Played:
    """How a run ended.

    Attributes:
        failure: what was violated, "" if nothing was; ``kind`` tells one failure from another.
        at: the action after which it was.
    """

    figures: Figures
    failure: str = ""
    kind: str = ""
    at: int = 0


def play(seed: int, actions: Sequence[Action], looks: Shape | None = None) -> Played:
    """Play actions on a new world."""
    world = World(seed, looks or shape(seed))
    at = 0
    try:
        for at, action in enumerate(actions):
            world.act(action)
        world.finish()
    except ViolationError as violation:
        text = str(violation).partition(": ")[2]
        # the rule of it, without the pages and revisions that it was seen at
        return Played(world.figures, str(violation), _kind(text), at)
    except Exception as error:
        where = traceback.format_exception(error)[-3:]
        return Played(world.figures, "".join(where), type(error).__name__, at)
    finally:
        world.close()
        gc.collect()
    return Played(world.figures)


def _kind(text: str) -> str:
    return "".join(c for c in text.rpartition(": ")[0] + text[-30:] if not c.isdigit())[-40:]


def shrink(seed: int, actions: Sequence[Action], kind: str, tries_max: int = TRIES_MAX) -> list[Action]:
    """Take out whatever is not needed for a failure of a kind, by halves and then one by one."""
    best = list(actions)
    size, tries = max(len(best) // 2, 1), 0
    while size and tries < tries_max:
        at, smaller = 0, False
        while at < len(best) and tries < tries_max:
            candidate, tries = best[:at] + best[at + size :], tries + 1
            found = play(seed, candidate)
            if found.kind == kind:
                best, smaller = candidate[: found.at + 1] if found.at else candidate, True
            else:
                at += size
        size = size if smaller and size == 1 else size // 2
    return best


def explain(seed: int, length: int) -> str:
    """Say a run's failure with few actions that show it; "" if it does not fail."""
    actions = make_run(seed, length)
    found = play(seed, actions)
    if not found.failure:
        return ""
    short = shrink(seed, actions, found.kind)
    again = play(seed, short)
    lines = [f"seed {seed}, step {found.figures.steps}: {found.failure}", f"of {shape(seed)}"]
    return "\n".join([*lines, f"{len(short)} actions show: {again.failure}", *map(str, short)])


def total(figures: Sequence[Figures]) -> tuple[int, Counter[str]]:
    """Return how many steps there were, and faults by kind."""
    faults: Counter[str] = Counter()
    for one in figures:
        faults.update(one.faults)
    return sum(one.steps for one in figures), faults
