"""A daemon and its configuration: file, SIGHUP, exit codes, and what the process gives up."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import BIN, PATIENCE_SECONDS, Daemon, eventually, read_line

from rmem_client import Client, RmemError

PAGE = 4096
EX_USAGE, EX_CANTCREAT, EX_CONFIG = 2, 73, 78


def rmemd(*args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "rmemd", *args], capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        check=False, env={**os.environ, **(env or {})},
    )  # fmt: skip


class Configured:
    """A daemon with a file, and a manager that is told when a reload is over."""

    def __init__(self, directory: Path, manager: socket.socket) -> None:
        self.file = directory / "rmemd.toml"
        self._manager = manager
        self._directory = directory

    def start(self, text: str, *options: str) -> Daemon:
        self.file.write_text(text)
        name = str(self._manager.getsockname())
        self.daemon = Daemon(
            self._directory / "daemon", "--config", str(self.file), *options,
            env={"NOTIFY_SOCKET": name},
        ).start()  # fmt: skip
        assert self._manager.recv(100) == b"READY=1"
        return self.daemon

    def reload(self, text: str) -> dict[str, Any]:
        """Change the file, send SIGHUP, and return what the log says of it."""
        self.file.write_text(text)
        before = len(self.daemon.log_lines)
        self.daemon.process.send_signal(signal.SIGHUP)
        assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", self._manager.recv(100))
        assert self._manager.recv(100) == b"READY=1"
        events = ("reloaded", "reload_refused", "config_invalid")
        (line,) = [line for line in self.daemon.log_lines[before:] if line["event"] in events]
        return line


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Configured]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE_SECONDS)
        manager.bind(str(tmp_path / "notify"))
        made = Configured(tmp_path, manager)
        yield made
        made.daemon.stop()


BASE = '[daemon]\nhost_memory = "64M"\nnodes = 2\n'


# --- the file -------------------------------------------------------------------------------------
def test_the_file_is_used_and_options_override_it(configured: Configured) -> None:
    daemon = configured.start(BASE + "seed = 5\n", "--seed", "6")
    host = daemon.client().host.get()
    assert host.nframes * PAGE == 64 << 20
    assert len(host.nodes) == 2
    assert host.seed == 6


def test_what_is_wrong_with_a_file_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rmemd.toml"
    file.write_text('[daemon]\nnoods = 2\nnodes = "x"\n')
    daemon = Daemon(tmp_path, "--config", str(file))
    ready = daemon.spawn()
    assert daemon.wait() == EX_CONFIG
    assert read_line(ready) == ""
    os.close(ready)
    assert "did you mean daemon.nodes?" in daemon.log
    assert "legal: a whole number from 1 to 64" in daemon.log
    assert not daemon.socket_dir.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root's is in /etc, which is not the test's")
def test_it_is_found_where_xdg_says(tmp_path: Path) -> None:
    (tmp_path / "rmemd").mkdir()
    (tmp_path / "rmemd" / "rmemd.toml").write_text("[daemon]\nnodes = 3\n")
    done = rmemd("config", "dump", env={"XDG_CONFIG_HOME": str(tmp_path)})
    assert "nodes = 3  # " in done.stdout


def test_the_config_commands(tmp_path: Path) -> None:
    file = tmp_path / "rmemd.toml"
    file.write_text(BASE)
    checked = rmemd("config", "check", "--config", file)
    assert (checked.returncode, checked.stdout) == (0, f"{file}: valid\n")
    dumped = rmemd("config", "dump", "--config", file, "--set", "daemon.seed=7")
    assert f'host_memory = "64M"  # {file}\n' in dumped.stdout
    assert "seed = 7  # --set\n" in dumped.stdout
    again = tmp_path / "again.toml"
    again.write_text(dumped.stdout)
    assert rmemd("config", "check", "--config", again).returncode == 0
    assert '"x-reloadable": true' in rmemd("config", "schema").stdout
    file.write_text("[demon]\n")
    wrong = rmemd("config", "check", "--config", file)
    assert wrong.returncode == EX_CONFIG
    assert "did you mean daemon?" in wrong.stderr
    assert rmemd("config", "check", "--set", "daemon.nodes=0").returncode == EX_USAGE


def test_an_address_in_use_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        daemon = Daemon(tmp_path, "--host-memory", "64M", "--set", f"metrics.listen={address}")
        os.close(daemon.spawn())
        assert daemon.wait() == EX_CANTCREAT
    assert "rmemd: [Errno 98]" in daemon.log


# --- SIGHUP ---------------------------------------------------------------------------------------
def calls_logged(daemon: Daemon) -> int:
    """Make a call; return how many the log has, which it has at debug level only."""
    assert daemon.rpc().call("GetHost").ok
    return sum(line["event"] == "call" for line in daemon.log_lines)


def allocate(client: Client, npages: int) -> None:
    vm = client.vms.create("null")
    file = client.files.create(vm, npages * PAGE)
    client.files.allocate(file, 0, npages * PAGE)


def test_what_may_change_is_applied(configured: Configured) -> None:
    daemon = configured.start(BASE)
    client = daemon.client()
    assert calls_logged(daemon) == 0
    allocate(client, 8)
    tenant = f'limits.tenants."uid:{os.getuid()}".frames'
    told = configured.reload(
        BASE + 'hook_deadline_seconds = 1.5\nlog_level = "debug"\n'
        f"[limits.tenants.\"uid:{os.getuid()}\"]\nframes = 10\n[access]\nadmins = ['uid:7']\n"
    )
    assert told["event"] == "reloaded"
    assert told["changed"].keys() >= {
        "daemon.hook_deadline_seconds", "daemon.log_level", "access.admins", tenant,
    }  # fmt: skip
    assert told["changed"]["daemon.log_level"] == "info -> debug"
    assert calls_logged(daemon) == 1
    with pytest.raises(RmemError, match="frames"):
        allocate(client, 8)
    # and back, by leaving it out
    assert configured.reload(BASE)["changed"][tenant] == "10 -> none"
    allocate(client, 8)
    logged = calls_logged(daemon)
    assert calls_logged(daemon) == logged


def test_what_may_not_change_keeps_all_from_changing(configured: Configured) -> None:
    daemon = configured.start(BASE)
    told = configured.reload(BASE.replace("nodes = 2", "nodes = 1") + 'log_level = "debug"\n')
    assert told["event"] == "reload_refused"
    assert told["needs_restart"] == {"daemon.nodes": "2 -> 1"}
    assert told["not_applied"] == ["daemon.log_level"]
    assert calls_logged(daemon) == 0
    # once the rest is as it was, the change that may be made is made
    assert configured.reload(BASE + 'log_level = "debug"\n')["event"] == "reloaded"
    assert calls_logged(daemon) == 1


@pytest.mark.parametrize("text", ["[daemon\n", BASE + 'log_level = "debug"\nseed = "x"\n'])
def test_an_invalid_file_changes_nothing(configured: Configured, text: str) -> None:
    daemon = configured.start(BASE)
    told = configured.reload(text)
    assert told["event"] == "config_invalid"
    assert len(told["problems"]) == 1
    assert str(configured.file) in told["problems"][0]
    assert calls_logged(daemon) == 0


def test_an_option_goes_on_overriding(configured: Configured) -> None:
    daemon = configured.start(BASE, "--log-level", "info")
    told = configured.reload(BASE + 'log_level = "debug"\nhook_deadline_seconds = 3\n')
    assert told["changed"] == {"daemon.hook_deadline_seconds": "2.0 -> 3.0"}
    assert calls_logged(daemon) == 0


def test_checks_of_itself_begin_and_end_by_a_reload(configured: Configured) -> None:
    text = BASE + '[metrics]\nlisten = "127.0.0.1:0"\n'
    often = text.replace("nodes = 2\n", "nodes = 2\ncheck_every_seconds = 0.01\n")
    daemon = configured.start(text)
    (address,) = [line["address"] for line in daemon.log_lines if line["event"] == "metrics_served"]

    def checks() -> float:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
            return float(re.search(rb"^rmemd_checks_total (.*)$", page.read(), re.MULTILINE)[1])

    assert checks() == 0
    assert configured.reload(often)["event"] == "reloaded"
    assert eventually(lambda: checks() > 2)
    assert configured.reload(text)["event"] == "reloaded"
    # one may have been under way; none comes after it
    client = daemon.client()
    settled = [checks() for _ in range(2) if client.host.check()]
    assert settled[1] - settled[0] == 1


def test_it_ends_however_many_reloads_are_asked_for(daemons: Callable[..., Daemon]) -> None:
    daemon = daemons()
    for _ in range(200):
        daemon.process.send_signal(signal.SIGHUP)
    assert daemon.rpc().call("GetHost").ok
    daemon.stop()


# --- what the process gives up --------------------------------------------------------------------
def test_it_takes_no_new_privileges_and_leaves_no_core(daemon: Daemon) -> None:
    process = Path(f"/proc/{daemon.process.pid}")
    assert "NoNewPrivs:\t1\n" in (process / "status").read_text()
    assert re.search(r"^Max core file size +0 +0 ", (process / "limits").read_text(), re.MULTILINE)
    (told,) = [line for line in daemon.log_lines if line["event"] == "hardened"]
    assert (told["no_new_privs"], told["undumpable"], told["no_core"]) == (True, True, True)


DUMPABLE = """
import ctypes, os, resource
from rmemd.daemon.hardening import harden
harden({debuggable})
libc = ctypes.CDLL(None)
print(libc.prctl(39, 0, 0, 0, 0), libc.prctl(3, 0, 0, 0, 0),
      resource.getrlimit(resource.RLIMIT_CORE) == (0, 0))
# what the daemon reads of itself can still be read
print(int(open("/proc/self/statm").read().split()[1]) > 0, len(os.listdir("/proc/self/fd")) > 2)
"""


@pytest.mark.parametrize(
    ("debuggable", "says"), [(False, "1 0 True"), (True, "1 1 ")], ids=["hardened", "debuggable"]
)
def test_it_is_undumpable_unless_told(debuggable: bool, says: str) -> None:
    code = DUMPABLE.format(debuggable=debuggable)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    *_, process, itself = done.stdout.splitlines()
    assert process.startswith(says)
    assert itself == "True True"
