"""The real daemon's deaths, restarts and ends: what its clients have afterwards."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemons import (
    BIN,
    DEBUGGABLE,
    PATIENCE_SECONDS,
    Daemon,
    eventually,
    read_line,
    run_cli,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service_manager import ServiceManager
from session_clients import Clients

from rmem.v1 import host_pb2, vcpu_pb2
from rmem_client import Client, Event, Refused, Unavailable, vcpus

PAGE = 4096
MMAP = 1
MakeDaemon = Callable[..., Daemon]
AT_ONCE = ("--set", "daemon.restart_delay_max_seconds=0", "--set", "daemon.crash_loop_starts=0")
LOOPS_AT_4 = ("--set", "daemon.restart_delay_max_seconds=0", "--set", "daemon.crash_loop_starts=4")


@pytest.fixture
def kept(daemons: MakeDaemon) -> Daemon:
    """A daemon with a keeper, which starts it again at once however often it dies."""
    return daemons("--keeper", *AT_ONCE)


def guest_of(client: Client) -> tuple[int, int]:
    """Make a guest that converts in place, whose first page says something; return VM and file."""
    vm = client.vms.create("sw-protected")
    file = client.files.create(vm, 16 * PAGE, flags=MMAP)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=16 * PAGE, file=file)
    client.files.convert(file, 0, 4 * PAGE, private=False)
    client.files.write_shared(file, 0, b"what was acknowledged")
    return vm, file


def served_by_another(client: Client, than: int) -> host_pb2.GetHostResponse:
    """Return what a process that was started after ``than`` says of the host."""
    host = client.host.get()
    while host.daemon_pid == than:
        host = client.host.get()
    return host


def ended(pid: int) -> Callable[[], bool]:
    """Return what waits for a process to end that is no child of ours."""
    pidfd = os.pidfd_open(pid)

    def wait() -> bool:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        over = bool(poll.poll(PATIENCE_SECONDS * 1e3))
        os.close(pidfd)
        return over

    return wait


# --- deaths --------------------------------------------------------------------------------------
def test_a_killed_daemon_is_back_with_all_it_had(kept: Daemon) -> None:
    client = kept.client()
    vm, file = guest_of(client)
    before = client.host.get()
    assert before.kept_by == "keeper"
    assert before.keeper_pid == kept.process.pid
    for _ in range(3):
        killed = kept.kill_served()
        # a call that finds nobody waits, and is sent again
        after = served_by_another(client, killed)
        assert client.files.read_shared(file, 0, 21) == b"what was acknowledged"
        assert [one.vm for one in client.vms.list().vms] == [vm]
        assert (after.life, after.seed) == (before.life, before.seed)
        assert after.revision >= before.revision
    assert after.starts_in_a_row == 4
    kept.stop()
    assert [line["event"] for line in kept.log_lines][-2:] == ["draining", "stopped"]


def test_a_lost_keeper_is_replaced_under_a_running_daemon(daemons: MakeDaemon) -> None:
    daemon = daemons("--keeper", *AT_ONCE)
    client = daemon.client()
    _, file = guest_of(client)
    pid = daemon.pid
    daemon.process.kill()
    daemon.process.wait(PATIENCE_SECONDS)
    host = client.host.get()
    while host.keeper_pid == daemon.process.pid:
        host = client.host.get()
    assert host.daemon_pid == pid, "the daemon has not noticed anything but that"
    os.kill(pid, signal.SIGKILL)
    again = served_by_another(client, pid)
    assert again.keeper_pid == host.keeper_pid
    assert client.files.read_shared(file, 0, 21) == b"what was acknowledged"
    over = ended(host.keeper_pid)
    os.kill(host.keeper_pid, signal.SIGTERM)
    assert over()
    assert not daemon.socket.exists()


def test_the_directory_stays_locked_while_nobody_serves_it(kept: Daemon) -> None:
    """Between a death and the restart nobody else comes in."""
    client = kept.client()
    client.host.get()
    # a keeper that has stopped starts nothing, and still has the lock
    kept.process.send_signal(signal.SIGSTOP)
    killed = kept.kill_served()
    other = Daemon(kept.directory, "--host-memory", "64M")
    ready = other.spawn()
    assert other.wait() == 75
    assert read_line(ready) == ""
    os.close(ready)
    kept.process.send_signal(signal.SIGCONT)
    served_by_another(client, killed)


def _events(daemon: Daemon, name: str) -> list[dict[str, object]]:
    whole = daemon.log.rpartition("\n")[0].splitlines()
    return [line for line in map(_decoded, whole) if line["event"] == name]


def _decoded(line: str) -> dict[str, object]:
    decoded: dict[str, object] = json.loads(line)
    return decoded


def test_what_is_connecting_to_the_session_socket_is_not_turned_away(
    kept: Daemon, clients: Clients
) -> None:
    inode = (kept.socket_dir / "session.sock").stat().st_ino
    client = kept.client()
    client.host.get()
    killed = kept.kill_served()
    one = clients().open(kept.socket_dir)
    assert one.session
    assert (kept.socket_dir / "session.sock").stat().st_ino == inode
    served_by_another(client, killed)
    one.kill()


# --- safe mode -----------------------------------------------------------------------------------
def test_a_crash_loop_ends_in_safe_mode_and_an_upgrade_leaves_it(daemons: MakeDaemon) -> None:
    daemon = daemons("--keeper", *LOOPS_AT_4)
    client = daemon.client()
    vm, file = guest_of(client)
    for _ in range(3):
        host = served_by_another(client, daemon.kill_served())
    assert host.read_only == "safe mode after 4 starts in a row"
    assert [one.vm for one in client.vms.list().vms] == [vm]
    assert client.host.check().violations == []
    for change in (
        lambda: client.vms.create("null"),
        lambda: client.vms.destroy(vm),
        lambda: client.files.write_shared(file, 0, b"x"),
        lambda: client.sessions.open(),
    ):
        with pytest.raises(Unavailable) as refused:
            change()
        assert refused.value.reason == "SAFE_MODE"
        assert "rmemctl host upgrade" in refused.value.remedy
    stub = health_pb2_grpc.HealthStub(daemon.rpc().channel)
    assert stub.Check(health_pb2.HealthCheckRequest()).status == (
        health_pb2.HealthCheckResponse.NOT_SERVING
    )
    shown = run_cli(daemon, "host", "show").stdout
    assert "safe mode after 4 starts in a row" in shown
    done = run_cli(daemon, "host", "upgrade")
    assert done.returncode == 0, done.stderr
    host = client.host.get()
    assert (host.read_only, host.starts_in_a_row) == ("", 1)
    assert client.files.read_shared(file, 0, 21) == b"what was acknowledged"
    client.vms.destroy(vm)


# --- ends ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_keeper_drains(daemons: MakeDaemon, number: signal.Signals) -> None:
    daemon = daemons("--keeper")
    pid = daemon.pid
    over = ended(pid)
    daemon.signal(number)
    assert daemon.wait() == 0
    assert over()
    assert sorted(one.name for one in daemon.socket_dir.iterdir()) == ["rmemd.lock"]
    assert [line["event"] for line in daemon.log_lines][-2:] == ["draining", "stopped"]


def test_the_same_signal_to_both_ends_it_in_order(daemons: MakeDaemon) -> None:
    """As Ctrl-C does, which goes to all of the terminal's foreground."""
    daemon = daemons("--keeper")
    for pid in (daemon.pid, daemon.process.pid):
        os.kill(pid, signal.SIGINT)
    assert daemon.wait() == 0
    assert [line["event"] for line in daemon.log_lines][-2:] == ["draining", "stopped"]


