"""Small guest reads and writes: the way of a guest access, with refusals in place of exits."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from errno import EBUSY, EFAULT, EINTR, EINVAL, EIO, EMSGSIZE, ENOENT
from typing import Any

import numpy as np
import pytest
from guests import Guest as AnyGuest
from guests import consumers
from guests import make_engine as engine_with_plugins
from handlers import Handler, calls, result
from helpers import Guest, MakeEngine, halted, make_guest, refusal, write

from rmemd.engine import guestio
from rmemd.engine.driver import Steps
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check as violations
from rmemd.engine.programme import Opcode, Pattern
from rmemd.errors import (
    BAD_RANGE,
    GUEST_EXCEPTION,
    HW_POISON,
    INTERRUPTED,
    MEMORY_FAULT,
    MESSAGE_TOO_BIG,
    NO_MEMSLOT,
    NO_SUCH_VCPU,
    NOT_FINALIZED,
    PLUGIN_NONSENSE,
    READONLY_SLOT,
    VCPU_BUSY,
    VM_DEAD,
    RmemError,
)
from rmemd.hooks import Agent
from rmemd.model.vms import READONLY
from rmemd.units import PAGE_SIZE, pages

EHWPOISON = 133
CANARY = b"correct horse battery staple, 32"


@pytest.mark.parametrize("consumer", consumers())
def test_bytes_come_back_for_every_consumer(consumer: str) -> None:
    """Unaligned, across pages, private and shared; the same bytes as a programme would see."""
    engine = engine_with_plugins()
    guest = AnyGuest(engine, consumer)
    states = (True, False) if guest.private and not guest.in_place else (guest.private,)
    data = bytes(np.random.default_rng(1).integers(0, 256, 3 * PAGE_SIZE, dtype=np.uint8))
    guest.accept(0, 8)
    if False in states and guest.private:
        guest.convert(16, 8, private=False)
    for private in states:
        page = 0 if private or not guest.private else 16
        at = guest.gpa(page) + 100
        engine.write_guest(guest.vm, 0, at, data, private)
        assert engine.read_guest(guest.vm, 0, at, len(data), private) == data
        assert not engine.core.vms.get(guest.vm).vcpu(0).inside
        # what is around it is untouched
        edge = engine.read_guest(guest.vm, 0, at - 1, 1, private)
        engine.write_guest(guest.vm, 0, at, data[:1], private)
        assert engine.read_guest(guest.vm, 0, at - 1, 2, private) == edge + data[:1]
        guest.write(page, 2, seed=7, private=private)
        rows = np.frombuffer(
            engine.read_guest(guest.vm, 0, guest.gpa(page), 2 * PAGE_SIZE, private), dtype="<u8"
        )
        assert guest.holds(page, 2, seed=7, private=private)
        assert np.unique(rows).size > 900
    assert not engine.core.vms.get(guest.vm).vcpu(0).inside
    assert engine.core.running == set()
    assert violations(engine.core) == []
    engine.close()


def test_64_kib_and_no_more(engine: Engine) -> None:
    guest = make_guest(engine, "null", 32)
    data = b"\x5a" * (1 << 16)
    engine.write_guest(guest.vm, 0, guest.gpa + 5, data, True)
    assert engine.read_guest(guest.vm, 0, guest.gpa + 5, len(data), True) == data
    big = {"reason": MESSAGE_TOO_BIG, "errno": EMSGSIZE}
    refusal(engine.read_guest, guest.vm, 0, guest.gpa, (1 << 16) + 1, True, **big)
    refusal(engine.write_guest, guest.vm, 0, guest.gpa, data + b"x", True, **big)
    bad = {"reason": BAD_RANGE, "errno": EINVAL}
    for gpa, length in ((guest.gpa, 0), (guest.gpa, -1), (-1, 2), ((1 << 52) - 1, 2)):
        refusal(engine.read_guest, guest.vm, 0, gpa, length, True, **bad)
    refusal(engine.read_guest, guest.vm, 7, guest.gpa, 1, True, reason=NO_SUCH_VCPU, errno=ENOENT)


# --- what would be an exit -----------------------------------------------------------------------
def test_the_wrong_state_is_a_memory_fault_with_the_prefix_kept(engine: Engine) -> None:
    """KVM_EXIT_MEMORY_FAULT: EFAULT; a write keeps the pages before the one that is shared."""
    guest = make_guest(engine, "sw-protected", 4, in_place=False)
    engine.set_attributes(guest.vm, [(guest.gpa + 2 * PAGE_SIZE, PAGE_SIZE, 0)])
    fault = {"reason": MEMORY_FAULT, "errno": EFAULT}
    start = guest.gpa + PAGE_SIZE // 2
    caught = refusal(engine.write_guest, guest.vm, 0, start, b"\x11" * 3 * PAGE_SIZE, True, **fault)
    assert caught.details.progress_pages == 2
    assert caught.details.page == f"gfn {guest.gpa // PAGE_SIZE + 2:#x}"
    assert caught.details.state == "shared"
    assert guest.sees(PAGE_SIZE // 2, 3 * PAGE_SIZE // 2, 0x11)
    caught = refusal(engine.read_guest, guest.vm, 0, start, 3 * PAGE_SIZE, True, **fault)
    assert caught.details.progress_pages is None
    caught = refusal(engine.write_guest, guest.vm, 0, guest.gpa, b"x", False, **fault)
    assert (caught.details.progress_pages, caught.details.state) == (0, "private")


def test_no_slot_and_a_read_only_one(engine: Engine) -> None:
    """KVM_EXIT_MMIO for shared addresses; a private one is a MEMORY_FAULT."""
    guest = make_guest(engine, "null", 4, restricted=False, starts_private=False)
    past = guest.gpa + guest.size
    gone = {"reason": NO_MEMSLOT, "errno": ENOENT}
    caught = refusal(engine.read_guest, guest.vm, 0, past, 8, False, **gone)
    assert caught.details.page == f"gfn {past // PAGE_SIZE:#x}"
    caught = refusal(engine.write_guest, guest.vm, 0, past - 4, bytes(8), False, **gone)
    assert caught.details.progress_pages == 1
    fault = {"reason": MEMORY_FAULT, "errno": EFAULT}
    refusal(engine.read_guest, guest.vm, 0, past, 8, True, **fault)
    engine.set_memory_region(guest.vm, 1, READONLY, past, PAGE_SIZE)
    assert engine.read_guest(guest.vm, 0, past, 8, False) == bytes(8)
    refusal(engine.write_guest, guest.vm, 0, past, b"x", False, reason=READONLY_SLOT, errno=EFAULT)


@pytest.mark.parametrize(
    ("consumer", "vector"), [("tdx-today", "#VE"), ("tdx-relocate", "#VE"), ("snp-move", "#VC")]
)
def test_a_page_that_was_not_accepted_is_an_exception(consumer: str, vector: str) -> None:
    """tdx.md §2, snp.md §2: the guest handles it by accepting, if it is lazy; else it is named."""
    engine = engine_with_plugins()
    guest = AnyGuest(engine, consumer)
    caught = refusal(
        engine.read_guest, guest.vm, 0, guest.gpa(2), 8, True, reason=GUEST_EXCEPTION, errno=EFAULT
    )
    assert caught.details.vendor_status.startswith(vector)
    assert caught.details.page == f"gfn {guest.gfn + 2:#x}"
    assert not engine.core.vms.get(guest.vm).vcpu(0).inside
    engine.set_programme(guest.vm, 0, (), lazy_accept=True)
    engine.write_guest(guest.vm, 0, guest.gpa(1) + 4000, bytes(range(200)), True)
    found = engine.read_guest(guest.vm, 0, guest.gpa(1) + 4000, 200, True)
    assert found == bytes(range(200))
    assert engine.core.vms.get(guest.vm).info.state == "finalized"
    engine.close()


def test_an_exception_that_never_ends_is_the_plugins_fault(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that always succeeds on a page that is never accepted: the call comes back."""

    def handled(*_: Any) -> Steps[None]:
        yield from ()

    monkeypatch.setattr(guestio, "take_exception", handled)
    guest = AnyGuest(engine, "tdx-today")
    read = (engine.read_guest, guest.vm, 0, guest.gpa(2), 8, True)
    caught = refusal(*read, reason=PLUGIN_NONSENSE, errno=EIO)
    assert "#VE again and again" in caught.message


