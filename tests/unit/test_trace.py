"""Traces: recorded, done again to the last bit, done otherwise and explained."""

from __future__ import annotations

import base64
import inspect
import io
import os
import sys
import threading
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from guests import Guest, consumers, make_engine
from helpers import MakeEngine, file_of, write
from traced import Recording, assert_same, launch, live, recording

from rmemd.engine import invariants
from rmemd.engine.engine import Engine
from rmemd.engine.programme import Opcode, Pattern
from rmemd.engine.quotas import Limits
from rmemd.errors import FOLIO_BUSY, INTERRUPTED, QUOTA, VM_FROZEN, RmemError
from rmemd.hooks.types import Agent
from rmemd.model import buddy
from rmemd.trace import shrinker
from rmemd.trace.differ import diff
from rmemd.trace.format import VERSION, TraceError, read
from rmemd.trace.operations import AT_ONCE, OPERATIONS
from rmemd.trace.player import Changes
from rmemd.trace.recorder import Recorder
from rmemd.units import PAGE_SIZE

# what only asks, or is about the engine itself
QUERIES = {
    "read", "drain", "close", "get_policy", "on_userfault", "take_userfaults",
    "pending_userfaults", "page", "check", "listed", "watch", "settle",
}  # fmt: skip
SECRET = b"what nobody but the guest may know. "


@pytest.fixture
def host() -> Iterator[Engine]:
    engine = make_engine(4096, nnodes=2)
    yield engine
    engine.close()


def test_every_method_of_the_engine_is_recorded_or_only_asks() -> None:
    public = {
        name for name, one in vars(Engine).items()
        if inspect.isfunction(one) and not name.startswith("_")
    }  # fmt: skip
    assert set(OPERATIONS) | set(AT_ONCE) <= public
    assert public - set(OPERATIONS) - set(AT_ONCE) <= QUERIES


# --- the same again --------------------------------------------------------------------------
@pytest.mark.parametrize("consumer", consumers())
def test_a_replay_comes_to_the_same_state(host: Engine, consumer: str) -> None:
    with recording(host, state_every=10) as found:
        guest = launch(host, consumer)
        live(host, [guest], seed=1, steps=60)
    assert_same(found, host)
    assert found.replayed().states > 5


def test_operations_of_threads_are_interleaved_as_they_were() -> None:
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for seed in range(4):
            host = make_engine(4096, nnodes=2, inline_pages=2)
            with recording(host, state_every=50) as found:
                in_threads(host, seed)
            steps = [line for line in found.trace.lines if "step" in line]
            assert len(steps) > 10
            assert_same(found, host)
            host.close()
    finally:
        sys.setswitchinterval(switching)


