"""One page's story, told by scalars, is what the columns of a page map and its rules say of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from guests import Guest, consumers, make_engine
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rmemd.engine import onepage, queries
from rmemd.engine.compact import movable_frames
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.fault import is_private
from rmemd.errors import RmemError
from rmemd.model.host import POISON, Use
from rmemd.units import PAGE_SIZE

PAGES = 24
NFRAMES = 2048
SPAN = st.tuples(st.integers(0, PAGES - 4), st.integers(1, 4))
STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(
            ["fault", "allocate", "punch", "shared", "private", "write", "poison", "pin", "close",
             "destroy", "unbind"]
        ),
        SPAN,
    ),
    min_size=2, max_size=12,
)  # fmt: skip


def plain(core: Core, pfn: int) -> dict[str, Any]:
    """Tell a page's story by the columns and rules that many pages are told by."""
    host, m = core.host, queries.frame_map(core, pfn, 1)
    vm = core.vms.get(int(m.vm[0])) if m.vm[0] else None
    private = bool(m.use[0] == Use.PRIVATE)
    if vm is not None:
        private = bool(is_private(core, vm, m.gfn[:1], vm.slot_at(int(m.gfn[0])))[0])
    cached = int(host.owner.at(pfn) != 0)
    held = host.refs.at(pfn) or host.pins.at(pfn)
    if host.flags.at(pfn) & POISON:
        unmovable = "HW_POISON"
    elif not movable_frames(core, np.array([pfn]))[0]:
        unmovable = "FOLIO_UNMOVABLE" if cached else ""
    else:
        unmovable = "FOLIO_BUSY" if held else ""
    return {
        "pfn": pfn, "node": int(host.nodes_of(np.array([pfn]))[0]), "use": Use(int(m.use[0])),
        "file": int(m.file[0]), "pgoff": int(m.pgoff[0]) if cached else 0, "vm": int(m.vm[0]),
        "gfn": int(m.gfn[0]), "is_private": private, "mapped": bool(m.mapped[0]),
        "vendor_state": m.state_names[int(m.state[0])],
        "references": cached + host.refs.at(pfn), "pins": host.pins.at(pfn), "expected": cached,
        "holders": core.ledger.holders(pfn), "unmovable": unmovable,
        "poisoned": bool(m.poisoned[0]),
    }  # fmt: skip


def same_story(engine: Engine) -> None:
    """Compare the two tales of every frame that is in use, and of some that are not."""
    core = engine.core
    used = np.flatnonzero(core.host.use.view != Use.FREE).tolist()
    for pfn in [*used, 0, NFRAMES - 1]:
        told = onepage.page(core, pfn)._asdict()
        del told["content"]
        assert told == plain(core, pfn)


def act(guest: Guest, what: str, page: int, n: int) -> None:
    """Do a step."""
    engine = guest.engine
    match what:
        case "shared" | "private":
            guest.convert(page, n, what == "private")
        case "write":
            guest.write(page, n, seed=1)
        case "poison":
            engine.poison(int(guest.frames(page)[0]))
        case "pin":
            engine.pin(guest.file, page * PAGE_SIZE, n * PAGE_SIZE, "DMA", "device/1")
        case "close":
            engine.close_file(guest.file)
        case "destroy":
            engine.destroy_vm(guest.vm)
        case "unbind":
            engine.set_memory_region(guest.vm, 0, 0, 0, 0, 0)
        case _:
            getattr(guest, what)(page, n)


@settings(
    max_examples=40, deadline=None, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(names=st.tuples(*[st.sampled_from(consumers())] * 2), steps=STEPS)
def test_scalars_tell_what_columns_tell(
    names: tuple[str, str], steps: list[tuple[int, str, tuple[int, int]]]
) -> None:
    engine = make_engine(NFRAMES, nnodes=2)
    try:
        guests = [Guest(engine, name, PAGES) for name in names]
        for guest in guests:
            guest.fault(0, PAGES // 2)
        same_story(engine)
        for which, what, (page, n) in steps:
            try:
                act(guests[which], what, page, n)
            except (RmemError, IndexError):
                continue
            finally:
                same_story(engine)
    finally:
        engine.close()
