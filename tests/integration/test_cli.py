"""rmemctl against the real daemon: what it prints, how it exits, and what its errors name."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from daemons import BIN, PATIENCE_SECONDS, Daemon, run_cli
from guests import make_engine

from rmem_client import Client, vcpus
from rmemd.errors import REASONS

TESTS = Path(__file__).parents[1]
PAGE = 4096
EXIT_USAGE, EXIT_UNREACHABLE = 2, 3
EXIT_INVALID, EXIT_NOT_FOUND, EXIT_EXHAUSTED, EXIT_PRECONDITION, EXIT_ABORTED = 13, 15, 18, 19, 20


@pytest.fixture
def daemon(daemons: Callable[..., Daemon]) -> Daemon:
    """A daemon with two nodes."""
    return daemons("--nodes", "2")


class Ctl:
    """rmemctl on one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def __call__(self, *args: str, code: int = 0) -> str:
        """Run a command that must exit with ``code``; return stdout, or stderr if it fails."""
        done = run_cli(self.daemon, *args)
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stderr if code else done.stdout

    def json(self, *args: str) -> Any:
        """Run a command that must succeed; return its JSON."""
        return json.loads(self("-o", "json", *args))

    def error(self, *args: str, code: int) -> Any:
        """Run a command that must fail; return the error's JSON."""
        return json.loads(self("-o", "json", *args, code=code))


@pytest.fixture
def ctl(daemon: Daemon) -> Ctl:
    """Rmemctl on the daemon."""
    return Ctl(daemon)


def test_consumers_list_says_what_the_code_declares(ctl: Ctl) -> None:
    """Each op of each variant: as compile_consumer finds it in the object."""
    reply = ctl.json("consumers", "list")
    said = {
        consumer["name"]: {op["name"]: bool(op.get("implemented")) for op in consumer["ops"]}
        for consumer in reply["consumers"]
    }
    engine = make_engine()
    try:
        offers = engine.core.registry.offers
        assert said == {name: offer.ops.implemented() for name, offer in offers.items()}
        for name, table in said.items():
            assert len(table) == 19, name
            vm = engine.create_vm(name).info.vm
            assert engine.core.consumers[vm].ops.implemented() == table
    finally:
        engine.close()
    assert len(said) == 10
    null = {op for op, there in said["null"].items() if there}
    assert null == {"invalidate_start", "invalidate_end", "export_state", "import_state"}
    table = ctl("consumers", "list")
    assert re.search(r"migrate_folio\s+NULL", table)


def test_the_argument_s_variants_differ_in_pin_and_migrate_only(ctl: Ctl) -> None:
    reply = ctl.json("consumers", "list")
    tables = {
        consumer["name"]: {op["name"] for op in consumer["ops"] if op.get("implemented")}
        for consumer in reply["consumers"]
    }
    today = tables["tdx-today"]
    assert tables["tdx-2022"] - today == {"pin", "unpin"}
    assert tables["tdx-relocate"] - today == {"migrate_folio"}
    assert tables["pkvm-today"] ^ tables["pkvm-gmem"] == {"pin", "unpin", "migrate_folio"}
    assert tables["snp-move"] ^ tables["snp-swap-disable"] == {"migrate_folio"}


def test_a_vm_from_the_command_line(ctl: Ctl, tmp_path: Path) -> None:
    assert ctl("vm", "create", "snp-move", "--name", "demo").strip() == "vm/1"
    assert ctl("mem", "create", "vm/1", "2M").strip() == "file/1"
    ctl("vm", "slot", "vm/1", "0", "--gpa", "0", "--size", "2M", "--file", "file/1")
    image = tmp_path / "image"
    image.write_bytes(b"firmware" * 100)
    assert "1 page taken in" in ctl("vm", "populate", "1", str(image), "--gpa", "0x10000")
    measurement = ctl("vm", "finalize", "1").strip()
    assert re.fullmatch(r"[0-9a-f]{96}", measurement)
    reply = ctl.json("vm", "prefault", "1", "0x40+16", "--trace")
    assert reply["done_pages"] in (16, "16")
    assert reply["steps"][0]["step"] == "present"
    shown = ctl.json("vm", "show", "1")
    assert (shown["name"], shown["state"], shown["consumer"]) == ("demo", "finalized", "snp-move")

    page = ctl.json("page", "show", "--vm", "1", "--gfn", "0x40")
    assert page["movable"]
    assert "movable" in ctl("page", "show", "--pfn", hex(int(page["pfn"])))
    moved = ctl.json("migrate", "--vm", "1", "--gfn", "0x40+16", "--node", "1")["report"]
    assert int(moved["moved"]) == 16
    after = ctl.json("page", "show", "--vm", "1", "--gfn", "0x40")
    assert (int(after["node"]), int(after["gfn"])) == (1, 0x40)
    assert after["pfn"] != page["pfn"]

    compacted = ctl.json("compact", "--node", "1")
    assert {"report", "free_2m_before", "free_2m_after"} <= compacted.keys()
    drawn = ctl("page", "map", "--draw")
    assert drawn.strip()
    assert "vm/1" in ctl("page", "map", "--used")

    poisoned = ctl.json("poison", "--vm", "1", "--gfn", "0x41")
    assert int(poisoned["vm"]) == 1
    error = ctl.error("page", "show", "--vm", "1", "--gfn", "0x999999", code=EXIT_PRECONDITION)
    assert (error["reason"], error["page"]) == ("FRAME_NOT_OWNED", "gfn 0x999999")
    ctl("vm", "destroy", "1")
    ctl("mem", "close", "1")
    assert ctl.json("vm", "list").get("vms", []) == []


