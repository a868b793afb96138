"""Migration: the API that the 2022 thread asked for.

Owns the move of pages between frames. ``migrate_folio`` NULL: unmovable, the consumer is not asked
and nothing changes. Otherwise: reserve, block (invalidate_start with MIGRATE), check references,
let the consumer relocate, point everything at the new frame, end, scrub the old frame. Shared
pages move by invalidation, whatever the consumer.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np
from msgspec import Struct, field

from rmemd.engine import frames
from rmemd.engine.bracket import held_by_others, in_progress, views_of
from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.waits import GaveUp
from rmemd.errors import FOLIO_BUSY, FOLIO_UNMOVABLE, HW_POISON, NO_FRAMES, Kind, RmemError
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Runs, Why
from rmemd.model import buddy
from rmemd.model.files import FLAG_ANONYMOUS, RestrictedFile
from rmemd.model.host import Stored, Use
from rmemd.model.vms import Vm, unpack
from rmemd.units import I64, Bools, distinct, run_breaks

# a folio batch: what is moved in one transaction
BATCH_PAGES = 2048


class Outcome(IntEnum):
    """What became of a page that was to move."""

    MOVED = 1
    UNMOVABLE = 2
    BUSY = 3
    FAILED = 4


class Moved(Struct, frozen=True):
    """Pages with one outcome: parallel int64 frames; ``dst`` is -1 where they did not move."""

    src: I64
    dst: I64
    outcome: Outcome
    vm: int
    gfns: I64
    refusal: RmemError | None = None


def never() -> bool:
    """Be the answer of who does not stop a job."""
    return False


class Report(Struct):
    """What a job that moves pages did, page by page; it can be read while it grows.

    Attributes:
        moves: the pages with their outcomes; only ever appended to.
        total: the pages that are to be dealt with, 0 until that is known.
        done: those dealt with; a page that went away meanwhile has no outcome, but is counted.
        cancelled: asked between two steps whether to stop; what was done stays.
        stopped: whether it was stopped before it had dealt with all.
    """

    moves: list[Moved] = field(default_factory=list)
    total: int = 0
    done: int = 0
    cancelled: Callable[[], bool] = never
    stopped: bool = False

    def is_stopped(self) -> bool:
        """Return whether to stop now, and remember it."""
        self.stopped = self.stopped or self.cancelled()
        return self.stopped

    def count(self, outcome: Outcome) -> int:
        """Count the pages with an outcome."""
        return sum(m.src.size for m in tuple(self.moves) if m.outcome is outcome)

    def failed(self, src: I64, outcome: Outcome, vm: int, gfns: I64, why: RmemError) -> None:
        """Note pages that stay where they are."""
        if src.size:
            self.moves.append(Moved(src, np.full(src.size, -1), outcome, vm, gfns, why))


def migrate(core: Core, src: I64, nodes: tuple[int, ...], report: Report) -> Steps[Report]:
    """Move pages to free frames of ``nodes``, in that order; return the report."""
    report.total += src.size
    yield from migrate_to(core, src, None, nodes, report)
    return report


def migrate_to(
    core: Core, src: I64, dst: I64 | None, nodes: tuple[int, ...], report: Report
) -> Steps[None]:
    """Move pages to given free frames (``dst`` parallel to ``src``), or to any of ``nodes``."""
    owned = core.host.owner.get(src) != 0
    unowned = src[~owned & np.isin(core.host.use.get(src), (Use.PRIVATE, Use.SHARED))]
    gone = FOLIO_BUSY("the page was removed from its file and is still referenced")
    report.failed(unowned, Outcome.BUSY, 0, np.full(unowned.size, -1), gone)
    report.done += src.size - int(owned.sum())
    src, dst = src[owned], None if dst is None else dst[owned]
    files = core.host.owner.get(src)
    for number in distinct(files).tolist():
        if report.is_stopped():
            return
        of_file = np.flatnonzero(files == number)
        may = _may_move(core, number, src[of_file], report)
        report.done += may.size - int(may.sum())
        of_file = of_file[may]
        for at in range(0, of_file.size, BATCH_PAGES):
            part = of_file[at : at + BATCH_PAGES]
            target = None if dst is None else dst[part]
            yield from _move_batch(core, number, src[part], target, nodes, report)
    yield from core.scrub()


def _move_batch(
    core: Core, number: int, src: I64, dst: I64 | None, nodes: tuple[int, ...], report: Report
) -> Steps[None]:
    def one() -> Steps[list[Moved]]:
        return (yield from _move(core, number, src, dst, nodes))

    if report.is_stopped():
        return
    try:
        report.moves += yield from core.unit(one, report.is_stopped)
    except GaveUp:
        return
    except RmemError as refusal:
        if src.size > 1 and refusal.reason.kind in (Kind.REFUSED, Kind.EXHAUSTED):
            # one page's refusal is not its neighbours': find it by halves
            half = src.size // 2
            for part in (slice(0, half), slice(half, src.size)):
                target = None if dst is None else dst[part]
                yield from _move_batch(core, number, src[part], target, nodes, report)
            return
        _note(core, core.files.get(number), src, refusal, report)
    report.done += src.size


def _may_move(core: Core, number: int, src: I64, report: Report) -> Bools:
    """Sort out what can never move, so that it does not keep the rest of its batch."""
    may: Bools = core.host.owner.get(src) == number
    if not may.any():
        return may
    file = core.files.get(number)
    private, poisoned = governed(core, file, src), core.host.poisoned(src)
    for group in (may & poisoned, may & private & ~poisoned):
        try:
            _require_movable(core, file, src[group], private[group])
        except RmemError as refusal:
            _note(core, file, src[group], refusal, report)
            may &= ~group
    return may


def _note(core: Core, file: RestrictedFile, src: I64, why: RmemError, report: Report) -> None:
    outcome = Outcome.UNMOVABLE if why.reason is FOLIO_UNMOVABLE else Outcome.FAILED
    gfns = _gfns(file, core.host.pgoff.get(src))[1]
    report.failed(src, outcome, file.info.vm, gfns, why)


def _move(
    core: Core, number: int, src: I64, dst: I64 | None, nodes: tuple[int, ...]
) -> Steps[list[Moved]]:
    still = core.host.owner.get(src) == number
    src, dst = src[still], None if dst is None else dst[still]
    if not src.size:
        return []
    file = core.files.get(number)
    pgoffs = core.host.pgoff.get(src)
    private = governed(core, file, src)
    _require_movable(core, file, src, private)
    start, npages = int(pgoffs.min()), int(pgoffs.max() - pgoffs.min()) + 1
    core.ranges.require_idle("file", number, start, npages)
    for view in views_of(core, file, start, npages):
        core.ranges.require_idle("vm", view.vm.info.vm, view.gfn, view.npages)
    with core.tx("migrate") as tx:
        if dst is None:
            dst = buddy.take(core.host, tx, src.size, Use.PRIVATE, nodes)
        else:
            _require_free(core, dst)
            buddy.take_exactly(core.host, tx, dst, Use.PRIVATE)
        blocked = _block(core, tx, file, pgoffs, src, private)
        busy = _busy(core, file, src)
        moves = _busy_moves(core, file, src, pgoffs, busy)
        _hand_back(core, tx, dst[busy])
        ok = ~busy
        # what the host wrote to a frame that is handed back stays its own
        frames.wipe(core, tx, dst[ok])
        _relocate(core, tx, file, pgoffs[ok], src[ok], dst[ok], private[ok])
        with in_progress(core, file, start, npages):
            yield Step("migrate", tx=tx, vm=file.info.vm)
        _repoint(core, tx, file, pgoffs[ok], src[ok], dst[ok], private[ok])
        _unblock(core, tx, file, blocked, src, dst, ok)
        moved = _retire(core, tx, file, pgoffs, src, dst, ok)
        return moves + moved


def governed(core: Core, file: RestrictedFile, pfns: I64) -> Bools:
    """Return which frames the hook decides about.

    Those of private pages; in place, one folio serves either state, so all of the file's.
    """
    if file.info.in_place and not file.info.flags & FLAG_ANONYMOUS:
        return np.ones(pfns.size, dtype=np.bool_)
    mine: Bools = core.host.use.get(pfns) == Use.PRIVATE
    return mine


def _require_movable(core: Core, file: RestrictedFile, src: I64, private: Bools) -> None:
    poisoned = core.host.poisoned(src)
    if poisoned.any():
        pfn = int(src[poisoned][0])
        raise HW_POISON(f"pfn {pfn:#x} is poisoned and is not copied from", page=f"pfn {pfn:#x}")
    if not private.any() or not core.vms.exists(file.info.vm):
        if private.any():
            raise FOLIO_UNMOVABLE(
                f"the VM of file/{file.info.file} is gone, and nobody can move its private folios"
            )
        return
    vm = core.vms.get(file.info.vm)
    if core.consumer(vm).ops.migrate_folio is None:
        raise FOLIO_UNMOVABLE(
            f"{vm.info.consumer} of {vm.info.label} has no migrate_folio",
            page=f"pfn {int(src[private][0]):#x}", state="migrate_folio NULL",
            rule="Linux move_to_new_folio: -EOPNOTSUPP for inaccessible mappings",
            where=core.consumer(vm).name,
        )  # fmt: skip


def _require_free(core: Core, dst: I64) -> None:
    taken = dst[core.host.use.get(dst) != Use.FREE]
    if taken.size:
        raise NO_FRAMES(f"pfn {int(taken[0]):#x} is no longer free", page=f"pfn {int(taken[0]):#x}")


def _block(
    core: Core, tx: Tx, file: RestrictedFile, pgoffs: I64, src: I64, private: Bools
) -> list[tuple[Vm, I64, Bools]]:
    """Start the bracket: block private entries, zap shared ones; return what was mapped."""
    blocked = []
    for vm, gfns, mine in _bound_pages(core, file, pgoffs):
        pfns, shared = unpack(vm.mirror.get(gfns))
        mapped = np.zeros(pgoffs.size, dtype=np.bool_)
        mapped[mine] = (pfns == src[mine]) & ~shared & private[mine]
        runs = Runs.of_pages(gfns[mapped[mine]], src[mapped])
        core.consumer(vm).call(tx, "invalidate_start", runs, Why.MIGRATE)
        core.ranges.invalidated(vm.info.vm)
        zapped = gfns[(pfns == src[mine]) & shared]
        tx.put(vm.mirror, zapped, 0)
        everywhere = np.full(pgoffs.size, -1, dtype=np.int64)
        everywhere[mine] = gfns
        blocked.append((vm, everywhere, mapped))
    return blocked


def _bound_pages(core: Core, file: RestrictedFile, pgoffs: I64) -> list[tuple[Vm, I64, Bools]]:
    """Return, per VM, the guest frames of the pages that are bound, and which pages those are."""
    vm_of, gfns = _gfns(file, pgoffs)
    found = []
    for number in distinct(vm_of[vm_of > 0]).tolist():
        mine = vm_of == number
        found.append((core.vms.get(number), gfns[mine], mine))
    return found


def _gfns(file: RestrictedFile, pgoffs: I64) -> tuple[I64, I64]:
    """Return, per page, the VM it is bound to (0: none) and its guest frame (-1)."""
    vm_of = np.zeros(pgoffs.size, dtype=np.int64)
    gfns = np.full(pgoffs.size, -1, dtype=np.int64)
    lo = int(pgoffs.min(initial=0))
    for binding, start, n in file.bound(lo, int(pgoffs.max(initial=0)) + 1 - lo):
        mine = (pgoffs >= start) & (pgoffs < start + n)
        vm_of[mine] = binding.vm
        gfns[mine] = pgoffs[mine] - binding.pgoff + binding.gfn
    return vm_of, gfns


def _busy(core: Core, file: RestrictedFile, src: I64) -> Bools:
    """References beyond the page cache's own and those that move along with the mapping."""
    extra: Bools = frames.referenced(core, src)
    if not extra.any() or not core.vms.exists(file.info.vm):
        return extra
    vm = core.vms.get(file.info.vm)
    if core.consumer(vm).ops.migrate_folio is None:
        return extra
    return held_by_others(core, vm, src)


