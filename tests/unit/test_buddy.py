"""The allocator against a textbook buddy, by brute force, and against a set of free frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmemd.errors import Exhausted
from rmemd.hooks.tables import CHUNK_SHIFT, Space
from rmemd.hooks.tx import Tx
from rmemd.model import buddy
from rmemd.model.host import Host, NodeRange, Use
from rmemd.units import MAX_ORDER, PMD_PAGES

BLOCKS = 6
NFRAMES = BLOCKS * PMD_PAGES


def _host(nnodes: int = 1, nframes: int = NFRAMES) -> tuple[Host, Tx]:
    tx = Tx(Space(), "start")
    return Host(tx.space, tx, nframes, nnodes), tx


def _textbook(free: set[int], node: NodeRange) -> list[int]:
    """Count free blocks by merging buddies from the bottom up, one order after the other."""
    level = {pfn for pfn in free if node.first <= pfn < node.end}
    counts = []
    for order in range(MAX_ORDER + 1):
        size = 1 << order
        merged = set()
        if order < MAX_ORDER:
            merged = {pfn for pfn in level if pfn % (2 * size) == 0 and pfn + size in level}
        counts.append(len(level) - 2 * len(merged))
        level = merged
    return counts


# what is taken: whole stretches, so that every order is met, and single frames in between
stretches = st.lists(
    st.tuples(st.integers(0, NFRAMES - 1), st.sampled_from([1, 2, 3, 64, 512, 700])), max_size=8
)


@given(stretches, st.integers(1, 2))
def test_free_blocks_are_a_textbook_buddys(taken: list[tuple[int, int]], nnodes: int) -> None:
    host, tx = _host(nnodes)
    free = set(range(NFRAMES))
    for start, n in taken:
        pfns = [p for p in range(start, min(start + n, NFRAMES)) if p in free]
        buddy.take_exactly(host, tx, np.array(pfns, dtype=np.int64), Use.PRIVATE)
        free.difference_update(pfns)
    for node in host.nodes:
        assert buddy.free_blocks(host, node) == _textbook(free, node)
        mine = {p for p in free if node.first <= p < node.end}
        assert buddy.free_pages(host, node) == len(mine)
        whole = [
            b for b in range(node.first, node.end, PMD_PAGES) if mine.issuperset(range(b, b + 512))
        ]
        assert buddy.free_2m_blocks(host, node) == len(whole)


script = st.lists(
    st.tuples(st.booleans(), st.sampled_from([1, 5, 300, 512, 1100]), st.integers(0, 2)),
    max_size=12,
)


@given(script)
def test_nothing_is_taken_twice_and_nodes_are_asked_in_order(
    steps: list[tuple[bool, int, int]],
) -> None:
    host, tx = _host(nnodes=2)
    free, held = set(range(NFRAMES)), []
    orders = [(0, 1), (1, 0), (1,)]
    for take, n, which in steps:
        nodes = orders[which]
        room = [sum(host.nodes[k].first <= p < host.nodes[k].end for p in free) for k in nodes]
        if not take and held:
            back = held.pop()
            buddy.give(host, tx, back)
            assert free.isdisjoint(back.tolist())
            free.update(back.tolist())
        elif take and n > sum(room):
            before = host.use.view.copy()
            with pytest.raises(Exhausted):
                buddy.take(host, tx, n, Use.SHARED, nodes)
            assert np.array_equal(before, host.use.view)
        elif take:
            pfns = buddy.take(host, tx, n, Use.SHARED, nodes)
            assert pfns.size == n == len(set(pfns.tolist()))
            assert free.issuperset(pfns.tolist()), "a frame was taken twice"
            from_first = sum(host.node_of(p) == nodes[0] for p in pfns.tolist())
            assert from_first == min(n, room[0]), "the first node is used up before the next"
            free.difference_update(pfns.tolist())
            held.append(pfns)
        assert set(np.flatnonzero(host.use.view == Use.FREE).tolist()) == free
        counted = (host.use.view == Use.FREE).reshape(-1, PMD_PAGES).sum(axis=1)
        assert np.array_equal(counted, host.free_in_block.view)


def test_partly_used_blocks_are_filled_first() -> None:
    host, tx = _host()
    buddy.take_exactly(host, tx, np.array([3 * PMD_PAGES]), Use.PRIVATE)
    first = buddy.take(host, tx, 511, Use.PRIVATE, (0,))
    assert set((first // PMD_PAGES).tolist()) == {3}
    assert buddy.free_2m_blocks(host, host.nodes[0]) == BLOCKS - 1
    assert buddy.take(host, tx, 1, Use.PRIVATE, (0,)).tolist() == [0]


# three chunks of the table of counts: most of such a host was never taken of
MANY_BLOCKS = 3 << CHUNK_SHIFT


def _plain_pick(host: Host, node: NodeRange, n: int) -> list[int]:
    """Return the first free frames, partly used blocks first, by looking at every block."""
    first, end = node.first // PMD_PAGES, node.end // PMD_PAGES
    counts = host.free_in_block.view[first:end]
    order = [*np.flatnonzero((counts > 0) & (counts < PMD_PAGES)), *np.flatnonzero(counts == 512)]
    picked: list[int] = []
    for block in order:
        if len(picked) >= n:
            break
        start = (int(block) + first) * PMD_PAGES
        free = np.flatnonzero(host.use.view[start : start + PMD_PAGES] == Use.FREE)
        picked += (free + start).tolist()
    return picked[:n]


@settings(max_examples=40)
@given(
    st.dictionaries(st.integers(0, MANY_BLOCKS - 1), st.sampled_from([1, 511, 512]), max_size=6),
    st.sampled_from([1, 700, 3000]), st.integers(1, 3),
)  # fmt: skip
def test_what_was_never_taken_is_not_looked_at_and_picked_all_the_same(
    used: dict[int, int], n: int, nnodes: int
) -> None:
    host, tx = _host(nnodes, MANY_BLOCKS * PMD_PAGES)
    for block, taken in used.items():
        at = np.arange(taken, dtype=np.int64) + block * PMD_PAGES
        buddy.take_exactly(host, tx, at, Use.PRIVATE)
    for node in host.nodes:
        free = int(host.free_in_block.view[node.first // 512 : node.end // 512].sum(dtype=np.int64))
        assert buddy.free_pages(host, node) == free
        expected = _plain_pick(host, node, n)
        assert buddy.take(host, tx, n, Use.SHARED, (node.node,)).tolist() == expected
