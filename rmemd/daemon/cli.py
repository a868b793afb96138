"""The command ``rmemd``: options, signals, exit codes.

Owns the command line. Exit codes: 2 usage, as click's programs have it; then those of sysexits: 73
cannot create, 75 another daemon serves the directory, 77 unsafe directory.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

from rmemd.daemon import logs
from rmemd.daemon.sockets import AlreadyServed, UnsafeDirectory, default_socket_dir

EX_CANTCREAT, EX_TEMPFAIL, EX_NOPERM = 73, 75, 77
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MEMORY_MAX = 1 << 44


class Size(click.ParamType[int]):
    """A number of bytes, with K, M, G or T."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the bytes."""
        match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a size such as 16G", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rmemd")
def main() -> None:
    """rmemd, a plugin-based mock hypervisor daemon: no hardware isolation."""


@main.command()
@click.option(
    "--socket-dir", type=click.Path(path_type=Path), help="Private directory to serve in."
)
@click.option("--ready-fd", type=int, help="Descriptor that gets a line once the daemon serves.")
@click.option(
    "--host-memory", type=Size(), default="16G", show_default=True, help="Mock host memory."
)
@click.option(
    "--nodes", type=click.IntRange(1, 64), default=1, show_default=True, help="NUMA nodes."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of every key.")
@click.option(
    "--linux-release", type=click.Choice(["6.18", "7.2"]), default="6.18", show_default=True,
    help="Whose errno to give where releases differ.",
)  # fmt: skip
@click.option(
    "--hook-deadline", type=click.FloatRange(min=0.001), default=2.0, show_default=True,
    help="Seconds after which a hook freezes its VM.",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(list(logs.LEVELS)), default="info", show_default=True
)
@click.option("--log-json/--log-console", default=None, help="Default: console on a tty.")
def serve(
    socket_dir: Path | None,
    ready_fd: int | None,
    host_memory: int,
    nodes: int,
    seed: int,
    linux_release: str,
    hook_deadline: float,
    log_level: str,
    log_json: bool | None,
) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends at once."""
    # Start-up only adds objects, and all of them stay: nothing to collect now, nor to go over later
    gc.disable()
    # imported here, so that --help is answered without NumPy and gRPC
    from rmemd.units import PAGE_SIZE, PMD_PAGES

    if not nodes * PMD_PAGES * PAGE_SIZE <= host_memory <= MEMORY_MAX:
        raise click.UsageError("--host-memory is 2M a node at least, and 16T at most")
    if not -(1 << 63) <= seed < 1 << 63:
        raise click.UsageError("--seed is a 64-bit number")
    # nobody else's: directories that are made first, then the socket and the lock
    os.umask(0o077)
    logs.configure(log_level, log_json)
    from rmemd.daemon.app import Daemon, Settings

    settings = Settings(
        socket_dir or default_socket_dir(), host_memory, nodes, seed, linux_release, hook_deadline
    )
    try:
        daemon = Daemon(settings)
        os.umask(0o177)
        _on_signals(daemon.stop, daemon.wakeup_fd)
        daemon.start(ready_fd)
    except AlreadyServed as error:
        _fail(error, EX_TEMPFAIL)
    except UnsafeDirectory as error:
        _fail(error, EX_NOPERM)
    except (OSError, RuntimeError) as error:
        _fail(error, EX_CANTCREAT)
    else:
        gc.freeze()
        gc.enable()
        daemon.wait()


def _on_signals(stop: Callable[[], None], wakeup_fd: int) -> None:
    def handle(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        stop()

    signal.set_wakeup_fd(wakeup_fd)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _fail(error: Exception, code: int) -> None:
    click.echo(f"rmemd: {error}", err=True)
    sys.exit(code)
