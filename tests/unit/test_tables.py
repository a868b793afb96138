"""Tables against the plainest model there is: a dense array, a list, a dict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmemd.hooks.leaves import LEAF, NODE_PAGES_SHIFT
from rmemd.hooks.sparse import FEW
from rmemd.hooks.tables import CHUNK, Space, TableSpec, Write, same_state

# the model covers two windows: around index 0, and around the border of two nodes
NODE = 1 << NODE_PAGES_SHIFT
WINDOW = 3 * LEAF
BASES = (0, NODE - WINDOW // 2)
borders = st.sampled_from([0, 1, LEAF - 1, LEAF, LEAF + 1, 2 * LEAF - 1, WINDOW // 2, WINDOW - 1])
offsets = st.one_of(borders, st.integers(0, WINDOW - 1))
values = st.integers(0, 3)


@st.composite
def spans(draw: st.DrawFn) -> tuple[int, int]:
    """Draw (offset, n) inside the window, often at a border."""
    one, other = draw(offsets), draw(offsets)
    return min(one, other), abs(one - other) + 1


@st.composite
def writes(draw: st.DrawFn) -> tuple[str, Any, Any]:
    """Draw one write: ("fill", span, value), ("put", offsets, values), ("store", span, values)."""
    kind = draw(st.sampled_from(["fill", "put", "store"]))
    if kind == "put":
        at = draw(st.lists(offsets, min_size=1, max_size=12, unique=True))
        return kind, at, draw(st.lists(values, min_size=len(at), max_size=len(at)))
    start, n = draw(spans())
    if kind == "fill":
        return kind, (start, n), draw(values)
    n = min(n, 64, WINDOW - start)
    return kind, (start, n), draw(st.lists(values, min_size=n, max_size=n))


def _write(space: Space, model: np.ndarray, base: int, write: tuple[str, Any, Any]) -> Write:
    kind, at, value = write
    if kind == "put":
        model[at] = value
        indices = np.array(at, dtype=np.int64) + base
        return space.apply(Write("t", "put", (indices, np.array(value, dtype=np.uint8))))
    start, n = at
    model[start : start + n] = value
    if kind == "fill":
        return space.apply(Write("t", "fill", (start + base, n, value)))
    return space.apply(Write("t", "store", (start + base, np.array(value, dtype=np.uint8))))


def _made(kind: str, fill: int) -> tuple[Space, Any]:
    space = Space()
    space.apply(Write("", "create", (TableSpec("t", kind, "u1", fill, 2 * NODE),)))
    return space, space.tables["t"]


@given(
    st.lists(writes(), max_size=8), spans(), values, st.sampled_from(BASES), st.integers(0, 1),
)  # fmt: skip
def test_sparse_reads_as_an_array(
    script: list[Any], span: tuple[int, int], value: int, base: int, fill: int
) -> None:
    space, table = _made("sparse", fill)
    model = np.full(WINDOW, fill, dtype=np.uint8)
    for write in script:
        _write(space, model, base, write)
    start, n = span[0], min(span[1], WINDOW - span[0])
    part = model[start : start + n]
    assert np.array_equal(table.slice(base + start, n), part)
    shuffled = np.random.default_rng(n).permutation(n).astype(np.int64)
    assert np.array_equal(table.get(shuffled + base + start), part[shuffled])
    assert [table.at(base + start + i) for i in (0, n - 1)] == [part[0], part[-1]]
    touched = np.flatnonzero(part != fill) + base + start
    assert np.array_equal(table.touched(base + start, n), touched)
    assert table.equals(base + start, n, value) == bool((part == value).all())
    starts, counts, found = table.runs(base + start, n)
    assert np.array_equal(np.repeat(found, counts), part)
    assert (found[1:] != found[:-1]).all(), "runs are maximal"
    assert starts.tolist() == [base + start, *(base + start + np.cumsum(counts)[:-1]).tolist()]


@given(st.lists(writes(), min_size=1, max_size=8), st.sampled_from(BASES), st.integers(0, 1))
def test_inverses_take_writes_back(script: list[Any], base: int, fill: int) -> None:
    space, table = _made("sparse", fill)
    model = np.full(WINDOW, fill, dtype=np.uint8)
    history = []
    for write in script:
        before = space.snapshot()
        history.append((before, _write(space, model, base, write)))
    for before, inverse in reversed(history):
        space.apply(inverse)
        assert same_state(before, space.snapshot()) == []
    assert table.snapshot() == []


@given(st.lists(writes(), max_size=6), st.lists(writes(), max_size=6), st.sampled_from(BASES))
def test_snapshots_are_equal_exactly_when_the_contents_are(
    one: list[Any], other: list[Any], base: int
) -> None:
    spaces, models = [], []
    for script in (one, other):
        space, _ = _made("sparse", 0)
        model = np.zeros(WINDOW, dtype=np.uint8)
        for write in script:
            _write(space, model, base, write)
        spaces.append(space)
        models.append(model)
    same = same_state(spaces[0].snapshot(), spaces[1].snapshot()) == []
    assert same == np.array_equal(*models)


# over these the leaves of two nodes become mixed and uniform again, many at once
WIDE = 24 * LEAF
wide_writes = st.lists(
    st.tuples(
        st.sampled_from(["put", "put shuffled", "fill", "fill few", "fill few", "store"]),
        st.integers(0, WIDE - 1), st.integers(1, WIDE), st.integers(1, 500), st.integers(0, 2),
    ),
    min_size=1, max_size=8,
)  # fmt: skip


def _wide_write(kind: str, start: int, n: int, npages: int, value: int) -> tuple[str, Any, Any]:
    rng = np.random.default_rng([start, n])
    n = min(n, WIDE - start)
    if kind.startswith("fill"):
        # a few are often of two leaves that lie together, or do not
        if kind == "fill few":
            start = (start | (LEAF - 1)) - 200
            n = min(npages, WIDE - start)
        return "fill", (start, n), value
    if kind == "store":
        n = min(n, 2 * LEAF)
        return "store", (start, n), rng.integers(0, 3, n)
    at = rng.choice(np.arange(start, start + n), min(npages, n), replace=False)
    return "put", at if kind == "put shuffled" else np.sort(at), rng.integers(0, 3, at.size)


@given(wide_writes, st.sampled_from((0, NODE - WIDE // 3)), st.integers(0, 1))
def test_scattered_entries_read_as_an_array_through_undo(
    script: list[tuple[str, int, int, int, int]], base: int, fill: int
) -> None:
    space, table = _made("sparse", fill)
    model = np.full(WIDE, fill, dtype=np.uint8)
    everywhere = np.random.default_rng(1).permutation(WIDE)

    def check() -> None:
        assert np.array_equal(table.get(everywhere + base), model[everywhere])
        some = np.sort(everywhere[:100])
        assert np.array_equal(table.get(some + base), model[some])
        assert [table.at(i + base) for i in some.tolist()] == model[some].tolist()
        assert np.array_equal(table.slice(base, WIDE), model)
        assert np.array_equal(table.touched(base, WIDE), np.flatnonzero(model != fill) + base)

    history = []
    for drawn in script:
        before = model.copy()
        history.append((before, _write(space, model, base, _wide_write(*drawn))))
        check()
    again = Space()
    for write in table.content():
        again.apply(write)
    assert same_state(again.snapshot(), space.snapshot()) == []
    for before, inverse in reversed(history):
        space.apply(inverse)
        model[:] = before
        check()


def test_leaves_that_are_uniform_again_give_their_room_back() -> None:
    space, table = _made("sparse", 0)
    indices = np.arange(0, 64 * LEAF, 2)
    space.apply(Write("t", "put", (indices, 1)))
    before = space.snapshot()
    assert table._nodes[0].entries.size == 64 * LEAF
    inverse = space.apply(Write("t", "fill", (0, 48 * LEAF, 1)))
    assert table._nodes[0].entries.size == 16 * LEAF
    assert np.array_equal(table.get(indices[-16:]), np.ones(16))
    space.apply(inverse)
    assert table._nodes[0].entries.size == 64 * LEAF
    assert same_state(before, space.snapshot()) == []


def test_a_fill_over_whole_nodes_costs_nothing_and_is_undone() -> None:
    space, table = _made("sparse", 0)
    space.apply(Write("t", "put", (np.array([5, NODE + 7]), 2)))
    before = space.snapshot()
    inverse = space.apply(Write("t", "fill", (0, 64 * NODE, 1)))
    assert table.equals(0, 64 * NODE, 1)
    assert table.at(64 * NODE) == 0
    assert all(isinstance(node, int) for node in table._nodes.values())
    space.apply(inverse)
    assert same_state(before, space.snapshot()) == []


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5), values), min_size=1, max_size=30),
    st.sampled_from((0, LEAF - 20, NODE - 20)), st.integers(0, 1),
)  # fmt: skip
def test_few_entries_are_kept_like_many(
    script: list[tuple[int, int, int]], base: int, fill: int
) -> None:
    space, table = _made("sparse", fill)
    other, many = _made("sparse", fill)
    # a fill, even of nothing new, has a node be kept as arrays
    for node in (0, 1):
        other.apply(Write("t", "fill", (node * NODE, LEAF // 2, fill)))
    undo = []
    everywhere = np.arange(base, base + 50)
    for start, n, value in script:
        indices = np.arange(start, start + n)[::-1] + base
        put = Write("t", "put", (indices, value if value % 2 else np.full(n, value, np.uint8)))
        undo.append((space.snapshot(), space.apply(put)))
        other.apply(put)
        assert np.array_equal(table.get(everywhere), many.get(everywhere))
        assert [table.at(i) for i in everywhere.tolist()] == many.get(everywhere).tolist()
        assert np.array_equal(table.touched(base + 3, 30), many.touched(base + 3, 30))
        assert all(map(np.array_equal, table.runs(base + 3, 30), many.runs(base + 3, 30)))
        assert table.snapshot() == many.snapshot()
        again = Space()
        for write in table.content():
            again.apply(write)
        assert same_state(again.snapshot(), space.snapshot()) == []
    for before, inverse in reversed(undo):
        space.apply(inverse)
        assert same_state(before, space.snapshot()) == []


def test_a_table_of_a_few_entries_takes_no_arrays() -> None:
    space, table = _made("sparse", 0)
    for at in range(FEW):
        space.apply(Write("t", "put", (np.array([at]), 1)))
    assert table._nodes == {0: dict.fromkeys(range(FEW), 1)}
    space.apply(Write("t", "put", (np.array([FEW]), 1)))
    assert not isinstance(table._nodes[0], dict)


@given(st.lists(writes(), min_size=1, max_size=8))
def test_dense_is_an_array_with_inverses(script: list[Any]) -> None:
    space, table = _made("dense", 1)
    model = np.ones(WINDOW, dtype=np.uint8)
    undo = []
    for write in script:
        undo.append(_write(space, model, 0, write))
        assert np.array_equal(table.view[:WINDOW], model)
    for inverse in reversed(undo):
        space.apply(inverse)
    assert (table.view == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        table.view[0] = 3


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers()), max_size=12))
def test_records_keep_values_and_order_through_undo(script: list[tuple[bool, int, int]]) -> None:
    space = Space()
    space.apply(Write("", "create", (TableSpec("r", "records"),)))
    table: Any = space.tables["r"]
    # what it says stays the same while a key is there, whatever its value is
    table.group_by(lambda key, value: key % 2)

    def check(expected: list[tuple[int, int]]) -> None:
        assert table.items() == expected
        for odd in (0, 1):
            assert table.grouped(odd) == [key for key, _ in expected if key % 2 == odd]

    model: dict[int, int] = {}
    history = []
    for is_set, key, value in script:
        before = table.items()
        write = Write("r", "set", (key, value)) if is_set else Write("r", "drop", (key,))
        history.append((before, space.apply(write)))
        if is_set:
            model[key] = value
        else:
            model.pop(key, None)
        check(list(model.items()))
    for before, inverse in reversed(history):
        space.apply(inverse)
        check(before)


@given(st.lists(st.tuples(st.integers(0, 3 * CHUNK - 1), st.integers(0, 2)), max_size=12))
def test_a_dense_table_is_searched_where_it_was_written(script: list[tuple[int, int]]) -> None:
    length = 3 * CHUNK
    space = Space()
    space.apply(Write("", "create", (TableSpec("d", "dense", "u1", 0, length),)))
    table: Any = space.tables["d"]
    for at, value in script:
        space.apply(Write("d", "put", (np.array([at], dtype=np.int64), value)))
    for value in (1, 2):
        assert table.where(value).tolist() == np.flatnonzero(table.view == value).tolist()
    for start, end in ((0, length), (100, CHUNK + 1), (CHUNK, 2 * CHUNK), (2 * CHUNK, length)):
        reach = table.reach(start, end)
        assert start <= reach <= end
        assert not table.view[reach:end].any()
        chunks = range(start // CHUNK, (end - 1) // CHUNK + 1)
        assert reach == start or any(at // CHUNK in chunks for at, _ in script)


@given(st.lists(st.tuples(st.sampled_from(["a/1/x", "a/1/y", "a/12/x", "b"]), st.booleans())))
def test_an_owners_tables_are_found_through_undo(script: list[tuple[str, bool]]) -> None:
    space = Space()

    def check() -> None:
        for owner in ("a/1", "a/12", "b"):
            found = [n for n in space.tables if n == owner or n.startswith(owner + "/")]
            assert sorted(space.below(owner)) == sorted(found)

    undo = []
    for name, wanted in script:
        if wanted != (name in space.tables):
            made = TableSpec(name, "records")
            undo.append(
                space.apply(Write("", *(("create", (made,)) if wanted else ("destroy", (name,)))))
            )
        check()
    for inverse in reversed(undo):
        space.apply(inverse)
        check()
