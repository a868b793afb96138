"""Put what the last whole run found into the documentation: ``make publish``.

Owns docs/bench.jsonl, of which docs/build.py makes the table of docs/performance.md, the picture of
it, and the copies of the plots of ``scale`` that the documentation shows. A run of some topics is
refused: the documentation says what one run found.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from tests.bench.harness import ROOT, Figure, is_rate

BUILD, DOCS = ROOT / "build", ROOT / "docs"
# the numbers of the goals that have a bar
GOALS = (1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 14)
ROW_INCHES, WIDTH_INCHES = 0.21, 9.0
COLOURS = {True: "#1a7f37", False: "#bc4c00"}


def main() -> int:
    """Publish, or say what is missing; return the exit status."""
    text = (BUILD / "bench.jsonl").read_text()
    figures = [Figure(**json.loads(line)) for line in text.splitlines()]
    absent = set(GOALS) - {number(figure) for figure in figures}
    if absent:
        print(f"no figure of goals {sorted(absent)}: run `make bench` first", file=sys.stderr)
        return 1
    (DOCS / "bench.jsonl").write_text(text)
    draw([figure for figure in figures if number(figure) and figure.bar is not None])
    for shown in (DOCS / "scale").glob("*.svg"):
        shutil.copy(BUILD / "scale" / shown.name, shown)
    return subprocess.run([sys.executable, str(DOCS / "build.py")], check=False).returncode


def number(figure: Figure) -> int | None:
    """Return the number of a figure's goal, None if it has none."""
    found = re.match(r"(\d+) ", figure.goal)
    return int(found[1]) if found else None


def beyond(ratio: float, figure: Figure) -> float:
    """Return how many times over its bar a ratio is; 1 is at the bar, less is within."""
    assert figure.bar is not None
    return figure.bar / ratio if is_rate(figure.unit) else ratio / figure.bar


def draw(figures: Sequence[Figure]) -> None:
    """Draw every goal's figures that have a bar, beside that, into docs/bench.svg."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rmemd", "font.size": 9})
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    size = WIDTH_INCHES, 1.2 + ROW_INCHES * len(figures)
    chart, plot = pyplot.subplots(figsize=size, layout="constrained")
    for row, figure in enumerate(figures):
        ends = [beyond(ratio, figure) for ratio in (figure.ratio_min, figure.ratio_max)]
        colour = COLOURS[bool(figure.holds)]
        plot.plot(ends, [row, row], color=colour, linewidth=1.2, alpha=0.5)
        plot.plot([beyond(figure.ratio_median, figure)], [row], "o", color=colour, markersize=5)
    plot.axvline(1, color="0.3", linewidth=1)
    plot.set_xscale("log")
    plot.xaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}"))
    plot.xaxis.set_minor_formatter(NullFormatter())
    plot.set_yticks(range(len(figures)), [figure.goal for figure in figures])
    plot.set_ylim(len(figures) - 0.4, -0.6)
    plot.set_xlabel("times the bar; lines: least to most")
    holding = sum(bool(figure.holds) for figure in figures)
    chart.suptitle(
        f"{holding} of {len(figures)} figures are within their bar (left of the line)",
        fontweight="bold",
    )
    plot.grid(axis="x", which="major", color="0.88")
    plot.spines[["top", "right"]].set_visible(False)
    chart.savefig(DOCS / "bench.svg", metadata={"Date": None})
    pyplot.close(chart)


if __name__ == "__main__":
    sys.exit(main())
