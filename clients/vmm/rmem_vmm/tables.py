"""The demo's tables, for a terminal of 100 columns.

Owns how figures look; it computes none. Each table is a title, a sentence or two that say how to
read it, and the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .argument import Answer, Argued, Count
from .fragmentation import Compacted

GOOD, BAD, WARN, QUIET = "green", "red", "yellow", "dim"
OUTCOMES = {"moved": GOOD, "unmovable": BAD, "busy": WARN, "failed": BAD, "mixed": WARN}
# pkvm.md §7 numbers the steps; the last is the file's last reference
STEP_HEADS = {
    "present": "0\npresent",
    "lookup": "1\nlookup",
    "lost race": "2 lost\nrace",
    "installed": "3 in-\nstalled",
    "released": "4 re-\nleased",
    "migrate": "5\nmigrate",
    "zap": "6\nzap",
    "removal fails": "6' zap\nfails",
    "teardown": "7 VM\ngone",
    "closed": "file\nclosed",
}
BAR_WIDTH = 10


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def _titled(title: str, how_to_read: str, table: Table) -> RenderableType:
    head = Text(title, style="bold")
    return Group(Text(), head, Text(how_to_read, style=QUIET), Text(), table)


def guests_table(runs: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Show what VMM processes reported of their guests."""
    table = _table()
    table.add_column("consumer", no_wrap=True)
    table.add_column("firmware", min_width=19)
    table.add_column("measured\nas", no_wrap=True)
    for head in ("pub-\nlished", "pages\nmoved", "un-\nmovable", "pages\nchecked", "wrong",
                 "hyper-\ncalls", "memory\nfaults"):  # fmt: skip
        table.add_column(head, justify="right", no_wrap=True)
    for run in runs:
        exits, measurement = run["exits"], run["measurement"]
        table.add_row(
            run["consumer"], run["way"],
            Text(f"{measurement[:8]}…") if measurement else Text("–", style=QUIET),
            str(run["published_pages"]), _number(run["moved"], GOOD),
            _number(run["unmovable"], BAD), str(run["checked_pages"]),
            _wrong(run["mismatched_pages"]),
            *(Text(str(exits.get(name, 0)), style=QUIET)
              for name in ("HYPERCALL", "MEMORY_FAULT")),
        )  # fmt: skip
    return _titled(
        "What the guests and their VMMs checked",
        "Each VMM is a process, with one more per vCPU. Published pages: copied by the guest from "
        "private to shared memory and compared by its VMM, the firmware among them. Checked "
        "pages: compared by the guest with what it wrote, while migrate was asked. On the right, "
        "exits that its processes handled.",
        table,
    )


def steps_table(rows: Sequence[Argued]) -> RenderableType:
    """Show references and pins at each step of pkvm.md §7."""
    table = _table()
    table.add_column("consumer", no_wrap=True)
    for head in STEP_HEADS.values():
        table.add_column(head, justify="right", no_wrap=True, min_width=5)
    for row in rows:
        table.add_row(row.consumer, *(_count(row.steps.get(step)) for step in STEP_HEADS))
    return _titled(
        "The argument, 1: who holds a page, step by step (as pkvm.md §7 numbers them)",
        "References on one page, the page cache's own included; +1p: a long-term pin, which "
        "get_user_pages counts as 1024 references. *: refused, the page stays the guest's. L: the "
        "vendor did not give the frame back, it is leaked. ·: no vendor, so nothing can fail.",
        table,
    )


def _count(count: Count | None) -> Text:
    if count is None:
        return Text("·", style=QUIET)
    if count.use == "leaked":
        return Text(f"{count} L", style=BAD)
    refused = "*" if count.refused else ""
    if count.pins or count.references > 2:
        return Text(f"{count}{refused}", style=WARN)
    return Text(f"{count}{refused}", style="" if count.references > 1 else QUIET)


def answers_table(rows: Sequence[Argued]) -> RenderableType:
    """Show what migrate answered and whom it named."""
    table = _table()
    table.add_column("consumer", no_wrap=True)
    table.add_column("migrate_\nfolio", no_wrap=True)
    table.add_column("held while\nmapped", no_wrap=True)
    table.add_column("migrate answered,\nand whom it named", no_wrap=True)
    table.add_column("bytes\nintact", justify="right", no_wrap=True)
    table.add_column("while a device\npins, and after", no_wrap=True)
    for row in rows:
        table.add_row(
            row.consumer, _has(row), _holds(row), _answer(row.migrate),
            Text(f"{row.survived_pages}/{row.checked_pages}",
                 style=BAD if row.mismatched_pages else GOOD),
            _device(row),
        )  # fmt: skip
    return _titled(
        "The argument, 2: what migrate answered, and whom it named",
        "NULL: the ops table has no migrate_folio. Ordinary memory (gup) moves by invalidation and "
        "needs none. On the right, shared pages that a device has pinned for DMA: busy names the "
        "device. In place, one folio is private or shared, so the hook governs both.",
        table,
    )


