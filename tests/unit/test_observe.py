"""Observers of calls: all are told, and none can harm the call."""

from __future__ import annotations

from structlog.testing import capture_logs

from rmemd.rpc.observe import Called, tell

DONE = Called("VmService/GetVm", "OK", "", 0.1, "a-1")


class Notes:
    def __init__(self) -> None:
        self.seen: list[Called] = []

    def call(self, done: Called) -> None:
        self.seen.append(done)


class Broken:
    def call(self, done: Called) -> None:
        raise RuntimeError("broken")


def test_one_that_raises_is_logged_and_the_others_are_told() -> None:
    first, last = Notes(), Notes()
    with capture_logs() as logged:
        tell([first, Broken(), last], DONE)
    assert first.seen == last.seen == [DONE]
    assert [(line["event"], line["observer"]) for line in logged] == [("observer_raised", "Broken")]
