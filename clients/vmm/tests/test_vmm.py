"""VMMs as processes, against a real daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from rmem.v1 import types_pb2
from rmem_client import Client, RmemError
from rmem_client.constants import PAGE_BYTES
from rmem_client.vcpus import Instruction
from rmem_vmm import fleet, guest, machine, pattern
from rmem_vmm.daemon import DaemonProcess
from rmem_vmm.machine import Range
from rmem_vmm.vcpu import Vcpu
from rmem_vmm.vmm import find_consumer

SMALL = ("--memory", "4M", "--work-pages", "64", "--moves", "2")


def names(client: Client) -> list[str]:
    return [consumer.name for consumer in client.consumers.list().consumers]


def test_a_vmm_of_each_consumer_checks_every_byte(
    daemon: DaemonProcess, client: Client, small: Path
) -> None:
    known = {c.name: {op.name: op.implemented for op in c.ops}
             for c in client.consumers.list().consumers}  # fmt: skip
    private = {c.name: c.private_memory for c in client.consumers.list().consumers}
    free = client.host.get().free_pages
    half = sorted(known)[::2], sorted(known)[1::2]
    for some in half:
        options = [*SMALL, "--vcpus", "1", "--firmware", str(small)]
        for run in fleet.run_at_once(daemon.socket_dir, some, options, lambda *_: None):
            figures = run.figures()
            may_move = known[run.consumer]["migrate_folio"] or not private[run.consumer]
            assert figures["mismatched_pages"] == 0
            assert figures["checked_pages"] >= 64
            assert figures["published_pages"] == 2 * guest.BUFFER_PAGES + 3
            assert figures["firmware_pages"] == 3
            assert figures["unmovable"] == (0 if may_move else 2 * 64)
            assert bool(figures["moved"]) == may_move
            assert figures["exits"]["IO"] >= 2
            assert bool(figures["measurement"]) == known[run.consumer]["finalize"]
    after = client.host.get()
    assert (after.free_pages, after.vms, after.files) == (free, 0, 0)


@contextmanager
def held_vmm(daemon: DaemonProcess, consumer: str, vcpus: int = 2) -> Iterator[Any]:
    """A VMM whose guest goes on checking until something is written to ``go``."""
    events, theirs = os.pipe()
    until, go = os.pipe()
    child = subprocess.Popen(
        [
            sys.executable, "-m", "rmem_vmm.vmm", "--consumer", consumer, *SMALL,
            "--vcpus", str(vcpus), "--socket-dir", str(daemon.socket_dir), "--quiet",
            "--json-fd", str(theirs), "--until-fd", str(until),
        ],
        pass_fds=[theirs, until], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(theirs)
    os.close(until)
    with child, os.fdopen(events) as stream, os.fdopen(go, "w") as let_go:
        try:
            yield child, stream, let_go
        finally:
            child.kill()


def wait_for(stream: IO[str], event: str) -> dict[str, Any]:
    for line in stream:
        said: dict[str, Any] = json.loads(line)
        if said["event"] == event:
            return said
    raise AssertionError(f"the VMM never said {event!r}")


@pytest.mark.parametrize("consumer", ["tdx-today", "snp-move"])
def test_corrupted_memory_fails_the_vmm_and_names_the_vcpu(
    daemon: DaemonProcess, client: Client, consumer: str
) -> None:
    with held_vmm(daemon, consumer) as (child, stream, let_go):
        vm = wait_for(stream, "moved")["vm"]
        part = (4 << 20) // 2 // PAGE_BYTES
        pfn = client.host.page(vm=vm, gfn=part + 5).pfn
        client.host.write_physical(pfn, b"\xbd" * PAGE_BYTES, level=types_pb2.ACCESS_LEVEL_BUS)
        let_go.write("go\n")
        let_go.flush()
        failed = wait_for(stream, "failed")
        _, error = child.communicate(timeout=30)
    assert child.returncode == 1
    assert f"{consumer} vm/{vm} vCPU 1" in error
    assert error.strip() == failed["text"]
    assert client.host.get().vms == 0


def test_a_killed_vcpu_process_fails_its_vmm(daemon: DaemonProcess, client: Client) -> None:
    with held_vmm(daemon, "pkvm-gmem", vcpus=1) as (child, stream, _):
        wait_for(stream, "moved")
        found = subprocess.run(
            ["pgrep", "-P", str(child.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(found.stdout), 9)
        _, error = child.communicate(timeout=30)
    assert child.returncode == 1
    assert "vCPU 0's process died with status -9" in error
    assert client.host.get().vms == 0


def is_running(client: Client, vm: int, programme: list[Instruction]) -> bool:
    try:
        client.vcpus.set_programme(vm, 0, programme)
    except RmemError as refusal:
        return refusal.reason == "VCPU_BUSY"
    return False


def test_a_vm_that_a_vcpu_is_leaving_is_waited_for(
    daemon: DaemonProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may have been killed a moment ago, and the daemon not have heard of it yet."""
    subject = machine.create(client, find_consumer(client, "gup"), memory_bytes=4 * PAGE_BYTES)
    endless = [guest.vcpus.write(0, PAGE_BYTES, seed=1), guest.vcpus.loop(0, guest.FOREVER)]
    client.vcpus.set_programme(subject.vm, 0, endless)
    runner = Client(daemon.socket_dir)
    refused = []
    destroy = client.vms.destroy

    def destroy_or_let_go(vm: int) -> int:
        try:
            return destroy(vm)
        except RmemError as refusal:
            refused.append(refusal.reason)
            runner.close()
            raise

    def run() -> None:
        with pytest.raises(RmemError):
            runner.vcpus.run(subject.vm, 0)

    with ThreadPoolExecutor() as pool:
        running = pool.submit(run)
        while not is_running(client, subject.vm, endless):
            assert not running.done()
        monkeypatch.setattr(client.vms, "destroy", destroy_or_let_go)
        machine.dispose(client, subject)
        running.result()
    assert set(refused) == {"VM_IN_USE"}
    assert client.host.get().vms == 0


