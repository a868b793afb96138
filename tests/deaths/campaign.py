"""The figure: so many VMM processes killed, and after each nothing is left of it.

Owns ``run``, which the test and `make deaths` share. Every third death comes while the daemon is
killed too and started again by its keeper: before it, during it, or after it with a client that has
not come back yet.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from daemons import DEBUGGABLE, Daemon, eventually
from session_clients import ClientProcess, Clients

from rmem_client import Client
from rmem_client.session import Session

from .households import Bystander, Household, ledger

OPTIONS = (
    "--keeper", "--host-memory", "64M", *DEBUGGABLE,
    "--set", "daemon.restart_delay_max_seconds=0", "--set", "daemon.crash_loop_starts=0",
)  # fmt: skip
# in the daemon a VMM leaves none of these behind; sockets are gRPC's own, too, as it likes
EXACT = ("memfd", "pidfd")
BOTH_DIE = ("VMM first", "daemon first", "VMM after the restart")


@dataclass
class Figure:
    """What came of it.

    Attributes:
        deaths: how many VMM processes were killed, by when.
        below: processes of vCPUs and devices that died with them.
        released: seconds from each death of a VMM alone until nothing was left of it.
        wrong: a line for each death that left something.
    """

    wanted: int
    deaths: Counter[str] = field(default_factory=Counter)
    below: int = 0
    released: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Return whether it is what was promised."""
        return self.deaths.total() >= self.wanted and not self.wrong

    def __str__(self) -> str:
        restarts = self.deaths.total() - self.deaths["alone"]
        whens = ", ".join(f"{self.deaths[when]} {when}" for when in BOTH_DIE)
        took = [seconds * 1e3 for seconds in self.released] or [0.0]
        return (
            f"deaths: {self.deaths.total()} VMM processes killed, {self.below} vCPU and device"
            f" processes below them, {restarts} around a restart of the daemon ({whens}); pins,"
            f" sessions, frames and descriptors back to the baseline"
            f" {self.deaths.total() - len(self.wrong)}/{self.deaths.total()}; released in"
            f" {median(took):.0f} ms (median), {max(took):.0f} ms (worst) as a client sees it;"
            f" {self.seconds:.0f} s"
        )


def run(directory: Path, deaths: int, seed: int) -> Figure:
    """Kill so many VMM processes of one daemon, which has a keeper."""
    begun = time.monotonic()
    daemon, clients = Daemon(directory, *OPTIONS).start(), Clients()
    figure = Figure(deaths)
    try:
        bystander = Bystander.make(daemon)
        with bystander.session, daemon.client() as probe:
            probe.host.get()
            # what a daemon has that was started again and has deposited something, and no first one
            restart(daemon, probe)
            Session.open(daemon.socket_dir).close()
            alone = [bystander.session.number]
            assert eventually(
                lambda: [one.session for one in probe.sessions.list().sessions] == alone
            )
            Deaths(daemon, clients, probe, bystander).all_of(figure, deaths, seed)
    finally:
        clients.close()
        daemon.kill() if figure.wrong else daemon.stop()
        figure.seconds = time.monotonic() - begun
    return figure


def restart(daemon: Daemon, probe: Client, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Kill the daemon and wait for the next one; do something before that serves."""
    daemon.kill_served()
    meanwhile()
    probe.host.get()


class Deaths:
    """One death after the other, and the baseline."""

    def __init__(
        self, daemon: Daemon, clients: Clients, probe: Client, bystander: Bystander
    ) -> None:
        self._daemon, self._clients, self._probe = daemon, clients, probe
        self._bystander = bystander
        bystander.require_untouched()
        self._baseline = self._left()
        self._sockets = self._held()["socket"]

    def all_of(self, figure: Figure, deaths: int, seed: int) -> None:
        """Have them all."""
        for number in range(deaths):
            dice = random.Random(f"death {seed} {number}")
            household = Household(self._daemon, self._clients, dice)
            if dice.random() < 0.5:
                household.in_flight()
            doomed = [one for one in household.below if dice.random() < 0.3]
            for one in doomed:
                one.kill()
            when = dice.choice(BOTH_DIE) if number % 3 == 2 else "alone"
            self._end(household.vmm, when)
            dead = time.monotonic()
            figure.deaths[when] += 1
            figure.below += len(household.below)
            if not eventually(lambda: self._left() == self._baseline):
                figure.wrong.append(f"death {number} ({when}): {self._difference()}")
                return
            if when == "alone":
                figure.released.append(time.monotonic() - dead)
            household.rpc.close()
            for one in household.below:
                one.kill()
        self._bystander.require_untouched()
        if not eventually(lambda: self._held()["socket"] <= self._sockets):
            figure.wrong.append(f"{self._held()['socket']} sockets, were {self._sockets}")

    def _end(self, vmm: ClientProcess, when: str) -> None:
        if when == "alone":
            vmm.kill()
        elif when == "VMM first":
            vmm.kill()
            restart(self._daemon, self._probe)
        elif when == "daemon first":
            restart(self._daemon, self._probe, vmm.kill)
        else:
            restart(self._daemon, self._probe)
            vmm.kill()

    def _left(self) -> Any:
        """Return all that a dead VMM must leave as it was."""
        held, kept = self._held(), _descriptors(self._daemon.process.pid)
        return ledger(self._daemon), {what: held[what] for what in held if what in EXACT}, kept

    def _held(self) -> Counter[str]:
        return _descriptors(self._probe.host.get().daemon_pid)

    def _difference(self) -> str:
        parts = zip(("ledger", "daemon", "keeper"), self._left(), self._baseline, strict=True)
        return "; ".join(f"{what}: {now}, was {was}" for what, now, was in parts if now != was)


def _descriptors(pid: int) -> Counter[str]:
    """Return a process's descriptors by what they are."""
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = str(entry.readlink())
        except FileNotFoundError:  # closed while we looked
            continue
        kinds = ("memfd", "pidfd", "socket", "pipe")
        found[next((kind for kind in kinds if kind in name), "other")] += 1
    return found
