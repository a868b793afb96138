"""Whether a concurrent history of one object is linearizable: Wing and Gong, with Lowe's memory.

Owns ``check``. A history is linearizable if every call can be thought to have happened at one
instant between its invocation and its return, so that a sequential model gives every result. The
search goes over which call comes next, and never twice over the same calls done in the same state.

Revisions prune it. The daemon's journal counts commits, one after the other, for all objects. Put
commit r at 2r and the time between commits r and r + 1 at 2r + 1: each call then has a true
position on that axis, which never decreases with time, since all calls take effect under one lock.
What is known of it (``span``):

- a reply carries the revision at which its call ended, taken under the lock: the call is not after
  it;
- a query is answered with the very revision it saw: it is at 2r + 1;
- a call of one commit is answered with that: it is at 2r;
- a call is not before ``floor``, the highest revision that any reply had carried before the call
  was made, whoever got it: the journal had come so far already;
- a call that did commit is at an even position, so after ``floor``'s state and not after 2r.

So if the last position that X can have is before the first that Y can have, X took effect before
Y, and the search may refuse to try Y first. The pruning is sound: both this order and that of real
time hold of the order in which calls really took effect, so no linearizable history is refuted. A
call whose span is empty (its revision went back, say) is before itself, and so is never explained.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

OPEN = math.inf
VISITS = 200_000
Apply = Callable[[Any, "Operation"], tuple[Hashable, Any]]


@dataclass(frozen=True)
class Operation:
    """One call, as its client saw it.

    Attributes:
        client: whose; a client has one call open at a time.
        call: what was asked for, with ``args``.
        invoked: when it was sent, on a clock that all clients share; ``returned`` when it was
            answered, ``OPEN`` if it was not: it may have taken effect, may yet, or never will.
        result: what was answered.
        revision: what the reply carried, None if there was none.
        exact: whether that is the state's that was looked at, or the very commit that it made.
        commits: whether the reply says that it changed the journal's state.
        floor: the highest revision in a reply that came before ``invoked``.
        door: "grpc" or "session".
    """

    client: int
    call: str
    args: tuple[Any, ...]
    invoked: float
    returned: float
    result: Any = None
    revision: int | None = None
    exact: bool = False
    commits: bool = False
    floor: int = 0
    door: str = ""

    @property
    def span(self) -> tuple[float, float]:
        """Return the first and the last position that it can have among the commits."""
        first = 2 * self.floor + 1
        if self.revision is None:
            return first, OPEN
        last = 2 * self.revision + 1 - self.commits
        return max(first + self.commits, last) if self.exact else first + self.commits, last


@dataclass(frozen=True)
class Verdict:
    """What the search found.

    Attributes:
        linearizable: None if it gave up undecided.
        order: the calls in an order that explains them, if there is one.
        visits: how many states it looked at.
    """

    linearizable: bool | None
    order: list[Operation] = field(default_factory=list)
    visits: int = 0


def check(
    history: Sequence[Operation],
    initial: Hashable,
    apply: Apply,
    *,
    revisions: bool = True,
    budget: int = VISITS,
) -> Verdict:
    """Look for an order that explains a history of one object.

    Args:
        history: its calls.
        initial: the model's state before them.
        apply: what a call does to a state: the state after it, and its result.
        revisions: whether those of the replies are used.
        budget: how many states to look at before giving up.
    """
    ops = sorted(history, key=lambda op: op.invoked)
    before = _predecessors(ops, revisions)
    answered = sum(1 << i for i, op in enumerate(ops) if op.returned < OPEN)
    seen: set[tuple[int, Hashable]] = set()
    path: list[Operation] = []
    stack = [_ways(ops, before, 0, initial, apply)]
    while stack:
        way = next(stack[-1], None)
        if way is None:
            stack.pop()
            if path:
                path.pop()
            continue
        op, done, state = way
        if done & answered == answered:
            return Verdict(True, [*path, op], len(seen))
        if (done, state) in seen:
            continue
        if len(seen) >= budget:
            return Verdict(None, visits=len(seen))
        seen.add((done, state))
        path.append(op)
        stack.append(_ways(ops, before, done, state, apply))
    return Verdict(not answered, visits=len(seen))


def _ways(
    ops: list[Operation], before: list[int], done: int, state: Hashable, apply: Apply
) -> Iterator[tuple[Operation, int, Hashable]]:
    """Yield each call that may come next and that the model explains, by when it ended."""
    for i in sorted(_next(ops, before, done), key=lambda i: ops[i].returned):
        after, result = apply(state, ops[i])
        if ops[i].returned == OPEN or result == ops[i].result:
            yield ops[i], done | 1 << i, after


def _next(ops: list[Operation], before: list[int], done: int) -> Iterator[int]:
    soonest = OPEN
    for i in range((~done & (done + 1)).bit_length() - 1, len(ops)):
        # invoked after a call that is not done had returned, and so are all that follow
        if ops[i].invoked > soonest:
            return
        if not done >> i & 1:
            soonest = min(soonest, ops[i].returned)
            if not before[i] & ~done:
                yield i


def _predecessors(ops: list[Operation], revisions: bool) -> list[int]:
    """Return for each call the set (bits) of those that took effect before it for certain."""
    sets = _ended_before([op.returned for op in ops], [op.invoked for op in ops])
    if revisions:
        spans = [op.span for op in ops]
        by_position = _ended_before([last for _, last in spans], [first for first, _ in spans])
        sets = [one | other for one, other in zip(sets, by_position, strict=True)]
    return sets


def _ended_before(ends: list[float], begins: list[float]) -> list[int]:
    order = sorted(range(len(ends)), key=ends.__getitem__)
    sets = list(accumulate((1 << i for i in order), int.__or__, initial=0))
    ascending = [ends[i] for i in order]
    return [sets[bisect_left(ascending, begin)] for begin in begins]
