"""``rmemctl job``: long jobs that run in the daemon, whoever started them."""

from __future__ import annotations

import click

from ..app import Group, Settings, pass_settings
from ..output import Column, Table
from ..progress import finish
from ..units import OPERATION
from .moves import show_job

COLUMNS = [
    Column("OPERATION", lambda job: job.name),
    Column("KIND", lambda job: job.kind),
    Column("STATE", lambda job: state(job), words=True),
    Column("DONE", lambda job: str(job.progress.done_pages), right=True),
    Column("OF", lambda job: str(job.progress.total_pages), right=True),
    Column("MOVED", lambda job: str(job.progress.moved), right=True),
    Column("STAYED", lambda job: str(job.progress.refused), right=True),
    Column("TENANT", lambda job: job.progress.tenant or "-"),
]


@click.group(cls=Group)
def job() -> None:
    """Look at long jobs, wait for them, cancel them.

    `migrate`, `compact` and `host offline` run as such, and are found here while they do.
    """


@job.command("list", watchable=True)
@click.option("--running", is_flag=True, help="Only those that are not over.")
@pass_settings
def list_jobs(settings: Settings, running: bool) -> None:
    """List the long jobs that are known, oldest first."""
    jobs = settings.client.jobs.list(False if running else None)
    rows = [as_dict(one) for one in jobs]
    settings.out.show(
        {"operations": rows},
        Table(COLUMNS, jobs, empty="no jobs"),
        items=rows,
        names=[one.name for one in jobs],
    )


@job.command()
@click.argument("operation", type=OPERATION)
@pass_settings
def wait(settings: Settings, operation: str) -> None:
    """Wait until a job is over and show what it did.

    Unlike with the command that started it, Ctrl-C leaves the job alone.
    """
    found, _ = finish(settings, settings.client.jobs.get(operation), ours=False)
    show_job(settings, found)


@job.command()
@click.argument("operation", type=OPERATION)
@pass_settings
def cancel(settings: Settings, operation: str) -> None:
    """Ask a job to stop, wait until it has, and show what it did before."""
    settings.client.jobs.cancel(operation)
    found = settings.client.jobs.wait(operation)
    show_job(settings, found)


def state(job: object) -> str:
    """Say where a job is."""
    from rmem_client import Cancelled

    error = job.error  # type: ignore[attr-defined]
    if not job.done:  # type: ignore[attr-defined]
        return "cancelling" if job.progress.cancelling else "running"  # type: ignore[attr-defined]
    return "done" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"


def as_dict(job: object) -> dict[str, object]:
    """Return a job's state as plain values for JSON; its report is what `job wait` shows."""
    from ..plain import to_plain

    error = job.error  # type: ignore[attr-defined]
    return {
        "name": job.name,  # type: ignore[attr-defined]
        "done": job.done,  # type: ignore[attr-defined]
        "state": state(job),
        "error": None if error is None else error.reason,
        **to_plain(job.progress),  # type: ignore[attr-defined]
    }


COMMANDS = [job]
