"""Conversion by VM attributes: KVM_SET_MEMORY_ATTRIBUTES, which touches no bytes.

Owns calls of one range or of thousands. All of a call is checked, as arrays, before its first
range changes. Ranges that do not overlap are set together, in one transaction: one record, and the
pair of hooks once for each of the two states. What that is refused for is found one by one: the
ranges before the one that is refused stay. Source: restrictedmem.md §2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from msgspec import Struct

from rmemd.engine import frames
from rmemd.engine.bracket import Scattered, View, invalidating
from rmemd.engine.convert import RULE_IN_PLACE, check_range, supported
from rmemd.engine.core import Core
from rmemd.engine.driver import Steps
from rmemd.errors import WRONG_PERSONALITY, RmemError
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Why
from rmemd.model.files import PRIVATE, SHARED, RestrictedFile
from rmemd.model.spans import Spans
from rmemd.model.vms import Slot, Vm
from rmemd.units import I64, MAX_GFN, PAGE_SHIFT, PAGE_SIZE, U8, U64, Bools

Ranges = Sequence[tuple[int, int, int]] | U64
# more are set range by range: no hook is given so many at once that it would be overdue
TOGETHER_PAGES = 1 << 20
_SHIFT, _ONE = np.uint64(PAGE_SHIFT), np.uint64(1)
_IN_PAGE, _TOP = np.uint64(PAGE_SIZE - 1), np.uint64(MAX_GFN * PAGE_SIZE)


class Asked(Struct, frozen=True):
    """Guest ranges in pages, and what each is to be (1: private), in the caller's order."""

    starts: I64
    counts: I64
    private: U8

    def one(self, index: int) -> Asked:
        """Return one of them."""
        at = slice(index, index + 1)
        return Asked(self.starts[at], self.counts[at], self.private[at])

    def apart(self) -> Asked | None:
        """Return them in ascending order; None if two overlap, of which the later one counts."""
        if (self.starts[1:] < self.starts[:-1]).any():
            order = np.argsort(self.starts)
            return Asked(self.starts[order], self.counts[order], self.private[order]).apart()
        overlap = (self.starts[1:] < self.starts[:-1] + self.counts[:-1]).any()
        return None if overlap else self

    def changing(self, vm: Vm) -> tuple[Spans, U8]:
        """Return those that are not so already, and what they are to be."""
        every = Spans(self.starts, self.counts)
        changing = ~every.are(vm.attributes, self.private)
        return every.where(changing), self.private[changing]


def set_attributes(core: Core, number: int, ranges: Ranges, flags: int) -> Steps[int]:
    """Set attributes of byte ranges (gpa, size, attributes); return how many were so already.

    Everything is checked before the first range is changed.

    Args:
        core: the core.
        number: the VM.
        ranges: tuples, or their uint64 rows, shape (n, 3).
        flags: must be 0.
    """
    yield from ()
    vm = core.vms.alive(number)
    if vm.info.in_place:
        raise WRONG_PERSONALITY(
            f"{vm.info.label} converts in place: use the file's attributes", rule=RULE_IN_PLACE
        )
    asked = _checked(vm, ranges, flags)
    several = asked.starts.size > 1 and int(asked.counts.sum()) <= TOGETHER_PAGES
    # a rule strikes at a passage, and each range passes by itself
    together = asked.apart() if several and not core.rules.all() else None
    if together is not None:
        try:
            return (yield from core.unit(partial(_set, core, number, together)))
        except RmemError:
            # nothing has happened: which of them it is for is found below
            pass
    unchanged = 0
    for index in range(asked.starts.size):
        unchanged += yield from core.unit(partial(_set, core, number, asked.one(index)))
    return unchanged


def _checked(vm: Vm, ranges: Ranges, flags: int) -> Asked:
    """Check every range, and return them in pages.

    Raises:
        InvalidArgument: UNKNOWN_FLAG, ATTRIBUTES_UNSUPPORTED, BAD_RANGE, NOT_PAGE_ALIGNED, for
            the first range that it is true of.
    """
    if isinstance(ranges, np.ndarray):
        gpas, sizes, attributes = (np.ascontiguousarray(ranges[:, i]) for i in range(3))
        wrong = _wrong(gpas, sizes, attributes, supported(vm))
        if flags or wrong.any():
            at = 0 if flags else int(np.argmax(wrong))
            _check(vm, flags, at, tuple(ranges[at].tolist()))
    else:
        for index, row in enumerate(ranges):
            _check(vm, flags, index, row)
        gpas, sizes, attributes = np.array(ranges, dtype=np.uint64).reshape(-1, 3).T
    return Asked(
        (gpas >> _SHIFT).astype(np.int64), (sizes >> _SHIFT).astype(np.int64),
        (attributes != 0).astype(np.uint8),
    )  # fmt: skip


