"""The frame map as characters: one cell for so many frames, coloured by VM.

Owns the palette. A cell shows the use that most of its frames have, but one poisoned, leaked or
offline frame is enough to mark it: what is rare is what one looks for. The characters differ, so
that the map reads without colour too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from .output import Styled
from .plain import enum_word
from .units import pages_text

if TYPE_CHECKING:
    from rmem.v1 import host_pb2

CELLS_PER_ROW = 64
MAX_ROWS = 16

# use: (character, style); private cells take the colour of their VM
PALETTE = {
    "free": ("·", "dim"),
    "private": ("█", "green"),
    "shared": ("▒", "cyan"),
    "scrubbing": ("~", "yellow"),
    "leaked": ("L", "bold magenta"),
    "offline": ("x", "bold blue"),
    "poisoned": ("!", "bold red"),
    "-": ("?", "red"),
}
RARE = ["poisoned", "leaked", "offline", "scrubbing"]
VM_STYLES = ["green", "yellow", "magenta", "blue", "bright_green", "bright_yellow"]

Use = tuple[str, int]


def draw(runs: list[host_pb2.FrameRun]) -> Styled | str:
    """Draw runs of frames with a legend."""
    if not runs:
        return "no frames"
    first = runs[0].pfn
    total = runs[-1].pfn + runs[-1].npages - first
    per_cell = cell_size(total)
    cells = [Counter[Use]() for _ in range(-(-total // per_cell))]
    for run in runs:
        _add(cells, run, first, per_cell)
    shown = [dominant(cell) for cell in cells]
    spans = _legend(shown, per_cell)
    digits = len(f"{first + total:#x}")
    for start in range(0, len(shown), CELLS_PER_ROW):
        spans.append((f"\n{first + start * per_cell:>#{digits}x}  ", "dim"))
        row = map(_cell, shown[start : start + CELLS_PER_ROW])
        # one span per stretch of equal cells: a colour costs more bytes than the cell
        spans += [
            ("".join(text for text, _ in same), style) for style, same in groupby(row, _style)
        ]
    return Styled(spans)


def cell_size(total: int) -> int:
    """Return the frames per cell: the smallest power of two with which the map fits."""
    size = 1
    while total > size * CELLS_PER_ROW * MAX_ROWS:
        size *= 2
    return size


def dominant(cell: Counter[Use]) -> Use:
    """Return the use (and VM) that a cell shows."""
    for rare in RARE:
        for use in cell:
            if use[0] == rare:
                return use
    return cell.most_common(1)[0][0] if cell else ("-", 0)


def _add(cells: list[Counter[Use]], run: host_pb2.FrameRun, first: int, per_cell: int) -> None:
    """Count a run's frames in the cells that it touches."""
    use = ("poisoned" if run.poisoned else enum_word(run, "use"), run.vm)
    start, end = run.pfn - first, run.pfn - first + run.npages
    for index in range(start // per_cell, -(-end // per_cell)):
        low, high = index * per_cell, (index + 1) * per_cell
        cells[index][use] += min(end, high) - max(start, low)


def _cell(use: Use) -> tuple[str, str]:
    word, vm = use
    character, style = PALETTE.get(word, PALETTE["-"])
    return character, VM_STYLES[vm % len(VM_STYLES)] if word == "private" and vm else style


def _style(cell: tuple[str, str]) -> str:
    return cell[1]


def _legend(shown: Iterable[Use], per_cell: int) -> list[tuple[str, str]]:
    """Return the legend of what is there: each use, and each VM that has private cells."""
    spans = [(f"1 cell = {pages_text(per_cell)}", "dim")]
    for use in sorted(set(shown), key=lambda use: (list(PALETTE).index(use[0]), use[1])):
        word, vm = use
        if word != "private" and any(text == f" {word}" for text, _ in spans):
            continue
        spans += [("   ", ""), _cell(use)]
        spans.append((f" {word} vm/{vm}" if word == "private" and vm else f" {word}", ""))
    return spans
