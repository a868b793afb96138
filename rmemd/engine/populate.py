"""Launch: initial pages in, measurement closed; and faults asked for in advance.

Owns populate and finalize as KVM drives them (a private range of a restricted slot, before the VM
is finalized, a prefix kept on refusal) and KVM_PRE_FAULT_MEMORY.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from rmemd.engine import frames
from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.fault import Stale, Trace, Wanted, fault, file_of, is_private, map_now, unmapped
from rmemd.errors import (
    BAD_RANGE,
    BAD_REQUEST,
    NO_MEMSLOT,
    NOT_PAGE_ALIGNED,
    NOT_PAUSED,
    NOT_PRIVATE,
    OP_NOT_IMPLEMENTED_BY_CONSUMER,
    PRE_FAULT_TOO_EARLY,
    Kind,
    RmemError,
)
from rmemd.hooks.types import PageKind, Populated, Runs
from rmemd.model.vms import Slot, Vm
from rmemd.units import MAX_GFN, PAGE_SIZE, Bools, bytes_to_pages, is_page_aligned, pages

# pages of initial memory in one transaction, and of a fault, which carries no bytes
BATCH_PAGES = 512
FAULT_PAGES = 2048
# what a page is refused for by itself, so that those before it are done
ONE_PAGES = (Kind.POISON, Kind.EXHAUSTED)


class PreFaulted(Struct):
    """How far a pre-fault came."""

    done_pages: int
    left_bytes: int
    retries: int
    trace: Trace


def populate(
    core: Core, number: int, gpa: int, source: bytes, kind: int, measure: bool
) -> Steps[int]:
    """Take initial private pages in; return how many.

    Raises:
        RmemError: with ``progress_pages``, the pages before it stay.
    """
    vm = core.vms.alive(number)
    if not is_page_aligned(gpa) or not is_page_aligned(len(source)):
        raise NOT_PAGE_ALIGNED(f"{gpa:#x}+{len(source):#x}", field="gpa")
    if not source or gpa + len(source) > MAX_GFN * PAGE_SIZE:
        raise BAD_RANGE(f"{gpa:#x}+{len(source):#x} is empty or wraps", field="source")
    if kind not in set(PageKind):
        raise BAD_REQUEST(f"no page kind {kind}", field="kind")
    if core.consumer(vm).ops.populate is None:
        raise OP_NOT_IMPLEMENTED_BY_CONSUMER(
            f"{vm.info.consumer} has no populate: write the image to shared memory and convert it",
            rule="DESIGN §5: the ops table",
        )
    rows = np.frombuffer(source, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    done, size = core.got_before(), BATCH_PAGES

    def one() -> Steps[int]:
        batch = rows[done : done + size]
        return (yield from _populate_batch(core, number, first + done, batch, kind, measure))

    first = gpa // PAGE_SIZE
    while done < rows.shape[0]:
        size = min(size, rows.shape[0] - done)
        try:
            done += yield from core.unit(one)
        except RmemError as refusal:
            if size == 1 or refusal.reason.kind not in ONE_PAGES:
                raise refusal.with_details(progress_pages=done) from refusal
            # one page of them is refused: those before it are taken all the same
            size //= 2
        else:
            core.got_to(done)
    return done


def _populate_batch(
    core: Core, number: int, gfn: int, rows: np.ndarray, kind: int, measure: bool
) -> Steps[int]:
    vm = core.vms.alive(number)
    if vm.info.state != "building":
        raise NOT_PAUSED(f"{vm.info.label} is finalized", state=vm.info.state)
    if vm.slot_at(gfn) is None:
        raise NOT_PRIVATE(
            f"no slot of {vm.info.label} covers gfn {gfn:#x}", field="gpa",
            page=f"gfn {gfn:#x}", state="no slot", rule="restrictedmem.md §2: populate",
        )  # fmt: skip
    slot, n = slot_range(vm, gfn, rows.shape[0])
    gfns = pages(gfn, n)
    private = is_private(core, vm, gfns, slot)
    if not private.all() or not slot.restricted:
        at = int(gfns[np.argmin(private)]) if not private.all() else gfn
        raise NOT_PRIVATE(
            f"gfn {at:#x} of {vm.info.label} is not private memory", field="gpa",
            page=f"gfn {at:#x}", state="shared", rule="restrictedmem.md §2: populate",
        )  # fmt: skip
    file = file_of(core, vm, slot, gfn, private=True)
    core.ranges.require_idle("vm", number, gfn, n)
    with core.tx("populate") as tx:
        pfns = frames.find(core, tx, file, gfns - slot.gfn + slot.pgoff, private=True)
        runs = Runs.of_pages(gfns, pfns)
        kinds = np.full(n, kind, dtype=np.uint8)
        answer: Populated = core.consumer(vm).call(
            tx, "populate", runs, kinds, measure, np.ascontiguousarray(rows[:n])
        )
        if answer.mapped:
            map_now(core, tx, vm, runs)
        with core.ranges.in_progress("vm", number, gfn, n):
            yield Step("populate", tx=tx, vm=number)
        tx.emit("populated", vm=number, gfn=gfn, npages=n)
    return n


def slot_range(vm: Vm, gfn: int, npages: int) -> tuple[Slot, int]:
    """Return the slot at a guest frame and how many of ``npages`` it covers.

    Raises:
        NotFound: NO_MEMSLOT.
    """
    slot = vm.slot_at(gfn)
    if slot is None:
        raise NO_MEMSLOT(
            f"no slot of {vm.info.label} covers gfn {gfn:#x}", page=f"gfn {gfn:#x}",
            state="no slot", field="gpa",
        )  # fmt: skip
    return slot, min(npages, slot.gfn + slot.npages - gfn)


def finalize(core: Core, number: int) -> Steps[bytes]:
    """Close the measurement; the VM may run from then on."""

    def one() -> Steps[bytes]:
        yield from ()
        vm = core.vms.alive(number)
        consumer = core.consumer(vm)
        if consumer.ops.finalize is None:
            raise OP_NOT_IMPLEMENTED_BY_CONSUMER(
                f"{vm.info.consumer} has no finalize: its VMs are not measured, and run without",
                rule="DESIGN §5: the ops table",
            )
        with core.tx("finalize") as tx:
            measurement: bytes = consumer.call(tx, "finalize")
            core.vms.update(tx, vm, state="finalized", measurement=measurement)
            tx.emit("finalized", vm=number, measurement=measurement.hex())
        return measurement

    return (yield from core.unit(one))


def pre_fault(core: Core, number: int, gpa: int, size: int, traced: bool) -> Steps[PreFaulted]:
    """Fault a guest range in; what stops it is raised only if nothing was done before, as in KVM.

    A caller goes on with what is left, and then meets the refusal.
    """
    vm = core.vms.alive(number)
    if not is_page_aligned(gpa) or not is_page_aligned(size):
        raise NOT_PAGE_ALIGNED(f"{gpa:#x}+{size:#x}", field="gpa")
    if size <= 0 or gpa + size > MAX_GFN * PAGE_SIZE:
        raise BAD_RANGE(f"{gpa:#x}+{size:#x} is empty or wraps", field="size_bytes")
    if core.consumer(vm).ops.finalize is not None and vm.info.state == "building":
        raise PRE_FAULT_TOO_EARLY(
            f"{vm.info.label} is not finalized", state="building", rule="snp.md §4, tdx.md §4"
        )
    result = PreFaulted(0, size, 0, Trace())
    first, npages = gpa // PAGE_SIZE, bytes_to_pages(size)
    batch = FAULT_PAGES
    while result.done_pages < npages:
        at = first + result.done_pages
        n = min(batch, npages - result.done_pages)
        try:
            slot, n = slot_range(vm, at, n)
            # pages of one state at a time, so that what is done is a prefix
            n = _alike(is_private(core, vm, pages(at, n), slot))
            result.retries += yield from fault_in(
                core, vm, slot, at, n, result.trace if traced else None
            )
        except Stale:
            result.retries += 1
            continue
        except RmemError:
            if n > 1:
                # one page of them is refused: those before it are done all the same
                batch = n // 2
                continue
            if not result.done_pages:
                raise
            return result
        result.done_pages += n
        result.left_bytes = size - result.done_pages * PAGE_SIZE
        vm = core.vms.alive(number)
    return result


def _alike(states: Bools) -> int:
    """Count the entries at the front that are equal."""
    return int(np.argmax(np.append(states != states[0], True)))


def fault_in(
    core: Core,
    vm: Vm,
    slot: Slot,
    gfn: int,
    npages: int,
    trace: Trace | None = None,
    write: bool = False,
) -> Steps[int]:
    """Map what is not mapped of a range inside one slot; return the retries it took."""
    missing = unmapped(vm, gfn, npages)
    private = is_private(core, vm, missing, slot)
    retries = 0
    for state in (True, False):
        gfns = missing[private == state]
        if gfns.size:
            wanted = Wanted(vm.info.vm, slot, gfns, state, write, trace)
            retries += yield from fault(core, wanted)
    return retries
