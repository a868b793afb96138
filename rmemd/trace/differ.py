"""Two traces side by side: what was asked in one and not in the other, and what came of it.

Owns the comparison of traces as they lie there; nothing is done again. Bytes are compared by their
length: each recording has its own key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import Any

from msgspec import Struct

from rmemd.trace.explain import said
from rmemd.trace.format import Asked, Trace, outcome_of
from rmemd.trace.operations import text_of
from rmemd.trace.values import comparable

# of the headers, what may be said to differ
HEADER = ("rmemd", "options", "linux_release", "plugins", "consumers")


class Difference(Struct, frozen=True):
    """One thing that differs.

    Attributes:
        kind: "header", "only" (asked in one), "outcome" or "interleaving".
        one, other: the operations' numbers, 0 where there is none.
        text: it, as people read it.
    """

    kind: str
    one: int
    other: int
    text: str


def diff(one: Trace, other: Trace) -> list[Difference]:
    """Return what differs between two traces; empty: they say the same."""
    found = list(_headers(one, other))
    pairs: list[tuple[int, int]] = []
    for difference in _operations(one, other, pairs):
        found.append(difference)
    if not any(difference.kind == "only" for difference in found):
        found += _interleaving(one, other, dict(pairs))
    return found


def _headers(one: Trace, other: Trace) -> Iterator[Difference]:
    for name in HEADER:
        a, b = one.header.get(name), other.header.get(name)
        if a != b:
            yield Difference("header", 0, 0, f"{name}: {_changed(a, b)}")
    a, b = ("checkpoint" in trace.header for trace in (one, other))
    if a != b:
        begun = {True: "a host that had been at work", False: "a fresh host"}
        yield Difference("header", 0, 0, f"begun on {begun[a]}, and on {begun[b]}")


def _changed(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
        return ", ".join(f"{name} {a.get(name)} and {b.get(name)}" for name in names)
    return f"{a} and {b}"


def _operations(one: Trace, other: Trace, pairs: list[tuple[int, int]]) -> Iterator[Difference]:
    """Yield operations of one alone, and those that came to something else; fill ``pairs`` in."""
    first, second = list(one.asked.values()), list(other.asked.values())
    matcher = SequenceMatcher(None, _keys(first), _keys(second), autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag != "equal":
            for asked in first[a:b]:
                yield Difference("only", asked.number, 0, f"only in the first: {_text(asked)}")
            for asked in second[c:d]:
                yield Difference("only", 0, asked.number, f"only in the second: {_text(asked)}")
            continue
        for mine, theirs in zip(first[a:b], second[c:d], strict=True):
            pairs.append((mine.number, theirs.number))
            yield from _outcomes(one, other, mine, theirs)


def _keys(operations: list[Asked]) -> list[str]:
    return [json.dumps([one.method, comparable(one.args)], sort_keys=True) for one in operations]


def _text(asked: Asked) -> str:
    return f"operation {asked.number}, {text_of(asked.method, asked.args)}"


def _outcomes(one: Trace, other: Trace, mine: Asked, theirs: Asked) -> Iterator[Difference]:
    a = outcome_of(one.ends.get(mine.number, {}))
    b = outcome_of(other.ends.get(theirs.number, {}))
    if comparable(a) != comparable(b):
        lines = (
            f"{_text(mine)}, came to something else",
            f"  first:  {said(a) if a else 'was still under way'}",
            f"  second: {said(b) if b else 'was still under way'}",
        )
        yield Difference("outcome", mine.number, theirs.number, "\n".join(lines))


def _interleaving(one: Trace, other: Trace, pairs: dict[int, int]) -> Iterator[Difference]:
    """Yield where operations of which all are alike took the lock in another order."""
    mine = [pairs[number] for number in _order(one)]
    theirs = _order(other)
    if mine == theirs:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
        min(len(mine), len(theirs)),
    )
    back = {there: here for here, there in pairs.items()}
    number = back.get((mine[at:] or theirs[at:])[0], 0)
    text = (
        f"the operations took turns otherwise from turn {at + 1} on "
        f"({len(mine)} turns and {len(theirs)})"
    )
    yield Difference("interleaving", number, 0, text)


def _order(trace: Trace) -> list[int]:
    """Return whose turn it was, turn by turn."""
    return [
        number
        for line in trace.lines
        for kind, number in [next(iter(line.items()))]
        if kind in ("begin", "step")
    ]
