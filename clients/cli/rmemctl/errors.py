"""How failures are told: on stderr, with all that the daemon named, and as an exit code.

Exit codes: 0 done; 1 any other failure; 2 the command line is wrong; 3 nobody answers on the
daemon's socket; 10 + the gRPC code for what the daemon refused (13 invalid argument, 15 not
found, 18 resource exhausted, 19 failed precondition, 20 aborted); 130 interrupted; 141 the
reader of the output has gone.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rmem_client import RmemError

EXIT_GENERAL = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_GRPC = 10
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

# error.facts() has one pair per holder; a list under one label reads better
LABEL_WIDTH = 15


def exit_code(error: RmemError) -> int:
    """Return the exit code of a refusal."""
    from rmem_client import DaemonUnreachable

    if isinstance(error, DaemonUnreachable):
        return EXIT_UNREACHABLE
    number: int = error.code.value[0]
    return EXIT_GRPC + number


def report(error: RmemError, *, as_json: bool) -> None:
    """Print a refusal to stderr: one JSON object, or reason, facts and remedy in lines."""
    if as_json:
        click.echo(json.dumps(error.as_dict(), ensure_ascii=False), err=True)
        return
    errno_name = f" ({error.errno_name})" if error.errno_name else ""
    click.echo(f"{paint('error:', 'red')} {error.reason}{errno_name}: {error.message}", err=True)
    before = ""
    for label, text in [*error.facts(), ("remedy", error.remedy)]:
        if text:
            _line("" if label == before else label, text)
            before = label


def paint(text: str, colour: str) -> str:
    """Colour text for stderr, if that is a terminal and NO_COLOR is not set."""
    if os.environ.get("NO_COLOR") or not sys.stderr.isatty():
        return text
    return click.style(text, fg=colour, bold=True)


def _line(label: str, text: str) -> None:
    """Print a labelled line, wrapped under itself on a terminal."""
    indent = " " * (2 + LABEL_WIDTH)
    width = os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 10_000
    lines = textwrap.wrap(text, max(20, width - len(indent))) or [""]
    click.echo(f"  {label:<{LABEL_WIDTH}}{lines[0]}", err=True)
    for line in lines[1:]:
        click.echo(indent + line, err=True)
