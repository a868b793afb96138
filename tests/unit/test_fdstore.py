"""Deposits with a service manager that takes nothing which systemd would not take."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from service_manager import ServiceManager
from structlog.testing import capture_logs

from rmemd.daemon.fdstore import FdStore
from rmemd.daemon.starts import REMEMBERED, Starts
from rmemd.keeper.protocol import decode, encode, is_name, listening
from rmemd.keeper.store import Message, Store
from rmemd.store.keeping import Keeping

SECOND = 10**9
MakeStore = Callable[..., FdStore]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    made = ServiceManager(tmp_path)
    yield made
    made.close()


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Memfds that say their number."""
    made = [os.memfd_create(f"m{n}") for n in range(4)]
    for n, fd in enumerate(made):
        os.write(fd, str(n).encode())
    yield made
    for fd in made:
        os.close(fd)


@pytest.fixture
def stores(manager: ServiceManager) -> Iterator[MakeStore]:
    """Make stores; ``given`` None: that of the next process, which is handed everything back."""
    made: list[FdStore] = []

    def make(given: Sequence[tuple[str, int]] | None = ()) -> FdStore:
        if given is None:
            given = [(name, os.dup(fd)) for name, fd, _ in manager.store]
        made.append(FdStore(manager.address, given))
        return made[-1]

    yield make
    for store in made:
        store.close()


def _said(fd: int) -> str:
    return os.pread(fd, 10, 0).decode()


def test_names_go_there_and_back(
    manager: ServiceManager, stores: MakeStore, fds: list[int]
) -> None:
    store = stores()
    names = ["arena", "file.1", "with: colon, ~ and % and\nline", "größe"]
    for name, fd in zip(names, fds, strict=True):
        store.keep(name, fd)
    manager.hear_all()
    assert len(manager.store) == 4
    next_one = stores(None)
    assert sorted(next_one.found) == sorted(names)
    taken = [next_one.take(name) for name in names]
    assert [_said(fd) for fd in taken if fd is not None] == ["0", "1", "2", "3"]
    assert next_one.take("arena") is None, "only once"
    # what was found is kept already, under the name that it has
    for name, fd in zip(names, taken, strict=True):
        assert fd is not None
        next_one.keep(name, fd)
        os.close(fd)
    manager.hear_all()
    assert len(manager.store) == 4


def test_a_name_is_never_without_a_descriptor(
    manager: ServiceManager, stores: MakeStore, fds: list[int]
) -> None:
    store = stores()
    store.keep("journal.0", fds[0])
    manager.hear()
    store.keep("journal.0", fds[1])
    manager.hear()
    # dead between the two messages: both are there, and the newer one counts
    dead = stores(None)
    found = dead.take("journal.0")
    assert found is not None
    assert _said(found) == "1"
    os.close(found)
    manager.hear()
    assert len(manager.store) == 1


def test_what_is_dropped_goes(manager: ServiceManager, stores: MakeStore, fds: list[int]) -> None:
    store = stores()
    store.keep("arena", fds[0])
    store.keep("file.1", fds[1])
    store.drop("file.1")
    store.drop("never there")
    manager.hear_all()
    assert len(manager.store) == 1
    next_one = stores(None)
    assert next_one.let_go_of_the_rest() == ["arena"]
    assert not next_one.found
    manager.hear_all()
    assert not manager.store


def test_an_end_on_purpose_empties_the_store(
    manager: ServiceManager, stores: MakeStore, fds: list[int]
) -> None:
    store = stores()
    for n, fd in enumerate(fds):
        store.keep(f"file.{n}", fd)
    store.let_go()
    manager.hear_all()
    assert not manager.store
    assert [_said(fd) for fd in fds] == ["0", "1", "2", "3"], "the descriptors are their owners'"


def test_a_listener_that_hangs_up_stays(manager: ServiceManager, stores: MakeStore) -> None:
    store = stores()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    store.keep("pidfd.1", ours.fileno())
    manager.hear()
    theirs.close()
    ours.close()
    manager.hang_up()
    assert len(manager.store) == 1