def test_a_signal_to_the_daemon_itself_ends_both(daemons: MakeDaemon) -> None:
    daemon = daemons("--keeper")
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait() == 0


def test_readiness_is_told_once(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, "--keeper", "--host-memory", "64M", *AT_ONCE)
    ready = daemon.spawn()
    assert read_line(ready) == f"{daemon.socket}\n"
    assert read_line(ready) == "", "neither keeper nor daemon have it open"
    os.close(ready)
    client = daemon.client()
    client.host.get()
    served_by_another(client, daemon.kill_served())
    daemon.stop()


def test_a_failure_to_start_is_told_by_the_exit_status(tmp_path: Path) -> None:
    """One that the daemon itself finds out, once there is a keeper."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"metrics.listen=127.0.0.1:{taken.getsockname()[1]}"
        daemon = Daemon(tmp_path, "--keeper", "--host-memory", "64M", "--set", listen)
        os.close(daemon.spawn())
        assert daemon.wait() == 73, daemon.log
    assert "Address already in use" in daemon.log
    assert not (daemon.socket_dir / "keeper.sock").exists()


def test_the_keeper_stays_small(daemons: MakeDaemon) -> None:
    daemon = daemons("--keeper", *AT_ONCE, *DEBUGGABLE)
    client = daemon.client()
    client.host.get()
    # once it has started a daemon by itself it is what it stays
    served_by_another(client, daemon.kill_served())
    mapped = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    for heavy in ("numpy", "grpc", "msgspec", "structlog", "site-packages"):
        assert heavy not in mapped
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident is not None
    assert int(resident[1]) < 20 << 10
    assert "Threads:\t1\n" in status


# --- a planned restart ---------------------------------------------------------------------------
def test_no_call_fails_over_upgrades(kept: Daemon) -> None:
    stop = threading.Event()
    made: list[int] = []
    failed: list[BaseException] = []

    def work() -> None:
        client = kept.client()
        try:
            while not stop.is_set():
                made.append(client.vms.create("null"))
                client.vms.list()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    client = kept.client()
    pids = [client.host.get().daemon_pid]
    for _ in range(3):
        done = client.host.upgrade()
        assert done.before.daemon_pid == pids[-1]
        pids.append(done.after.daemon_pid)
        assert done.after.starts_in_a_row == 1
        count = len(made)
        assert eventually(lambda count=count: len(made) > count or failed)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not failed
    assert len(set(pids)) == 4
    assert len(set(made)) == len(made)
    assert sorted(one.vm for one in client.vms.list().vms) == sorted(made), "none twice, none lost"
    assert _events(kept, "daemon_died") == []


def test_a_running_vcpu_and_a_watch_go_on_over_an_upgrade(kept: Daemon) -> None:
    client = kept.client()
    vm, _ = guest_of(client)
    client.vcpus.create(vm, 0)
    client.vcpus.set_programme(vm, 0, [vcpus.touch(0, PAGE), vcpus.loop(0, (1 << 63) - 1)])
    with ThreadPoolExecutor() as pool, client.watch(kinds=["mapped", "vm_created"]) as watch:
        watch.start()
        events = (item for item in watch if isinstance(item, Event))
        running = pool.submit(client.vcpus.run, vm, 0)
        assert next(events).kind == "mapped"
        next_event = pool.submit(next, events)
        client.host.upgrade()
        # as by a signal: the VMM runs it again
        assert running.result(PATIENCE_SECONDS).exit_reason == vcpu_pb2.EXIT_REASON_INTR
        made = kept.client().vms.create("null")
        assert next_event.result(PATIENCE_SECONDS).vm == made


def test_without_a_keeper_there_is_no_upgrade(daemon: Daemon) -> None:
    with pytest.raises(Refused) as refused:
        daemon.client().host.upgrade()
    assert refused.value.reason == "NO_KEEPER"
    shown = run_cli(daemon, "host", "show").stdout
    assert re.search(r"kept by +nobody", shown)


# --- the service manager as the keeper -----------------------------------------------------------
@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    made = ServiceManager(tmp_path)
    yield made
    made.close()


def test_the_service_manager_keeps_it(manager: ServiceManager, tmp_path: Path) -> None:
    command = [
        str(BIN / "rmemd"), "serve", "--config", os.devnull, "--host-memory", "64M",
        "--socket-dir", str(tmp_path / "socket"),
    ]  # fmt: skip
    with (tmp_path / "log").open("ab") as log:
        how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        manager.start(command, os.environ, **how)
        manager.hear_until("READY")
        assert manager.process is not None
        with ThreadPoolExecutor() as pool, Client(tmp_path / "socket") as client:
            host = client.host.get()
            assert (host.kept_by, host.daemon_pid) == ("service manager", manager.process.pid)
            _, file = guest_of(client)
            for _ in range(2):
                manager.process.kill()
                manager.process.wait(PATIENCE_SECONDS)
                manager.hear_all()
                manager.start(command, os.environ, **how)
                manager.hear_until("READY")
                assert client.files.read_shared(file, 0, 21) == b"what was acknowledged"
                assert client.host.get().life == host.life
            # a planned restart ends with the status by which the unit has it started again
            upgraded = pool.submit(client.host.upgrade)
            assert manager.process.wait(PATIENCE_SECONDS) == 133
            manager.hear_all()
            manager.start(command, os.environ, **how)
            manager.hear_until("READY")
            assert upgraded.result(PATIENCE_SECONDS).after.daemon_pid == manager.process.pid
            assert client.files.read_shared(file, 0, 21) == b"what was acknowledged"
        manager.process.terminate()
        manager.hear_until("STOPPING")
        assert manager.process.wait(PATIENCE_SECONDS) == 0
        manager.hear_all()
    assert not manager.store, "an end that is meant to be one lets all memory go"


def test_a_manager_without_a_store_is_told_by_the_keeper(
    manager: ServiceManager, tmp_path: Path
) -> None:
    daemon = Daemon(
        tmp_path / "d", "--keeper", "--host-memory", "64M", env={"NOTIFY_SOCKET": manager.address}
    )
    ready = daemon.spawn()
    manager.main_pid = daemon.process.pid
    assert manager.hear() == {"READY": "1"}
    os.close(ready)
    daemon.stop()
    assert manager.hear() == {"STOPPING": "1"}
    assert not manager.store


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_the_unit_is_one_that_systemd_reads(tmp_path: Path) -> None:
    unit = subprocess.run([BIN / "rmemd", "unit"], capture_output=True, text=True, check=True)
    assert f"ExecStart={BIN / 'rmemd'} serve" in unit.stdout
    path = tmp_path / "rmemd.service"
    path.write_text(unit.stdout)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    # what an older systemd does not know yet it says, and ignores
    said = [
        line
        for line in done.stderr.splitlines()
        if "rmemd.service" in line and "FileDescriptorStorePreserve" not in line
    ]
    assert (done.returncode, said) == (0, [])


def test_the_unit_does_not_walk_into_systemds_traps() -> None:
    unit = subprocess.run([BIN / "rmemd", "unit"], capture_output=True, text=True, check=True)
    sections = dict(re.findall(r"^\[(\w+)\]\n(.*?)(?=^\[|\Z)", unit.stdout, re.S | re.M))
    assert "StartLimitIntervalSec=0\n" in sections["Unit"], "in [Service] it would be ignored"
    assert "RestartPreventExitStatus" not in unit.stdout
    for line in (
        "Restart=always", "RestartForceExitStatus=133", "FileDescriptorStorePreserve=yes",
        "RuntimeDirectoryPreserve=restart", "NotifyAccess=main", "Type=notify",
    ):  # fmt: skip
        assert f"\n{line}\n" in "\n" + sections["Service"], line
    (kept,) = re.findall(r"FileDescriptorStoreMax=(\d+)", unit.stdout)
    assert f"Environment=FDSTORE={kept}\n" in unit.stdout
