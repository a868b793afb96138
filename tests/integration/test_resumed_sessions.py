"""Sessions whose daemon dies and is started again: who may go on, what is done once, what is told.

The daemon is an engine with a session socket in this process; ``World.crash`` has the next one find
what a kill -9 would have left at that moment.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from keeping import Kept, kept_engine
from session_clients import ClientRefused, Clients

from rmem_client.errors import DaemonUnreachable, MemoryLost, RmemError
from rmem_client.session import Session
from rmem_client.sessionwire import resume
from rmemd.access.callers import Access, Caller, Ticket, policy_of
from rmemd.engine.engine import Engine
from rmemd.model.sessions import GrantRange, Owner
from rmemd.model.vms import GUEST_MEMFD
from rmemd.session import talk
from rmemd.session.server import SessionServer
from rmemd.session.wire import Frame
from rmemd.units import PAGE_SIZE

PATIENCE_SECONDS = 20.0
LIFE = "5eaf00d5"
LISTENER = "listener"
SET = threading.Event()
SET.set()


class World:
    """A daemon's session socket, kept by this process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kept = Kept()
        self._start(kept_engine(self.kept, life=LIFE))

    def _start(self, engine: Engine) -> None:
        self.engine = engine
        self.access = Access(engine, policy_of(False, os.getuid(), ()))
        self.server = SessionServer(engine, self.access, self.directory / "session.sock")
        self.kept.keep(LISTENER, self.server.bind(self.kept.take(LISTENER)))
        self.server.start()
        self._serving = True

    def stop(self) -> None:
        """Have the daemon's process end, as far as its clients see; what is kept stays."""
        if self._serving:
            self._serving = False
            self.server.stop(PATIENCE_SECONDS)

    def crash(self, life: str = LIFE) -> None:
        """Have the daemon die, and another one started under the same keeping."""
        self.stop()
        self.engine.close()
        left = self.kept.fds if life == LIFE else {LISTENER: self.kept.fds[LISTENER]}
        found = {name: os.dup(fd) for name, fd in left.items()}
        self.kept.close()
        self.kept = Kept(found)
        self._start(kept_engine(self.kept, life=life))

    def open(self, **options: Any) -> Session:
        """Open a session of this process."""
        return Session.open(self.directory, **options)

    def file(self) -> int:
        """Make a VM of this user with a file of 8 pages, all of them shared; return the file."""
        vm = self.engine.create_vm("sw-protected", owner=Owner(f"uid:{os.getuid()}")).info.vm
        file = self.engine.create_file(vm, 8 * PAGE_SIZE, 3).info.file
        self.engine.set_memory_region(vm, 0, GUEST_MEMFD, 0, 8 * PAGE_SIZE, file)
        return file

    def has(self, session: int) -> bool:
        """Return whether a session is there."""
        return self.engine.core.sessions.exists(session)

    def wait_gone(self, session: int) -> bool:
        """Wait until a session has ended, by the revisions that it makes."""
        core = self.engine.core
        seen = self.engine.revision
        while self.has(session):
            now = core.wait_for_revision(seen, PATIENCE_SECONDS)
            if now == seen:
                return False
            seen = now
        return True

    def close(self) -> None:
        """End it."""
        self.stop()
        self.engine.close()
        self.kept.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


