"""Traces of a running daemon: recorded while clients work, exported, done again elsewhere."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from daemons import BIN, Daemon, Rpc, run_cli

from rmem.v1 import session_pb2, trace_pb2
from rmem_client import Client, NotFound, RmemError, aio, vcpus
from rmemctl.commands import trace as ctl
from rmemd.daemon.cli import main
from rmemd.errors import TRACE_RUNNING
from rmemd.trace.format import Trace, read
from rmemd.trace.player import Changes
from rmemd.trace.replayer import replay

PAGE = 4096
SECRET = 0x5EC12E7
RELOCATE = ("--consumer", "tdx-today=tdx-relocate")
MADE = ("create_vm", "create_file", "set_memory_region", "create_vcpu", "finalize")


@pytest.fixture
def daemon(daemons: Callable[..., Daemon]) -> Daemon:
    """A daemon with two nodes."""
    return daemons("--nodes", "2")


def guest(client: Client, consumer: str = "tdx-today") -> int:
    """Launch a guest that writes and checks 16 private pages; return its VM."""
    vm = client.vms.create(consumer)
    file = client.files.create(vm, 64 * PAGE)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=64 * PAGE, file=file)
    client.vcpus.create(vm, 0)
    client.vms.finalize(vm)
    take = vcpus.validate if consumer.startswith("snp") else vcpus.accept
    programme = [
        take(0, 16 * PAGE),
        vcpus.write(0, 16 * PAGE, seed=SECRET, private=True),
        vcpus.check(0, 16 * PAGE, seed=SECRET, private=True),
    ]
    client.vcpus.set_programme(vm, 0, programme)
    assert client.vcpus.run(vm, 0).mismatched_pages == 0
    return vm


def exported(client: Client) -> Trace:
    """Return what was recorded."""
    return read(io.BytesIO(b"".join(client.traces.export())))


def test_what_clients_do_is_recorded_from_any_moment_on(daemon: Daemon) -> None:
    with Client(daemon.socket_dir) as client:
        vm = guest(client)
        begun = client.traces.start(state_every=4)
        assert begun.trace.recording
        assert begun.revision == client.last_revision
        guest(client)
        assert client.host.migrate(vm=vm, gfns=[(0, 4)]).report.unmovable == 4
        told = client.traces.get().trace
        assert told.recording
        assert told.operations == len(MADE) + 3
        done = client.traces.stop()
        assert (done.recording, done.stopped) == (False, "stopped")
        trace = exported(client)
    assert [one.method for one in trace.asked.values()][: len(MADE)] == list(MADE)
    same = replay(trace, Changes())
    assert (same.divergences, same.operations) == ((), done.operations)
    [other] = replay(trace, Changes({"tdx-today": "tdx-relocate"})).divergences
    assert "4 moved" in other.text


def test_one_recording_at_a_time_and_the_last_is_kept(daemon: Daemon) -> None:
    with Client(daemon.socket_dir) as client:
        with pytest.raises(NotFound) as caught:
            client.traces.get()
        assert caught.value.reason == "NO_TRACE"
        with pytest.raises(NotFound):
            list(client.traces.export())
        client.traces.start(limit_bytes=1 << 16)
        with pytest.raises(RmemError) as refused:
            client.traces.start()
        assert refused.value.reason == TRACE_RUNNING.name
        client.vms.create("gup")
        client.traces.stop()
        assert [one.method for one in exported(client).asked.values()] == ["create_vm"]
        client.traces.start()
        assert client.traces.get().trace.operations == 0


def test_a_recording_that_goes_on_can_be_exported_in_parts(daemon: Daemon) -> None:
    with Client(daemon.socket_dir) as client:
        client.traces.start()
        client.vms.create("gup")
        first = b"".join(client.traces.export())
        assert read(io.BytesIO(first)).truncated
        client.vms.create("gup")
        rest = b"".join(client.traces.export(len(first)))
        assert len(read(io.BytesIO(first + rest)).asked) == 2
        assert client.traces.get().trace.recording


def test_the_asyncio_client_records_too(daemon: Daemon) -> None:
    async def record() -> bytes:
        async with aio.Client(daemon.socket_dir) as client:
            await client.traces.start()
            await client.vms.create("gup")
            await client.traces.stop()
            return b"".join([part async for part in client.traces.export()])

    assert len(read(io.BytesIO(asyncio.run(record()))).asked) == 1


def test_a_trace_is_for_admins(daemon: Daemon) -> None:
    rpc = Rpc(daemon.socket_dir / "rmemd.sock")
    mine = [("rmem-token", rpc.call("OpenSession", lease_seconds=60).reply.token)]
    role, tenant = session_pb2.ROLE_HOST, "somebody"
    ticket = rpc.call("CreateTicket", metadata=mine, role=role, tenant=tenant).reply.ticket
    opened = rpc.call("OpenSession", lease_seconds=60, ticket=ticket).reply
    token = [("rmem-token", opened.token)]
    for name in ("StartTrace", "StopTrace", "GetTrace", "ExportTrace"):
        answer = rpc.call(name, metadata=token)
        assert (answer.ok, answer.reason) == (False, "ROLE_DENIED"), name
    rpc.close()


def test_a_limit_that_is_none_is_refused(daemon: Daemon) -> None:
    rpc = Rpc(daemon.socket_dir / "rmemd.sock")
    for field in ("limit_bytes", "state_every"):
        answer = rpc.call("StartTrace", trace_pb2.StartTraceRequest(**{field: -1}))
        assert (answer.reason, answer.ok) == ("BAD_REQUEST", False)
    assert rpc.call("StartTrace", limit_bytes=1).ok
    assert not rpc.call("GetTrace").reply.trace.recording
    rpc.close()


# --- rmemctl trace, rmemd trace --------------------------------------------------------------
def test_rmemctl_records_while_a_command_runs(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    inner = [str(BIN / "rmemctl"), "--socket-dir", str(daemon.socket_dir), "vm", "create", "gup"]
    done = run_cli(daemon, "trace", "record", str(file), "--", *inner)
    assert done.returncode == 0, done.stderr
    assert "1 operation" in done.stderr
    assert done.stdout.strip() == "vm/1"
    again = run_cli(daemon, "trace", "replay", str(file))
    assert (again.returncode, again.stderr) == (0, "")
    assert "0 divergences" in again.stdout
    failed = run_cli(daemon, "trace", "record", str(file), "--", sys.executable, "-c", "exit(7)")
    assert failed.returncode == 7
    shown = run_cli(daemon, "trace", "show")
    assert "stopped" in shown.stdout
    assert run_cli(daemon, "trace", "export", str(tmp_path / "again")).returncode == 0
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_rmemctl_records_until_interrupted(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    command = [BIN / "rmemctl", "--socket-dir", daemon.socket_dir, "trace", "record", file]
    recording = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert recording.stderr is not None
    assert "Ctrl-C" in recording.stderr.readline()
    with Client(daemon.socket_dir) as client:
        client.vms.create("gup")
    recording.send_signal(signal.SIGINT)
    assert "1 operation" in recording.communicate(timeout=60)[1]
    assert recording.returncode == 0
    with file.open("rb") as data:
        assert len(read(data).asked) == 1


def test_where_rmemd_is_not_installed_rmemctl_says_so(daemon: Daemon, tmp_path: Path) -> None:
    lonely = tmp_path / "bin"
    lonely.mkdir()
    (lonely / "python").symlink_to(sys.executable)
    code = (
        "import sys; sys.executable = sys.argv.pop(1); from rmemctl.main import run; "
        "sys.exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(lonely / "python"), "trace", "replay", "x.jsonl"],
        env={**os.environ, "PATH": str(lonely)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == ctl.EXIT_NOT_FOUND
    assert "`rmemd` is not installed here" in done.stderr
    assert "rmemd trace replay x.jsonl" in done.stderr


@pytest.fixture
def file(daemon: Daemon, tmp_path: Path) -> Path:
    """A trace of a guest whose pages somebody wants to move."""
    with Client(daemon.socket_dir) as client:
        client.traces.start()
        guest(client, "snp-move")
        vm = guest(client)
        client.host.migrate(vm=vm, gfns=[(0, 4)])
        client.traces.stop()
        path = tmp_path / "trace.jsonl"
        path.write_bytes(b"".join(client.traces.export()))
    return path


def rmemd(*args: str | Path) -> Result:
    """Run ``rmemd trace``."""
    return CliRunner().invoke(main, ["trace", *map(str, args)])


def test_rmemd_replays_and_explains(file: Path) -> None:
    assert rmemd("replay", file).exit_code == 0
    other = rmemd("replay", file, *RELOCATE, "--keep-going")
    assert other.exit_code == 1
    assert "migrate_folio: NULL in tdx-today, yes in tdx-relocate" in other.output
    assert "1 divergences" in other.output
    assert rmemd("replay", file, "--consumer", "snp-move=snp-swap-disable").exit_code == 0
    assert rmemd("replay", file, "--set", "linux_release=7.2").exit_code == 0
    for words in (
        ("--consumer", "tdx-today"), ("--set", "linux_release=5"), ("--set", "colour=red"),
        ("--set", "frames=many"),
    ):  # fmt: skip
        assert rmemd("replay", file, *words).exit_code == 2


def test_rmemd_compares_and_shrinks(file: Path, tmp_path: Path) -> None:
    assert rmemd("diff", file, file).exit_code == 0
    small = tmp_path / "small.jsonl"
    done = rmemd("shrink", file, *RELOCATE, "--to", small)
    assert done.exit_code == 0, done.output
    assert "migrate(" in done.output
    with small.open("rb") as data:
        assert len(read(data).asked) <= 8
    differs = rmemd("diff", file, small)
    assert differs.exit_code == 1
    assert "only in the first" in differs.output
    assert rmemd("replay", small, "--variant", "tdx-relocate").exit_code == 1
    assert rmemd("replay", small, *RELOCATE).exit_code == 1
    assert rmemd("shrink", file, "--refusal", "FOLIO_UNMOVABLE").exit_code == 0
    assert rmemd("shrink", file, "--refusal", "NO_FRAMES").exit_code == 65
    assert rmemd("shrink", file, "--violation", "any").exit_code == 65
    both = rmemd("shrink", file, "--refusal", "NO_FRAMES", "--violation", "any")
    assert both.exit_code == 2


def test_rmemd_refuses_what_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("hello\n")
    done = rmemd("replay", path)
    assert done.exit_code == 65
    assert "this is no trace" in done.output


def test_a_recording_ends_when_the_daemon_does(daemon: Daemon) -> None:
    with Client(daemon.socket_dir) as client:
        client.traces.start()
        guest(client)
        assert client.traces.get().trace.recording
    daemon.stop()
