from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable

import pytest
import world
from fake_daemon import FakeDaemon

from rmemctl.output import Output

Ctl = Callable[..., object]


def test_vm_table(rmemctl: Ctl) -> None:
    assert rmemctl("vm", "list").lines == [
        "VM    NAME  CONSUMER   STATE      CONVERTS    SLOTS  VCPUS   PRIVATE  SHARED  LOCKED",
        "vm/1  web   tdx-today  finalized  attributes      2      2  1996 KiB   2 MiB       0",
        "vm/3  -     pkvm-gmem  building   in-place        0      1         0       0       0",
        "vm/4  db    snp        dead       -               0      0         0       0       0",
    ]


def test_no_headers_and_names(rmemctl: Ctl) -> None:
    assert rmemctl("vm", "list", "--no-headers").lines[0].startswith("vm/1 ")
    assert rmemctl("-o", "name", "vm", "list").lines == ["vm/1", "vm/3", "vm/4"]
    assert rmemctl("mem", "list", "-o", "name").lines == ["file/1", "file/2"]


def test_json_is_the_message_with_numbers_and_defaults(rmemctl: Ctl) -> None:
    reply = rmemctl("vm", "list", "-o", "json").json
    assert reply["revision"] == 42
    first, _, dead = reply["vms"]
    assert first["personality"] == "PERSONALITY_ATTRIBUTES"
    assert first["mapped_private_pages"] == 499
    assert base64.b64decode(first["measurement"]) == bytes(range(48))
    assert first["slots"][1]["file_open"] is False
    assert dead["slots"] == []
    assert dead["locked_pages"] == 0


def test_global_options_in_either_place(rmemctl: Ctl) -> None:
    before = rmemctl("-o", "json", "vm", "list")
    assert before.json == rmemctl("vm", "list", "-o", "json").json
    assert rmemctl("-o", "table", "vm", "list", "-o", "json").json == before.json


def test_jsonl_has_an_item_per_line(rmemctl: Ctl) -> None:
    lines = rmemctl("vm", "list", "-o", "jsonl").lines
    assert [json.loads(line)["vm"] for line in lines] == [1, 3, 4]


def test_consumers_json_has_every_op(rmemctl: Ctl) -> None:
    consumers = rmemctl("consumers", "list", "-o", "json").json["consumers"]
    assert {consumer["name"] for consumer in consumers} == set(world.CONSUMERS)
    for consumer in consumers:
        assert consumer["ops"] == [
            {"name": op, "implemented": world.implemented(consumer["name"], op)} for op in world.OPS
        ]


def test_consumers_table_is_the_argument(rmemctl: Ctl) -> None:
    lines = rmemctl("consumers", "list").lines
    assert lines[:2] == [
        "                  tdx-   tdx-  tdx-            pkvm-  pkvm-",
        "OP                today  2022  relocate  snp   today  gmem   gup   null",
    ]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2 : 2 + len(world.OPS)]}
    assert rows["migrate_folio"] == ["NULL", "NULL", "yes", "yes", "NULL", "yes", "NULL", "NULL"]
    assert rows["pin"] == ["NULL", "yes", "NULL", "NULL", "yes", "NULL", "NULL", "NULL"]
    assert any("[did you mean" in line for line in lines)  # brackets are text and no markup


