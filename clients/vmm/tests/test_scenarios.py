"""The scenarios, by the command, on a daemon; and device processes that are killed or misled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rmem_client import Client, Event, vcpus
from rmem_client.constants import PAGE_BYTES
from rmem_vmm.channel import ChildFailed
from rmem_vmm.daemon import DaemonProcess
from rmem_vmm.driver import request
from rmem_vmm.guestvm import HIGH_GPA, GrantSpec, Guest
from rmem_vmm.host import Host
from rmem_vmm.machine import Range
from rmem_vmm.ring import Buffer
from rmem_vmm.scenarios import devices
from rmem_vmm.scenarios.catalogue import SCENARIOS
from rmem_vmm.scenarios.report import Report
from rmem_vmm.units import SIZE

BOUNCE_BYTES = os.environ.get("RMEMD_BOUNCE_BYTES", "64M")
POOL = Range(HIGH_GPA, 256 * PAGE_BYTES)


def run(daemon: DaemonProcess, *options: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [
            sys.executable, "-m", "rmem_vmm.cli", "scenario", "-o", "json",
            "--socket-dir", str(daemon.socket_dir), *options,
        ],
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def wrong_steps(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (guest["who"], step)
        for guest in report.get("guests", [])
        for step in guest["steps"]
        if not step["ok"]
    ]


@pytest.fixture
def baseline(client: Client) -> Iterator[None]:
    """Nothing is left behind: no frame, VM, file, pin or session."""

    def left() -> tuple[int, ...]:
        host = client.host.get()
        return (host.free_pages, host.vms, host.files, len(client.files.pins().pins),
                len(client.sessions.list().sessions))  # fmt: skip

    before = left()
    with client.watch(kinds=["session_closed"]) as closed:
        next(iter(closed))
        yield
        # a session goes after its process has: that is an event
        while left() != before:
            next(iter(closed))


@pytest.mark.usefixtures("baseline")
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "bounce-1g"])
def test_scenario_holds_for_every_vendor(daemon: DaemonProcess, name: str) -> None:
    code, report, error = run(daemon, name)
    assert not wrong_steps(report)
    assert code == 0, error
    assert [guest["who"] for guest in report["guests"]] == list(SCENARIOS[name].consumers.values())
    assert report["mock"] is True
    assert all(guest["steps"] and guest["figures"] for guest in report["guests"])


@pytest.mark.usefixtures("baseline")
@pytest.mark.timeout(300)
def test_two_guests_bounce_while_one_is_migrated_and_the_other_punched(
    daemon: DaemonProcess,
) -> None:
    """Must show: every byte is compared by the device and again by the guest.

    RMEMD_BOUNCE_BYTES=1G is the full size; ``rmem-vmm scenario bounce-1g`` is the command.
    """
    code, report, error = run(daemon, "bounce-1g", "--bytes", BOUNCE_BYTES)
    assert not wrong_steps(report)
    assert code == 0, error
    migrated, punched = (guest["figures"] for guest in report["guests"])
    half = SIZE.convert(BOUNCE_BYTES, None, None) // 2
    for guest, figures in zip(report["guests"], (migrated, punched), strict=True):
        said = {step["what"]: step["said"] for step in guest["steps"]}
        assert figures["MiB to the device, and back"] == half >> 20
        assert int(said["pages that the device compared"]) == half // PAGE_BYTES
        assert said["answers that the guest compared"] == f"{half // PAGE_BYTES}, 0 wrong"
    assert migrated["migrations asked"] == migrated["rounds"]
    assert punched["punches"] == punched["rounds"] > 1


def test_an_unknown_vendor_is_said(daemon: DaemonProcess) -> None:
    code, _, error = run(daemon, "balloon", "--vendor", "sev")
    assert code == 1
    assert "the daemon has no consumer 'sev'" in error


def test_a_wrong_step_is_an_exit_status() -> None:
    report = Report("somebody")
    assert not report.ok
    report.expect("pages", 1, 1)
    assert report.ok
    report.expect("pages", 1, 2)
    assert not report.ok
    assert report.as_dict()["steps"][1]["wanted"] == "2"


@pytest.fixture
def host(daemon: DaemonProcess) -> Iterator[Host]:
    with Host(daemon.socket_dir) as made:
        yield made


@pytest.fixture
def guest(host: Host) -> Guest:
    """A guest with a pool that it has shared, and a device on it."""
    made = host.create("tdx-today", memory_bytes=1 << 20)
    host.plug(made, 5, POOL.gpa, POOL.size_bytes)
    host.launch(made)
    cpu = host.start_cpu(made)
    host.run(cpu, [vcpus.share(POOL.gpa, POOL.size_bytes), vcpus.halt()])
    host.start_device(made, "checker", POOL.gpa, [GrantSpec(POOL, mapped=True)])
    return made


def bad_request(address: int, size: int) -> dict[str, Any]:
    header = POOL.gpa + 16 * PAGE_BYTES
    buffers = [Buffer(header, 32), Buffer(address, size), Buffer(header + 64, 8, writable=True)]
    return request(POOL.gpa, buffers, stores=[(header, bytes(32))])


@pytest.mark.parametrize(
    ("address", "size"), [(0, 4096), (POOL.gpa + POOL.size_bytes - 1, 2), ((1 << 64) - 1, 4096)]
)
def test_a_hostile_driver_is_refused_and_the_device_lives(
    host: Host, guest: Guest, address: int, size: int
) -> None:
    device = guest.devices[0].child
    for _ in range(3):
        done = host.do(guest.cpus[0], bad_request(address, size))
        assert done["written"] == 0
        host.wait(device, "refused")
    device.tell({"do": "figures"})
    assert host.wait(device, "figures")["refused"] == 3
    assert not host.client.files.pins(guest.slots[5].file).pins


def test_a_broken_ring_stops_the_device_not_its_process(host: Host, guest: Guest) -> None:
    """The index jumps by more than the queue has: the device asks to be reset."""
    cpu, device = guest.cpus[0], guest.devices[0].child
    available = POOL.gpa + 256 * 16
    jump = request(POOL.gpa, [Buffer(POOL.gpa, 1)], wait=False)
    host.do(cpu, jump)
    host.wait(device, "refused")
    host.run(cpu, [
        vcpus.write(available, 4, byte=0x7F), vcpus.signal(1 << 16), vcpus.halt(),
    ])  # fmt: skip
    assert "ahead" in host.wait(device, "needs_reset")["text"]
    device.tell({"do": "figures"})
    host.wait(device, "figures")


def test_a_killed_device_lets_go_of_its_pins(daemon: DaemonProcess, client: Client) -> None:
    """Its end is the daemon's event; the VMM goes on, and the range can be taken back."""
    with Host(daemon.socket_dir) as host, client.watch(kinds=["session_closed"]) as closed:
        events = (item.fields["session"] for item in closed if isinstance(item, Event))
        guest = host.create("tdx-today", memory_bytes=devices.RAM_BYTES)
        host.launch(guest)
        cpu = host.start_cpu(guest)
        host.run(cpu, [
            vcpus.share(devices.QUEUE.gpa, devices.QUEUE.size_bytes),
            vcpus.share(devices.RECEIVE.gpa, devices.RECEIVE.size_bytes), vcpus.halt(),
        ])  # fmt: skip
        grants = [GrantSpec(devices.QUEUE), GrantSpec(devices.RECEIVE)]
        device = host.start_device(guest, "checker", devices.QUEUE.gpa, grants)
        devices.post(host, guest, device, Report("tdx-today"))
        unshare = [
            vcpus.unshare(devices.RECEIVE.gpa, devices.RECEIVE.size_bytes), vcpus.halt()
        ]  # fmt: skip
        assert host.run(cpu, unshare).call_status == -devices.EAGAIN
        host.kill(device.child)
        assert next(events) == str(device.child.session)
        assert not host.client.files.pins(guest.machine.file).pins
        assert host.run(cpu, unshare).call_status == 0


def test_a_dead_child_is_named(host: Host, guest: Guest) -> None:
    guest.cpus[0].process.kill()
    with pytest.raises(ChildFailed, match=r"vCPU 0 of tdx-today vm/\d+ ended with status -9"):
        host.run(guest.cpus[0], [vcpus.halt()])


def test_children_have_no_environment_and_one_descriptor(host: Host, guest: Guest) -> None:
    """A device is given what it may know by messages; what it is started with tells nothing."""
    proc = Path(f"/proc/{guest.devices[0].child.process.pid}")
    assert proc.joinpath("environ").read_bytes() in (b"", b"LC_CTYPE=C.UTF-8\0")
    command = proc.joinpath("cmdline").read_bytes().split(b"\0")
    assert command[1:3] == [b"-m", b"rmem_vmm.device"]
    assert command[3].isdigit()
