"""Rewrites the generated sections of docs/*.md: what code, tables and specs say, once.

Owns the text between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``. Run it in ``.venv`` with
all plugins installed: ``python docs/build.py`` writes, ``python docs/build.py --check`` writes
nothing and exits with 1 when a section is out of date.
"""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
SPEC = ROOT / "rmemd" / "hooks" / "spec.py"
NULL_PLUGIN = ROOT / "plugins" / "null" / "rmemd_null" / "__init__.py"
CASES = ROOT / "tests" / "kernel" / "cases.csv"
LEFT_OUT = ROOT / "tests" / "kernel" / "left_out.csv"
MARKER = re.compile(
    r"(?P<begin><!-- begin: (?P<name>[^>]+?) -->\n).*?(?P<end><!-- end: (?P=name) -->)", re.DOTALL
)
# numbers that hooks.md names, and where they are set
CONSTANTS = (
    ("DEADLINE_SECONDS", "rmemd/consumers/guard.py", "seconds that a hook may take"),
    ("RETRIES_MAX", "rmemd/engine/fault.py", "times that a Busy refusal begins a fault again"),
    ("FAULTS_MAX", "rmemd/engine/guestmemory.py", "faults for one access whose verdict is FAULT"),
    ("CHUNK_PAGES", "rmemd/engine/guestmemory.py", "pages of one stretch of guest execution"),
    ("BATCH_PAGES", "rmemd/engine/populate.py", "pages of one populate transaction"),
    ("FAULT_PAGES", "rmemd/engine/populate.py", "pages of one pre-fault transaction"),
    ("BATCH_PAGES", "rmemd/engine/migrate.py", "pages of one migration transaction"),
    ("INLINE_PAGES", "rmemd/engine/core.py", "pages up to which a step moves bytes under the lock"),
)


def relative(path: Path) -> str:
    """Return a path as a link from docs/."""
    return f"../{path.relative_to(ROOT).as_posix()}"


def cell(text: str) -> str:
    """Return text as one table cell."""
    return " ".join(text.split()).replace("|", "\\|")


# --- docstrings ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Difference:
    """What one docstring says after "Differs:"."""

    path: Path
    name: str
    text: str


