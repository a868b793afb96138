"""A guest far larger than the host costs what it touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import DEBUGGABLE, Daemon

from rmem.v1 import vcpu_pb2
from rmem_client import vcpus

PAGE = 4096
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
GROWTH_MAX = 64 * MIB


def forget_peak(daemon: Daemon) -> None:
    """Have the kernel measure the daemon's peak from now on."""
    Path(f"/proc/{daemon.process.pid}/clear_refs").write_text("5")


def peak(daemon: Daemon) -> int:
    """Return the most memory that the daemon has had resident, in bytes."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kib) * 1024


@pytest.mark.parametrize("consumer", ["tdx-today", "snp-move"])
def test_a_1_tib_guest_on_a_16_gib_host(
    daemons: Callable[..., Daemon], capsys: pytest.CaptureFixture[str], consumer: str
) -> None:
    daemon = daemons("--host-memory", "16G", *DEBUGGABLE)
    client = daemon.client()
    forget_peak(daemon)
    before = client.host.get()
    assert before.nframes * PAGE == 16 * GIB
    vm = client.vms.create(consumer)
    file = client.files.create(vm, TIB)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=TIB, file=file)
    client.vcpus.create(vm, 0)
    client.vms.finalize(vm)
    reply = client.vms.convert(vm, 0, TIB, private=False)
    assert (reply.done_ranges, reply.unchanged_ranges) == (1, 0)
    (run,) = client.vms.get_memory_attributes(vm, 0, TIB).runs
    assert (run.gpa, run.size_bytes, run.attributes) == (0, TIB, 0)
    converted = client.host.get().daemon_rss_bytes - before.daemon_rss_bytes
    assert converted <= GROWTH_MAX
    # and back, and one page in the middle: three runs
    client.vms.convert(vm, 0, TIB, private=True)
    client.vms.convert(vm, TIB // 2, PAGE, private=False)
    runs = client.vms.get_memory_attributes(vm, 0, TIB).runs
    assert [run.attributes for run in runs] == [8, 0, 8]
    # it is a guest: its last page can be used
    take = vcpus.accept if consumer.startswith("tdx") else vcpus.validate
    last = TIB - PAGE
    programme = [
        take(last, PAGE),
        vcpus.write(last, PAGE, seed=1, private=True),
        vcpus.check(last, PAGE, seed=1, private=True),
        vcpus.halt(),
    ]
    client.vcpus.set_programme(vm, 0, programme)
    exited = client.vcpus.run(vm, 0)
    assert (exited.exit_reason, exited.mismatched_pages) == (vcpu_pb2.EXIT_REASON_HLT, 0)
    after = client.host.get()
    grown = after.daemon_rss_bytes - before.daemon_rss_bytes
    with capsys.disabled():
        print(
            f"\n1 TiB {consumer} guest on a 16 GiB host: the daemon grew by "
            f"{grown / MIB:.1f} MiB, to {after.daemon_rss_bytes / MIB:.1f} MiB"
        )
    assert grown <= GROWTH_MAX
    # nor did it need more for a moment
    assert peak(daemon) - before.daemon_rss_bytes <= GROWTH_MAX
    assert before.free_pages - after.free_pages == 1
    client.vms.destroy(vm)
    client.files.close(file)
