"""The invariants that hold between any two operations, as one function.

Owns ``check``, which reads every table and writes none, and the table of its parts: what each part
checks is in its docstring, and said from there (``checked``). Numbers are those of reliability.md
§3. It costs a sweep of the host, so it is for tests, for a daemon's self-check and for simulation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import cleandoc
from itertools import pairwise

import numpy as np

from rmemd.engine.compact import movable_frames
from rmemd.engine.core import Core
from rmemd.engine.fault import is_private
from rmemd.hooks.tables import Sparse
from rmemd.model.files import PRIVATE, RestrictedFile
from rmemd.model.host import ARENA, POISON, Stored, Use
from rmemd.model.vms import Vm, unpack
from rmemd.units import I64, MAX_GFN, PMD_PAGES, Bools, pages

IN_FILES = (Use.PRIVATE, Use.SHARED)
SAID = re.compile(r"^(I\d+): (.+?)\.?$", re.MULTILINE)


@dataclass(frozen=True)
class Checked:
    """What a look at the whole state came to.

    Attributes:
        revision: the state's.
        violated: one line each, as "I3: ...".
        seconds: how long the lock was held for it.
    """

    revision: int
    violated: tuple[str, ...]
    seconds: float


def check(core: Core) -> list[str]:
    """Return what is violated, one line each, as "I3: ..."; empty when all is well."""
    return [line for part in PARTS for line in _found(part, core)]


def timed(core: Core) -> Checked:
    """Check under the lock, which the caller holds, and say how long that took."""
    begun = core.guard.clock()
    violated = tuple(check(core))
    return Checked(core.journal.revision, violated, core.guard.clock() - begun)


def checked() -> dict[str, str]:
    """Return what is checked: each invariant's number and meaning, in order of number."""
    found: dict[str, list[str]] = {}
    for part in PARTS:
        for number, meaning in SAID.findall(cleandoc(part.__doc__ or "")):
            found.setdefault(number, []).append(meaning)
    return {number: "; ".join(found[number]) for number in sorted(found, key=_order)}


def _order(number: str) -> int:
    return int(number[1:])


def _found(part: Callable[[Core], Iterator[str]], core: Core) -> Iterator[str]:
    try:
        yield from part(core)
    except Exception as error:
        # tables that contradict each other so far that they cannot even be read
        number = SAID.findall(cleandoc(part.__doc__ or ""))[0][0]
        yield f"{number}: cannot be checked, for {type(error).__name__}"


def _owners(core: Core) -> Iterator[str]:
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
            yield from _named("I1", bad, pfns, f"is in {table.name}, which it does not name")
            used = _expected_use(file, pgoffs, use)
            wrong = host.use.get(pfns) != used
            yield from _named("I1", wrong, pfns, f"is in {table.name}, but of another use")
    every = pages(0, host.nframes)
    yield from _named("I1", claimed > 1, every, "is the frame of two pages")
    owned = host.owner.view != 0
    yield from _named("I1", owned & (claimed == 0), every, "has an owner that does not know it")
    loose = np.isin(host.use.view, IN_FILES) & ~owned & (host.refs.view == 0)
    yield from _named("I1", loose & (host.pins.view == 0), every, "is in use by nobody")


def _halves(file: RestrictedFile) -> list[tuple[Sparse, Use]]:
    return [(file.frames, Use.PRIVATE), (file.shared, Use.SHARED)]


def _expected_use(file: RestrictedFile, pgoffs: I64, use: Use) -> I64:
    if not file.info.in_place:
        return np.full(pgoffs.size, int(use), dtype=np.int64)
    private = file.attributes.get(pgoffs) == PRIVATE
    return np.where(private, int(Use.PRIVATE), int(Use.SHARED))


def _counts(core: Core) -> Iterator[str]:
    """I2: references and pins are the sums over named holders."""
    host, space = core.host, core.space
    sums = {longterm: np.zeros(host.nframes, dtype=np.int64) for longterm in (False, True)}
    for entry in core.ledger.entries():
        table = space.tables[entry.table]
        assert isinstance(table, Sparse)
        pfns = table.touched(0, host.nframes)
        sums[entry.longterm][pfns] += table.get(pfns).astype(np.int64)
    every = pages(0, host.nframes)
    yield from _named("I2", sums[False] != host.refs.view, every, "has anonymous references")
    yield from _named("I2", sums[True] != host.pins.view, every, "has anonymous pins")


