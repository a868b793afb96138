"""How long a session's client waits: as long as it was told, whoever measures the time.

For an answer the socket itself waits, for anything else ``poll``; a daemon that says nothing cannot
tell which.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmem_client.errors import DeadlineExceeded
from rmem_client.session import Session
from rmem_client.sessionsocket import SESSION_NAME
from rmemd.engine.listeners import Revoked
from rmemd.session import wire

SHORT_S, LONG_S = 0.05, 60.0


class SilentDaemon:
    """Welcomes one client, and says nothing more unless it is told to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / SESSION_NAME))
        self._listener.listen()
        self._thread = threading.Thread(target=self._welcome)
        self._thread.start()

    def _welcome(self) -> None:
        self.sock, _ = self._listener.accept()
        assert self.sock.recv(1024)
        self.sock.send(wire.welcome(1, 0, 1, "host", "token", "uid:0", 0))

    def open(self, deadline_s: float) -> Session:
        """Return a session whose answers may take so long."""
        session = Session.open(self.directory, deadline_s=deadline_s, reconnect_s=0)
        self._thread.join()
        return session

    def hears_nothing_for(self, seconds: float) -> None:
        """Wait that long for a datagram that does not come."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        assert not poll.poll(seconds * 1000)

    def revoke(self) -> None:
        """Tell the client something."""
        news = wire.notice_of(Revoked(1, 0, 1, 2))
        self.sock.send(wire.notices([news]))

    def close(self) -> None:
        """Hang up."""
        self.sock.close()
        self._listener.close()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[SilentDaemon]:
    """A daemon that does not answer."""
    made = SilentDaemon(tmp_path)
    yield made
    made.close()


def test_an_answer_that_does_not_come_is_given_up(silent: SilentDaemon) -> None:
    with silent.open(SHORT_S) as session:
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                session.unpin(1)


@pytest.mark.parametrize("patience_s", [LONG_S, None])
def test_a_notice_may_take_longer_than_an_answer(
    silent: SilentDaemon, patience_s: float | None
) -> None:
    with silent.open(SHORT_S) as session:

        def later() -> None:
            silent.hears_nothing_for(4 * SHORT_S)
            silent.revoke()

        teller = threading.Thread(target=later)
        teller.start()
        notice = session.next_notice(patience_s)
        teller.join()
    assert notice is not None
    assert notice.kind == "revoked"


def test_a_notice_is_given_up_sooner_than_an_answer(silent: SilentDaemon) -> None:
    with silent.open(LONG_S) as session:
        assert session.next_notice(SHORT_S) is None
        assert session.next_notice(0) is None


def test_closing_ends_a_wait(silent: SilentDaemon) -> None:
    session = silent.open(LONG_S)

    def close() -> None:
        assert silent.sock.recv(1024)
        session.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(Exception, match=r"ended|closed"):
        session.unpin(1)
    closer.join()