def test_what_is_not_ours_is_closed_and_told(stores: MakeStore, fds: list[int]) -> None:
    theirs = os.dup(fds[0])
    with capture_logs() as said:
        store = stores([("rmemd.socket", theirs)])
    assert not store.found
    assert [line["event"] for line in said] == ["foreign_descriptor"]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(theirs)


def test_a_manager_that_is_gone_is_told_to_the_log(
    manager: ServiceManager, stores: MakeStore, tmp_path: Path, fds: list[int]
) -> None:
    store = stores()
    store.keep("arena", fds[0])
    manager.hear()
    manager.stop_listening()
    with capture_logs() as said:
        store.keep("file.1", fds[1])
    assert [line["event"] for line in said] == ["deposit_failed"]
    Path(manager.address).unlink()
    # another one, which has none of it
    other = ServiceManager(tmp_path)
    store.deposit_all()
    other.hear_all()
    assert len(other.store) == 2
    other.close()


# --- the protocol --------------------------------------------------------------------------------
def test_names_that_systemd_takes() -> None:
    assert is_name("arena~1")
    assert is_name("x" * 255)
    assert is_name("")
    for bad in ("a:b", "x" * 256, "a\nb", "ü", "\x7f"):
        assert not is_name(bad), bad


def test_messages_go_there_and_back() -> None:
    fields = {"FDSTORE": "1", "FDNAME": "a=b", "FDPOLL": "0"}
    assert decode(encode(*fields.items())) == fields
    assert decode(b"READY=1\nnonsense\n=\xff") == {"READY": "1", "": "\ufffd"}


def test_descriptors_are_for_the_process_that_is_named() -> None:
    given = {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "LISTEN_PID": "7", "HOME": "/"}
    theirs = dict(given)
    assert listening(theirs, 8) == []
    assert theirs == {"HOME": "/"}, "nobody else is to take them"
    assert listening(dict(given), 7) == ["a", "b"]
    assert listening({"LISTEN_FDS": "2", "LISTEN_PID": "7"}, 7) == ["stored", "stored"]
    assert listening({"LISTEN_FDS": "x", "LISTEN_PID": "7"}, 7) == []
    assert listening({}, 7) == []


def test_the_keepers_store_closes_what_it_does_not_take(fds: list[int]) -> None:
    store = Store()

    def send(*, whole: bool = True, **fields: str) -> bool:
        return store.take(Message(1, fields, [os.dup(fds[0])], whole))

    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not listed
    assert send(BARRIER="1")
    assert not send(FDSTORE="1", FDNAME="a:b")
    assert not send(FDSTORE="1", FDNAME="cut", whole=False)
    assert not send(READY="1")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert send(FDSTORE="1", FDNAME="a")
    assert send(FDSTORE="1")
    assert [name for name, _ in store.kept] == ["a", "stored"]
    for name in ("a", "stored"):
        assert store.take(Message(1, {"FDSTOREREMOVE": "1", "FDNAME": name}, [], True))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# --- starts --------------------------------------------------------------------------------------
class _Kept(Keeping):
    """Keeps over what is closed, as a store does."""

    def keep(self, name: str, fd: int) -> None:
        self.found[name] = os.dup(fd)


def _start(kept: Keeping, seconds: float) -> int:
    starts = Starts(kept, lambda: int(seconds * SECOND))
    starts.close()
    return starts.in_a_row


def test_ten_starts_in_ten_seconds_are_a_row() -> None:
    kept = _Kept()
    assert [_start(kept, 100 + second) for second in range(10)] == list(range(1, 11))


def test_starts_that_pauses_have_spread_are_a_row_and_a_life_ends_it() -> None:
    kept = _Kept()
    assert [_start(kept, 9.9 * n) for n in range(5)] == [1, 2, 3, 4, 5]
    assert _start(kept, 9.9 * 4 + 10) == 1
    assert _start(kept, 9.9 * 4 + 11) == 2


def test_starts_can_be_forgotten_and_are_bounded() -> None:
    kept = _Kept()
    for n in range(5):
        _start(kept, n)
    starts = Starts(kept, lambda: 5 * SECOND)
    assert starts.in_a_row == 6
    starts.forget()
    starts.close()
    assert _start(kept, 6) == 1
    for _ in range(REMEMBERED + 5):
        row = _start(kept, 7)
    assert row == REMEMBERED
    os.close(kept.found["life"])
