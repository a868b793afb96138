"""What the documents say is there: signatures, generated sections, links, examples, rules."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import rmemd.hooks
from rmemd.errors import REASONS, Kind, Reason, RmemError
from rmemd.hooks.ops import compile_consumer, compile_platform
from rmemd.hooks.spec import ENTRY_POINTS
from rmemd.testing.hookbench import HookBench, runs
from rmemd.units import I64, U8, Bools

ROOT = Path(__file__).parents[2]
NAMES = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")
DOCUMENTS = sorted(p for p in (*map(ROOT.joinpath, NAMES), *ROOT.glob("docs/*.md")) if p.exists())
FENCED = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!\!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
NAMED = re.compile(r"^`(?P<name>[\w.]+)`$")
RULES = {"TDX": 25, "SNP": 25, "pKVM": 25}
CLASSES = {"ConsumerSpec": compile_consumer, "PlatformSpec": compile_platform}


def _build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _build()


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """Return a document without its fenced code."""
    return FENCED.sub("", read(path))


@cache
def anchors(path: Path) -> frozenset[str]:
    """Return the anchors that the headings of a document have, as GitHub makes them."""
    found: list[str] = []
    for title in re.findall(r"^#{1,6} +(.+?) *$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        again = sum(a == slug or (a.startswith(f"{slug}-") and a[len(slug) + 1 :].isdigit())
                    for a in found)  # fmt: skip
        found.append(f"{slug}-{again}" if again else slug)
    return frozenset(found)


def links() -> list[tuple[str, str, str]]:
    """Return (document, text, target) of every link that is not to another host."""
    return [
        (path.relative_to(ROOT).as_posix(), found["text"], found["target"])
        for path in DOCUMENTS
        for found in LINK.finditer(prose(path))
        if not re.match(r"[a-z][a-z0-9+.-]*:", found["target"])
    ]


def broken(document: str, text: str, target: str) -> str:
    """Return what is wrong with a link, "" for nothing."""
    where, _, anchor = target.partition("#")
    path = (ROOT / document).parent / where if where else ROOT / document
    if not path.exists():
        return "no such file"
    if line := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
        count = len(read(path).splitlines())
        return "" if all(1 <= int(n) <= count for n in line.groups() if n) else "no such line"
    if anchor and anchor not in anchors(path):
        return f"no such heading; there are {sorted(anchors(path))}"
    name = NAMED.match(text)
    module = path.resolve().relative_to(ROOT).with_suffix("")
    itself = (path.stem, ".".join(module.parts).removesuffix(".__init__"))
    if name and path.suffix == ".py" and name["name"] not in itself:
        last = re.escape(name["name"].rpartition(".")[2])
        defined = rf"^\s*(?:(?:async )?def|class) {last}\b|^{last}\b.*="
        if not re.search(defined, read(path), re.MULTILINE):
            return f"{path.name} does not define {name['name']}"
    return ""


# --- links and generated sections ------------------------------------------------------------
def test_links_resolve() -> None:
    found = links()
    assert len(found) > 100
    assert [(*link, why) for link in found if (why := broken(*link))] == []


def test_the_link_checker_finds_what_is_broken() -> None:
    assert broken("docs/hooks.md", "x", "../no/such.md") == "no such file"
    assert broken("docs/hooks.md", "x", "fidelity.md#nowhere").startswith("no such heading")
    assert broken("docs/hooks.md", "x", "build.py#L999999") == "no such line"
    assert broken("docs/hooks.md", "`nobody`", "build.py") != ""
    assert broken("docs/hooks.md", "`rebuilt`", "build.py#L1") == ""


def test_generated_sections_are_up_to_date() -> None:
    stale = [p.name for p in build.documents() if build.rebuilt(read(p)) != read(p)]
    assert stale == [], "run: python docs/build.py"


def test_every_generated_section_is_used_once() -> None:
    used = [m["name"] for path in build.documents() for m in build.MARKER.finditer(read(path))]
    assert sorted(used) == sorted(build.makers())


def test_check_says_so_when_a_section_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "hooks.md"
    document.write_text("<!-- begin: null-pyproject -->\nold\n<!-- end: null-pyproject -->\n")
    monkeypatch.setattr(build, "documents", lambda: [document])
    monkeypatch.setattr("sys.argv", ["build.py", "--check"])
    assert build.main() == 1
    assert document.read_text().splitlines()[1] == "old"
    monkeypatch.setattr("sys.argv", ["build.py"])
    assert build.main() == 0
    assert "rmemd-null" in document.read_text()
    monkeypatch.setattr("sys.argv", ["build.py", "--check"])
    assert build.main() == 0
    assert capsys.readouterr().out == "out of date: hooks.md\nrewrote: hooks.md\n"


# --- the hook reference ----------------------------------------------------------------------
@pytest.mark.parametrize("cls", CLASSES)
def test_every_op_has_its_heading_with_its_arguments(cls: str) -> None:
    titles = re.findall(r"^### (.+)$", prose(ROOT / "docs" / "hooks.md"), re.MULTILINE)
    functions = build.spec_functions(cls).values()
    assert [build.heading(f) for f in functions if build.heading(f) not in titles] == []


def test_no_heading_names_an_op_that_is_not_there() -> None:
    titles = re.findall(r"^### (\w+\(.*\))$", prose(ROOT / "docs" / "hooks.md"), re.MULTILINE)
    known = [build.heading(f) for cls in CLASSES for f in build.spec_functions(cls).values()]
    assert titles == known


def blocks(info: str) -> list[str]:
    return [
        m["code"]
        for m in FENCED.finditer(read(ROOT / "docs" / "hooks.md"))
        if m["info"].strip() == info
    ]


def test_the_complete_plugin_compiles_and_registers() -> None:
    [code] = [block for block in blocks("python") if "class NullPlatform" in block]
    namespace: dict[str, Any] = {"__name__": "null_of_the_docs"}
    exec(compile(code, "docs/hooks.md", "exec"), namespace)
    platform = namespace["NullPlatform"]()
    compile_platform(platform, "null")
    bench = HookBench(platform, "null", nframes=16)
    assert bench.ops(bench.make_vm("null")).implemented()["migrate_folio"] is False


@pytest.fixture
def toy() -> dict[str, Any]:
    """The examples of hooks.md, put together: one vendor."""
    namespace: dict[str, Any] = {
        "__name__": "toy_of_the_docs", "np": np, "pytest": pytest, "I64": I64, "U8": U8,
        "Bools": Bools, "Reason": Reason, "Kind": Kind, "RmemError": RmemError, "runs": runs,
        "HookBench": HookBench, "Mapping": Mapping, "Sequence": Sequence,
        **{name: getattr(rmemd.hooks, name) for name in rmemd.hooks.__all__},
    }  # fmt: skip
    # a method stands by itself in the document, and belongs to the class before it
    methods = (indent(b, "    ") if b.startswith("@") else b for b in blocks("python toy"))
    exec(compile("\n\n".join(methods), "docs/hooks.md", "exec"), namespace)
    return namespace


def test_the_examples_are_one_consumer_with_every_op(toy: dict[str, Any]) -> None:
    bench = HookBench(toy["ToyPlatform"](), "toy", nframes=64)
    ops = bench.ops(bench.make_vm("toy"))
    assert all(ops.implemented().values())
    assert bench.platform.host_access is not None
    assert bench.platform.free is not None


def test_the_bench_example_runs(toy: dict[str, Any]) -> None:
    [code] = blocks("python bench")
    exec(compile(code, "docs/hooks.md", "exec"), toy)


def test_the_kit_example_runs() -> None:
    [code] = blocks("python kit")
    exec(compile(code, "docs/hooks.md", "exec"), {})


def test_every_rule_of_the_kit_is_in_its_table() -> None:
    kit = [ROOT / "rmemd" / "testing" / name for name in ("conformance.py", "recorder.py")]
    kit.append(ROOT / "rmemd" / "testing" / "guestmodel.py")
    text = "".join(map(read, kit))
    used = set(re.findall(r'(?:found|wrong)\(\s*"(\w+)"|yield "(\w+)", f?"', text))
    rules = {one or other for one, other in used}
    section = read(ROOT / "docs" / "hooks.md").partition("## From the template")[2]
    named = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)))
    )
    assert len(rules) > 9
    assert rules - named == set()


def test_the_examples_work(toy: dict[str, Any]) -> None:
    hooks, bench = rmemd.hooks, HookBench(toy["ToyPlatform"](), "toy", nframes=64)
    vm = bench.make_vm("toy")
    ops, mapped = bench.ops(vm), runs(0x10, 3, 2)
    page = np.zeros((1, 4096), dtype=np.uint8)
    bench.run(vm, ops.prepare, mapped)
    bench.run(vm, ops.map, mapped)
    assert bench.run(vm, ops.pin, mapped).purpose == "toy table"
    assert not bench.run(vm, ops.unpin, mapped).any()
    codes = bench.run(vm, ops.guest_access, 0, mapped, False).codes
    assert codes.tolist() == [hooks.AccessCode.EXCEPTION] * 2
    gfns = np.array([0x10, 0x11, 0x12])
    answer = bench.run(vm, ops.guest_call, 0, hooks.GuestCall.ACCEPT, gfns, 0)
    assert (answer.action, answer.done) == (hooks.CallAction.FAULT, 2)
    codes = bench.run(vm, ops.guest_access, 0, mapped, True).codes
    assert codes.tolist() == [hooks.AccessCode.OK] * 2
    assert ops.page_state is not None
    states = ops.page_state(gfns, gfns)
    assert [states.names[c] for c in states.codes] == ["accepted", "accepted", "none"]
    bench.enter(vm, 0)
    views = bench.run(vm, bench.platform.host_access, np.array([3, 9]),
                      hooks.HostAccess(hooks.Agent.HOST_USER, True))  # fmt: skip
    assert views.views.tolist() == [3, 0]
    assert bench.run(vm, ops.convert, mapped, True) is hooks.Content.DESTROYED
    assert bench.run(vm, ops.error, mapped, True)
    bench.run(vm, ops.invalidate_start, mapped, hooks.Why.PUNCH)
    assert bench.inside[vm] == []
    bench.run(vm, ops.invalidate_end, mapped, hooks.Why.PUNCH, True)
    assert not bench.run(vm, bench.platform.free, np.array([3, 4])).any()
    kinds = np.array([1], dtype=np.uint8)
    assert bench.run(vm, ops.populate, runs(0x20, 9), kinds, True, page).mapped
    assert bench.run(vm, ops.finalize)
    bench.destroy(vm)
    assert not bench.run(vm, bench.platform.free, np.array([9])).any()


# --- the catalogue and the fidelity page -----------------------------------------------------
def test_every_reason_has_cause_and_remedy() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        package = importlib.import_module(point.module)
        for module in pkgutil.walk_packages(package.__path__, f"{point.module}."):
            importlib.import_module(module.name)
    assert len(REASONS) > 60
    texts = {name: (reason.cause, reason.remedy) for name, reason in REASONS.items()}
    assert [n for n, said in texts.items() if not all(t.strip().endswith(".") for t in said)] == []


@pytest.mark.parametrize("vendor", RULES)
def test_every_rule_is_on_the_fidelity_page_once(vendor: str) -> None:
    rows = build.rule_rows(read(ROOT / "docs" / "fidelity.md"))
    assert [rule for found, rule, _ in rows if found == vendor] == list(range(1, RULES[vendor] + 1))
    assert {state for _, _, state in rows} <= set(build.STATES)


def test_every_left_out_case_is_on_the_fidelity_page() -> None:
    text = read(ROOT / "docs" / "fidelity.md")
    rows = build.rows(build.LEFT_OUT)
    assert rows
    assert [row for row in rows if build.cell(row["case"]) not in text] == []
    assert [row for row in rows if build.cell(row["reason"]) not in text] == []


def test_every_differs_line_is_on_the_fidelity_page() -> None:
    text = read(ROOT / "docs" / "fidelity.md")
    said = sum(len(re.findall(r"\bDiffers:", read(path))) for path in build.sources())
    assert len(build.differences()) == said
    assert all(difference.text in text for difference in build.differences())
