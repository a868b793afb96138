"""A state had back after a kill: what was told is there, what was half done is not, bytes agree."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from acts import INSTALLED, PAGES, act, arena
from guests import Guest
from helpers import write
from keeping import Kept, Page, held_pages, kept_engine, reopened, unsettled

from rmemd.engine import reopen
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.journal import Journal
from rmemd.engine.notes import Notes
from rmemd.engine.programme import Opcode
from rmemd.errors import RmemError
from rmemd.hooks.tables import Space, same_state
from rmemd.hooks.types import Agent
from rmemd.model.sessions import Owner
from rmemd.model.vms import GUEST_MEMFD
from rmemd.store.codec import JournalUnreadable
from rmemd.store.keeping import JOURNALS, Keeping
from rmemd.store.system import System
from rmemd.units import PAGE_SIZE


@pytest.fixture
def engine(kept: Kept) -> Iterator[Engine]:
    made = kept_engine(kept, nnodes=2)
    yield made
    made.close()


def _state_in_log(fds: dict[str, int]) -> tuple[Space, Journal]:
    """Return the state that a log has, before anything is made to agree with it."""
    opened = reopen.open_log("", {}, Keeping({name: fds[name] for name in JOURNALS}), True)
    space, journal = Space(), Journal()
    assert reopen.read(opened, space, journal, Notes(journal, _no_lock())) is not None
    assert opened.log is not None
    opened.log.close()
    return space, journal


def _no_lock() -> Any:
    import threading

    return threading.Condition()


def _close(fds: dict[str, int]) -> None:
    for fd in fds.values():
        os.close(fd)


def _after_each_frame(engine: Engine, look: Callable[[], None]) -> None:
    """Have ``look`` called whenever a frame was written: a kill could come there."""
    log = engine.core.journal._log
    assert log is not None
    append = log.append

    def and_look(payload: bytes) -> None:
        append(payload)
        look()

    log.append = and_look  # type: ignore[method-assign]


def test_after_every_frame_the_log_has_the_state(engine: Engine, kept: Kept) -> None:
    """I19: what is had back is what a prefix of the records makes, all of those that count."""
    # an act takes an assertion for a guest's
    looks: list[list[str]] = []

    def look() -> None:
        fds = {name: os.dup(fd) for name, fd in kept.fds.items() if name in JOURNALS}
        copied = Kept(fds).copied()
        space, journal = _state_in_log(copied)
        differ = same_state(space.snapshot(), engine.core.space.snapshot())
        looks.append([*differ, *(["revision"] if journal.revision != engine.revision else [])])
        _close(fds)

    guests = [Guest(engine, name, PAGES) for name in INSTALLED[:3]]
    _after_each_frame(engine, look)
    rng = random.Random(3)
    for _ in range(100):
        act(engine, guests, rng)
    assert len(looks) > 60
    assert not any(looks)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_frame_state_and_memory_agree(engine: Engine, kept: Kept, seed: int) -> None:
    # an act takes an assertion for a guest's
    found: list[Any] = []
    wrong: list[str] = []

    def look() -> None:
        after = reopened(kept)
        wrong.extend((*check(after.core), *unsettled(after)))
        found.append(after.recovered)
        after.close()

    rng = random.Random(seed)
    guests = [Guest(engine, rng.choice(INSTALLED), PAGES) for _ in range(2)]
    _after_each_frame(engine, look)
    for _ in range(25):
        act(engine, guests, rng)
    assert wrong == []
    assert len(found) > 10


def test_reopened_the_engine_is_the_same_and_goes_on_the_same(engine: Engine, kept: Kept) -> None:
    rng = random.Random(5)
    guests = [Guest(engine, name, PAGES) for name in INSTALLED]
    for _ in range(200):
        act(engine, guests, rng)
    after = reopened(kept)
    assert same_state(after.core.space.snapshot(), engine.core.space.snapshot()) == []
    assert arena(after) == arena(engine)
    ours = [guest for guest in guests if engine.core.vms.exists(guest.vm)]
    theirs = [_twin(guest, after) for guest in ours]
    one, other = random.Random(6), random.Random(6)
    for _ in range(100):
        act(engine, ours, one)
        act(after, theirs, other)
    assert after.revision == engine.revision
    assert same_state(after.core.space.snapshot(), engine.core.space.snapshot()) == []
    assert arena(after) == arena(engine)
    after.close()


# --- a kill at every system call that moves bytes -------------------------------------------------
class Killed(System):
    """The running kernel, with a moment before and after each call that changes a memfd."""

    def __init__(self) -> None:
        self.look: Callable[[], None] = lambda: None

    def write(self, fd: int, view: memoryview, offset: int) -> int:
        self.look()
        # a kill can end it after any page
        half = (offset + view.nbytes // 2) // PAGE_SIZE * PAGE_SIZE - offset
        n = super().write(fd, view[:half] if half > 0 else view, offset)
        self.look()
        return n

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self.look()
        super().fallocate(fd, mode, offset, length)
        self.look()


NPAGES = 16
A, B = 1, 2
KINDS = (
    "null", "gup", "tdx-relocate", "snp-move", "pkvm-gmem", "sw-protected", "tdx-relocate in place",
    "snp-move in place",
)  # fmt: skip
Act = Callable[[Guest], object]
ACTS: dict[str, tuple[Act, ...]] = {
    "write": (lambda g: g.write(2, 12, B),),
    "write parts": (lambda g: g.run(write(g.gpa(2) + 9, 3 * PAGE_SIZE, 7, g.private)),),
    "migrate": (lambda g: g.engine.migrate(g.frames(0, NPAGES)),),
    "punch": (lambda g: g.punch(4, 8), lambda g: g.fault(4, 8)),
    "destroy": (lambda g: g.engine.destroy_vm(g.vm), lambda g: g.engine.close_file(g.file)),
    "convert": (
        lambda g: g.convert(0, NPAGES, False),
        lambda g: g.engine.write_shared(g.file, 0, b"b" * NPAGES * PAGE_SIZE),
        lambda g: g.punch(3, 2),
        lambda g: g.convert(0, NPAGES, True),
    ),
    "physical": (
        lambda g: g.engine.write_physical(int(g.frames(1)[0]), b"b" * PAGE_SIZE, Agent.HOST_KERNEL),
    ),
}


@pytest.mark.parametrize("filled", [True, False], ids=["written", "zero"])
@pytest.mark.parametrize("act_name", ACTS)
@pytest.mark.parametrize("name", KINDS)
def test_killed_at_any_system_call_each_page_is_old_or_new(
    kept: Kept, name: str, act_name: str, filled: bool
) -> None:
    """Each page is as before what was under way, or as after it: never torn, lost or both."""
    system = Killed()
    engine = kept_engine(kept, nframes=1024, system=system)
    consumer, _, in_place = name.partition(" ")
    guest = Guest(engine, consumer, NPAGES, in_place=bool(in_place) or None)
    guest.fault(0, NPAGES)
    if filled and guest.private:
        guest.fill(0, NPAGES, A)
    moments: list[list[Page]] = []
    wrong: list[str] = []

    def look() -> None:
        after = reopened(kept)
        wrong.extend((*check(after.core), *unsettled(after)))
        moments.append(held_pages(after, guest.file, guest.vm, NPAGES))
        after.close()

    for step in ACTS[act_name]:
        before = held_pages(engine, guest.file, guest.vm, NPAGES)
        moments.clear()
        system.look = look
        with suppress(RmemError):
            step(guest)
        system.look = lambda: None
        ended = held_pages(engine, guest.file, guest.vm, NPAGES)
        for moment in moments:
            for page, found, old, new in zip(range(NPAGES), moment, before, ended, strict=True):
                if found not in (old, new):
                    wrong.append(f"page {page}: {found}, was {old}, becomes {new}")
    assert wrong == []
    engine.close()


# --- consumers ------------------------------------------------------------------------------------
def test_a_td_that_is_being_built_is_measured_on(engine: Engine, kept: Kept) -> None:
    """A running hash cannot be written down; the consumer takes it up again (its resume)."""
    whole, cut = (Guest(engine, "tdx-today", NPAGES, finalized=False) for _ in range(2))
    first, rest = b"f" * 4 * PAGE_SIZE, b"r" * 3 * PAGE_SIZE
    for guest in (whole, cut):
        guest.populate(0, first)
    after = reopened(kept)
    assert after.recovered is not None
    assert after.recovered.lost == ()
    engine.populate(whole.vm, whole.gpa(4), rest)
    after.populate(cut.vm, cut.gpa(4), rest)
    assert after.finalize(cut.vm) == engine.finalize(whole.vm)
    after.close()


def test_a_consumer_that_cannot_resume_does_not_stop_the_others(
    engine: Engine, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(engine, "tdx-today", NPAGES)
    Guest(engine, "null", NPAGES)

    def fail(*_: Any) -> str:
        raise ValueError

    monkeypatch.setattr("rmemd_tdx.measurement.resume", fail)
    after = reopened(kept)
    assert after.recovered is not None
    assert [text.partition(":")[0] for text in after.recovered.lost] == [f"vm/{guest.vm}"]
    assert "PLUGIN_RAISED" in after.recovered.lost[0]
    assert len(after.core.vms.all()) == 2
    after.close()


# --- what is not there any more -------------------------------------------------------------------
def test_memory_that_was_lost_is_said_to_be(engine: Engine, kept: Kept) -> None:
    """I20: a descriptor that is missing is an object that is lost, and it says so itself."""
    private, shared = Guest(engine, "snp-move", NPAGES), Guest(engine, "sw-protected", NPAGES)
    untouched = Guest(engine, "null", NPAGES)
    private.fill(0, 2, 1)
    shared.convert(0, 2, False)
    engine.write_shared(shared.file, 0, b"x" * PAGE_SIZE)
    fds = kept.copied()
    os.close(fds.pop("arena"))
    os.close(fds.pop(f"file.{shared.file}"))
    after = kept_engine(Kept(fds))
    assert after.recovered is not None
    assert set(after.recovered.lost) == {f"vm/{private.vm}", f"file/{shared.file}"}
    states = {vm.info.vm: vm.info.state for vm in after.core.vms.all()}
    assert states[private.vm] == states[shared.vm] == "dead"
    assert states[untouched.vm] != "dead"
    after.close()


def test_a_descriptor_of_nothing_is_let_go(engine: Engine, kept: Kept) -> None:
    guest = Guest(engine, "sw-protected", NPAGES)
    guest.convert(0, 2, False)
    engine.write_shared(guest.file, 0, b"x")
    fds = kept.copied()
    fds["file.77"] = os.dup(fds[f"file.{guest.file}"])
    keeper = Kept(fds)
    after = kept_engine(keeper)
    assert "file.77" not in keeper.fds
    assert f"file.{guest.file}" in keeper.fds
    assert after.recovered is not None
    assert after.recovered.lost == ()
    after.close()


# --- exactly once ---------------------------------------------------------------------------------
ONCE: dict[str, Callable[[Engine, Guest], object]] = {
    "create_vm": lambda e, g: e.create_vm("null").info.vm,
    "create_file": lambda e, g: e.create_file(g.vm, PAGE_SIZE).info.file,
    "destroy_vm": lambda e, g: e.destroy_vm(g.vm),
    "close_file": lambda e, g: e.close_file(g.file),
    "punch": lambda e, g: g.punch(0, 3),
    "allocate": lambda e, g: g.allocate(4, 3),
    "pin": lambda e, g: e.pin(g.file, 8 * PAGE_SIZE, PAGE_SIZE, "DMA", "device/1"),
    "open_session": lambda e, g: e.open_session("uid:1", "host", "lease").session,
    "poison": lambda e, g: e.poison(int(g.frames(0)[0])),
    "run_vcpu": lambda e, g: e.run_vcpu(g.vm, 0).reason.name,
    "swap": lambda e, g: e.swap_consumer(g.vm, "null"),
}


@pytest.mark.parametrize("name", ONCE)
def test_a_call_that_is_repeated_after_a_kill_is_not_made_twice(
    engine: Engine, kept: Kept, name: str
) -> None:
    """I21: the client was not answered, and asks again."""
    guest = Guest(engine, "null", NPAGES)
    guest.allocate(0, 3)
    guest.fault(8, 1)
    engine.set_programme(guest.vm, 0, (guest.do(Opcode.TOUCH, 8),))
    with engine.core.calls.of(("uid:1", 0, "id")):
        first = ONCE[name](engine, guest)
    after = reopened(kept)
    revision = after.revision
    with after.core.calls.of(("uid:1", 0, "id")):
        assert repr(ONCE[name](after, _twin(guest, after))) == repr(first)
    assert after.revision == revision
    after.core.calls.forget(("uid:1", 0, "id"))
    assert [run for run, _ in after.core.notes.items("results") if run[2] == "id"] == []
    after.close()


def _twin(guest: Guest, engine: Engine) -> Guest:
    """Return the same guest, of an engine that was reopened."""
    twin = object.__new__(Guest)
    twin.__dict__.update(guest.__dict__, engine=engine)
    return twin


def test_a_file_whose_close_was_cut_off_at_any_frame_is_closed_once(
    engine: Engine, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shared memory goes after the frame that tells what came of it, and not before."""
    guest = Guest(engine, "sw-protected", NPAGES)
    guest.convert(0, NPAGES, private=False)
    engine.write_shared(guest.file, 0, b"x" * 3 * PAGE_SIZE)
    moments: list[Engine] = []

    def drop(name: str) -> None:
        Kept.drop(kept, name)
        moments.append(reopened(kept))

    monkeypatch.setattr(kept, "drop", drop)
    _after_each_frame(engine, lambda: moments.append(reopened(kept)))
    with engine.core.calls.of(("id",)):
        freed = engine.close_file(guest.file)
    assert len(moments) >= 2
    for after in moments:
        with after.core.calls.of(("id",)):
            assert after.close_file(guest.file) == freed
        assert not after.core.files.exists(guest.file)
        assert after.recovered is not None
        assert after.recovered.lost == ()
        after.close()


