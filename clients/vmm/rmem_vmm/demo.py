"""The demo (``rmem-demo``, ``make demo``): the argument of 2022, run and answered.

Owns the order of things: a daemon of its own, one VMM per vendor at once on the same firmware,
then every consumer variant that the daemon has: its references, migrate's answer, compaction, and
migration under load. Every figure is from a reply of the daemon; what must hold is checked, and
the exit status says whether it did.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from rmem.v1 import consumer_pb2, host_pb2
from rmem_client import Client, RmemError

from . import firmware as firmwares
from . import fleet, pagemap, tables, verdict
from .argument import Argued, argue
from .daemon import DaemonError, DaemonProcess
from .firmware import Firmware, FirmwareError
from .fragmentation import (
    HALF_PAGES,
    CannotFragment,
    Compacted,
    Share,
    compact_half_full,
    neighbour,
)
from .units import SIZE, size_text
from .vcpu import GuestFailed

WIDTH = 100
# one guest per vendor, as Linux runs them today; SNP's policy may allow moves
VENDORS = ("tdx-today", "snp-move", "pkvm-today")
GUEST_OPTIONS = ("--memory", "64M", "--vcpus", "2", "--moves", "4")
LOAD_OPTIONS = ("--memory", "64M", "--vcpus", "1", "--moves", "12")
COLOURS = {"tdx": "cyan", "snp": "magenta", "pkvm": "yellow"}
# of a block's half: pages of the guest that cannot move, beside one that can
STUCK_PER_BLOCK = 16


class DemoFailed(Exception):
    """Something is not as it must be."""


class Demo:
    """One run of the demo on a daemon that serves."""

    def __init__(
        self, console: Console, daemon: DaemonProcess, image: Firmware, firmware: Path | None,
        seed: int,
    ) -> None:  # fmt: skip
        self._console = console
        self._daemon = daemon
        self._image = image
        self._firmware = firmware
        self._seed = seed
        self._client = Client(daemon.socket_dir)
        self.report: dict[str, Any] = {}
        self.compacted: list[Compacted] = []
        self.mixed: Compacted | None = None

    def run(self) -> None:
        """Run all of it.

        Raises:
            DemoFailed: a figure is not as it must be.
        """
        with self._client:
            host = self._introduce()
            consumers = in_order(self._client.consumers.list().consumers)
            guests = self._guests(consumers)
            argued = self._argue(consumers)
            self._compact(consumers, argued)
            load = self._load(argued)
            self._daemon.require_alive()
            self._require_all_back(host)
        experiments = [*self.compacted, *([self.mixed] if self.mixed else [])]
        said = verdict.answer(argued, experiments, self.mixed)
        self.report |= {
            "guests": guests,
            "argument": [_argued_json(row) for row in argued],
            "compaction": [_compacted_json(one) for one in experiments],
            "under_load": load,
            "answer": said,
        }
        found = verdict.contradictions(argued, experiments)
        if found:
            raise DemoFailed("; ".join(found))
        self._console.print()
        self._console.print(
            Panel("\n\n".join(said), title="The answer", title_align="left", padding=(1, 2))
        )

    def _introduce(self) -> host_pb2.GetHostResponse:
        """Ask the daemon what it is; a demo of a mock must be able to say that it is one."""
        host = self._client.host.get()
        if not host.mock:
            raise DemoFailed("the daemon does not say that it is a mock")
        self.report |= {
            "mock": host.mock,
            "version": host.version,
            "seed": host.seed,
            "nframes": host.nframes,
            "nodes": [{"node": n.node, "npages": n.npages} for n in host.nodes],
            "firmware": {
                "origin": self._image.origin, "built": self._image.built,
                "npages": self._image.npages, "sha256": self._image.sha256,
            },
        }  # fmt: skip
        self._console.print(
            Panel(
                f"rmemd {host.version} serves, pid {self._daemon.pid}, seed {host.seed}. It says "
                f"of itself: [bold]mock = {str(host.mock).lower()}[/], no hardware isolation.\n"
                f"Host: {size_text(host.nframes * 4096)} in {len(host.nodes)} NUMA nodes of "
                f"{host.nodes[0].npages // 512} blocks of 2 MiB.\n"
                f"Firmware: {self._image.origin}; {self._image.npages} pages, sha256 "
                f"{self._image.sha256[:16]}…",
                title="rmemd: who keeps the pages of a confidential guest from moving?",
                title_align="left",
            )
        )
        return host

    def _guests(self, consumers: Sequence[consumer_pb2.Consumer]) -> list[dict[str, Any]]:
        """Run one VMM per vendor at once, on the same firmware."""
        platforms = {c.name: c.platform for c in consumers}
        missing = [name for name in VENDORS if name not in platforms]
        if missing:
            raise DemoFailed(f"the daemon has no {', '.join(missing)}: is its plugin quarantined?")
        self._console.print(f"\n[bold]One VMM per vendor, at once:[/] {', '.join(VENDORS)}")

        def tell(consumer: str, event: str, text: str) -> None:
            line = Text(f"  {text}", style=COLOURS.get(platforms[consumer], ""))
            self._console.print(line, soft_wrap=True)

        options = self._options(GUEST_OPTIONS)
        runs = fleet.run_at_once(self._daemon.socket_dir, VENDORS, options, tell)
        figures = [run.figures() for run in runs]
        self._console.print(tables.guests_table(figures))
        return figures

    def _options(self, options: Sequence[str]) -> list[str]:
        chosen = ["--firmware", str(self._firmware)] if self._firmware is not None else []
        return [*options, "--seed", str(self._seed), *chosen]

    def _argue(self, consumers: Sequence[consumer_pb2.Consumer]) -> list[Argued]:
        with self._progress("the argument", len(consumers)) as step:
            argued = []
            for consumer in consumers:
                step(consumer.name)
                argued.append(argue(self._client, consumer))
        self._console.print(tables.steps_table(argued))
        self._console.print(tables.answers_table(argued))
        return argued

    def _compact(
        self, consumers: Sequence[consumer_pb2.Consumer], argued: Sequence[Argued]
    ) -> None:
        ballast = neighbour(consumers)
        with self._progress("compaction", len(consumers) + 1) as step:
            for consumer in consumers:
                step(consumer.name)
                shares = [Share(consumer, HALF_PAGES)]
                self.compacted.append(
                    compact_half_full(self._client, consumer.name, shares, ballast, self._seed)
                )
            pair = next(iter(verdict.pairs(argued, self.compacted, VENDORS)), None)
            if pair is not None:
                step("mixed")
                self.mixed = self._mix(consumers, pair, ballast)
        rows = [*self.compacted, *([self.mixed] if self.mixed else [])]
        self._console.print(tables.compaction_table(rows))

    def _mix(
        self,
        consumers: Sequence[consumer_pb2.Consumer],
        pair: verdict.Pair,
        ballast: consumer_pb2.Consumer,
    ) -> Compacted:
        """Have a few pages that cannot move among many that can."""
        by_name = {consumer.name: consumer for consumer in consumers}
        stays, moves = pair.stays.consumer, pair.moves.consumer
        shares = [
            Share(by_name[stays], STUCK_PER_BLOCK),
            Share(by_name[moves], HALF_PAGES - STUCK_PER_BLOCK),
        ]
        label = f"{stays} 1/{HALF_PAGES // STUCK_PER_BLOCK} + {moves}"
        return compact_half_full(self._client, label, shares, ballast, self._seed)

    def _load(self, argued: Sequence[Argued]) -> list[dict[str, Any]]:
        """Migrate the pages of every variant that can move while a vCPU process checks them."""
        movable = [row.consumer for row in argued if row.migrate.moved]
        with self._progress("migration under load", 1) as step:
            step(", ".join(movable))
            options = self._options(LOAD_OPTIONS)
            socket_dir = self._daemon.socket_dir
            runs = fleet.run_at_once(socket_dir, movable, options, lambda *_: None)
        figures = [run.figures() for run in runs]
        for run in figures:
            if run["mismatched_pages"] or not run["moved"]:
                raise DemoFailed(f"{run['consumer']} under load: {run}")
        self._console.print(tables.load_table(figures))
        return figures

    def _require_all_back(self, before: host_pb2.GetHostResponse) -> None:
        """Every frame is free again, but for those that a vendor could not give back."""
        after = self._client.host.get()
        leaked = self._client.host.accounting().leaked_pages
        self.report |= {"leaked_pages": leaked, "free_pages": after.free_pages}
        if after.free_pages + leaked != before.free_pages or after.vms or after.files:
            raise DemoFailed(
                f"{before.free_pages} pages were free before, {after.free_pages} are now, "
                f"{leaked} leaked; {after.vms} VMs and {after.files} files are left"
            )

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Any]:
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}"))
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(what, total=total)

            def step(name: str) -> None:
                progress.update(task, description=f"{what}: {name}", advance=1)

            yield step

    def pictured(self) -> list[Compacted]:
        """Return the experiments for the picture: what differs by the hook, and the mix."""
        by_label = {one.label: one for one in self.compacted}
        if self.mixed is None:
            return self.compacted[:2]
        names = list(self.mixed.guests)
        return [*(by_label[name] for name in names), self.mixed]


def in_order(consumers: Iterable[consumer_pb2.Consumer]) -> list[consumer_pb2.Consumer]:
    """Put the consumers platform by platform, those of the demo's own guests first."""
    listed = list(consumers)
    first = {c.platform: VENDORS.index(c.name) for c in listed if c.name in VENDORS}
    return sorted(listed, key=lambda c: (first.get(c.platform, len(VENDORS)), c.platform, c.name))


