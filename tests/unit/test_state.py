"""State between two consumers: closed plain data, or it is nonsense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rmemd.errors import SWAP_SCHEMA, RmemError
from rmemd.hooks import (
    HostContext,
    RecordsState,
    Space,
    SparseState,
    State,
    Tx,
    VmContext,
    export_tables,
    import_tables,
)
from rmemd.hooks.hooktx import HookTx
from rmemd.hooks.state import capture, entries_of, is_plain, is_sound, own_name, same_table
from rmemd.units import pages


class Mine(int):
    """A class of a plugin's own, whatever it is made of."""


def ints(*values: int, dtype: str = "i8") -> np.ndarray:
    return np.array(values, dtype=dtype)


@pytest.fixture
def tx() -> Tx:
    return Tx(Space(), "test")


def hook_tx(tx: Tx, vm: int) -> HookTx:
    return HookTx(tx, (f"vm/{vm}/toy/",), vm, None)  # type: ignore[arg-type]


def filled(tx: Tx, vm: int = 1) -> tuple[Any, Any]:
    """Make a consumer's tables with something in them."""
    context = VmContext(vm, "toy", tx)
    sparse, records = context.sparse("entries", "i8", -1), context.records("facts/more")
    tx.put(sparse, ints(5, 1 << 40), ints(7, 0))
    # far more than anybody could loop over
    tx.fill(sparse, 1 << 20, 100_000, 9)
    tx.set(records, ("key", 3), (b"x", None, True))
    return sparse, records


def test_tables_are_carried_over_whole(tx: Tx) -> None:
    sparse, records = filled(tx)
    state = export_tables("toy", 3, sparse, records)
    assert set(state.tables) == {"entries", "facts/more"}
    assert (state.kind, state.version, state.entries) == ("toy", 3, 100_003)
    assert is_sound(state)
    context = VmContext(2, "toy", tx)
    fresh = context.sparse("entries", "i8", -1), context.records("facts/more")
    import_tables(hook_tx(tx, 2), state, "toy", 3, *fresh)
    assert fresh[0].snapshot() == sparse.snapshot()
    assert fresh[1].snapshot() == records.snapshot()
    # what was exported is no view of what it came from
    tx.put(sparse, ints(5), 8)
    assert fresh[0].at(5) == 7


@pytest.mark.parametrize(
    ("kind", "version", "says"),
    [("other", 3, "'toy' version 3, .* 'other' version 3"), ("toy", 4, "takes 'toy' version 4")],
)
def test_another_schema_is_refused_with_both(tx: Tx, kind: str, version: int, says: str) -> None:
    state = export_tables("toy", 3, *filled(tx))
    with pytest.raises(RmemError, match=says) as caught:
        import_tables(hook_tx(tx, 2), state, kind, version)
    assert caught.value.reason is SWAP_SCHEMA


@pytest.mark.parametrize("shape", ["missing", "extra", "dtype", "fill", "kind"])
def test_tables_of_another_shape_are_refused(tx: Tx, shape: str) -> None:
    state = export_tables("toy", 3, *filled(tx))
    context = VmContext(2, "toy", tx)
    dtype, fill = ("i4" if shape == "dtype" else "i8"), (0 if shape == "fill" else -1)
    sparse: Any = context.sparse("entries", dtype, fill)
    fresh = [sparse, context.records("facts/more")]
    if shape == "missing":
        fresh.pop()
    if shape == "extra":
        fresh.append(context.records("more"))
    if shape == "kind":
        fresh = [VmContext(3, "toy", tx).records("entries"), fresh[1]]
    with pytest.raises(RmemError) as caught:
        import_tables(hook_tx(tx, 2 if shape != "kind" else 3), state, "toy", 3, *fresh)
    assert caught.value.reason is SWAP_SCHEMA


@pytest.mark.parametrize("value", [1, "x", b"x", True, None, (), (1, ("x", (b"",)))])
def test_what_is_plain(value: Any) -> None:
    assert is_plain(value)


