"""Guest accesses: the pages that one stretch of an instruction touches.

Owns the path of a guest access: slot, attribute, mapping, the consumer's verdict, bytes. Private
bytes pass through the memory controller under the VM's key and go no further than the comparison;
shared ones through the file's shared memfd.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from msgspec import Struct

from rmemd.engine import userfault
from rmemd.engine.core import Core, kill, private_key
from rmemd.engine.driver import Steps
from rmemd.engine.fault import Stale, is_private
from rmemd.engine.physical import judge_error
from rmemd.engine.populate import ONE_PAGES, fault_in
from rmemd.engine.programme import Instruction, Opcode, make_rows
from rmemd.errors import (
    FILE_GONE,
    HW_POISON,
    INTERRUPTED,
    MEMORY_FAULT,
    NOT_FINALIZED,
    VM_DEAD,
    RmemError,
)
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import AccessAnswer, AccessCode, GuestException, Runs
from rmemd.model.vms import ATTRIBUTE_PRIVATE, READONLY, Slot, Vm, unpack
from rmemd.units import I64, PAGE_SHIFT, PAGE_SIZE, U8, Bools, pages

# pages that one stretch of guest execution touches at most
CHUNK_PAGES = 64
# a page whose verdict stays FAULT after so many faults is a fault of the plugin
FAULTS_MAX = 4
EINTR, EIO, EFAULT, EHWPOISON = 4, 5, 14, 133


class Stop(Struct, frozen=True):
    """An access that makes the vCPU exit; ``exit`` names the exit reason."""

    exit: str
    errno: int = 0
    flags: int = 0
    gpa: int = 0
    size: int = PAGE_SIZE
    text: str = ""
    status: int = 0
    refusal: RmemError | None = None


class Done(Struct, frozen=True):
    """A stretch that was executed, or the exception that the guest took at ``gfn``."""

    nbytes: int = 0
    checked: int = 0
    mismatched: int = 0
    first_mismatch: int = -1
    gfn: int = -1
    exception: GuestException | None = None


class Span(Struct, frozen=True):
    """The bytes of one stretch: ``start`` address, ``size``, and the pages they lie in."""

    start: int
    size: int

    @property
    def gfn(self) -> int:
        """Return the first guest frame."""
        return self.start >> PAGE_SHIFT

    @property
    def npages(self) -> int:
        """Return how many pages the bytes lie in."""
        return ((self.start + self.size - 1) >> PAGE_SHIFT) - self.gfn + 1

    def cut(self, npages: int) -> Span:
        """Return the part in the first ``npages`` pages."""
        end = min(self.start + self.size, (self.gfn + npages) << PAGE_SHIFT)
        return Span(self.start, end - self.start)


def access(
    core: Core, number: int, index: int, instruction: Instruction, done: int
) -> Steps[Done | Stop]:
    """Execute one stretch of an access, ``done`` bytes of which are done already."""
    span = _stretch(instruction.gpa + done, instruction.length - done)
    private = instruction.private
    found = yield from reach(core, number, index, span, private, instruction.opcode is Opcode.WRITE)
    if not isinstance(found, Span):
        return found
    if instruction.opcode is not Opcode.COPY:
        return _perform(core, number, index, instruction, found)
    target = Span(instruction.value + done, found.size)
    # a guest publishes bytes by copying them between its private and its shared memory
    there = yield from reach(core, number, index, target, not private, True)
    if not isinstance(there, Span):
        return there
    if not _is_mapped(core.vms.alive(number), found, private):
        # the source went while the target was fetched: the instruction goes on from there
        return Done()
    size = min(found.size, there.size)
    return _copy(core, number, index, Span(found.start, size), Span(there.start, size), private)


def _is_mapped(vm: Vm, span: Span, private: bool) -> bool:
    pfns, shared = unpack(vm.mirror.get(pages(span.gfn, span.npages)))
    return bool((pfns >= 0).all() and (shared != private).all())


def _stretch(start: int, left: int) -> Span:
    end = ((start >> PAGE_SHIFT) + CHUNK_PAGES) << PAGE_SHIFT
    return Span(start, min(left, end - start))


def reach(
    core: Core, number: int, index: int, span: Span, private: bool, write: bool
) -> Steps[Span | Done | Stop]:
    """Make a prefix of a span reachable: mapped, and the consumer agrees.

    Returns:
        The prefix that can be touched now, or the exception or exit that its first page causes.
    """
    for _ in range(FAULTS_MAX):
        vm = core.vms.alive(number)
        core.ranges.require_idle("vm", number, span.gfn, span.npages)
        slot = vm.slot_at(span.gfn)
        if slot is None:
            return no_slot_stop(vm, span, private)
        span = span.cut(slot.gfn + slot.npages - span.gfn)
        if write and slot.flags & READONLY:
            return Stop("MMIO", gpa=span.start, size=min(span.size, 8))
        stop = attribute_stop(core, vm, slot, span, private)
        if isinstance(stop, Stop):
            return stop
        span = _until_a_wait(core, slot, stop, private)
        try:
            yield from fault_in(core, vm, slot, span.gfn, span.npages, write=write)
        except Stale:
            continue
        except RmemError as refusal:
            if span.npages > 1 and is_one_pages(refusal):
                span = span.cut(1)
                continue
            return fault_stop(span, private, refusal)
        judge = partial(_judge, core, number, index, span, private, write)
        answer = yield from core.unit(judge)
        if isinstance(answer, (Stop, Done)):
            return answer
        if answer > 0:
            return span.cut(answer)
    return Stop("INTERNAL_ERROR", text=f"gfn {span.gfn:#x} faults again and again", gpa=span.start)


def is_one_pages(refusal: RmemError) -> bool:
    """Return whether a fault may be refused for one of its pages: those before it are there.

    KVM faults page by page, and the exit names the page that is refused.
    """
    return refusal.reason.kind in ONE_PAGES


def _until_a_wait(core: Core, slot: Slot, span: Span, private: bool) -> Span:
    """Return the prefix that needs no page fault handler, or the one that waits for it."""
    if not core.userfaults or not core.files.exists(slot.file):
        return span
    pgoffs = pages(span.gfn - slot.gfn + slot.pgoff, span.npages)
    return span.cut(userfault.alike(core, core.files.get(slot.file), pgoffs, private))


def attribute_stop(core: Core, vm: Vm, slot: Slot, span: Span, private: bool) -> Span | Stop:
    """Return the prefix whose attribute is what the guest addressed, or the MEMORY_FAULT."""
    states = is_private(core, vm, pages(span.gfn, span.npages), slot)
    wrong = np.flatnonzero(states != private)
    if wrong.size and wrong[0] == 0:
        refusal = MEMORY_FAULT(
            f"gfn {span.gfn:#x} of {vm.info.label} is {'shared' if private else 'private'}, "
            f"the guest addressed it as {'private' if private else 'shared'}",
            page=f"gfn {span.gfn:#x}", state="shared" if private else "private",
            rule="restrictedmem.md §2: KVM_EXIT_MEMORY_FAULT",
        )  # fmt: skip
        return _memory_fault(span, private, refusal)
    return span.cut(int(wrong[0])) if wrong.size else span


def no_slot_stop(vm: Vm, span: Span, private: bool) -> Stop:
    """Say what an access without a slot is: MMIO if it is shared (kvm_handle_noslot_fault)."""
    if not private:
        return Stop("MMIO", gpa=span.start, size=min(span.size, 8))
    refusal = MEMORY_FAULT(
        f"gfn {span.gfn:#x} of {vm.info.label} was addressed as private; no slot covers it",
        page=f"gfn {span.gfn:#x}", state="no slot", rule="Linux kvm_handle_noslot_fault",
    )  # fmt: skip
    return _memory_fault(span, private, refusal)


def _memory_fault(span: Span, private: bool, refusal: RmemError) -> Stop:
    flags = ATTRIBUTE_PRIVATE if private else 0
    return Stop("MEMORY_FAULT", EFAULT, flags, span.gfn << PAGE_SHIFT, refusal=refusal)


def fault_stop(span: Span, private: bool, refusal: RmemError) -> Stop:
    """Say a refused fault as KVM_RUN would."""
    if refusal.reason in (MEMORY_FAULT, FILE_GONE):
        return _memory_fault(span, private, refusal)
    if refusal.reason is HW_POISON:
        flags = ATTRIBUTE_PRIVATE if private else 0
        gpa = span.gfn << PAGE_SHIFT
        return Stop("MEMORY_FAULT", EHWPOISON, flags, gpa, refusal=refusal)
    if refusal.reason in (VM_DEAD, NOT_FINALIZED):
        raise refusal
    if refusal.reason is INTERRUPTED:
        return Stop("INTR", EINTR, gpa=span.start, refusal=refusal)
    return Stop("INTERNAL_ERROR", refusal.errno, 0, span.start, text=str(refusal), refusal=refusal)


def _judge(
    core: Core, number: int, index: int, span: Span, private: bool, write: bool
) -> Steps[int | Done | Stop]:
    """Ask the consumer; return how many pages from the front may be touched."""
    yield from ()
    vm = core.vms.alive(number)
    with core.tx("guest") as tx:
        core.enter(tx, vm, index)
        gfns = pages(span.gfn, span.npages)
        pfns, _ = unpack(vm.mirror.get(gfns))
        if (pfns < 0).any():
            # unmapped again while the verdict waited: fault it in once more
            return 0
        consumer = core.consumer(vm)
        if not private or consumer.ops.guest_access is None:
            return span.npages
        answer: AccessAnswer = consumer.call(
            tx, "guest_access", index, Runs.of_pages(gfns, pfns), write
        )
        bad = np.flatnonzero(answer.codes != AccessCode.OK)
        if not bad.size:
            return span.npages
        at = int(bad[0])
        if at > 0:
            return at
        return _verdict(core, tx, vm, gfns, pfns, answer)


def _verdict(
    core: Core, tx: Tx, vm: Vm, gfns: I64, pfns: I64, answer: AccessAnswer
) -> int | Done | Stop:
    code, gfn = AccessCode(int(answer.codes[0])), int(gfns[0])
    if code is AccessCode.EXCEPTION:
        return Done(gfn=gfn, exception=answer.exception)
    if code is AccessCode.STOP:
        kill(core, tx, vm, answer.stop)
        return Stop("SHUTDOWN", EIO, gpa=gfn << PAGE_SHIFT, text=answer.stop, status=answer.status)
    if code is AccessCode.EFAULT:
        return Stop("NONE", EFAULT, gpa=gfn << PAGE_SHIFT, text=answer.stop, status=answer.status)
    # the vendor has no such entry: the mirror's is stale, and the page is faulted in again
    stale = gfns[: int(np.argmax(np.append(answer.codes != AccessCode.FAULT, True)))]
    vm.clear(tx, Runs.of_pages(stale, pfns[: stale.size]))
    return 0


# --- bytes -----------------------------------------------------------------------------------
def _perform(
    core: Core, number: int, index: int, instruction: Instruction, span: Span
) -> Done | Stop:
    vm = core.vms.alive(number)
    gfns = pages(span.gfn, span.npages)
    if instruction.opcode is Opcode.WRITE:
        rows = make_rows(instruction.pattern, instruction.value, gfns)
        lost = store(core, vm, span, rows, instruction.private)
        return lost or Done(span.size)
    found = load(core, vm, span, instruction.private)
    if isinstance(found, Stop):
        return found
    if instruction.opcode is Opcode.TOUCH:
        return Done(span.size)
    wanted = make_rows(instruction.pattern, instruction.value, gfns)
    differs = found != wanted
    lo, hi = span.start & (PAGE_SIZE - 1), (span.start + span.size - 1) % PAGE_SIZE + 1
    differs[0, :lo] = False
    differs[-1, hi:] = False
    pages_differ: Bools = differs.any(axis=1)
    if core.tracer is not None and instruction.private:
        pfns, _ = unpack(vm.mirror.get(gfns))
        pages_differ = core.tracer.compared(number, gfns, pfns, pages_differ)
    wrong = np.flatnonzero(pages_differ)
    first = int(gfns[wrong[0]]) if wrong.size else -1
    return Done(span.size, gfns.size, int(wrong.size), first)


def _copy(
    core: Core, number: int, index: int, source: Span, target: Span, private: bool
) -> Done | Stop:
    vm = core.vms.alive(number)
    rows = load(core, vm, source, private)
    if isinstance(rows, Stop):
        return rows
    return store(core, vm, target, rows, not private) or Done(source.size)


def load(core: Core, vm: Vm, span: Span, private: bool) -> U8 | Stop:
    """Read the span's whole pages as the guest: uint8, shape (npages, 4096)."""
    gfns = pages(span.gfn, span.npages)
    if not private:
        slot = vm.slot_at(span.gfn)
        assert slot is not None
        file = core.files.get(slot.file)
        return core.shared_memory(file).read(gfns - slot.gfn + slot.pgoff)
    pfns, _ = unpack(vm.mirror.get(gfns))
    rows, failed = core.controller.read(pfns, private_key(core, vm))
    if failed.any():
        return _poison_consumed(core, vm, gfns[failed], pfns[failed])
    return rows


