"""Why a replay went another way: the two ops tables, the page, who holds it.

Owns the words. They are for people: what programs need of a divergence is in its fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rmemd.engine import onepage
from rmemd.engine.compact import frame_range
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.physical import frame_of_gfn, frame_of_page
from rmemd.errors import RmemError
from rmemd.trace.checkpoint import ops_of
from rmemd.trace.format import Outcome, Trace
from rmemd.trace.operations import short, text_of
from rmemd.trace.player import Changes, Played

WHAT = {
    "outcome": "came to something else",
    "steps": "took another number of steps",
    "writes": "wrote something else, or in another order",
    "revision": "committed another number of transactions",
}
# the counts of a report, in the order in which they are said
COUNTS = ("MOVED", "UNMOVABLE", "BUSY", "FAILED")


def explain(
    trace: Trace, changes: Changes, engine: Engine, played: Played, what: str, one: Any, other: Any
) -> str:
    """Return what differs and why, in lines."""
    assert played.asked is not None
    assert played.end is not None
    lines = [
        f"operation {played.asked.number}, "
        f"{text_of(played.asked.method, played.asked.args)}, {WHAT[what]}"
    ]
    if what == "outcome":
        lines.append(f"  recorded: {said(played.end)}")
        lines.append(f"  replayed: {said(played.came_to)}")
    else:
        lines.append(f"  recorded: {one}")
        lines.append(f"  replayed: {other}")
    with engine.core.locked():
        lines += [f"  {line}" for line in _why(trace, changes, engine.core, played)]
    return "\n".join(lines)


def said(outcome: Outcome) -> str:
    """Return an outcome as people read it."""
    if "refused" in outcome:
        return _refusal(outcome["refused"])
    if "failed" in outcome:
        return f"failed: {outcome['failed']}"
    if "waits" in outcome:
        return f"still waits at step {outcome['waits']!r}"
    result = outcome["ok"]
    report = result.get("report", result) if isinstance(result, dict) else result
    if isinstance(report, dict) and "moves" in report:
        return _report(report)
    return "done" if result is None else short(result)


def _refusal(refused: dict[str, Any]) -> str:
    errno = f" ({refused['errno']})" if refused.get("errno") else ""
    text = f"refused, {refused['reason']}{errno}: {refused.get('message', '')}"
    for name in ("state", "rule", "where"):
        if refused.get(name):
            text += f"; {name}: {refused[name]}"
    if refused.get("holders"):
        text += f"; held by {', '.join(refused['holders'])}"
    return text


def _report(report: dict[str, Any]) -> str:
    counts = dict.fromkeys(COUNTS, 0)
    refusals = []
    for move in report["moves"]:
        counts[move["outcome"]] += sum(n for _, n in move["src"])
        if move["refusal"] is not None and move["refusal"] not in refusals:
            refusals.append(move["refusal"])
    text = ", ".join(f"{n} {name.lower()}" for name, n in counts.items() if n) or "0 pages"
    return "; ".join([text, *map(_refusal, refusals)])


# --- why -----------------------------------------------------------------------------------------
def _why(trace: Trace, changes: Changes, core: Core, played: Played) -> Iterator[str]:
    for vm in sorted(_vms(core, played)):
        if core.vms.exists(vm):
            yield from _tables(trace, changes, core, vm)
    for pfn in sorted(_frames(core, played)):
        yield from _page(core, pfn)


def _tables(trace: Trace, changes: Changes, core: Core, vm: int) -> Iterator[str]:
    """Compare the ops of the consumer that was recorded with those of the one there is now."""
    now = core.vms.get(vm).info.consumer
    recorded = _recorded_consumer(trace, changes, now)
    before = set(trace.header["consumers"].get(recorded, {}).get("ops", ()))
    after = set(ops_of(core.consumers[vm].ops))
    if before == after and recorded == now:
        yield f"vm/{vm} is {now}, with the ops that were recorded"
        return
    yield f"vm/{vm} was {recorded} and is {now} now; the ops that differ:"
    for op in sorted(before ^ after):
        have = ("yes", "NULL") if op in before else ("NULL", "yes")
        yield f"  {op}: {have[0]} in {recorded}, {have[1]} in {now}"
    if before == after:
        yield "  none"


def _recorded_consumer(trace: Trace, changes: Changes, now: str) -> str:
    for name in trace.header["consumers"]:
        if name != now and changes.consumer(name) == now:
            used = (one.args.get("consumer") for one in trace.asked.values())
            if name in used or "checkpoint" in trace.header:
                return str(name)
    return now


def _vms(core: Core, played: Played) -> set[int]:
    assert played.asked is not None
    args = played.asked.args
    found = {args["vm"]} if args.get("vm") else set()
    if args.get("file") and core.files.exists(args["file"]):
        found.add(core.files.get(args["file"]).info.vm)
    for move in _moves(played):
        found.add(move["vm"])
    return found - {0}


def _moves(played: Played) -> list[dict[str, Any]]:
    found = []
    for outcome in (played.end or {}, played.came_to):
        result = outcome.get("ok")
        report = result.get("report", result) if isinstance(result, dict) else None
        if isinstance(report, dict):
            found += report.get("moves", [])
    return found


def _frames(core: Core, played: Played) -> set[int]:
    """Return the frames that the refusals name, recorded and replayed."""
    refusals = [outcome.get("refused") for outcome in (played.end or {}, played.came_to)] + [
        move["refusal"] for move in _moves(played)
    ]
    pages = [_frame(core, played, refused.get("page", "")) for refused in filter(None, refusals)]
    pages += [_guest_frame(core, move["vm"], move["gfns"][0][0]) for move in _moves(played)]
    return {pfn for pfn in pages if pfn is not None}


def _guest_frame(core: Core, vm: int, gfn: int) -> int | None:
    try:
        return frame_of_gfn(core, vm, gfn)
    except RmemError:
        return None


def _frame(core: Core, played: Played, page: str) -> int | None:
    named = re.fullmatch(r"(pfn|gfn|pgoff) (?:0x)?([0-9a-f]+)", page)
    if named is None:
        return None
    kind, number = named[1], int(named[2], 16)
    try:
        return _resolved(core, played, kind, number)
    except (RmemError, KeyError):
        return None


def _resolved(core: Core, played: Played, kind: str, number: int) -> int:
    assert played.asked is not None
    args = played.asked.args
    match kind:
        case "gfn":
            return frame_of_gfn(core, args["vm"], number)
        case "pgoff":
            return frame_of_page(core, args["file"], number)
    return int(frame_range(core, number, 1, "page.pfn")[0])


def _page(core: Core, pfn: int) -> Iterator[str]:
    page = onepage.page(core, pfn)
    said = [page.use.name.lower()]
    if page.vm:
        said.insert(0, f"vm/{page.vm} gfn {page.gfn:#x}")
    if page.vendor_state:
        said.append(page.vendor_state)
    if page.file:
        said.append("mapped" if page.mapped else "not mapped")
        said.append(f"{page.references} references ({page.expected} expected), {page.pins} pins")
    yield f"pfn {pfn:#x} now: {', '.join(said)}"
    for holder in page.holders:
        yield f"  held by {holder}"
