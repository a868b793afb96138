"""Page faults that a handler resolves, in place of the kernel's userfaultfd.

Rules of Linux (fs/userfaultfd.c, mm/userfaultfd.c, ioctl_userfaultfd(2)) are named where a test is
about one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from errno import EBUSY, EEXIST, EINTR, EINVAL, EIO, ENOENT
from typing import Any

import numpy as np
import pytest
from handlers import Handler, calls, result
from helpers import Guest, MakeEngine, check, file_of, halted, make_guest, refusal, touch, write

from rmemd.engine import memory, userfaultops
from rmemd.engine.cancel import Cancelled
from rmemd.engine.core import kill
from rmemd.engine.driver import Steps
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check as violations
from rmemd.engine.pendingfaults import FAULT, REMOVED, Message, Missing
from rmemd.engine.vcpu import Exit
from rmemd.errors import (
    BAD_RANGE,
    FILE_GONE,
    INTERRUPTED,
    NO_SUCH_FILE,
    NO_SUCH_USERFAULT,
    NO_SUCH_VM,
    NOT_PAGE_ALIGNED,
    PAGE_PRESENT,
    PRIVATE_CONTENT,
    USERFAULT_TAKEN,
    VM_DEAD,
    VM_IN_USE,
    RmemError,
)
from rmemd.model.files import FLAG_INIT_SHARED, FLAG_MMAP
from rmemd.model.userfaults import Userfaults
from rmemd.store.memfd import Memfd
from rmemd.units import PAGE_SIZE

NPAGES = 32


@pytest.fixture
def guest(engine: Engine) -> Iterator[Guest]:
    """A guest with private and shared memory of its own; its first half is private."""
    made = make_guest(engine, "sw-protected", NPAGES, in_place=False)
    engine.set_attributes(made.vm, [(made.gpa + made.size // 2, made.size // 2, 0)])
    yield made
    assert violations(engine.core) == []
    assert engine.core.pending_faults.waiting == []
    assert engine.core.pending_faults._told == {}


@pytest.fixture
def handler(guest: Guest) -> Handler:
    """The handler of all of the guest's memory."""
    made = Handler(guest.engine)
    made.register(guest.file, 0, NPAGES)
    return made


SHARED = NPAGES // 2


def _at(guest: Guest, pgoff: int) -> int:
    return guest.gpa + pgoff * PAGE_SIZE


def _shared(guest: Guest, handler: Handler, n: int = 1) -> tuple[Any, int]:
    """Return a call of the guest that touches shared pages, and their first pgoff."""
    return lambda: guest.run(check(_at(guest, SHARED), n * PAGE_SIZE, 0x5A, private=False)), SHARED


# --- resolved --------------------------------------------------------------------------------
def test_a_vcpu_waits_and_reads_what_the_handler_copies(guest: Guest, handler: Handler) -> None:
    """handle_userfault: told once, the thread sleeps; UFFDIO_COPY fills the page and wakes it."""
    run, pgoff = _shared(guest, handler)
    with calls(guest.engine) as call:
        running = call(run)
        told = handler.one()
        assert violations(guest.engine.core) == []
        assert guest.engine.pending_userfaults(handler.session) == [told]
        assert guest.engine.take_userfaults(handler.session) == []
        assert not running.done()
        data = b"\x5a" * PAGE_SIZE
        copied = guest.engine.userfault_copy(guest.file, pgoff, data, handler.session)
        exited = halted(result(running))
    assert copied == 1
    assert exited.vcpu.checked == 1
    assert exited.vcpu.mismatched == 0
    gfn = _at(guest, pgoff) // PAGE_SIZE
    assert told == Message(
        FAULT, told.userfault, guest.file, pgoff, 1, private=False, write=False, vm=guest.vm,
        gfn=gfn,
    )  # fmt: skip


def test_a_private_fault_is_continued_on_an_empty_page(guest: Guest, handler: Handler) -> None:
    """UFFDIO_CONTINUE: the page is in the file, and the fault goes on; it is the guest's."""
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 3), 2 * PAGE_SIZE, 9))
        told = handler.one()
        done = guest.engine.userfault_continue(guest.file, 3, 2, True, handler.session)
        halted(result(running))
    assert (told.pgoff, told.npages, told.private, told.write) == (3, 2, True, True)
    assert done == 2
    assert guest.sees(3 * PAGE_SIZE, 2 * PAGE_SIZE, 9)