def _free(core: Core) -> Iterator[str]:
    """I3: a free frame is nobody's, and the blocks' counts are true.

    I4: a free frame holds no guest's bytes, and is not poisoned.
    """
    host = core.host
    every = pages(0, host.nframes)
    free = host.use.view == Use.FREE
    for column in (host.refs, host.pins, host.owner):
        yield from _named("I3", free & (column.view != 0), every, f"is free with {column.name}")
    counted = free.reshape(-1, PMD_PAGES).sum(axis=1)
    for block in np.flatnonzero(counted != host.free_in_block.view).tolist():
        yield f"I3: block {block} has {counted[block]} free frames, not the number it says"
    # what the host itself wrote to a frame that was free is under no key, and wiped at the taking
    unscrubbed = (host.key.view != 0) | ~np.isin(host.stored.view, (Stored.RAW_ZERO, Stored.BYTES))
    yield from _named("I4", free & unscrubbed, every, "is free and not scrubbed")
    poisoned = (host.flags.view & POISON) != 0
    yield from _named("I4", free & poisoned, every, "is free and poisoned")
    # bytes in the arena count for a free frame only if the host wrote them since
    left = ((host.flags.view & ARENA) != 0) & (host.stored.view != Stored.BYTES)
    yield from _named("I4", free & left, every, "is free, and the arena was not scrubbed")
    bytes_nowhere = (host.stored.view == Stored.BYTES) & ((host.flags.view & ARENA) == 0)
    yield from _named("I4", bytes_nowhere, every, "has bytes that the arena has not")


def _mirrors(core: Core) -> Iterator[str]:
    """I7: what is mapped is the right page of the right file, and is not poisoned.

    I5: what is mapped as private is private, and what is mapped as shared is shared.
    """
    for vm in core.vms.all():
        gfns = vm.mirror.touched(0, MAX_GFN)
        pfns, shared = unpack(vm.mirror.get(gfns))
        poisoned = core.host.poisoned(pfns)
        yield from _named("I7", poisoned, pfns, f"is poisoned and mapped by {vm.info.label}")
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
                yield from _named("I7", wrong, pfns[at][mine], "is mapped, but not that page's")
            state = is_private(core, vm, gfns[at], slot)
            wrong = state == shared[at]
            yield from _named("I5", wrong, gfns[at], f"of {vm.info.label} is mapped as the other")
        yield from _named("I7", ~seen, gfns, f"of {vm.info.label} is mapped without a slot")


def _slots(core: Core) -> Iterator[str]:
    """I3: slots, the slot map and the files' bindings say the same.

    I17: a slot lies inside its file.
    """
    bound = {
        (file.info.file, *key, binding.pgoff, binding.npages, binding.gfn)
        for file in core.files.all()
        for key, binding in file.bindings.items()
    }
    slots = {
        (slot.file, vm.info.vm, index, slot.pgoff, slot.npages, slot.gfn)
        for vm in core.vms.all()
        for index, slot in vm.slots.items()
        if core.files.exists(slot.file)
    }
    for name in sorted(bound ^ slots):
        yield f"I3: slot and binding differ at (file, vm, slot, pgoff, npages, gfn) {name}"
    for vm in core.vms.all():
        for index, slot in vm.slots.items():
            if not _is_inside(core, slot.file, slot.pgoff, slot.npages):
                yield f"I17: slot {index} of {vm.info.label} is not inside file/{slot.file}"
        yield from _slot_map(vm)


def _is_inside(core: Core, number: int, pgoff: int, npages: int) -> bool:
    """Return whether pages are a file's, or the file is gone."""
    if not core.files.exists(number):
        return True
    return 0 <= pgoff < pgoff + npages <= core.files.get(number).info.size_pages


def _slot_map(vm: Vm) -> Iterator[str]:
    covered = 0
    for index, slot in vm.slots.items():
        covered += slot.npages
        if not vm.slotmap.equals(slot.gfn, slot.npages, index + 1):
            yield f"I3: the slot map of {vm.info.label} differs from slot {index}"
    _, counts, values = vm.slotmap.runs(0, MAX_GFN)
    if int(counts[values != 0].sum()) != covered:
        yield f"I3: the slot map of {vm.info.label} covers more than its slots"


def _movable(core: Core) -> Iterator[str]:
    """I9: a private page may move only if its consumer has migrate_folio, poison never."""
    host = core.host
    every = pages(0, host.nframes)
    movable = movable_frames(core, every)
    yield from _named("I9", movable & (host.owner.view == 0), every, "is movable and nobody's")
    poisoned = (host.flags.view & POISON) != 0
    yield from _named("I9", movable & poisoned, every, "is movable and poisoned")
    unmovable = [
        file.info.file
        for file in core.files.all()
        if file.info.vm not in core.consumers
        or core.consumers[file.info.vm].ops.migrate_folio is None
    ]
    private = (host.use.view == Use.PRIVATE) & np.isin(host.owner.view, unmovable)
    yield from _named("I9", movable & private, every, "is movable without migrate_folio")


