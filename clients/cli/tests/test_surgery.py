"""Checks of the daemon's own state, and faults that are put into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_daemon import FakeDaemon

from rmem.v1 import host_pb2

Ctl = Callable[..., Any]


# --- host check ----------------------------------------------------------------------------------
def test_what_holds_is_said_with_its_meaning(rmemctl: Ctl) -> None:
    result = rmemctl("host", "check")
    assert (result.code, result.err) == (0, "")
    assert result.lines == [
        "I1, I3, I24 hold at revision 43 (checked in 4.2 ms, 7 transactions watched)",
        "",
        "INVARIANT  STATUS     MEANING",
        "I1         checked    a frame names its page, and the page the frame",
        "I3         checked    a free frame is nobody's",
        "I8         unwatched  each start has its end",
        "I24        sampled    private bytes are told to nobody",
    ]


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "name"])
def test_a_violation_is_told_and_exits_with_1(rmemctl: Ctl, daemon: FakeDaemon, form: str) -> None:
    daemon.answers["CheckHost"] = host_pb2.CheckHostResponse(
        revision=43, checked=daemon.answers["CheckHost"].checked,
        violations=[host_pb2.Violation(invariant="I3", text="page 0x2a is free with refs")],
    )  # fmt: skip
    result = rmemctl("host", "check", "-o", form)
    assert (result.code, result.err) == (1, "")
    assert "I3" in result.out
    assert "hold at revision" not in result.out
    if form == "table":
        told = ["INVARIANT  VIOLATED", "I3         page 0x2a is free with refs", ""]
        assert result.lines[:3] == told
        assert result.lines[3].startswith("INVARIANT  STATUS ")


# --- fault rules ---------------------------------------------------------------------------------
def test_rules_say_what_was_passed_and_hit(rmemctl: Ctl) -> None:
    assert rmemctl("fault", "list").lines == [
        "RULE    POINT       ERROR             VM    NTH  TIMES  CHANCE   DELAY  PASSED  HIT",
        "rule/1  map         TDX_OPERAND_BUSY  any     3      2    0.25       -       7    1",
        "rule/2  step/guest  -                 vm/3    1      1       1  250 ms       0    0",
    ]


def test_points_say_whose_they_are_and_what_they_mean(rmemctl: Ctl) -> None:
    assert rmemctl("fault", "points").lines == [
        "POINT          KIND    PLUGIN  PASSED  MEANING",
        "map            op      -            7  Install private pages.",
        "lost_race      race    -            0  an invalidation comes between",
        "step/guest     step    -           12  between two steps",
        "TDH_MEM_TRACK  vendor  tdx          0  -",
    ]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("map", {"point": "map", "error": "injected", "nth": 1, "times": 1, "probability": 1}),
        ("map boom", {"point": "map", "error": "boom"}),
        (
            "map --error boom --nth 3 --times 9 --probability 0.25 --vm 3",
            {"point": "map", "error": "boom", "nth": 3, "times": 9, "probability": 0.25, "vm": 3},
        ),
        ("step/guest --delay-ms 250", {"point": "step/guest", "error": "", "delay_ms": 250}),
        # what cannot be is for the daemon to say
        ("map boom --delay-ms 5", {"error": "boom", "delay_ms": 5}),
    ],
)
def test_what_is_asked_for_is_sent(
    rmemctl: Ctl, daemon: FakeDaemon, args: str, expected: dict[str, Any]
) -> None:
    assert rmemctl("fault", "add", *args.split()).lines == ["rule/2"]
    sent = daemon.requests[-1].rule
    assert {name: getattr(sent, name) for name in expected} == expected


@pytest.mark.parametrize(
    "args",
    ["--probability 0", "--probability 1.5", "--delay-ms -1", "--delay-ms 60001", "a --error b"],
)
def test_what_no_rule_can_be_is_not_sent(rmemctl: Ctl, daemon: FakeDaemon, args: str) -> None:
    result = rmemctl("fault", "add", "map", *args.split())
    assert (result.code, result.out, daemon.requests) == (2, "", [])
