"""Metrics scraped over HTTP agree with what the daemon itself says, and with their page."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import Daemon, eventually
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from rmem.v1 import host_pb2
from rmem_client import Client, RmemError, vcpus
from rmemd.daemon.metrics import Metrics
from rmemd.engine.engine import Engine

PAGE = 4096
PAGES = 32
MANUAL = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


class Scraped:
    """One page of metrics."""

    def __init__(self, families: dict[str, Metric]) -> None:
        self.families = families

    def value(self, name: str, **labels: str) -> float:
        """Return a sample's value; 0 of one that is not there (a label that never was)."""
        for family in self.families.values():
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        assert any(name.startswith(family) for family in self.families), name
        return 0.0


def scrape(daemon: Daemon) -> Scraped:
    (address,) = [line["address"] for line in daemon.log_lines if line["event"] == "metrics_served"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        text = page.read().decode()
    return Scraped({family.name: family for family in text_string_to_metric_families(text)})


@pytest.fixture
def measured(daemons: Callable[..., Daemon]) -> Daemon:
    return daemons("--set", "metrics.listen=127.0.0.1:0")


def busy(client: Client) -> int:
    """Have a guest use its memory and give some of it back; return the VM."""
    vm = client.vms.create("tdx-today")
    file = client.files.create(vm, PAGES * PAGE)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=PAGES * PAGE, file=file)
    client.vcpus.create(vm, 0)
    client.vms.finalize(vm)
    whole = (0, PAGES * PAGE)
    # a page that is only zero has no bytes to destroy
    programme = [vcpus.accept(*whole), vcpus.write(*whole, seed=1, private=True), vcpus.halt()]
    client.vcpus.set_programme(vm, 0, programme)
    client.vcpus.run(vm, 0)
    client.files.punch(file, 0, PAGE * PAGES // 2)
    return vm


def test_they_agree_with_the_daemon(measured: Daemon) -> None:
    client = measured.client()
    busy(client)
    pinned = client.files.create(client.vms.create("gup"), 4 * PAGE)
    client.files.allocate(pinned, 0, 4 * PAGE)
    client.files.pin(pinned, 0, 3 * PAGE, purpose="test")
    host = client.host.get()
    page = scrape(measured)
    for count in host.counts:
        use = host_pb2.FrameUse.Name(count.use).removeprefix("FRAME_USE_").lower()
        assert page.value("rmemd_frames", use=use) == count.npages, use
    assert sum(s.value for s in page.families["rmemd_frames"].samples) == host.nframes
    assert page.value("rmemd_frames", use="private") > 0
    assert page.value("rmemd_revision") == host.revision
    assert page.value("rmemd_vms", state="finalized") == 1
    assert page.value("rmemd_vms", state="building") == 1
    assert page.value("rmemd_files") == host.files
    assert (page.value("rmemd_pins"), page.value("rmemd_pinned_pages")) == (1, 3)
    assert page.value("rmemd_hook_calls_total") > PAGES / 2
    assert page.value("rmemd_hook_overdue_total") == 0
    assert page.value("rmemd_scrubbed_frames_total") == PAGES / 2
    resident = page.value("process_resident_memory_bytes")
    assert abs(resident - host.daemon_rss_bytes) < 32 << 20
    assert page.value("process_open_fds") > 5
    assert page.value("rmemd_info", version="0.1.0") == 1


def test_calls_are_counted_by_method_and_status(measured: Daemon) -> None:
    client = measured.client()
    before = scrape(measured)
    for _ in range(3):
        client.vms.create("null")
    for vm in (77, 78):
        with pytest.raises(RmemError):
            client.vms.get(vm)
    malformed = measured.rpc().call_raw("GetVm", b"\xff")
    after = scrape(measured)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert grown("rmemd_calls_total", method="VmService/CreateVm", code="OK") == 3
    assert grown("rmemd_calls_total", method="VmService/GetVm", code="NOT_FOUND") == 2
    assert grown("rmemd_calls_total", method="VmService/GetVm", code="INVALID_ARGUMENT") == 1
    assert grown("rmemd_refusals_total", reason="NO_SUCH_VM") == 2
    assert grown("rmemd_refusals_total", reason=malformed.reason) == 1
    assert grown("rmemd_call_seconds_count", method="VmService/CreateVm") == 3
    assert 0 < grown("rmemd_call_seconds_sum", method="VmService/CreateVm") < 3
    assert after.value("rmemd_call_seconds_bucket", method="VmService/CreateVm", le="+Inf") == 3


def test_watches_are_counted_while_they_are_open(measured: Daemon) -> None:
    assert scrape(measured).value("rmemd_watches") == 0
    client = measured.client()
    with client.watch() as watch:
        watch.start()
        client.host.get()
        assert eventually(lambda: scrape(measured).value("rmemd_watches") == 1)
    assert eventually(lambda: scrape(measured).value("rmemd_watches") == 0)
    page = scrape(measured)
    codes = {
        s.labels["code"]
        for s in page.families["rmemd_calls"].samples
        if s.name == "rmemd_calls_total" and s.labels["method"] == "WatchService/Watch"
    }
    assert len(codes) == 1


def test_no_label_names_a_vm(measured: Daemon) -> None:
    client = measured.client()
    for _ in range(3):
        busy(client)
    labels = {
        label
        for family in scrape(measured).families.values()
        if family.name.startswith("rmemd")
        for sample in family.samples
        for label in sample.labels
    }
    assert labels <= {"method", "code", "reason", "use", "state", "version", "le"}


def test_the_manual_and_the_page_agree(measured: Daemon) -> None:
    client = measured.client()
    with pytest.raises(RmemError):
        client.vms.get(77)
    said = {}
    for line in MANUAL.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`rmemd_"):
            labels = set(re.findall(r"`(\w+)`", cells[2]))
            said[cells[0].strip("`")] = (cells[1], labels, cells[3])
    found = {}
    for family in scrape(measured).families.values():
        # a counter's creation times are prometheus-client's own
        if not family.name.startswith("rmemd") or family.name.endswith("_created"):
            continue
        ours = [s for s in family.samples if not s.name.endswith("_created")]
        labels = {label for s in ours for label in s.labels} - {"le"}
        name = f"{family.name}_total" if family.type == "counter" else family.name
        kind = "info" if name == "rmemd_info" else family.type
        found[name] = (kind, labels, family.documentation)
    assert found == said


def test_without_them_nothing_of_them_is_imported(daemon: Daemon) -> None:
    assert not [line for line in daemon.log_lines if line["event"] == "metrics_served"]
    code = (
        "import sys, rmemd.daemon.app; "
        "print([m for m in ('prometheus_client', 'opentelemetry') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_page_ends_with_the_daemon(measured: Daemon) -> None:
    scrape(measured)
    measured.stop()
    with pytest.raises(OSError, match="refused"):
        scrape(measured)


def test_a_daemon_that_checks_itself_counts_its_checks(daemons: Callable[..., Daemon]) -> None:
    daemon = daemons(
        "--set", "metrics.listen=127.0.0.1:0", "--set", "daemon.check_every_seconds=0.01"
    )
    busy(daemon.client())
    assert eventually(lambda: scrape(daemon).value("rmemd_checks_total") > 3)
    page = scrape(daemon)
    assert page.value("rmemd_invariant_violations") == 0
    assert page.value("rmemd_check_seconds") > 0
    assert not [line for line in daemon.log_lines if line["event"] == "invariant_violated"]


def test_a_check_that_somebody_asked_for_counts_too(measured: Daemon) -> None:
    assert scrape(measured).value("rmemd_checks_total") == 0
    held = measured.client().host.check().held_seconds
    page = scrape(measured)
    assert page.value("rmemd_checks_total") == 1
    assert page.value("rmemd_check_seconds") == held


def test_what_is_violated_is_in_the_page(engine: Engine) -> None:
    with engine.core.tx("break") as tx:
        tx.fill(engine.core.host.refs, 3, 1, 1)
    engine.check()
    assert engine.last_check is not None
    violations = len(engine.last_check.violated)
    found = Metrics(engine).registry.get_sample_value("rmemd_invariant_violations")
    assert found == violations > 0