def _has(row: Argued) -> Text:
    if "migrate_folio" in row.ops:
        return Text("yes", style=GOOD)
    return Text("NULL", style=BAD if row.private_memory else QUIET)


def _holds(row: Argued) -> Text:
    if not row.holds:
        return Text("nothing", style=QUIET)
    # "vm/5: 1 long-term pin (protected guest)": the VM is the row's own
    lines = [who.partition(": ")[2].rstrip(")").replace(" (", "\n") for who in row.holds]
    return Text("\n".join(lines), style=WARN)


def _answer(answer: Answer) -> Text:
    text = Text(f"{answer.asked} {answer.outcome}", style=OUTCOMES[answer.outcome])
    if answer.errno:
        text.append(f" ({answer.errno})", style=QUIET)
    for who in answer.named:
        text.append(f"\n{who}", style=QUIET)
    return text


def _device(row: Argued) -> Text:
    text = Text(row.held.outcome, style=OUTCOMES[row.held.outcome])
    if row.let_go.outcome != row.held.outcome:
        text.append(", ", style=QUIET)
        text.append(row.let_go.outcome, style=OUTCOMES[row.let_go.outcome])
    if row.held.busy:
        text.append("\n" + row.held.named[0].partition(":")[0], style=QUIET)
    return text


def compaction_table(rows: Sequence[Compacted]) -> RenderableType:
    """Show the 2 MiB blocks that compaction regained."""
    table = _table()
    table.add_column("guests on the node", no_wrap=True)
    for head in ("free\nbefore", "free\nafter", "regained", "kept by\nNULL", "pages\nmoved",
                 "pages un-\nmovable", "pages\nintact"):  # fmt: skip
        table.add_column(head, justify="right", no_wrap=True)
    for one in rows:
        intact = one.checked_pages - one.mismatched_pages
        table.add_row(
            one.label, str(one.free_before), str(one.free_after),
            Text(f"{one.regained} {_bar(one)}", style=GOOD if one.regained else BAD),
            _number(one.blocked, BAD), _number(one.moved, GOOD), _number(one.unmovable, BAD),
            Text(f"{intact}/{one.checked_pages}", style=BAD if one.mismatched_pages else GOOD),
        )  # fmt: skip
    return _titled(
        "The argument, 3: 2 MiB blocks regained by compaction at half-free fragmentation",
        f"One node of {rows[0].blocks} blocks, of each of which a random half is guest pages: at "
        f"best half of the blocks can be regained (a full bar). Kept by NULL: blocks that hold a "
        f"page without migrate_folio. Intact: pages that the guests checked afterwards.",
        table,
    )


def _bar(one: Compacted) -> str:
    full = round(BAR_WIDTH * one.regained / max(one.blocks / 2, 1))
    return "█" * full + "░" * (BAR_WIDTH - full)


def load_table(runs: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Show migration under load."""
    table = _table()
    table.add_column("consumer", no_wrap=True)
    for head in ("moves", "pages\nmoved", "stayed", "check\nrounds", "pages\nchecked", "wrong"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("why they stayed", no_wrap=True)
    for run in runs:
        table.add_row(
            run["consumer"], str(run["moves"]), _number(run["moved"], GOOD),
            _number(run["busy"] + run["failed"], WARN), str(run["rounds"]),
            str(run["checked_pages"]), _wrong(run["mismatched_pages"]),
            Text(run["refusal"] or "–", style=QUIET),
        )  # fmt: skip
    return _titled(
        "Migration under load, for every variant whose pages can move",
        "A vCPU's process checks its memory round after round while all of it moves from node to "
        "node. Pages that stayed are where they were, whole, and are asked again in the next move.",
        table,
    )


def _wrong(count: int) -> Text:
    return Text(str(count), style=BAD if count else GOOD)


def _number(value: int, style: str) -> Text:
    return Text(str(value), style=style if value else QUIET)