def _documented(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a module and all that is defined in it."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                yield name, ast.get_docstring(child) or ""
                yield from walk(child, f"{name}.")

    module = ast.parse(path.read_text(encoding="utf-8"))
    yield "(module)", ast.get_docstring(module) or ""
    yield from walk(module, "")


def sources() -> list[Path]:
    """Return the modules whose docstrings are collected."""
    found = [*ROOT.glob("rmemd/**/*.py"), *ROOT.glob("plugins/*/rmemd_*/**/*.py")]
    return sorted(found)


def differences() -> list[Difference]:
    """Return every "Differs:" of every docstring: each goes on to the end of its paragraph."""
    found = []
    for path in sources():
        for name, text in _documented(path):
            for paragraph in re.split(r"\n\s*\n", text):
                for part in paragraph.split("Differs:")[1:]:
                    said = re.split(r"\bSource:", part)[0]
                    found.append(Difference(path, name, cell(said)))
    return found


def differs_section() -> str:
    """List the "Differs:" lines."""
    lines = ["| Module | Where | Differs |", "|---|---|---|"]
    for difference in differences():
        shown = difference.path.relative_to(ROOT).as_posix()
        link = f"[{shown}]({relative(difference.path)})"
        lines.append(f"| {link} | `{difference.name}` | {difference.text} |")
    return "\n".join(lines)


# --- kernel cases --------------------------------------------------------------------------------
def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def left_out_section() -> str:
    """List the kernel's cases that are left out, each with its reason."""
    cases, left = rows(CASES), rows(LEFT_OUT)
    lines = [
        f"Of the {len(cases)} cases of [cases.csv]({relative(CASES)}), "
        f"{len(cases) - len(left)} run and {len(left)} are left out "
        f"([left_out.csv]({relative(LEFT_OUT)})).",
        "",
        "| Kernel file | Test | Case | Reason |",
        "|---|---|---|---|",
    ]
    for row in left:
        columns = (cell(row[name]) for name in ("file", "test", "case", "reason"))
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


# --- the rule tables -----------------------------------------------------------------------------
STATES = ("modelled", "approximated", "absent")
RULE_ROW = re.compile(r"^\| (?P<vendor>TDX|SNP|pKVM) (?P<rule>\d+) \|[^|]*\| (?P<state>\w+) \|")


def rule_rows(text: str) -> list[tuple[str, int, str]]:
    """Return (vendor, rule number, state) of every row of the rule tables, in their order."""
    found = filter(None, map(RULE_ROW.match, text.splitlines()))
    return [(row["vendor"], int(row["rule"]), row["state"]) for row in found]


def counts_section() -> str:
    """Count the rules by vendor and state."""
    found = rule_rows((DOCS / "fidelity.md").read_text(encoding="utf-8"))
    lines = ["| Vendor | Modelled | Approximated | Absent |", "|---|---|---|---|"]
    for vendor in dict.fromkeys(vendor for vendor, _, _ in found):
        states = [state for name, _, state in found if name == vendor]
        lines.append(f"| {vendor} | {' | '.join(str(states.count(s)) for s in STATES)} |")
    return "\n".join(lines)


# --- the spec ------------------------------------------------------------------------------------
def spec_functions(cls: str) -> dict[str, ast.FunctionDef]:
    """Return the hooks that ``ConsumerSpec`` or ``PlatformSpec`` declares, in their order."""
    module = ast.parse(SPEC.read_text(encoding="utf-8"))
    body = next(n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name == cls)
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def heading(function: ast.FunctionDef) -> str:
    """Return the heading of a hook: its name and arguments, without ``self``."""
    arguments = [argument.arg for argument in function.args.args[1:]]
    return f"{function.name}({', '.join(arguments)})"


def _signature(function: ast.FunctionDef) -> str:
    arguments = [
        f"{a.arg}: {ast.unparse(a.annotation)}" if a.annotation else a.arg
        for a in function.args.args
    ]
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    line = f"def {function.name}({', '.join(arguments)}){returns}: ..."
    if len(line) > 100:
        line = f"def {function.name}(\n    {', '.join(arguments)}\n){returns}: ..."
    return line


def signature_section(cls: str) -> Callable[[str], str]:
    """Return a maker of one hook's signature and the spec's own words on it."""
    functions = spec_functions(cls)

    def section(op: str) -> str:
        said = ast.get_docstring(functions[op]) or ""
        quoted = "\n".join(f"> {line}".rstrip() for line in said.splitlines())
        return f"```python\n{_signature(functions[op])}\n```\n\n{quoted}"

    return section


def constants_section() -> str:
    """List the numbers that the engine goes by."""
    lines = ["| Constant | Value | Module | Meaning |", "|---|---|---|---|"]
    for name, where, meaning in CONSTANTS:
        module = ast.parse((ROOT / where).read_text(encoding="utf-8"))
        value = next(
            ast.unparse(node.value)
            for node in module.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
        )
        lines.append(f"| `{name}` | {value} | [{where}](../{where}) | {meaning} |")
    return "\n".join(lines)


# --- the installed plugins -----------------------------------------------------------------------
def ops_section() -> str:
    """Show the ops tables of the repository's own variants, as registration compiles them."""
    from rmemd.hooks.spec import ENTRY_POINTS
    from rmemd.testing.hookbench import HookBench

    tables: dict[str, dict[str, bool]] = {}
    ours = {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        if point.name not in ours:
            continue
        bench = HookBench(point.load()(), point.name)
        for variant in bench.platform.variants():
            vm = bench.make_vm(variant.name, variant.options)
            tables[variant.name] = bench.ops(vm).implemented()
    names = list(tables)
    lines = [f"| Op | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for op in next(iter(tables.values())):
        marks = ("yes" if tables[name][op] else "NULL" for name in names)
        lines.append(f"| `{op}` | {' | '.join(marks)} |")
    return "\n".join(lines)


def null_plugin_section() -> str:
    """Quote the minimal plugin."""
    code = NULL_PLUGIN.read_text(encoding="utf-8").rstrip()
    return f"```python\n{code}\n```"


def null_project_section() -> str:
    """Quote how the minimal plugin is packaged."""
    code = (NULL_PLUGIN.parents[1] / "pyproject.toml").read_text(encoding="utf-8").rstrip()
    return f"```toml\n{code}\n```"


# --- configuration.md ----------------------------------------------------------------------------
def configuration_section() -> str:
    """Return every key of the configuration, a table a section."""
    from rmemd.daemon.configshow import documentation

    return f"\n{documentation()}"


# --- traces.md -----------------------------------------------------------------------------------
def recorded_example() -> bytes:
    """Record a guest whose page somebody wants to move, and return the file."""
    from rmemd.consumers.guard import Guard
    from rmemd.engine.core import Options
    from rmemd.engine.engine import Engine
    from rmemd.trace.recorder import Recorder

    engine = Engine(Options(nframes=512), Guard(clock=lambda: 0.0))
    recorder = Recorder(engine, key=b"a key that nobody knows, but for the example's")
    recorder.start()
    vm = engine.create_vm("tdx-today").info.vm
    file = engine.create_file(vm, 4 << 12).info.file
    engine.set_memory_region(vm, 0, 4, 0, 4 << 12, file)
    engine.create_vcpu(vm, 0)
    engine.populate(vm, 0, b"a guest's first page".ljust(1 << 12, b"."))
    engine.migrate(engine.core.files.get(file).frames.slice(0, 1) - 1)
    recorder.stop()
    data = recorder.sink.read(0, recorder.sink.size)
    recorder.sink.close()
    engine.close()
    return data


def trace_section() -> str:
    """Show the lines of the example; what is long and says nothing new is left out."""
    lines = [json.loads(line) for line in recorded_example().splitlines()]
    header = lines[0]
    used = {name: one for name, one in header["consumers"].items() if name == "tdx-today"}
    header |= {"consumers": used | {"…": "…"}, "plugins": [*header["plugins"][-1:], "…"]}
    for line in lines:
        # digests are other ones with every table and every write that is added
        line |= {key: "…" for key in ("state", "writes") if key in line}
        if "tables" in line:
            line["tables"] = {"…": "…"}
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    return f"```json\n{text}\n```"


def replay_section() -> str:
    """Show what a replay of the example under another variant says."""
    from rmemd.trace.format import read
    from rmemd.trace.player import Changes
    from rmemd.trace.replayer import replay

    done = replay(read(io.BytesIO(recorded_example())), Changes({"tdx-today": "tdx-relocate"}))
    command = "$ rmemctl trace replay example.jsonl --consumer tdx-today=tdx-relocate"
    text = "\n".join([command, *(divergence.text for divergence in done.divergences)])
    return f"```\n{text}\n```"


def trace_operations_section() -> str:
    """List the methods that are recorded, with their arguments."""
    from rmemd.trace.operations import AT_ONCE, NOT_SAID, OPERATIONS, signature

    lines = []
    for name in (*OPERATIONS, *AT_ONCE):
        said = [f"`{one}`" for one in signature(name).parameters if one not in NOT_SAID]
        lines.append(f"- `{name}`: {', '.join(said)}")
    return "\n".join(lines)


# --- performance.md ------------------------------------------------------------------------------
def figures_section() -> str:
    """Return every figure of the published run: those that have a bar, then those that have not."""
    figures = [json.loads(line) for line in (DOCS / "bench.jsonl").read_text().splitlines()]
    with_bar = [one for one in figures if one["bar"] is not None]
    lines = ["", "| goal | ratio | least to most | bar | holds |", "|---|---|---|---|---|"]
    for one in with_bar:
        sign = "≥" if one["unit"].endswith("/s") else "≤"
        lines.append(
            f"| {cell(one['goal'])} | {_ratio(one)} | {_spread(one)} "
            f"| {sign} {one['bar']:.3g} | {'yes' if one['holds'] else '**no**'} |"
        )
    lines += ["", "Without a bar, beside the same floors:", ""]
    lines += ["| figure | ratio | least to most |", "|---|---|---|"]
    lines += [
        f"| {cell(one['goal'])} | {_ratio(one)} | {_spread(one)} |"
        for one in figures
        if one["bar"] is None
    ]
    return "\n".join(lines)


def _ratio(figure: dict[str, float]) -> str:
    return _short(figure["ratio_median"])


def _spread(figure: dict[str, float]) -> str:
    return f"{_short(figure['ratio_min'])} to {_short(figure['ratio_max'])}"


def _short(ratio: float) -> str:
    # no "-0"
    return f"{ratio:,.0f}" if ratio >= 1000 else f"{round(ratio, 3) + 0.0:.3g}"


# --- writing -------------------------------------------------------------------------------------
def makers() -> dict[str, Callable[[], str]]:
    """Return what makes each section, by its name."""
    found: dict[str, Callable[[], str]] = {
        "differs": differs_section,
        "kernel-left-out": left_out_section,
        "rule-counts": counts_section,
        "constants": constants_section,
        "ops-by-variant": ops_section,
        "null-plugin": null_plugin_section,
        "null-pyproject": null_project_section,
        "configuration": configuration_section,
        "trace-example": trace_section,
        "trace-replay": replay_section,
        "trace-operations": trace_operations_section,
        "figures": figures_section,
    }
    for cls in ("ConsumerSpec", "PlatformSpec"):
        section = signature_section(cls)
        for op in spec_functions(cls):
            found[f"op {op}"] = lambda op=op, section=section: section(op)  # type: ignore[misc]
    return found


def rebuilt(text: str) -> str:
    """Return a document with its generated sections made anew.

    Raises:
        KeyError: a section has a name that nothing makes.
    """
    known = makers()

    def make(found: re.Match[str]) -> str:
        return f"{found['begin']}{known[found['name']]()}\n{found['end']}"

    return MARKER.sub(make, text)


def documents() -> list[Path]:
    """Return the documents that may hold generated sections."""
    return sorted(DOCS.glob("*.md"))


def main() -> int:
    """Rewrite, or check, every document; return the exit status."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check = parser.parse_args().check
    stale = []
    for path in documents():
        old = path.read_text(encoding="utf-8")
        new = rebuilt(old)
        if old != new:
            stale.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'rewrote'}: {', '.join(stale)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