def test_zeropage_gives_zeros(guest: Guest, handler: Handler) -> None:
    """UFFDIO_ZEROPAGE."""
    with calls(guest.engine) as call:
        running = call(guest.run, check(_at(guest, SHARED), PAGE_SIZE, 0, private=False))
        handler.one()
        assert guest.engine.userfault_zeropage(guest.file, SHARED, 1, handler.session) == 1
        assert halted(result(running)).vcpu.mismatched == 0


def test_a_shared_fault_is_continued_on_what_the_handler_wrote(
    guest: Guest, handler: Handler
) -> None:
    """UFFD minor mode: bytes come through the handler's own mapping, and CONTINUE maps them."""
    engine = guest.engine
    with calls(guest.engine) as call:
        running = call(guest.run, check(_at(guest, SHARED), PAGE_SIZE, 0x5A, private=False))
        handler.one()
        shared = engine.core.shared_memory(file_of(engine, guest.file))
        shared.write_bytes(SHARED * PAGE_SIZE, b"\x5a" * PAGE_SIZE)
        # the page is in the page cache now: UFFDIO_COPY says EEXIST
        with pytest.raises(RmemError) as caught:
            engine.userfault_copy(guest.file, SHARED, bytes(PAGE_SIZE), handler.session)
        assert caught.value.reason is PAGE_PRESENT
        engine.userfault_continue(guest.file, SHARED, 1, False, handler.session)
        assert halted(result(running)).vcpu.mismatched == 0


def test_two_vcpus_on_one_page_are_told_once_and_both_go_on(guest: Guest, handler: Handler) -> None:
    """userfaultfd tells each fault; here a page is told once, however many wait for it."""
    engine = guest.engine
    engine.create_vcpu(guest.vm, 1)
    engine.set_programme(guest.vm, 1, (touch(_at(guest, SHARED), 8, private=False),))
    with calls(guest.engine) as call:
        first = call(guest.run, touch(_at(guest, SHARED), 8, private=False))
        handler.one()
        second = call(engine.run_vcpu, guest.vm, 1)
        _until_waiting(engine, 2)
        assert engine.take_userfaults(handler.session) == []
        assert len(engine.pending_userfaults(handler.session)) == 2
        engine.userfault_zeropage(guest.file, SHARED, 1, handler.session)
        halted(result(first))
        halted(result(second))


def _until_waiting(engine: Engine, n: int) -> None:
    """Wait until so many faults wait."""
    core = engine.core
    with core._changed:
        assert core._changed.wait_for(lambda: len(core.pending_faults.waiting) == n, 20)


def test_a_guest_gets_as_far_as_it_can_before_it_waits(guest: Guest, handler: Handler) -> None:
    """KVM faults page by page: what lies before the hole is done when the handler hears of it."""
    engine = guest.engine
    engine.userfault_zeropage(guest.file, SHARED, 2, handler.session)
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, SHARED), 4 * PAGE_SIZE, 3, private=False))
        told = handler.one()
        assert (told.pgoff, told.npages) == (SHARED + 2, 2)
        assert guest.host_sees(SHARED * PAGE_SIZE, 2 * PAGE_SIZE, 3)
        engine.userfault_zeropage(guest.file, SHARED + 2, 2, handler.session)
        halted(result(running))


