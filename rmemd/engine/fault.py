"""Guest faults: from a guest frame without a mapping to one with it.

Owns KVM's fault protocol: sample the invalidate sequence, look the page up with a reference,
start again if an invalidation came between, install the mapping, drop the reference. Vendors are
asked for private pages only.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct, field

from rmemd.engine import frames, userfault
from rmemd.engine.bracket import FAULT, View, invalidating, pin_entry
from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.faultrules import at_step
from rmemd.errors import FILE_GONE, MEMLOCK, MEMORY_FAULT, Busy, RmemError
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Pin, Runs, Why
from rmemd.model.files import RestrictedFile
from rmemd.model.ledger import Entry
from rmemd.model.vms import Slot, Vm, unpack
from rmemd.units import I64, Bools, pages

LOST_RACE, LOOKED_UP = "lost_race", "fault: looked up"
# KVM has no bound; a mock that is told to be busy for ever must say so
RETRIES_MAX = 16


class Stale(Exception):
    """The slot, the pages' state or the mirror changed before the look-up: look at the guest
    range again.
    """


class Trace(Struct):
    """What a fault did to its first page's references: (step, references, pins)."""

    steps: list[tuple[str, int, int]] = field(default_factory=list)

    def note(self, core: Core, step: str, pfn: int) -> None:
        """Record the page's counts; the page cache's own reference is one."""
        host = core.host
        cached = int(host.owner.at(pfn) != 0)
        self.steps.append((step, cached + host.refs.at(pfn), host.pins.at(pfn)))


class Wanted(Struct, frozen=True):
    """What is faulted in: guest frames of one slot and one state, none of which is mapped.

    Attributes:
        write: whether the guest writes, which a page fault handler is told.
        trace: notes the first page's references, if anybody asked.
    """

    vm: int
    slot: Slot
    gfns: I64
    private: bool
    write: bool = False
    trace: Trace | None = None

    @property
    def pgoffs(self) -> I64:
        """Return the pages of the slot's file."""
        pgoffs: I64 = self.gfns - self.slot.gfn + self.slot.pgoff
        return pgoffs

    def is_stale(self, core: Core, vm: Vm) -> bool:
        """Return whether the slot or the pages' state have changed, or a page is mapped by now."""
        if vm.slots.get(self.slot.slot) != self.slot or (vm.mirror.get(self.gfns) != 0).any():
            return True
        return bool((is_private(core, vm, self.gfns, self.slot) != self.private).any())

    def is_unchanged(self, core: Core) -> bool:
        """Return whether the VM lives and the fault is not stale."""
        try:
            return not self.is_stale(core, core.vms.alive(self.vm))
        except RmemError:
            return False


class Lookup(Struct, frozen=True):
    """Pages looked up, and what is held until they are mapped: ``taken`` frames, as ``held``."""

    runs: Runs
    private: bool
    sequence: int
    pin: Pin | None
    held: Entry
    taken: I64


def file_of(core: Core, vm: Vm, slot: Slot, gfn: int, private: bool) -> RestrictedFile:
    """Return the file behind a slot.

    Raises:
        Refused: MEMORY_FAULT for a private page in a slot without a restricted file; FILE_GONE.
    """
    if private and not slot.restricted:
        raise MEMORY_FAULT(
            f"gfn {gfn:#x} of {vm.info.label} is private; slot {slot.slot} has no restricted file",
            page=f"gfn {gfn:#x}", state="private", rule="restrictedmem.md §2: MEMORY_FAULT",
        )  # fmt: skip
    if not core.files.exists(slot.file):
        raise FILE_GONE(
            f"the file of slot {slot.slot} of {vm.info.label} was closed",
            page=f"gfn {gfn:#x}", state="file gone", rule="restrictedmem.md §2: get_pfn",
        )  # fmt: skip
    return core.files.get(slot.file)


def is_private(core: Core, vm: Vm, gfns: I64, slot: Slot | None) -> Bools:
    """Return which guest frames are private, by the VM's attributes or, in place, the file's."""
    if not vm.info.in_place:
        private: Bools = vm.attributes.get(gfns) == 1
        return private
    if slot is None or not slot.restricted or not core.files.exists(slot.file):
        return np.zeros(gfns.size, dtype=np.bool_)
    file = core.files.get(slot.file)
    private = file.attributes.get(gfns - slot.gfn + slot.pgoff) == 1
    return private


