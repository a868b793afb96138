"""Take the figures: ``make bench``, ``make bench ARGS='--only session peers'``.

Prints a table, writes build/bench.jsonl, and exits with 1 where a bar does not hold, a topic failed
or a peer that is installed does not work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from tests.bench.harness import ROOT, Figure, LeftOut, is_rate, write
from tests.bench.topics import TOPICS, outcomes

COLUMNS = ("goal", "ours", "floor", "unit", "ratio", "min", "max", "rounds", "bar", "holds")
WORDS = {None: "", True: "yes", False: "NO"}


def main() -> int:
    """Take every figure that was asked for, and show them."""
    asked = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 150)
    figures: list[Figure] = []
    left: list[LeftOut] = []
    for number, topic in enumerate(asked.only, 1):
        with console.status(f"{topic}, {number} of {len(asked.only)}"):
            for outcome in outcomes(topic, quick=asked.quick):
                console.print(_line(outcome), highlight=False, markup=False, soft_wrap=True)
                if isinstance(outcome, Figure):
                    figures.append(outcome)
                else:
                    left.append(outcome)
    console.print(_table(figures))
    for one in left:
        console.print(str(one), highlight=False, markup=False, soft_wrap=True)
    write(figures, ROOT / "build" / "bench.jsonl")
    return int(
        any(figure.holds is False for figure in figures) or not all(one.excused for one in left)
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same figures, smaller")
    parser.add_argument(
        "--only", nargs="+", choices=TOPICS, default=TOPICS, metavar="TOPIC",
        help=", ".join(TOPICS),
    )  # fmt: skip
    return parser.parse_args()


def _line(outcome: Figure | LeftOut) -> str:
    if isinstance(outcome, LeftOut):
        return str(outcome)
    bar = f", bar {_bar(outcome)}: {WORDS[outcome.holds]}" if outcome.bar is not None else ""
    return f"{outcome.goal}: {outcome.ratio_median:.3f}{bar}"


def _bar(figure: Figure) -> str:
    if figure.bar is None:
        return ""
    return f"{'≥' if is_rate(figure.unit) else '≤'} {figure.bar:.3g}"


def _table(figures: Iterable[Figure]) -> Table:
    table = Table(title="ours / floor, the median of paired rounds")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("goal", "unit") else "right")
    for f in figures:
        table.add_row(
            f.goal, f"{f.ours:.4g}", f"{f.floor:.4g}", f.unit, f"{f.ratio_median:.3f}",
            f"{f.ratio_min:.3f}", f"{f.ratio_max:.3f}", str(f.rounds), _bar(f), WORDS[f.holds],
            style="red" if f.holds is False else None,
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