def test_a_large_copy_moves_without_the_lock(guest: Guest, handler: Handler) -> None:
    """More pages than are copied under the lock; what waits goes on after the record."""
    engine = guest.engine
    steps = []
    engine.core.hold = steps.append
    data = bytes(range(256)) * (16 * PAGE_SIZE // 256)
    with calls(guest.engine) as call:
        reading = call(guest.host_read, SHARED * PAGE_SIZE, len(data))
        assert handler.one().npages == 16
        assert engine.userfault_copy(guest.file, SHARED, data, handler.session) == 16
        assert result(reading) == data
    engine.core.hold = None
    assert "userfault: copy" in steps


def test_whoever_brings_the_page_ends_the_wait(guest: Guest, handler: Handler) -> None:
    """fallocate does not fault, and is not told; a page that is there is waited for by nobody."""
    with calls(guest.engine) as call:
        running = call(guest.run, touch(_at(guest, 0), 8))
        handler.one()
        assert guest.engine.fallocate(guest.file, 1, 0, PAGE_SIZE) == 1
        halted(result(running))


@pytest.mark.parametrize("how", ["read", "write", "pin", "pre_fault"])
def test_the_hosts_own_touch_waits_too(guest: Guest, handler: Handler, how: str) -> None:
    """A host mapping of the range, GUP and KVM_PRE_FAULT_MEMORY fault as an access does."""
    engine, offset = guest.engine, SHARED * PAGE_SIZE
    act = {
        "read": lambda: guest.host_read(offset, 1),
        "write": lambda: guest.host_write(offset, b"x"),
        "pin": lambda: engine.pin(guest.file, offset, PAGE_SIZE, "DMA", "device/1"),
        "pre_fault": lambda: engine.pre_fault(guest.vm, _at(guest, SHARED), PAGE_SIZE).done_pages,
    }[how]
    with calls(guest.engine) as call:
        waiting: Future[Any] = call(act)
        told = handler.one()
        assert told.write == (how in ("write", "pin"))
        assert told.vm == (guest.vm if how == "pre_fault" else 0)
        engine.userfault_copy(guest.file, SHARED, b"\x5a" * PAGE_SIZE, handler.session)
        found = result(waiting)
    if how == "read":
        assert found == b"\x5a"


def test_populate_brings_its_own_bytes_and_does_not_fault(make_engine: MakeEngine) -> None:
    """Launch population allocates in kernel mode (kvm_gmem_populate): no handler is asked."""
    engine = make_engine()
    guest = make_guest(engine, "tdx-today", 4, finalize=False)
    handler = Handler(engine)
    handler.register(guest.file, 0, 4)
    assert engine.populate(guest.vm, guest.gpa, bytes(PAGE_SIZE)) == 1
    assert engine.take_userfaults(handler.session) == []


def test_without_a_registration_nothing_is_looked_up(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The price of the feature where it is not used is one truth test."""

    def looked_up(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Userfaults, "covers", looked_up)
    monkeypatch.setattr(Userfaults, "of_file", looked_up)
    guest.fill(0, PAGE_SIZE, 1)
    guest.host_write(SHARED * PAGE_SIZE, b"x")


# --- in place --------------------------------------------------------------------------------
def test_in_place_one_frame_serves_either_state(make_engine: MakeEngine) -> None:
    engine = make_engine()
    flags = FLAG_MMAP | FLAG_INIT_SHARED
    guest = make_guest(engine, "sw-protected", 4, flags=flags, in_place=True)
    engine.convert_file(guest.file, 2 * PAGE_SIZE, 2 * PAGE_SIZE, 8)
    handler = Handler(engine)
    handler.register(guest.file, 0, 4)
    with calls(engine) as call:
        running = call(guest.run, check(guest.gpa, PAGE_SIZE, 0x5A, private=False))
        assert not handler.one().private
        with pytest.raises(RmemError) as caught:
            engine.userfault_copy(guest.file, 0, b"\x5a" * (3 * PAGE_SIZE), handler.session)
        assert caught.value.reason is PRIVATE_CONTENT
        assert caught.value.details.progress_pages == 2
        assert halted(result(running)).vcpu.mismatched == 0
        running = call(guest.run, write(guest.gpa + 3 * PAGE_SIZE, 8, 7))
        assert handler.one().private
        # whichever half is named, it is the frame
        engine.userfault_continue(guest.file, 3, 1, False, handler.session)
        halted(result(running))
    assert guest.sees(3 * PAGE_SIZE, 8, 7)
    assert violations(engine.core) == []


# --- who may register, and resolve -------------------------------------------------------------
def test_an_overlap_is_ebusy(guest: Guest, handler: Handler) -> None:
    """userfaultfd_register: a range that another context has registered is EBUSY."""
    engine, other = guest.engine, Handler(guest.engine)
    caught = refusal(other.register, guest.file, 4, 1, reason=USERFAULT_TAKEN, errno=EBUSY)
    assert caught.details.holders[0].name == f"session {handler.session}"
    for pgoff, npages in ((0, 0), (-1, 2), (NPAGES - 1, 2), (1 << 62, 1 << 62)):
        refusal(other.register, guest.file, pgoff, npages, reason=BAD_RANGE, errno=EINVAL)
    file = engine.create_file(guest.vm, 8 * PAGE_SIZE).info.file
    first, second = other.register(file, 0, 4), other.register(file, 4, 4)
    assert first != second
    engine.unregister_userfault(first, other.session)
    assert [one.userfault for one in engine.core.userfaults.of_file(file)] == [second]
    engine.close_file(file)
    assert engine.core.userfaults.of_file(file) == ()


def test_only_the_registering_session_resolves(guest: Guest, handler: Handler) -> None:
    """Another session's range is as if it were not there: ENOENT; an admin may act on any."""
    engine, other = guest.engine, Handler(guest.engine)
    gone = {"reason": NO_SUCH_USERFAULT, "errno": ENOENT}
    refusal(engine.userfault_copy, guest.file, SHARED, bytes(PAGE_SIZE), other.session, **gone)
    refusal(engine.userfault_zeropage, guest.file, SHARED, 1, other.session, **gone)
    refusal(engine.userfault_continue, guest.file, 0, 1, True, other.session, **gone)
    refusal(engine.userfault_wake, guest.file, 0, 1, other.session, **gone)
    handle = engine.core.userfaults.of_file(guest.file)[0].userfault
    refusal(engine.unregister_userfault, handle, other.session, **gone)
    assert engine.userfault_zeropage(guest.file, SHARED, 1) == 1
    engine.unregister_userfault(handle)
    refusal(engine.unregister_userfault, handle, **gone)


def test_a_copy_keeps_the_pages_before_the_one_that_is_there(
    guest: Guest, handler: Handler
) -> None:
    """UFFDIO_COPY: EEXIST for a page that is present; what was copied before it stays."""
    engine = guest.engine
    engine.userfault_zeropage(guest.file, SHARED + 2, 1, handler.session)
    data = b"\x11" * (4 * PAGE_SIZE)
    caught = refusal(
        engine.userfault_copy, guest.file, SHARED, data, handler.session,
        reason=PAGE_PRESENT, errno=EEXIST,
    )  # fmt: skip
    assert caught.details.progress_pages == 2
    assert caught.details.page == f"pgoff {SHARED + 2:#x}"
    assert guest.host_sees(SHARED * PAGE_SIZE, 2 * PAGE_SIZE, 0x11)
    assert guest.host_sees((SHARED + 2) * PAGE_SIZE, PAGE_SIZE, 0)
    assert guest.pfn(SHARED + 3, private=False) < 0
    refusal(
        engine.userfault_copy, guest.file, SHARED, b"x", handler.session,
        reason=NOT_PAGE_ALIGNED, errno=EINVAL,
    )  # fmt: skip


def test_the_host_gives_no_bytes_to_private_pages(guest: Guest, handler: Handler) -> None:
    engine = guest.engine
    for act in (
        lambda: engine.userfault_copy(guest.file, 0, b"\x5a" * PAGE_SIZE, handler.session),
        lambda: engine.userfault_zeropage(guest.file, 0, 1, handler.session),
    ):
        caught = refusal(act, reason=PRIVATE_CONTENT, errno=EINVAL)
        assert caught.details.progress_pages == 0
    assert guest.pfn(0, private=False) < 0


def test_a_copy_that_the_system_refuses_leaves_holes(
    guest: Guest, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real = guest.engine, Memfd.write

    def torn(self: Memfd, numbers: Any, rows: Any) -> None:
        real(self, numbers[:1], rows[:1])
        raise OSError(28, "no space")

    monkeypatch.setattr(Memfd, "write", torn)
    before = engine.core.space.snapshot()["host/use"]
    for n in (2, 12):
        with pytest.raises(OSError, match="no space"):
            engine.userfault_copy(guest.file, SHARED, b"\x5a" * (n * PAGE_SIZE), handler.session)
    monkeypatch.undo()
    assert np.array_equal(engine.core.space.snapshot()["host/use"], before)
    assert engine.userfault_zeropage(guest.file, SHARED, 12, handler.session) == 12
    assert guest.host_sees(SHARED * PAGE_SIZE, 12 * PAGE_SIZE, 0)


# --- the handler goes ----------------------------------------------------------------------------
def test_when_the_handler_dies_the_fault_goes_on(guest: Guest, handler: Handler) -> None:
    """userfaultfd_release: ranges are unregistered, waiters woken, and they get a zero page."""
    guest.engine.userfault_continue(guest.file, 0, 1, True, handler.session)
    # a removal that the handler does not live to read
    guest.engine.fallocate(guest.file, 3, 0, PAGE_SIZE)
    assert guest.engine.core.pending_faults._removed
    with calls(guest.engine) as call:
        running = call(guest.run, check(_at(guest, SHARED), PAGE_SIZE, 0, private=False))
        _until_waiting(guest.engine, 1)
        with guest.engine.core._changed, guest.engine.core.tx("death") as tx:
            assert userfaultops.release(guest.engine.core, tx, handler.session) == 1
        assert guest.engine.core.pending_faults._removed == {}
        guest.engine.core.wake()
        assert halted(result(running)).vcpu.mismatched == 0
    assert not guest.engine.core.userfaults
    assert guest.pfn(SHARED, private=False) >= 0


def test_unregistering_lets_the_fault_go_on(guest: Guest, handler: Handler) -> None:
    """UFFDIO_UNREGISTER wakes what waits in the range."""
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 0), 8, 1))
        told = handler.one()
        guest.engine.unregister_userfault(told.userfault, handler.session)
        halted(result(running))


