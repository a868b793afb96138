"""The daemon as a process: readiness, the lock, the directory, draining, logs, revisions."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemons import BIN, METHODS, PATIENCE_SECONDS, SERVICES, Daemon, Rpc, read_line
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from rmem.v1 import types_pb2, vcpu_pb2, vm_pb2, watch_pb2
from rmem_client import Client, Event, Progress, vcpus

PAGE = 4096
EX_USAGE, EX_CANTCREAT, EX_TEMPFAIL, EX_NOPERM = 2, 73, 75, 77


def test_it_says_ready_only_once_it_serves(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "--host-memory", "64M")
    ready = daemon.spawn()
    assert read_line(ready) == f"{daemon.socket}\n"
    # at once: neither gRPC nor we try again
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(daemon.socket))
    rpc = daemon.rpc()
    stub = health_pb2_grpc.HealthStub(rpc.channel)
    for name in ("", *SERVICES):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING, name
    assert rpc.call("GetHost").ok
    assert read_line(ready) == "", "the ready descriptor is closed after its line"
    os.close(ready)
    daemon.stop()


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_it_tells_systemd(daemons: Callable[..., Daemon], tmp_path: Path, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(PATIENCE_SECONDS)
        name = f"@rmemd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
        systemd.bind(f"\0{name[1:]}" if abstract else name)
        daemon = daemons(env={"NOTIFY_SOCKET": name})
        assert systemd.recv(100) == b"READY=1"
        daemon.stop()
        assert systemd.recv(100) == b"STOPPING=1"


# --- the directory -------------------------------------------------------------------------------
def test_socket_is_0600_in_a_0700_directory(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.socket_dir.stat().st_mode) == 0o700
    for name, kind in (("rmemd.sock", stat.S_ISSOCK), ("rmemd.lock", stat.S_ISREG)):
        info = (daemon.socket_dir / name).stat()
        assert kind(info.st_mode)
        assert stat.S_IMODE(info.st_mode) == 0o600, name


def _refused(directory: Path, *, code: int, says: str) -> None:
    """A daemon refuses to serve in ``directory/socket``, and never says ready."""
    daemon = Daemon(directory, "--host-memory", "64M")
    ready = daemon.spawn()
    assert daemon.wait() == code, daemon.log
    assert read_line(ready) == ""
    os.close(ready)
    assert says in daemon.log
    assert "Traceback" not in daemon.log


def test_a_second_daemon_goes_away_and_the_first_still_serves(daemon: Daemon) -> None:
    rpc = daemon.rpc()
    inode = daemon.socket.stat().st_ino
    _refused(daemon.directory, code=EX_TEMPFAIL, says="another rmemd serves")
    assert daemon.socket.stat().st_ino == inode
    assert rpc.call("GetHost").ok
    assert daemon.rpc().call("GetHost").ok


def test_a_socket_left_by_kill_9_is_replaced(daemons: Callable[..., Daemon]) -> None:
    first = daemons()
    first.client().vms.create("null")
    first.kill()
    assert first.socket.is_socket()
    second = daemons(directory=first.directory)
    assert not second.client().vms.list().vms
    second.stop()


def test_an_unsafe_directory_is_refused(tmp_path: Path) -> None:
    for name, mode in (("group", 0o770), ("world", 0o701)):
        (tmp_path / name / "socket").mkdir(parents=True)
        (tmp_path / name / "socket").chmod(mode)
        _refused(tmp_path / name, code=EX_NOPERM, says="is open to others: chmod 700")
        assert not list((tmp_path / name / "socket").iterdir())


def test_a_link_to_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "socket").symlink_to("elsewhere")
    _refused(tmp_path, code=EX_NOPERM, says="is not a directory of uid")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory to somebody else")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "socket").mkdir(mode=0o700)
    os.chown(tmp_path / "socket", 65534, 65534)
    _refused(tmp_path, code=EX_NOPERM, says="is not a directory of uid 0")


def test_a_file_in_the_directory_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "socket").write_text("not a directory")
    _refused(tmp_path, code=EX_CANTCREAT, says="File exists")


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path / ("x" * 100), code=EX_CANTCREAT, says="rmemd: ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host-memory", "1M"], "2M a node at least"),
        (["--host-memory", "17T"], "16T at most"),
        (["--host-memory", "8M", "--nodes", "5"], "2M a node at least"),
        (["--host-memory", "lots"], "is not a size"),
        (["--nodes", "0"], "--nodes"),
        (["--seed", str(1 << 63)], "64-bit"),
        (["--seed", "x"], "--seed"),
        (["--linux-release", "2.6"], "--linux-release"),
        (["--hook-deadline", "0"], "--hook-deadline"),
        (["--frobnicate"], "--frobnicate"),
        (["surplus"], "surplus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_exit_with_2(tmp_path: Path, options: list[str], says: str) -> None:
    """As click's programs do (rmemd.daemon.cli documents the codes)."""
    done = subprocess.run(
        [BIN / "rmemd", "serve", "--socket-dir", tmp_path / "socket", *options],
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == EX_USAGE
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "socket").exists()