def _busy_moves(
    core: Core, file: RestrictedFile, src: I64, pgoffs: I64, busy: Bools
) -> list[Moved]:
    if not busy.any():
        return []
    at = int(np.flatnonzero(busy)[0])
    pfn = int(src[at])
    refusal = FOLIO_BUSY(
        f"pfn {pfn:#x} is referenced", page=f"pfn {pfn:#x}", state="referenced",
        holders=core.ledger.holders(pfn), rule="restrictedmem.md §1: migration",
    )  # fmt: skip
    core.waits.refused(refusal, pfn)
    gfns = _gfns(file, pgoffs[busy])[1]
    nowhere = np.full(int(busy.sum()), -1)
    return [Moved(src[busy], nowhere, Outcome.BUSY, file.info.vm, gfns, refusal)]


def _hand_back(core: Core, tx: Tx, pfns: I64) -> None:
    if pfns.size:
        buddy.give(core.host, tx, pfns)


def _relocate(
    core: Core, tx: Tx, file: RestrictedFile, pgoffs: I64, src: I64, dst: I64, private: Bools
) -> None:
    """Have the consumer move private pages; shared ones keep their bytes in the shared memfd."""
    if private.any():
        vm = core.vms.get(file.info.vm)
        gfns = _gfns(file, pgoffs[private])[1]
        core.consumer(vm).call(tx, "migrate_folio", gfns, src[private], dst[private])