def test_a_vm_that_is_lost_says_so(engine: Engine) -> None:
    """A TD that reads tampered memory is gone: what KVM_RUN says with EIO, and ever after."""
    guest = AnyGuest(engine, "tdx-today")
    guest.fill(0, 2, 1)
    src, dst = (int(guest.pfns(page)[0]) for page in (0, 1))
    engine.copy_physical(src, dst, 1, Agent.DEVICE, bus=True)
    dead = {"reason": VM_DEAD, "errno": EIO}
    caught = refusal(engine.read_guest, guest.vm, 0, guest.gpa(1), 8, True, **dead)
    assert "TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE" in caught.message
    refusal(engine.write_guest, guest.vm, 0, guest.gpa(0), b"x", True, **dead)
    assert violations(engine.core) == []


def test_poison_is_ehwpoison(engine: Engine) -> None:
    guest = make_guest(engine, "sw-protected", 4, in_place=False)
    guest.fill(0, PAGE_SIZE, 1)
    engine.poison(guest.pfn(0))
    refusal(engine.read_guest, guest.vm, 0, guest.gpa, 8, True, reason=HW_POISON, errno=EHWPOISON)


def test_before_finalize_nothing_is_read(engine: Engine) -> None:
    guest = make_guest(engine, "tdx-today", 4, finalize=False)
    refusal(engine.read_guest, guest.vm, 0, guest.gpa, 8, True, reason=NOT_FINALIZED, errno=EINVAL)
    assert engine.core.running == set()