def unmapped(vm: Vm, gfn: int, npages: int) -> I64:
    """Return the guest frames of a range that the mirror does not map."""
    gfns = pages(gfn, npages)
    pfns, _ = unpack(vm.mirror.get(gfns))
    return gfns[pfns < 0]


def fault(core: Core, wanted: Wanted) -> Steps[int]:
    """Map guest frames; return how often it began again.

    Look-up and installation are one transaction, unless somebody may come between them: a test
    that holds operations, or a fault rule between them. Then they are two, as in KVM.

    Raises:
        RmemError: the look-up or a hook refused; nothing is mapped and nothing is held.
        Stale: while it waited or began again, the slot or the pages' state changed.
    """
    retries = 0
    while True:
        try:
            if (yield from _fault_once(core, wanted)):
                return retries
        except Busy:
            # -EBUSY and -EAGAIN of a vendor make KVM enter the guest again, which faults again
            if retries >= RETRIES_MAX:
                raise
        retries += 1


def _fault_once(core: Core, wanted: Wanted) -> Steps[bool]:
    points = (LOST_RACE, at_step(LOOKED_UP))
    if core.hold is None and not any(core.rules.waits(wanted.vm, point) for point in points):
        yield from userfault.unit(core, lambda: _fault_at_once(core, wanted))
        return True
    return (yield from _fault_in_two(core, wanted))


def _fault_at_once(core: Core, wanted: Wanted) -> Steps[None]:
    yield from ()
    with core.tx("fault") as tx:
        found = _look_up(core, tx, wanted)
        _install(core, tx, wanted.vm, found, wanted.trace)


def _fault_in_two(core: Core, wanted: Wanted) -> Steps[bool]:
    def first() -> Steps[Lookup]:
        yield from ()
        with core.tx("fault: look up") as tx:
            return _look_up(core, tx, wanted)

    def second() -> Steps[bool]:
        yield from ()
        if _lost_race(core, wanted.vm, found):
            return False
        with core.tx("fault: install") as tx:
            _install(core, tx, wanted.vm, found, wanted.trace)
        return True

    found = yield from userfault.unit(core, first)
    yield Step(LOOKED_UP, vm=wanted.vm)
    if core.rules.passage(wanted.vm, LOST_RACE):
        yield from core.unit(lambda: _invalidate(core, wanted.vm, wanted.gfns))
    try:
        installed = yield from core.unit(second)
    except Exception:
        yield from core.unit(lambda: _let_go(core, found, trace=None))
        raise
    if not installed:
        yield from core.unit(lambda: _let_go(core, found, wanted.trace))
    return installed


def _look_up(core: Core, tx: Tx, wanted: Wanted) -> Lookup:
    gfns, private, trace = wanted.gfns, wanted.private, wanted.trace
    vm = core.vms.alive(wanted.vm)
    core.ranges.require_idle("vm", wanted.vm, int(gfns[0]), int(gfns[-1] - gfns[0]) + 1)
    if wanted.is_stale(core, vm):
        raise Stale
    file = file_of(core, vm, wanted.slot, int(gfns[0]), private)
    userfault.require_present(
        core, file, wanted.pgoffs, private, write=wanted.write, vm=wanted.vm,
        shift=wanted.slot.gfn - wanted.slot.pgoff, unchanged=lambda: wanted.is_unchanged(core),
    )  # fmt: skip
    pfns = frames.find(core, tx, file, wanted.pgoffs, private)
    if trace is not None and not trace.steps:
        trace.note(core, "present", int(pfns[0]))
    runs = Runs.of_pages(gfns, pfns)
    consumer = core.consumer(vm)
    pin = None
    if private and consumer.ops.pin is not None:
        pin = consumer.call(tx, "pin", runs)
    if pin is not None and pin.longterm:
        # the long-term pin is itself the look-up's reference (pin_user_pages)
        held = pin_entry(vm, pin.purpose, True)
        # a pin that an earlier unpin could not drop counts once
        taken = pfns[~core.ledger.held(held, pfns)]
        charge_memlock(core, vm, pin, taken.size)
    else:
        held, taken = Entry(vm.info.label, FAULT, False), pfns
    core.ledger.hold(tx, held, taken)
    if private and consumer.ops.prepare is not None:
        consumer.call(tx, "prepare", runs)
    if trace is not None:
        trace.note(core, "lookup", int(pfns[0]))
    return Lookup(runs, private, core.ranges.sequence(wanted.vm), pin, held, taken)


