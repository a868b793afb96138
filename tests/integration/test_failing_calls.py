"""A system call that fails, at each place of each operation: every page is old or new."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from guests import Guest
from keeping import Page, held_pages, unsettled
from simulation.faults import SHORT, FaultySystem

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.errors import RmemError
from rmemd.units import PAGE_SIZE

NPAGES = 16
A, B = 1, 2
# more places than any operation here has
PLACES = 64
KINDS = ("tdx-relocate", "snp-move", "tdx-relocate in place", "sw-protected")
ACTS: dict[str, Callable[[Guest], object]] = {
    "write": lambda guest: guest.engine.write_guest(
        guest.vm, 0, guest.gpa(1), b"z" * 6 * PAGE_SIZE, True
    ),
    "migrate": lambda guest: guest.engine.migrate(guest.frames(0, 8)[guest.frames(0, 8) >= 0]),
    "punch": lambda guest: guest.punch(2, 6),
    "to shared": lambda guest: guest.convert(0, 8, private=False),
    "to private": lambda guest: guest.convert(8, 8, private=True),
    "shared write": lambda guest: guest.engine.write_shared(
        guest.file, 9 * PAGE_SIZE, b"y" * 5 * PAGE_SIZE
    ),
}

# what these move does not lie together, so that a call can fail half-way
SCATTERED = ("to shared", "to private", "migrate")


@contextmanager
def _guest(kind: str, act: str) -> Iterator[tuple[Guest, FaultySystem]]:
    """Have a guest of which one half is private and written, the other shared and written."""
    consumer, _, in_place = kind.partition(" ")
    system = FaultySystem()
    options = Options(nframes=512, seed=3, system=system, journalled=True)
    engine = Engine(options, Guard(clock=lambda: 0.0))
    guest = Guest(engine, consumer, NPAGES, in_place=bool(in_place) or None)
    guest.fill(0, NPAGES, A)
    guest.convert(8, 8, private=False)
    engine.write_shared(guest.file, 8 * PAGE_SIZE, b"x" * 8 * PAGE_SIZE)
    if act in SCATTERED:
        for page in (3, 11):
            guest.punch(page, 1)
    try:
        yield guest, system
    finally:
        engine.close()


def _after(kind: str, act: str, nth: int, failure: int | str) -> tuple[list[Page], bool, bool]:
    """Return what pages hold after an act with a failure, whether it struck, and was told."""
    with _guest(kind, act) as (guest, system):
        system.fail(nth, failure)
        refused = False
        try:
            ACTS[act](guest)
        except (RmemError, OSError):
            refused = True
        system.fail(0, 0)
        core = guest.engine.core
        core.run(core.scrub)
        assert check(core) == []
        assert unsettled(guest.engine) == []
        return _held(guest), system.struck > 0, refused


def _held(guest: Guest) -> list[Page]:
    return held_pages(guest.engine, guest.file, guest.vm, NPAGES)


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EIO, errno.EINTR, SHORT])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_page_is_old_or_new(kind: str, act: str, failure: int | str) -> None:
    with _guest(kind, act) as (guest, _):
        before = _held(guest)
    new, _, _ = _after(kind, act, 0, 0)
    for nth in range(1, PLACES):
        found, struck, refused = _after(kind, act, nth, failure)
        if not struck:
            break
        if failure in (errno.EINTR, SHORT):
            # nobody's refusal: it is gone on with
            assert not refused
            assert found == new
        for page, one, old, other in zip(range(NPAGES), found, before, new, strict=True):
            assert one in (old, other), f"call {nth}, page {page}: {one}, was {old}"
    else:
        pytest.fail("it has more places than that")
