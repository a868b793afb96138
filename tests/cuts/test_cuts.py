"""A journal that was cut or damaged: the longest valid prefix, and a state that is sound.

`make journal` does the same with a longer run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rmemd.store import log as log_module

from .campaign import Figure, run
from .cutting import check_journal
from .recorded import Recorded, record

OPERATIONS, FLIPS, SEED = 150, 1000, 3
# after so many bytes the log begins anew
OFTEN = 48 << 10


@pytest.fixture(scope="module")
def figure() -> Figure:
    """The campaign, smaller than `make journal` runs it."""
    return run(OPERATIONS, FLIPS, SEED, OFTEN, within=1)


def test_every_cut_and_every_flip_leaves_the_longest_valid_prefix(figure: Figure) -> None:
    print(figure)
    assert figure.wrong == []
    assert figure.holds
    assert [one.flips for one in figure.journals] == [FLIPS] * 2
    assert all(one.cuts > 50_000 for one in figure.journals)


def test_the_engine_is_had_back_from_parts_of_a_frame_too(figure: Figure) -> None:
    assert all(one.reopened > 40 for one in figure.journals)
    never, often = figure.journals
    assert never.generations == 1
    assert often.generations > 2


@pytest.fixture(scope="module")
def short() -> Recorded:
    return record(5, SEED, 4 << 10)


def _trusting(length_only: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reader that takes a frame by its length."""

    def next_frame(scan: Any) -> Any:
        head = log_module._read(scan.fd, scan.end, 8)
        length = int.from_bytes(head[:4], "little")
        if length == 0 or scan.size - scan.end < 8 + length:
            return None
        return log_module._read(scan.fd, scan.end + 8, length), int.from_bytes(head[4:], "little")

    return next_frame


def _greedy(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reader that takes the first half of a frame for one."""

    def next_frame(scan: Any) -> Any:
        return real(scan) or (b"A", 0) if scan.size - scan.end > 40 else real(scan)

    return next_frame


def _shy(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reader that does not take the last frame."""

    def next_frame(scan: Any) -> Any:
        found = real(scan)
        return found if found and scan.end + 8 + len(found[0]) < scan.size else None

    return next_frame


@pytest.mark.parametrize("broken", [_trusting, _greedy, _shy])
def test_a_reader_that_guesses_is_seen(
    short: Recorded, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Any]
) -> None:
    assert check_journal(short, 200, SEED).wrong == []
    monkeypatch.setattr(log_module, "_next_frame", broken(log_module._next_frame))
    assert check_journal(short, 200, SEED).wrong