def _argued_json(row: Argued) -> dict[str, Any]:
    plain = asdict(row)
    plain["migrate"]["outcome"] = row.migrate.outcome
    plain["survived_pages"] = row.survived_pages
    return plain


def _compacted_json(one: Compacted) -> dict[str, Any]:
    arrays = ("cells_before", "cells_after", "arrived", "stuck")
    plain = {name: value for name, value in asdict(one).items() if name not in arrays}
    plain["vms"] = {str(vm): name for vm, name in one.vms.items()}
    return {**plain, "regained": one.regained}


def _finish(console: Console, demo: Demo, out: Path, began: float, seed: int) -> None:
    picture, report = out / "pagemap.png", out / "report.json"
    origin = (
        f"Every cell is from rmemd {demo.report['version']}'s page map (mock, seed {seed}); "
        f"made by rmem-demo."
    )
    pagemap.draw(picture, demo.pictured(), origin)
    demo.report["seconds"] = round(time.monotonic() - began, 2)
    report.write_text(json.dumps(demo.report, indent=1) + "\n")
    console.print(f"Page map: [bold]{picture}[/]   All figures: [bold]{report}[/]")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--firmware", type=click.Path(path_type=Path), help="Image; default: OVMF, or built.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True,
    help="Directory for the picture, the report and the daemon's log.",
)  # fmt: skip
@click.option("--seed", type=int, default=2022, show_default=True, help="Seed of everything.")
@click.option(
    "--host-memory", type=SIZE, default="256M", show_default=True, help="The mock host's memory."
)
@click.option("--nodes", type=click.IntRange(2, 64), default=4, show_default=True)
@click.option("--keep", is_flag=True, help="Leave the daemon running.")
def main(
    firmware: Path | None, out: Path, seed: int, host_memory: int, nodes: int, keep: bool
) -> None:
    """Run the argument of 2022 on a daemon of its own, and answer it with the daemon's figures."""
    console = Console(highlight=False)
    if not console.is_terminal and console.width < WIDTH:
        console = Console(highlight=False, width=WIDTH)
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    daemon = DaemonProcess(out / "rmemd.log", host_memory=str(host_memory), nodes=nodes, seed=seed)
    try:
        image = firmwares.load(firmware)
        daemon.start()
        demo = Demo(console, daemon, image, firmware, seed)
        demo.run()
        _finish(console, demo, out, began, seed)
        if keep:
            console.print(f"The daemon goes on: rmemctl --socket-dir {daemon.socket_dir} host show")
        else:
            daemon.drain()
            console.print(
                f"The daemon was drained by SIGTERM and ended with 0. "
                f"{time.monotonic() - began:.1f} s."
            )
    except (
        CannotFragment, DaemonError, DemoFailed, FirmwareError, GuestFailed, RmemError,
        fleet.VmmDied,
    ) as error:  # fmt: skip
        if not isinstance(error, (DaemonError, FirmwareError)):
            click.echo(daemon.log_tail(), err=True)
        click.echo(f"rmem-demo: {error}", err=True)
        daemon.kill()
        sys.exit(1)
    except BaseException:
        daemon.kill()
        raise


if __name__ == "__main__":
    main()
