"""How a report of moved pages is shown; migrate, compact and offline share it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..output import Column, Facts, Part, Table
from ..plain import enum_word
from ..units import count_text, range_text

if TYPE_CHECKING:
    from rmem.v1 import host_pb2, types_pb2

COLUMNS = [
    Column("FROM PFN", lambda run: range_text(run.src_pfn, run.npages)),
    Column("TO PFN", lambda run: "-" if run.dst_pfn < 0 else f"{run.dst_pfn:#x}"),
    Column("PAGES", lambda run: str(run.npages), right=True),
    Column("VM", lambda run: f"vm/{run.vm}" if run.vm else "-"),
    Column("GFN", lambda run: "-" if run.gfn < 0 else f"{run.gfn:#x}"),
    Column("OUTCOME", lambda run: enum_word(run, "outcome"), words=True),
    Column("WHY", lambda run: run.refusal.reason or "-"),
    Column("HELD BY", lambda run: holders_text(run.refusal.holders) or "-", wrap=True),
]

TOTALS = ["moved", "unmovable", "busy", "failed"]


def report_parts(report: host_pb2.MoveReport) -> list[Part]:
    """Return a report as a table of runs, what to try per reason, and the totals."""
    totals = ", ".join(f"{getattr(report, name)} {name}" for name in TOTALS)
    if report.left_off_runs:
        totals += f"; {report.left_off_runs} more runs are not listed"
    return [Table(COLUMNS, report.runs), Facts(remedies(report)), f"pages: {totals}"]


def remedies(report: host_pb2.MoveReport) -> list[tuple[str, str]]:
    """Return each reason once, with what to try."""
    said = (run.refusal for run in report.runs if run.refusal.remedy)
    return list({refusal.reason: refusal.remedy for refusal in said}.items())


def holders_text(holders: list[types_pb2.Holder]) -> str:
    """Name who keeps a page and why."""
    return ", ".join(holder_text(holder) for holder in holders)


def holder_text(holder: types_pb2.Holder) -> str:
    """Name one holder: "vm/3 (secure EPT: 1 reference)"."""
    what = count_text(holder.count, "long-term pin" if holder.longterm else "reference")
    return f"{holder.name} ({holder.purpose}: {what})"