@pytest.mark.parametrize("columns", ["40", "100"])
def test_tables_lose_nothing(rmemctl: Ctl, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for args in (["page", "map"], ["vm", "list"], ["migrate", "--pfn", "1"]):
        out = rmemctl(*args).out
        assert "…" not in out
    assert "0x1521-0x10000  234.9 MiB  free" in rmemctl("page", "map").out


def test_no_word_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    Output("table", headers=True, stream=sys.stdout).show({}, "a" * 96, "b " * 30)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a" * 96
    assert [len(line) for line in lines[1:]] == [39, 19]


def test_lines_end_where_their_text_does(rmemctl: Ctl) -> None:
    for args in (["host", "show"], ["page", "map"], ["consumers", "list"], ["watch"]):
        assert all(line == line.rstrip() for line in rmemctl(*args).lines)


def test_colour_only_where_it_is_wanted(rmemctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in rmemctl("vm", "list").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[32mfinalized" in rmemctl("vm", "list").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in rmemctl("vm", "list").out


def test_page_story(rmemctl: Ctl) -> None:
    text = rmemctl("page", "show", "--vm", "vm/3", "--gfn", "0x4f").out
    assert "references     3, 1 long-term pin (2 expected)\n" in text
    assert "held by        page cache (file/1: 1 reference)\n" in text
    assert "               client 7 (DMA: 1 long-term pin)\n" in text
    assert "movable        no: FOLIO_BUSY\n" in text


def test_page_map_picture(rmemctl: Ctl) -> None:
    legend, first, second, *rest = rmemctl("page", "map", "--draw").lines
    assert legend.startswith("1 cell = 256 KiB   · free   █ private vm/1   █ private vm/3")
    assert first == "    0x0  " + "█" * 40 + "▒" * 15 + "!" + "█" * 8
    assert second.startswith(" 0x1000  " + "█" * 20 + "L···")
    assert len(rest) == 14


def test_page_map_json_has_all_runs(rmemctl: Ctl) -> None:
    runs = rmemctl("page", "map", "-o", "json").json["runs"]
    assert sum(run["npages"] for run in runs) == 65536
    assert runs[0]["use"] == "FRAME_USE_PRIVATE"
    used = rmemctl("page", "map", "--used", "-o", "jsonl").lines
    assert len(used) == len(runs) - 1


def test_migrate_reports_why(rmemctl: Ctl, daemon: FakeDaemon) -> None:
    result = rmemctl("migrate", "--vm", "3", "--gfn", "0x40+16", "--node", "1")
    assert result.code == 0
    assert "unmovable  FOLIO_UNMOVABLE  -" in result.out
    assert "busy       FOLIO_BUSY       client 7 (DMA: 1 long-term pin)" in result.out
    assert "FOLIO_UNMOVABLE   Choose a variant that implements migrate_folio." in result.out
    assert result.lines[-1] == "pages: 12 moved, 3 unmovable, 1 busy, 0 failed"
    request, waited = daemon.requests[-2:]
    assert (request.vm, request.node, request.gfns[0].start) == (3, 1, 0x40)
    assert waited.name == "operations/2"


def test_watch_streams(rmemctl: Ctl) -> None:
    lines = rmemctl("watch", "-o", "json").lines
    assert [next(iter(json.loads(line))) for line in lines] == [
        "progress_revision", "event", "lost", "event",
    ]  # fmt: skip
    event = json.loads(lines[1])["event"]
    assert (event["revision"], event["fields"]["npages"]) == (43, "12")
    table = rmemctl("watch", "--count", "2").lines
    assert [line.split()[:2] for line in table] == [
        ["REVISION", "KIND"], ["43", "folio_migrated"], ["-", "lost"],
    ]  # fmt: skip


def test_explain(rmemctl: Ctl) -> None:
    everything = rmemctl("explain")
    assert [line.split()[0] for line in everything.lines if not line.startswith(" ")] == [
        "REASON", "FOLIO_BUSY", "FOLIO_UNMOVABLE", "REVISION_COMPACTED",
    ]  # fmt: skip
    one = rmemctl("explain", "folio_busy").out
    assert "try         Have the holders that are named let go, then try again.\n" in one


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["vm", "create", "tdx-today"], "vm/5"),
        (["mem", "create", "1", "2M", "--mmap"], "file/6"),
        (["mem", "pin", "1", "0+4", "--purpose", "DMA"], "pin/9"),
        (["fault", "add", "map", "boom", "--nth", "3"], "rule/2"),
        (["mem", "allocate", "1", "0+16"], "16 pages allocated"),
        (["mem", "punch", "1", "0-16"], "16 pages freed"),
        (["mem", "close", "file/1"], "file/1 closed, 1 page freed"),
        (["mem", "convert", "1", "0+16", "--private"], "16 pages now private, content zero"),
        (["vm", "finalize", "1"], bytes(range(48)).hex()),
        (["vm", "slot", "1", "0", "--gpa", "1G", "--size", "2M"],
         "slot 0 of vm/1 set: gfn 0x40000-0x40200"),
        (["vm", "slot", "1", "0", "--delete"], "slot 0 of vm/1 deleted"),
        (["host", "online", "0x10+16"], "12 frames came back"),
        (["poison", "--pfn", "0x1f"],
         "pfn 0x1f poisoned; vm/3 is lost: machine check in the guest's page"),
    ],
)  # fmt: skip
def test_what_changes_says_one_line(rmemctl: Ctl, args: list[str], expected: str) -> None:
    result = rmemctl(*args)
    assert (result.code, result.err, result.lines) == (0, "", [expected])
    assert isinstance(rmemctl(*args, "-o", "json").json, dict)


def test_create_says_its_revision_in_json(rmemctl: Ctl) -> None:
    assert rmemctl("vm", "create", "tdx-today", "-o", "json").json == {"revision": 43, "vm": 5}


@pytest.mark.parametrize(
    "args",
    [
        "host show", "host accounting", "vm show 1", "vm attributes 1", "vm prefault 1 0+2 --trace",
        "mem show 1", "mem read 1", "page show --pfn 0", "consumers ops 1", "compact",
        "host offline 0x10+16", "fault list", "explain folio_busy", "ready", "vm destroy 1",
        "vm convert 1 0+1 --shared", "mem unpin 9", "fault remove 2",
        "fault points", "host check",
    ],
)  # fmt: skip
def test_everything_speaks_json(rmemctl: Ctl, args: str) -> None:
    result = rmemctl(*args.split(), "-o", "json")
    assert (result.code, result.err) == (0, "")
    assert isinstance(result.json, dict)


def test_populate_fills_the_last_page(
    rmemctl: Ctl, daemon: FakeDaemon, tmp_path_factory: pytest.TempPathFactory
) -> None:
    image = tmp_path_factory.mktemp("image") / "kernel"
    image.write_bytes(b"x" * 5000)
    out = rmemctl("vm", "populate", "1", str(image), "--gpa", "1M", "--kind", "unmeasured").out
    assert out == "2 pages taken in at gpa 0x100000\n"
    assert len(daemon.requests[-1].source) == 8192
    assert daemon.requests[-1].kind == 4
