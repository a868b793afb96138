"""Plugins that are broken, one way each: named, contained, and nothing lost for the others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemons import Answer, Daemon, Rpc, run_cli
from plugin_packages import HEAD, SitePackages
from rpc_world import PAGE, World, whole_state

from rmem.v1 import file_pb2, vcpu_pb2, vm_pb2
from rmem_client import Client, Event, RmemError, vcpus

MakeDaemon = Callable[..., Daemon]
SECRET = b"the guest's own secret bytes, 1234567890"

MISSPELT = """
@hookimpl
def migrate_folioo(self, tx, gfns, src, dst):
    pass
"""
WRONG_SIGNATURE = """
@hookimpl
def map(self, tx, pages):
    pass
"""
HALF_A_PAIR = """
@hookimpl
def pin(self, tx, runs):
    return Pin("mine")
"""
RAISES = """
@hookimpl
def map(self, tx, runs):
    return self.broken(runs)

def broken(self, runs):
    raise KeyError("a secret path: /etc/shadow")
"""
RAISES_ON_BYTES = """
@hookimpl
def populate(self, tx, runs, kinds, measure, source):
    first = bytes(source[0])
    raise ZeroDivisionError("no bytes here")
"""
EXITS = """
@hookimpl
def map(self, tx, runs):
    raise SystemExit("a secret path: /etc/shadow")
"""
NONSENSE = """
@hookimpl
def map(self, tx, runs):
    return "mapped"
"""
SLOW = """
@hookimpl
def map(self, tx, runs):
    threading.Event().wait(0.2)
"""


@pytest.fixture
def site(tmp_path: Path) -> SitePackages:
    """Where a test installs plugins."""
    return SitePackages(tmp_path / "site")


def listed(daemon: Daemon) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plugins and the consumers that ``rmemctl -o json consumers list`` names."""
    done = run_cli(daemon, "-o", "json", "consumers", "list")
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    plugins = {plugin["name"]: plugin for plugin in reply["plugins"]}
    return plugins, {consumer["name"]: consumer for consumer in reply["consumers"]}


def ops_of(consumer: dict[str, Any]) -> dict[str, bool]:
    """Return an ops table; false is NULL."""
    return {op["name"]: bool(op.get("implemented")) for op in consumer["ops"]}


def test_broken_plugins_are_quarantined_by_name(daemons: MakeDaemon, site: SitePackages) -> None:
    site.plugin("misspelt", MISSPELT)
    site.plugin("signature", WRONG_SIGNATURE)
    site.plugin("pair", HALF_A_PAIR)
    site.plugin("importless", source="import no_such_module_anywhere\n")
    site.plugin("exits", source="import sys\nsys.exit(3)\n")
    site.plugin("syntax", source="class Platform\n")
    site.plugin("factory", source="def Platform():\n    raise OSError('no licence')\n")
    site.plugin("thief", source=f"NAME = 'tdx-today'\n{HEAD}class Made(Guest):\n    pass\n")
    site.plugin("good")
    daemon = daemons(env=site.env)
    plugins, consumers = listed(daemon)
    for name, says in {
        "misspelt": "migrate_folioo",
        "signature": r"hook 'map'.*\(tx, pages\).*'pages'.* not be found in the hookspec",
        "pair": "pin and unpin go together, and unpin is missing",
        "importless": "No module named 'no_such_module_anywhere'",
        "exits": "SystemExit: 3",
        "syntax": "SyntaxError",
        "factory": "OSError: no licence",
    }.items():
        assert plugins[name].get("quarantined"), name
        assert re.search(says, plugins[name]["error"]), plugins[name]["error"]
        assert plugins[name]["distribution"] == f"rmemd-{name}"
        assert plugins[name]["version"] == "9.9"
        assert name not in consumers
    told = {line["plugin"] for line in daemon.log_lines if line["event"] == "plugin_quarantined"}
    assert told == {name for name, plugin in plugins.items() if plugin.get("quarantined")}
    # two plugins offer one name: the first by name has it, and the other is out
    assert "tdx-today is offered by another plugin" in plugins["thief"]["error"]
    assert not plugins["tdx"].get("quarantined")
    # the others work
    assert not plugins["good"].get("quarantined")
    for name in ("good", "snp-move", "pkvm-gmem", "sw-protected"):
        assert daemon.client().vms.create(name)