def test_another_handler_may_take_over(guest: Guest, handler: Handler) -> None:
    """Unregistered and registered again, before the fault has looked: the new one is told."""
    engine = guest.engine
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 0), 8, 1))
        told = handler.one()
        heir = Handler(engine)

        def both() -> Steps[int]:
            yield from userfaultops.unregister(engine.core, told.userfault, handler.session)
            return (yield from userfaultops.register(engine.core, guest.file, 0, 4, heir.session))

        made = engine.core.run(both)
        again = heir.one()
        assert (again.userfault, again.pgoff) == (made, 0)
        engine.userfault_continue(guest.file, 0, 1, True, heir.session)
        halted(result(running))


# --- interrupted -----------------------------------------------------------------------------
def test_a_cancelled_vcpu_comes_back_with_intr(guest: Guest, handler: Handler) -> None:
    """handle_userfault is interruptible: a signal makes KVM_RUN return EINTR, KVM_EXIT_INTR."""
    engine, gone, wakers = guest.engine, threading.Event(), []
    cancelled = Cancelled(gone.is_set, wakers.append)
    engine.set_programme(guest.vm, 0, (write(_at(guest, 0), PAGE_SIZE, 1),))
    with calls(guest.engine) as call:
        running = call(lambda: engine.run_vcpu(guest.vm, 0, cancelled=cancelled))
        handler.one()
        gone.set()
        (wake,) = wakers
        wake()
        exited = result(running)
    assert (exited.reason, exited.errno) == (Exit.INTR, EINTR)
    assert exited.refusal is not None
    assert exited.refusal.reason is INTERRUPTED
    assert engine.pending_userfaults() == []
    # the instruction is still to do, and its page is told again
    with calls(guest.engine) as call:
        running = call(lambda: engine.run_vcpu(guest.vm, 0))
        assert handler.one().pgoff == 0
        engine.userfault_continue(guest.file, 0, 1, True, handler.session)
        halted(result(running))