def test_another_call_is_made(engine: Engine, kept: Kept) -> None:
    with engine.core.calls.of(("uid:1", 0, "id")):
        first = engine.create_vm("null").info.vm
    after = reopened(kept)
    with after.core.calls.of(("uid:1", 0, "another")):
        assert after.create_vm("null").info.vm != first
    after.close()


def test_a_populate_that_was_cut_off_goes_on(engine: Engine, kept: Kept) -> None:
    """A page cannot be added to a TD twice: the repeat adds those that are missing."""
    guest = Guest(engine, "tdx-today", 1200, finalized=False)
    data = b"p" * guest.npages * PAGE_SIZE
    whole = Guest(engine, "tdx-today", 1200, finalized=False)
    whole.populate(0, data)
    moments = []

    def hold(step: str) -> None:
        moments.append(reopened(kept))

    engine.core.hold = hold
    with engine.core.calls.of(("id",)):
        assert guest.populate(0, data) == guest.npages
    engine.core.hold = None
    assert len(moments) >= 3
    for after in moments:
        with after.core.calls.of(("id",)):
            assert _twin(guest, after).populate(0, data) == guest.npages
        assert after.finalize(guest.vm) == after.finalize(whole.vm)
        after.close()


# --- a log that was begun anew --------------------------------------------------------------------
@pytest.mark.parametrize("bytes_before", [1, 5000])
def test_a_log_that_is_begun_anew_again_and_again_has_the_state(
    engine: Engine, kept: Kept, monkeypatch: pytest.MonkeyPatch, bytes_before: int
) -> None:
    monkeypatch.setattr("rmemd.engine.journal.CHECKPOINT_BYTES", bytes_before)
    monkeypatch.setattr("rmemd.engine.journal.CHECKPOINT_RATIO", 0)
    log = engine.core.journal._log
    assert log is not None
    rng = random.Random(8)
    guests = [Guest(engine, name, PAGES) for name in INSTALLED]
    generation, turns = log.generation, 0
    for number in range(80):
        act(engine, guests, rng)
        turns += log.generation != generation
        generation = log.generation
        if number % 10 == 0:
            after = reopened(kept)
            assert same_state(after.core.space.snapshot(), engine.core.space.snapshot()) == []
            assert after.revision == engine.revision
            assert arena(after) == arena(engine)
            seen = after.core.journal.oldest_revision()
            told = after.core.journal.events_after(seen)
            assert told == engine.core.journal.events_after(seen)
            after.close()
    assert turns > 5


