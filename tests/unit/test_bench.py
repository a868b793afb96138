"""What a figure says, and what the quick form calls worse: arithmetic, without a clock."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench import regressions
from tests.bench.harness import Figure, LeftOut, alone, in_turn, of, on_cpus, paired, write


def answers(*seconds: float) -> Callable[[], float]:
    left = iter(seconds)
    return lambda: next(left)


def test_the_first_round_does_not_count_and_the_median_is_of_the_ratios() -> None:
    ours, floor = answers(100, 2, 4, 9), answers(1, 1, 4, 3)
    figure = in_turn("goal", ours, floor, per=2, bar=2, rounds=3)
    assert figure == Figure("goal", 2e6, 1.5e6, "us/op", 2, 1, 3, 3, 2, True)


def test_each_goes_first_in_every_other_round() -> None:
    order = ""

    def call(who: str) -> None:
        nonlocal order
        order += who

    paired("goal", lambda: call("o"), lambda: call("f"), rounds=3)
    assert order in ("foof" * 2, "offo" * 2)


@pytest.mark.parametrize(
    ("unit", "ratio", "bar", "holds"),
    [
        ("us/op", 1.1, 1.1, True), ("us/op", 1.11, 1.1, False), ("us/op", 9.0, None, None),
        ("GB/s", 0.97, 0.97, True), ("GB/s", 0.96, 0.97, False),
    ],
)  # fmt: skip
def test_a_cost_may_be_as_much_as_its_bar_and_a_rate_no_less(
    unit: str, ratio: float, bar: float | None, holds: bool | None
) -> None:
    assert of("goal", [(ratio, 1.0)], unit=unit, bar=bar).holds is holds


def test_a_rate_is_of_operations_a_second() -> None:
    figure = in_turn("goal", answers(1, 2), answers(1, 4), per=8e9, rounds=1, unit="GB/s")
    assert (figure.ours, figure.floor, figure.ratio_median) == (4, 2, 2)


def test_what_stands_alone_is_held_against_what_was_promised() -> None:
    assert alone("at least", [9.0, 7.0, 8.0], 8.0, unit="Mops/s").holds
    assert alone("at most", [1.1], 1.0, unit="bytes").holds is False


def test_a_line_has_these_fields(tmp_path: Path) -> None:
    write([of("goal", [(1.0, 2.0)], unit="s", bar=1.0)], tmp_path / "new" / "bench.jsonl")
    (line,) = (tmp_path / "new" / "bench.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == [
        "goal", "ours", "floor", "unit", "ratio_median", "ratio_min", "ratio_max", "rounds",
        "bar", "holds",
    ]  # fmt: skip


def test_every_thread_is_pinned_and_let_go() -> None:
    before = os.sched_getaffinity(0)
    with on_cpus(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    with pytest.raises(LeftOut, match=f"there are {len(before)}"), on_cpus(len(before) + 1):
        pass


@pytest.mark.parametrize(("unit", "fine", "worse"), [("us/op", 1.5, 1.51), ("ops/s", 0.67, 0.66)])
def test_worse_is_beyond_the_bar_by_more_than_the_slack(
    unit: str, fine: float, worse: float
) -> None:
    for bar, usual in ((1.0, None), (99.0, 1.0), (None, 1.0)):
        one_good = of("goal", [(worse, 1.0), (fine, 1.0), (worse, 1.0)], unit=unit, bar=bar)
        assert not regressions.is_worse(one_good, usual)
        assert regressions.is_worse(of("goal", [(worse, 1.0)], unit=unit, bar=bar), usual)


FAILED = LeftOut("topic", "failed", excused=False)


@pytest.mark.parametrize(
    ("takes", "fails"),
    [
        ([{"a": 1.0, "b": 1.0, "unwatched": 9.0}], False),
        ([{"a": 9.0, "b": 1.0}, {"a": 1.0, "b": 1.0}], False),
        ([{"a": 9.0, "b": 1.0}, {"a": 9.0, "b": 1.0}], True),
        # another figure each time: neither is worse twice
        ([{"a": 9.0, "b": 1.0}, {"a": 1.0, "b": 9.0}], False),
        ([{"a": 1.0, "b": 1.0, "peer": LeftOut("peer", "not here")}], False),
        ([{"a": 1.0, "b": 1.0, "topic": FAILED}] * 2, True),
        ([{"a": 1.0}] * 2, True),
    ],
)
def test_a_topic_fails_by_what_is_worse_twice(
    takes: list[dict[str, float | LeftOut]], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(takes)

    def outcomes(topic: str, *, quick: bool) -> list[Figure | LeftOut]:
        assert quick
        return [
            one if isinstance(one, LeftOut) else of(goal, [(one, 1.0)], unit="s", bar=1.0)
            for goal, one in next(left).items()
        ]

    monkeypatch.setattr(regressions, "outcomes", outcomes)
    monkeypatch.setattr(regressions, "WATCHED", {"one": {"a": None, "b": 1.0}})
    assert regressions.main() == fails
    assert list(left) == []