def test_a_caller_that_has_gone_before_it_waits_does_not_wait(
    guest: Guest, handler: Handler
) -> None:
    refusal(
        guest.engine.read_shared, guest.file, SHARED * PAGE_SIZE, 1, 0, lambda: True,
        reason=INTERRUPTED, errno=EINTR,
    )  # fmt: skip


def test_a_pre_fault_that_is_interrupted_keeps_its_prefix(guest: Guest, handler: Handler) -> None:
    """KVM_PRE_FAULT_MEMORY: EINTR only if nothing was done."""
    engine, gone = guest.engine, threading.Event()
    engine.userfault_continue(guest.file, 0, 3, True, handler.session)
    for start, done in ((0, 3), (3, None)):
        gone.clear()
        with calls(guest.engine) as call:
            faulting = call(
                lambda start=start: engine.pre_fault(
                    guest.vm, _at(guest, start), 6 * PAGE_SIZE, cancelled=gone.is_set
                )
            )
            assert handler.one().pgoff == 3
            gone.set()
            engine.core.wake()
            if done is not None:
                assert result(faulting).done_pages == done
            else:
                refusal(result, faulting, reason=INTERRUPTED, errno=EINTR)


def test_draining_ends_the_wait(guest: Guest, handler: Handler) -> None:
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 0), 8, 1))
        handler.one()
        guest.engine.drain()
        assert result(running).reason is Exit.INTR


