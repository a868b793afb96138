"""Replay: a trace done again, compared line by line, up to where it goes another way.

Owns what is compared. Unchanged, everything is: what came of each operation, the revision, the
digest of all that was written, and that of the whole state. With another consumer or another option
only what came of the operations is, because the rest must differ: that is the question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from rmemd.trace.explain import explain
from rmemd.trace.format import STATE, Asked, Outcome, Trace, outcome_of
from rmemd.trace.player import Changes, Played, Player
from rmemd.trace.state import total
from rmemd.trace.values import comparable

# of a refusal, what means the same whoever refuses
TOLD = ("reason", "errno", "page", "progress_pages")


class Divergence(Struct, frozen=True):
    """Where a replay went another way.

    Attributes:
        asked: the operation; ``None`` if a state differs after operations that all agreed.
        what: what differs: "outcome", "revision", "writes", "steps" or "state".
        recorded, replayed: what came of it.
        text: all of it, explained.
    """

    asked: Asked | None
    what: str
    recorded: Any
    replayed: Any
    text: str


class Replayed(Struct, frozen=True):
    """What a replay came to.

    Attributes:
        divergences: the first, or all of them if it was to keep going.
        operations: how many were done.
        states: how many digests of the whole state were compared.
        unfinished: operations that have no end in the trace.
        digest: of the whole state at the end.
    """

    divergences: tuple[Divergence, ...]
    operations: int
    states: int
    unfinished: int
    digest: str


def replay(trace: Trace, changes: Changes, keep_going: bool = False) -> Replayed:
    """Do a trace again.

    Raises:
        TraceError: it cannot be begun here.
    """
    player = Player(trace, changes)
    try:
        return _compared(trace, changes, player, keep_going)
    finally:
        player.close()


def _compared(trace: Trace, changes: Changes, player: Player, keep_going: bool) -> Replayed:
    found: list[Divergence] = []
    operations = states = 0
    digest = ""
    for played in player.play():
        if played.asked is None:
            states += not changes
            digest = total(played.came_to["tables"])
        else:
            operations += 1
        found += _differences(trace, changes, player, played)
        if found and not keep_going:
            break
    unfinished = len(trace.asked.keys() - trace.ends.keys())
    return Replayed(tuple(found), operations, states, unfinished, digest)


def _differences(
    trace: Trace, changes: Changes, player: Player, played: Played
) -> Iterator[Divergence]:
    if played.end is None:
        return
    if played.asked is None:
        if not changes and STATE in played.end:
            yield from _states(played)
        return
    recorded = outcome_of(played.end)
    for what, one, other in _pairs(recorded, played, bool(changes)):
        if one != other:
            text = explain(trace, changes, player.engine, played, what, one, other)
            yield Divergence(played.asked, what, one, other, text)
            return


def _pairs(recorded: Outcome, played: Played, changed: bool) -> Iterator[tuple[str, Any, Any]]:
    assert played.end is not None
    if changed:
        yield "outcome", loosely(recorded), loosely(played.came_to)
        return
    yield "outcome", comparable(recorded), comparable(played.came_to)
    yield "steps", 0, played.surplus
    yield "writes", played.end["writes"], played.writes
    yield "revision", played.end["revision"], played.revision


def loosely(outcome: Outcome) -> Outcome:
    """Return of an outcome what can be asked of another consumer."""
    refused = outcome.get("refused")
    if refused is not None:
        return {"refused": {key: refused[key] for key in TOLD if key in refused}}
    return {key: _without_words(comparable(value)) for key, value in outcome.items()}


def _without_words(value: Any) -> Any:
    """Return a result with refusals in it (of pages, of an exit) as ``loosely`` has them."""
    if isinstance(value, dict):
        if "reason" in value:
            return {key: value[key] for key in TOLD if key in value}
        return {key: _without_words(one) for key, one in value.items()}
    return [_without_words(one) for one in value] if isinstance(value, list) else value


def _states(played: Played) -> Iterator[Divergence]:
    assert played.end is not None
    recorded, now = played.end["tables"], played.came_to["tables"]
    names = sorted(
        name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name)
    )
    if names:
        text = (
            f"after {played.end['operations']} operations the state differs, in the tables "
            f"{', '.join(names)}"
        )
        yield Divergence(None, STATE, played.end[STATE], total(now), text)
