"""The figure: a daemon killed again and again under its clients, and what they found each time.

Owns ``run``, which the test and `make crash` share. A cycle: the clients work, the daemon dies at
its moment, the keeper starts it again, the clients pause and verify everything.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from daemons import Daemon, eventually

from rmem_client import Client, RmemError

from . import launcher, plans
from .client import LEAVE, WORK, Report, serve

CLIENTS = 8
PATIENCE_SECONDS = 120.0
# a life that has no plan ends within this time; one whose moment does not come, after the other
ANY_TIME_SECONDS = 0.3
NO_MOMENT_SECONDS = 10.0
LAST_WORDS = 40_000
# a crash loop is what is wanted here
OPTIONS = (
    "--keeper", "--host-memory", "256M", "--set", "daemon.restart_delay_max_seconds=0",
    "--set", "daemon.crash_loop_starts=0",
)  # fmt: skip
# a planned moment that did not come, by its name among the others
NEVER = "never"


@dataclass
class Figure:
    """What came of it.

    Attributes:
        wanted: how many kills.
        kills: how many there were, by moment; a daemon that recovers may be killed, too.
        serving: seconds from each kill to the first call answered after it.
        reports: the clients', newest.
        violations: of invariants, as the daemon in the end found them itself; or why it said
            nothing.
        seconds: how long it took.
    """

    wanted: int
    kills: Counter[str] = field(default_factory=Counter)
    serving: list[float] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def operations(self) -> Counter[str]:
        """Return how many operations were acknowledged, by name."""
        return sum((Counter(one.operations) for one in self.reports), Counter())

    @property
    def failures(self) -> list[str]:
        """Return why it falls short, a text each."""
        return [one.failure for one in self.reports if one.failure] + self.violations

    @property
    def holds(self) -> bool:
        """Return whether it is what was promised."""
        wrong = any(one.wrong for one in self.reports)
        came = not any(moment.startswith(NEVER) for moment in self.kills)
        return self.kills.total() >= self.wanted and came and not self.failures and not wrong

    def __str__(self) -> str:
        moments = [f"{count} {what}" for what, count in sorted(self.kills.items())]
        worst, middle = (
            (max(self.serving) * 1e3, median(self.serving) * 1e3) if self.serving else (0.0, 0.0)
        )
        return (
            f"moments: {', '.join(moments)}\n"
            f"crash: {self.kills.total()} kills under {len(self.reports)} clients, restart to"
            f" serving {middle:.0f} ms (median), {worst:.0f} ms (worst);"
            f" {self.operations.total()} operations acknowledged, lost {len(self.failures)};"
            f" pages checked {sum(one.checked for one in self.reports)},"
            f" wrong {sum(one.wrong for one in self.reports)}; {self.seconds:.0f} s"
        )


def run(directory: Path, kills: int, seed: int, clients: int = CLIENTS) -> Figure:
    """Kill a daemon so often, and return what its clients found."""
    begun = time.monotonic()
    told = directory / "plans"
    told.mkdir(parents=True)
    plans.write(told, plans.draw(kills + 1, seed))
    daemon = CrashDaemon(directory, told).start()
    figure = Figure(kills)
    try:
        with Clients(clients, seed, daemon.socket_dir) as crowd, daemon.client() as probe:
            figure.reports = crowd.reports()
            cycles = Cycles(daemon, probe, crowd, told, seed)
            figure.serving = cycles.serving
            try:
                _cycles(figure, cycles, crowd)
                if not figure.failures:
                    figure.violations = [str(one) for one in probe.host.check().violations]
                    figure.reports = crowd.leave()
            except RmemError as error:
                # asked while the clients live: what it waits for may be one of them
                figure.violations.append(f"{error}\n{_last_words(daemon)}")
    finally:
        daemon.kill() if figure.failures else daemon.stop()
        figure.seconds = time.monotonic() - begun
    return figure


def _cycles(figure: Figure, cycles: Cycles, crowd: Clients) -> None:
    while figure.kills.total() < figure.wanted and not figure.failures:
        figure.kills += cycles.cycle()
        figure.reports = crowd.reports()


def _last_words(daemon: Daemon) -> str:
    """Return what a daemon that does not answer is doing, and the end of its log."""
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
    for pid in children.read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    # the main thread's stack is the last
    eventually(lambda: "Current thread" in daemon.log[-LAST_WORDS:], patience=5.0)
    return daemon.log[-LAST_WORDS:]


class CrashDaemon(Daemon):
    """A daemon that comes through the launcher."""

    program = (sys.executable, launcher.__file__)

    def __init__(self, directory: Path, told: Path) -> None:
        super().__init__(directory, *OPTIONS, env={plans.ENVIRONMENT: str(told)})


class Cycles:
    """One cycle after the other."""

    def __init__(
        self, daemon: Daemon, probe: Client, crowd: Clients, told: Path, seed: int
    ) -> None:
        self.serving: list[float] = []
        self._probe, self._crowd, self._told = probe, crowd, told
        self._rng = random.Random(f"cycles {seed}")
        self._life, self._pid = self._serving()

    def cycle(self) -> Counter[str]:
        """Have the clients work until the daemon has died and serves again; return the deaths."""
        life = self._life
        with (self._told / plans.ARMED).open("r+b") as armed:
            armed.write(life.to_bytes(plans.NUMBER, "little"))
        self._crowd.work()
        killed_at = self._end(life)
        self._life, self._pid = self._serving()
        answered_at = time.monotonic()
        self._crowd.pause()
        ended = range(life, self._life)
        self.serving.append(answered_at - max(killed_at, *map(self._killed_at, ended)))
        return Counter(map(self._moment, ended))

    def _serving(self) -> tuple[int, int]:
        """Return which life serves, and its process."""
        while True:
            lives = self._lives()
            pid = self._probe.host.get().daemon_pid
            if lives == self._lives():
                return lives - 1, pid

    def _end(self, life: int) -> float:
        """Wait for a life's end, and see to it; return when that was."""
        try:
            pidfd = os.pidfd_open(self._pid)
        except ProcessLookupError:
            # its moment came before the clients worked
            return self._killed_at(life)
        planned = plans.read(self._told, life) is not None
        seconds = NO_MOMENT_SECONDS if planned else self._rng.uniform(0, ANY_TIME_SECONDS)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        try:
            if poll.poll(seconds * 1e3):
                return self._killed_at(life)
            killed_at = time.monotonic()
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll.poll()
            return killed_at
        finally:
            os.close(pidfd)

    def _lives(self) -> int:
        return (self._told / plans.LIVES).stat().st_size

    def _killed_at(self, life: int) -> float:
        """Return when a life ended itself, 0 if it did not."""
        data = (self._told / plans.KILLED).read_bytes()[life * plans.NUMBER :][: plans.NUMBER]
        return int.from_bytes(data, "little") / 1e9

    def _moment(self, life: int) -> str:
        plan = plans.read(self._told, life)
        if plan is None or not self._killed_at(life):
            return "at any time" if plan is None else f"{NEVER} {plan.when} a {plan.point}"
        return f"{plan.when} a {plan.point}{' in recovery' if plan.at_start else ''}"


class Clients:
    """The client processes."""

    def __init__(self, number: int, seed: int, socket_dir: Path) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["crash.client"])
        self._pause = context.Event()
        self._pipes: list[Any] = []
        self._processes = []
        for client in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(client, seed, str(socket_dir), self._pause, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            process.kill()
            process.join(PATIENCE_SECONDS)
        for pipe in self._pipes:
            pipe.close()

    def work(self) -> None:
        """Have them work."""
        self._pause.clear()
        for pipe in self._pipes:
            pipe.send(WORK)

    def pause(self) -> None:
        """Have them stop working, and verify."""
        self._pause.set()

    def reports(self) -> list[Report]:
        """Return what each has to tell, as soon as all of them have verified."""
        told = []
        for number, pipe in enumerate(self._pipes):
            silent = Report(failure=f"client {number} is silent")
            told.append(pipe.recv() if pipe.poll(PATIENCE_SECONDS) else silent)
        return told

    def leave(self) -> list[Report]:
        """Have them let everything go, and return what they have to tell in the end."""
        for pipe in self._pipes:
            pipe.send(LEAVE)
        return self.reports()
