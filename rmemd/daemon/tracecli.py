"""``rmemd trace``: traces done again, compared and shrunk, without a daemon.

Owns the commands. Exit codes: 0 if nothing diverges or differs, 1 if something does, 65 (sysexits:
data) for a file that is no trace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from rmemd.trace.format import Trace
    from rmemd.trace.player import Changes

EX_DIFFERS, EX_DATAERR = 1, 65
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
# options of the engine that --set takes; what begins with "config." is a VM's consumer's
OPTIONS = {"frames": "nframes", "nodes": "nnodes", "seed": "seed", "inline_pages": "inline_pages"}
LINUX_RELEASE, CONFIG = "linux_release", "config."


@click.group()
def trace() -> None:
    """Do recordings again, here and without a daemon: docs/traces.md."""


def _changes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say what is to be other than it was."""
    for option in (
        click.option(
            "--set", "sets", multiple=True, metavar="KEY=VALUE",
            help="Another option: linux_release, frames, nodes, seed, inline_pages, or "
            "config.OPTION of every VM's consumer; repeatable.",
        ),
        click.option("--variant", metavar="NAME", help="Another consumer for every VM."),
        click.option(
            "--consumer", "consumers", multiple=True, metavar="A=B",
            help="Consumer B where A was recorded; repeatable.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@trace.command()
@click.argument("file", type=FILE)
@_changes
@click.option("--keep-going", is_flag=True, help="List all divergences, not the first alone.")
def replay(file: Path, keep_going: bool, **changes: Any) -> None:
    """Do FILE's operations again, interleaved as they were; stop where they go another way."""
    from rmemd.trace.format import TraceError
    from rmemd.trace.replayer import replay as again

    read = _read(file)
    try:
        done = again(read, _wanted(**changes), keep_going)
    except TraceError as error:
        _fail(error)
    for divergence in done.divergences:
        click.echo(divergence.text)
    click.echo(
        f"{done.operations} operations, {done.states} states compared, "
        f"{done.unfinished} without an end, {len(done.divergences)} divergences"
        + (f"; state {done.digest}" if done.digest else "")
    )
    sys.exit(EX_DIFFERS if done.divergences else 0)


@trace.command()
@click.argument("one", type=FILE)
@click.argument("other", type=FILE)
def diff(one: Path, other: Path) -> None:
    """Say what differs between two traces: what was asked, what came of it, in which turns."""
    from rmemd.trace.differ import diff as differences

    found = differences(_read(one), _read(other))
    for difference in found:
        click.echo(difference.text)
    click.echo(f"{len(found)} differences")
    sys.exit(EX_DIFFERS if found else 0)


@trace.command()
@click.argument("file", type=FILE)
@click.option(
    "--to", "output", type=click.Path(path_type=Path), help="Where to write what is left."
)
@click.option("--refusal", metavar="REASON", help="Keep what shows this refusal.")
@click.option(
    "--violation", metavar="INVARIANT", help='Keep what violates it, as in I7; "any" for any.'
)
@_changes
def shrink(
    file: Path, output: Path | None, refusal: str | None, violation: str | None, **changes: Any
) -> None:
    """Leave out of FILE what is not needed; without an option, for the first divergence."""
    from rmemd.trace import shrinker
    from rmemd.trace.format import TraceError
    from rmemd.trace.operations import text_of

    if refusal and violation:
        raise click.UsageError("--refusal and --violation are two questions: ask one")
    read, wanted = _read(file), _wanted(**changes)
    try:
        if refusal:
            shows = shrinker.refusal(refusal, wanted)
        elif violation:
            shows = shrinker.violation("" if violation == "any" else violation, wanted)
        else:
            shows = shrinker.divergence(read, wanted)
        done = shrinker.shrink(read, shows)
    except TraceError as error:
        _fail(error)
    for asked in done.trace.asked.values():
        click.echo(f"{asked.number}: {text_of(asked.method, asked.args)}")
    click.echo(f"{len(done.trace.asked)} of {done.before} operations, in {done.runs} runs")
    if output is not None:
        output.write_bytes(done.trace.dump())


def _read(file: Path) -> Trace:
    from rmemd.trace.format import TraceError, read

    try:
        with file.open("rb") as lines:
            found = read(lines)
    except TraceError as error:
        _fail(error, file)
    if found.truncated:
        click.echo(f"rmemd: {file}: the end is missing; what is there counts", err=True)
    return found


def _wanted(consumers: tuple[str, ...], variant: str | None, sets: tuple[str, ...]) -> Changes:
    from rmemd.trace.checkpoint import LINUX_RELEASES
    from rmemd.trace.player import Changes

    instead = dict(_pair(one, "--consumer") for one in consumers)
    if variant:
        instead["*"] = variant
    config, options = {}, {}
    for key, value in (_pair(one, "--set") for one in sets):
        if key.startswith(CONFIG):
            config[key.removeprefix(CONFIG)] = value
        elif key == LINUX_RELEASE and value in LINUX_RELEASES:
            options["binding_overlap_errno"] = LINUX_RELEASES[value]
        elif key in OPTIONS and value.isdecimal():
            options[OPTIONS[key]] = int(value)
        else:
            raise click.UsageError(f"--set {key}={value}: no such option, or no such value")
    return Changes(instead, config, options)


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise click.UsageError(f"{option} {text}: it must be as in A=B")
    return key, value


def _fail(error: Exception, file: Path | None = None) -> NoReturn:
    click.echo(f"rmemd: {f'{file}: ' if file is not None else ''}{error}", err=True)
    sys.exit(EX_DATAERR)
