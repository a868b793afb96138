"""What a long run does to an engine: an act of any kind, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import blake2b

from guests import Guest, consumers

from rmemd.engine.engine import Engine
from rmemd.errors import RmemError
from rmemd.units import PAGE_SIZE, pages

PAGES = 64
INSTALLED = consumers()


def act(engine: Engine, guests: list[Guest], rng: random.Random) -> None:
    """Do one thing, to any of the guests or to the host; make another guest now and then."""
    guest = rng.choice(guests)
    page = rng.randrange(PAGES)
    n = rng.randint(1, min(16, PAGES - page))
    acts: list[Callable[[], object]] = [
        lambda: guest.fault(page, n),
        lambda: guest.allocate(page, n),
        lambda: guest.fill(page, n, rng.randrange(100)),
        lambda: guest.write(page, n, rng.randrange(100), private=False),
        lambda: guest.punch(page, n),
        lambda: guest.convert(page, n, rng.random() < 0.5),
        lambda: engine.migrate(guest.frames(page, n)[guest.frames(page, n) >= 0]),
        lambda: engine.compact(rng.randrange(2)),
        lambda: engine.pin(guest.file, page * PAGE_SIZE, n * PAGE_SIZE, "DMA", "device/1"),
        lambda: engine.unpin(rng.randint(1, 20)),
        lambda: engine.offline(page, n),
        lambda: engine.online(page, n),
    ]
    if rng.random() < 0.03:
        acts = [
            lambda: engine.poison(int(guest.frames(page)[0])),
            lambda: engine.close_file(guest.file),
            lambda: engine.destroy_vm(guest.vm),
        ]
    if rng.random() < 0.05:
        guests.append(Guest(engine, rng.choice(INSTALLED), PAGES))
        return
    try:
        rng.choice(acts)()
    except (RmemError, AssertionError):
        # refused, or the guest did not get to its end: both are part of the run
        return


def arena(engine: Engine) -> bytes:
    """Return a digest of what the arena holds."""
    controller = engine.core.controller
    digest = blake2b()
    for at in range(0, engine.core.host.nframes, 512):
        digest.update(controller._arena.read(pages(at, 512)).tobytes())
    return digest.digest()
