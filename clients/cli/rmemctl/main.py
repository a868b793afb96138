"""The entry point: the root command, and what becomes of everything that can go wrong.

``run`` is ``main`` without the exit, for tests and for embedding.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from . import errors
from .app import Group, Settings, global_options
from .commands import (
    completion,
    consumers,
    explain,
    fault,
    graph,
    host,
    jobs,
    ledger,
    mem,
    operations,
    page,
    sessions,
    trace,
    vm,
    watch,
)

EPILOG = """\b
Addresses and sizes:  4096, 0x1000, 4K, 2M, 1G, 1T.
Page ranges:          START, START+COUNT or START-END (END not included), in pages.
Handles:              3 or vm/3.
The options above may also follow a command.

\b
Exit codes:  0 done, 1 failure, 2 wrong command line, 3 daemon unreachable,
             10 + gRPC code for what the daemon refused (19: failed precondition).
"""


@click.group(
    cls=Group,
    params=global_options(),
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="rmemctl", message="%(prog)s %(version)s")
def cli() -> None:
    """Look at rmemd's hosts, VMs, restricted files and pages, and change them."""


MODULES = (
    host, vm, mem, page, ledger, consumers, jobs, operations, sessions, fault, trace, watch,
    explain, completion,
)  # fmt: skip
# registers itself with the group that it belongs to
assert graph.COMMANDS

for module in MODULES:
    for command in module.COMMANDS:
        cli.add_command(command)


def run(args: Sequence[str]) -> int:
    """Run a command line and return the exit code."""
    settings = Settings()
    try:
        code = cli.main(args=list(args), prog_name="rmemctl", obj=settings, standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except SystemExit as end:
        if completion.VARIABLE in os.environ:
            return int(end.code or 0)
        # what click makes of a reader that has gone
        return errors.EXIT_BROKEN_PIPE
    except click.exceptions.Abort:  # what click makes of Ctrl-C
        return errors.EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:  # the same, at our own flush
        _drop_stdout()
        return errors.EXIT_BROKEN_PIPE
    except OSError as error:
        click.echo(f"{errors.paint('error:', 'red')} {error}", err=True)
        return errors.EXIT_GENERAL
    except Exception as error:
        return _refused(error, settings)
    finally:
        settings.close()


def _refused(error: Exception, settings: Settings) -> int:
    """Report what the daemon refused; what is no refusal is a bug, and shows its traceback."""
    from rmem_client import RmemError

    if not isinstance(error, RmemError):
        raise error
    errors.report(error, as_json=settings.output in ("json", "jsonl"))
    return errors.exit_code(error)


def _drop_stdout() -> None:
    """Point stdout nowhere, so that the interpreter's last flush does not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))
