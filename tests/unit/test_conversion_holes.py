"""A conversion carries no zeros over for pages that nobody wrote, and nobody can tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from guests import Guest, make_engine

from rmemd.engine import convert
from rmemd.engine.core import private_key
from rmemd.engine.invariants import check
from rmemd.store.controller import MemoryController
from rmemd.units import PAGE_SIZE, pages

NPAGES = 24
WRITTEN_BY_GUEST, WRITTEN_BY_CLIENT = (1, 2, 9), (2, 3, 17)
EVERY = pages(0, NPAGES)


def seen(guest: Guest) -> list[Any]:
    """Return what either side and the bus see of every page."""
    core = guest.engine.core
    pfns = guest.frames(0, NPAGES)
    plain, failed = core.controller.read(pfns, private_key(core, core.vms.get(guest.vm)))
    shared = core.shared_memory(core.files.get(guest.file)).read(EVERY)
    return [plain, failed, core.controller.raw(pfns), shared]


def story(consumer: str) -> tuple[list[Any], list[int]]:
    """Convert there and back what both have written to in places; return all that was seen."""
    engine = make_engine(512)
    guest = Guest(engine, consumer, NPAGES, in_place=True)
    guest.convert(0, NPAGES, private=True)
    for page in WRITTEN_BY_GUEST:
        guest.fault(page)
        guest.accept(page)
        guest.write(page, 1, seed=page + 1)
    guest.allocate(0, NPAGES)
    told, memory = [], engine.core.shared_memory(engine.core.files.get(guest.file))
    guest.convert(0, NPAGES, private=False)
    there = memory.present(0, NPAGES).tolist()
    told += seen(guest)
    for page in WRITTEN_BY_CLIENT:
        memory.write_bytes(page * PAGE_SIZE, bytes([page]) * PAGE_SIZE)
    guest.convert(0, NPAGES, private=True)
    told += seen(guest)
    assert check(engine.core) == []
    engine.close()
    return told, there


@pytest.mark.parametrize("consumer", ["sw-protected", "snp-move", "tdx-relocate"])
def test_holes_stay_holes(consumer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told, there = story(consumer)
    assert set(there) <= set(WRITTEN_BY_GUEST)
    monkeypatch.setattr(
        MemoryController, "zeros", lambda self, pfns, key: np.zeros(pfns.size, dtype=np.bool_)
    )
    monkeypatch.setattr(
        convert, "_present", lambda core, file, pgoffs: np.ones(pgoffs.size, dtype=np.bool_)
    )
    carried, _ = story(consumer)
    for one, other in zip(told, carried, strict=True):
        np.testing.assert_array_equal(one, other)