def _handles(core: Core) -> Iterator[str]:
    """I16: no handle is above its counter, so none is given out twice, and VMs have a consumer."""
    numbers = {
        "vm": [vm.info.vm for vm in core.vms.all()],
        "file": [file.info.file for file in core.files.all()],
        "key": [number for number, _ in core.host.keys.items()],
        "session": [info.session for info in core.sessions.all()],
        "pin": [pin.pin for pin in core.sessions.pins()],
        "userfault": [one.userfault for one in core.userfaults.all()],
    }
    for counter, used in numbers.items():
        if max(used, default=0) > core.host.counters.get(counter, 0):
            yield f"I16: {counter} {max(used)} is above the counter"
    if set(numbers["vm"]) != set(core.consumers):
        yield "I16: VMs and consumers are not the same"


def _userfaults(core: Core) -> Iterator[str]:
    """I3: fault handlers have files that are there, and what waits, waits for holes of theirs.

    I17: a fault handler's range lies inside its file.
    """
    for one, after in pairwise([*core.userfaults.all(), None]):
        assert one is not None
        if not core.files.exists(one.file):
            yield f"I3: userfault {one.userfault} is of file/{one.file}, which is gone"
        elif one.npages <= 0 or one.end > core.files.get(one.file).info.size_pages:
            yield f"I17: userfault {one.userfault} is not inside file/{one.file}"
        if after is not None and after.file == one.file and after.pgoff < one.end:
            yield f"I3: userfaults {one.userfault} and {after.userfault} overlap"
    for fault in core.pending_faults.waiting:
        if not fault.pgoffs.size:
            # it was woken, and looks again when its turn comes
            continue
        where = f"of file/{fault.file} is waited for"
        if not core.files.exists(fault.file):
            yield f"I3: page {int(fault.pgoffs[0]):#x} {where}, and the file is gone"
            continue
        covered = core.userfaults.covers(fault.file, fault.pgoffs)
        yield from _named("I3", ~covered, fault.pgoffs, f"{where}, and has no handler")
        half = core.files.get(fault.file).half(fault.private)
        there = half.get(fault.pgoffs) != 0
        yield from _named("I3", there, fault.pgoffs, f"{where}, and is there")
        if fault.vm and not core.vms.exists(fault.vm):
            yield f"I3: page {int(fault.pgoffs[0]):#x} {where} by vm/{fault.vm}, which is gone"


def _sessions(core: Core) -> Iterator[str]:
    """I14: nobody holds or owns anything in the name of a session that is gone.

    I17: what a device is granted lies inside its file.
    """
    alive = {info.session for info in core.sessions.all()}
    pins = {pin.holder: pin for pin in core.sessions.pins()}
    for pin in pins.values():
        if pin.owner.session and pin.owner.session not in alive:
            yield f"I14: pin {pin.pin} is of session {pin.owner.session}, which is gone"
    labels = {info.label for info in core.sessions.all()}
    for entry in core.ledger.entries():
        if entry.holder.startswith("session ") and entry.holder not in labels | pins.keys():
            yield f"I14: {entry.holder} holds pages ({entry.purpose}), and is gone"
    owners = [(vm.info.label, vm.info.owner) for vm in core.vms.all()]
    owners += [(f"file/{file.info.file}", file.info.owner) for file in core.files.all()]
    for name, owner in owners:
        if owner.session and owner.session not in alive:
            yield f"I14: {name} is of session {owner.session}, which is gone"
    for info in core.sessions.all():
        for grant in info.grants:
            if not _is_inside(core, grant.file, grant.pgoff, grant.npages):
                yield f"I17: {info.label} is granted what is not inside file/{grant.file}"
        if info.parent and info.parent not in alive:
            yield f"I14: {info.label} is below session {info.parent}, which is gone"
    for one in core.userfaults.all():
        if one.session and one.session not in alive:
            yield f"I14: userfault {one.userfault} is of session {one.session}, which is gone"


def _named(rule: str, wrong: Bools, numbers: I64, what: str) -> Iterator[str]:
    """Name the first page that a rule is broken for, and how many more there are."""
    bad = np.flatnonzero(wrong)
    if bad.size:
        more = f" (and {bad.size - 1} more)" if bad.size > 1 else ""
        yield f"{rule}: page {int(numbers[bad[0]]):#x}{more} {what}"


PARTS: tuple[Callable[[Core], Iterator[str]], ...] = (
    _owners, _counts, _free, _mirrors, _slots, _movable, _handles, _userfaults, _sessions,
)  # fmt: skip
