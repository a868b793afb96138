"""Whatever is written comes back, and a table's content makes the same table of nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rmemd.hooks.leaves import LEAF, NODE_PAGES_SHIFT
from rmemd.hooks.tables import CHUNK, CONTENT_CHUNKS, Space, TableSpec, Write, same_state
from rmemd.store.arrays import DTYPES
from rmemd.store.codec import Record, decode, decode_value, encode_record, encode_value

NODE = 1 << NODE_PAGES_SHIFT
LENGTH = (CONTENT_CHUNKS + 3) * CHUNK + 5

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    | st.text(st.characters()) | st.binary(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.frozensets(st.integers() | st.text())
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
)  # fmt: skip


@given(plain)
def test_any_plain_value_comes_back(value: Any) -> None:
    data = encode_value(value)
    found = decode_value(data)
    assert found == value
    assert encode_value(found) == data


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Draw an array of runs, each a progression, so that every form is met at its borders."""
    dtype = draw(st.sampled_from([d for d in DTYPES if d.kind in "iub"]))
    steps = st.one_of(st.integers(-2, 2), st.integers(0, 2**64 - 1))
    runs = draw(st.lists(st.tuples(st.integers(0, 2**64 - 1), steps, st.integers(0, 60))))
    pieces = [
        np.uint64(start) + np.uint64(step % 2**64) * np.arange(n, dtype=np.uint64)
        for start, step, n in runs
    ]
    joined = np.concatenate([np.empty(0, dtype=np.uint64), *pieces])
    return (joined & np.uint64(1)).astype(dtype) if dtype.kind == "b" else joined.astype(dtype)


@given(st.lists(arrays(), max_size=4))
def test_any_array_comes_back(given_arrays: list[Any]) -> None:
    with np.errstate(over="ignore"):
        found = decode_value(encode_value([*given_arrays, *given_arrays]))
    for one, other in zip([*given_arrays, *given_arrays], found, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@given(
    st.sampled_from([d for d in DTYPES if d.kind in "iu"]), st.integers(0, 2**64 - 1),
    st.lists(st.sampled_from([0, 1, 2, 255, 256, 65535, 65536, 2**32 - 1]), min_size=65),
)  # fmt: skip
def test_what_ascends_in_steps_comes_back(dtype: Any, start: int, steps: list[int]) -> None:
    with np.errstate(over="ignore"):
        numbers = np.cumsum(np.array([start, *steps], dtype=np.uint64)).astype(dtype)
    found = decode_value(encode_value(numbers))
    assert found.dtype == numbers.dtype
    assert np.array_equal(found, numbers)


# --- content of tables ---------------------------------------------------------------------------
def rebuilt(space: Space) -> Space:
    """The space that the encoded content of every table makes."""
    made = Space()
    for table in space.tables.values():
        data = encode_record(Record(1, "checkpoint", tuple(table.content())))
        (record,) = decode(data)
        assert isinstance(record, Record)
        apply(made, record.writes)
    return made


def apply(space: Space, writes: Iterable[Write]) -> list[Write]:
    return [space.apply(write) for write in writes]


@st.composite
def writes(draw: st.DrawFn, ends: tuple[int, ...]) -> Write:
    """Draw a fill, a put or a store that begins and ends near where something else does."""
    one, other = (draw(st.sampled_from(ends)) + draw(st.integers(-1, 1)) for _ in range(2))
    at, past = min(max(min(one, other), 0), ends[-1] - 1), min(max(one, other), ends[-1])
    n = max(past - at, 1)
    kind, value = draw(st.sampled_from(["fill", "put", "store"])), draw(st.integers(0, 3))
    if kind == "fill":
        return Write("t", "fill", (at, n, value))
    n = min(n, 2 * LEAF)
    values = (np.arange(n) // draw(st.integers(1, n)) + value).astype(np.uint8)
    if kind == "store":
        return Write("t", "store", (at, values))
    indices = np.arange(at, at + n)[:: draw(st.integers(1, 3))]
    if draw(st.booleans()):
        return Write("t", "put", (indices, value))
    return Write("t", "put", (indices[::-1].copy(), values[: indices.size]))


def check_content(spec: TableSpec, done: list[Write], undone: int) -> None:
    space = Space()
    space.apply(Write("", "create", (spec,)))
    inverses = apply(space, done)
    apply(space, inverses[len(done) - min(undone, len(done)) :][::-1])
    assert same_state(rebuilt(space).snapshot(), space.snapshot()) == []


DENSE_ENDS = (0, CHUNK, 2 * CHUNK, CONTENT_CHUNKS * CHUNK, LENGTH)
SPARSE_ENDS = (0, LEAF, 5 * LEAF, NODE, 2 * NODE, 5 * NODE, 6 * NODE + LEAF, 9 * NODE)


@given(st.lists(writes(DENSE_ENDS), max_size=8), st.integers(0, 3), st.integers(0, 3))
def test_the_content_of_a_dense_table_makes_it_again(
    done: list[Write], fill: int, undone: int
) -> None:
    check_content(TableSpec("t", "dense", "u1", fill, LENGTH), done, undone)


@given(st.lists(writes(SPARSE_ENDS), max_size=6), st.integers(0, 3), st.integers(0, 3))
def test_the_content_of_a_sparse_table_makes_it_again(
    done: list[Write], fill: int, undone: int
) -> None:
    check_content(TableSpec("t", "sparse", "u1", fill), done, undone)


def test_many_small_puts_in_a_dense_table_are_all_remembered() -> None:
    space = Space()
    space.apply(Write("", "create", (TableSpec("t", "dense", "u4", 7, 1 << 24),)))
    rng = np.random.default_rng(1)
    reused = np.empty(3, dtype=np.int64)
    for i in range(1000):
        reused[:] = rng.integers(0, 1 << 24, 3)
        space.apply(Write("t", "put", (reused, i)))
    assert same_state(rebuilt(space).snapshot(), space.snapshot()) == []


def test_content_costs_what_was_written_not_what_there_is() -> None:
    space = Space()
    for number, kind in enumerate(("dense", "sparse")):
        # 1 TiB of host memory: 2 GiB of entries, were they looked at
        length = 1 << 28 if kind == "dense" else 0
        space.apply(Write("", "create", (TableSpec(str(number), kind, "i8", 0, length),)))
        space.apply(Write(str(number), "put", (np.array([5, 1 << 27]), 9)))
    for table in space.tables.values():
        assert len(list(table.content())) == 3
        assert len(encode_record(Record(1, "x", tuple(table.content())))) < 400


def test_the_content_of_records_keeps_their_order() -> None:
    space = Space()
    space.apply(Write("", "create", (TableSpec("t", "records"),)))
    apply(space, [Write("t", "set", (key, str(key))) for key in (5, 1, 3)])
    assert rebuilt(space).records("t").items() == space.records("t").items()


def test_equal_runs_that_lie_apart_stay_apart() -> None:
    space = Space()
    space.apply(Write("", "create", (TableSpec("t", "sparse"),)))
    fills = [Write("t", "fill", (node * NODE, NODE, 1)) for node in (1, 2, 5)]
    apply(space, fills)
    content = [write.args for write in space.sparse("t").content()][1:]
    assert content == [(NODE, 2 * NODE, 1), (5 * NODE, NODE, 1)]
    assert same_state(rebuilt(space).snapshot(), space.snapshot()) == []
