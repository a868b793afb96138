"""The checker by itself: histories made by hand, and random ones against every permutation."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import permutations
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from linearizability.checker import OPEN, Operation, check


def register(state: Hashable, op: Operation) -> tuple[Hashable, Any]:
    """One cell: write, read, and add, which answers what there was."""
    match op.call:
        case "write":
            return op.args[0], "done"
        case "add":
            return state + op.args[0], state  # type: ignore[operator]
    return state, state


def write(value: int, invoked: float, returned: float, **known: Any) -> Operation:
    result = None if returned == OPEN else "done"
    return Operation(0, "write", (value,), invoked, returned, result, **known)


def read(value: int, invoked: float, returned: float, **known: Any) -> Operation:
    return Operation(1, "read", (), invoked, returned, value, **known)


def holds(*ops: Operation, revisions: bool = True) -> bool | None:
    return check(ops, 0, register, revisions=revisions).linearizable


def test_what_follows_each_other_is_seen_in_order() -> None:
    assert holds()
    assert holds(write(1, 0, 1), read(1, 2, 3))
    assert holds(write(1, 0, 1), read(0, 2, 3)) is False


def test_what_overlaps_may_be_seen_or_not() -> None:
    assert holds(write(1, 0, 5), read(0, 1, 2), read(1, 3, 4))
    # but what was seen stays seen
    assert holds(write(1, 0, 5), read(1, 1, 2), read(0, 3, 4)) is False


def test_two_readers_agree_on_the_order_of_two_writes() -> None:
    writes = (write(1, 0, 10), write(2, 0, 10))
    assert holds(*writes, read(1, 1, 2), read(2, 3, 4))
    assert holds(*writes, read(1, 1, 2), read(2, 3, 4), read(1, 5, 6)) is False


def test_two_adds_do_not_see_the_same() -> None:
    adds = [Operation(c, "add", (1,), 0, 5, result) for c, result in enumerate((0, 1))]
    assert holds(*adds)
    assert holds(adds[0], replace(adds[1], result=0)) is False


def test_what_was_never_answered_may_take_effect_late_or_never() -> None:
    lost = write(1, 0, OPEN)
    assert holds(lost, read(0, 1, 2), read(0, 3, 4))
    assert holds(lost, read(0, 1, 2), read(1, 3, 4))
    assert holds(lost, read(1, 1, 2), read(0, 3, 4)) is False
    # it had not been asked for
    assert holds(read(1, 0, 1), write(1, 2, OPEN)) is False


def test_a_revision_tells_what_overlapping_times_do_not() -> None:
    done = write(1, 0, 10, revision=7, commits=True)
    late = read(0, 0, 10, revision=7, exact=True)
    assert holds(done, late, revisions=False)
    # the state after commit 7 has a write that was commit 7 at the latest
    assert holds(done, late) is False
    assert holds(done, replace(late, revision=6))
    # and the state at revision 5 has not what came after 5 was told
    early = read(1, 0, 10, revision=5, exact=True)
    assert holds(replace(done, floor=4), early)
    assert holds(replace(done, floor=5), early) is False


def test_a_commit_that_carries_its_own_revision_is_where_it_says() -> None:
    done = write(1, 0, 10, revision=7, commits=True, exact=True)
    before, after = (read(0, 0, 10, revision=6, exact=True), read(1, 0, 10, revision=7, exact=True))
    assert holds(done, before, after)
    # it was commit 7, so the state after commit 6 cannot have it
    early = read(1, 0, 10, revision=6, exact=True)
    assert holds(replace(done, exact=False), early)
    assert holds(done, early) is False
    # and one that had told of commit 7 came before it
    assert holds(replace(done, floor=7)) is False


def test_queries_are_in_the_order_of_their_revisions() -> None:
    both = (write(1, 0, 10), read(1, 0, 10, revision=3, exact=True))
    assert holds(*both, read(0, 0, 10, revision=2, exact=True))
    assert holds(*both, read(0, 0, 10, revision=4, exact=True)) is False


def test_a_call_that_changed_nothing_may_share_a_revision_with_a_query_before_it() -> None:
    assert holds(read(0, 0, 1, revision=5, exact=True), write(1, 2, 3, revision=5, floor=5))


def test_a_revision_that_goes_back_is_refuted() -> None:
    assert holds(read(0, 0, 1, revision=4, exact=True, floor=5)) is False
    assert holds(write(1, 0, 1, revision=5, floor=5, commits=True)) is False


def test_it_says_so_when_it_gives_up() -> None:
    ops = [*(write(c, 0, 5) for c in range(6)), read(6, 6, 7)]
    assert check(ops, 0, register, budget=100).linearizable is None
    assert check(ops, 0, register).linearizable is False


def test_the_order_that_it_gives_explains_the_history() -> None:
    ops = [write(1, 0, 9), write(2, 0, 9), read(2, 1, 2), read(1, 4, 5)]
    assert [op.args or op.result for op in check(ops, 0, register).order] == [(2,), 2, (1,), 1]


def test_a_long_history_of_sixteen_clients_is_decided() -> None:
    """What the reference measured: 5,000 calls, 16 at a time."""
    ops = []
    for at in range(5000):
        lane, turn = at % 16, at // 16
        ops.append(Operation(lane, "add", (1,), turn * 100 + lane, turn * 100 + 90 + lane, at))
    verdict = check(ops, 0, register)
    assert verdict.linearizable
    assert verdict.visits == 4999


# --- against every permutation -------------------------------------------------------------------
@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Few calls on one cell, with any results, times and revisions."""
    ops = []
    for client in range(draw(st.integers(1, 5))):
        invoked, length = draw(st.integers(0, 8)), draw(st.integers(1, 8))
        call = draw(st.sampled_from(("write", "read", "add")))
        value = draw(st.integers(0, 2))
        exact = draw(st.booleans())
        revision = draw(st.none() | st.integers(1, 4))
        returned = OPEN if revision is None and draw(st.booleans()) else 2 * (invoked + length) + 1
        result = "done" if call == "write" else draw(st.integers(0, 3))
        ops.append(
            Operation(
                client, call, (value,), 2 * invoked, returned, result, revision,
                exact and revision is not None, call != "read" and revision is not None,
                draw(st.integers(0, 3)),
            )
        )  # fmt: skip
    return ops


def explained(order: tuple[Operation, ...], revisions: bool) -> bool:
    """Return whether an order keeps to times, results and true positions, one by one."""
    state, position = 0, -OPEN
    for at, op in enumerate(order):
        if any(later.returned < op.invoked for later in order[at + 1 :]):
            return False
        state, result = register(state, op)  # type: ignore[assignment]
        if op.returned < OPEN and result != op.result:
            return False
        if revisions:
            # the earliest that it can be, so that as much as possible fits behind it
            first, last = op.span
            position = max(position, first)
            if position > last:
                return False
    return True


def brute_force(ops: list[Operation], revisions: bool) -> bool:
    answered = [op for op in ops if op.returned < OPEN]
    unanswered = [op for op in ops if op.returned == OPEN]
    return any(
        explained(order, revisions)
        for mask in range(1 << len(unanswered))
        for order in permutations(
            answered + [op for i, op in enumerate(unanswered) if mask >> i & 1]
        )
    )


@given(histories(), st.booleans())
def test_it_says_what_going_over_all_permutations_says(
    ops: list[Operation], revisions: bool
) -> None:
    assert check(ops, 0, register, revisions=revisions).linearizable is brute_force(ops, revisions)
