"""Long work: its bar, its end, and what Ctrl-C does to it."""

from __future__ import annotations

import json
import os
import pty
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import world
from ctl_processes import PATIENCE, read_all, read_some, start
from fake_daemon import FakeDaemon, Refuse
from google.longrunning import operations_pb2

from rmem.v1 import types_pb2

Ctl = Callable[..., Any]


def test_a_job_is_waited_for_and_shown(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    result = rmemctl("compact", "--node", "1")
    assert (result.code, result.err) == (0, "")
    assert result.lines[-2:] == [
        "pages: 12 moved, 3 unmovable, 1 busy, 0 failed",
        "free 2 MiB blocks: 3 before, 25 after; 1 block kept partly used by unmovable pages",
    ]
    started, waited = daemon.requests[-2:]
    assert (started.node, waited.name, waited.timeout.seconds) == (1, "operations/1", 60)


def test_what_it_did_is_the_reply_of_the_call(rmemctl: Ctl) -> None:
    reply = rmemctl("host", "offline", "0x10+16", "-o", "json").json
    assert (reply["offline"], reply["report"]["moved"]) == (12, 12)
    runs = rmemctl("migrate", "--pfn", "1", "-o", "jsonl").lines
    assert [json.loads(run)["src_pfn"] for run in runs] == [0x10, 0x1C, 0x1F]


def test_what_refuses_a_job_is_told_like_any_refusal(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    def refused(request: Any) -> operations_pb2.Operation:
        operation = world.operation("operations/1")
        refusal = types_pb2.Refusal(reason="BAD_NODE", errno=22, errno_name="EINVAL", field="node")
        operation.error.code = 3
        operation.error.message = "BAD_NODE: no node 7"
        operation.error.details.add().Pack(refusal)
        return operation

    daemon.answers["WaitOperation"] = refused
    result = rmemctl("compact", "--node", "7")
    assert (result.code, result.out) == (13, "")
    assert result.err.splitlines() == [
        "error: BAD_NODE (EINVAL): no node 7", "  field          node",
    ]  # fmt: skip


def test_the_list_and_a_jobs_end(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    assert rmemctl("job", "list").lines == [
        "OPERATION     KIND     STATE      DONE  OF  MOVED  STAYED  TENANT",
        "operations/1  compact  done         16  16     12       4  uid:1000",
        "operations/2  migrate  cancelled     4  16      3       1  uid:1000",
        "operations/3  offline  running       8  16      6       2  uid:1000",
    ]
    rmemctl("job", "list", "--running")
    assert daemon.requests[-1].filter == "done=false"
    rows = [json.loads(line) for line in rmemctl("job", "list", "-o", "jsonl").lines]
    assert [(row["state"], row["error"]) for row in rows] == [
        ("done", None), ("cancelled", "JOB_CANCELLED"), ("running", None),
    ]  # fmt: skip
    assert rmemctl("job", "list", "-o", "name").lines[0] == "operations/1"
    assert "12 frames offline" in rmemctl("job", "wait", "operations/3").out


def test_a_cancelled_job_shows_what_it_did_before(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.answers["WaitOperation"] = world.operation("operations/2", done_pages=4, cancelling=True)
    result = rmemctl("job", "cancel", "2")
    assert result.code == 0
    assert result.lines[-1] == "pages: 12 moved, 3 unmovable, 1 busy, 0 failed"
    assert result.err == "cancelled: 4 of 16 pages dealt with; what is done stays\n"
    assert [request.name for request in daemon.requests[-2:]] == ["operations/2"] * 2


def test_a_daemon_without_jobs_is_told(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.answers["StartCompact"] = Refuse(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    assert rmemctl("compact").code == 22


class Held:
    """A job that runs until it is cancelled; ``waited`` once somebody waits for it."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self.waited, self.cancelled = threading.Event(), threading.Event()
        self.deaf = False
        daemon.answers["WaitOperation"] = self._wait
        daemon.answers["CancelOperation"] = self._cancel

    def _wait(self, request: Any) -> operations_pb2.Operation:
        self.waited.set()
        seconds = request.timeout.seconds + request.timeout.nanos / 1e9
        if self.cancelled.wait(seconds) and not self.deaf:
            return world.operation(request.name, done_pages=4, cancelling=True)
        return world.operation(request.name, done=False, done_pages=8)

    def _cancel(self, request: Any) -> Any:
        from google.protobuf.empty_pb2 import Empty

        self.cancelled.set()
        return Empty()


@pytest.fixture
def held(daemon: FakeDaemon) -> Iterator[Held]:
    job = Held(daemon)
    yield job
    job.cancelled.set()


def test_an_interrupt_cancels_the_job_and_shows_what_it_did(daemon: FakeDaemon, held: Held) -> None:
    process = start(daemon.socket_dir, "compact")
    assert held.waited.wait(PATIENCE)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert held.cancelled.is_set()
    assert "pages: 12 moved, 3 unmovable, 1 busy, 0 failed" in out
    assert err.splitlines() == ["cancelled: 4 of 16 pages dealt with; what is done stays"]


def test_who_only_waits_leaves_the_job_alone(daemon: FakeDaemon, held: Held) -> None:
    process = start(daemon.socket_dir, "job", "wait", "1")
    assert held.waited.wait(PATIENCE)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err.strip()) == (130, "", "")
    assert not held.cancelled.is_set()


def test_a_bar_on_a_terminal_shows_what_the_daemon_tells(daemon: FakeDaemon, held: Held) -> None:
    terminal, end = pty.openpty()
    process = start(daemon.socket_dir, "compact", stderr=end)
    os.close(end)
    seen = ""
    while "8/16 pages" not in seen:
        seen += read_some(terminal)
    assert "compact" in seen
    assert "2 stay" in seen
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait(PATIENCE) == 130
    process.stdout.close()
    seen += read_all(terminal)
    assert "cancelled: 4 of 16 pages dealt with" in seen
    # what goes to stdout stays clean
    assert "\x1b" not in out
    assert "pages: 12 moved" in out