def test_a_vcpu_does_one_thing_at_a_time(engine: Engine) -> None:
    """VCPU_BUSY both ways; the access waits for a handler as a run does, and is interrupted so."""
    guest = make_guest(engine, "sw-protected", 4, in_place=False)
    handler = Handler(engine)
    handler.register(guest.file, 0, 4)
    busy = {"reason": VCPU_BUSY, "errno": EBUSY}
    with calls(engine) as call:
        running = call(guest.run, write(guest.gpa, 8, 1))
        handler.one()
        refusal(engine.read_guest, guest.vm, 0, guest.gpa, 8, True, **busy)
        engine.userfault_continue(guest.file, 0, 1, True, handler.session)
        halted(result(running))
        writing = call(engine.write_guest, guest.vm, 0, guest.gpa + 4090, b"x" * 8, True)
        assert handler.one().pgoff == 1
        refusal(engine.run_vcpu, guest.vm, 0, **busy)
        engine.userfault_continue(guest.file, 1, 1, True, handler.session)
        result(writing)
    caught = refusal(
        engine.write_guest, guest.vm, 0, guest.gpa + 2 * PAGE_SIZE - 8, bytes(16), True,
        lambda: True, reason=INTERRUPTED, errno=EINTR,
    )  # fmt: skip
    assert caught.details.progress_pages == 1
    assert engine.read_guest(guest.vm, 0, guest.gpa + 4090, 8, True) == b"x" * 8


# --- plaintext -----------------------------------------------------------------------------------
@pytest.mark.parametrize("consumer", ["tdx-today", "snp-move", "pkvm-today"])
def test_the_bytes_are_with_the_guest_and_nowhere_else(
    make_engine: MakeEngine, consumer: str
) -> None:
    """I24: neither journal, events nor refusals of these calls carry private bytes."""
    engine = make_engine(nframes=4096)
    guest = AnyGuest(engine, consumer)
    guest.accept(0, 4)
    engine.write_guest(guest.vm, 0, guest.gpa(0), CANARY * 256, True)
    assert engine.read_guest(guest.vm, 0, guest.gpa(0) + 32, 32, True) == CANARY
    texts = []
    acts: list[Callable[[], Any]] = [
        lambda: engine.write_guest(guest.vm, 0, guest.gpa(63) + 4000, CANARY * 64, True),
        lambda: engine.write_guest(guest.vm, 0, guest.gpa(0), CANARY, False),
        lambda: engine.read_guest(guest.vm, 0, guest.gpa(0), 1 << 20, True),
    ]
    for act in acts:
        with pytest.raises(RmemError) as caught:
            act()
        texts.append(repr((str(caught.value), caught.value.details)))
    journal = engine.core.journal
    told = pickle.dumps(journal.events_after(0)) + pickle.dumps(
        [record.writes for record in journal.records]
    )
    assert CANARY[:16] not in told
    assert not any("correct horse" in text for text in texts)
    arena = engine.core.controller._arena
    assert CANARY[:16] not in arena.read(pages(0, 4096)).tobytes()


def test_the_search_finds_plain_bytes(make_engine: MakeEngine) -> None:
    """What the test before looks for would be found: a guest without a vendor is plain."""
    engine = make_engine(nframes=4096)
    guest: Guest = make_guest(engine, "null", 4)
    engine.write_guest(guest.vm, 0, guest.gpa, CANARY, True)
    assert CANARY in engine.core.controller._arena.read(pages(0, 4096)).tobytes()


def test_a_programme_sees_what_was_written(engine: Engine) -> None:
    guest = AnyGuest(engine, "snp-move")
    guest.accept(0, 2)
    engine.write_guest(guest.vm, 0, guest.gpa(0), b"\x33" * 2 * PAGE_SIZE, True)
    exited = guest.run(guest.do(Opcode.CHECK, 0, 2, pattern=Pattern.BYTE, value=0x33))
    assert (exited.reason.name, exited.vcpu.mismatched) == ("HLT", 0)
