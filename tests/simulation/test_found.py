"""What simulations found, each as the few calls that showed it."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from guests import Guest, make_engine

from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.memory import MPOL_INTERLEAVE
from rmemd.engine.migrate import Outcome
from rmemd.engine.stepwise import Stepwise, Task
from rmemd.errors import PluginFault
from rmemd.hooks import Agent
from rmemd.model.host import Use
from rmemd.model.sessions import Owner
from rmemd.model.vms import GUEST_MEMFD
from rmemd.units import PAGE_SIZE
from simulation.scenarios import Bench


@pytest.fixture
def stepped(engine: Engine) -> Stepwise:
    engine.core.hold = lambda step: None
    return Stepwise(engine)


def _about_to_scrub() -> tuple[Bench, Stepwise, Task]:
    """Punch a page, and stop before the bytes of its frame are destroyed."""
    bench = Bench()
    bench.core.hold = lambda step: None
    steps = Stepwise(bench.engine)
    task = steps.start(lambda e: e.fallocate(bench.guest.file, 3, 0, PAGE_SIZE))
    while task.step is None or task.step.name != "scrub":
        steps.advance(task)
    return bench, steps, task


def test_a_frame_that_the_system_would_not_destroy_is_tried_again() -> None:
    bench, steps, task = _about_to_scrub()
    bench.system.fail(1, errno.ENOMEM)
    steps.finish()
    assert task.value() == 1
    assert (bench.core.host.use.view == Use.SCRUBBING).sum() == 1
    bench.guest.punch(1)
    bench.require_sound()
    bench.close()


def test_what_the_host_writes_to_a_frame_between_freeing_and_scrubbing_is_destroyed() -> None:
    bench, steps, _ = _about_to_scrub()
    (pfn,) = np.flatnonzero(bench.core.host.use.view == Use.SCRUBBING)
    write = steps.start(lambda e: e.write_physical(int(pfn), b"x" * PAGE_SIZE, Agent.HOST_USER))
    while not write.over:
        steps.advance(write)
    steps.finish()
    assert bench.engine.read_physical(int(pfn), 1, Agent.HOST_USER) == bytes(PAGE_SIZE)
    bench.require_sound()
    bench.close()


def test_a_frame_that_the_host_wrote_to_is_handed_back_as_it_was(engine: Engine) -> None:
    guest = Guest(engine, "sw-protected", npages=2, in_place=False)
    guest.convert(0, 2, private=False)
    engine.pin(guest.file, 0, PAGE_SIZE, "DMA", "device/1")
    free = int(np.flatnonzero(engine.core.host.use.view == Use.FREE)[0])
    engine.write_physical(free, b"x" * PAGE_SIZE, Agent.HOST_USER)
    pinned = engine.core.files.get(guest.file).shared.at(0) - 1
    report = engine.migrate(np.array([pinned]))
    assert [move.outcome for move in report.moves] == [Outcome.BUSY]
    assert check(engine.core) == []


def test_two_faults_on_one_page_both_come_to_an_end(stepped: Stepwise, engine: Engine) -> None:
    guest = Guest(engine, "pkvm-gmem", npages=2)
    faults = [stepped.start(lambda e: e.pre_fault(guest.vm, guest.gpa(0), PAGE_SIZE)) for _ in "ab"]
    for task in faults:
        stepped.advance(task)
    stepped.finish()
    assert [task.value().done_pages for task in faults] == [1, 1]
    assert check(engine.core) == []


def test_a_fault_whose_vm_is_destroyed_holds_nothing(stepped: Stepwise, engine: Engine) -> None:
    guest = Guest(engine, "tdx-today", npages=2)
    task = stepped.start(lambda e: e.pre_fault(guest.vm, guest.gpa(0), PAGE_SIZE))
    stepped.advance(task)
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)
    stepped.finish()
    assert task.error is not None
    assert check(engine.core) == []


def test_a_write_in_place_that_the_system_refuses_has_not_happened() -> None:
    for kind in (("tdx-relocate", False), ("sw-protected", False)):
        bench = Bench(kind)
        write = bench.operations()["guest write"]
        for nth in range(1, 9):
            had = bench.system.struck
            bench.system.fail(nth, errno.ENOSPC)
            try:
                write(bench.engine)
            except OSError:
                assert bench.system.struck > had
                assert bench.guest.holds(0, 4, seed=5)
            else:
                break
        bench.close()


def test_a_slot_is_not_bound_to_a_range_whose_bytes_are_on_their_way(
    stepped: Stepwise, engine: Engine
) -> None:
    guest = Guest(engine, "sw-protected", npages=4, in_place=True)
    guest.allocate(0, 4)
    size = 4 * PAGE_SIZE
    engine.set_memory_region(guest.vm, 0, GUEST_MEMFD, guest.gpa(0), 0)
    task = stepped.start(lambda e: e.convert_file(guest.file, 0, size, 0))
    stepped.advance(task)
    again = (guest.vm, 0, GUEST_MEMFD, guest.gpa(0), size, guest.file)
    binding = stepped.start(lambda e: e.set_memory_region(*again))
    stepped.advance(binding)
    assert binding.blocked
    stepped.finish()
    assert binding.value() is None
    guest.fault(0, 4)
    assert check(engine.core) == []


def test_what_a_client_put_beside_a_private_page_is_no_page(engine: Engine) -> None:
    guest = Guest(engine, "sw-protected", npages=4, in_place=True)
    guest.fault(0)
    guest.convert(1, 1, private=False)
    engine.read_shared(guest.file, PAGE_SIZE, 8)
    memfd = engine.core.shared_memory(engine.core.files.get(guest.file))
    memfd.write(np.array([0, 3]), np.full((2, PAGE_SIZE), 7, dtype=np.uint8))
    guest.convert(0, 4, private=True)
    assert guest.zero(0, 1)
    assert check(engine.core) == []


def test_a_session_whose_vm_would_not_go_can_be_closed_again() -> None:
    bench = Bench()
    owner = Owner("uid:1", bench.session)
    vm = bench.engine.create_vm("tdx-today", owner=owner).info.vm
    file = bench.engine.create_file(vm, PAGE_SIZE).info.file
    bench.engine.set_memory_region(vm, 0, GUEST_MEMFD, 0, PAGE_SIZE, file)
    bench.faulty.fail(1, "raises")
    with pytest.raises(PluginFault):
        bench.engine.close_session(bench.session)
    assert not bench.core.leaving
    bench.engine.close_session(bench.session)
    assert not bench.core.vms.exists(vm)
    bench.close()


def test_an_interleaved_page_that_gets_another_node_is_told_of() -> None:
    engine = make_engine(1024, nnodes=2)
    guest = Guest(engine, "null", npages=2)
    engine.offline(512, 512)
    engine.set_policy(guest.file, 0, 2 * PAGE_SIZE, MPOL_INTERLEAVE, (1,))
    engine.watch()
    guest.allocate(0, 2)
    told = [event for event in engine.core.journal.events_after(0) if event.kind == "numa_fallback"]
    assert [event.fields["npages"] for event in told] == ["2"]
    assert check(engine.core) == []
    engine.close()
