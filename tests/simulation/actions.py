"""What a simulated run consists of: actions, drawn from a seed before anything has happened.

An action is a name and small numbers that are read modulo what there is when its turn comes, so
that a list of them means something after any of it was taken out: that is how runs are shortened.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

Action = tuple[str, *tuple[int, ...]]

PAGES = 12
# the length of an operation's range
LENGTHS = (1, 1, 2, 3, 5, PAGES)
BIG = 1 << 16


@dataclass(frozen=True)
class Shape:
    """What a run is like, by its seed alone.

    Attributes:
        nframes, nnodes: the host.
        spare: frames that are left when the rest has been taken out of use, 0 for all of them.
        apart: whether every step is one of its own, or few bytes move under the lock as usual.
        hostile: whether faults are injected; without them a plugin must not fail.
        crashes: whether the daemon dies and recovers.
        watched: whether monitors look at every transaction, which costs as much again.
    """

    nframes: int
    nnodes: int
    spare: int
    apart: bool
    hostile: bool
    crashes: bool
    watched: bool


def shape(seed: int) -> Shape:
    """Return what the run of a seed is like."""
    rng = random.Random(f"shape {seed}")
    nnodes = rng.choice((1, 1, 1, 2))
    return Shape(
        nframes=512 * nnodes, nnodes=nnodes, spare=rng.choice((0, 0, 64, 96)),
        apart=rng.random() < 0.75, hostile=rng.random() < 0.85, crashes=rng.random() < 0.5,
        watched=rng.random() < 0.25,
    )  # fmt: skip


# weight and name of each action, with what its numbers stand for
_TABLE: tuple[tuple[float, str, tuple[str, ...]], ...] = (
    (64, "go", ("which",)),
    (0.4, "open_session", ("which",)),
    (0.25, "open_device", ("which", "page", "n")),
    (0.3, "revoke", ("which", "page", "n")),
    (0.6, "create_vm", ("which", "kind")),
    (0.2, "destroy_vm", ("which",)),
    (0.3, "create_file", ("which", "kind")),
    (0.2, "close_file", ("which",)),
    (0.5, "add_slot", ("which", "page", "n", "kind")),
    (0.3, "delete_slot", ("which", "kind")),
    (1.5, "allocate", ("which", "page", "n")),
    (2.0, "punch", ("which", "page", "n")),
    (3.5, "convert", ("which", "page", "n", "flag")),
    (2.0, "pre_fault", ("which", "page", "n")),
    (0.5, "populate", ("which", "page", "n", "value")),
    (0.3, "finalize", ("which",)),
    (4.0, "guest_write", ("which", "flag", "page", "n", "value")),
    (4.0, "guest_check", ("which", "flag", "page", "n")),
    (1.5, "guest_call", ("which", "flag", "page", "n", "kind")),
    (0.5, "guest_spin", ("which", "flag", "page")),
    (0.7, "guest_io", ("which", "flag", "page", "value")),
    (1.0, "host_write", ("which", "page", "n", "value")),
    (1.0, "host_read", ("which", "page", "n")),
    (1.0, "pin", ("which", "page", "n")),
    (1.0, "unpin", ("which",)),
    (0.6, "get_pages", ("which", "page", "n")),
    (0.6, "put_pages", ("which",)),
    (1.5, "migrate", ("which", "page", "n", "kind")),
    (0.4, "compact", ("which",)),
    (0.4, "offline", ("pfn", "n")),
    (0.4, "online", ("which",)),
    (0.6, "physical", ("pfn", "kind")),
    (0.6, "swap", ("which", "kind")),
    (0.4, "set_policy", ("which", "page", "n", "kind")),
    (0.8, "register_pager", ("which", "page", "n")),
    (0.3, "unregister_pager", ("which",)),
    (1.2, "page_in", ("which", "kind")),
    (0.2, "check", ()),
)
_FAULTS: tuple[tuple[float, str, tuple[str, ...]], ...] = (
    (0.7, "rule", ("which", "point", "nth", "kind")),
    (0.8, "system_fails", ("nth", "kind")),
    (0.6, "consumer_fails", ("nth", "kind")),
    (0.15, "poison", ("pfn",)),
    (0.3, "poison_owned", ("which", "page")),
    (0.5, "cancel", ("which",)),
    (0.15, "die", ("which",)),
)
_CRASH: tuple[float, str, tuple[str, ...]] = (0.25, "crash", ("kind",))
_RANGES = {"page": PAGES, "flag": 2, "nth": 6, "value": 100, "pfn": 1024}


@cache
def _weighted(
    hostile: bool, crashes: bool
) -> tuple[list[float], list[tuple[str, tuple[str, ...]]]]:
    rows = [*_TABLE, *(_FAULTS if hostile else ()), *((_CRASH,) if crashes else ())]
    return [row[0] for row in rows], [row[1:] for row in rows]


def make_run(seed: int, length: int) -> list[Action]:
    """Return the actions of a seed: two clients, three VMs, then ``length`` of any sort."""
    rng = random.Random(f"actions {seed}")
    begin: list[Action] = [("open_session", i) for i in range(2)]
    begin += [("create_vm", i, rng.randrange(BIG)) for i in range(3)]
    looks = shape(seed)
    weights, rows = _weighted(looks.hostile, looks.crashes)
    drawn = rng.choices(rows, weights, k=length)
    return begin + [(name, *(_number(rng, what) for what in numbers)) for name, numbers in drawn]


def _number(rng: random.Random, what: str) -> int:
    if what == "n":
        return rng.choice(LENGTHS)
    return rng.randrange(_RANGES.get(what, BIG))