@pytest.mark.parametrize(
    "value", [1.0, [1], {1: 2}, {1}, Mine(1), np.int64(1), object(), (1, (Mine(2),)), frozenset()]
)
def test_what_is_not_plain(value: Any) -> None:
    assert not is_plain(value)
    assert not is_sound(State("toy", 1, {"t": RecordsState(((1, value),))}))
    assert not is_sound(State("toy", 1, {"t": RecordsState(((value, 1),))}))


class MyState(State):
    """A state of a plugin's own class."""


NONSENSE: list[Any] = [
    None, {}, object(), MyState("toy", 1, {}), State(b"toy", 1, {}), State("toy", True, {}),  # type: ignore[arg-type]
    State("toy", "1", {}), State("toy", 1, ()), State("toy", 1, {1: RecordsState(())}),  # type: ignore[arg-type]
    State("toy", 1, {"t": None}), State("toy", 1, {"t": RecordsState([])}),  # type: ignore[arg-type]
    State("toy", 1, {"t": RecordsState(((1, 2, 3),))}), State("toy", 1, {"t": RecordsState((1,))}),  # type: ignore[arg-type]
    State("toy", 1, {"t": SparseState([1], [2])}),  # type: ignore[arg-type]
    State("toy", 1, {"t": SparseState(ints(1, 2), ints(1))}),
    State("toy", 1, {"t": SparseState(ints(2, 1), ints(1, 1))}),
    State("toy", 1, {"t": SparseState(ints(1, 1), ints(1, 1))}),
    State("toy", 1, {"t": SparseState(ints(1, dtype="i4"), ints(1))}),
    State("toy", 1, {"t": SparseState(ints(1), np.array([object()]))}),
    State("toy", 1, {"t": SparseState(ints(1), ints(1), None)}),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize("answer", NONSENSE)
def test_an_answer_that_is_no_state(answer: Any) -> None:
    try:
        sound = is_sound(answer)
    except TypeError:
        sound = False
    assert not sound


def test_tables_compare_by_what_they_hold(tx: Tx) -> None:
    sparse, records = filled(tx)
    one = capture(sparse), capture(records)
    assert [same_table(t, capture(s)) for t, s in zip(one, (sparse, records), strict=True)] == [
        True, True,
    ]  # fmt: skip
    tx.put(sparse, pages(1 << 20, 1), 8)
    tx.set(records, ("key", 3), None)
    assert not same_table(one[0], capture(sparse))
    assert not same_table(one[1], capture(records))
    assert not same_table(one[0], one[1])
    assert not same_table(one[0], None)
    assert same_table(None, RecordsState(()))
    assert entries_of(None) == 0
    assert own_name(records) == "facts/more"


# --- a platform's tables at a reload --------------------------------------------------------------
def test_a_table_that_is_there_is_handed_back_with_what_it_holds(tx: Tx) -> None:
    first = HostContext("toy", 64, 1, tx)
    made = first.dense("owners", "u4"), first.sparse("by index", "i8", -1), first.records("vms")
    tx.put(made[0], ints(3), 9)
    again = HostContext("toy", 64, 1, tx, reloading=True)
    assert again.dense("owners", "u4") is made[0]
    assert again.sparse("by index", "i8", -1) is made[1]
    assert again.records("vms") is made[2]
    assert again.dense("new", length=7).view.size == 7
    assert again.asked == {f"platform/toy/{n}" for n in ("owners", "by index", "vms", "new")}
    for ask in (lambda: again.dense("owners", "u8"), lambda: again.dense("owners", "u4", length=9),
                lambda: again.sparse("owners", "u4"), lambda: again.records("owners")):  # fmt: skip
        with pytest.raises(RmemError) as caught:
            ask()
        assert caught.value.reason is SWAP_SCHEMA


def test_without_a_reload_a_table_is_made_once(tx: Tx) -> None:
    host = HostContext("toy", 64, 1, tx)
    host.records("vms")
    with pytest.raises(KeyError):
        host.records("vms")