def store(core: Core, vm: Vm, span: Span, rows: U8, private: bool) -> Stop | None:
    """Write the span's bytes as the guest; ``rows`` are whole pages, of which the span counts."""
    gfns = pages(span.gfn, span.npages)
    lo, hi = span.start & (PAGE_SIZE - 1), (span.start + span.size - 1) % PAGE_SIZE + 1
    if not private:
        slot = vm.slot_at(span.gfn)
        assert slot is not None
        file = core.files.get(slot.file)
        offset = ((span.gfn - slot.gfn + slot.pgoff) << PAGE_SHIFT) + lo
        core.shared_memory(file).write_bytes(offset, rows.tobytes()[lo : lo + span.size])
        return None
    pfns, _ = unpack(vm.mirror.get(gfns))
    key = private_key(core, vm)
    for row, keep in ((0, slice(0, lo)), (-1, slice(hi, PAGE_SIZE))):
        if keep.start != keep.stop:
            old, failed = core.controller.read(pfns[[row]], key)
            if failed.any():
                return _poison_consumed(core, vm, gfns[[row]], pfns[[row]])
            rows[row, keep] = old[0, keep]
    contents, raw = core.controller.write_plan(pfns, rows, key)
    with core.tx("guest write") as tx:
        before = core.write_in_place(tx, contents, raw)
    core.store_in_place(contents, raw, before)
    return None


def _poison_consumed(core: Core, vm: Vm, gfns: I64, pfns: I64) -> Stop:
    """The guest read what fails its integrity check: sticky, and the vendor says what is lost."""
    with core.tx("integrity failure") as tx:
        core.controller.taint(tx, pfns)
        lost = judge_error(core, tx, vm, Runs.of_pages(gfns, pfns), consumed=True)
    gpa = int(gfns[0]) << PAGE_SHIFT
    if lost:
        return Stop("SHUTDOWN", EIO, gpa=gpa, text=lost)
    refusal = HW_POISON(
        f"gfn {int(gfns[0]):#x} failed its integrity check", page=f"gfn {int(gfns[0]):#x}"
    )
    return Stop("MEMORY_FAULT", EHWPOISON, ATTRIBUTE_PRIVATE, gpa, refusal=refusal)
