"""One client process: works until it is told to pause, then verifies all that it was told.

Owns the choice of what to do next, and the report. A client has a session, a store of shared bytes
and a few guests, one consumer after the other; a call that fails at all is a failure of the whole,
because the client library is to hide every restart.
"""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rmem_client import Client
from rmem_client.session import Session

from .holdings import GRPC, SESSION, Guest, Store, require

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Event

GUESTS = 3
DEADLINE_S = 60.0
WORK, LEAVE = "work", "leave"
# what is done, and how often
WEIGHTS = {
    "guest write": 8, "guest turn": 5, "guest move": 3, "guest check": 3, "renew guest": 2,
    "write": 4, "poke": 2, "check": 2, "pin": 3, "unpin": 3, "allocate": 2, "punch": 2,
    "convert": 3, "visit": 2, "compact": 1,
}  # fmt: skip


@dataclass
class Report:
    """What a client has to tell, since its beginning.

    Attributes:
        operations: operations that were acknowledged, by name.
        checked: pages that were compared, ``wrong`` those that differed.
        failure: why it cannot go on.
    """

    operations: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    wrong: int = 0
    failure: str = ""


class CrashClient:
    """A client, and its objects."""

    def __init__(self, number: int, seed: int, socket_dir: str) -> None:
        self._rng = random.Random(f"client {number} {seed}")
        self._socket_dir = socket_dir
        self._session = Session.open(socket_dir, deadline_s=DEADLINE_S)
        self._client = self._session.client(deadline_s=DEADLINE_S)
        # without a token, this user's calls are the host's own
        self._admin = Client(socket_dir, deadline_s=DEADLINE_S)
        self._admin.wait_ready(DEADLINE_S)
        self._consumers = sorted(self._client.consumers.list().consumers, key=lambda c: c.name)
        self._next = number
        self.report = Report()
        self._store = Store(self._client, self._session)
        self._guests = [self._make_guest() for _ in range(GUESTS)]
        self._actions = {
            "renew guest": self._renew, "guest move": self._move, "visit": self._visit,
            "compact": lambda: self._admin.host.compact(),
        }  # fmt: skip

    def work(self, pause: Event) -> None:
        """Do one thing after the other until told to pause."""
        while not pause.is_set():
            (name,) = self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
            self._do(name)
            self.report.operations[name] = self.report.operations.get(name, 0) + 1

    def verify(self) -> None:
        """Compare all that there is with what was acknowledged.

        Raises:
            Wrong: they differ.
        """
        mine = self._session.number
        vms = {vm.vm: vm.state for vm in self._client.vms.list().vms if vm.session == mine}
        wanted = [self._store.vm, *(guest.machine.vm for guest in self._guests)]
        require(f"VMs of session {mine}", sorted(vms), sorted(wanted))
        require(f"dead VMs of session {mine}", [v for v, how in vms.items() if how == "dead"], [])
        files = [file.file for file in self._client.files.list().files if file.session == mine]
        wanted = [self._store.file, self._store.counted, *(g.machine.file for g in self._guests)]
        require(f"files of session {mine}", sorted(files), sorted(wanted))
        self._store.require_pins(f"session {mine}")
        for door in (GRPC, SESSION):
            self._store.check(self._rng, door)
        for guest in self._guests:
            guest.check()
        self._count()

    def close(self) -> None:
        """Let everything go."""
        for one in (*self._guests, self._store):
            one.dispose()
        self._count()
        self._admin.close()
        self._client.close()
        self._session.close()

    # --- what is done ------------------------------------------------------------------------
    def _do(self, name: str) -> None:
        if name in self._actions:
            self._actions[name]()
        elif name.startswith("guest "):
            act: Any = getattr(self._rng.choice(self._guests), name.removeprefix("guest "))
            act() if name == "guest check" else act(self._rng)
        else:
            getattr(self._store, name)(self._rng, self._rng.choice((GRPC, SESSION)))

    def _make_guest(self) -> Guest:
        self._next += 1
        return Guest(self._client, self._consumers[self._next % len(self._consumers)])

    def _move(self) -> None:
        self._rng.choice(self._guests).move(self._rng, self._admin)

    def _renew(self) -> None:
        """Check a guest for the last time, and have another in its place, of another consumer."""
        one = self._guests.pop(0)
        one.check()
        one.dispose()
        self._take(one)
        self._guests.append(self._make_guest())

    def _visit(self) -> None:
        """Open another session for a moment, and call in its name."""
        with (
            Session.open(self._socket_dir, deadline_s=DEADLINE_S) as session,
            session.client(deadline_s=DEADLINE_S) as client,
        ):
            require("session", client.sessions.whoami().session, session.number)

    # --- what is told ------------------------------------------------------------------------
    def _count(self) -> None:
        for one in (*self._guests, self._store):
            self._take(one)

    def _take(self, one: Guest | Store) -> None:
        self.report.checked += one.checked
        self.report.wrong += getattr(one, "wrong", 0)
        one.checked = 0


def serve(number: int, seed: int, socket_dir: str, pause: Event, pipe: Connection) -> None:
    """Be a client process: work and verify whenever told, until told to leave."""
    report = Report()
    try:
        client = CrashClient(number, seed, socket_dir)
        report = client.report
        pipe.send(report)
        while pipe.recv() == WORK:
            client.work(pause)
            client.verify()
            pipe.send(report)
        client.close()
    except BaseException:
        report.failure = f"client {number}:\n{traceback.format_exc()}"
    pipe.send(report)
