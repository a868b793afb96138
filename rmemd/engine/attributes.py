"""Conversion by VM attributes: KVM_SET_MEMORY_ATTRIBUTES, which touches no bytes.

Owns calls of one range or of thousands. All of a call is checked, as arrays, before its first
range changes. Ranges that do not overlap are set together, in one transaction: one record, and the
pair of hooks once for each of the two states. What that is refused for is found one by one: the
ranges before the one that is refused stay. Source: restrictedmem.md §2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from rmemd.units import I64, MAX_GFN, PAGE_SHIFT, PAGE_SIZE, U8, U64

Ranges = Sequence[tuple[int, int, int]] | U64
# more are set range by range: no hook is given so many at once that it would be overdue
TOGETHER_PAGES = 1 << 20
_SHIFT = np.uint64(PAGE_SHIFT)


class Asked(Struct, frozen=True):
    """Guest ranges in pages, and what each is to be (1: private).

    They are as the caller has them, in any order, and may overlap: the later one counts.
    """

    spans: Spans
    private: U8

    def one(self, index: int) -> Asked:
        """Return one of them."""
        at, spans = slice(index, index + 1), self.spans
        return Asked(Spans(spans.starts[at], spans.counts[at]), self.private[at])

    def apart(self) -> Asked | None:
        """Return them in ascending order; None if two overlap."""
        spans = self.spans
        if not np.count_nonzero(spans.starts[1:] < spans.ends[:-1]):
            return self
        order = np.argsort(spans.starts, kind="stable")
        if (order[1:] > order[:-1]).all():
            return None
        ordered = Spans(spans.starts[order], spans.counts[order])
        return Asked(ordered, self.private[order]).apart()


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
    nranges = asked.private.size
    several = nranges > 1 and asked.spans.total <= TOGETHER_PAGES
    # a rule strikes at a passage, and each range passes by itself
    together = asked.apart() if several and not core.rules.all() else None
    if together is not None:
        try:
            return (yield from core.at_once(partial(_set, core, number, together)))
        except RmemError:
            # nothing has happened: which of them it is for is found below
            pass
    unchanged = 0
    for index in range(nranges):
        unchanged += yield from core.at_once(partial(_set, core, number, asked.one(index)))
    return unchanged


def _checked(vm: Vm, ranges: Ranges, flags: int) -> Asked:
    """Check every range, and return them in pages.

    Raises:
        InvalidArgument: UNKNOWN_FLAG, ATTRIBUTES_UNSUPPORTED, BAD_RANGE, NOT_PAGE_ALIGNED, for
            the first range that it is true of.
    """
    if not isinstance(ranges, np.ndarray):
        _check_each(vm, ranges, flags)
        ranges = np.array(ranges, dtype=np.uint64).reshape(-1, 3)
    columns = np.ascontiguousarray(ranges.T)
    # what bits any of them has, by column
    gpas, sizes, attributes = np.bitwise_or.reduce(columns, axis=1).tolist()
    spans = Spans(*(columns[:2] >> _SHIFT).view(np.int64))
    if (
        flags or (gpas | sizes) & (PAGE_SIZE - 1) or attributes & ~supported(vm)
        or np.minimum.reduce(spans.counts, initial=1) < 1
        or np.maximum.reduce(spans.ends, initial=0) > MAX_GFN
    ):  # fmt: skip
        _check_each(vm, ranges.tolist(), flags)
    return Asked(spans, (columns[2] != 0).view(np.uint8))


def _check_each(vm: Vm, ranges: Sequence[tuple[int, int, int]], flags: int) -> None:
    for index, (gpa, size, attributes) in enumerate(ranges):
        check_range(vm, flags, attributes, gpa, size, f"ranges[{index}].", "gpa")


def _set(core: Core, number: int, asked: Asked) -> int:
    """Set ranges that ascend and do not overlap; return how many were so already."""
    vm = core.vms.alive(number)
    changing, private = asked.spans, asked.private
    same = changing.are(vm.attributes, private)
    unchanged = int(np.count_nonzero(same))
    if unchanged == same.size:
        return unchanged
    if unchanged:
        changing, private = changing.where(~same), private[~same]
    _require_idle(core, number, changing)
    halves = {state: spans.handled() for state, spans in _by_state(changing, private)}
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
    return unchanged


def _by_state(spans: Spans, private: U8) -> Iterator[tuple[int, Spans]]:
    """Yield what is to be shared and what private, if there is any."""
    nprivate = int(np.count_nonzero(private))
    if nprivate in (0, private.size):
        yield PRIVATE if nprivate else SHARED, spans
        return
    for state in (SHARED, PRIVATE):
        yield state, spans.where(private == state)


def _require_idle(core: Core, number: int, spans: Spans) -> None:
    """Have the operation wait while one of the ranges is in progress."""
    if core.ranges.is_in_progress("vm", number, spans.first, spans.extent):
        for start, n in spans:
            core.ranges.require_idle("vm", number, start, n)


def _slots(vm: Vm, spans: Spans) -> list[Slot]:
    slot = vm.slot_at(spans.first)
    if slot is not None and spans.first + spans.extent <= slot.gfn + slot.npages:
        return [slot]
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
    several = {"ranges": spans.pieces} if spans.pieces > 1 else {}
    tx.emit(
        "attributes_set", vm=number, gfn=spans.first, npages=spans.total, private=private, **several
    )
