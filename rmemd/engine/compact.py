"""Jobs built on migration: compaction, taking frames offline.

Owns the choice of what moves where. Blocks that hold an unmovable page can never be regained, so
they are filled first; the emptiest of the others are emptied, as long as there is room.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from rmemd.engine.core import Core
from rmemd.engine.driver import Steps
from rmemd.engine.migrate import Outcome, Report, governed, migrate, migrate_to
from rmemd.errors import BAD_NODE, BAD_RANGE, FOLIO_UNMOVABLE
from rmemd.model import buddy
from rmemd.model.host import POISON, Use
from rmemd.units import I64, PMD_PAGES, Bools, distinct, pages


class Compacted(Struct):
    """What compaction did to a node."""

    report: Report
    free_2m_before: int
    free_2m_after: int
    blocked_2m: int


class Offlined(Struct):
    """What taking frames out of use did."""

    report: Report
    offline: int


def compact(core: Core, node: int, report: Report) -> Steps[Compacted]:
    """Move pages of a node together, to regain free 2 MiB blocks."""
    if not 0 <= node < len(core.host.nodes):
        raise BAD_NODE(f"no node {node}", field="node")
    where = core.host.nodes[node]
    before = buddy.free_2m_blocks(core.host, where)
    first, last = where.first // PMD_PAGES, where.end // PMD_PAGES
    rows = core.host.use.view.reshape(-1, PMD_PAGES)[first:last]
    used = (rows != Use.FREE).sum(axis=1)
    movable = movable_frames(core, pages(where.first, where.npages)).reshape(-1, PMD_PAGES)
    fixed = ((rows != Use.FREE) & ~movable).any(axis=1)
    _note_unmovable(core, where.first, rows, movable, fixed, report)
    report.done = report.count(Outcome.UNMOVABLE)
    src, dst = _plan(rows, used, fixed)
    report.total = report.done + src.size
    yield from migrate_to(core, src + where.first, dst + where.first, (node,), report)
    after = buddy.free_2m_blocks(core.host, where)
    return Compacted(report, before, after, int((fixed & (used < PMD_PAGES)).sum()))


def movable_frames(core: Core, pfns: I64) -> Bools:
    """Return which frames hold a page that may be asked to move: the ops tables decide."""
    host = core.host
    use, owner = host.use.get(pfns), host.owner.get(pfns)
    answer: Bools = np.zeros(pfns.size, dtype=np.bool_)
    in_use = np.isin(use, (Use.PRIVATE, Use.SHARED))
    for number in distinct(owner[in_use & (owner != 0)]).tolist():
        file = core.files.get(number)
        mine = in_use & (owner == number)
        vm = file.info.vm
        asked = core.vms.exists(vm) and core.consumers[vm].ops.migrate_folio is not None
        answer[mine] = ~governed(core, file, pfns[mine]) | asked
    answer &= (host.flags.get(pfns) & POISON) == 0
    return answer


def _plan(rows: np.ndarray, used: I64, fixed: Bools) -> tuple[I64, I64]:
    """Choose sources and destinations, as frame offsets in the node.

    Sources are the blocks to empty, emptiest first; destinations the free frames of the others,
    fullest first and those with an unmovable page before all. The two meet where room runs out.
    """
    partial = np.flatnonzero((used > 0) & (used < PMD_PAGES))
    emptying = partial[~fixed[partial]]
    emptying = emptying[np.lexsort((emptying, used[emptying]))]
    # what is emptied cannot be filled: room is what the blocks that stay have left
    need = np.cumsum(used[emptying])
    room = int((PMD_PAGES - used[partial]).sum()) - np.cumsum(PMD_PAGES - used[emptying])
    chosen = emptying[: int(np.argmin(np.append(need <= room, False)))]
    filling = partial[np.isin(partial, chosen, invert=True)]
    filling = filling[np.lexsort((filling, -used[filling], ~fixed[filling]))]
    src = _frames(rows, chosen, wanted_free=False)
    return src, _frames(rows, filling, wanted_free=True)[: src.size]


def _frames(rows: np.ndarray, blocks: I64, wanted_free: bool) -> I64:
    row, column = np.nonzero((rows[blocks] == Use.FREE) == wanted_free)
    found: I64 = (blocks[row] * PMD_PAGES + column).astype(np.int64)
    return found


def _note_unmovable(
    core: Core, base: int, rows: np.ndarray, movable: np.ndarray, fixed: Bools, report: Report
) -> None:
    """Report the pages that keep partly used blocks from being regained, by VM."""
    stuck = (rows != Use.FREE) & ~movable & fixed[:, None]
    stuck &= ((rows == Use.FREE).any(axis=1))[:, None]
    pfns = np.flatnonzero(stuck).astype(np.int64) + base
    owner = core.host.owner.get(pfns)
    for number in distinct(owner[owner > 0]).tolist():
        mine = pfns[owner == number]
        vm = core.files.get(number).info.vm
        name = core.vms.get(vm).info.consumer if core.vms.exists(vm) else "the VM that is gone"
        why = FOLIO_UNMOVABLE(f"{name} (vm/{vm}) has no migrate_folio", where=name)
        report.failed(mine, Outcome.UNMOVABLE, vm, np.full(mine.size, -1), why)


def offline(core: Core, start: int, npages: int, report: Report) -> Steps[Offlined]:
    """Empty a range of frames and take it out of use; what cannot move stays and is named."""
    pfns = frame_range(core, start, npages, "pfns")
    used = pfns[core.host.owner.get(pfns) != 0]
    others = tuple(node.node for node in core.host.nodes)
    done = yield from core.unit(lambda: _take_free(core, pfns))
    yield from migrate(core, used, others, report)
    done += yield from core.unit(lambda: _take_free(core, pfns))
    return Offlined(report, done)


def _take_free(core: Core, pfns: I64) -> Steps[int]:
    yield from ()
    free = pfns[core.host.use.get(pfns) == Use.FREE]
    if free.size:
        with core.tx("offline") as tx:
            buddy.take_exactly(core.host, tx, free, Use.OFFLINE)
            tx.emit("offlined", pfn=int(free[0]), npages=free.size)
    return int(free.size)


def online(core: Core, start: int, npages: int) -> Steps[int]:
    """Give offlined frames back to the allocator."""
    pfns = frame_range(core, start, npages, "pfns")

    def one() -> Steps[int]:
        yield from ()
        back = pfns[core.host.use.get(pfns) == Use.OFFLINE]
        if back.size:
            with core.tx("online") as tx:
                buddy.give(core.host, tx, back)
                tx.emit("onlined", pfn=int(back[0]), npages=back.size)
        return int(back.size)

    return (yield from core.unit(one))


def frame_range(core: Core, start: int, npages: int, field: str = "pfn") -> I64:
    """Return a range of frames; ``field`` is the request's field that names it.

    Raises:
        InvalidArgument: BAD_RANGE.
    """
    if start < 0 or npages <= 0 or start + npages > core.host.nframes:
        raise BAD_RANGE(
            f"pfn {start:#x}+{npages:#x} is not inside the host's {core.host.nframes} frames",
            field=field,
        )
    return pages(start, npages)
