"""Shrinking: the fewest operations of a trace that still show what one wants to see.

Owns the search (delta debugging, Zeller and Hildebrandt 2002, the minimising form) and what can be
wanted: a refusal, a violated invariant, or a divergence under a change. What is left is minimal in
that no single operation can be left out. An object keeps the handle that it had, whatever else was
made before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgspec import Struct

from rmemd.engine import invariants
from rmemd.engine.stepwise import DeadlockError
from rmemd.trace.format import Outcome, Trace, TraceError
from rmemd.trace.player import Changes, Player
from rmemd.trace.replayer import loosely

Shows = Callable[[Trace], bool]


class Shrunk(Struct, frozen=True):
    """What is left of a trace, and how many times it was done again to find that."""

    trace: Trace
    before: int
    runs: int


def shrink(trace: Trace, shows: Shows) -> Shrunk:
    """Return the trace of the fewest operations for which ``shows`` is true.

    Raises:
        TraceError: the whole trace does not show it.
    """
    runs = 0
    known: dict[tuple[int, ...], bool] = {}

    def still(numbers: Sequence[int]) -> bool:
        nonlocal runs
        key = tuple(numbers)
        if key not in known:
            runs += 1
            known[key] = shows(trace.only(key))
        return known[key]

    numbers = list(trace.asked)
    if not still(numbers):
        raise TraceError("the trace does not show what it is to be shrunk to")
    left = _minimal(numbers, still)
    return Shrunk(trace.only(left), len(numbers), runs)


def _minimal(numbers: list[int], still: Callable[[Sequence[int]], bool]) -> list[int]:
    parts = 2
    while len(numbers) >= 2:
        size = -(-len(numbers) // parts)
        for at in range(0, len(numbers), size):
            rest = numbers[:at] + numbers[at + size :]
            if rest and still(rest):
                numbers, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                return numbers
            parts = min(parts * 2, len(numbers))
    return numbers


# --- what can be wanted --------------------------------------------------------------------------
def refusal(reason: str, changes: Changes) -> Shows:
    """Want an operation, or a page of one, to be refused for a reason."""
    return partial(_refused, reason, changes)


def violation(invariant: str, changes: Changes) -> Shows:
    """Want an invariant to be violated after some operation; "": any."""
    return partial(_violated, invariant, changes)


def divergence(trace: Trace, changes: Changes) -> Shows:
    """Want the first operation that diverges under a change to do so in the same way.

    Raises:
        TraceError: none does.
    """
    for number, before in (first := _outcomes(trace, Changes())).items():
        after = _outcomes(trace, changes).get(number) if number in first else None
        if after is not None and before != after:
            wanted = (trace.asked[number].method, _kind(before), _kind(after))
            return partial(_diverged, wanted, changes)
    raise TraceError("nothing diverges, so there is nothing to shrink to")


def _refused(reason: str, changes: Changes, trace: Trace) -> bool:
    return any(reason in _reasons(outcome) for outcome in _outcomes(trace, changes).values())


def _violated(invariant: str, changes: Changes, trace: Trace) -> bool:
    player = Player(trace, changes, force_handles=True)
    try:
        for _ in player.play():
            with player.engine.core.locked():
                found = invariants.check(player.engine.core)
            if any(one.startswith(f"{invariant}:") or not invariant for one in found):
                return True
        return False
    except DeadlockError:
        return False
    finally:
        player.close()


def _diverged(wanted: tuple[str, Any, Any], changes: Changes, trace: Trace) -> bool:
    before, after = _outcomes(trace, Changes()), _outcomes(trace, changes)
    return any(
        (trace.asked[number].method, _kind(outcome), _kind(after.get(number, {}))) == wanted
        for number, outcome in before.items()
    )


def _outcomes(trace: Trace, changes: Changes) -> dict[int, Outcome]:
    player = Player(trace, changes, force_handles=True)
    found = {}
    try:
        for played in player.play():
            if played.asked is not None:
                found[played.asked.number] = loosely(played.came_to)
    except DeadlockError:
        # operations that are left may wait for one that was left out
        pass
    finally:
        player.close()
    return found


def _kind(outcome: Outcome) -> Any:
    """Return what is the same of an outcome whatever its numbers are."""
    return sorted(_reasons(outcome)) or sorted(_names(outcome))


def _reasons(value: Any) -> set[str]:
    """Return the reasons of all refusals in an outcome."""
    if isinstance(value, dict):
        mine = {value["reason"]} if "errno" in value and "reason" in value else set()
        return mine.union(*map(_reasons, value.values()))
    return set().union(*map(_reasons, value)) if isinstance(value, list) else set()


def _names(value: Any) -> set[str]:
    """Return the words in an outcome: what a page came to, why a vCPU exited."""
    if isinstance(value, dict):
        return set(value).union(*map(_names, value.values()))
    if isinstance(value, list):
        return set().union(*map(_names, value))
    return {value} if isinstance(value, str) else set()