def test_a_vm_destroyed_while_a_pre_fault_waits(guest: Guest, handler: Handler) -> None:
    engine = guest.engine
    with calls(guest.engine) as call:
        faulting = call(engine.pre_fault, guest.vm, guest.gpa, PAGE_SIZE)
        handler.one()
        engine.destroy_vm(guest.vm)
        assert violations(engine.core) == []
        assert engine.pending_userfaults() == []
        refusal(result, faulting, reason=NO_SUCH_VM, errno=ENOENT)


def test_a_vm_is_in_use_while_its_vcpu_waits(guest: Guest, handler: Handler) -> None:
    engine, gone = guest.engine, threading.Event()
    engine.set_programme(guest.vm, 0, (write(_at(guest, 0), PAGE_SIZE, 1),))
    with calls(guest.engine) as call:
        running = call(lambda: engine.run_vcpu(guest.vm, 0, cancelled=gone.is_set))
        handler.one()
        refusal(engine.destroy_vm, guest.vm, reason=VM_IN_USE, errno=EBUSY)
        gone.set()
        engine.core.wake()
        assert result(running).reason is Exit.INTR
    engine.destroy_vm(guest.vm)


def test_a_vm_that_dies_does_not_wait(guest: Guest, handler: Handler) -> None:
    engine = guest.engine
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 0), 8, 1))
        handler.one()

        def death() -> Steps[None]:
            yield from ()
            with engine.core.tx("death") as tx:
                kill(engine.core, tx, engine.core.vms.get(guest.vm), "test")

        engine.core.run(death)
        refusal(result, running, reason=VM_DEAD, errno=EIO)


def test_a_session_that_ends_takes_its_waiting_vm_with_it(make_engine: MakeEngine) -> None:
    """The vCPU of a VM whose session is closed leaves its wait; nobody else has to resolve it."""
    engine = make_engine()
    vmm, handler = Handler(engine), Handler(engine)
    owner = engine.core.sessions.get(vmm.session).owner
    vm = engine.create_vm("null", starts_private=False, owner=owner).info.vm
    engine.set_memory_region(vm, 0, 0, 0, 4 * PAGE_SIZE)
    file = engine.core.vms.get(vm).slots[0].file
    engine.create_vcpu(vm, 0)
    engine.set_programme(vm, 0, (write(0, 8, 1, private=False),))
    handler.register(file, 0, 4)
    with calls(engine) as call:
        running = call(engine.run_vcpu, vm, 0)
        handler.one()
        vmm.die()
        assert result(running).reason is Exit.INTR
    assert not engine.core.vms.exists(vm)
    assert not engine.core.userfaults


# --- while it waits, the memory changes ------------------------------------------------------
def test_a_punch_is_told_and_the_next_fault_is_told_again(guest: Guest, handler: Handler) -> None:
    """UFFD_EVENT_REMOVE, and a missing fault on the next access."""
    engine = guest.engine
    engine.userfault_continue(guest.file, 0, 4, True, handler.session)
    guest.fill(0, 4 * PAGE_SIZE, 1)
    engine.fallocate(guest.file, 3, PAGE_SIZE, 2 * PAGE_SIZE)
    gone = handler.one()
    assert (gone.kind, gone.pgoff, gone.npages, gone.private) == (REMOVED, 1, 2, True)
    with calls(guest.engine) as call:
        running = call(guest.run, check(_at(guest, 0), 4 * PAGE_SIZE, 0))
        told = handler.one()
        assert (told.kind, told.pgoff, told.npages) == (FAULT, 1, 2)
        engine.userfault_continue(guest.file, 1, 2, True, handler.session)
        assert halted(result(running)).vcpu.mismatched == 2