class Dies:
    """Has the daemon die after a datagram is carried out, and before it is answered."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = world
        self.served: list[int] = []
        self._died = threading.Event()
        answer = talk.Talk._answer

        def unanswered(one: talk.Talk, request: Frame) -> None:
            self.served.append(request.sequence)
            if self._died.is_set():
                answer(one, request)
                return
            reply = one._operations.serve(request)
            if reply.fd >= 0:
                os.close(reply.fd)
                one._operations.not_sent(reply)
            self._died.set()
            raise talk.Gone(talk.STOP)

        monkeypatch.setattr(talk.Talk, "_answer", unanswered)

    def during(self, call: Callable[[], Any]) -> Any:
        """Make a call whose answer is lost; return what it comes to in the end."""
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(call)
            assert self._died.wait(PATIENCE_SECONDS)
            self.world.crash()
            return made.result(PATIENCE_SECONDS)


@pytest.fixture
def dies(world: World, monkeypatch: pytest.MonkeyPatch) -> Dies:
    return Dies(world, monkeypatch)


# --- going on ------------------------------------------------------------------------------------
def test_a_session_goes_on_with_what_it_holds(world: World) -> None:
    with world.open() as session:
        file = world.file()
        pin = session.pin(file, 0, PAGE_SIZE)
        with session.shared_memory(file) as memory:
            memory.view[:5] = b"mine!"
            fd = session.fileno()
            world.crash()
            assert session.read_shared(file, 0, 5) == b"mine!"
            memory.view[:5] = b"still"
        assert session.read_shared(file, 0, 5) == b"still"
        assert session.fileno() == fd
        session.unpin(pin)
        assert world.engine.core.sessions.pins() == []
        assert world.server.fds_passed(session.tenant) == 1
    assert world.wait_gone(session.number)


def test_it_goes_on_again_and_again_and_idle_ones_too(world: World) -> None:
    with world.open() as session, world.open() as idle:
        for _ in range(3):
            world.crash()
            assert world.has(session.number)
        file = world.file()
        assert session.pin(file, 0, PAGE_SIZE)
        assert idle.pin(file, 0, PAGE_SIZE)


def test_closing_a_session_while_the_daemon_is_away_ends_it(world: World) -> None:
    session = world.open()
    world.crash()
    session.close()
    assert world.wait_gone(session.number)


def test_a_live_daemon_lets_nobody_take_a_session_up(world: World) -> None:
    with world.open() as session:
        assert refused(world, session.number, session.token) == "TOKEN_UNKNOWN"
        world.crash()
        assert session.next_notice(0) is None
        assert session.pin(world.file(), 0, PAGE_SIZE)
        assert refused(world, session.number, session.token) == "TOKEN_UNKNOWN"


def refused(world: World, session: int, token: str) -> str:
    """Return why this process may not take a session up."""
    from rmem.v1 import session_pb2
    from rmem_client.sessionwire import Kind, decode

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(str(world.directory / "session.sock"))
        sock.send(resume(session, token))
        said = decode(memoryview(sock.recv(1 << 18)))
    if said.kind == Kind.WELCOME:
        return "WELCOME"
    return session_pb2.SessionRefusal.FromString(bytes(said.body)).refusal.reason


# --- who it is not -------------------------------------------------------------------------------
def test_another_process_cannot_take_it_up(world: World, clients: Clients) -> None:
    """Not with the token, and not as a child: only the process that opened it."""
    owner = clients().open(world.directory)
    world.crash()
    assert refused(world, owner.session, owner.token) == "TOKEN_UNKNOWN"
    child = owner.do("resume_in_child", str(world.directory), owner.session, owner.token)
    assert child == "REFUSED"
    assert refused(world, owner.session, owner.token[:-1] + "x") == "TOKEN_UNKNOWN"
    file = world.file()
    assert owner.do("pin", file, 0, PAGE_SIZE)
    owner.kill()
    assert world.wait_gone(owner.session)


def test_the_dead_are_reaped_at_the_start(world: World, clients: Clients) -> None:
    before, after = clients().open(world.directory), clients().open(world.directory)
    file = world.file()
    for one in (before, after):
        one.do("pin", file, 0, PAGE_SIZE)
    world.stop()
    before.kill()
    world.crash()
    assert world.wait_gone(before.session)
    assert world.has(after.session)
    after.kill()
    assert world.wait_gone(after.session)
    assert world.engine.core.sessions.pins() == []
    world.stop()
    assert not [name for name in world.kept.fds if name.startswith("pidfd")]


def test_a_session_without_its_pidfd_is_ended(world: World, clients: Clients) -> None:
    owner = clients().open(world.directory)
    world.kept.drop(f"pidfd.{owner.session}")
    world.crash()
    assert world.wait_gone(owner.session)
    with pytest.raises(ClientRefused, match="DaemonUnreachable"):
        owner.do("unpin", 1)


def test_a_daemon_without_the_memory_says_so(world: World) -> None:
    with world.open() as session:
        world.crash(life="0ther11f3")
        for _ in range(2):
            with pytest.raises(MemoryLost, match="MEMORY_LOST"):
                session.unpin(1)


def test_a_session_that_went_while_its_client_was_away(world: World) -> None:
    with world.open() as session:
        number = session.number
        world.stop()
        world.access.close(number)
        world.crash()
        with pytest.raises(DaemonUnreachable, match="session has ended"):
            session.unpin(1)


# --- once ----------------------------------------------------------------------------------------
def test_a_datagram_that_was_not_answered_is_answered_as_it_was(world: World, dies: Dies) -> None:
    with world.open() as session:
        file = world.file()

        def batch() -> list[int]:
            with session.batch() as calls:
                pins = [calls.pin(file, n * PAGE_SIZE, PAGE_SIZE) for n in range(4)]
                calls.unpin(1)
                bad = calls.unpin(99)
                read = calls.read_shared(file, 0, 4)
            assert type(bad.error).__name__ == "NotFound"
            assert read.result() == bytes(4)
            return [pin.result() for pin in pins]

        assert dies.during(batch) == [1, 2, 3, 4]
        assert [pin.pin for pin in world.engine.core.sessions.pins()] == [2, 3, 4]
        # the very same datagram, and nothing of it is kept once it is answered
        assert len(set(dies.served)) == 1
        session.unpin(2)
        kept = [run for run, _ in world.engine.core.notes.items("results")]
        assert not [run for run in kept if run[2] == dies.served[0]]


def test_one_without_an_answer_in_a_batch_of_many_threads(world: World, dies: Dies) -> None:
    """Several datagrams wait at once; each is carried out once, whichever was under way."""
    with world.open() as session:
        file = world.file()

        def pins() -> list[int]:
            with ThreadPoolExecutor(4) as pool:
                found = [pool.submit(session.pin, file, n * PAGE_SIZE, PAGE_SIZE) for n in range(4)]
                return sorted(one.result(PATIENCE_SECONDS) for one in found)

        assert dies.during(pins) == [1, 2, 3, 4]
        assert len(world.engine.core.sessions.pins()) == 4


@pytest.mark.parametrize("recycled", [False, True])
def test_a_file_whose_making_was_not_answered_is_made_once(
    world: World, dies: Dies, monkeypatch: pytest.MonkeyPatch, recycled: bool
) -> None:
    with world.open() as session:
        vm = world.engine.core.files.get(world.file()).info.vm
        if recycled:
            with monkeypatch.context() as alive:
                alive.setattr(dies, "_died", SET)
                with session.create(vm, PAGE_SIZE) as before:
                    before.view[:5] = b"stale"
        made = dies.during(lambda: session.create(vm, PAGE_SIZE))
        assert [file.info.file for file in world.engine.core.files.all()][1:] == [made.file]
        assert bytes(made.view) == bytes(PAGE_SIZE)
        made.view[:3] = b"new"
        assert session.read_shared(made.file, 0, 3) == b"new"
        assert world.server.fds_passed(session.tenant) == 1 + recycled
        names = {name for name in world.kept.fds if name.startswith("file.")}
        assert names == world.engine.core.shared.names()
        world.crash()
        assert session.read_shared(made.file, 0, 3) == b"new"


def test_spare_memory_ends_with_the_daemon(world: World) -> None:
    with world.open() as session:
        vm = world.engine.core.files.get(world.file()).info.vm
        with session.create(vm, PAGE_SIZE) as before:
            before.view[:5] = b"stale"
        assert session.read_shared(1, 0, 1) == b"\0"
        assert world.engine.core.shared.spares() == [(session.number, session.tenant, 1)]
        world.crash()
        with session.create(vm, PAGE_SIZE) as made:
            assert made.memory is not before.memory
            assert bytes(made.view) == bytes(PAGE_SIZE)
        # who was given a descriptor before this daemon is not known to it
        assert world.engine.core.shared.names() <= set(world.kept.fds)


# --- what is told --------------------------------------------------------------------------------
def test_a_revocation_while_the_client_is_away_is_told_when_it_is_back(world: World) -> None:
    with world.open() as host:
        file = world.file()
        grants = (GrantRange(file, 0, 4),)
        ticket = Ticket(host.tenant, "device", host.number, 0, grants)
        secret = world.access.issue(Caller(host.tenant, "host", host.number), ticket)
        with world.open(ticket=secret) as device:
            world.crash()
            losers = world.engine.revoke(host.tenant, file, 1, 2)
            assert [info.session for info in losers] == [device.number]
            # and once more, as if the daemon had died before it could send
            world.crash()
            told = device.next_notice(PATIENCE_SECONDS)
            assert told is not None
            assert (told.kind, told.file, told.offset_bytes) == ("revoked", file, PAGE_SIZE)
            with pytest.raises(RmemError, match="NOT_GRANTED"):
                device.read_shared(file, PAGE_SIZE, 1)
            assert world.engine.core.notes.items("notices") == []


def test_a_pager_is_told_of_what_waits_when_it_is_back(world: World) -> None:
    with world.open() as pager, ThreadPoolExecutor(1) as pool:
        file = world.file()
        pager.register_faults(file, 0, 8 * PAGE_SIZE)
        world.crash()
        waits = pool.submit(world.engine.read_shared, file, PAGE_SIZE, 4)
        told = pager.next_notice(PATIENCE_SECONDS)
        assert told is not None
        assert (told.kind, told.offset_bytes) == ("fault", PAGE_SIZE)
        assert pager.resolve_zero(file, PAGE_SIZE, PAGE_SIZE) == 1
        assert waits.result(PATIENCE_SECONDS) == bytes(4)
