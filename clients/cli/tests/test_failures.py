from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from fake_daemon import BUSY, UNMOVABLE, FakeDaemon, Refuse

from rmem.v1 import types_pb2, watch_pb2

Ctl = Callable[..., object]
RMEMCTL = [sys.executable, "-c", "from rmemctl.main import main; main()"]


def test_refusal_is_told_with_all_that_is_set(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.answers["DestroyVm"] = BUSY
    result = rmemctl("vm", "destroy", "3")
    assert (result.code, result.out) == (20, "")
    assert result.err.splitlines() == [
        "error: FOLIO_BUSY (EAGAIN): gfn 0x42 is referenced",
        "  field          gfns",
        "  page           gfn 0x42",
        "  state          MAPPED",
        "  rule           references must be the expected ones (restrictedmem.md §2)",
        "  held by        vm/3 (secure EPT: 1 reference)",
        "                 client 7 (DMA: 2 long-term pins)",
        "  vendor status  TDX_OPERAND_BUSY (0x8000020000000000)",
        "  said by        tdx(vm/3).migrate_folio",
        "  done before    3 pages",
        "  at offset      0x42000",
        "  log id         c-1f2e",
        "  remedy         Have the holders that are named let go, then try again.",
    ]


def test_lines_that_are_not_set_are_left_out(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    daemon.answers["DestroyVm"] = UNMOVABLE
    assert len(rmemctl("vm", "destroy", "3").err.splitlines()) == 4


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_refusal_as_json(rmemctl: Ctl, daemon: FakeDaemon, form: str) -> None:
    daemon.answers["DestroyVm"] = BUSY
    result = rmemctl("vm", "destroy", "3", "-o", form)
    error = json.loads(result.err)
    assert (result.code, result.out) == (20, "")
    assert (error["reason"], error["errno_name"], error["revision"]) == ("FOLIO_BUSY", "EAGAIN", 17)
    assert error["holders"][0]["name"] == "vm/3"


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 13),
        (grpc.StatusCode.NOT_FOUND, 15),
        (grpc.StatusCode.FAILED_PRECONDITION, 19),
        (grpc.StatusCode.UNAVAILABLE, 24),
        (grpc.StatusCode.DATA_LOSS, 25),
    ],
)
def test_exit_code_follows_the_grpc_code(
    rmemctl: Ctl, daemon: FakeDaemon, code: grpc.StatusCode, exit_code: int
) -> None:
    daemon.answers["ListVms"] = Refuse(code, "no", types_pb2.Refusal(reason="X"))
    assert rmemctl("vm", "list").code == exit_code


def test_unreachable(rmemctl: Ctl) -> None:
    result = rmemctl("--socket-dir", "/nowhere", "vm", "list")
    assert result.code == 3
    assert "cannot reach rmemd at /nowhere/rmemd.sock: there is no such socket" in result.err
    assert rmemctl("ready", "--timeout", "0.1", "--socket-dir", "/nowhere").code == 3


@pytest.mark.parametrize(
    "args",
    [
        "vm show x",
        "vm slot 1 0",
        "page show",
        "page show --pfn 1 --vm 2",
        "page show --gfn 1",
        "migrate",
        "migrate --vm 3",
        "migrate --gfn 3",
        "migrate --vm 3 --pfn 3",
        "migrate --vm 3 --gfn 3 --pfn 3",
        "vm convert 1 0+1",
        "mem create 1 2X",
        "nonsense",
    ],
)
def test_usage(rmemctl: Ctl, args: str) -> None:
    result = rmemctl(*args.split())
    assert (result.code, result.out) == (2, "")
    assert "Error: " in result.err


def test_help_is_fast() -> None:
    check = (
        "import sys; from rmemctl.main import run; code = run(['--help']);"
        "heavy = {'grpc', 'rich', 'google.protobuf', 'rmem_client'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Exit codes:" in done.stdout


def test_every_command_has_help(rmemctl: Ctl) -> None:
    from rmemctl.app import Group
    from rmemctl.main import cli

    def paths(group: Group, prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, command in group.commands.items():
            yield (*prefix, name)
            if isinstance(command, Group):
                yield from paths(command, (*prefix, name))

    for path in paths(cli, ()):
        result = rmemctl(*path, "--help")
        assert result.code == 0
        assert len(result.lines) > 4


def endless(request: object) -> Iterator[watch_pb2.WatchResponse]:
    for revision in range(1, 200_000):
        yield watch_pb2.WatchResponse(
            event=watch_pb2.Event(revision=revision, kind="folio_migrated")
        )


@pytest.mark.parametrize("form", ["table", "json"])
def test_broken_pipe_is_quiet(daemon: FakeDaemon, form: str) -> None:
    daemon.answers["Watch"] = endless
    process = start(daemon.socket_dir, "watch", "-o", form)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert errors_of(process) == ""


def test_interrupt_is_quiet(daemon: FakeDaemon) -> None:
    daemon.answers["Watch"] = endless
    process = start(daemon.socket_dir, "watch", "-o", "json")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(30) == 130
    assert errors_of(process).strip() == ""


def start(socket_dir: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RMEMCTL, "--socket-dir", str(socket_dir), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def errors_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert process.stderr is not None
    text = process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    return text
