"""``rmem-vmm scenario``: run scenarios, show what was found, and say by the exit status if it held.

Owns the command and its screen. The daemon is one of its own unless a directory is given.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rmem_client import RmemError

from .channel import ChildFailed
from .daemon import DaemonError, DaemonProcess
from .scenarios.catalogue import SCENARIOS
from .scenarios.report import Report, Scenario, Settings
from .units import SIZE
from .vmm import VmmFailed

WIDTH = 100
HOST_MEMORY = "256M"
NODES = 4


@contextmanager
def daemon(socket_dir: str | None, seed: int) -> Iterator[str]:
    """Give the directory of the daemon to use: the one that is named, or one of its own."""
    if socket_dir is not None:
        yield socket_dir
        return
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "rmemd.log"
        own = DaemonProcess(log, host_memory=HOST_MEMORY, nodes=NODES, seed=seed)
        try:
            own.start()
            yield str(own.socket_dir)
            own.drain()
        finally:
            own.kill()


def chosen(scenario: Scenario, vendors: Sequence[str]) -> tuple[str, ...]:
    """Return the consumers to run with: of vendors, or by their full names."""
    if not vendors:
        return tuple(scenario.consumers.values())
    return tuple(scenario.consumers.get(vendor, vendor) for vendor in vendors)


def run(scenario: Scenario, settings: Settings, vendors: Sequence[str]) -> list[Report]:
    """Run a scenario with each of its consumers.

    Raises:
        ChildFailed: a process of it ended or failed.
        RmemError: the daemon refused what it must not.
    """
    return list(scenario.run(settings, chosen(scenario, vendors)))


def show(console: Console, scenario: Scenario, reports: Sequence[Report]) -> None:
    """Show steps, answers and figures, a column per guest."""
    console.print()
    console.print(Text(scenario.name, style="bold"))
    console.print(Text(scenario.summary, style="dim"))
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", max_width=32)
    for report in reports:
        table.add_column(report.who)
    for what in _ordered(step.what for report in reports for step in report.steps):
        table.add_row(what, *(_answer(report, what) for report in reports))
    table.add_section()
    for name in _ordered(name for report in reports for name in report.figures):
        cells = (str(report.figures.get(name, "–")) for report in reports)
        table.add_row(Text(name, style="dim"), *(Text(cell, style="dim") for cell in cells))
    console.print(table)
    wrong = [(report, step) for report in reports for step in report.steps if not step.ok]
    steps = sum(len(report.steps) for report in reports)
    if not wrong:
        console.print(Text(f"All {steps} steps are as they must be.", style="green"))
    for report, step in wrong:
        wanted = f", not {step.wanted}" if step.wanted else ""
        console.print(Text(f"WRONG: {report.who}: {step.what}: {step.said}{wanted}", style="red"))


def _ordered(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _answer(report: Report, what: str) -> Text:
    for step in report.steps:
        if step.what == what:
            return Text(("✓ " if step.ok else "✗ ") + step.said, style="" if step.ok else "red")
    return Text("–", style="dim")


def as_dict(scenario: Scenario, settings: Settings, reports: Sequence[Report]) -> dict[str, Any]:
    """Return a scenario's outcome for JSON."""
    return {
        "scenario": scenario.name,
        "seed": settings.seed,
        "mock": True,
        "ok": all(report.ok for report in reports),
        "guests": [report.as_dict() for report in reports],
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice([*SCENARIOS, "all"]), metavar="[NAME]...")
@click.option(
    "--vendor", "vendors", multiple=True,
    help="A vendor (tdx, snp, pkvm) or a consumer's full name; may be repeated. Default: all.",
)  # fmt: skip
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of what guests write.")
@click.option(
    "--vcpus", type=click.IntRange(1, 8), default=2, show_default=True, help="Of a storm's guest."
)
@click.option(
    "--conversions", type=click.IntRange(2, 100_000), default=64, show_default=True,
    help="Of one vCPU, in a storm.",
)  # fmt: skip
@click.option(
    "--bytes", "bytes_moved", type=SIZE, default="1G", show_default=True,
    help="That bounce-1g moves to the devices, both guests together.",
)  # fmt: skip
@click.option("--socket-dir", type=click.Path(), help="A daemon's directory; default: its own.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
)
def scenario(
    names: tuple[str, ...],
    vendors: tuple[str, ...],
    seed: int,
    vcpus: int,
    conversions: int,
    bytes_moved: int,
    socket_dir: str | None,
    output: str,
) -> None:
    """Run scenarios on a daemon; exit with 0 if all of it held, else 1.

    Without a NAME they are listed.
    """
    console = Console(highlight=False)
    if not console.is_terminal and console.width < WIDTH:
        console = Console(highlight=False, width=WIDTH)
    if not names:
        return listed(console)
    # the daemon and the children are ended on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    wanted = list(SCENARIOS.values()) if "all" in names else [SCENARIOS[name] for name in names]
    outcomes = []
    try:
        with daemon(socket_dir, seed) as directory:
            for one in wanted:
                settings = Settings(directory, seed, vcpus, conversions, bytes_moved)
                reports = run(one, settings, vendors)
                outcomes.append(as_dict(one, settings, reports))
                if output == "table":
                    show(console, one, reports)
    except (ChildFailed, DaemonError, RmemError, VmmFailed) as error:
        click.echo(f"rmem-vmm scenario: {error}", err=True)
        sys.exit(1)
    if output == "json":
        click.echo(json.dumps(outcomes[0] if len(outcomes) == 1 else outcomes, indent=1))
    sys.exit(0 if all(outcome["ok"] for outcome in outcomes) else 1)


def listed(console: Console) -> None:
    """List the scenarios."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("scenario", no_wrap=True)
    table.add_column("what it shows")
    for one in SCENARIOS.values():
        table.add_row(one.name, one.summary)
    console.print(table)


if __name__ == "__main__":
    scenario()
