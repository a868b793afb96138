"""Runs of operations: drawn from a seed, played, shortened and explained."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from rmemd.errors import RmemError

from .driver import FILE_PAGES, HOG_PAGES, NFRAMES, DifferenceError, World
from .kinds import KINDS
from .objects import PAGE
from .oracle import Op

INIT_SHARED, MMAP = 2, 1
RUN_STEPS = 250
# a host of two nodes, of two 2 MiB blocks each
WIDE = ("host", 2048, 2)


def _bytes(rng: random.Random) -> tuple[int, int]:
    """Draw where bytes lie: whole pages, or a few that may cross into the next one."""
    page = rng.randrange(FILE_PAGES)
    if rng.random() < 0.5:
        return page * PAGE, rng.choice((1, 1, 2, 4)) * PAGE
    at = rng.randrange(PAGE)
    return page * PAGE + at, rng.choice((1, 16, PAGE - at, PAGE + 5))


def _objects(rng: random.Random, which: int) -> list[tuple[int, Op]]:
    slot, page, n = rng.randrange(3), rng.randrange(16), rng.choice((1, 2, 3, FILE_PAGES))
    odd, flags = rng.choice((0,) * 15 + (1, 2, 3)), rng.choice((MMAP, MMAP, MMAP | INIT_SHARED, 0))
    return [
        (8, ("add_slot", which, slot, page, n, rng.randrange(8), rng.randrange(8), odd)),
        (5, ("delete_slot", which, slot)),
        (2, ("create_file", which, rng.choice((4, FILE_PAGES)), flags)),
        (2, ("create_vm", rng.choice(list(KINDS)), True, FILE_PAGES, rng.randrange(-1, 3))),
        (1, ("close_file", which)),
        (1, ("destroy_vm", which)),
        (3, ("swap", which, rng.choice(list(KINDS)))),
        (2, ("open_session",)),
        (1, ("close_session", which)),
    ]


def _pages(rng: random.Random, which: int) -> list[tuple[int, Op]]:
    page, n = rng.randrange(FILE_PAGES), rng.choice((1, 1, 2, 3, 5, FILE_PAGES))
    inside = min(n, FILE_PAGES - page) if rng.random() < 0.85 else n
    odd = rng.choice((0,) * 15 + (1, 2, 3))
    attributes, crooked = rng.choice((0, 8)), rng.choice((8, 16, 9))
    return [
        (12, ("fallocate", which, 1, page, inside, odd)),
        (14, ("fallocate", which, 3, rng.randrange(FILE_PAGES + 3), n, odd)),
        (1, ("fallocate", which, rng.choice((0, 2, 16, 17)), page, n)),
        (14, ("set_attributes", which, page, n, attributes, int(odd == 1))),
        (1, ("set_attributes", which, page, rng.choice((0, n)), crooked)),
        (16, ("convert_file", which, page, inside, attributes, int(odd == 1))),
        (1, ("convert_file", which, page, rng.choice((0, n)), crooked)),
        (6, ("map_gpa", which, page, inside, rng.random() < 0.5, rng.choice((0, 0, 0, -22)))),
        (18, ("pre_fault", which, page, rng.choice((n, inside)))),
        (10, ("touch", which, page, rng.choice((1, 1, n)), rng.random() < 0.6)),
        (16, ("guest_io", which, *_bytes(rng), rng.choice((0, 1, 2, 2, 2)), rng.randrange(6))),
        (10, ("host_io", which, *_bytes(rng), rng.randrange(4))),
    ]


def _holders(rng: random.Random, which: int) -> list[tuple[int, Op]]:
    page, n, session = rng.randrange(FILE_PAGES), rng.choice((1, 1, 2, 3, 5)), rng.randrange(-1, 3)
    inside, handler = min(n, FILE_PAGES - page), rng.choice(("uf_copy", "uf_zeropage"))
    value = rng.randrange(3)
    return [
        (8, ("pin", which, page, inside, session)),
        (8, ("unpin", which)),
        (5, ("get_pages", which, page, inside, rng.randrange(3))),
        (9, ("put_pages", rng.randrange(64), rng.choice((-1, -1, -1, -1, 0, 1)))),
        (2, ("register", which, page, n, rng.randrange(3))),
        (2, ("unregister", which, session)),
        (4, ("resolve", handler, which, page, rng.choice((1, 1, n)), value + 1)),
        (2, ("resolve", "uf_continue", which, page, rng.choice((1, n)), value)),
    ]


def _host(rng: random.Random, which: int) -> list[tuple[int, Op]]:
    at, node = rng.randrange(NFRAMES), rng.choice((-1, -1, 0, 1))
    page, n, mode = rng.randrange(FILE_PAGES), rng.choice((1, 3, 6)), rng.choice((0, 2, 2, 3, 3, 1))
    return [
        (14, ("migrate", at, rng.choice((1, 2, 4, 12, 40)), node)),
        (2, ("poison", at)),
        (1, ("poison_free", rng.randrange(100, NFRAMES))),
        (2, ("compact", rng.choice((0, 0, 1)))),
        (2, ("offline", rng.randrange(1 << 16), rng.choice((1, 8, 24)))),
        (4, ("online", rng.randrange(1 << 16), rng.choice((64, 1024)))),
        (3, ("set_policy", which, page, n, mode, 0 if mode == 0 else rng.choice((1, 2, 3, 3, 4)))),
    ]


def draw(rng: random.Random) -> Op:
    """Draw one operation; most are about ranges inside a file or a slot."""
    which = rng.randrange(8)
    table = [one for part in (_objects, _pages, _holders, _host) for one in part(rng, which)]
    return rng.choices([op for _, op in table], [weight for weight, _ in table])[0]


def make_run(seed: int, steps: int) -> list[Op]:
    """Return a run: a session, three VMs, and steps.

    In every fourth run hardly any memory is left; in every fourth the host has two nodes, with
    pages scattered over the blocks of the first.
    """
    rng = random.Random(seed)
    kinds = list(KINDS)
    begin: list[Op] = [("open_session",)]
    hog: list[Op] = [("fallocate", -1, 1, 0, HOG_PAGES)]
    if seed % 4 == 1:
        # shared pages spill over into the second block, and then most of the first is let go
        begin += [WIDE, ("create_vm", "sw-attributes", True, HOG_PAGES), *hog]
        begin += [("host_io", 0, 0, 28 * PAGE, 1), ("fallocate", 0, 3, 0, HOG_PAGES - 5)]
        begin += [("compact", 0)] * (seed % 8 == 1)
    begin += [("create_vm", kinds[(seed + i * 2) % len(kinds)]) for i in range(3)]
    if seed % 4 == 3:
        begin += [("create_vm", "null", True, HOG_PAGES), *hog]
    return begin + [draw(rng) for _ in range(steps - len(begin))]


# --- running and shrinking ---------------------------------------------------------------------
def play(ops: Sequence[Op], seen: Counter[tuple[str, str]] | None = None) -> tuple[int, str] | None:
    """Play operations on a new world; return the first difference as (its index, words).

    ``seen`` is told what came of the operations, as (operation, "ok" or a reason).
    """
    shapes = [op[1:] for op in ops if op[0] == "host"]
    world = World(*(shapes[0] if shapes else ()))
    at = 0
    try:
        for op in ops:
            if op[0] != "host":
                world.step(op)
            at += 1
        world.finish()
    except DifferenceError as difference:
        return min(at, len(ops) - 1), str(difference)
    except RmemError as refusal:
        return at, f"{ops[at]}: refused where nothing can be: {refusal}"
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
