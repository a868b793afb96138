"""The invariants I1-I25 of reliability.md §3: what each says, and one function that checks them.

Owns ``check``, which reads everything and writes nothing, and the tables of its parts. A part is
about the state: ``engine.pageinvariants`` and ``engine.holderinvariants`` have them, and those
above the engine add theirs (``core.parts``). What is about a transition is seen by monitors as it
happens (``engine.monitors``), if there are any, and told by the next check. What each part and
each monitor looks at is said in its docstring, and listed from there (``listed``). A check costs a
sweep of the host, so it is for tests, for a daemon's self-check and for simulation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import Enum
from inspect import cleandoc

from msgspec import Struct

from rmemd.engine import holderinvariants, pageinvariants, transitions
from rmemd.engine.core import Core
from rmemd.engine.monitors import Monitors

Part = Callable[[Core], Iterator[str]]
SAID = re.compile(r"^(I\d+): (.+?)\.?$", re.MULTILINE)

PARTS: tuple[Part, ...] = (
    pageinvariants.owners, pageinvariants.counts, pageinvariants.free, pageinvariants.mirrors,
    pageinvariants.in_place, pageinvariants.movable, pageinvariants.failed, pageinvariants.nodes,
    holderinvariants.slots, holderinvariants.handles, holderinvariants.userfaults,
    holderinvariants.sessions, holderinvariants.tenants, holderinvariants.quotas,
    holderinvariants.descriptors, holderinvariants.kept, holderinvariants.records,
)  # fmt: skip
# parts that look at some of what there is
SAMPLES: tuple[Part, ...] = (holderinvariants.secrets,)
WATCHED: tuple[Callable[..., object], ...] = (
    *transitions.MONITORS, transitions.untold, Monitors.differing, Monitors.agreed, Monitors.moving,
)  # fmt: skip


class Status(Enum):
    """How an invariant stands.

    CHECKED: all that it is about was looked at. SAMPLED: some of it, or the transactions that were
    watched. UNWATCHED: it is about transactions, and none was watched.
    """

    CHECKED = "checked"
    VIOLATED = "violated"
    SAMPLED = "sampled"
    UNWATCHED = "unwatched"


class Invariant(Struct, frozen=True):
    """One of the invariants, and how it stands."""

    number: str
    meaning: str
    status: Status


class Checked(Struct, frozen=True):
    """What a look at the whole state came to.

    Attributes:
        revision: the state's.
        violated: one line each, as "I3: ...".
        seconds: how long the lock was held for it.
        watched: transactions that monitors have seen; what they found is among ``violated``.
    """

    revision: int
    violated: tuple[str, ...]
    seconds: float
    watched: int = 0


def check(core: Core) -> list[str]:
    """Return what is violated, one line each, as "I3: ..."; empty when all is well."""
    found = [line for part in (*PARTS, *SAMPLES, *core.parts) for line in _found(part, core)]
    if core.watched is not None:
        found += [*core.watched.violated, *core.watched.differing()]
    return found


def timed(core: Core) -> Checked:
    """Check under the lock, which the caller holds, and say how long that took."""
    begun = core.guard.clock()
    violated = tuple(check(core))
    seen = 0 if core.watched is None else core.watched.seen
    return Checked(core.journal.revision, violated, core.guard.clock() - begun, seen)


def listed(core: Core, done: Checked) -> list[Invariant]:
    """Return every invariant with its meaning and how it stands, in order of number."""
    meanings: dict[str, list[str]] = {}
    of_state: set[str] = set()
    sampled: set[str] = set()
    parts: tuple[Callable[..., object], ...] = (*PARTS, *SAMPLES, *core.parts, *WATCHED)
    for part in parts:
        for number, meaning in said(part):
            meanings.setdefault(number, []).append(meaning)
            if part in SAMPLES or (part in WATCHED and done.watched):
                sampled.add(number)
            elif part not in WATCHED:
                of_state.add(number)
    violated = {line.partition(":")[0] for line in done.violated}
    tried = ((Status.VIOLATED, violated), (Status.CHECKED, of_state), (Status.SAMPLED, sampled))
    return [
        Invariant(
            number, "; ".join(meanings[number]),
            next((status for status, which in tried if number in which), Status.UNWATCHED),
        )
        for number in sorted(meanings, key=_order)
    ]  # fmt: skip


def said(part: Callable[..., object]) -> list[tuple[str, str]]:
    """Return what a part says of itself in its docstring: numbers and meanings."""
    return SAID.findall(cleandoc(part.__doc__ or ""))


def _order(number: str) -> int:
    return int(number[1:])


def _found(part: Part, core: Core) -> Iterator[str]:
    try:
        yield from part(core)
    except Exception as error:
        # tables that contradict each other so far that they cannot even be read
        yield f"{said(part)[0][0]}: cannot be checked, for {type(error).__name__}"
