"""The page map as a picture: a node's frames before and after compaction, one cell per page.

Owns the drawing. A node is a grid of 2 MiB blocks, a block a tile of 512 cells, row by row; the
cells' colours say whose page is on the frame and what compaction did with it. A tile with a green
edge is a free block: what compaction is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from .fragmentation import BLOCK_PAGES, Compacted, Frames

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Image: TypeAlias = npt.NDArray[np.uint8]

TILE_WIDTH = 32
TILE_HEIGHT = BLOCK_PAGES // TILE_WIDTH
TILES_ACROSS = 8
SCALE = 2
MARGIN, GAP, HEAD, TITLE, LEGEND = 40, 48, 74, 96, 64
DPI = 100

PAPER, INK, QUIET = "#ffffff", "#1f2933", "#616e7c"
FREE, EDGE, FREE_EDGE = "#eef1f4", "#cbd2d9", "#2f9e5b"
STUCK, STAYS, ARRIVED, OTHER = "#d1495b", "#3d7ea6", "#12395b", "#9aa5b1"


def draw(path: Path, shown: Sequence[Compacted], origin: str) -> None:
    """Draw the experiments, one per row, before on the left and after on the right.

    Args:
        path: the PNG to write.
        shown: the experiments, all on the same node.
        origin: where the figures come from, said at the bottom.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    width, height = _panel_size(shown[0].blocks)
    page_width = 2 * MARGIN + 2 * width + GAP
    page_height = TITLE + len(shown) * (HEAD + height) + LEGEND
    figure = Figure(figsize=(page_width / DPI, page_height / DPI), dpi=DPI, facecolor=PAPER)
    _write(figure, page_width, page_height, MARGIN, 34, "Who keeps pages from moving", 19, INK)
    _write(
        figure, page_width, page_height, MARGIN, 64,
        f"One node of {shown[0].blocks} blocks of 2 MiB (a tile each, one cell a page), half of "
        f"each block taken at random, before and after compaction.", 11, QUIET,
    )  # fmt: skip
    for row, one in enumerate(shown):
        top = TITLE + row * (HEAD + height)
        for column, (when, image) in enumerate(
            (("before", _paint(one, after=False)), ("after", _paint(one, after=True)))
        ):
            left = MARGIN + column * (width + GAP)
            _head(figure, (page_width, page_height), (left, top), one, when)
            _place(figure, (page_width, page_height), (left, top + HEAD), image)
    _legend(figure, page_width, page_height, shown, origin)
    figure.savefig(path, dpi=DPI, facecolor=PAPER)


def _panel_size(blocks: int) -> tuple[int, int]:
    across = min(TILES_ACROSS, blocks)
    down = -(-blocks // across)
    return SCALE * (across * (TILE_WIDTH + 2)), SCALE * (down * (TILE_HEIGHT + 2))


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def classify(one: Compacted, *, after: bool) -> Frames:
    """Return each frame's class: 0 free, 1 cannot move, 2 can move, 3 moved here, 4 other."""
    cells = one.cells_after if after else one.cells_before
    classes = np.where(cells > 0, 2, np.where(cells < 0, 4, 0))
    # a page that cannot move is on the same frame before and after
    classes[one.stuck] = 1
    if after:
        classes[one.arrived] = 3
    return classes


def _paint(one: Compacted, *, after: bool) -> Image:
    """Return the tiles as an RGB image, ``SCALE`` pixels a cell, a two-pixel edge round each."""
    palette = np.array([_rgb(c) for c in (FREE, STUCK, STAYS, ARRIVED, OTHER)], dtype=np.uint8)
    classes = classify(one, after=after).reshape(one.blocks, TILE_HEIGHT, TILE_WIDTH)
    across = min(TILES_ACROSS, one.blocks)
    width, height = _panel_size(one.blocks)
    image = np.full((height, width, 3), _rgb(PAPER), dtype=np.uint8)
    for block in range(one.blocks):
        free = not classes[block].any()
        tile = np.full(
            ((TILE_HEIGHT + 1) * SCALE, (TILE_WIDTH + 1) * SCALE, 3),
            _rgb(FREE_EDGE if free else EDGE), dtype=np.uint8,
        )  # fmt: skip
        inner = palette[classes[block]].repeat(SCALE, axis=0).repeat(SCALE, axis=1)
        tile[1:-1, 1:-1] = inner
        top = (block // across) * (TILE_HEIGHT + 2) * SCALE
        left = (block % across) * (TILE_WIDTH + 2) * SCALE
        image[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return image


def _place(figure: Figure, page: tuple[int, int], at: tuple[int, int], image: Image) -> None:
    """Put an image on the page pixel by pixel."""
    height, width = image.shape[:2]
    axes = figure.add_axes(
        (
            at[0] / page[0],
            1 - (at[1] + height) / page[1],
            width / page[0],
            height / page[1],
        )
    )
    axes.imshow(image, interpolation="nearest", aspect="auto")
    axes.set_axis_off()


def _head(
    figure: Figure, page: tuple[int, int], at: tuple[int, int], one: Compacted, when: str
) -> None:
    free = one.free_before if when == "before" else one.free_after
    if when == "before":
        title, line = one.label, f"before: {free} of {one.blocks} blocks free"
    else:
        title = "" if one.regained else "nothing regained"
        title = f"{one.regained} blocks regained" if one.regained else title
        line = f"after: {free} of {one.blocks} blocks free; {one.moved} pages moved"
        if one.unmovable:
            line += f", {one.unmovable} cannot move"
    colour = INK if when == "before" else (FREE_EDGE if one.regained else STUCK)
    _write(figure, *page, at[0], at[1] + 36, title, 14, colour)
    _write(figure, *page, at[0], at[1] + 60, line, 11, QUIET)


def _legend(
    figure: Figure, width: int, height: int, shown: Sequence[Compacted], origin: str
) -> None:
    entries = [
        (FREE, EDGE, "free page"),
        (STUCK, STUCK, "page that migrate_folio NULL keeps in place"),
        (STAYS, STAYS, "page that may move"),
        (ARRIVED, ARRIVED, "page moved here by compaction"),
        (FREE, FREE_EDGE, "free 2 MiB block"),
    ]
    left, at = MARGIN, height - LEGEND + 28
    for fill, edge, text in entries:
        swatch = np.full((14, 14, 3), _rgb(edge), dtype=np.uint8)
        swatch[2:-2, 2:-2] = _rgb(fill)
        _place(figure, (width, height), (left, at - 12), swatch)
        _write(figure, width, height, left + 20, at, text, 10, INK)
        left += 20 + int(len(text) * 7.1) + 22
    _write(figure, width, height, MARGIN, height - 12, origin, 9, QUIET)


def _write(
    figure: Figure, width: int, height: int, left: int, base: int, text: str, size: int, colour: str
) -> None:
    """Write text with its baseline at a pixel of the page."""
    figure.text(
        left / width, 1 - base / height, text, fontsize=size * 72 / DPI * 1.25, color=colour,
        ha="left", va="baseline", family="DejaVu Sans",
    )  # fmt: skip
