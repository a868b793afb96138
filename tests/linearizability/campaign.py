"""The figure: histories recorded, decided and linearizable, and planted wrong replies refuted.

Owns ``run``, which the test and `make linearizability` share, and how a history is told to people.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from daemons import Daemon

from linearizability.checker import OPEN, Operation, check
from linearizability.models import MODELS
from linearizability.plants import Plant, plants
from linearizability.recorder import CLIENTS, Recorded, Recorder, median_overlap

PLANTED = 20
# of the calls on an object, half at least meet this many others
OVERLAP_MIN = 2


@dataclass
class Figure:
    """What came out.

    Attributes:
        seconds: how long recording and deciding took.
        refuted: histories that no order explains; ``undecided`` those where the search gave up.
        planted: wrong replies; ``seen`` those refuted with revisions, ``seen_without`` without.
    """

    histories: list[Recorded]
    seed: int
    seconds: float = 0.0
    refuted: list[tuple[int, str, list[Operation]]] = field(default_factory=list)
    undecided: int = 0
    planted: list[Plant] = field(default_factory=list)
    seen: int = 0
    seen_without: int = 0

    @property
    def holds(self) -> bool:
        """Return whether it is what was promised."""
        decided = not self.refuted and not self.undecided
        return decided and self.seen == PLANTED and self.overlap > OVERLAP_MIN

    @property
    def overlap(self) -> float:
        """Return the median number of calls of one object that were open at a time."""
        return median_overlap(self.histories)

    def explanations(self) -> Iterator[str]:
        """Yield what is to be looked at: histories refuted, and plants that were not."""
        for number, kind, calls in self.refuted:
            yield f"history {number} of seed {self.seed} is not linearizable ({kind}):"
            yield from map(line, sorted(calls, key=lambda op: op.invoked))
        for plant in self.planted:
            if not plant.refuted():
                yield f"not refuted, a {plant.how}: {line(plant.right)} as {plant.wrong.result}"

    def __str__(self) -> str:
        calls = [op for one in self.histories for ops in one.objects for op in ops]
        by_session = sum(op.door == "session" for op in calls)
        never_answered = sum(op.returned == OPEN for op in calls)
        return (
            f"linearizability: {len(self.histories)} histories by {CLIENTS} clients,"
            f" {len(calls)} operations ({by_session} by the session socket,"
            f" {never_answered} never answered), median overlap {self.overlap:g},"
            f" not linearizable {len(self.refuted)}, undecided {self.undecided},"
            f" {self.seconds:.1f} s; planted wrong replies refuted {self.seen}/{len(self.planted)},"
            f" without revisions {self.seen_without}/{len(self.planted)}"
        )


def run(daemon: Daemon, histories: int, seed: int) -> Figure:
    """Record histories of a daemon, decide them, and plant."""
    begun = time.monotonic()
    with Recorder(daemon.socket_dir, seed) as recorder:
        figure = Figure(list(recorder.record(histories)), seed)
    for one in figure.histories:
        _decide(figure, one)
    figure.seconds = time.monotonic() - begun
    if not figure.refuted and not figure.undecided:
        figure.planted = plants(figure.histories, PLANTED, seed)
        figure.seen = sum(plant.refuted() for plant in figure.planted)
        figure.seen_without = sum(plant.refuted(revisions=False) for plant in figure.planted)
    return figure


def _decide(figure: Figure, one: Recorded) -> None:
    for kind, calls, verdict in zip(one.kinds, one.objects, one.verdicts(), strict=True):
        if verdict.linearizable is None:
            figure.undecided += 1
        elif not verdict.linearizable:
            figure.refuted.append((one.number, kind, smallest(kind, calls)))


def smallest(kind: str, calls: list[Operation]) -> list[Operation]:
    """Return a refuted history without its end: up to the reply that cannot be explained."""
    for reply in sorted(op.returned for op in calls):
        # what was not answered by then is open, as it was to its client
        until = [
            op if op.returned <= reply else _unanswered(op) for op in calls if op.invoked < reply
        ]
        if check(until, *MODELS[kind]).linearizable is False:
            return until
    return calls


def _unanswered(op: Operation) -> Operation:
    return Operation(op.client, op.call, op.args, op.invoked, OPEN, floor=op.floor, door=op.door)


def line(op: Operation) -> str:
    """Return a call as a line: microseconds, who, what, answer, revision."""
    end = "" if op.returned == OPEN else f"{op.returned / 1000:.0f}"
    sign = "=" if op.exact else "<="
    return (
        f"  {op.invoked / 1000:.0f}..{end} client {op.client} ({op.door}) {op.call}{op.args}"
        f" -> {op.result} revision {sign} {op.revision}, > {op.floor}"
    )
