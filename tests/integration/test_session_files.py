"""Files that a session makes and lets go on its socket: round trips, spare memory, whose it is."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
from collections.abc import Iterator

import pytest
from daemons import Daemon, eventually
from guests import make_engine
from hypothesis import given
from hypothesis import strategies as st
from session_clients import Clients
from session_world import DEVICE, HOST, PAGE, grant

from rmem_client.errors import InvalidArgument, NotFound, RmemError
from rmem_client.session import Session
from rmem_client.sessionwire import KEEP, Op, Record
from rmem_client.shared import MappedFile
from rmemd.engine.sharedmemory import SHARED_MEMFDS


@pytest.fixture
def host(daemon: Daemon) -> Iterator[Session]:
    """A host session of this process."""
    with Session.open(daemon.socket_dir) as session:
        yield session


@pytest.fixture
def vm(daemon: Daemon, host: Session) -> int:
    """A VM of the session's."""
    return daemon.client(token=host.token).vms.create("sw-protected")


def used(daemon: Daemon, session: Session) -> dict[str, int]:
    """Return what the session's tenant uses."""
    told = daemon.client(token=session.token).sessions.whoami()
    return {limit.what: limit.used for limit in told.limits}


def files(daemon: Daemon) -> list[int]:
    """Return every file there is."""
    return [file.file for file in daemon.client().files.list().files]


def create(session: Session, vm: int, size: int, spare: int = 0) -> tuple[int, list[int]]:
    """Make a file by a record; return it, and the descriptors that came."""
    (result,), fds = session._sock.call([Record(Op.CREATE, vm, spare, size, 3)])
    if result.error is not None:
        raise result.error
    return result.value, fds


def keep(session: Session, file: int) -> None:
    """Close a file, its memory to be kept."""
    (result,), _ = session._sock.call([Record(Op.CLOSE, file, flags=KEEP)])
    assert result.error is None


def is_sound(daemon: Daemon) -> bool:
    return not daemon.client().host.check().violations


def test_made_used_and_let_go_in_two_round_trips(daemon: Daemon, host: Session, vm: int) -> None:
    with host.create(vm, 2 * PAGE) as made:
        made.view[PAGE : PAGE + 6] = b"mapped"
        assert host.read_shared(made.file, PAGE, 6) == b"mapped"
        host.write_shared(made.file, 3, b"record")
        assert bytes(made.view[3:9]) == b"record"
        assert files(daemon) == [made.file]
    # datagrams are carried out in order
    with pytest.raises(NotFound, match="NO_SUCH_FILE"):
        host.read_shared(made.file, 0, 1)
    made.release()
    assert is_sound(daemon)


def test_memory_serves_again_emptied_and_counted(daemon: Daemon, host: Session, vm: int) -> None:
    with host.create(vm, 3 * PAGE) as first:
        first.view[:] = b"x" * 3 * PAGE
    assert host.close_file(host.create(vm, PAGE).file) == 0
    assert used(daemon, host)["frames"] == 3
    before = used(daemon, host)["fds"]
    with host.create(vm, 3 * PAGE) as second:
        assert second.memory is first.memory
        assert second.file > first.file
        assert bytes(second.view) == bytes(3 * PAGE)
        assert used(daemon, host)["fds"] == before
        assert host.read_shared(second.file, 0, 1) == b"\0"
    assert is_sound(daemon)


def test_memory_that_will_be_written_need_not_be_emptied(host: Session, vm: int) -> None:
    with host.create(vm, PAGE) as first:
        first.view[:4] = b"mine"
    with host.create(vm, PAGE, zeroed=False) as second:
        assert bytes(second.view[:4]) == b"mine"
    with host.create(vm, PAGE) as third:
        assert bytes(third.view) == bytes(PAGE)


def test_another_size_is_other_memory(host: Session, vm: int) -> None:
    with host.create(vm, PAGE) as one:
        pass
    with host.create(vm, 2 * PAGE) as other:
        assert other.memory is not one.memory
        assert len(other.view) == 2 * PAGE


def test_memory_never_goes_from_session_to_session(daemon: Daemon, host: Session, vm: int) -> None:
    file, (mine,) = create(host, vm, PAGE)
    os.pwrite(mine, b"mine", 0)
    keep(host, file)
    with Session.open(daemon.socket_dir) as other:
        # what is set aside for one is not there for another
        _, (theirs,) = create(other, vm, PAGE, file)
        os.pwrite(theirs, b"them", 0)
        assert os.pread(mine, 4, 0) == b"mine"
    assert is_sound(daemon)
    os.close(mine)
    os.close(theirs)


def test_what_two_were_given_is_not_set_aside(daemon: Daemon, host: Session, vm: int) -> None:
    file, (mine,) = create(host, vm, PAGE)
    with Session.open(daemon.socket_dir) as other:
        for fd in (mine, other.fd(file), host.fd(file)):
            os.close(fd)
        keep(host, file)
        _, fds = create(host, vm, PAGE, file)
        assert len(fds) == 1
        os.close(fds[0])


