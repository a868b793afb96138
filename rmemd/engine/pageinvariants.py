"""Invariants of frames and pages: I1, I2, I4, I5, I7, I9, I12, I13 and I22 over the tables.

Owns a part of ``engine.invariants``: each reads every table it needs and writes none, and says in
its docstring what must hold. A part costs a sweep of the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rmemd.engine.compact import movable_frames
from rmemd.engine.core import Core
from rmemd.engine.fault import is_private
from rmemd.hooks.tables import Sparse
from rmemd.model.files import PRIVATE, RestrictedFile
from rmemd.model.host import ARENA, KEPT, POISON, Stored, Use
from rmemd.model.ledger import frames_of
from rmemd.model.vms import unpack
from rmemd.units import I64, MAX_GFN, PMD_PAGES, Bools, pages

IN_FILES = (Use.PRIVATE, Use.SHARED)


def owners(core: Core) -> Iterator[str]:
    """I1: a frame names a page as its owner exactly if that page names the frame."""
    host = core.host
    claimed = np.zeros(host.nframes, dtype=np.int64)
    for file in core.files.all():
        for table, use in _halves(file):
            pgoffs = table.touched(0, file.info.size_pages)
            if table.touched(0, MAX_GFN).size != pgoffs.size:
                yield f"I1: {table.name} has pages past the file's {file.info.size_pages}"
            pfns = np.asarray(table.get(pgoffs), dtype=np.int64) - 1
            np.add.at(claimed, pfns, 1)
            bad = (host.owner.get(pfns) != file.info.file) | (host.pgoff.get(pfns) != pgoffs)
            yield from named("I1", bad, pfns, f"is in {table.name}, which it does not name")
            used = _expected_use(file, pgoffs, use)
            wrong = host.use.get(pfns) != used
            yield from named("I1", wrong, pfns, f"is in {table.name}, but of another use")
    every = pages(0, host.nframes)
    yield from named("I1", claimed > 1, every, "is the frame of two pages")
    owned = host.owner.view != 0
    yield from named("I1", owned & (claimed == 0), every, "has an owner that does not know it")
    loose = np.isin(host.use.view, IN_FILES) & ~owned & (host.refs.view == 0)
    yield from named("I1", loose & (host.pins.view == 0), every, "is in use by nobody")


def _halves(file: RestrictedFile) -> list[tuple[Sparse, Use]]:
    return [(file.frames, Use.PRIVATE), (file.shared, Use.SHARED)]


def _expected_use(file: RestrictedFile, pgoffs: I64, use: Use) -> I64:
    if not file.info.in_place:
        return np.full(pgoffs.size, int(use), dtype=np.int64)
    private = file.attributes.get(pgoffs) == PRIVATE
    return np.where(private, int(Use.PRIVATE), int(Use.SHARED))


def counts(core: Core) -> Iterator[str]:
    """I2: references and pins are the sums over named holders."""
    host = core.host
    sums = {longterm: np.zeros(host.nframes, dtype=np.int64) for longterm in (False, True)}
    for entry in core.ledger.entries():
        pfns, held = core.ledger.counts(entry)
        sums[entry.longterm][pfns] += held.astype(np.int64)
    for pin in core.sessions.pins():
        sums[True][frames_of(pin)] += 1
    every = pages(0, host.nframes)
    yield from named("I2", sums[False] != host.refs.view, every, "has anonymous references")
    yield from named("I2", sums[True] != host.pins.view, every, "has anonymous pins")


def free(core: Core) -> Iterator[str]:
    """I3: a free frame is nobody's, and the blocks' counts are true.

    I4: a free frame holds no guest's bytes, and is not poisoned.
    """
    host = core.host
    every = pages(0, host.nframes)
    free = host.use.view == Use.FREE
    for column in (host.refs, host.pins, host.owner):
        yield from named("I3", free & (column.view != 0), every, f"is free with {column.name}")
    counted = free.reshape(-1, PMD_PAGES).sum(axis=1)
    for block in np.flatnonzero(counted != host.free_in_block.view).tolist():
        yield f"I3: block {block} has {counted[block]} free frames, not the number it says"
    # what the host itself wrote to a frame that was free is under no key, and wiped at the taking
    unscrubbed = (host.key.view != 0) | ~np.isin(host.stored.view, (Stored.RAW_ZERO, Stored.BYTES))
    yield from named("I4", free & unscrubbed, every, "is free and not scrubbed")
    poisoned = (host.flags.view & POISON) != 0
    yield from named("I4", free & poisoned, every, "is free and poisoned")
    # bytes in the arena count for a free frame only if the host wrote them since
    left = ((host.flags.view & ARENA) != 0) & (host.stored.view != Stored.BYTES)
    yield from named("I4", free & left, every, "is free, and the arena was not scrubbed")
    bytes_nowhere = (host.stored.view == Stored.BYTES) & ((host.flags.view & ARENA) == 0)
    yield from named("I4", bytes_nowhere, every, "has bytes that the arena has not")


def mirrors(core: Core) -> Iterator[str]:
    """I7: what is mapped is the right page of the right file, and is not poisoned.

    I5: what is mapped as private is private, and what is mapped as shared is shared.
    """
    for vm in core.vms.all():
        gfns = vm.mirror.touched(0, MAX_GFN)
        pfns, shared = unpack(vm.mirror.get(gfns))
        poisoned = core.host.poisoned(pfns)
        yield from named("I7", poisoned, pfns, f"is poisoned and mapped by {vm.info.label}")
        seen = np.zeros(gfns.size, dtype=np.bool_)
        for _, slot in vm.slots.items():
            at = np.flatnonzero((gfns >= slot.gfn) & (gfns < slot.gfn + slot.npages))
            seen[at] = True
            if not at.size:
                continue
            if not core.files.exists(slot.file):
                yield f"I7: {vm.info.label} maps pages of file/{slot.file}, which is gone"
                continue
            file = core.files.get(slot.file)
            pgoffs = gfns[at] - slot.gfn + slot.pgoff
            for private in (True, False):
                mine = shared[at] != private
                found = file.half(private).get(pgoffs[mine]).astype(np.int64) - 1
                wrong = found != pfns[at][mine]
                yield from named("I7", wrong, pfns[at][mine], "is mapped, but not that page's")
            state = is_private(core, vm, gfns[at], slot)
            wrong = state == shared[at]
            yield from named("I5", wrong, gfns[at], f"of {vm.info.label} is mapped as the other")
        yield from named("I7", ~seen, gfns, f"of {vm.info.label} is mapped without a slot")


def movable(core: Core) -> Iterator[str]:
    """I9: a private page may move only if its consumer has migrate_folio, poison never."""
    host = core.host
    every = pages(0, host.nframes)
    movable = movable_frames(core, every)
    yield from named("I9", movable & (host.owner.view == 0), every, "is movable and nobody's")
    poisoned = (host.flags.view & POISON) != 0
    yield from named("I9", movable & poisoned, every, "is movable and poisoned")
    unmovable = [
        file.info.file
        for file in core.files.all()
        if file.info.vm not in core.consumers
        or core.consumers[file.info.vm].ops.migrate_folio is None
    ]
    private = (host.use.view == Use.PRIVATE) & np.isin(host.owner.view, unmovable)
    yield from named("I9", movable & private, every, "is movable without migrate_folio")


def in_place(core: Core) -> Iterator[str]:
    """I5: in place, one half has a page: private bytes are not in the shared half, nor reversed."""
    for file in core.files.all():
        if not file.info.in_place:
            continue
        both = file.shared.touched(0, file.info.size_pages)
        if both.size:
            yield f"I5: file/{file.info.file} is in place and has {both.size} pages beside"
        pgoffs = file.frames.touched(0, file.info.size_pages)
        pfns = np.asarray(file.frames.get(pgoffs), dtype=np.int64) - 1
        shared = file.attributes.get(pgoffs) != PRIVATE
        wrong = (core.host.stored.get(pfns) == Stored.SHARED) != shared
        yield from named("I5", wrong, pfns, f"of file/{file.info.file} has its bytes elsewhere")


def failed(core: Core) -> Iterator[str]:
    """I12: what a vendor could not give back is in use or leaked, never free or offline.

    I13: a poisoned frame stays out of use: neither free nor offline, from where it would come back.
    """
    host = core.host
    every = pages(0, host.nframes)
    usable = np.isin(host.use.view, (Use.FREE, Use.OFFLINE))
    kept = (host.flags.view & KEPT) != 0
    yield from named("I12", kept & usable, every, "was kept by its vendor, and can be taken")
    poisoned = (host.flags.view & POISON) != 0
    yield from named("I13", poisoned & usable, every, "is poisoned, and can be taken")
    healthy = (host.use.view == Use.POISONED) & ~poisoned
    yield from named("I13", healthy, every, "is out of use as poisoned, and is not")


def nodes(core: Core) -> Iterator[str]:
    """I22: over all nodes, the frames in use are those that files own or somebody references."""
    host = core.host
    used = np.isin(host.use.view, IN_FILES)
    by_node = sum(int(used[node.first : node.end].sum()) for node in host.nodes)
    owned = sum(
        table.touched(0, file.info.size_pages).size
        for file in core.files.all()
        for table, _ in _halves(file)
    )
    orphans = used & (host.owner.view == 0) & ((host.refs.view > 0) | (host.pins.view > 0))
    if by_node != owned + int(orphans.sum()):
        yield f"I22: {by_node} frames of the nodes are in use, and files own {owned}"
    if sum(node.npages for node in host.nodes) != host.nframes:
        yield f"I22: the nodes do not cover the host's {host.nframes} frames"


def named(rule: str, wrong: Bools, numbers: I64, what: str) -> Iterator[str]:
    """Name the first page that a rule is broken for, and how many more there are."""
    bad = np.flatnonzero(wrong)
    if bad.size:
        more = f" (and {bad.size - 1} more)" if bad.size > 1 else ""
        yield f"{rule}: page {int(numbers[bad[0]]):#x}{more} {what}"
