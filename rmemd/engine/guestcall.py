"""Guest calls: accept, validate, share and the like, put to the vendor.

Owns what the engine does with each answer: fault pages in and ask again, exit to the VMM, convert
in place, or hand the status to the guest.
"""

from __future__ import annotations

from functools import partial

from msgspec import Struct

from rmemd.engine.convert import convert_by_guest, discard
from rmemd.engine.core import Core
from rmemd.engine.driver import Steps
from rmemd.engine.fault import Stale
from rmemd.engine.guestmemory import (
    CHUNK_PAGES,
    FAULTS_MAX,
    Span,
    Stop,
    attribute_stop,
    fault_stop,
    is_one_pages,
    no_slot_stop,
)
from rmemd.engine.populate import fault_in
from rmemd.engine.programme import CALLS, Instruction, Opcode
from rmemd.errors import Busy, RmemError
from rmemd.hooks.types import CallAction, CallAnswer, GuestCall, GuestException
from rmemd.units import PAGE_SHIFT, PAGE_SIZE, PMD_PAGES, bytes_to_pages, pages

# calls about memory that is private when they are made; UNSHARE is about shared memory
ABOUT_PRIVATE = (GuestCall.ACCEPT, GuestCall.VALIDATE, GuestCall.RESCIND, GuestCall.RELINQUISH)
UNKNOWN_CALL = (1 << 64) - 1
# what a guest does about the exception of a page that it has not accepted
HANDLERS = {"#VE": Opcode.ACCEPT, "#VC": Opcode.VALIDATE}


class Called(Struct, frozen=True):
    """How far a call came: ``finished`` means that the guest has its status."""

    done: int = 0
    finished: bool = False
    status: int = 0
    status_name: str = ""
    hypercall: bool = False
    to_private: bool = False


def make_call(
    core: Core, number: int, index: int, instruction: Instruction, done: int
) -> Steps[Called | Stop]:
    """Make one stretch of a guest call, ``done`` pages of which are done already."""
    call = CALLS[instruction.opcode]
    gfn = (instruction.gpa >> PAGE_SHIFT) + done
    left = bytes_to_pages(instruction.length) - done
    # a 2M call is about a whole 2 MiB page, which must not be cut
    stretch = PMD_PAGES if instruction.level else CHUNK_PAGES
    span = Span(gfn << PAGE_SHIFT, min(left, stretch) << PAGE_SHIFT)
    for _ in range(FAULTS_MAX):
        try:
            answer = yield from core.unit(
                lambda: _ask(core, number, index, call, span, instruction)
            )
        except _Declined as declined:
            refused = declined.answer
            return Called(0, True, refused.refused, refused.refused_name)
        if not isinstance(answer, CallAnswer):
            return answer
        if answer.action is CallAction.FAULT:
            stop = yield from _fault(core, number, span, answer.done, call)
            if stop is not None:
                return stop
            if answer.done:
                return _called(answer)
            continue
        if answer.action is CallAction.EXCEPTION and answer.exception is not None:
            taken = answer.exception
            text = f"{taken.vector} {taken.code:#x}: {taken.text} ({call.value}), unhandled"
            return Stop("SHUTDOWN", gpa=span.start, text=text)
        return _called(answer)
    return Stop("INTERNAL_ERROR", text=f"{call.value} of gfn {gfn:#x} faults again and again")


def _ask(
    core: Core, number: int, index: int, call: GuestCall, span: Span, instruction: Instruction
) -> Steps[CallAnswer | Called | Stop]:
    yield from ()
    vm = core.vms.alive(number)
    core.ranges.require_idle("vm", number, span.gfn, span.npages)
    slot = vm.slot_at(span.gfn)
    if slot is None:
        return no_slot_stop(vm, span, call in ABOUT_PRIVATE)
    if not instruction.level:
        span = span.cut(slot.gfn + slot.npages - span.gfn)
    if call in ABOUT_PRIVATE:
        stop = attribute_stop(core, vm, slot, span, private=True)
        if isinstance(stop, Stop):
            return stop
    consumer = core.consumer(vm)
    with core.tx("guest call") as tx:
        core.enter(tx, vm, index)
        if consumer.ops.guest_call is None:
            return Called(span.npages, True, UNKNOWN_CALL, "unknown call")
        answer: CallAnswer = consumer.call(
            tx, "guest_call", index, call, pages(span.gfn, span.npages), instruction.level
        )
        converted = None
        if answer.action is CallAction.CONVERT:
            try:
                converted = yield from convert_by_guest(
                    core, tx, slot, span.gfn, answer.done, answer.to_private
                )
            except Busy as busy:
                raise _Declined(answer) from busy
    if converted is not None:
        start = span.gfn - slot.gfn + slot.pgoff
        yield from core.destroy(
            partial(discard, core, slot.file, start, answer.done, answer.to_private, converted)
        )
    return answer


def take_exception(
    core: Core, number: int, index: int, gfn: int, taken: GuestException
) -> Steps[Stop | None]:
    """Have the guest handle an exception that a page gave it: by accepting the page, or not at all.

    Returns:
        ``None`` when the access can be made again, else how the guest is lost.
    """
    opcode = HANDLERS.get(taken.vector)
    if opcode is None or not core.vms.get(number).vcpu(index).lazy_accept:
        text = f"{taken.vector} {taken.code:#x}: {taken.text} (gfn {gfn:#x}), unhandled"
        return Stop("SHUTDOWN", gpa=gfn << PAGE_SHIFT, text=text)
    accept = Instruction(opcode, gfn << PAGE_SHIFT, PAGE_SIZE)
    result = yield from make_call(core, number, index, accept, 0)
    if isinstance(result, Stop):
        return result
    if result.finished and result.done == 0:
        text = f"{taken.vector} handler: {opcode.name} gave {result.status_name}"
        return Stop("SHUTDOWN", gpa=gfn << PAGE_SHIFT, text=text)
    return None


class _Declined(Exception):
    """The conversion that a call asked for was declined, and the call is undone."""

    def __init__(self, answer: CallAnswer) -> None:
        super().__init__(answer)
        self.answer = answer


def _fault(core: Core, number: int, span: Span, done: int, call: GuestCall) -> Steps[Stop | None]:
    vm = core.vms.alive(number)
    slot = vm.slot_at(span.gfn + done)
    if slot is None:
        rest = Span((span.gfn + done) << PAGE_SHIFT, (span.npages - done) << PAGE_SHIFT)
        return no_slot_stop(vm, rest, call in ABOUT_PRIVATE)
    npages = min(span.npages, slot.gfn + slot.npages - span.gfn) - done
    first = Span((span.gfn + done) << PAGE_SHIFT, PAGE_SIZE)
    try:
        try:
            yield from fault_in(core, vm, slot, first.gfn, npages)
        except RmemError as refusal:
            if npages == 1 or not is_one_pages(refusal):
                raise
            yield from fault_in(core, vm, slot, first.gfn, 1)
    except Stale:
        return None
    except RmemError as refusal:
        return fault_stop(first, call in ABOUT_PRIVATE, refusal)
    return None


def _called(answer: CallAnswer) -> Called:
    if answer.action is CallAction.HYPERCALL:
        return Called(hypercall=True, to_private=answer.to_private)
    # a status other than success ends the call where it stands
    ended = answer.action is CallAction.DONE and answer.status != 0
    return Called(answer.done, ended, answer.status, answer.status_name)
