"""Leases, shared daemons, and descriptors that leave the daemon."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemon, eventually
from helpers import Clock, MakeEngine, make_guest
from session_clients import ClientRefused, Clients
from session_world import DEVICE, NPAGES, PAGE, grant, make_vm

from rmem_client.errors import Denied, NotFound
from rmem_client.session import Session
from rmemd.access.callers import TCP, Access, policy_of
from rmemd.engine.engine import Engine
from rmemd.engine.listeners import Revoked
from rmemd.model.sessions import Owner
from rmemd.session.descriptors import Passed, require_sealed, send
from rmemd.session.server import SessionServer
from rmemd.store.memfd import Memfd

NOBODY = 65534


# --- leases: the clock is the test's -------------------------------------------------------------
@pytest.fixture
def access(make_engine: MakeEngine, clock: Clock) -> Access:
    return Access(make_engine(), policy_of(False, os.getuid(), ()), clock)


@pytest.fixture
def server(access: Access, clock: Clock, tmp_path: Path) -> Iterator[SessionServer]:
    made = SessionServer(access._engine, access, tmp_path / "session.sock", clock)
    made.bind()
    made.start()
    yield made
    made.stop(10)


def leased(access: Access, seconds: float) -> int:
    info, _ = access.open("spiffe://a/b", "host", TCP)
    access.lease(info.session, seconds)
    return info.session


def gone(access: Access, session: int) -> bool:
    """Wait until a session has ended, by the revision that it makes."""
    engine = access._engine
    seen = engine.revision
    while engine.core.sessions.exists(session):
        now = engine.core.wait_for_revision(seen, 10)
        if now == seen:
            return False
        seen = now
    return True


def test_a_lease_that_is_not_renewed_ends(
    access: Access, server: SessionServer, clock: Clock
) -> None:
    engine = access._engine
    short, long = leased(access, 1.0), leased(access, 100.0)
    guest = make_guest(engine, "null", 4)
    vm = engine.create_vm("null", owner=Owner("spiffe://a/b", short)).info.vm
    clock.now += 1.5
    server.wake()
    assert gone(access, short)
    assert engine.core.sessions.exists(long)
    assert not engine.core.vms.exists(vm)
    assert engine.core.vms.exists(guest.vm)
    with pytest.raises(Exception, match="has no lease"):
        access.renew(short)


def test_a_renewed_lease_lives(access: Access, server: SessionServer, clock: Clock) -> None:
    kept, lost = leased(access, 1.0), leased(access, 1.0)
    for _ in range(5):
        clock.now += 0.9
        access.renew(kept)
        server.wake()
    assert gone(access, lost)
    assert access._engine.core.sessions.exists(kept)


def test_a_late_reaper_blames_itself(access: Access, clock: Clock) -> None:
    """Stopped for an hour, it has seen no renewals: nobody is reaped for that hour."""
    sessions = [leased(access, 30.0) for _ in range(5)]
    assert access.due(clock.now) == ([], 30.0)
    meant = clock.now + 10.0
    clock.now += 3600.0
    assert access.due(meant) == ([], pytest.approx(20.0))
    # in time, it takes them at their word
    clock.now += 20.0
    assert access.due(clock.now) == (sessions, None)


def test_a_lease_over_grpc(daemon: Daemon) -> None:
    """The real clock: it ends by itself, with what it made."""
    opened = daemon.client().sessions.open(lease_s=0.2)
    client = daemon.client(token=opened.token)
    vm, _ = make_vm(client)
    with daemon.client().watch(start_revision=opened.revision, kinds=["session_closed"]) as watch:
        event = next(item for item in watch if getattr(item, "kind", "") == "session_closed")
    assert event.fields["session"] == str(opened.session.session)  # type: ignore[union-attr]
    with pytest.raises(NotFound):
        daemon.client().vms.get(vm)
    with pytest.raises(Denied, match="TOKEN_UNKNOWN"):
        client.sessions.renew()
    (line,) = [x for x in daemon.log_lines if x["event"] == "session_closed"]
    assert (line["why"], line["vms"]) == ("lease", [vm])


# --- a shared daemon -----------------------------------------------------------------------------
@pytest.fixture
def shared(clients: Clients) -> Iterator[Daemon]:
    """A daemon that other users may connect to."""
    with tempfile.TemporaryDirectory(prefix="rmem-shared-") as made:
        Path(made).chmod(0o711)
        options = ("--host-memory", "64M", "--set", "access.mode=shared")
        daemon = Daemon(Path(made), *options).start()
        yield daemon
        daemon.stop()
        assert not (daemon.socket_dir / "session.sock").exists()


root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")


def test_the_sockets_modes(daemon: Daemon, shared: Daemon) -> None:
    for one, directory, sockets in ((daemon, 0o700, 0o600), (shared, 0o711, 0o666)):
        assert stat.S_IMODE(one.socket_dir.stat().st_mode) == directory
        for name in ("rmemd.sock", "session.sock"):
            info = (one.socket_dir / name).stat()
            assert stat.S_ISSOCK(info.st_mode)
            assert stat.S_IMODE(info.st_mode) == sockets, name
        assert stat.S_IMODE((one.socket_dir / "rmemd.lock").stat().st_mode) == 0o600


def test_a_stale_session_socket_is_removed(daemon: Daemon) -> None:
    daemon.kill()
    assert (daemon.socket_dir / "session.sock").exists()
    again = Daemon(daemon.directory, *daemon.options).start()
    Session.open(again.socket_dir).close()
    again.stop()
    assert not list(again.socket_dir.glob("*.sock"))


@root
def test_each_user_is_a_tenant(shared: Daemon, clients: Clients) -> None:
    with pytest.raises(Denied, match="TOKEN_REQUIRED"):
        shared.client().sessions.list()
    with Session.open(shared.socket_dir) as mine:
        stranger = clients()
        stranger.do("become", NOBODY)
        stranger.open(shared.socket_dir)
        client = shared.client(token=stranger.token)
        assert client.sessions.whoami().tenant == f"uid:{NOBODY}"
        other = clients()
        other.do("become", NOBODY)
        with pytest.raises(ClientRefused, match="ROLE_DENIED"):
            other.open(shared.socket_dir, role="admin")
        vm, file = make_vm(client)
        with pytest.raises(NotFound):
            shared.client(token=mine.token).vms.get(vm)
        with pytest.raises(NotFound):
            mine.read_shared(file, 0, 1)
        stranger.kill()
        other.kill()
        sessions = shared.client(token=mine.token).sessions.list
        assert eventually(lambda: [s.session for s in sessions().sessions] == [mine.number])


@root
def test_a_descriptor_gives_no_more_than_it_is(shared: Daemon, clients: Clients) -> None:
    """Another user's device: no writing through /proc, no resizing, no further seals."""
    with Session.open(shared.socket_dir) as mine:
        client = shared.client(token=mine.token)
        _, file = make_vm(client)
        mine.convert_file(file, 0, NPAGES * PAGE, private=False)
        mine.write_shared(file, 0, b"shared")
        for read_only, reopened in ((True, "refused"), (False, "refused")):
            grants = [grant(file, 0, NPAGES, read_only)]
            ticket = client.sessions.create_ticket(DEVICE, grants=grants)
            device = clients()
            device.do("become", NOBODY)
            device.open(shared.socket_dir, ticket=ticket.hex())
            assert device.do("map", file, read_only=read_only) == NPAGES * PAGE
            assert device.do("peek", 0, 6) == b"shared"
            assert device.do("reopen", file, read_only) == reopened
            if read_only:
                with pytest.raises(ClientRefused, match="NOT_GRANTED"):
                    device.do("fd", file)
                with pytest.raises(ClientRefused, match="read-only memory"):
                    device.do("poke", 0, b"x")
            else:
                assert device.do("grow", file) == []
                device.do("poke", 0, b"by the device")
                assert mine.read_shared(file, 0, 13) == b"by the device"
            device.kill()