def _lost_race(core: Core, vm_id: int, found: Lookup) -> bool:
    vm = core.vms.alive(vm_id)
    gfns = found.runs.gfns()
    return (
        core.ranges.sequence(vm_id) != found.sequence
        or core.ranges.is_in_progress("vm", vm_id, int(gfns[0]), int(gfns[-1] - gfns[0]) + 1)
        or bool((vm.mirror.get(gfns) != 0).any())
    )


def _install(core: Core, tx: Tx, vm_id: int, found: Lookup, trace: Trace | None) -> None:
    vm = core.vms.alive(vm_id)
    gfns, pfns = found.runs.gfns(), found.runs.pfns()
    consumer = core.consumer(vm)
    longterm = found.pin is not None and found.pin.longterm
    if found.private and consumer.ops.map is not None:
        consumer.call(tx, "map", found.runs)
    vm.install(tx, found.runs, shared=not found.private)
    if found.pin is not None and not longterm:
        core.ledger.hold(tx, pin_entry(vm, found.pin.purpose, False), pfns)
    if trace is not None:
        trace.note(core, "installed", int(pfns[0]))
    if not longterm:
        frames.drop(core, tx, found.held, pfns)
    if trace is not None:
        trace.note(core, "released", int(pfns[0]))
    tx.emit("mapped", vm=vm_id, gfn=int(gfns[0]), npages=gfns.size, private=found.private)


def _let_go(core: Core, found: Lookup, trace: Trace | None) -> Steps[None]:
    yield from ()
    with core.tx("fault: lost race") as tx:
        # a VM that was destroyed meanwhile has let go of everything itself
        held = core.ledger.held(found.held, found.taken)
        frames.drop(core, tx, found.held, found.taken[held])
        if trace is not None:
            trace.note(core, "lost race", int(found.runs.pfn[0]))


def _invalidate(core: Core, vm_id: int, gfns: I64) -> Steps[None]:
    yield from ()
    vm = core.vms.get(vm_id)
    view = View(vm, int(gfns[0]), int(gfns[-1] - gfns[0]) + 1)
    with core.tx("invalidate") as tx, invalidating(core, tx, [view], Why.CONVERT):
        pass


def charge_memlock(core: Core, vm: Vm, pin: Pin, npages: int) -> None:
    """Check that a consumer may lock so many more pages.

    Raises:
        Exhausted: MEMLOCK.
    """
    limit = vm.info.memlock_pages
    if not limit:
        return
    locked = core.ledger.count(pin_entry(vm, pin.purpose, True))
    if locked + npages > limit:
        raise MEMLOCK(
            f"{vm.info.label} has {locked} pages locked of {limit}; {npages} more asked for",
            state=f"{locked} pages locked", rule="pkvm.md §2: locked_vm, RLIMIT_MEMLOCK",
        )  # fmt: skip


def locked_pages(core: Core, vm: Vm) -> int:
    """Return how many pages are charged to the VM's locked memory."""
    entries = [e for e in core.ledger.entries_of(vm.info.label) if e.longterm]
    return sum(core.ledger.count(entry) for entry in entries)


def map_now(core: Core, tx: Tx, vm: Vm, runs: Runs) -> None:
    """Enter private runs that a vendor has mapped already (populate), with its pin."""
    consumer = core.consumer(vm)
    if consumer.ops.pin is not None:
        pin = consumer.call(tx, "pin", runs)
        if pin.longterm:
            charge_memlock(core, vm, pin, runs.total)
        core.ledger.hold(tx, pin_entry(vm, pin.purpose, pin.longterm), runs.pfns())
    vm.install(tx, runs, shared=False)
