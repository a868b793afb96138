"""What meets a range whose bytes are under way waits for it, whoever it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guests import Guest, make_engine

from rmemd.engine.engine import Engine
from rmemd.engine.stepwise import Stepwise
from rmemd.units import PAGE_SIZE


@pytest.fixture
def host() -> Iterator[Engine]:
    engine = make_engine(4096)
    engine.core.hold = lambda name: None
    yield engine
    engine.close()


@pytest.mark.parametrize("write", [False, True])
def test_a_guest_s_access_waits_for_a_page_that_moves(host: Engine, write: bool) -> None:
    # a consumer that kicks no vCPU: the access comes as far as the range
    guest = Guest(host, "pkvm-gmem", npages=8)
    guest.fill(0, 4, 7)
    steps = Stepwise(host)
    moving = steps.start(lambda engine: engine.migrate(guest.frames(0, 4)))
    while moving.step is None or moving.step.name != "migrate":
        steps.advance(moving)

    def reach(engine: Engine) -> object:
        if write:
            return engine.write_guest(guest.vm, 0, guest.gpa(1), b"new", True)
        return engine.read_guest(guest.vm, 0, guest.gpa(1), 3, True)

    access = steps.start(reach)
    while not access.blocked:
        assert steps.advance(access)
    steps.finish()
    assert moving.value().moves
    if write:
        assert host.read_guest(guest.vm, 0, guest.gpa(1), 3, True) == b"new"
    else:
        assert access.value() == host.read_guest(guest.vm, 0, guest.gpa(1), 3, True)


def test_shared_memory_is_made_before_a_conversion_lets_the_lock_go(host: Engine) -> None:
    """Two conversions of one file would else each make its own, and one's bytes be lost."""
    guest = Guest(host, "sw-protected", npages=8)
    guest.fill(0, 8, 7)
    steps = Stepwise(host)
    both = [
        steps.start(
            lambda engine, page=page: engine.convert_file(
                guest.file, page * PAGE_SIZE, PAGE_SIZE, 0
            )
        )
        for page in (0, 1)
    ]
    for task in both:
        while task.step is None or task.step.name != "convert":
            steps.advance(task)
        assert host.core.has_shared_memory(host.core.files.get(guest.file))
    steps.finish()
    assert guest.holds(0, 2, 7, private=False)
