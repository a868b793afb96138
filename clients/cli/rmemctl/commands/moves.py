"""Long jobs that move pages: run to their end and shown; migrate, compact and offline share it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..app import Settings
from ..errors import paint
from ..output import Column, Facts, Part, Table
from ..plain import enum_word
from ..progress import finish
from ..units import count_text, range_text

if TYPE_CHECKING:
    from rmem.v1 import host_pb2, types_pb2
    from rmem_client.operation import Job, Response

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


def run(settings: Settings, started: Job) -> None:
    """Wait for a job that was started, show what it did, and end as it ended."""
    job, interrupted = finish(settings, started)
    show_job(settings, job)
    if interrupted:
        raise click.exceptions.Abort


def show_job(settings: Settings, job: Job) -> None:
    """Show what a job did, and say on stderr if it was cancelled; raise what else ended it."""
    from rmem_client import Cancelled

    if job.response is None:
        job.result()
        return
    reply = job.response
    parts = [*report_parts(reply.report), *summary(reply)]
    settings.out.show(reply, *parts, items=reply.report.runs, names=[job.name])
    if isinstance(job.error, Cancelled):
        told = job.progress
        of_all = f"{told.done_pages} of {count_text(told.total_pages, 'page')} dealt with"
        click.echo(f"{paint('cancelled:', 'yellow')} {of_all}; what is done stays", err=True)


def summary(reply: Response) -> list[str]:
    """Return what a kind of job has to say beside its report."""
    from rmem.v1 import host_pb2

    match reply:
        case host_pb2.CompactResponse():
            return [
                f"free 2 MiB blocks: {reply.free_2m_before} before, {reply.free_2m_after} after; "
                f"{count_text(reply.blocked_2m, 'block')} kept partly used by unmovable pages"
            ]
        case host_pb2.OfflineResponse():
            return [f"{count_text(reply.offline, 'frame')} offline"]
        case _:
            return []


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