# --- the end -------------------------------------------------------------------------------------
def looping_vm(client: Client) -> int:
    """Make a VM with a vCPU whose programme touches a page for ever."""
    vm = client.vms.create("gup")
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=64 * PAGE)
    client.vcpus.create(vm, 0)
    client.vcpus.set_programme(vm, 0, [vcpus.touch(0, PAGE), vcpus.loop(0, (1 << 63) - 1)])
    return vm


def run_until_mapped(client: Client, pool: ThreadPoolExecutor, vm: int) -> Any:
    """Run the looping vCPU in a thread; return its future once the guest has run."""
    with client.watch(vm=vm, kinds=["mapped"]) as watch:
        watch.start()
        running = pool.submit(client.vcpus.run, vm, 0)
        next(item for item in watch if isinstance(item, Event))
    return running


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(daemons: Callable[..., Daemon], number: signal.Signals) -> None:
    daemon = daemons()
    client = daemon.client()
    vm = looping_vm(client)
    ended = threading.Event()

    def watch_to_the_end() -> list[object]:
        with daemon.client().watch() as watch:
            watch.start()
            started.set()
            items = list(watch)
        ended.set()
        return items

    started = threading.Event()
    with ThreadPoolExecutor() as pool:
        watched = pool.submit(watch_to_the_end)
        assert started.wait(PATIENCE_SECONDS)
        running = run_until_mapped(client, pool, vm)
        assert not running.done()
        assert not ended.is_set()
        daemon.signal(number)
        exited = running.result(PATIENCE_SECONDS)
        assert exited.exit_reason == vcpu_pb2.EXIT_REASON_INTR
        assert exited.errno == 4
        assert exited.instructions > 0
        assert any(isinstance(item, Progress) for item in watched.result(PATIENCE_SECONDS))
    daemon.stop()
    assert [line["event"] for line in daemon.log_lines][-2:] == ["draining", "stopped"]


def test_a_drained_daemon_takes_no_calls(daemon: Daemon) -> None:
    rpc = daemon.rpc()
    assert rpc.call("GetHost").ok
    daemon.signal(signal.SIGTERM)
    assert daemon.process.wait(PATIENCE_SECONDS) == 0
    assert rpc.call("GetHost").code is grpc.StatusCode.UNAVAILABLE


# --- what it says --------------------------------------------------------------------------------
def test_the_log_is_json_lines(daemons: Callable[..., Daemon]) -> None:
    daemon = daemons("--log-level", "debug")
    rpc = daemon.rpc()
    assert rpc.call("GetHost").ok
    refused = rpc.call_raw("GetVm", b"\xff")
    assert refused.info is not None
    daemon.stop()
    lines = daemon.log_lines
    for line in lines:
        assert {"event", "level", "timestamp"} <= line.keys(), line
    serving = next(line for line in lines if line["event"] == "serving")
    assert serving["mock"] is True
    assert serving["host_memory_bytes"] == 64 << 20
    assert [line["method"] for line in lines if line["event"] == "call"] == ["HostService/GetHost"]
    (told,) = [line for line in lines if line["event"] == "refused"]
    assert told["method"] == "VmService/GetVm"
    assert told["correlation"] == refused.info.metadata["correlation_id"]


