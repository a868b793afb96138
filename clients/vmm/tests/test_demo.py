"""The demo end to end, on a small host; its report against the picture and the tables."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rmem_client import Client
from rmem_vmm import verdict
from rmem_vmm.argument import argue
from rmem_vmm.daemon import DaemonProcess
from rmem_vmm.fragmentation import Share, compact_half_full, neighbour

# pkvm.md §7 as (references, pins) at steps 0, 1, 2, 3, 4; the demo itself does not know them
STEPS = ("present", "lookup", "lost race", "installed", "released")
REFERENCE = {
    "gup": [(1, 0), (2, 0), (1, 0), (2, 0), (1, 0)],
    "tdx-today": [(1, 0), (2, 0), (1, 0), (2, 0), (1, 0)],
    "tdx-2022": [(1, 0), (2, 0), (1, 0), (3, 0), (2, 0)],
    "pkvm-today": [(1, 0), (1, 1), (1, 0), (1, 1), (1, 1)],
    "pkvm-gmem": [(1, 0), (2, 0), (1, 0), (2, 0), (1, 0)],
}


@dataclass
class Result:
    out: str
    report: dict[str, Any]
    picture: Path


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [
            sys.executable, "-m", "rmem_vmm.demo", "--out", str(out), "--host-memory", "64M",
            "--nodes", "4", "--seed", "9",
        ],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Result(done.stdout, json.loads((out / "report.json").read_text()), out / "pagemap.png")


def test_it_says_that_it_is_a_mock(result: Result) -> None:
    assert result.report["mock"] is True
    assert "mock = true" in result.out
    assert "drained by SIGTERM and ended with 0" in result.out


def test_it_fits_a_terminal_of_100_columns(result: Result) -> None:
    told = [line for line in result.out.splitlines() if "Page map:" not in line]
    assert max(map(len, told)) <= 100
    assert "…" not in result.out.partition("The argument, 1")[2].partition("Page map")[0]


def test_one_guest_per_vendor_ran_on_the_same_firmware(result: Result) -> None:
    guests = {run["consumer"]: run for run in result.report["guests"]}
    assert list(guests) == ["tdx-today", "snp-move", "pkvm-today"]
    pages = result.report["firmware"]["npages"]
    for run in guests.values():
        assert run["firmware_pages"] == pages
        assert run["mismatched_pages"] == 0
        assert run["checked_pages"] > 0
        assert run["published_pages"] == 64 + pages
    assert guests["tdx-today"]["measurement"]
    assert not guests["pkvm-today"]["measurement"]


def test_references_are_those_of_the_reference(result: Result) -> None:
    rows = {row["consumer"]: row for row in result.report["argument"]}
    for consumer, wanted in REFERENCE.items():
        steps = rows[consumer]["steps"]
        assert [(steps[s]["references"], steps[s]["pins"]) for s in STEPS] == wanted
    assert rows["tdx-today"]["steps"]["removal fails"]["use"] == "leaked"
    assert rows["tdx-2022"]["steps"]["removal fails"]["references"] == 1
    assert rows["pkvm-today"]["steps"]["zap"]["pins"] == 1
    assert rows["pkvm-today"]["steps"]["teardown"]["pins"] == 0


def test_migrate_answers_as_the_tables_say(result: Result) -> None:
    for row in result.report["argument"]:
        moved = "migrate_folio" in row["ops"] or not row["private_memory"]
        assert row["migrate"]["outcome"] == ("moved" if moved else "unmovable")
        if not moved:
            assert row["migrate"]["reason"] == "FOLIO_UNMOVABLE"
            assert row["consumer"] in row["migrate"]["named"][0]
        assert row["survived_pages"] == row["checked_pages"] == 64
        if row["held"]["busy"]:
            assert "demo NIC" in row["held"]["named"][0]
            assert row["let_go"]["moved"] == row["held"]["busy"]


def test_compaction_regains_half_of_the_blocks_or_none(result: Result) -> None:
    rows = {row["consumer"]: row for row in result.report["argument"]}
    *single, mixed = result.report["compaction"]
    assert [one["label"] for one in single] == list(rows)
    for one in single:
        moves = rows[one["label"]]["migrate"]["outcome"] == "moved"
        assert one["regained"] == (one["blocks"] // 2 if moves else 0)
        assert one["blocked"] == (0 if moves else one["blocks"])
        assert one["checked_pages"] == one["pages"] == one["blocks"] * 256
        assert one["mismatched_pages"] == 0
    assert list(mixed["guests"]) == ["tdx-today", "tdx-relocate"]
    assert mixed["regained"] == 0
    assert mixed["unmovable"] == mixed["guests"]["tdx-today"]


def test_everything_movable_moved_under_load(result: Result) -> None:
    movable = [r["consumer"] for r in result.report["argument"] if r["migrate"]["moved"]]
    assert [run["consumer"] for run in result.report["under_load"]] == movable
    for run in result.report["under_load"]:
        assert run["moved"] > 0
        assert run["mismatched_pages"] == 0
        assert run["rounds"] >= 1


def test_the_picture_shows_what_the_report_says(result: Result) -> None:
    from matplotlib.image import imread

    picture = imread(result.picture)
    colours = {tuple(c) for c in (picture[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    # free, stuck, may move, moved here, edge of a free block
    for wanted in ("eef1f4", "d1495b", "3d7ea6", "12395b", "2f9e5b"):
        assert tuple(bytes.fromhex(wanted)) in colours


def test_a_second_query_gives_the_same_figures(
    result: Result, daemon: DaemonProcess, client: Client
) -> None:
    """Another daemon, with another seed and history, answers the same."""
    consumers = {c.name: c for c in client.consumers.list().consumers}
    rows = {row["consumer"]: row for row in result.report["argument"]}
    for name in ("tdx-relocate", "pkvm-today"):
        again, first = argue(client, consumers[name]), rows[name]
        for step, count in again.steps.items():
            assert count is not None
            said = first["steps"][step]
            assert (count.references, count.pins) == (said["references"], said["pins"])
        assert again.migrate.outcome == first["migrate"]["outcome"]
        assert list(again.ops) == first["ops"]
        assert verdict.contradictions([again], []) == []
    ballast = neighbour(list(consumers.values()))
    one = compact_half_full(
        client, "tdx-relocate", [Share(consumers["tdx-relocate"], 256)], ballast, 3
    )
    assert one.regained == one.blocks // 2
    assert one.mismatched_pages == 0


def test_a_daemon_that_cannot_start_is_a_clear_failure(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rmem_vmm.demo", "--out", str(tmp_path), "--host-memory", "1M"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "rmemd did not become ready" in done.stderr
    assert "2M a node at least" in done.stderr