# --- a hook that fails ---------------------------------------------------------------------------
def vm_of(client: Client, consumer: str) -> tuple[int, int]:
    """Make a VM with a bound file of 16 pages; return both."""
    vm = client.vms.create(consumer)
    file = client.files.create(vm, 16 * PAGE)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=16 * PAGE, file=file)
    client.vcpus.create(vm, 0)
    return vm, file


def prefault(rpc: Rpc, vm: int) -> Answer:
    """Fault the first page in."""
    return rpc.call("PreFault", vm_pb2.PreFaultRequest(vm=vm, size_bytes=PAGE))


@pytest.mark.parametrize(
    ("hooks", "reason", "raises"),
    [
        (RAISES, "PLUGIN_RAISED", "KeyError"),
        (EXITS, "PLUGIN_RAISED", "SystemExit"),
        (NONSENSE, "PLUGIN_NONSENSE", ""),
    ],
    ids=["raises", "exits", "nonsense"],
)
def test_a_hook_that_fails_is_named(
    daemons: MakeDaemon, site: SitePackages, hooks: str, reason: str, raises: str
) -> None:
    site.plugin("broken", hooks)
    daemon = daemons(env=site.env)
    client, rpc = daemon.client(), daemon.rpc()
    vm, _ = vm_of(client, "broken")
    other, _ = vm_of(client, "null")
    before = whole_state(rpc)
    answer = prefault(rpc, vm)
    assert answer.code is grpc.StatusCode.INTERNAL
    assert (answer.reason, answer.refusal.errno_name) == (reason, "EIO")
    assert answer.refusal.where == answer.info.metadata["where"] == f"broken(vm/{vm}).map"
    for leak in ("Traceback", "shadow", "rmemd_broken", ".py"):
        assert leak not in str(answer.status)
    assert whole_state(rpc) == before
    assert prefault(rpc, other).reply.done_pages == 1
    correlation = answer.info.metadata["correlation_id"]
    if raises:
        # the traceback is in the log, under the correlation id
        (line,) = [one for one in daemon.log_lines if one["event"] == "hook_raised"]
        assert line["correlation"] == correlation
        assert line["hook"] == f"broken(vm/{vm}).map"
        (raised,) = line["exception"]
        assert raised["exc_type"] == raises
        assert raised["frames"][-1]["filename"].endswith("rmemd_broken/__init__.py")
    (line,) = [one for one in daemon.log_lines if one["event"] == "refused"]
    assert line["correlation"] == correlation


@pytest.mark.parametrize("how", ["--log-json", "--log-console"])
def test_a_traceback_in_the_log_has_no_guest_bytes(
    daemons: MakeDaemon, site: SitePackages, how: str
) -> None:
    """The frames of a traceback have the bytes that the hook was given, in their variables."""
    site.plugin("broken", RAISES_ON_BYTES)
    daemon = daemons("--log-level", "debug", how, env=site.env)
    client = daemon.client()
    vm, _ = vm_of(client, "broken")
    page = (SECRET * 128)[:PAGE]
    with pytest.raises(RmemError) as caught:
        client.vms.populate(vm, 0, page)
    assert caught.value.reason == "PLUGIN_RAISED"
    daemon.stop()
    assert "ZeroDivisionError" in daemon.log
    for told in (SECRET.decode()[:16], SECRET[:8].hex(), ", ".join(map(str, SECRET[:4])),
                 " ".join(map(str, SECRET[:3]))):  # fmt: skip
        assert told not in daemon.log


def test_an_overdue_hook_freezes_its_vm_and_no_other(
    daemons: MakeDaemon, site: SitePackages
) -> None:
    site.plugin("slow", SLOW)
    daemon = daemons("--hook-deadline", "0.05", env=site.env)
    client, rpc = daemon.client(), daemon.rpc()
    vm, file = vm_of(client, "slow")
    other, _ = vm_of(client, "null")
    with client.watch(kinds=["vm_frozen"]) as watch:
        watch.start()
        prefault(rpc, vm)
        event = next(item for item in watch if isinstance(item, Event))
    assert event.vm == vm
    assert re.fullmatch(rf"slow\(vm/{vm}\)\.map took 0\.\d s", event.fields["reason"])
    for answer in (
        prefault(rpc, vm),
        rpc.call("RunVcpu", vcpu_pb2.RunVcpuRequest(vm=vm)),
        rpc.call("CreateVcpu", vcpu_pb2.CreateVcpuRequest(vm=vm, vcpu=1)),
    ):
        assert (answer.reason, answer.refusal.errno_name) == ("VM_FROZEN", "EIO"), answer.method
        assert answer.code is grpc.StatusCode.FAILED_PRECONDITION
    assert client.vms.get(vm).state == "frozen"
    assert prefault(rpc, other).reply.done_pages == 1
    client.vms.destroy(vm)
    client.files.close(file)