def test_the_console_log_is_for_people(daemons: Callable[..., Daemon]) -> None:
    daemon = daemons("--log-console")
    daemon.stop()
    # plain after the colours are taken away
    assert re.search(r"serving .*seed=0", re.sub(r"\x1b\[[0-9;]*m", "", daemon.log))


def test_reflection_lists_every_service_and_method(daemon: Daemon) -> None:
    database = ProtoReflectionDescriptorDatabase(daemon.rpc().channel)
    assert sorted(database.get_services()) == sorted(
        [*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME]
    )
    for method in METHODS.values():
        found = database.FindFileContainingSymbol(method.containing_service.full_name)
        names = {m.name for service in found.service for m in service.method}
        assert method.name in names


def test_every_reply_has_a_revision_field() -> None:
    for name, method in METHODS.items():
        # the standard's own messages (google.longrunning) are what they are
        ours = method.output_type.file.package == "rmem.v1"
        if ours and not method.server_streaming:
            field = method.output_type.fields_by_name["revision"]
            assert (field.number, field.type) == (1, field.TYPE_INT64), name


def test_revisions_never_decrease(daemon: Daemon) -> None:
    """Four clients change and read at once; what each sees goes up, writes strictly."""

    def work(rpc: Rpc) -> None:
        last = 0
        for _ in range(20):
            for name, strictly in (
                ("CreateVm", True), ("GetHost", False), ("ListVms", False), ("ListFiles", False),
                ("ListConsumers", False), ("GetAccounting", False), ("ListFaultRules", False),
                ("ExplainReason", False), ("GetPageMap", False),
            ):  # fmt: skip
                request = None
                if name == "CreateVm":
                    request = vm_pb2.CreateVmRequest(consumer="null")
                reply = rpc.call(name, request).reply
                assert reply.revision > last if strictly else reply.revision >= last, name
                last = reply.revision

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, daemon.rpc()) for _ in range(4)]:
            done.result(PATIENCE_SECONDS)


def test_a_watch_sees_what_happened_since_a_revision(daemon: Daemon) -> None:
    client = daemon.client()
    before = client.host.get().revision
    vms = [client.vms.create("null") for _ in range(3)]
    with client.watch(start_revision=before, kinds=["vm_created"]) as watch:
        found = list(islice((item for item in watch if isinstance(item, Event)), 3))
    assert [event.vm for event in found] == vms
    assert [event.revision for event in found] == sorted({event.revision for event in found})


def _ciphertext(daemon: Daemon) -> tuple[bytes, bytes, int]:
    """Make a TDX guest write a page; return its raw bytes, its measurement, and the revision."""
    client = daemon.client()
    vm = client.vms.create("tdx-today")
    file = client.files.create(vm, 16 * PAGE)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=16 * PAGE, file=file)
    client.vcpus.create(vm, 0)
    client.vms.populate(vm, 0, b"image" * 4096)
    measurement = client.vms.finalize(vm)
    programme = [
        vcpus.accept(8 * PAGE, PAGE),
        vcpus.write(8 * PAGE, PAGE, seed=1, private=True),
        vcpus.halt(),
    ]
    client.vcpus.set_programme(vm, 0, programme)
    exited = client.vcpus.run(vm, 0)
    assert exited.exit_reason == vcpu_pb2.EXIT_REASON_HLT, exited
    page = client.host.page(vm=vm, gfn=8)
    raw = client.host.read_physical(page.pfn, level=types_pb2.ACCESS_LEVEL_BUS)
    return raw, measurement, client.last_revision


def test_the_seed_makes_it_reproducible(daemons: Callable[..., Daemon]) -> None:
    one, same, other = (_ciphertext(daemons("--seed", seed)) for seed in ("7", "7", "8"))
    assert one == same
    assert other[0] != one[0]
    assert other[1:] == one[1:], "the seed is in the keys and nowhere else"


def test_watch_ends_for_those_who_only_watch(daemon: Daemon) -> None:
    stream = daemon.rpc().channel.unary_stream(
        "/rmem.v1.WatchService/Watch", None, watch_pb2.WatchResponse.FromString
    )(b"")
    assert next(stream).WhichOneof("message") == "progress_revision"
    daemon.signal(signal.SIGTERM)
    assert not list(stream), "it ends in order, without an error"
    assert daemon.process.wait(PATIENCE_SECONDS) == 0
