"""The frame allocator: orders 0..18 per node, computed from the frames' uses.

Owns taking and giving frames. There are no free lists to keep in step: a free block of order k is
an aligned run of 2^k free frames, which is what a buddy allocator that always merges would hold.
Frames are taken from the partly used 2 MiB blocks first, lowest first, so that whole blocks last.
"""

from __future__ import annotations

import numpy as np

from rmemd.errors import NO_FRAMES
from rmemd.hooks.tx import Tx
from rmemd.model.host import Host, NodeRange, Use
from rmemd.units import I64, MAX_ORDER, PMD_ORDER, PMD_PAGES


def take(host: Host, tx: Tx, n: int, use: Use, nodes: tuple[int, ...]) -> I64:
    """Take ``n`` order-0 frames, from the first of ``nodes`` that has any left, then the next.

    Returns:
        int64 pfns, shape (n,), in the order they are to be used.

    Raises:
        Exhausted: NO_FRAMES; nothing was taken.
    """
    found: list[I64] = []
    missing = n
    for node in nodes:
        if missing == 0:
            break
        pfns = _pick(host, host.nodes[node], missing)
        found.append(pfns)
        missing -= pfns.size
    if missing:
        raise NO_FRAMES(
            f"{n} frames asked for on node {', '.join(map(str, nodes))}, {n - missing} are free",
            state=f"{n - missing} free frames",
        )
    pfns = np.concatenate(found) if len(found) != 1 else found[0]
    tx.put(host.use, pfns, int(use))
    _count(host, tx, pfns, -1)
    return pfns


def take_exactly(host: Host, tx: Tx, pfns: I64, use: Use) -> None:
    """Take frames that are known to be free."""
    tx.put(host.use, pfns, int(use))
    _count(host, tx, pfns, -1)


def give(host: Host, tx: Tx, pfns: I64) -> None:
    """Give frames back."""
    tx.put(host.use, pfns, int(Use.FREE))
    _count(host, tx, pfns, 1)


def free_pages(host: Host, node: NodeRange) -> int:
    """Return how many frames of a node are free."""
    counts, untouched = _touched_counts(host, node)
    return int(counts.sum(dtype=np.int64)) + untouched * PMD_PAGES


def free_2m_blocks(host: Host, node: NodeRange) -> int:
    """Return how many aligned 2 MiB blocks of a node are free, merged or not."""
    return int((_block_counts(host, node) == PMD_PAGES).sum())


def free_blocks(host: Host, node: NodeRange) -> list[int]:
    """Return the free blocks by order 0..18, as /proc/buddyinfo counts them."""
    counts = _block_counts(host, node)
    first = node.first // PMD_PAGES
    partial = np.flatnonzero((counts > 0) & (counts < PMD_PAGES)) + first
    rows = host.use.view.reshape(-1, PMD_PAGES)[partial] == Use.FREE
    found = []
    for _ in range(PMD_ORDER):
        pairs = rows[:, 0::2] & rows[:, 1::2]
        found.append(int(rows.sum()) - 2 * int(pairs.sum()))
        rows = pairs
    full = counts == PMD_PAGES
    # blocks of higher orders are aligned in the host, not in the node
    level = np.concatenate((np.zeros(first, dtype=np.bool_), full))
    for order in range(PMD_ORDER, MAX_ORDER + 1):
        if level.size % 2:
            level = np.append(level, False)
        pairs = level[0::2] & level[1::2]
        merged = 0 if order == MAX_ORDER else int(pairs.sum())
        found.append(int(level.sum()) - 2 * merged)
        level = pairs
    return found


def _pick(host: Host, node: NodeRange, n: int) -> I64:
    """Return up to ``n`` free frames of a node, at the cost of what was ever taken of it."""
    counts, untouched = _touched_counts(host, node)
    blocks = np.flatnonzero((counts > 0) & (counts < PMD_PAGES))
    missing = n - int(counts[blocks].sum(dtype=np.int64))
    if missing > 0:
        whole = -(-missing // PMD_PAGES)
        full = np.flatnonzero(counts == PMD_PAGES)[:whole]
        blocks = np.concatenate((blocks, full))
        beyond = min(whole - full.size, untouched)
        blocks = np.concatenate((blocks, counts.size + np.arange(beyond, dtype=np.int64)))
    blocks += node.first // PMD_PAGES
    reached = np.cumsum(host.free_in_block.get(blocks), dtype=np.int64)
    blocks = blocks[: int(np.searchsorted(reached, n)) + 1]
    row, column = np.nonzero(host.use.view.reshape(-1, PMD_PAGES)[blocks] == Use.FREE)
    pfns: I64 = (blocks[row] * PMD_PAGES + column)[:n].astype(np.int64)
    return pfns


def _touched_counts(host: Host, node: NodeRange) -> tuple[I64, int]:
    """Return the counts of a node's blocks up to the last that was ever taken of, and how many
    there are behind it, which are free as a whole.
    """
    first, end = node.first // PMD_PAGES, node.end // PMD_PAGES
    reach = host.free_in_block.reach(first, end)
    return host.free_in_block.view[first:reach], end - reach


def _block_counts(host: Host, node: NodeRange) -> I64:
    counts: I64 = host.free_in_block.view[node.first // PMD_PAGES : node.end // PMD_PAGES]
    return counts


def _count(host: Host, tx: Tx, pfns: I64, sign: int) -> None:
    blocks, changes = np.unique(pfns // PMD_PAGES, return_counts=True)
    counts = host.free_in_block.get(blocks).astype(np.int64) + sign * changes
    tx.put(host.free_in_block, blocks, counts.astype(np.uint16))
