"""Small reads and writes of guest memory by a process that plays the guest.

Owns the access of up to 64 KiB on behalf of a vCPU that runs nothing at that moment. It goes the
way of a guest access (``engine.guestmemory``): slot, attribute, fault, the consumer's verdict,
bytes under the VM's key. What would make the vCPU exit is a refusal here. The plaintext is for the
guest role only; who calls is checked where calls come in.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.guestcall import take_exception
from rmemd.engine.guestmemory import EIO, FAULTS_MAX, Done, Span, Stop, load, reach, store
from rmemd.engine.vcpu import enter, leave, on_vcpu
from rmemd.errors import (
    BAD_RANGE,
    GUEST_EXCEPTION,
    MEMORY_FAULT,
    MESSAGE_TOO_BIG,
    NO_MEMSLOT,
    PLUGIN_NONSENSE,
    READONLY_SLOT,
    VM_DEAD,
    RmemError,
)
from rmemd.model.vms import Vm
from rmemd.units import MAX_GFN, PAGE_SHIFT, PAGE_SIZE

BYTES_MAX = 1 << 16
KVM_RUN = "Linux Documentation/virt/kvm/api.rst, KVM_RUN"


def read(core: Core, number: int, index: int, gpa: int, length: int, private: bool) -> Steps[bytes]:
    """Read bytes as the guest does. ALL.

    Raises:
        InvalidArgument: BAD_RANGE.
        Exhausted: MESSAGE_TOO_BIG; more than 64 KiB.
        Busy: VCPU_BUSY.
        RmemError: what a vCPU would exit for, with its errno: MEMORY_FAULT, HW_POISON, NO_MEMSLOT,
            GUEST_EXCEPTION, VM_DEAD, INTERRUPTED.
    """
    whole = _whole(gpa, length)
    found: list[bytes] = []

    def take(vm: Vm, span: Span) -> Stop | None:
        rows = load(core, vm, span, private)
        if isinstance(rows, Stop):
            return rows
        lo = span.start % PAGE_SIZE
        found.append(rows.tobytes()[lo : lo + span.size])
        return None

    yield from _as_guest(core, number, index, whole, private, False, take)
    return b"".join(found)


def write(core: Core, number: int, index: int, gpa: int, data: bytes, private: bool) -> Steps[None]:
    """Write bytes as the guest does. PREFIX: up to a page boundary.

    Raises:
        RmemError: as for ``read``, and READONLY_SLOT; ``progress_pages`` says in how many of the
            pages that the range lies in the bytes were written.
    """
    whole, written = _whole(gpa, len(data)), 0

    def put(vm: Vm, span: Span) -> Stop | None:
        nonlocal written
        rows = np.zeros((span.npages, PAGE_SIZE), dtype=np.uint8)
        lo, at = span.start % PAGE_SIZE, span.start - gpa
        part = np.frombuffer(data, dtype=np.uint8, count=span.size, offset=at)
        rows.reshape(-1)[lo : lo + span.size] = part
        stop = store(core, vm, span, rows, private)
        written += span.size if stop is None else 0
        return stop

    try:
        yield from _as_guest(core, number, index, whole, private, True, put)
    except RmemError as refusal:
        # what stopped it is at a page's start, save for the first
        progress = Span(gpa, written).npages if written else 0
        raise refusal.with_details(progress_pages=progress) from refusal


def _whole(gpa: int, length: int) -> Span:
    if length > BYTES_MAX:
        raise MESSAGE_TOO_BIG(
            f"{length} bytes; one access is at most {BYTES_MAX}", field="length_bytes"
        )
    if length <= 0 or not 0 <= gpa <= MAX_GFN * PAGE_SIZE - length:
        raise BAD_RANGE(f"{gpa:#x}+{length:#x} is no range", field="gpa")
    return Span(gpa, length)


def _as_guest(
    core: Core, number: int, index: int, whole: Span, private: bool, is_write: bool,
    touch: Callable[[Vm, Span], Stop | None],
) -> Steps[None]:  # fmt: skip
    def running() -> Steps[None]:
        # the vendor may refuse the entry, before anything is faulted in
        yield from core.unit(lambda: enter(core, number, index))
        stop = yield from _stretches(core, number, index, whole, private, is_write, touch)
        if stop is not None:
            raise _refusal(core, number, stop, private)
        yield from core.unit(lambda: leave(core, number, index))

    yield from on_vcpu(core, number, index, running)


def _stretches(
    core: Core, number: int, index: int, whole: Span, private: bool, is_write: bool,
    touch: Callable[[Vm, Span], Stop | None],
) -> Steps[Stop | None]:  # fmt: skip
    """Access one stretch after the other; return what stopped it."""
    done, exceptions = 0, 0

    def one() -> Steps[tuple[Span | Done | Stop, Stop | None]]:
        rest = Span(whole.start + done, whole.size - done)
        found = yield from reach(core, number, index, rest, private, is_write)
        # the lock was not let go since the verdict
        stop = touch(core.vms.alive(number), found) if isinstance(found, Span) else None
        return found, stop

    while done < whole.size:
        found, stop = yield from core.unit(one)
        if isinstance(found, Span):
            done += found.size if stop is None else 0
        elif isinstance(found, Stop):
            stop = found
        else:
            exceptions += 1
            stop = yield from _handle(core, number, index, found, exceptions, whole.npages)
        if stop is not None:
            return stop
        yield Step("guest", vm=number)
    return None


def _handle(
    core: Core, number: int, index: int, taken: Done, count: int, npages: int
) -> Steps[Stop | None]:
    assert taken.exception is not None
    if count > npages * FAULTS_MAX:
        text = f"gfn {taken.gfn:#x} gives {taken.exception.vector} again and again"
        return Stop("INTERNAL_ERROR", gpa=taken.gfn << PAGE_SHIFT, text=text)
    return (yield from take_exception(core, number, index, taken.gfn, taken.exception))


def _refusal(core: Core, number: int, stop: Stop, private: bool) -> RmemError:
    """Say an exit as a refusal: the same errno, page and words."""
    if stop.refusal is not None:
        return stop.refusal
    page = f"gfn {stop.gpa >> PAGE_SHIFT:#x}"
    if stop.exit == "SHUTDOWN" and stop.errno == EIO:
        return VM_DEAD(
            stop.text, page=page, state="dead", vendor_status=stop.text, vendor_value=stop.status
        )
    if stop.exit == "SHUTDOWN":
        return GUEST_EXCEPTION(stop.text, page=page, vendor_status=stop.text)
    if stop.exit == "MMIO":
        return _mmio(core, number, stop, page)
    if stop.exit == "NONE":
        state = "private" if private else "shared"
        return MEMORY_FAULT(stop.text, errno=stop.errno, page=page, state=state, rule=KVM_RUN)
    return PLUGIN_NONSENSE(stop.text, page=page)


def _mmio(core: Core, number: int, stop: Stop, page: str) -> RmemError:
    vm = core.vms.alive(number)
    slot = vm.slot_at(stop.gpa >> PAGE_SHIFT)
    if slot is None:
        return NO_MEMSLOT(
            f"no slot of {vm.info.label} covers {page}", page=page, state="no slot", rule=KVM_RUN
        )
    return READONLY_SLOT(
        f"slot {slot.slot} of {vm.info.label} is read-only", page=page, state="read-only",
        rule=KVM_RUN,
    )  # fmt: skip