def test_an_admins_session_carries_no_memory_from_tenant_to_tenant(
    daemon: Daemon, clients: Clients, vm: int
) -> None:
    client = daemon.client()
    ticket = client.sessions.create_ticket(HOST, tenant="uid:7")
    stranger = clients().open(daemon.socket_dir, ticket=ticket.hex())
    foreign = daemon.client(token=stranger.token).vms.create("sw-protected")
    with Session.open(daemon.socket_dir, role="admin") as admin:
        for one, other in ((vm, foreign), (foreign, foreign)):
            file, (fd,) = create(admin, one, PAGE)
            os.close(fd)
            keep(admin, file)
            _, fds = create(admin, other, PAGE, file)
            assert len(fds) == 1
            os.close(fds[0])
    assert is_sound(daemon)


def test_what_somebody_holds_is_not_set_aside(daemon: Daemon, host: Session, vm: int) -> None:
    file, (fd,) = create(host, vm, PAGE)
    os.close(fd)
    client = daemon.client(token=host.token)
    ticket = client.sessions.create_ticket(DEVICE, grants=[grant(file, 0, 1)])
    with Session.open(daemon.socket_dir, ticket=ticket) as device:
        device.pin(file, 0, PAGE)
        keep(host, file)
        _, fds = create(host, vm, PAGE, file)
        assert len(fds) == 1
        os.close(fds[0])


def test_spares_go_with_their_session(daemon: Daemon, host: Session, vm: int) -> None:
    with Session.open(daemon.socket_dir) as other:
        for size in (PAGE, 64 * PAGE):
            with other.create(vm, size):
                pass
        # one of them serves again; the reply says that the rest was done before
        assert other.create(vm, PAGE).view[0] == 0
        assert used(daemon, host)["frames"] == 64
    assert eventually(lambda: used(daemon, host)["frames"] == 0)
    assert is_sound(daemon)


def test_there_are_only_so_many_spares(daemon: Daemon, host: Session, vm: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(host.create(vm, PAGE))
    with host.create(vm, 2 * PAGE):
        assert used(daemon, host)["frames"] == 16
    assert is_sound(daemon)


def test_one_way_nobody_is_told_of_a_refusal(host: Session) -> None:
    host._sock.tell([Record(Op.CLOSE, 999), Record(Op.FD, 999)])
    poll = select.poll()
    poll.register(host.fileno(), select.POLLIN)
    with pytest.raises(NotFound, match="NO_SUCH_PIN"):
        host.unpin(1)
    assert not poll.poll(0)


def test_what_passes_a_descriptor_is_alone_and_answered(
    daemon: Daemon, host: Session, vm: int
) -> None:
    one = Record(Op.CREATE, vm, 0, PAGE, 3)
    host._sock.tell([one])
    found, fds = host._sock.call([one, one])
    assert not fds
    assert all(isinstance(result.error, InvalidArgument) for result in found)
    assert files(daemon) == []


@pytest.mark.parametrize(
    ("size", "flags", "reason"),
    [(0, 3, "BAD_RANGE"), (5, 3, "NOT_PAGE_ALIGNED"), (PAGE, 8, "UNKNOWN_FLAG"),
     (PAGE, 0, "NOT_MAPPABLE")],
)  # fmt: skip
def test_a_file_that_cannot_be_is_not_there(
    daemon: Daemon, host: Session, vm: int, size: int, flags: int, reason: str
) -> None:
    with pytest.raises(RmemError, match=reason):
        host.create(vm, size, flags=flags)
    assert files(daemon) == []
    assert used(daemon, host)["fds"] == 0


@given(npages=st.integers(1, 200), written=st.lists(st.integers(0, 200 * PAGE - 1)))
def test_emptied_in_place_is_as_new(npages: int, written: list[int]) -> None:
    memory = mmap.mmap(-1, npages * PAGE)
    made = MappedFile(1, npages * PAGE, [], memory, lambda made: None)
    for at in written:
        made.view[at % len(memory)] = 7
    made.empty()
    assert memory[:] == bytes(npages * PAGE)


def test_memory_that_is_not_to_be_kept_goes_back(daemon: Daemon, host: Session, vm: int) -> None:
    with host.create(vm, PAGE, keep=False) as made:
        made.view[:4] = b"mine"
    with host.create(vm, PAGE) as other:
        assert other.memory is not made.memory
        assert used(daemon, host)["frames"] == 0


def test_memory_that_serves_again_is_as_the_session_left_it(host: Session, vm: int) -> None:
    """Emptying it is the client's: what it finds is its own."""
    file, (fd,) = create(host, vm, PAGE)
    os.pwrite(fd, b"mine", 0)
    os.close(fd)
    keep(host, file)
    again, fds = create(host, vm, PAGE, file)
    assert not fds
    assert host.read_shared(again, 0, 4) == b"mine"


def test_a_log_of_before_there_were_spares_names_memory_by_its_file() -> None:
    engine = make_engine(nframes=16)
    engine.core.notes.set(SHARED_MEMFDS, 1, True)
    engine.core.notes.set(SHARED_MEMFDS, 7, 5)
    assert [engine.core.shared.name(file) for file in (1, 7, 9)] == ["file.1", "file.5", "file.9"]
    engine.close()
