"""The quick form, which ``make test`` runs after the tests: has any ratio become much worse?

Owns which figures are watched and how much worse is much. Whether goals are reached is not its
question (``make bench`` answers that), and no time is compared with anything. What counts is the
best round: code that got slower has no good round, a machine that is busy has some.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tests.bench.harness import Figure, LeftOut, is_rate
from tests.bench.topics import outcomes

# Two cores, which whoever runs the tests may use besides, and rounds of a few milliseconds: ratios
# were seen to move by a third. Half as much again in every round, twice in a row, is not noise.
SLACK = 1.5
# Topics, their figures, and where those are if not at their bars. Both ends of each are on one
# core, and wait for no disk, timer or peer of another make. None is a number that was promised as
# such: that would measure the machine.
WATCHED: Mapping[str, Mapping[str, float | None]] = {
    "unary": {
        "1 unary GetPage / Empty on a bare server, 1 core": 1.3,
        "unary PreFault of a mapped page / Empty on a bare server, 1 core": 1.9,
    },
    "session": {
        "3 pin, release / unary Empty, 1 core": 0.42,
        "3 get, put / unary Empty, 1 core": 0.42,
        "3 read / unary Empty, 1 core": 0.2,
    },
    "records": {
        "records: a pin or an unpin of 1 pages / the same with no log": 1.5,
        "records: a pin or an unpin among 4096 others / among 64": None,
    },
    "encryption": {"10 encryption, portable / one Cipher per page": None},
    "dispatch": {"12 a consumer's hook / pluggy's call of 3": None},
}


def main() -> int:
    """Take the watched topics, those with a worse figure once more; say which stayed worse."""
    worse = [topic for topic in WATCHED if _is_worse(topic)]
    return int(bool(worse))


def _is_worse(topic: str) -> bool:
    worse = _worse(topic)
    if worse:
        worse &= _worse(topic)
    print(f"{topic}: {'worse: ' + '; '.join(sorted(worse)) if worse else 'ok'}", flush=True)
    return bool(worse)


def _worse(topic: str) -> set[str]:
    """Return which of a topic's watched figures are worse, or are not there at all."""
    missing = dict(WATCHED[topic])
    found = set()
    for outcome in outcomes(topic, quick=True):
        if isinstance(outcome, LeftOut):
            if not outcome.excused:
                found.add(str(outcome))
        elif outcome.goal in missing and is_worse(outcome, missing.pop(outcome.goal)):
            print(f"  {outcome.goal}: {outcome.ratio_median:.3f}", flush=True)
            found.add(outcome.goal)
    return found | {f"{goal} is not measured" for goal in missing}


def is_worse(figure: Figure, usual: float | None = None) -> bool:
    """Return whether even its best round is beyond its bar, or where it is, by ``SLACK``."""
    bar = figure.bar if usual is None else usual
    if bar is None:
        raise ValueError(f"{figure.goal} has no bar")
    if is_rate(figure.unit):
        return figure.ratio_max < bar / SLACK
    return figure.ratio_min > bar * SLACK


if __name__ == "__main__":
    sys.exit(main())