def test_bad_settings_are_said_and_leave_nothing(daemon: DaemonProcess, client: Client) -> None:
    base = [sys.executable, "-m", "rmem_vmm.vmm", "--socket-dir", str(daemon.socket_dir)]
    for options, text in (
        (["--consumer", "tdx-tomorow"], "the daemon has no consumer 'tdx-tomorow'"),
        (["--consumer", "gup", "--memory", "64K", "--vcpus", "2"], "too little memory"),
        (["--consumer", "gup", "--memory", "8G"], "RAM of 8 GiB reaches the firmware"),
        (["--consumer", "gup", "--firmware", "/nonexistent"], "cannot read the firmware"),
    ):
        result = subprocess.run([*base, *options], capture_output=True, text=True)
        assert result.returncode == 1
        assert text in result.stderr
    host = client.host.get()
    assert (host.vms, host.files) == (0, 0)


def test_a_vm_that_is_refused_half_way_is_undone(client: Client) -> None:
    gup = find_consumer(client, "gup")
    with pytest.raises(RmemError, match="node"):
        machine.create(client, gup, memory_bytes=4 * PAGE_BYTES, node=63)
    with pytest.raises(RmemError, match="vCPU 1024"):
        machine.create(client, gup, memory_bytes=4 * PAGE_BYTES, vcpus=1025)
    host = client.host.get()
    assert (host.vms, host.files) == (0, 0)


def test_patterns_are_what_guests_write(client: Client) -> None:
    """The VMM's own idea of PATTERN_WORDS, against what a guest wrote to shared memory."""
    subject = machine.create(client, find_consumer(client, "gup"), memory_bytes=64 * PAGE_BYTES)
    where = Range(7 * PAGE_BYTES, 9 * PAGE_BYTES)
    vcpu = Vcpu(client, subject, 0)
    vcpu.run([*guest.fill(subject, where, seed=(1 << 63) + 11)])
    found = client.files.read_shared(subject.file, where.gpa, where.size_bytes)
    wanted = pattern.words((1 << 63) + 11, where.gpa, where.size_bytes)
    assert pattern.differing_pages(found, wanted) == 0
    other = pattern.words((1 << 63) + 12, where.gpa, where.size_bytes)
    assert pattern.differing_pages(found, other) == where.npages
    machine.dispose(client, subject)


def test_memory_is_converted_on_demand_and_back(client: Client) -> None:
    """Accesses in the other state are MEMORY_FAULT exits, which the VMM handles by converting."""
    subject = machine.create(client, find_consumer(client, "null"), memory_bytes=16 * PAGE_BYTES)
    where = Range(4 * PAGE_BYTES, 2 * PAGE_BYTES)
    vcpu = Vcpu(client, subject, 0)
    for private in (False, True):
        gpa, size = where.gpa, where.size_bytes
        vcpu.run([guest.vcpus.write(gpa, size, seed=3, private=private)])
        runs = client.vms.get_memory_attributes(subject.vm, gpa, size).runs
        assert [bool(run.attributes) for run in runs] == [private]
    assert vcpu.tally.exits["MEMORY_FAULT"] == 4
    machine.dispose(client, subject)
