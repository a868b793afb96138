"""Long work: a bar on stderr while it runs, and Ctrl-C that cancels it in order.

Owns the wait for an operation. The bar is drawn from the states that WaitOperation returns, which
blocks in the daemon until the job is over or a moment has passed. Ctrl-C asks the daemon to cancel;
what was done so far is shown like any result, and the exit code is that of an interrupt. A second
one leaves at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .app import Settings

if TYPE_CHECKING:
    from rmem_client.operation import Job

# how often the bar may move; the job's end is seen at once
MOMENT_S = 0.2

Draw = Callable[["Job"], None]


def finish(settings: Settings, job: Job, *, ours: bool = True) -> tuple[Job, bool]:
    """Wait for a job; return it and whether it was interrupted.

    Args:
        settings: give the client.
        job: its state so far.
        ours: whether Ctrl-C cancels it; else it ends only the waiting.
    """
    interrupted = False
    with bar() as draw:
        while not job.done:
            try:
                if draw:
                    draw(job)
                job = settings.client.jobs.wait(job.name, MOMENT_S if draw else None)
            except KeyboardInterrupt:
                if interrupted or not ours:
                    raise
                interrupted = True
                settings.client.jobs.cancel(job.name)
    return job, interrupted


@contextmanager
def bar() -> Iterator[Draw | None]:
    """Give a function that draws a job's progress on stderr; ``None`` without a terminal there."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    plain = None if os.environ.get("NO_COLOR") else "auto"
    console = Console(file=sys.stderr, color_system=plain, highlight=False)  # type: ignore[arg-type]
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("pages"),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    # nothing is drawn but what the daemon told, so no thread draws by itself
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=None, note="", visible=False)

        def draw(job: Job) -> None:
            told = job.progress
            progress.update(
                task, description=told.kind, completed=told.done_pages,
                total=told.total_pages or None, note=_note(job), visible=True, refresh=True,
            )  # fmt: skip

        yield draw


def _note(job: Job) -> str:
    told = job.progress
    if told.cancelling:
        return "cancelling"
    return f"{told.refused} stay" if told.refused else ""
