"""Wrong replies, planted in recorded histories: would they be seen?

Owns four ways to be wrong, each of which contradicts what the other replies say for certain:

- a stale read: a query shows the state before a change that was not after the query's revision,
  while their times overlap;
- a lost write: the same of a change that had been answered before the query was made;
- a wrong count: one more or one less than there was;
- a moved revision: a query's revision is from before a change that it shows.

Certain means: no other change may have come in between, and the answer does not depend on the order
of the changes before. An answer that is merely not what was recorded may well be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from random import Random
from typing import Any

from linearizability.checker import Operation, check
from linearizability.models import MODELS, Refused
from linearizability.recorder import Recorded

QUERIES = {"stat", "pins", "get", "look"}
# answers that follow from which changes there were, in whatever order
ORDERLESS = {("halves", "stat"), ("halves", "close"), ("in-place", "pins")}


@dataclass(frozen=True)
class Plant:
    """An object's history with one reply that is wrong."""

    how: str
    kind: str
    calls: list[Operation]
    right: Operation
    wrong: Operation

    def refuted(self, *, revisions: bool = True) -> bool:
        """Return whether the checker sees it."""
        verdict = check(self.calls, *MODELS[self.kind], revisions=revisions)
        return verdict.linearizable is False


@dataclass(frozen=True)
class Shown:
    """A query that shows a change: what it would have answered before that, and the change.

    ``unseen``: before that change it would never have answered what it did.
    """

    kind: str
    calls: list[Operation]
    query: Operation
    before: Any
    change: Operation
    unseen: bool

    @property
    def orderless(self) -> bool:
        """Return whether the answer depends on no order."""
        return (self.kind, self.query.call) in ORDERLESS

    @property
    def certain(self) -> bool:
        """Return whether the change is the last before the query, by the revisions alone."""
        change, query = self.change.span, self.query.span
        between = any(
            op is not self.change and op.span[1] >= change[0] and op.span[0] <= query[1]
            for op in self.calls
            if op.call not in QUERIES
        )
        return change[1] < query[0] and not between


def plants(histories: list[Recorded], count: int, seed: int) -> list[Plant]:
    """Return wrong replies, one each in a history, of all ways equally many while there are."""
    random = Random(seed)
    pools = list(every_plant(histories).values())
    for pool in pools:
        random.shuffle(pool)
    dealt = [plant for deal in zip_longest(*pools) for plant in deal if plant is not None]
    return dealt[:count]


def every_plant(histories: list[Recorded]) -> dict[str, list[Plant]]:
    """Return every reply that can be made wrong, by how."""
    pools: dict[str, list[Plant]] = {how: [] for how in (*_WAYS, COUNT)}
    for one in histories:
        for kind, calls in zip(one.kinds, one.objects, strict=True):
            for shown in _shown(kind, calls):
                for how, make in _WAYS.items():
                    pools[how] += _planted(how, kind, calls, shown.query, make(shown))
            for op in calls:
                pools[COUNT] += _planted(COUNT, kind, calls, op, _miscounted(kind, calls, op))
    return pools


def _planted(
    how: str, kind: str, calls: list[Operation], right: Operation, wrong: Operation | None
) -> list[Plant]:
    if wrong is None:
        return []
    return [Plant(how, kind, [wrong if op is right else op for op in calls], right, wrong)]


def _shown(kind: str, calls: list[Operation]) -> Iterator[Shown]:
    """Yield what queries show of the changes before them, by an order that explains the history."""
    initial, apply = MODELS[kind]
    states, order = [initial], check(calls, initial, apply).order
    for op in order:
        states.append(apply(states[-1], op)[0])
    for at, query in enumerate(order):
        if query.call not in QUERIES or not query.exact:
            continue
        answers = [apply(state, query)[1] for state in states[: at + 1]]
        for i, (earlier, later) in enumerate(pairwise(answers)):
            # the last change of the answer only: older ones may be undone by younger
            last = earlier != later and all(later == one for one in answers[i + 1 :])
            if last and not isinstance(earlier, Refused):
                unseen = later not in answers[: i + 1]
                yield Shown(kind, calls, query, earlier, order[i], unseen)


def _stale(shown: Shown) -> Operation | None:
    overlap = shown.change.returned > shown.query.invoked
    definite = shown.orderless or shown.query.call == "get"
    if not (overlap and definite and shown.certain):
        return None
    return replace(shown.query, result=shown.before)


def _lost(shown: Shown) -> Operation | None:
    answered = shown.change.returned < shown.query.invoked
    definite = shown.orderless or shown.query.call == "get"
    if not (answered and definite and shown.certain):
        return None
    return replace(shown.query, result=shown.before)


def _moved(shown: Shown) -> Operation | None:
    # as old as it can be without contradicting the replies that came before it was asked
    query = replace(shown.query, revision=shown.query.floor)
    definite = shown.orderless and shown.unseen
    if not definite or shown.change.span[0] <= query.span[1]:
        return None
    return query if _settled(shown.calls, query) else None


def _miscounted(kind: str, calls: list[Operation], op: Operation) -> Operation | None:
    countable = (kind, op.call) in ORDERLESS - {("in-place", "pins")}
    if not countable or op.result is None or isinstance(op.result, Refused):
        return None
    if not _settled(calls, op):
        return None
    by = 1 if int(op.invoked) % 2 else -1
    if op.call == "stat":
        return replace(op, result=(op.result[0] + by, op.result[1]))
    return replace(op, result=op.result + by)


def _settled(calls: list[Operation], at: Operation) -> bool:
    """Return whether every change of a history was before or after a call for certain."""
    first, last = at.span
    return all(
        op.span[1] < first or op.span[0] > last
        for op in calls
        if op.call not in QUERIES and (op.call, op.invoked) != (at.call, at.invoked)
    )


COUNT = "wrong count"
_WAYS: dict[str, Callable[[Shown], Operation | None]] = {
    "stale read": _stale, "lost write": _lost, "moved revision": _moved,
}  # fmt: skip