def test_explain_knows_every_reason(ctl: Ctl) -> None:
    reply = ctl.json("explain")
    said = {reason["reason"] for reason in reply["reasons"]}
    # other tests declare reasons of their own in this process, so a fresh one is asked
    script = "from guests import make_engine; make_engine().close();"
    script += "from rmemd.errors import REASONS; print(*REASONS)"
    known = subprocess.run(
        [sys.executable, "-c", script], cwd=TESTS, text=True, capture_output=True, check=True
    ).stdout.split()
    assert said == set(known)
    for reason in reply["reasons"]:
        assert reason["cause"], reason
        assert reason["remedy"], reason
    text = ctl("explain", "folio_busy")
    assert REASONS["FOLIO_BUSY"].cause in " ".join(text.split())
    error = ctl.error("explain", "NO_REASON", code=EXIT_NOT_FOUND)
    assert error["reason"] == "NO_SUCH_REASON"


def test_exit_codes(ctl: Ctl, tmp_path: Path) -> None:
    ctl("frobnicate", code=EXIT_USAGE)
    ctl("vm", "show", code=EXIT_USAGE)
    ctl("vm", "show", "vm/x", code=EXIT_USAGE)
    assert ctl.error("vm", "show", "7", code=EXIT_NOT_FOUND)["reason"] == "NO_SUCH_VM"
    ctl("vm", "create", "null")
    error = ctl.error("mem", "create", "1", "1", code=EXIT_INVALID)
    assert (error["reason"], error["field"]) == ("NOT_PAGE_ALIGNED", "size_bytes")
    ctl("mem", "create", "1", "1G")
    error = ctl.error("mem", "allocate", "1", "0+0x10000", code=EXIT_EXHAUSTED)
    assert (error["reason"], error["errno_name"]) == ("NO_FRAMES", "ENOMEM")
    error = ctl.error("vm", "finalize", "1", code=EXIT_PRECONDITION)
    assert error["reason"] == "OP_NOT_IMPLEMENTED_BY_CONSUMER"
    nobody = subprocess.run(
        [BIN / "rmemctl", "--socket-dir", tmp_path / "nobody", "host", "show"],
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False,
    )  # fmt: skip
    assert nobody.returncode == EXIT_UNREACHABLE
    assert "nobody" in nobody.stderr


def test_a_refusal_names_page_state_rule_holders_and_remedy(ctl: Ctl) -> None:
    ctl("vm", "create", "sw-protected")
    ctl("mem", "create", "1", "64K", "--mmap")
    ctl("vm", "slot", "1", "0", "--gpa", "0", "--size", "64K", "--file", "1")
    ctl("mem", "convert", "1", "2+4", "--shared")
    ctl("mem", "pin", "1", "3", "--purpose", "DMA", "--holder", "nic 0")
    assert ctl("mem", "pin", "1", "4").strip() == "pin/2", "who and why have a default"
    error = ctl.error("mem", "convert", "1", "2+4", "--private", code=EXIT_ABORTED)
    assert (error["reason"], error["errno_name"]) == ("FOLIO_BUSY", "EAGAIN")
    assert (error["page"], error["state"]) == ("pgoff 0x3", "shared")
    assert error["error_offset_bytes"] == 3 * PAGE
    assert "in-place conversion" in error["rule"]
    assert error["remedy"]
    assert [(h["name"], h["purpose"], h["count"]) for h in error["holders"]] == [
        ("nic 0 pin 1", "DMA", 1)
    ]
    text = ctl("mem", "convert", "1", "2+4", "--private", code=EXIT_ABORTED)
    assert re.search(r"held by\s+nic 0 pin 1 \(DMA: 1 ", text)
    assert "EAGAIN" in text
    ctl("mem", "unpin", "pin/1", "pin/2")
    assert "4 pages now private" in ctl("mem", "convert", "1", "2+4", "--private")


def test_a_pinned_page_is_busy_and_says_who(ctl: Ctl, daemon: Daemon) -> None:
    """TDX as in 2022: a shared page of it moves, a private one does not, and why is said."""
    client: Client = daemon.client()
    vm = client.vms.create("tdx-2022")
    file = client.files.create(vm, 16 * PAGE)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=16 * PAGE, file=file)
    client.vcpus.create(vm, 0)
    client.vms.finalize(vm)
    client.vcpus.set_programme(vm, 0, [vcpus.accept(0, PAGE), vcpus.halt()])
    client.vcpus.run(vm, 0)
    report = ctl.json("migrate", "--vm", "1", "--gfn", "0")["report"]
    assert int(report["unmovable"]) == 1
    page = ctl.json("page", "show", "--vm", "1", "--gfn", "0")
    assert [(h["name"], h["purpose"]) for h in page["holders"]] == [("vm/1", "secure EPT")]
    assert page["unmovable_reason"] == "FOLIO_UNMOVABLE"


def test_watch_prints_events_as_they_happen(daemon: Daemon) -> None:
    command = [BIN / "rmemctl", "--socket-dir", daemon.socket_dir, "-o", "jsonl", "watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        assert "progress_revision" in first
        daemon.client().vms.create("null", name="seen")
        while "event" not in (line := json.loads(watching.stdout.readline())):
            pass
        event = line["event"]
        assert (event["kind"], event["vm"]) == ("vm_created", 1)
        assert event["fields"]["name"] == "seen"
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_SECONDS) == 130


def test_ready_waits_for_the_daemon(daemons: Callable[..., Daemon], tmp_path: Path) -> None:
    """Started first, it waits for a daemon that comes later."""
    directory = tmp_path / "later"
    command = [BIN / "rmemctl", "--socket-dir", directory / "socket", "ready", "--timeout", "30"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waiting:
        daemons(directory=directory)
        assert waiting.wait(PATIENCE_SECONDS) == 0
        assert waiting.stdout is not None
        assert "ready:" in waiting.stdout.read()
