"""One page by scalars: it must be as by arrays, whatever state the page is in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from guests import Guest, make_engine
from hypothesis import given
from hypothesis import strategies as st

from rmemd.engine import frames
from rmemd.engine.engine import Engine
from rmemd.errors import RmemError
from rmemd.hooks.tables import same_state
from rmemd.units import PAGE_SIZE

NPAGES = 2
ONE = frames.one_there
# what may have happened to pages before one is looked at
acts = st.lists(
    st.tuples(
        st.sampled_from(("allocate", "write", "private", "shared", "punch", "poison")),
        st.integers(0, NPAGES - 1),
    ),
    max_size=6,
)
looks = st.sampled_from(("pin", "get", "read", "write"))


def poison(engine: Engine, guest: Guest, page: int) -> None:
    file = engine.core.files.get(guest.file)
    pfn = file.frames.at(page) or file.shared.at(page)
    if pfn:
        engine.poison(pfn - 1)


def came_to(call: Callable[[], Any]) -> Any:
    """Return what a call returned, or why it was refused."""
    try:
        found = call()
    except RmemError as refusal:
        return refusal.reason.name, refusal.message, refusal.details
    return found.tolist() if hasattr(found, "tolist") else found


def act(engine: Engine, guest: Guest, what: str, page: int) -> Any:
    at = page * PAGE_SIZE
    owner = engine.core.sessions.get(1).owner
    return came_to({
        "allocate": lambda: guest.allocate(page),
        "write": lambda: engine.write_shared(guest.file, at, b"x"),
        "private": lambda: guest.convert(page, 1, True),
        "shared": lambda: guest.convert(page, 1, False),
        "punch": lambda: guest.punch(page),
        "poison": lambda: poison(engine, guest, page),
        "pin": lambda: engine.pin(guest.file, at, PAGE_SIZE, "dma", "session", owner),
        "get": lambda: engine.get_pages(guest.file, at, PAGE_SIZE, owner),
        "read": lambda: engine.read_shared(guest.file, at, 16),
    }[what])  # fmt: skip


@given(acts, looks, st.integers(0, NPAGES - 1), st.booleans())
def test_a_page_by_scalars_is_as_by_arrays(
    before: list[tuple[str, int]], look: str, page: int, in_place: bool
) -> None:
    outcomes = []
    for one_there in (ONE, lambda core, table, pgoff: None):
        engine = make_engine(nframes=1024)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frames, "one_there", one_there)
            guest = Guest(engine, "sw-protected", NPAGES, in_place=in_place)
            engine.open_session("uid:1", "host", "socket")
            told = [act(engine, guest, *one) for one in [*before, (look, page)]]
        outcomes.append((told, engine.core.space.snapshot()))
        engine.close()
    (by_scalars, one), (by_arrays, other) = outcomes
    assert by_scalars == by_arrays
    assert same_state(one, other) == []


@pytest.mark.parametrize("npages", [0, 1, 40])
@pytest.mark.parametrize("strange", [-1, -(2**63), 2**63 - 1, 2**40, 1024])
def test_a_number_that_no_frame_has_is_held_by_nobody(npages: int, strange: int) -> None:
    engine = make_engine(nframes=1024)
    guest = Guest(engine, "sw-protected", 64)
    owner = engine.open_session("uid:1", "host", "socket").owner
    if npages:
        pfns = engine.get_pages(guest.file, 0, npages * PAGE_SIZE, owner).tolist()
        for named in ([strange], [strange, pfns[0]], [pfns[0], strange]):
            refused = came_to(lambda named=named: engine.put_pages(np.array(named), owner))
            assert refused[0] == "NOT_HELD"
            assert f"pfn {strange:#x}" in refused[1]
        assert engine.put_pages(np.array(pfns), owner) == npages
    assert came_to(lambda: engine.put_pages(np.array([strange]), owner))[0] == "NOT_HELD"
    engine.close()
