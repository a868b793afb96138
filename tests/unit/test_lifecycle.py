"""Calls begin and end, and who makes way waits for the last reply to have left."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from rmemd.errors import Unavailable
from rmemd.rpc.lifecycle import Lifecycle


class Calls:
    """Calls under way, by what ends them."""

    def __init__(self) -> None:
        self.ends: list[Callable[[], None]] = []

    def when_over(self, end: Callable[[], None]) -> bool:
        """Take note of what is to be called; the call has not ended."""
        self.ends.append(end)
        return True


def test_it_is_idle_when_the_last_reply_has_left() -> None:
    lifecycle, calls = Lifecycle(), Calls()
    lifecycle.begin(calls.when_over)
    lifecycle.begin(calls.when_over)
    assert not lifecycle.wait_idle(0)
    found: list[bool] = []
    waiter = threading.Thread(target=lambda: found.append(lifecycle.wait_idle(60)))
    waiter.start()
    for end in calls.ends:
        end()
    waiter.join(60)
    assert found == [True]


def test_a_call_that_was_over_before_it_began_does_not_count() -> None:
    lifecycle = Lifecycle()
    lifecycle.begin(lambda end: False)
    assert lifecycle.wait_idle(0)


def test_none_begins_while_it_hands_over() -> None:
    lifecycle, calls = Lifecycle(), Calls()
    lifecycle.hand_over()
    with pytest.raises(Unavailable, match="HANDING_OVER"):
        lifecycle.begin(calls.when_over)
    assert lifecycle.wait_idle(0)
