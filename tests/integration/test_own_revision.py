"""I21: a reply says the revision at which its own call ended, whatever the journal goes on to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from daemons import Rpc
from guests import Guest
from keeping import Kept, kept_engine, reopened

from rmem_client import RmemError
from rmem_client.session import Session
from rmemd.daemon.app import Daemon
from rmemd.engine.engine import Engine
from rmemd.units import PAGE_SIZE

NPAGES = 8
KEEP = 1


@pytest.fixture
def meddled(rmemd_in_process: Daemon) -> Daemon:
    """A daemon in which somebody else commits something right after each call of some methods."""
    engine = rmemd_in_process.engine
    other = engine.create_file(engine.create_vm("null").info.vm, PAGE_SIZE).info.file

    def somebody_else() -> None:
        engine.unpin(engine.pin(other, 0, PAGE_SIZE, "in between", "somebody"))

    for name in ("fallocate", "pin", "get_policy", "set_policy"):
        setattr(engine, name, _followed(getattr(engine, name), somebody_else, engine))
    return rmemd_in_process


def _followed(call: Callable[..., Any], then: Callable[[], None], engine: Engine) -> Any:
    def followed(*args: Any) -> Any:
        if threading.current_thread().name == "somebody else":
            return call(*args)
        try:
            return call(*args)
        finally:
            assert engine.answered == engine.revision
            thread = threading.Thread(target=then, name="somebody else")
            thread.start()
            thread.join()

    return followed


@pytest.fixture
def rpc(rmemd_in_process: Daemon) -> Iterator[Rpc]:
    made = Rpc(rmemd_in_process.settings.socket_dir / "rmemd.sock")
    yield made
    made.close()


@pytest.fixture
def file(rpc: Rpc) -> int:
    vm = rpc.call("CreateVm", consumer="null", detached=True).reply.vm
    made: int = rpc.call("CreateFile", vm=vm, size_bytes=NPAGES * PAGE_SIZE).reply.file
    return made


def test_of_grpc(meddled: Daemon, rpc: Rpc, file: int) -> None:
    engine = meddled.engine
    before = engine.revision
    done = rpc.call("Fallocate", file=file, mode=KEEP, offset_bytes=0, length_bytes=PAGE_SIZE)
    assert done.reply.revision == before + 1 < engine.revision
    before = engine.revision
    asked = rpc.call("GetPolicy", file=file, offset_bytes=0)
    assert asked.reply.revision == before < engine.revision
    before = engine.revision
    refused = rpc.call("Fallocate", file=file, mode=KEEP, offset_bytes=1, length_bytes=PAGE_SIZE)
    assert refused.reason == "NOT_PAGE_ALIGNED"
    assert refused.refusal.revision == before < engine.revision


def test_of_the_session_socket(meddled: Daemon, file: int) -> None:
    engine = meddled.engine
    with Session.open(meddled.settings.socket_dir) as session:
        before = engine.revision
        session.pin(file, 0, PAGE_SIZE, "mine")
        # the page that was not there, and the pin
        assert session.revision == before + 2 < engine.revision
        before = engine.revision
        with pytest.raises(RmemError) as refused:
            session.pin(file, NPAGES * PAGE_SIZE, PAGE_SIZE, "past the end")
        assert refused.value.revision == before < engine.revision


def test_a_call_that_asks_the_engine_for_nothing_says_the_present_one(
    rmemd_in_process: Daemon, rpc: Rpc
) -> None:
    engine = rmemd_in_process.engine
    engine.create_vm("null")
    engine.core.answered.revision = 0
    assert engine.answered == engine.revision
    for _ in range(2):
        # on a thread that has served a call before
        engine.create_vm("null")
        refused = rpc.call("SetMemoryAttributes")
        assert refused.refusal.revision == engine.revision


def test_a_repeat_after_a_kill_says_that_of_the_first() -> None:
    kept = Kept()
    engine = kept_engine(kept)
    guest = Guest(engine, "null", NPAGES)
    with engine.core.calls.of(("uid:1", 0, "id")):
        guest.allocate(0, 3)
    first = engine.answered
    guest.allocate(3, 1)
    after = reopened(kept)
    with after.core.calls.of(("uid:1", 0, "id")):
        assert after.fallocate(guest.file, 1, 0, 3 * PAGE_SIZE) == 3
    assert after.answered == first < after.revision
    after.close()
    engine.close()
    kept.close()


def test_what_is_scrubbed_afterwards_is_not_a_part_of_the_call() -> None:
    """A scrub lets the lock go, and others commit meanwhile: the reply is of before."""
    kept = Kept()
    engine = kept_engine(kept)
    guest = Guest(engine, "null", NPAGES)
    guest.write(0, 2, 1)
    before = engine.revision
    guest.punch(0, 2)
    assert engine.answered == before + 1 < engine.revision
    engine.close()
    kept.close()
