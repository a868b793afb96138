"""The keeper with a toy for a daemon: deposits, deaths, signals, and the keeper's own death."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import eventually
from toy_daemon import PATIENCE_SECONDS, Toy

from rmemd.daemon.kept import MANAGER, NOBODY, OWN, wanted
from rmemd.keeper.keeper import delay
from rmemd.keeper.protocol import EX_SUCCESSOR

MakeToy = Callable[..., Toy]
AT_ONCE = {"restart_delay_max_seconds": 0.0}


@pytest.fixture
def toys(tmp_path: Path) -> Iterator[MakeToy]:
    made: list[Toy] = []

    def make(**settings: object) -> Toy:
        directory = tmp_path / f"toy{len(made)}"
        directory.mkdir(mode=0o700)
        made.append(Toy(directory, **(settings or AT_ONCE)))
        return made[-1]

    yield make
    for one in made:
        one.close()


# --- deposits ------------------------------------------------------------------------------------
def test_what_was_kept_is_there_after_a_death(toys: MakeToy) -> None:
    toy = toys()
    first = toy.life()
    assert first.said["first"]
    assert not first.found
    first.do("notify", "READY=1")
    for name in ("arena", "file.12", "odd: name~%\n", "dropped"):
        first.do("keep", name, f"contents of {name}")
    first.do("drop", "dropped")
    first.do("die", signal.SIGKILL)
    second = toy.life()
    assert second.found == {
        name: f"contents of {name}" for name in ("arena", "file.12", "odd: name~%\n")
    }
    assert not second.said["first"]
    assert not second.said["inheritable"], "they would stay open in whatever it executes"
    assert not second.said["listen"], "its children would take the variables for their own"
    assert second.said["keeper"] == toy.process.pid


def test_a_deposit_that_was_sent_survives_at_once(toys: MakeToy) -> None:
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    for number in range(20):
        assert life.do("keep and die", f"last words {number}", "x") is None
        life = toy.life()
        assert f"last words {number}" in life.found
    assert len(life.found) == 20


def test_a_name_is_given_to_another_and_the_newest_is_found(toys: MakeToy) -> None:
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    for contents in ("first", "second", "third"):
        life.do("keep", "journal.0", contents)
    life.do("die", signal.SIGSEGV)
    life = toy.life()
    assert life.found == {"journal.0": "third"}
    # numbers go on where the dead one left off
    life.do("keep", "journal.0", "fourth")
    life.do("die", signal.SIGKILL)
    assert toy.life().found == {"journal.0": "fourth"}


def test_a_stranger_deposits_nothing(toys: MakeToy) -> None:
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    fd = os.memfd_create("stranger")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(str(toy.directory / "s" / "keeper.sock"))
        socket.send_fds(sock, [b"FDSTORE=1\nFDNAME=arena~9"], [fd])
        sock.send(b"STOPPING=1")
    os.close(fd)
    life.do("die", signal.SIGKILL)
    assert not toy.life().found
    assert [event["event"] for event in toy.events()].count("stranger_not_heard") == 2


# --- ends that are meant -------------------------------------------------------------------------
@pytest.mark.parametrize("status", [0, 7])
def test_an_end_on_purpose_is_the_keepers(toys: MakeToy, status: int) -> None:
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    life.do("keep", "arena", "x")
    life.do("notify", "STOPPING=1")
    life.do("end", status)
    assert toy.process.wait(PATIENCE_SECONDS) == status
    assert not (toy.directory / "s" / "keeper.sock").exists()


@pytest.mark.parametrize("status", [2, 73, 78, 0])
def test_one_that_never_served_is_not_started_again(toys: MakeToy, status: int) -> None:
    toy = toys()
    toy.life().do("end", status)
    assert toy.process.wait(PATIENCE_SECONDS) == status


def test_one_that_never_served_and_was_killed_is_told_as_killed(toys: MakeToy) -> None:
    toy = toys()
    toy.life().do("die", signal.SIGKILL)
    assert toy.process.wait(PATIENCE_SECONDS) == -signal.SIGKILL


def test_one_that_served_is_started_again_whatever_it_says(toys: MakeToy) -> None:
    """A configuration that has become wrong must not cost the guests their memory."""
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    life.do("keep", "arena", "x")
    for status in (78, 2, 0, EX_SUCCESSOR, 1):
        life.do("end", status)
        life = toy.life()
        assert life.found == {"arena": "x"}


def test_signals_are_passed_on_and_the_second_ends_it(toys: MakeToy) -> None:
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    toy.process.send_signal(signal.SIGHUP)
    assert life.hear() == "hup"
    toy.process.send_signal(signal.SIGTERM)
    assert life.hear() == "term"
    toy.process.send_signal(signal.SIGTERM)
    assert toy.process.wait(PATIENCE_SECONDS) == -signal.SIGTERM
    assert life.hear() is None


def test_one_that_dies_when_asked_to_end_has_ended(toys: MakeToy) -> None:
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    toy.process.send_signal(signal.SIGTERM)
    assert life.hear() == "term"
    life.do("end", 3)
    assert toy.process.wait(PATIENCE_SECONDS) == 3


def test_a_keeper_that_pauses_before_a_restart_can_be_ended(toys: MakeToy) -> None:
    toy = toys(restart_delay_max_seconds=3600.0)
    life = toy.life()
    life.do("notify", "READY=1")
    # each pause is twice the last: soon it is longer than this test has patience
    for _ in range(3):
        life.do("die", signal.SIGKILL)
        life = toy.life()
    life.do("die", signal.SIGKILL)
    assert eventually(lambda: [x["event"] for x in toy.events()].count("daemon_died") == 4)
    toy.process.send_signal(signal.SIGTERM)
    assert toy.process.wait(PATIENCE_SECONDS) == 0


def test_a_daemon_that_dies_before_the_keeper_is_small_is_kept_on(toys: MakeToy) -> None:
    toy = toys()
    life = toy.life()
    toy.process.send_signal(signal.SIGSTOP)
    life.do("notify", "READY=1")
    life.do("die", signal.SIGKILL)
    toy.process.send_signal(signal.SIGCONT)
    life = toy.life()
    life.do("notify", "READY=1")
    command = Path(f"/proc/{toy.process.pid}/cmdline")
    assert eventually(lambda: "keeper/__main__.py" in command.read_text())
    # the small keeper is charged with the successor, and sees its end too
    life.do("die", signal.SIGKILL)
    assert toy.life().said["keeper"] == toy.process.pid


def test_pauses_grow_and_are_bounded() -> None:
    assert [delay(deaths, 5.0) for deaths in range(9)] == [0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    assert delay(10**6, 5.0) == 5.0
    assert delay(10**6, 0.0) == 0.0


# --- the keeper's own death ----------------------------------------------------------------------
def test_a_keeper_that_is_lost_is_replaced_and_given_everything(toys: MakeToy) -> None:
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    life.do("keep", "arena", "x")
    keeper = toy.process.pid
    toy.process.kill()
    for number in range(3):
        keeper = life.do("keeper", keeper)
        life.do("keep", f"file.{number}", "y")
        pidfd = os.pidfd_open(keeper)
        if number < 2:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    life.do("die", signal.SIGKILL)
    life = toy.life()
    assert life.found == {"arena": "x", "file.0": "y", "file.1": "y", "file.2": "y"}
    assert life.said["keeper"] == keeper
    # it is this one's child now, and can be told how it ended
    keeper_ended = os.pidfd_open(keeper)
    os.kill(keeper, signal.SIGTERM)
    assert life.hear() == "term"
    life.do("end", 0)
    assert _is_over(keeper_ended)


def test_a_deposit_while_there_is_no_keeper_is_made_up_for(toys: MakeToy) -> None:
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    toy.process.kill()
    toy.process.wait()
    life.do("keep", "arena", "x")
    life.do("keeper", toy.process.pid)
    life.do("keep", "file.1", "y")
    life.do("die", signal.SIGKILL)
    life = toy.life()
    assert life.found == {"arena": "x", "file.1": "y"}
    life.do("notify", "STOPPING=1")
    life.do("end", 0)


def test_both_lost_is_all_lost(toys: MakeToy) -> None:
    toy = toys()
    life = toy.life()
    life.do("notify", "READY=1")
    life.do("keep", "arena", "x")
    ended = os.pidfd_open(life.pid)
    # stopped first, so that neither sees the other's end
    os.kill(life.pid, signal.SIGSTOP)
    toy.process.kill()
    toy.process.wait()
    os.kill(life.pid, signal.SIGKILL)
    assert _is_over(ended)
    with (
        pytest.raises(ConnectionRefusedError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s,
    ):
        s.connect(str(toy.directory / "s" / "keeper.sock"))


def _is_over(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    over = bool(poll.poll(PATIENCE_SECONDS * 1e3))
    os.close(pidfd)
    return over


# --- who is the keeper ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("configured", "environment", "by"),
    [
        ("auto", {}, OWN),
        ("auto", {"NOTIFY_SOCKET": "/run/systemd/notify"}, OWN),
        ("auto", {"NOTIFY_SOCKET": "/run/systemd/notify", "FDSTORE": "0"}, OWN),
        ("auto", {"NOTIFY_SOCKET": "/run/systemd/notify", "FDSTORE": "512"}, MANAGER),
        ("auto", {"FDSTORE": "512"}, OWN),
        ("on", {"NOTIFY_SOCKET": "/run/systemd/notify", "FDSTORE": "512"}, OWN),
        ("off", {"NOTIFY_SOCKET": "/run/systemd/notify", "FDSTORE": "512"}, NOBODY),
    ],
)
def test_a_store_is_taken_where_there_is_one(
    configured: str, environment: dict[str, str], by: str
) -> None:
    assert wanted(configured, environment) == by