def test_a_hook_is_at_fault_in_a_running_guest(daemons: MakeDaemon, site: SitePackages) -> None:
    """The vCPU comes back, can be used again, and the guest next door runs on."""
    site.plugin("broken", RAISES)
    daemon = daemons(env=site.env)
    client = daemon.client()
    for consumer, good in (("broken", False), ("null", True)):
        vm, _ = vm_of(client, consumer)
        programme = [vcpus.write(0, PAGE, seed=1, private=True), vcpus.halt()]
        client.vcpus.set_programme(vm, 0, programme)
        for _ in range(2):
            if good:
                assert client.vcpus.run(vm, 0).exit_reason == vcpu_pb2.EXIT_REASON_HLT
                continue
            exited = client.vcpus.run(vm, 0)
            assert exited.exit_reason == vcpu_pb2.EXIT_REASON_INTERNAL_ERROR
            assert exited.refusal.reason == "PLUGIN_RAISED"
            assert exited.refusal.where == f"broken(vm/{vm}).map"
            assert "shadow" not in str(exited)


# --- the table is what the code declares ---------------------------------------------------------
def test_removing_a_hook_changes_the_table_with_no_other_edit(
    daemons: MakeDaemon, site: SitePackages
) -> None:
    _, before = listed(daemons())
    package = site.copy_in_tree("tdx")
    source = package / "consumer.py"
    text = source.read_text()
    edited, count = re.subn(
        r"    @hookimpl\n    def migrate_folio\(.*?(?=\n    @hookimpl|\nclass |\Z)",
        "    pass\n", text, flags=re.DOTALL,
    )  # fmt: skip
    assert count == 1
    source.write_text(edited)
    daemon = daemons(env=site.env)
    plugins, after = listed(daemon)
    assert plugins["tdx"]["version"] == "0.1.0+edited"
    assert ops_of(before["tdx-relocate"])["migrate_folio"] is True
    assert ops_of(after["tdx-relocate"])["migrate_folio"] is False
    changed = {
        (name, op)
        for name in before
        for op, there in ops_of(before[name]).items()
        if ops_of(after[name])[op] != there
    }
    assert changed == {("tdx-relocate", "migrate_folio")}
    # and the engine goes by the table: nobody asks, nothing changes
    world = World(daemon.rpc())
    state = whole_state(world.rpc)
    report = world.must("Migrate", world.valid("Migrate")).report
    assert (report.moved, report.unmovable) == (0, 1)
    assert report.runs[0].refusal.reason == "FOLIO_UNMOVABLE"
    assert whole_state(world.rpc) == state


def test_misspelling_a_hook_in_a_copy_fails_its_registration(
    daemons: MakeDaemon, site: SitePackages
) -> None:
    source = site.copy_in_tree("tdx") / "consumer.py"
    source.write_text(source.read_text().replace("def migrate_folio(", "def migrate_folioo("))
    daemon = daemons(env=site.env)
    plugins, consumers = listed(daemon)
    assert plugins["tdx"]["quarantined"]
    assert "migrate_folioo" in plugins["tdx"]["error"]
    assert not [name for name in consumers if name.startswith("tdx")]
    client = daemon.client()
    with pytest.raises(RmemError) as caught:
        client.vms.create("tdx-today")
    assert caught.value.reason == "NO_SUCH_CONSUMER"
    vm, file = vm_of(client, "snp-move")
    assert client.files.allocate(file, 0, PAGE) == 1
    assert client.vms.populate(vm, PAGE, b"x" * PAGE).done_pages == 1
    assert client.host.page(file=file, pgoff=0).vm == vm
    reply = daemon.rpc().call("GetFile", file_pb2.GetFileRequest(file=file)).reply
    assert reply.file.private_pages == 2