def test_resolved_and_punched_before_the_fault_has_looked(guest: Guest, handler: Handler) -> None:
    """The waiter finds a hole again that was told before: it must be told once more."""
    engine = guest.engine
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 0), 8, 1))
        handler.one()

        def both() -> Steps[int]:
            core = engine.core
            yield from userfaultops.continue_(core, handler.session, guest.file, 0, 1, True)
            return (yield from memory.punch(core, guest.file, 0, 1))

        assert engine.core.run(both) == 1
        kinds = [message.kind for message in handler.next()]
        while FAULT not in kinds:
            kinds = [message.kind for message in handler.next()]
        engine.userfault_continue(guest.file, 0, 1, True, handler.session)
        halted(result(running))


def test_wake_tells_again(guest: Guest, handler: Handler) -> None:
    """UFFDIO_WAKE: the thread faults again, and the fault is read again."""
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 0), 8, 1))
        told = handler.one()
        guest.engine.userfault_wake(guest.file, 0, 1, handler.session)
        assert handler.one() == told
        guest.engine.userfault_continue(guest.file, 0, 1, True, handler.session)
        halted(result(running))


def test_a_conversion_ends_the_wait(guest: Guest, handler: Handler) -> None:
    """The access is looked at again, and is of the wrong state now: KVM_EXIT_MEMORY_FAULT."""
    engine = guest.engine
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 0), 8, 1))
        handler.one()
        engine.set_attributes(guest.vm, [(guest.gpa, PAGE_SIZE, 0)])
        exited = result(running)
    assert exited.reason is Exit.MEMORY_FAULT
    assert guest.pfn(0) < 0


def test_a_file_closed_while_a_fault_waits(guest: Guest, handler: Handler) -> None:
    engine = guest.engine
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 0), 8, 1))
        handler.one()
        reading = call(guest.host_read, SHARED * PAGE_SIZE, 1)
        _until_waiting(engine, 2)
        engine.close_file(guest.file)
        assert violations(engine.core) == []
        exited = result(running)
        with pytest.raises(RmemError) as caught:
            result(reading)
    assert exited.reason is Exit.MEMORY_FAULT
    assert exited.refusal is not None
    assert exited.refusal.reason is FILE_GONE
    assert caught.value.reason is NO_SUCH_FILE


def test_the_wait_graph_names_the_handler(guest: Guest, handler: Handler) -> None:
    engine = guest.engine
    with calls(guest.engine) as call:
        running = call(guest.run, write(_at(guest, 0), 8, 1))
        handler.one()
        _, graph = engine.read(lambda core: core.waits.graph(core.ledger))
        (edge,) = graph.edges
        engine.userfault_continue(guest.file, 0, 1, True, handler.session)
        halted(result(running))
    assert (edge.waiter, edge.holder) == (f"vm/{guest.vm} vcpu 0", f"session {handler.session}")
    assert (edge.why, edge.pages) == ("page fault handler", f"file/{guest.file} pgoff 0x0+0x1")


def test_the_invariants_see_a_pending_fault_that_is_none(guest: Guest, handler: Handler) -> None:
    core = guest.engine.core
    guest.engine.userfault_continue(guest.file, 0, 1, True, handler.session)
    wrong = {
        "and is there": (guest.file, 0, 0),
        "has no handler": (make_guest(guest.engine, "null", 1, restricted=False).file, 0, 0),
        "the file is gone": (999, 0, 0),
        "by vm/999": (guest.file, 1, 999),
    }
    for text, (file, pgoff, vm) in wrong.items():
        pgoffs = np.array([pgoff], dtype=np.int64)
        fault = Missing(file, pgoffs, True, False, vm, 0, lambda pgoffs=pgoffs: pgoffs)
        core.pending_faults.add(fault)
        assert any(text in line for line in violations(core)), text
        core.pending_faults.leave(fault)
