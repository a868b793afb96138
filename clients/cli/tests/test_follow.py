"""--watch: shown again at every event, never by a timer, and left cleanly."""

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
from ctl_processes import PATIENCE, read_all, read_some, start
from fake_daemon import FakeDaemon, Refuse

from rmem.v1 import types_pb2, vm_pb2, watch_pb2
from rmem_client import Event, Progress
from rmemctl.app import Command, Group
from rmemctl.follow import News
from rmemctl.main import cli

Ctl = Callable[..., Any]


class Changing:
    """A daemon with one VM, that dies as soon as it was shown; then nothing more happens."""

    def __init__(self, daemon: FakeDaemon, ends: bool = True) -> None:
        self.shown = threading.Semaphore(0)
        self.states = ["building", "dead"]
        self.done = threading.Event()
        self._ends = ends
        daemon.answers["ListVms"] = self._list
        daemon.answers["Watch"] = self._watch

    def _list(self, request: Any) -> vm_pb2.ListVmsResponse:
        state = self.states.pop(0) if self.states else "shown too often"
        self.shown.release()
        return vm_pb2.ListVmsResponse(
            revision=42, vms=[vm_pb2.Vm(vm=1, consumer="snp", state=state)]
        )

    def _watch(self, request: Any) -> Iterator[watch_pb2.WatchResponse]:
        yield watch_pb2.WatchResponse(progress_revision=42)
        assert self.shown.acquire(timeout=PATIENCE)
        yield watch_pb2.WatchResponse(event=watch_pb2.Event(revision=43, kind="vm_died", vm=1))
        yield watch_pb2.WatchResponse(progress_revision=43)
        assert self.shown.acquire(timeout=PATIENCE)
        if not self._ends:
            self.done.wait(PATIENCE)


@pytest.fixture
def changing(daemon: FakeDaemon) -> Changing:
    return Changing(daemon)


@pytest.fixture
def lasting(daemon: FakeDaemon) -> Iterator[Changing]:
    made = Changing(daemon, ends=False)
    yield made
    made.done.set()


def test_blocks_one_after_the_other(rmemctl: Ctl, changing: Changing) -> None:
    result = rmemctl("vm", "list", "--watch")
    assert (result.code, result.err) == (0, "")
    first, second = result.out.split("\n\n")
    assert "building" in first
    assert "dead" in second
    assert [block.splitlines()[0].split()[0] for block in (first, second)] == ["VM", "VM"]


def test_the_option_is_taken_before_the_command_too(rmemctl: Ctl, changing: Changing) -> None:
    out = rmemctl("--watch", "--no-headers", "vm", "list").out
    assert [line.split()[0] for line in out.splitlines() if line] == ["vm/1", "vm/1"]


@pytest.mark.parametrize("form", ["json", "jsonl", "name"])
def test_programmes_get_one_result_after_the_other(
    rmemctl: Ctl, changing: Changing, form: str
) -> None:
    out = rmemctl("vm", "list", "-w", "-o", form).out
    if form == "name":
        assert out == "vm/1\nvm/1\n"
        return
    decoder, states, at = json.JSONDecoder(), [], 0
    while at < len(out):
        found, at = decoder.raw_decode(out, at)
        at += 1  # the end of the line
        states += [vm["state"] for vm in found.get("vms", [found])]
    assert states == ["building", "dead"]


def test_events_during_a_redraw_are_one_redraw() -> None:
    blocked, go = threading.Event(), threading.Event()

    def items() -> Iterator[Event | Progress]:
        for revision in range(100):
            yield Event(revision, "mapped")
            yield Progress(revision)
        blocked.set()
        go.wait(PATIENCE)

    news = News(items())  # type: ignore[arg-type]
    assert blocked.wait(PATIENCE)
    assert news.wait()
    assert not news._something.is_set()
    go.set()
    assert not news.wait()


def test_progress_alone_is_no_reason_to_draw() -> None:
    news = News(iter([Progress(1), Progress(2)]))  # type: ignore[arg-type]
    assert not news.wait()


def test_what_ends_the_watch_is_told(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    refusal = types_pb2.Refusal(reason="TOO_MANY")
    daemon.answers["Watch"] = Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "16 watches", refusal)
    result = rmemctl("vm", "list", "--watch")
    assert (result.code, result.out) == (18, "")
    assert "TOO_MANY" in result.err


def test_a_daemon_that_is_not_there(rmemctl: Ctl) -> None:
    assert rmemctl("--socket-dir", "/nowhere", "vm", "list", "--watch").code == 3


def commands(group: Group, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if isinstance(command, Group):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


def test_what_shows_state_can_be_watched_and_nothing_else() -> None:
    found = {" ".join(path): command for path, command in commands(cli)}  # type: ignore[arg-type]
    watchable = {path for path, command in found.items() if command.watchable}
    assert all(isinstance(command, Command) for command in found.values())
    assert watchable == {
        "host show", "host accounting", "host graph", "vm list", "vm show", "vm attributes",
        "mem list", "mem show", "page show", "page who", "page map", "pins list",
        "consumers list", "consumers ops", "job list", "session list", "whoami", "fault list",
        "fault points", "trace show",
    }  # fmt: skip


@pytest.mark.parametrize("args", ["vm create snp", "migrate --pfn 1", "watch", "job wait 1"])
def test_what_changes_something_is_not_repeated(
    rmemctl: Ctl, daemon: FakeDaemon, args: str
) -> None:
    result = rmemctl(*args.split(), "--watch")
    assert (result.code, result.out) == (2, "")
    assert "--watch is for commands that show state" in result.err
    assert daemon.requests == []


def test_dot_is_for_graphs(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    result = rmemctl("vm", "list", "-o", "dot")
    assert (result.code, result.out, daemon.requests) == (2, "", [])


def test_an_interrupt_ends_it_quietly(daemon: FakeDaemon, lasting: Changing) -> None:
    process = start(daemon.socket_dir, "vm", "list", "--watch")
    assert process.stdout is not None
    text = ""
    while "dead" not in text:
        text += process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, rest, err.strip()) == (130, "", "")


def test_a_reader_that_has_gone_ends_it(daemon: FakeDaemon, lasting: Changing) -> None:
    lasting.states = ["building"]
    process = start(daemon.socket_dir, "vm", "list", "--watch")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(PATIENCE) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()


def test_on_a_terminal_it_is_redrawn_in_place(daemon: FakeDaemon, lasting: Changing) -> None:
    terminal, end = pty.openpty()
    process = start(daemon.socket_dir, "vm", "list", "--watch", stdout=end)
    os.close(end)
    seen = ""
    while "dead" not in seen:
        seen += read_some(terminal)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    seen += read_all(terminal)
    before, after = seen[: seen.index("dead")], seen[seen.index("dead") :]
    assert "building" in before
    # up to the first line of the picture, and the cursor is back at the end
    assert "\x1b[1A" in before
    assert "\x1b[?25h" in after
    assert process.stderr is not None
    assert process.stderr.read().strip() == ""
    process.stderr.close()
