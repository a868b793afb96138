"""``rmemctl trace``: recordings of what the daemon is asked; done again by ``rmemd trace``."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..app import Group, Settings, pass_settings
from ..output import Facts
from ..units import SIZE, count_text, size_text

if TYPE_CHECKING:
    from rmem.v1 import trace_pb2

# as shells have it of a command that is not there
EXIT_NOT_FOUND = 127
NOT_HERE = (
    "`rmemd` is not installed here: a trace is done again by the daemon's own package, on an "
    "engine of its own. Install rmemd and the plugins that the trace uses, or copy the file to a "
    "machine that has them and run `rmemd trace {words}` there."
)
TO_WRITE = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.group(cls=Group)
def trace() -> None:
    """Record what the daemon is asked, and do it again."""


@trace.command()
@click.argument("file", type=TO_WRITE)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@click.option("--limit", type=SIZE, default=0, help="At what length it ends [default: 64M].")
@click.option("--state-every", default=0, help="Operations between two digests of the state.")
@pass_settings
def record(
    settings: Settings, file: Path, command: tuple[str, ...], limit: int, state_every: int
) -> None:
    """Record into FILE while COMMAND runs, or until interrupted.

    Private bytes are never in it, only digests. The exit code is the command's.
    """
    traces = settings.client.traces
    # so that a file that cannot be written is known before anything is recorded
    with file.open("wb") as out:
        traces.start(limit_bytes=limit, state_every=state_every)
        try:
            code = _run(command) if command else _until_interrupted()
        finally:
            done = traces.stop()
        for data in traces.export():
            out.write(data)
    click.echo(f"{file}: {text_of(done)}", err=True)
    click.get_current_context().exit(code)


@trace.command()
@click.argument("file", type=TO_WRITE)
@pass_settings
def export(settings: Settings, file: Path) -> None:
    """Write the recording to FILE as far as it is; one that goes on goes on."""
    traces = settings.client.traces
    reply = traces.get()
    with file.open("wb") as out:
        for data in traces.export():
            out.write(data)
    settings.out.show(reply, f"{file}: {text_of(reply.trace)}", names=[str(file)])


@trace.command(watchable=True)
@pass_settings
def show(settings: Settings) -> None:
    """Show how far the recording is."""
    reply = settings.client.traces.get()
    facts: list[tuple[str, Any]] = [
        ("state", state_of(reply.trace)),
        ("operations", str(reply.trace.operations)),
        ("size", f"{size_text(reply.trace.size_bytes)} of {size_text(reply.trace.limit_bytes)}"),
    ]
    settings.out.show(reply, Facts(facts), names=[state_of(reply.trace)])


def _passed_on(name: str, usage: str, text: str) -> None:
    """Add a command that the daemon's package carries out."""

    @trace.command(
        name,
        help=f"{text}\n\nCarried out by `rmemd trace {name}`, without a daemon: see its --help.",
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar=usage)
    def passed_on(args: tuple[str, ...]) -> None:
        click.get_current_context().exit(_rmemd([name, *args]))


_passed_on(
    "replay",
    "FILE [--consumer A=B]... [--variant NAME] [--set KEY=VALUE]... [--keep-going]",
    "Do a recording again; stop where it goes another way, and explain that.",
)
_passed_on("diff", "ONE OTHER", "Say what differs between two recordings.")
_passed_on(
    "shrink",
    "FILE [--to FILE] [--refusal REASON | --violation INVARIANT] [--consumer A=B]...",
    "Leave out of a recording what is not needed to show a divergence, refusal or violation.",
)


def _rmemd(words: Sequence[str]) -> int:
    from rmem_client.daemon_process import NotInstalled, find_command

    try:
        rmemd = find_command()
    except NotInstalled:
        click.echo(f"rmemctl: {NOT_HERE.format(words=' '.join(words))}", err=True)
        return EXIT_NOT_FOUND
    return subprocess.run([rmemd, "trace", *words], check=False).returncode


def _run(command: Sequence[str]) -> int:
    try:
        return subprocess.run(command, check=False).returncode
    except OSError as error:
        click.echo(f"rmemctl: {command[0]}: {error.strerror}", err=True)
        return EXIT_NOT_FOUND


def _until_interrupted() -> int:
    click.echo("recording; Ctrl-C ends it", err=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        return 0
    return 0


def state_of(of: trace_pb2.Trace) -> str:
    """Say whether it goes on, or why it ended."""
    return "recording" if of.recording else of.stopped


def text_of(of: trace_pb2.Trace) -> str:
    """Say how much was recorded."""
    text = f"{count_text(of.operations, 'operation')}, {size_text(of.size_bytes)}"
    return f"{text}, {of.stopped}" if of.stopped not in ("", "stopped") else text


COMMANDS = [trace]