def _repoint(
    core: Core, tx: Tx, file: RestrictedFile, pgoffs: I64, src: I64, dst: I64, private: Bools
) -> None:
    host = core.host
    tx.put(host.owner, dst, file.info.file)
    tx.put(host.pgoff, dst, pgoffs)
    tx.put(host.use, dst, host.use.get(src))
    shared = ~private
    for mask, table in ((private, file.half(True)), (shared, file.half(False))):
        tx.put(table, pgoffs[mask], dst[mask] + 1)
    tx.put(host.stored, dst[shared], int(Stored.SHARED))
    # whoever else held one of them would have made it busy
    core.ledger.move(tx, src, dst, f"vm/{file.info.vm}")


def _unblock(
    core: Core,
    tx: Tx,
    file: RestrictedFile,
    blocked: list[tuple[Vm, I64, Bools]],
    src: I64,
    dst: I64,
    ok: Bools,
) -> None:
    """Point the mirror at the new frames and end the bracket, for those moved and those not."""
    for vm, gfns, mapped in blocked:
        moved, stayed = mapped & ok, mapped & ~ok
        runs = Runs.of_pages(gfns[moved], dst[moved])
        vm.install(tx, runs, shared=False)
        consumer = core.consumer(vm)
        consumer.call(tx, "invalidate_end", runs, Why.MIGRATE, True)
        if stayed.any():
            runs = Runs.of_pages(gfns[stayed], src[stayed])
            consumer.call(tx, "invalidate_end", runs, Why.MIGRATE, False)


def _retire(
    core: Core, tx: Tx, file: RestrictedFile, pgoffs: I64, src: I64, dst: I64, ok: Bools
) -> list[Moved]:
    """Free the old frames and say what was moved."""
    if not ok.any():
        return []
    tx.put(core.host.owner, src[ok], 0)
    frames.free_frames(core, tx, src[ok])
    gfns = _gfns(file, pgoffs[ok])[1]
    moved = Moved(src[ok], dst[ok], Outcome.MOVED, file.info.vm, gfns)
    for at in run_breaks(moved.src, moved.dst, gfns).tolist():
        tx.emit(
            "folio_migrated", vm=file.info.vm, file=file.info.file, pgoff=int(pgoffs[ok][at]),
            gfn=int(gfns[at]), src=int(moved.src[at]), dst=int(moved.dst[at]),
        )  # fmt: skip
    return [moved]