def in_threads(host: Engine, seed: int) -> None:
    names = ("tdx-relocate", "snp-move", "sw-protected", "pkvm-gmem", "gup")
    guests = [launch(host, name) for name in names]
    threads = [
        threading.Thread(target=live, args=(host, guests, 10 * seed + n, 20)) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("consumer", ["tdx-today", "snp-move", "pkvm-gmem", "sw-protected"])
def test_a_recording_may_begin_on_a_host_that_has_been_at_work(host: Engine, consumer: str) -> None:
    guest = launch(host, consumer)
    live(host, [guest], seed=2, steps=30)
    with recording(host, state_every=10) as found:
        assert found.recorder.operations == 0
        live(host, [guest], seed=3, steps=40)
        launch(host, consumer)
    assert "checkpoint" in found.trace.header
    assert_same(found, host)


def test_what_was_under_way_at_the_begin_is_in_the_trace_as_writes(host: Engine) -> None:
    guest = launch(host, "tdx-today")
    at, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "guest" and threading.current_thread() is running:
            at.set()
            assert go_on.wait(60)

    programme = (guest.do(Opcode.TOUCH, 8), write(guest.gpa(9), PAGE_SIZE, 5))
    host.set_programme(guest.vm, 0, programme)
    running = threading.Thread(target=host.run_vcpu, args=(guest.vm, 0))
    host.core.hold = hold
    running.start()
    assert at.wait(60)
    with recording(host) as found:
        other = Guest(host, "tdx-today", npages=8)
        with pytest.raises(RmemError, match="running"):
            host.set_programme(guest.vm, 0, ())
        go_on.set()
        running.join()
        host.set_programme(guest.vm, 0, ())
        other.fault(0, 8)
    kinds = {next(iter(line)) for line in found.trace.lines}
    assert {"wrote", "left"} <= kinds
    assert "run_vcpu" not in {one.method for one in found.trace.asked.values()}
    assert_same(found, host)


def test_what_clients_write_in_shared_memory_is_an_input(host: Engine) -> None:
    guest = launch(host, "tdx-today")
    guest.convert(40, 4, private=False)
    with recording(host) as found:
        descriptor = host.shared_descriptor(guest.file, 0, read_only=False)
        os.pwrite(descriptor, b"a device was here", 41 * PAGE_SIZE)
        os.pwrite(descriptor, b"\3" * PAGE_SIZE, 40 * PAGE_SIZE)
        os.close(descriptor)
        assert host.read_shared(guest.file, 41 * PAGE_SIZE, 17) == b"a device was here"
        exited = guest.check(40, 2, 3, private=False, pattern=Pattern.BYTE)
        assert exited.vcpu.mismatched == 1
        guest.convert(40, 4, private=True)
    assert_same(found, host)
    [line] = [line for line in found.trace.lines if "read" in line and line.get("bytes")]
    assert line["file"] == guest.file


def test_a_caller_who_went_away_goes_away_again(host: Engine) -> None:
    guest = launch(host, "tdx-today")
    asked = iter([False] * 4 + [True] * 9)
    with recording(host) as found:
        host.set_programme(guest.vm, 0, (guest.do(Opcode.TOUCH, 8),) * 9)
        exited = host.run_vcpu(guest.vm, 0, cancelled=lambda: next(asked))
    assert exited.reason.name == "INTR"
    assert exited.vcpu.instructions == 5
    assert_same(found, host)


def test_a_hook_that_took_too_long_does_so_again(make_engine: MakeEngine) -> None:
    engine = make_engine(nframes=4096)
    guest = launch(engine, "tdx-today")
    with recording(engine) as found:
        engine.core.guard.overdue.append((guest.vm, "tdx-today(vm/1).map", 9.0))
        with pytest.raises(RmemError) as caught:
            guest.fault(40, 2)
    assert caught.value.reason is VM_FROZEN
    assert_same(found, engine)


def test_rules_and_quotas_are_in_force_again(host: Engine) -> None:
    guest = launch(host, "tdx-today")
    host.add_fault_rule(0, "map", "FOLIO_BUSY", nth=3, times=2)
    host.core.quotas.set(Limits(frames=36))
    with recording(host) as found:
        for page in range(40, 48):
            for action in (guest.fault, guest.allocate):
                try:
                    action(page, 1)
                except RmemError:
                    continue
        host.core.quotas.set(Limits())
        host.remove_fault_rule(host.add_fault_rule(0, "map", "FOLIO_BUSY").rule)
        guest.allocate(50, 10)
    reasons = {line["refused"]["reason"] for line in found.trace.lines if "refused" in line}
    assert QUOTA.name in reasons
    assert_same(found, host)


def test_a_guest_finds_what_it_found_of_bytes_that_the_host_put_back(host: Engine) -> None:
    guest = launch(host, "snp-move")
    pfn = int(guest.frames(8)[0])
    with recording(host) as found:
        before = host.read_physical(pfn, 1, Agent.HOST_KERNEL, bus=True)
        host.write_physical(pfn, bytes(PAGE_SIZE), Agent.HOST_KERNEL, bus=True)
        host.write_physical(pfn, before, Agent.HOST_KERNEL, bus=True)
        assert guest.holds(8, 1, 7)
    assert_same(found, host)


def test_an_operation_without_an_end_is_left_where_it_was(host: Engine) -> None:
    guest = launch(host, "tdx-today")
    host.set_programme(guest.vm, 0, (guest.do(Opcode.TOUCH, 8),) * 4)
    recorder = Recorder(host)
    recorder.start()
    host.core.breathe = recorder.stop
    host.run_vcpu(guest.vm, 0)
    found = Recording(recorder)
    found.data = recorder.sink.read(0, recorder.sink.size)
    done = found.replayed()
    assert (done.unfinished, done.divergences) == (1, ())


def test_an_engine_is_as_it_was_once_a_recording_has_ended(host: Engine) -> None:
    before = dict(vars(host))
    with recording(host):
        assert "migrate" in vars(host)
        assert host.core.tracer is not None
    assert vars(host) == before
    assert host.core.tracer is None


def test_a_recording_waits_for_bytes_that_are_under_way(host: Engine) -> None:
    guest = launch(host, "tdx-relocate")
    holding, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "migrate":
            holding.set()
            assert go_on.wait(60)

    host.core.hold = hold
    moving = threading.Thread(target=host.migrate, args=(guest.frames(8, 8),))
    moving.start()
    assert holding.wait(60)
    recorder = Recorder(host)
    with pytest.raises(RmemError) as caught:
        recorder.start(cancelled=lambda: True)
    assert caught.value.reason is INTERRUPTED
    beginning = threading.Thread(target=recorder.start)
    beginning.start()
    go_on.set()
    beginning.join()
    moving.join()
    recorder.stop()
    host.core.hold = None
    recorder.sink.close()


# --- something else --------------------------------------------------------------------------
def moved(host: Engine, consumer: str) -> Recording:
    """Record a guest whose pages somebody wants to move."""
    with recording(host) as found:
        guest = launch(host, consumer)
        guest.convert(40, 4, private=False)
        host.migrate(guest.frames(8, 4))
    return found


@pytest.mark.parametrize(
    ("recorded", "instead", "words"),
    [
        ("tdx-today", "tdx-relocate", "migrate_folio: NULL in tdx-today, yes in tdx-relocate"),
        ("tdx-relocate", "tdx-today", "migrate_folio: yes in tdx-relocate, NULL in tdx-today"),
        ("snp-swap-disable", "snp-move", "migrate_folio: NULL in snp-swap-disable, yes in snp"),
    ],
)
def test_another_variant_diverges_where_the_tables_do(
    host: Engine, recorded: str, instead: str, words: str
) -> None:
    found = moved(host, recorded)
    done = found.replayed(Changes({recorded: instead}))
    [divergence] = done.divergences
    assert divergence.asked is not None
    assert (divergence.asked.method, divergence.what) == ("migrate", "outcome")
    assert words in divergence.text
    assert "FOLIO_UNMOVABLE (EOPNOTSUPP)" in divergence.text
    assert "4 moved" in divergence.text
    assert f"was {recorded} and is {instead} now" in divergence.text
    assert "gfn 0x108" in divergence.text
    same_for_all = found.replayed(Changes({"*": instead}))
    assert same_for_all.divergences == done.divergences


def test_a_pin_is_named_as_the_holder(host: Engine) -> None:
    found = moved(host, "pkvm-gmem")
    [divergence] = found.replayed(Changes({"pkvm-gmem": "pkvm-today"})).divergences
    assert "pin: NULL in pkvm-gmem, yes in pkvm-today" in divergence.text
    assert "held by vm/1" in divergence.text


def test_keeping_going_lists_every_divergence(host: Engine) -> None:
    with recording(host) as found:
        guest = launch(host, "tdx-today")
        for page in (8, 10, 12):
            host.migrate(guest.frames(page, 2))
    changes = Changes({"tdx-today": "tdx-relocate"})
    assert len(found.replayed(changes).divergences) == 1
    every = found.replayed(changes, keep_going=True).divergences
    assert [one.asked.method for one in every if one.asked] == ["migrate"] * 3


def test_the_kernel_s_release_is_an_option(host: Engine) -> None:
    with recording(host) as found:
        guest = Guest(host, "tdx-today", npages=8)
        with pytest.raises(RmemError):
            host.set_memory_region(guest.vm, 1, 4, 1 << 30, PAGE_SIZE, file=guest.file)
    assert found.trace.header["linux_release"] == "6.18"
    [divergence] = found.replayed(Changes(options={"binding_overlap_errno": 17})).divergences
    assert "EINVAL" in divergence.text
    assert "EEXIST" in divergence.text


def test_a_vm_that_was_there_is_swapped_to_the_variant(host: Engine) -> None:
    guest = launch(host, "tdx-today")
    with recording(host) as found:
        host.migrate(guest.frames(8, 4))
    [divergence] = found.replayed(Changes({"tdx-today": "tdx-relocate"})).divergences
    assert "migrate_folio: NULL in tdx-today, yes in tdx-relocate" in divergence.text
    with pytest.raises(TraceError, match="cannot become snp-move"):
        found.replayed(Changes({"tdx-today": "snp-move"}))


def test_other_code_is_found_out_by_its_writes(
    host: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = moved(host, "tdx-relocate")
    real = buddy.take
    monkeypatch.setattr(buddy, "take", lambda *args, **kwargs: real(*args, **kwargs)[::-1].copy())
    [divergence] = found.replayed().divergences
    assert divergence.what in ("outcome", "writes")


# --- side by side ----------------------------------------------------------------------------
def test_two_recordings_of_the_same_do_not_differ() -> None:
    found = []
    for _ in range(2):
        host = make_engine(4096, nnodes=2)
        found.append(moved(host, "tdx-today").trace)
        host.close()
    assert diff(*found) == []


def test_a_diff_says_what_was_asked_in_one_and_what_came_of_it_in_both() -> None:
    found = []
    for rule in (False, True):
        host = make_engine(4096, nnodes=2)
        with recording(host) as one:
            guest = launch(host, "tdx-relocate")
            if rule:
                host.add_fault_rule(guest.vm, "migrate_folio", "FOLIO_BUSY")
            host.migrate(guest.frames(8, 2))
        found.append(one.trace)
        host.close()
    differences = diff(*found)
    assert [one.kind for one in differences] == ["only", "outcome"]
    assert "add_fault_rule" in differences[0].text
    assert "2 moved" in differences[1].text
    assert "FOLIO_BUSY" in differences[1].text


def test_a_diff_tells_turns_that_were_taken_otherwise(host: Engine) -> None:
    with recording(host) as found:
        launch(host, "tdx-today")
    one, other = found.trace, found.trace
    at = next(i for i, line in enumerate(other.lines) if "step" in line)
    other.lines.insert(at, other.lines[at])
    [difference] = diff(one, other)
    assert difference.kind == "interleaving"


# --- the least of it -------------------------------------------------------------------------
def test_a_refusal_is_shrunk_to_what_it_needs(host: Engine) -> None:
    with recording(host) as found:
        other = launch(host, "snp-move")
        guest = launch(host, "tdx-relocate")
        live(host, [other], seed=4, steps=20)
        guest.convert(8, 8, private=False)
        host.pin(guest.file, 8 * PAGE_SIZE, PAGE_SIZE, "DMA", "a device")
        guest.punch(20, 4)
        host.migrate(np.array([file_of(host, guest.file).shared.at(8) - 1]))
    done = shrinker.shrink(found.trace, shrinker.refusal(FOLIO_BUSY.name, Changes()))
    methods = [one.method for one in done.trace.asked.values()]
    made = [one for one in done.trace.asked.values() if one.method == "create_vm"]
    assert [one.args["consumer"] for one in made] == ["tdx-relocate"]
    assert made[0].number != 1
    assert methods[-2:] == ["pin", "migrate"]
    assert len(methods) <= 6
    assert shrinker.refusal(FOLIO_BUSY.name, Changes())(done.trace)
    again = read(io.BytesIO(done.trace.dump()))
    assert list(again.asked) == list(done.trace.asked)


def test_a_divergence_is_shrunk_to_what_it_needs(host: Engine) -> None:
    with recording(host) as found:
        guest = launch(host, "tdx-today")
        live(host, [guest], seed=5, steps=10)
        host.migrate(guest.frames(8, 4))
    changes = Changes({"tdx-today": "tdx-relocate"})
    shows = shrinker.divergence(found.trace, changes)
    done = shrinker.shrink(found.trace, shows)
    methods = [one.method for one in done.trace.asked.values()]
    assert methods[0] == "create_vm"
    assert methods[-1] in ("compact", "migrate")
    assert len(methods) < 10 < done.before
    for left_out in done.trace.asked:
        assert not shows(done.trace.only(set(done.trace.asked) - {left_out}))


def test_a_violation_is_shrunk_to_what_it_needs(
    host: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording(host) as found:
        guest = launch(host, "tdx-today")
        guest.punch(8, 4)
    monkeypatch.setattr(
        invariants, "check",
        lambda core: ["I3: planted"] if core.files.all() and core.vms.all() else [],
    )  # fmt: skip
    done = shrinker.shrink(found.trace, shrinker.violation("I3", Changes()))
    assert [one.method for one in done.trace.asked.values()] == ["create_vm", "create_file"]


def test_what_a_trace_does_not_show_it_is_not_shrunk_to(host: Engine) -> None:
    found = moved(host, "tdx-today").trace
    with pytest.raises(TraceError, match="does not show"):
        shrinker.shrink(found, shrinker.refusal("NO_FRAMES", Changes()))
    with pytest.raises(TraceError, match="nothing diverges"):
        shrinker.divergence(found, Changes({"snp-move": "snp-swap-disable"}))


# --- the file --------------------------------------------------------------------------------
def test_a_newer_version_is_refused_by_name(host: Engine) -> None:
    trace = moved(host, "tdx-today").trace
    trace.header["version"] = VERSION + 1
    with pytest.raises(TraceError, match=f"version {VERSION + 1}.*reads up to {VERSION}"):
        read(io.BytesIO(trace.dump()))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no header"),
        (b"\x00\xff\x00", "no header"),
        (b'{"format":"other"}\n', "no header"),
        (b'{"format":"rmem-trace","version":"1"}\n', "version 1"),
        (b'{"format":"rmem-trace","version":1}\n', "damaged"),
        (b'{"format":"rmem-trace","version":1,"options":{"nframes":"x"}}\n', "damaged"),
        (
            b'{"format":"rmem-trace","version":1,"options":{"nframes":512}}\n{"step":3,"at":"x"}\n',
            "operation 3 never began",
        ),
    ],
)
def test_what_is_no_trace_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(TraceError, match=words):
        read(io.BytesIO(data))


def test_a_file_that_was_cut_counts_as_far_as_it_goes(host: Engine) -> None:
    found = moved(host, "tdx-today")
    whole = found.trace
    assert not whole.truncated
    for cut in range(len(found.data) - 1, len(found.data) - 2500, -97):
        found.data = found.data[:cut]
        assert found.trace.truncated
        assert found.replayed().divergences == ()
    assert len(found.trace.lines) < len(whole.lines)


def test_a_trace_that_is_full_has_an_end(host: Engine) -> None:
    with recording(host, limit_bytes=20_000) as found:
        launch(host, "tdx-today")
        live(host, [Guest(host, "gup", npages=64)], seed=1, steps=60)
        assert host.core.tracer is None
    assert len(found.data) < 20_100
    assert found.trace.stop == "full"
    assert not found.trace.truncated
    assert found.replayed().divergences == ()


def test_it_ends_before_the_engine_drains(host: Engine) -> None:
    with recording(host) as found:
        host.drain()
    assert found.trace.stop == "drained"
    assert host.core.draining


# --- what is not in it -----------------------------------------------------------------------
@pytest.mark.parametrize("late", [False, True], ids=["fresh", "checkpoint"])
def test_private_bytes_are_not_in_a_trace(host: Engine, late: bool) -> None:
    def lead() -> None:
        guest = Guest(host, "tdx-today", npages=64, finalized=False)
        image = (SECRET * 200)[:PAGE_SIZE]
        guest.populate(0, image)
        host.finalize(guest.vm)
        guest.accept(8, 8)
        host.write_guest(guest.vm, 0, guest.gpa(8) + 100, SECRET * 300, True)
        assert SECRET in host.read_guest(guest.vm, 0, guest.gpa(8), PAGE_SIZE, True)
        guest.convert(40, 1, private=False)
        host.write_guest(guest.vm, 0, guest.gpa(40), b"what anybody may know", False)
        host.read_guest(guest.vm, 0, guest.gpa(40), 64, False)

    if late:
        lead()
    with recording(host) as found:
        lead()
    for data in unpacked(found):
        assert SECRET[:8] not in data
    assert any(b"what anybody may know" in data for data in unpacked(found))
    assert_same(found, host)


def unpacked(found: Recording) -> list[bytes]:
    """Return a trace as it lies there, and all that is packed in it."""
    texts = [
        text
        for line in [found.trace.header.get("checkpoint", {}), *found.trace.lines]
        for key in ("state", "record", "data")
        if isinstance(text := line.get(key), str) and len(text) > 16
    ]
    return [found.data, *(zlib.decompress(base64.b64decode(text)) for text in texts)]


def test_digests_of_two_recordings_say_nothing_of_each_other(host: Engine) -> None:
    guest = launch(host, "tdx-today")
    pages = []
    for _ in range(2):
        recorder = Recorder(host)
        recorder.start()
        host.write_guest(guest.vm, 0, guest.gpa(8), b"x" * 64, True)
        recorder.stop()
        data = recorder.sink.read(0, recorder.sink.size)
        [line] = [line for line in read(io.BytesIO(data)).lines if "begin" in line]
        pages.append(line["args"]["data"]["pages"])
    assert pages[0] != pages[1]


def test_steps_have_their_names(host: Engine) -> None:
    with recording(host) as found:
        launch(host, "tdx-today")
    assert "guest" in {line["at"] for line in found.trace.lines if "step" in line}
