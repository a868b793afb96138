"""Goal 14: how soon and how large rmemd is ready, and what it costs at rest.

The daemon is started as a user has it: by its command, with its keeper, by defaults. Time is from
the execution of the command to the line on ``--ready-fd``; memory is what all of its processes have
resident. The floor is ``barestart``. A restart is measured from the kill -9 of a daemon with a
small guest to the first answer by its successor.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from rmem_client import Client
from rmem_client.session import Session
from tests.bench.harness import ROOT, ROUNDS, Figure, LeftOut, in_turn, of, on_cpus
from tests.daemons import BIN, PATIENCE_SECONDS, read_line

READY = "14 ready to serve / a bare gRPC server that imports the same packages"
MEMORY = "14 memory once ready, keeper included / the same bare server"
BAR = 1.3
REST_SECONDS = 5.0
QUICK_REST_SECONDS = 1.0
IDLE_SESSIONS = 8
PAUSE_SECONDS = 0.02
PAGE = os.sysconf("SC_PAGESIZE")


class Started:
    """A server that has been started in a process of its own, and was waited for.

    Attributes:
        seconds: from the execution to its line on the descriptor that is its last argument.
    """

    def __init__(self, *command: str) -> None:
        # whatever this shell says of bytecode, users have it, from the uncounted round on
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "XDG_CONFIG_HOME": os.devnull}
        ready, told = os.pipe()
        begun = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, str(told)], pass_fds=(told,), cwd=ROOT, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(told)
        said = read_line(ready)
        self.seconds = time.perf_counter() - begun
        os.close(ready)
        if not said:
            self._process.wait()
            raise RuntimeError(f"{command[0]} did not get ready")

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE_SECONDS)

    def resident(self) -> int:
        """Return the bytes that all of its processes have resident, once that changes no more."""
        before, now = 0, -1
        while before != now:
            time.sleep(PAUSE_SECONDS)
            before, now = now, sum(_resident(pid) for pid in self._pids())
        return now

    def cpu_seconds(self) -> float:
        """Return the processor time that all of its threads have used."""
        return sum(_cpu_seconds(pid) for pid in self._pids())

    def _pids(self) -> list[int]:
        first = self._process.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text()
        return [first, *map(int, children.split())]


def figures(folder: Path, quick: bool) -> Iterator[Figure | LeftOut]:
    """Yield the figures of a start, a restart and a rest."""
    rounds = 2 if quick else ROUNDS
    for cores in (1, 2):
        try:
            with on_cpus(cores):
                yield _ready(folder, rounds, f"{READY}, {cores} core{'s' * (cores > 1)}")
        except LeftOut as left:
            yield left
    yield _memory(folder, rounds)
    yield _restart(folder, rounds)
    seconds = QUICK_REST_SECONDS if quick else REST_SECONDS
    yield _rest(folder, rounds, seconds, sessions=0)
    yield _rest(folder, rounds, seconds, sessions=IDLE_SESSIONS)


def _rmemd(folder: Path) -> Started:
    command = ("serve", "--socket-dir", str(folder / "socket"), "--ready-fd")
    return Started(str(BIN / "rmemd"), *command)


def _bare(folder: Path) -> Started:
    program = Path(__file__).with_name("barestart.py")
    return Started(sys.executable, str(program), str(folder / "bare.sock"))


def _ready(folder: Path, rounds: int, goal: str) -> Figure:
    def seconds(start: Callable[[Path], Started]) -> float:
        with start(folder) as server:
            return server.seconds

    return in_turn(
        goal, lambda: seconds(_rmemd), lambda: seconds(_bare), bar=BAR, rounds=rounds, unit="ms"
    )


def _memory(folder: Path, rounds: int) -> Figure:
    pairs = []
    for _ in range(rounds):
        with _rmemd(folder) as ours, _bare(folder) as bare:
            pairs.append((ours.resident() / 1e6, bare.resident() / 1e6))
    return of(MEMORY, pairs, unit="MB resident", bar=BAR)


def _restart(folder: Path, rounds: int) -> Figure:
    """Take the time to the first answer after a kill beside the time to ready of the same life."""
    pairs = []
    for _ in range(rounds):
        with _rmemd(folder) as server:
            _small_guest(folder)
            with Client(folder / "socket") as client:
                daemon = client.host.get().daemon_pid
            begun = time.perf_counter()
            os.kill(daemon, signal.SIGKILL)
            # its listener is kept: who connects is answered as soon as anybody serves
            with Session.open(folder / "socket"):
                pairs.append(((time.perf_counter() - begun) * 1e3, server.seconds * 1e3))
    return of("14 kill -9 to serving again / time to ready", pairs, unit="ms")


def _small_guest(folder: Path) -> None:
    with Client(folder / "socket") as client:
        vm = client.vms.create("sw-protected")
        file = client.files.create(vm, 1 << 20, flags=1)
        client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=1 << 20, file=file)
        client.vms.prefault(vm, 0, 1 << 20)


def _rest(folder: Path, rounds: int, seconds: float, sessions: int) -> Figure:
    """Take the processor time of a rest beside that of a bare server that rests as long."""
    pairs = []
    with _rmemd(folder) as ours, _bare(folder) as bare, ExitStack() as opened:
        for _ in range(sessions):
            opened.enter_context(Session.open(folder / "socket"))
        if sessions:
            client = opened.enter_context(Client(folder / "socket"))
            opened.enter_context(client.watch())
        for _ in range(rounds + 1):
            begun = ours.cpu_seconds(), bare.cpu_seconds()
            time.sleep(seconds)
            used = ours.cpu_seconds() - begun[0], bare.cpu_seconds() - begun[1]
            # one that never woke has used nothing, which nothing can be divided by
            mine, its = (max(one / seconds * 1e6, 1.0) for one in used)
            pairs.append((mine, its))
    held = f"{sessions} idle sessions and a watch" if sessions else "nobody connected"
    return of(f"14 at rest, {held} / a bare server at rest", pairs[1:], unit="us CPU/s of rest")


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def _cpu_seconds(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