# --- what leaves the daemon ----------------------------------------------------------------------
def test_only_a_sealed_memfd_leaves(engine: Engine, tmp_path: Path) -> None:
    """I23: the arena, a file, a socket, or a memfd of another mode or fewer seals stay."""
    memfd = Memfd("rmemd-file-1", 1)
    require_sealed(memfd.fd)
    # named as a shared half is, so that only its seals are wanting
    unsealed = os.memfd_create("rmemd-file-2", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.fchmod(unsealed, 0o600)
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plain = os.open(tmp_path / "plain", os.O_CREAT | os.O_RDWR, 0o600)
    # sealed like a shared half, and not one
    arena = engine.core.controller.arena_fd
    for fd in (arena, unsealed, plain, one.fileno()):
        with pytest.raises(AssertionError, match="must not leave"):
            send(one, b"x", fd)
    os.fchmod(memfd.fd, 0o644)
    with pytest.raises(AssertionError, match="must not leave"):
        send(one, b"x", memfd.fd)
    other.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.recv(1)
    memfd.close()
    for fd in (unsealed, plain):
        os.close(fd)
    one.close()
    other.close()


def test_a_descriptors_flags_are_its_receivers(engine: Engine) -> None:
    """O_APPEND on a passed descriptor would divert the daemon's own writes, were it the same."""
    import fcntl

    memfd = Memfd("test", 2)
    passed = memfd.open_anew(read_only=False)
    fcntl.fcntl(passed, fcntl.F_SETFL, os.O_APPEND)
    memfd.write_bytes(0, b"here")
    assert memfd.read_bytes(0, 4) == b"here"
    read_only = memfd.open_anew(read_only=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(read_only, b"x")
    for fd in (passed, read_only):
        os.close(fd)
    memfd.close()


def test_descriptors_are_counted_until_the_session_ends(engine: Engine) -> None:
    passed = Passed(engine.core.quotas)
    with passed.one_more("a", 1), passed.one_more("a", 2):
        assert passed.of("a") == 2
    with pytest.raises(ValueError, match="x"), passed.one_more("a", 1):
        raise ValueError("x")
    assert (passed.of("a"), passed.of("b")) == (2, 0)
    # the session ends while one is on its way, and that one then fails
    on_its_way = passed.one_more("a", 1)
    on_its_way.__enter__()
    passed.forget(1)
    assert not on_its_way.__exit__(ValueError, ValueError("x"), None)
    assert passed.of("a") == 1
    passed.forget(2)
    passed.forget(2)
    assert passed.of("a") == 0


def test_a_client_that_does_not_read_in_time_is_ended(
    access: Access, server: SessionServer, clock: Clock
) -> None:
    """The clock, and not the number of its notices, decides here."""
    core = access._engine.core
    with Session.open(server._path.parent) as idle:
        connection = server._by_number[idle.number]

        def fill() -> bool:
            # no more than what is sent at once: too many that wait end the session, too
            for _ in range(0 if connection._outbox else 64):
                core.listeners.tell(idle.number, Revoked(1, 0, 1, 1))
            return connection.blocked_since is not None

        assert eventually(fill)
        clock.advance(4.9)
        server.wake()
        assert core.sessions.exists(idle.number)
        clock.advance(0.2)
        server.wake()
        assert gone(access, idle.number)
        assert connection.why == "slow reader"