def test_notes_and_results_outlive_a_log_that_is_begun_anew(engine: Engine, kept: Kept) -> None:
    for key in (1, 2, 3):
        engine.core.notes.set("kind", key, f"value {key}")
    engine.core.notes.drop("kind", 1)
    with engine.core.calls.of(("id",)):
        made = engine.create_vm("null").info.vm
    with engine.core.locked():
        engine.core.journal.begin_generation()
    engine.core.notes.drop("kind", 3, flush=True)
    after = reopened(kept)
    assert after.core.notes.items("kind") == [(2, "value 2")]
    with after.core.calls.of(("id",)):
        assert after.create_vm("null").info.vm == made
    assert len(after.core.vms.all()) == 1
    after.close()


def test_without_room_in_the_log_nothing_is_done(
    engine: Engine, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room is had before the commit: nothing is in memory that no frame could hold."""

    class Full(System):
        def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    guest = Guest(engine, "null", NPAGES)
    before, revision = engine.core.space.snapshot(), engine.revision
    with monkeypatch.context() as patched:
        patched.setattr("rmemd.store.log.RESERVE_BYTES", 0)
        # past what was had before
        patched.setattr(engine.core.journal._log._pen, "_reserved", 0)  # type: ignore[union-attr]
        patched.setattr("rmemd.store.log.SYSTEM", Full())
        with pytest.raises(OSError, match="No space left"):
            guest.allocate(0, 4)
    assert same_state(engine.core.space.snapshot(), before) == []
    assert engine.revision == revision
    assert guest.allocate(0, 4) == 4
    after = reopened(kept)
    assert same_state(after.core.space.snapshot(), engine.core.space.snapshot()) == []
    after.close()


def test_a_write_in_place_is_undone_though_its_record_makes_the_log_long(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint between the record and the bytes would forget what tells if they came."""
    monkeypatch.setattr("rmemd.engine.journal.CHECKPOINT_BYTES", 1)
    monkeypatch.setattr("rmemd.engine.journal.CHECKPOINT_RATIO", 0)
    system = Killed()
    engine = kept_engine(kept, system=system)
    guest = Guest(engine, "tdx-today", NPAGES)
    guest.fill(0, 2, A)
    moments = []
    system.look = lambda: moments.append(reopened(kept))
    guest.write(0, 1, B)
    system.look = lambda: None
    assert moments
    for after in moments:
        twin = _twin(guest, after)
        assert twin.holds(0, 1, A) or twin.holds(0, 1, B)
        assert twin.holds(1, 1, A)
        after.close()
    engine.close()


def test_a_session_whose_end_was_cut_off_is_ended_and_its_end_is_answered(
    engine: Engine, kept: Kept
) -> None:
    """The repeat is told what the first would have been, though a restart did the rest."""
    session = engine.open_session("uid:1", "host", "lease").session
    owner = Owner("uid:1", session)
    vm = engine.create_vm("tdx-today", owner=owner).info.vm
    size = NPAGES * PAGE_SIZE
    file = engine.create_file(vm, size).info.file
    engine.set_memory_region(vm, 0, GUEST_MEMFD, 0, size, file)
    engine.create_vcpu(vm, 0)
    engine.populate(vm, 0, b"p" * size)
    engine.get_pages(file, 0, 4 * PAGE_SIZE, owner)
    moments: list[Engine] = []
    _after_each_frame(engine, lambda: moments.append(reopened(kept)))
    with engine.core.calls.of(("id",)):
        closed = engine.close_session(session)
    assert closed.released_pages == 4
    assert len(moments) >= 2
    for after in moments:
        assert not after.core.sessions.exists(session)
        assert not after.core.vms.exists(vm)
        with after.core.calls.of(("id",)):
            assert after.close_session(session) == closed
        after.close()


def test_a_log_of_which_nothing_is_left_is_not_taken_for_a_new_one(
    engine: Engine, kept: Kept
) -> None:
    """Guests' pages are in the arena: to begin anew beside them would be a guess."""
    Guest(engine, "null", NPAGES).fault(0, 4)
    fds = kept.copied()
    generation = engine.core.journal._log.generation  # type: ignore[union-attr]
    os.pwrite(fds[JOURNALS[generation % 2]], b"\xff\xff", 1)
    with pytest.raises(JournalUnreadable, match="damaged"):
        kept_engine(Kept(fds))
    _close({name: fds[name] for name in JOURNALS})


@pytest.mark.parametrize("how", ["destroy_vm", "delete_slot"])
def test_memory_behind_a_slot_goes_with_it_however_it_is_cut_off(
    engine: Engine, kept: Kept, how: str
) -> None:
    vm = engine.create_vm("gup").info.vm
    engine.set_memory_region(vm, 0, 0, 0, 4 * PAGE_SIZE)
    (file,) = engine.core.files.all()
    engine.write_shared(file.info.file, 0, b"x" * PAGE_SIZE)
    moments: list[Engine] = []
    _after_each_frame(engine, lambda: moments.append(reopened(kept)))
    end: Callable[[Engine], object] = (
        (lambda e: e.destroy_vm(vm))
        if how == "destroy_vm"
        else (lambda e: e.set_memory_region(vm, 0, 0, 0, 0))
    )
    with engine.core.calls.of(("id",)):
        end(engine)
    assert moments
    for after in moments:
        assert after.core.files.all() == []
        with after.core.calls.of(("id",)):
            end(after)
        after.close()
