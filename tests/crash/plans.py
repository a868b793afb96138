"""At which moment each life of a daemon ends: at a named point of its own, or at any time.

Owns the points, the draw of them by a seed, and how they are told to the daemon's launcher.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

BEFORE, AFTER, WITHIN = "before", "after", "within"
ENVIRONMENT = "RMEMD_TEST_CRASH_DIRECTORY"
PLANS, LIVES, ARMED, KILLED = "plans", "lives", "armed", "killed"
# bytes of a number in ARMED and KILLED
NUMBER = 8


@dataclass(frozen=True)
class Point:
    """A method of the daemon that changes what outlives it, or tells somebody that it has.

    Attributes:
        where: its module, class and name.
        nth_max: passages until the kill, at most.
        whens: when, with respect to the call.
        at_start: whether a daemon that recovers passes it, so that it can be killed there too.
    """

    where: tuple[str, str, str]
    nth_max: int
    whens: tuple[str, ...] = (BEFORE, AFTER)
    at_start: bool = False


POINTS = {
    "journal append": Point(("rmemd.store.log", "Log", "append"), 40, at_start=True),
    "checkpoint": Point(("rmemd.store.log", "Checkpoint", "commit"), 1),
    "bytes written": Point(
        ("rmemd.store.system", "System", "write"), 20, (BEFORE, WITHIN, AFTER), at_start=True
    ),
    "bytes punched": Point(
        ("rmemd.store.system", "System", "fallocate_each"),
        20,
        (BEFORE, WITHIN, AFTER),
        at_start=True,
    ),
    "room made": Point(("rmemd.store.system", "System", "fallocate"), 3, at_start=True),
    "deposit": Point(("rmemd.daemon.fdstore", "FdStore", "keep"), 3, at_start=True),
    "deposit let go": Point(("rmemd.daemon.fdstore", "FdStore", "drop"), 3),
    "reply": Point(("rmemd.rpc.replies", "Turn", "replied"), 40),
    "datagram": Point(("rmemd.session.talk", "Talk", "_send"), 20),
}


@dataclass(frozen=True)
class Plan:
    """How a life ends.

    Attributes:
        point: by name.
        when: BEFORE, AFTER or WITHIN the call.
        nth: which passage.
        at_start: counted from the daemon's start, or from when its clients go on.
    """

    point: str
    when: str
    nth: int
    at_start: bool = False


def every_moment() -> list[tuple[str, str, bool]]:
    """Return each point with each when, at work and, where there is one, in recovery."""
    return [
        (name, when, at_start)
        for name, point in POINTS.items()
        for when in point.whens
        for at_start in ((False, True) if point.at_start else (False,))
    ]


def draw(lives: int, seed: int) -> list[Plan | None]:
    """Return how so many lives end: every second by a plan, the others (None) at any time."""
    rng = random.Random(f"crash {seed}")
    moments = every_moment()
    plans: list[Plan | None] = []
    for life in range(lives):
        if life % 2 == 0:
            plans.append(None)
            continue
        turn = life // 2
        if turn % len(moments) == 0:
            rng.shuffle(moments)
        name, when, at_start = moments[turn % len(moments)]
        nth = rng.randint(1, 3 if at_start else POINTS[name].nth_max)
        plans.append(Plan(name, when, nth, at_start))
    return plans


def write(directory: Path, plans: list[Plan | None]) -> None:
    """Tell the launcher."""
    (directory / PLANS).write_text(json.dumps([plan and asdict(plan) for plan in plans]))
    for name in (LIVES, ARMED, KILLED):
        (directory / name).write_bytes(b"" if name != ARMED else bytes(NUMBER))


def read(directory: Path, life: int) -> Plan | None:
    """Return what was told of a life."""
    told = json.loads((directory / PLANS).read_text())
    return Plan(**told[life]) if life < len(told) and told[life] else None
