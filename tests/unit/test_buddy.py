"""The allocator against a textbook buddy, by brute force, and against a set of free frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmemd.errors import Exhausted
from rmemd.hooks.tables import Space
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
