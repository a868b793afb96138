"""One harness for every figure: ours and its floor in turn, round by round, in one run.

Owns the pairing, the CPU mask, the servers that are measured, and what a figure says. A figure is
the median of its rounds' ratios with their spread, never a time.

What holds. A unit that ends in ``/s`` is a rate: more is better, and the bar is the least that the
median ratio ours / floor may be. Any other unit is a cost: less is better, and the bar is the most.
A figure that stands alone (``alone``) has the promised number as its floor, and 1 as its bar.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc

from tests.daemons import Daemon, read_line

ROOT = Path(__file__).parents[2]
ROUNDS = 7
# what seconds are multiplied by to be a cost, and operations a second to be a rate
SCALES = {
    "us/op": 1e6, "ms/op": 1e3, "ms": 1e3, "s": 1.0,
    "ops/s": 1.0, "Mops/s": 1e-6, "pages/s": 1.0, "GB/s": 1e-9,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One goal's outcome; ``ours`` and ``floor`` are medians in ``unit``."""

    goal: str
    ours: float
    floor: float
    unit: str
    ratio_median: float
    ratio_min: float
    ratio_max: float
    rounds: int
    bar: float | None
    holds: bool | None


class LeftOut(Exception):
    """A figure that cannot be had here, and why; topics yield it, or raise it and end.

    Args:
        what: the peer or figure.
        why: what is not there.
        excused: whether that is this machine's nature. If not, the run fails.
    """

    def __init__(self, what: str, why: str, *, excused: bool = True) -> None:
        super().__init__(f"left out: {what}: {why}")
        self.excused = excused


# --- figures -------------------------------------------------------------------------------------
def paired(
    goal: str,
    ours: Callable[[], object],
    floor: Callable[[], object],
    *,
    per: float = 1,
    bar: float | None = None,
    rounds: int = ROUNDS,
    unit: str = "us/op",
) -> Figure:
    """Time both in turn, after one uncounted round of each.

    Args:
        goal: what is measured, beginning with its number among the goals if it has one.
        ours: does the work once; some 20 ms of it at least, for the clock's and scheduler's sake.
        floor: does the floor's, or peer's, work once.
        per: operations, pages or bytes in one call of either.
        bar: the most of ours / floor; of a rate the least.
        rounds: at least 7, unless the run is quick.
        unit: one of ``SCALES``.
    """
    return in_turn(goal, timed(ours), timed(floor), per=per, bar=bar, rounds=rounds, unit=unit)


def in_turn(
    goal: str,
    ours: Callable[[], float],
    floor: Callable[[], float],
    *,
    per: float = 1,
    bar: float | None = None,
    rounds: int = ROUNDS,
    unit: str = "us/op",
) -> Figure:
    """As ``paired``, of two that say themselves how many seconds they took.

    Each goes first in every other round, so that neither always finds what the other left behind.
    """
    pairs = []
    for turn in range(rounds + 1):
        if turn % 2:
            mine = ours()
            other = floor()
        else:
            other = floor()
            mine = ours()
        pairs.append((_in_unit(mine, per, unit), _in_unit(other, per, unit)))
    return of(goal, pairs[1:], unit=unit, bar=bar)


def of(
    goal: str, pairs: Sequence[tuple[float, float]], *, unit: str, bar: float | None = None
) -> Figure:
    """Make a figure of what was measured by other means: (ours, floor) a round, in ``unit``."""
    ratios = sorted(ours / floor for ours, floor in pairs)
    median = statistics.median(ratios)
    return Figure(
        goal,
        statistics.median(ours for ours, _ in pairs),
        statistics.median(floor for _, floor in pairs),
        unit,
        median,
        ratios[0],
        ratios[-1],
        len(pairs),
        bar,
        None if bar is None else _holds(median, bar, unit),
    )


def alone(goal: str, values: Sequence[float], promised: float, *, unit: str) -> Figure:
    """Make a figure of a number that was promised as such: ops/s at least, or bytes at most."""
    return of(goal, [(value, promised) for value in values], unit=unit, bar=1.0)


def timed(
    function: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """Return a function that calls this one and returns how many seconds that took.

    Where nothing waits ``clock`` may be the thread's processor time, which others do not disturb.
    """

    def seconds() -> float:
        begun = clock()
        function()
        return clock() - begun

    return seconds


def busy(function: Callable[[], object]) -> Callable[[], float]:
    """As ``timed``, of the processor time of this thread, the kernel's share included."""
    return timed(function, time.thread_time)


def is_rate(unit: str) -> bool:
    """Return whether more of this unit is better."""
    return unit.endswith("/s")


def write(figures: list[Figure], path: Path) -> None:
    """Write a JSON line per figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(figure)) + "\n" for figure in figures))


def _in_unit(seconds: float, per: float, unit: str) -> float:
    return SCALES[unit] * (per / seconds if is_rate(unit) else seconds / per)


def _holds(ratio: float, bar: float, unit: str) -> bool:
    return ratio >= bar if is_rate(unit) else ratio <= bar


# --- where it runs -------------------------------------------------------------------------------
@contextmanager
def on_cpus(count: int) -> Iterator[None]:
    """Pin this process, with every thread of it, and all children that it starts, to some cores."""
    before = os.sched_getaffinity(0)
    if len(before) < count:
        raise LeftOut(f"figures on {count} cores", f"there are {len(before)}")
    _pin(set(sorted(before)[:count]))
    try:
        yield
    finally:
        _pin(before)


def _pin(cpus: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cpus)
        except ProcessLookupError:  # it ended while we looked
            continue


# --- what is measured ----------------------------------------------------------------------------
@contextmanager
def rmemd(folder: Path, *options: str) -> Iterator[Daemon]:
    """Serve as a user has it: by default options, with its keeper; more may be given."""
    daemon = Daemon(folder / "rmemd", "--keeper", *options).start()
    try:
        yield daemon
    finally:
        daemon.stop()


@contextmanager
def bare_grpc(folder: Path, kind: str = "grpc", switches: str = "") -> Iterator[grpc.Channel]:
    """Serve /bare.Bare/Empty by a bare gRPC server; yield a bare channel.

    Args:
        folder: for the socket.
        kind: "grpc", which has Echo and EchoStream too, or another of ``tests.bench.bare``.
        switches: gRPC's experiments, of the server alone.
    """
    path = folder / "bare.sock"
    with (
        _bare(kind, path, GRPC_EXPERIMENTS=switches),
        grpc.insecure_channel(f"unix:{path}") as channel,
    ):
        yield channel


@contextmanager
def bare_echo(folder: Path) -> Iterator[socket.socket]:
    """Echo datagrams by a bare Python SEQPACKET server; yield a connection to it."""
    path = folder / "echo.sock"
    with (
        _bare("echo", path),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
    ):
        connection.connect(str(path))
        yield connection


@contextmanager
def _bare(kind: str, path: Path, **environment: str) -> Iterator[None]:
    """Start a server of ``tests.bench.bare``; it serves until its standard input ends."""
    ready, told = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.bare", kind, str(path), str(told)], cwd=ROOT,
        pass_fds=(told,), stdin=subprocess.PIPE, env={**os.environ, **environment},
    )  # fmt: skip
    os.close(told)
    try:
        if not read_line(ready):
            raise RuntimeError(f"the bare {kind} server did not get ready")
        yield
    finally:
        os.close(ready)
        process.communicate()
