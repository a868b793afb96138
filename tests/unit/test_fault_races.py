"""Guest faults while slots and states change under them, and accesses where no slot is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EFAULT, ENOENT

import pytest
from guests import Guest as Launched
from guests import make_engine
from helpers import BASE_GPA, Guest, halted, make_guest, refusal, touch, vm_of, write
from hypothesis import given, settings
from hypothesis import strategies as st

from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.programme import Instruction, Opcode
from rmemd.engine.vcpu import Exit
from rmemd.errors import BAD_REQUEST, NO_MEMSLOT, Poisoned
from rmemd.hooks.types import Agent
from rmemd.model.vms import ATTRIBUTE_PRIVATE
from rmemd.units import PAGE_SIZE

NPAGES = 4
LOOKED_UP = "fault: looked up"


@contextmanager
def _once(engine: Engine, step: str, change: Callable[[], None]) -> Iterator[None]:
    """Make one change when an operation first stands at a step."""
    pending = [change]

    def hold(name: str) -> None:
        if name == step and pending:
            pending.pop()()

    engine.core.hold = hold
    try:
        yield
    finally:
        engine.core.hold = None
        assert not pending, f"nothing came by {step}"


def _delete(guest: Guest) -> None:
    guest.engine.set_memory_region(guest.vm, 0, 0, guest.gpa, 0)


def _nothing_mapped(guest: Guest) -> bool:
    mirror = vm_of(guest.engine, guest.vm).mirror
    return all(mirror.at(guest.gpa // PAGE_SIZE + n) == 0 for n in range(guest.npages))


@pytest.fixture
def guest(engine: Engine) -> Iterator[Guest]:
    yield make_guest(engine, "sw-protected", NPAGES, in_place=False)
    assert check(engine.core) == []


def test_a_slot_deleted_during_a_pre_fault_is_not_mapped_into(guest: Guest) -> None:
    with _once(guest.engine, LOOKED_UP, lambda: _delete(guest)):
        refusal(
            guest.engine.pre_fault, guest.vm, guest.gpa, guest.size, reason=NO_MEMSLOT, errno=ENOENT
        )
    assert _nothing_mapped(guest)


def test_a_slot_deleted_during_an_access_is_a_memory_fault(guest: Guest) -> None:
    with _once(guest.engine, LOOKED_UP, lambda: _delete(guest)):
        exited = guest.run(touch(guest.gpa, 8))
    assert (exited.reason, exited.errno) == (Exit.MEMORY_FAULT, EFAULT)
    assert _nothing_mapped(guest)


def test_a_page_converted_during_an_access_is_a_memory_fault(guest: Guest) -> None:
    shared = [(guest.gpa, PAGE_SIZE, 0)]
    with _once(
        guest.engine, LOOKED_UP, lambda: void(guest.engine.set_attributes(guest.vm, shared))
    ):
        exited = guest.run(write(guest.gpa, 8, 1))
    assert (exited.reason, exited.flags) == (Exit.MEMORY_FAULT, ATTRIBUTE_PRIVATE)
    assert _nothing_mapped(guest)


def test_a_page_converted_during_a_pre_fault_is_mapped_in_its_new_state(guest: Guest) -> None:
    shared = [(guest.gpa, guest.size, 0)]
    with _once(
        guest.engine, LOOKED_UP, lambda: void(guest.engine.set_attributes(guest.vm, shared))
    ):
        done = guest.engine.pre_fault(guest.vm, guest.gpa, guest.size)
    assert (done.done_pages, done.left_bytes) == (NPAGES, 0)
    assert done.retries > 0
    private, mapped = vm_of(guest.engine, guest.vm).mapped(guest.gpa // PAGE_SIZE, NPAGES)
    assert (private.total, mapped.total) == (0, NPAGES)


def test_an_ordinary_slot_made_anew_during_an_access_is_read_as_it_is_now(engine: Engine) -> None:
    guest = make_guest(engine, "gup", NPAGES, restricted=False)
    guest.host_write(0, b"\xaa" * PAGE_SIZE)

    def anew() -> None:
        _delete(guest)
        engine.set_memory_region(guest.vm, 0, 0, guest.gpa, guest.size)

    with _once(engine, LOOKED_UP, anew):
        assert guest.sees(0, PAGE_SIZE, 0, private=False)
    assert check(engine.core) == []


def test_a_copy_whose_source_is_punched_meanwhile_reads_it_again(guest: Guest) -> None:
    engine = guest.engine
    engine.set_attributes(guest.vm, [(guest.gpa + PAGE_SIZE, PAGE_SIZE, 0)])
    guest.fill(0, PAGE_SIZE, 0xAA)
    guest.host_write(PAGE_SIZE, b"\xbb" * PAGE_SIZE)
    # a reader of a frame that is not there would find the host's last one
    last = engine.core.host.nframes - 1
    engine.write_physical(last, b"\xcc" * PAGE_SIZE, Agent.HOST_KERNEL)
    copy = Instruction(Opcode.COPY, guest.gpa, PAGE_SIZE, value=guest.gpa + PAGE_SIZE, private=True)
    with _once(engine, LOOKED_UP, lambda: void(engine.fallocate(guest.file, 3, 0, PAGE_SIZE))):
        halted(guest.run(copy))
    assert guest.host_sees(PAGE_SIZE, PAGE_SIZE, 0)


def void(_: object) -> None:
    """Let a result go."""


# --- no slot ---------------------------------------------------------------------------------
@pytest.mark.parametrize("in_place", [False, True])
def test_a_private_access_without_a_slot_is_a_memory_fault(engine: Engine, in_place: bool) -> None:
    guest = make_guest(engine, "sw-protected", 1, in_place=in_place)
    exited = guest.run(touch(BASE_GPA + 5 * PAGE_SIZE + 16, 8))
    assert (exited.reason, exited.errno) == (Exit.MEMORY_FAULT, EFAULT)
    assert (exited.flags, exited.gpa) == (ATTRIBUTE_PRIVATE, BASE_GPA + 5 * PAGE_SIZE)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_shared_access_without_a_slot_is_mmio(engine: Engine, in_place: bool) -> None:
    guest = make_guest(engine, "sw-protected", 1, in_place=in_place)
    for length, size in ((4, 4), (64, 8)):
        exited = guest.run(touch(BASE_GPA + 5 * PAGE_SIZE + 16, length, private=False))
        assert (exited.reason, exited.gpa) == (Exit.MMIO, BASE_GPA + 5 * PAGE_SIZE + 16)
        assert exited.size == size


@pytest.mark.parametrize(
    ("opcode", "reason"), [(Opcode.ACCEPT, Exit.MEMORY_FAULT), (Opcode.SHARE, Exit.MMIO)]
)
def test_a_call_about_a_page_without_a_slot(engine: Engine, opcode: Opcode, reason: Exit) -> None:
    guest = make_guest(engine, "sw-protected", 1)
    assert guest.run(Instruction(opcode, 0, PAGE_SIZE)).reason is reason


# --- a prefix --------------------------------------------------------------------------------
def test_a_pre_fault_that_got_somewhere_succeeds_and_says_what_is_left(guest: Guest) -> None:
    size = guest.size + 2 * PAGE_SIZE
    done = guest.engine.pre_fault(guest.vm, guest.gpa, size)
    assert (done.done_pages, done.left_bytes) == (NPAGES, 2 * PAGE_SIZE)
    refusal(
        guest.engine.pre_fault, guest.vm, guest.gpa + guest.size, done.left_bytes,
        reason=NO_MEMSLOT, errno=ENOENT,
    )  # fmt: skip


# --- what memory starts as -------------------------------------------------------------------
@pytest.mark.parametrize("private", [False, True])
def test_memory_starts_as_configured(engine: Engine, private: bool) -> None:
    guest = make_guest(engine, "sw-protected", 1, in_place=False, starts_private=private)
    assert guest.run(touch(guest.gpa, 8, private=not private)).reason is Exit.MEMORY_FAULT
    halted(guest.run(touch(guest.gpa, 8, private=private)))


def test_a_vm_without_private_memory_cannot_start_private(engine: Engine) -> None:
    refusal(engine.create_vm, "gup", starts_private=True, reason=BAD_REQUEST, errno=22)


@given(st.integers(1, 40), st.data())
@settings(max_examples=30)
def test_a_pre_fault_stops_at_the_first_page_that_is_refused(n: int, data: st.DataObject) -> None:
    """It is found by halves, and what comes before it is mapped as if page by page."""
    engine = make_engine(512)
    guest = Launched(engine, "sw-protected", 40)
    guest.allocate(0, 40)
    bad = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=3))
    for page in bad:
        engine.poison(int(guest.frames(page)[0]))
    first = min(bad)
    if first:
        done = engine.pre_fault(guest.vm, guest.gpa(0), n * PAGE_SIZE)
        assert (done.done_pages, done.left_bytes) == (first, (n - first) * PAGE_SIZE)
    else:
        with pytest.raises(Poisoned):
            engine.pre_fault(guest.vm, guest.gpa(0), n * PAGE_SIZE)
    mapped = guest.pfns(0, 40) >= 0
    assert mapped.tolist() == [page < first for page in range(40)]
    engine.close()
