"""Who holds what, who waits for whom, who calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from fake_daemon import FakeDaemon, Refuse

from rmem.v1 import host_pb2, types_pb2

Ctl = Callable[..., Any]
HOLE = Refuse(
    grpc.StatusCode.FAILED_PRECONDITION, "no frame", types_pb2.Refusal(reason="FRAME_NOT_OWNED")
)


def story(*holders: tuple[str, str, int, bool]) -> host_pb2.GetPageResponse:
    made = [
        types_pb2.Holder(name=name, purpose=purpose, count=count, longterm=longterm)
        for name, purpose, count, longterm in holders
    ]
    return host_pb2.GetPageResponse(revision=42, holders=made)


DMA = ("session 7 pin 4", "DMA", 1, True)
EPT = ("vm/3", "secure EPT", 1, False)


@pytest.fixture
def pages(daemon: FakeDaemon) -> None:
    """Pages 0x10.. of file/1: three with one holder, one of which has two; a hole; one more."""
    known = {
        0x10: story(EPT), 0x11: story(EPT, DMA), 0x12: story(EPT), 0x13: HOLE,
        0x14: story(("client pin 7", "RDMA", 2, True)), 0x15: story(),
    }  # fmt: skip

    def answer(request: host_pb2.GetPageRequest) -> Any:
        assert request.page.file_page.file == 1
        return known[request.page.file_page.pgoff]

    daemon.answers["GetPage"] = answer


def test_the_ledger_of_a_range(rmemctl: Ctl, pages: None) -> None:
    assert rmemctl("page", "who", "--file", "1", "--pgoff", "0x10+6").lines == [
        "PAGES      HELD BY          FOR         EACH  AS             SESSION",
        "0x10-0x13  vm/3             secure EPT     1  reference      -",
        "0x11       session 7 pin 4  DMA            1  long-term pin  session/7",
        "0x14       client pin 7     RDMA           2  long-term pin  -",
    ]


def test_the_ledger_for_programmes(rmemctl: Ctl, pages: None) -> None:
    reply = rmemctl("page", "who", "--file", "1", "--pgoff", "0x10+6", "-o", "json").json
    assert (reply["revision"], reply["index"]) == (42, "pgoff")
    assert reply["holds"][1] == {
        "first": 0x11, "npages": 1, "holder": "session 7 pin 4", "purpose": "DMA", "count": 1,
        "longterm": True, "session": 7,
    }  # fmt: skip
    names = rmemctl("page", "who", "--file", "1", "--pgoff", "0x10+6", "-o", "name").lines
    assert names == ["vm/3", "session 7 pin 4", "client pin 7"]


def test_nobody_holds_it(rmemctl: Ctl, pages: None) -> None:
    assert rmemctl("page", "who", "--file", "1", "--pgoff", "0x15").lines == [
        "nobody holds pgoff 0x15"
    ]


def test_free_frames_are_not_asked_for(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.answers["GetPage"] = story(EPT)
    # in the world's map, the frames from 0x1521 on are free
    rmemctl("page", "who", "--pfn", "0x151f+64")
    asked = [r.page.pfn for r in daemon.requests if isinstance(r, host_pb2.GetPageRequest)]
    assert asked == [0x151F, 0x1520]


@pytest.mark.parametrize(
    "args", ["", "--vm 1", "--gfn 3", "--pfn 1 --vm 2 --gfn 3", "--file 1", "--pfn 0+4097"]
)
def test_pages_are_named_in_one_way(rmemctl: Ctl, daemon: FakeDaemon, args: str) -> None:
    result = rmemctl("page", "who", *args.split())
    assert (result.code, result.out, daemon.requests) == (2, "", [])


def test_a_refusal_that_is_no_hole_is_told(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    refusal = types_pb2.Refusal(reason="NO_SUCH_VM")
    daemon.answers["GetPage"] = Refuse(grpc.StatusCode.NOT_FOUND, "vm/9", refusal)
    assert rmemctl("page", "who", "--vm", "9", "--gfn", "0").code == 15


def test_the_session_of_a_pin_is_that_of_its_record(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.answers["GetPage"] = story(("client pin 4", "DMA", 1, True))
    assert rmemctl("page", "who", "--pfn", "1").lines[1].endswith("session/7")
    daemon.answers["ListPins"] = Refuse(grpc.StatusCode.UNIMPLEMENTED, "an older daemon")
    assert rmemctl("page", "who", "--pfn", "1").lines[1].endswith("-")


def test_pins(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    assert rmemctl("pins", "list", "--file", "file/1").lines == [
        "PIN    FILE    PGOFF    HELD BY    FOR   TENANT    SESSION",
        "pin/4  file/1  0x1-0x3  session 7  DMA   uid:1000  session/7",
        "pin/7  file/2  0x0      client 7   RDMA  -         -",
        "",
        "3 pages pinned",
    ]
    assert daemon.requests[-1].file == 1
    assert rmemctl("pins", "list", "-o", "name").lines == ["pin/4", "pin/7"]


def test_the_wait_graph(rmemctl: Ctl) -> None:
    result = rmemctl("host", "graph")
    assert result.lines[1].startswith("call 17 migrate  was refused  session 7 pin 4  pins  ")
    assert result.lines[-1] == "deadlock   vm/1 vcpu 0 → session 9 → vm/1 vcpu 0"
    edges = [json.loads(line) for line in rmemctl("host", "graph", "-o", "jsonl").lines]
    assert [edge["waiting"] for edge in edges] == [False, True, True]


def test_nobody_waits(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.answers["GetWaitGraph"] = host_pb2.GetWaitGraphResponse(revision=42)
    assert rmemctl("host", "graph").lines == ["nobody waits"]
    assert rmemctl("host", "graph", "-o", "dot").lines == [
        "digraph waits {", "  rankdir=LR;", "  node [shape=box];", "}",
    ]  # fmt: skip


def test_the_wait_graph_for_graphviz(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    edge = host_pb2.WaitEdge(waiter='a "name"\\', holder="b", why="pins", waiting=True)
    daemon.answers["GetWaitGraph"] = host_pb2.GetWaitGraphResponse(
        edges=[edge, host_pb2.WaitEdge(waiter="c", why="vCPUs leave", pages="pfn 0x1")],
        deadlock=['a "name"\\', "b"],
    )
    assert rmemctl("host", "graph", "-o", "dot").lines == [
        "digraph waits {",
        "  rankdir=LR;",
        "  node [shape=box];",
        '  "a \\"name\\"\\\\" [color=red];',
        '  "b" [color=red];',
        '  "a \\"name\\"\\\\" -> "b" [label="pins", color=red];',
        '  "c" -> "somebody" [label="vCPUs leave\\npfn 0x1", style=dashed];',
        "}",
    ]


def test_sessions(rmemctl: Ctl) -> None:
    lines = rmemctl("session", "list").lines
    assert lines[1].split() == [
        "session/7", "uid:1000", "host", "socket", "4711", "-", "-", "2", "2", "MiB", "-", "-",
    ]  # fmt: skip
    assert "session/7  vm/1    0      0  30 s   file/1 pgoff" in lines[2]
    assert rmemctl("session", "list", "-o", "name").lines == ["session/7", "session/9"]


def test_whoami(rmemctl: Ctl) -> None:
    assert rmemctl("whoami").lines == [
        "tenant    uid:1000",
        "role      admin",
        "session   -",
        "",
        "LIMIT    USED        OF",
        "frames   4400     65536",
        "watches     1  no limit",
    ]
    assert rmemctl("whoami", "-o", "name").lines == ["uid:1000"]
