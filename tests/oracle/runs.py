"""Runs of operations: drawn from a seed, played, shortened and explained."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from rmemd.errors import RmemError

from .driver import KINDS, World
from .pair import EXCUSED, FILE_PAGES, HOG_PAGES, INIT_SHARED, NFRAMES, DifferenceError, Op


def _slot(rng: random.Random) -> tuple[int, int, int, int]:
    """Draw where a slot lies, how long it is, which file it has and from where: short ones fit."""
    return rng.randrange(16), rng.choice((1, 2, 3, FILE_PAGES)), rng.randrange(10), rng.randrange(8)


def draw(rng: random.Random) -> Op:
    """Draw one operation; most are about ranges inside a file or a slot."""
    which, slot, page = rng.randrange(8), rng.randrange(3), rng.randrange(FILE_PAGES)
    n = rng.choice((1, 1, 2, 3, 5, FILE_PAGES))
    inside = min(n, FILE_PAGES - page) if rng.random() < 0.85 else n
    odd = rng.choice((0,) * 15 + (1, 2, 3))
    table: list[tuple[int, Op]] = [
        (12, ("fallocate", which, 1, page, inside, odd)),
        (14, ("fallocate", which, 3, rng.randrange(FILE_PAGES + 3), n, odd)),
        (1, ("fallocate", which, rng.choice((0, 2, 16, 17)), page, n)),
        (16, ("set_attributes", which, page, n, rng.choice((0, 8)), int(odd == 1))),
        (1, ("set_attributes", which, page, rng.choice((0, n)), rng.choice((8, 16, 9)))),
        (16, ("convert_file", which, page, inside, rng.choice((0, 8)), int(odd == 1))),
        (1, ("convert_file", which, page, rng.choice((0, n)), rng.choice((8, 16, 9)))),
        (22, ("pre_fault", which, page, rng.choice((n, inside)))),
        (12, ("touch", which, page, rng.random() < 0.6)),
        (6, ("host_read", which, page, inside)),
        (9, ("pin", which, page, inside)),
        (8, ("unpin", which)),
        (5, ("get_pages", which, page, inside)),
        (8, ("put_page", rng.randrange(64))),
        (14, ("migrate", rng.randrange(512), rng.choice((1, 2, 4, 12, 40)))),
        (2, ("poison", rng.randrange(512))),
        (1, ("poison_free", rng.randrange(100, NFRAMES))),
        (
            8,
            ("add_slot", which, slot, page, n, rng.randrange(8), rng.randrange(8), odd),
        ),
        (5, ("delete_slot", which, slot)),
        (2, ("create_file", which, rng.choice((4, FILE_PAGES)), rng.choice((0, 0, INIT_SHARED)))),
        (2, ("create_vm", rng.choice(list(KINDS)))),
        (1, ("close_file", which)),
        (1, ("destroy_vm", which)),
    ]
    weights = [weight for weight, _ in table]
    return rng.choices([op for _, op in table], weights)[0]


def make_run(seed: int, steps: int) -> list[Op]:
    """Return a run: three VMs, in every fourth run hardly any memory left, then steps."""
    rng = random.Random(seed)
    kinds = list(KINDS)
    begin: list[Op] = [("create_vm", kinds[(seed + i * 2) % len(kinds)]) for i in range(3)]
    if seed % 4 == 3:
        begin += [("create_vm", "null", True, HOG_PAGES), ("fallocate", -1, 1, 0, HOG_PAGES)]
    return begin + [draw(rng) for _ in range(steps - len(begin))]


# --- running and shrinking ---------------------------------------------------------------------
def play(
    ops: Sequence[Op],
    excused: frozenset[str] = EXCUSED,
    seen: Counter[tuple[str, str]] | None = None,
) -> tuple[int, str] | None:
    """Play operations on a new world; return the first difference as (its index, words).

    ``seen`` is told what came of the operations, as (operation, "ok" or a reason).
    """
    world = World(excused)
    try:
        for i, op in enumerate(ops):
            try:
                world.step(op)
            except DifferenceError as difference:
                return i, str(difference)
            except RmemError as refusal:
                return i, f"{op}: refused where nothing can be: {refusal}"
    finally:
        if seen is not None:
            seen.update(world.seen)
        world.close()
    return None


def shrink(ops: Sequence[Op], tries_max: int = 600) -> list[Op]:
    """Take out whatever is not needed for a difference, by halves and then one by one."""
    found = play(ops)
    assert found is not None
    best, size, tries = list(ops[: found[0] + 1]), max(found[0] // 2, 1), 0
    while size and tries < tries_max:
        at, smaller = 0, False
        while at < len(best) and tries < tries_max:
            candidate, tries = best[:at] + best[at + size :], tries + 1
            found = play(candidate)
            if found is None:
                at += size
            else:
                best, smaller = candidate[: found[0] + 1], True
        size = size if smaller and size == 1 else size // 2
    return best


def explain(ops: Sequence[Op]) -> str:
    """Say a difference with the shortest operations that show it."""
    short = shrink(ops)
    found = play(short)
    assert found is not None
    return "\n".join([found[1], "after:", *(f"  {op}" for op in short)])
