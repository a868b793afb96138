"""The plots of ``scale``: one an axis, as PNG and SVG, on logarithmic scales.

Owns how they look. The title says what was found, the legend each operation's exponent.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.scale import Axis, Line

# told apart without colours, too
MARKERS = "osD^vPX*"
SIZE_INCHES = (8.0, 4.8)


def draw(folder: Path, axis: Axis, lines: Sequence[Line], bar: float) -> None:
    """Draw an axis's operations into ``folder``/NAME.png and .svg."""
    import matplotlib

    matplotlib.use("agg")
    # text stays text, and the same figures make the same file
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rmemd", "font.size": 10})
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    figure, plot = pyplot.subplots(figsize=SIZE_INCHES, layout="constrained")
    for line, marker in zip(lines, MARKERS, strict=False):
        micros = [cost * 1e6 for cost in line.medians]
        # no "-0.00"
        label = f"{line.operation}: {round(line.exponent, 2) + 0.0:+.2f}"
        plot.plot(line.sizes, micros, marker=marker, markersize=5, linewidth=1.4, label=label)
    plot.set_xscale("log")
    plot.set_yscale("log")
    costs = [cost * 1e6 for line in lines for cost in line.medians]
    decades = floor(log10(min(costs))), ceil(log10(max(costs)))
    plot.set_ylim(10 ** decades[0] / 1.2, 10 ** decades[1] * 1.2)
    plot.set_xlim(lines[0].sizes[0] / 1.3, lines[0].sizes[-1] * 1.3)
    plot.set_xticks(lines[0].sizes, [f"{size:,}" for size in lines[0].sizes])
    plot.xaxis.set_minor_locator(NullLocator())
    plot.set_xlabel(axis.label)
    plot.set_ylabel("CPU time of one operation (µs)")
    plot.set_title(title(axis, lines, bar), loc="left", fontweight="bold")
    plot.grid(which="major", color="0.88")
    plot.yaxis.set_major_formatter(FuncFormatter(lambda micros, _: f"{micros:,.0f}"))
    plot.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    plot.yaxis.set_minor_formatter(NullFormatter())
    plot.spines[["top", "right"]].set_visible(False)
    figure.legend(
        title="operation: exponent e, where cost ∝ size^e", loc="outside lower left", ncols=2,
        frameon=False, alignment="left",
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{axis.name}.png", dpi=120)
    figure.savefig(folder / f"{axis.name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def title(axis: Axis, lines: Sequence[Line], bar: float) -> str:
    """Return what was found."""
    growing = [line.operation for line in lines if line.exponent > bar]
    if not growing:
        return f"No operation costs more with {axis.what}"
    return f"With {axis.what}, these cost more: {', '.join(growing)}"
