"""What one fixed operation costs as something else grows: nothing may grow that was not touched.

Owns the axes, the operations measured along each, and the exponent. Operations are measured at all
sizes of an axis in turn, round by round, in CPU time of who serves them; the exponent is the e
of cost ~ size^e over the upper half of the sizes. As a figure it stands beside 1, growth in
proportion. ``scaleplots`` draws what was found into build/scale.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.bench import scalehosts
from tests.bench.harness import ROOT, ROUNDS, Figure, LeftOut, of, on_cpus
from tests.bench.scaleplots import draw

BAR = 0.1
QUICK_ROUNDS = 3
PLOTS = ROOT / "build" / "scale"
# one operation's cost, in seconds of CPU
Cost = Callable[[], float]


@dataclass(frozen=True)
class Axis:
    """What grows.

    Attributes:
        name: for the figures and the plot's file.
        what: for the plot's title: "a guest's size".
        label: of the horizontal axis, with its unit.
        sizes: ascending.
        quick: those of a quick run.
        open: makes a host of one size; yields what each operation costs on it.
    """

    name: str
    what: str
    label: str
    sizes: Sequence[int]
    quick: Sequence[int]
    open: Callable[[Path, int], AbstractContextManager[Mapping[str, Cost]]]


@dataclass(frozen=True)
class Line:
    """One operation along an axis: ``costs[round][size]`` in seconds, and the fit."""

    operation: str
    sizes: Sequence[int]
    costs: Sequence[Sequence[float]]

    @property
    def medians(self) -> list[float]:
        """Return the median cost at each size, in seconds."""
        return [statistics.median(at) for at in zip(*self.costs, strict=True)]

    @property
    def exponent(self) -> float:
        """Return the median of the rounds' exponents."""
        return statistics.median(self.exponents)

    @property
    def exponents(self) -> list[float]:
        """Return the exponent of each round."""
        return [exponent(self.sizes, costs) for costs in self.costs]


AXES = (
    Axis("guest", "the size of the guest", "guest and host size (GiB)",
         tuple(1 << i for i in range(11)), (1, 32, 1024), scalehosts.of_guest_size),
    Axis("vms", "the number of other VMs", "other VMs, each with pages mapped, shared and pinned",
         (1, 3, 10, 30, 100, 300, 1000), (1, 10, 100), scalehosts.of_vms),
    Axis("ranges", "the number of attribute ranges", "attribute ranges of the VM",
         (1, 10, 100, 1000, 10_000, 100_000, 1_000_000), (1, 1000, 1_000_000),
         scalehosts.of_ranges),
    Axis("mapped", "what the guest has mapped already", "other pages that the VM has mapped",
         tuple(1 << i for i in range(6, 19, 2)), (1 << 6, 1 << 10, 1 << 14), scalehosts.of_mapped),
    Axis("clients", "the number of clients", "clients of the daemon, which take turns",
         (1, 2, 4, 8, 16, 32, 64), (1, 4, 16), scalehosts.of_clients),
    Axis("consumers", "the number of vendors in one host", "consumers with a guest in the host",
         tuple(range(1, len(scalehosts.CONSUMERS) + 1)), (1, 4, len(scalehosts.CONSUMERS)),
         scalehosts.of_consumers),
)  # fmt: skip


def figures(folder: Path, quick: bool) -> Iterator[Figure | LeftOut]:
    """Yield each operation's exponent, and draw each axis."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    for axis in AXES:
        try:
            with on_cpus(1):
                lines = measure(folder, axis, axis.quick if quick else axis.sizes, rounds)
        except LeftOut as left:
            yield left
            continue
        draw(PLOTS, axis, lines, BAR)
        for line in lines:
            pairs = [(found, 1.0) for found in line.exponents]
            yield of(
                f"scale, {axis.name} {line.sizes[0]} to {line.sizes[-1]}: {line.operation}",
                pairs, unit="exponent", bar=BAR,
            )  # fmt: skip


def measure(folder: Path, axis: Axis, sizes: Sequence[int], rounds: int) -> list[Line]:
    """Measure an axis's operations at all its sizes in turn, after one round that is not counted.

    Every other round goes from the greatest size down.
    """
    with ExitStack() as stack:
        hosts = [stack.enter_context(axis.open(folder, size)) for size in sizes]
        found: dict[str, list[list[float]]] = {operation: [] for operation in hosts[0]}
        for turn in range(rounds + 1):
            for operation, rows in found.items():
                row = [0.0] * len(sizes)
                for at in range(len(sizes))[:: -1 if turn % 2 else 1]:
                    row[at] = hosts[at][operation]()
                if turn:
                    rows.append(row)
    return [Line(operation, sizes, rows) for operation, rows in found.items()]


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """Return e of cost ~ size^e: least squares on logarithms, over the upper half of those."""
    xs, ys = np.log(sizes), np.log(costs)
    upper = xs >= (xs[0] + xs[-1]) / 2
    return float(np.polyfit(xs[upper], ys[upper], 1)[0])
