"""Transactions: undone whole or in part, taken out of memory and put back, in nobody's way."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmemd.hooks.tables import Space, TableSpec, same_state
from rmemd.hooks.tx import ByteOp, Held, Tx

N = 40


def _space() -> Space:
    space = Space()
    tx = Tx(space, "start")
    tx.create(TableSpec("dense", "dense", "u1", 0, N))
    tx.create(TableSpec("sparse", "sparse", "u1", 1))
    tx.create(TableSpec("records", "records"))
    tx.fill(space.tables["sparse"], 3, 5, 7)  # type: ignore[arg-type]
    tx.set(space.tables["records"], "there", 0)  # type: ignore[arg-type]
    return space


numbers = st.integers(0, N - 1)
step = st.one_of(
    st.tuples(st.just("fill"), st.sampled_from(["dense", "sparse"]), numbers, st.integers(1, N)),
    st.tuples(st.just("put"), st.sampled_from(["dense", "sparse"]),
              st.lists(numbers, min_size=1, max_size=5, unique=True), st.integers(0, 9)),
    st.tuples(st.just("set"), st.sampled_from(["there", "b", "c"]), st.integers(0, 9)),
    st.tuples(st.just("drop"), st.sampled_from(["there", "b", "c"])),
    st.tuples(st.just("create"), st.sampled_from(["x", "y"])),
    st.tuples(st.just("destroy"), st.sampled_from(["x", "y"])),
)  # fmt: skip
scripts = st.lists(step, max_size=10)


def _do(tx: Tx, what: tuple[Any, ...]) -> None:
    tables: dict[str, Any] = tx.space.tables
    if what[0] == "fill":
        tx.fill(tables[what[1]], what[2], min(what[3], N - what[2]), what[3] % 10)
    elif what[0] == "put":
        tx.put(tables[what[1]], np.array(what[2], dtype=np.int64), what[3])
    elif what[0] == "set":
        tx.set(tables["records"], what[1], what[2])
    elif what[0] == "drop":
        tx.drop(tables["records"], what[1])
    elif what[0] == "create" and what[1] not in tables:
        tx.fill(tx.create(TableSpec(what[1], "sparse")), 0, 3, 1)
    elif what[0] == "destroy" and what[1] in tables:
        tx.destroy(what[1])


@given(scripts, scripts)
def test_rollback_and_rollback_to_a_mark(one: list[Any], other: list[Any]) -> None:
    space = _space()
    start = space.snapshot()
    tx = Tx(space, "test")
    for what in one:
        _do(tx, what)
    middle, mark, redo = space.snapshot(), tx.mark(), len(tx.redo)
    tx.emit("kept")
    mark = tx.mark()
    for what in other:
        _do(tx, what)
    tx.emit("not kept")
    tx.name_bytes(ByteOp("zero", np.array([1])))
    tx.rollback(mark)
    assert same_state(middle, space.snapshot()) == []
    assert (len(tx.redo), tx.byte_ops, tx.events) == (redo, [], [("kept", {})])
    tx.rollback()
    assert same_state(start, space.snapshot()) == []
    assert tx.redo == []


@given(scripts)
def test_redo_is_what_was_written(script: list[Any]) -> None:
    space, again = _space(), _space()
    tx = Tx(space, "test")
    for what in script:
        _do(tx, what)
    for write in tx.redo:
        again.apply(write)
    assert same_state(space.snapshot(), again.snapshot()) == []


@given(scripts, scripts)
def test_suspended_writes_are_out_of_memory_and_come_back(
    script: list[Any], others: list[Any]
) -> None:
    space = _space()
    start = space.snapshot()
    tx = Tx(space, "test")
    for what in script:
        _do(tx, what)
    done = space.snapshot()
    tx.suspend()
    assert same_state(start, space.snapshot()) == []
    # what others try meanwhile is refused, or does not touch what is held
    for what in others:
        other = Tx(space, "other")
        with suppress(Held):
            _do(other, what)
        other.rollback()
    assert same_state(start, space.snapshot()) == []
    tx.resume()
    assert same_state(done, space.snapshot()) == []
    tx.rollback()
    assert same_state(start, space.snapshot()) == []


@given(scripts, scripts)
def test_what_others_do_meanwhile_is_kept(script: list[Any], others: list[Any]) -> None:
    """Committed writes that met nothing held survive both the resumption and its undoing."""
    space = _space()
    tx = Tx(space, "test")
    for what in script:
        _do(tx, what)
    redo = list(tx.redo)
    tx.suspend()
    model = _space()
    for what in others:
        other = Tx(space, "other")
        try:
            _do(other, what)
        except Held:
            other.rollback()
            continue
        for write in other.redo:
            model.apply(write)
    others_only = model.snapshot()
    assert same_state(others_only, space.snapshot()) == []
    tx.resume()
    for write in redo:
        model.apply(write)
    assert same_state(model.snapshot(), space.snapshot()) == []
    tx.rollback()
    assert same_state(others_only, space.snapshot()) == []


def test_release_gives_up_what_is_out_of_memory() -> None:
    space = _space()
    before = space.snapshot()
    tx = Tx(space, "test")
    _do(tx, ("fill", "dense", 0, 5))
    tx.suspend()
    tx.release()
    assert same_state(before, space.snapshot()) == []
    assert space.holders == []
    other = Tx(space, "other")
    _do(other, ("fill", "dense", 0, 5))


@pytest.mark.parametrize(
    ("held", "wanted", "meets"),
    [
        (("fill", "dense", 10, 5), ("fill", "dense", 14, 1), True),
        (("fill", "dense", 10, 5), ("fill", "dense", 15, 1), False),
        (("fill", "dense", 10, 5), ("put", "dense", [3, 12], 1), True),
        (("fill", "dense", 10, 5), ("put", "dense", [3, 15], 1), False),
        (("put", "sparse", [3, 9], 2), ("put", "sparse", [9], 1), True),
        (("put", "sparse", [3, 9], 2), ("put", "sparse", [4], 1), False),
        (("put", "sparse", [3, 9], 2), ("put", "dense", [3], 1), False),
        (("set", "b", 1), ("drop", "b"), True),
        (("set", "b", 1), ("set", "c", 1), False),
        (("create", "x"), ("create", "x"), True),
        (("create", "x"), ("create", "y"), False),
    ],
)  # fmt: skip
def test_what_a_suspended_transaction_holds(held: Any, wanted: Any, meets: bool) -> None:
    space = _space()
    tx, other = Tx(space, "holder"), Tx(space, "other")
    _do(tx, held)
    tx.suspend()
    if meets:
        with pytest.raises(Held, match="holder"):
            _do(other, wanted)
        assert other.redo == []
    else:
        _do(other, wanted)
        assert other.redo


def test_a_table_that_is_written_to_is_held_whole() -> None:
    """Destroying a table under a suspended write would leave nothing to resume on."""
    space = _space()
    tx, other = Tx(space, "holder"), Tx(space, "other")
    _do(tx, ("put", "sparse", [3], 2))
    tx.suspend()
    with pytest.raises(Held):
        other.destroy("sparse")
    tx.resume()