def _wrong(gpas: U64, sizes: U64, attributes: U64, allowed: int) -> Bools:
    """Return which ranges ``check_range`` refuses, for one reason or another."""
    # an empty one wraps to the largest size there is
    wrong = (gpas > _TOP) | (sizes - _ONE >= _TOP) | (gpas + sizes > _TOP)
    wrong |= ((gpas | sizes) & _IN_PAGE) != 0
    wrong |= (attributes & ~np.uint64(allowed)) != 0
    return wrong


def _check(vm: Vm, flags: int, index: int, row: tuple[int, int, int]) -> None:
    gpa, size, attributes = row
    check_range(vm, flags, attributes, gpa, size, f"ranges[{index}].", "gpa")


def _set(core: Core, number: int, asked: Asked) -> Steps[int]:
    """Set ranges that ascend and do not overlap; return how many were so already."""
    yield from ()
    vm = core.vms.alive(number)
    changing, private = asked.changing(vm)
    if not changing.starts.size:
        return asked.starts.size
    _require_idle(core, number, changing)
    # each state in as few ranges as can be: adjacent ones are one
    halves = {
        state: changing.where(private == state).merged()
        for state in (SHARED, PRIVATE) if (private == state).any()
    }  # fmt: skip
    with core.tx("set attributes") as tx:
        views = []
        for state, spans in halves.items():
            slots = _slots(vm, spans)
            if slots:
                views.append(_view(vm, spans, zapped=state != PRIVATE))
            for slot in slots:
                _charge_found(core, tx, slot, spans)
        with invalidating(core, tx, views, Why.CONVERT):
            for state, spans in halves.items():
                spans.write(tx, vm.attributes, state)
        for state, spans in halves.items():
            _tell(tx, number, spans, state == PRIVATE)
    return asked.starts.size - changing.starts.size


def _require_idle(core: Core, number: int, spans: Spans) -> None:
    """Have the operation wait while one of the ranges is in progress."""
    if core.ranges.is_in_progress("vm", number, spans.first, spans.extent):
        for start, n in spans:
            core.ranges.require_idle("vm", number, start, n)


def _slots(vm: Vm, spans: Spans) -> list[Slot]:
    columns = (column.tolist() for column in vm.slotmap.runs(spans.first, spans.extent))
    runs = zip(*columns, strict=True)
    numbers = {slot for start, n, slot in runs if slot and spans.meet(start, n)}
    return [vm.slots[number - 1] for number in sorted(numbers)]


def _view(vm: Vm, spans: Spans, zapped: bool) -> View:
    if spans.starts.size == 1:
        return View(vm, spans.first, spans.total, zapped)
    return Scattered(vm, spans.first, spans.extent, zapped, spans=spans)


def _charge_found(core: Core, tx: Tx, slot: Slot, spans: Spans) -> None:
    """Charge pages of a slot's file that a client filled in by itself."""
    if not core.files.exists(slot.file):
        return
    file = core.files.get(slot.file)
    if core.has_shared_memory(file):
        inside = spans.within(slot.gfn, slot.npages).shifted(slot.pgoff - slot.gfn)
        frames.charge_found(core, tx, file, _uncharged(core, file, inside))


def _uncharged(core: Core, file: RestrictedFile, spans: Spans) -> I64:
    if not spans.are_near:
        return np.concatenate([frames.uncharged(core, file, start, n) for start, n in spans])
    found = frames.uncharged(core, file, spans.first, spans.extent)
    return found[spans.hold(found)]


def _tell(tx: Tx, number: int, spans: Spans, private: bool) -> None:
    """Tell of ranges that were set to one state: as one range, or from where on how many pages."""
    several = {"ranges": spans.starts.size} if spans.starts.size > 1 else {}
    tx.emit(
        "attributes_set", vm=number, gfn=spans.first, npages=spans.total, private=private, **several
    )
