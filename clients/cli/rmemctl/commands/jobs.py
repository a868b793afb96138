"""``rmemctl migrate``, ``compact`` and ``poison``: what happens to pages under a running VM."""

from __future__ import annotations

import click

from ..app import Command, Settings, pass_settings
from ..units import PAGES, VM
from .moves import run
from .page import page_options


@click.command(cls=Command)
@click.option("--vm", type=VM, help="The VM whose guest frames --gfn names.")
@click.option("--gfn", "gfns", type=PAGES, multiple=True, help="Guest frames; may be repeated.")
@click.option("--pfn", "pfns", type=PAGES, multiple=True, help="Host frames; may be repeated.")
@click.option("--node", type=int, help="Node to move to [default: any].")
@pass_settings
def migrate(
    settings: Settings,
    vm: int | None,
    gfns: tuple[tuple[int, int], ...],
    pfns: tuple[tuple[int, int], ...],
    node: int | None,
) -> None:
    """Move pages to other frames and report on each.

    Pages whose consumer's migrate_folio is NULL are unmovable, pages that somebody holds are
    busy. That not all pages moved is a report, no failure: the exit code is 0. Ctrl-C cancels it;
    what is moved stays so.
    """
    if (vm is None) is not (not gfns) or bool(gfns) is bool(pfns):
        raise click.UsageError("name the pages by --vm and --gfn, or by --pfn")
    run(settings, settings.client.jobs.migrate(pfns=pfns, vm=vm or 0, gfns=gfns, node=node))


@click.command(cls=Command)
@click.option("--node", type=int, default=0, show_default=True, help="The node.")
@pass_settings
def compact(settings: Settings, node: int) -> None:
    """Move pages of a node together, to regain free 2 MiB blocks."""
    run(settings, settings.client.jobs.compact(node))


@click.command(cls=Command)
@page_options
@pass_settings
def poison(settings: Settings, address: dict[str, int]) -> None:
    """Mark a frame as failed, as a machine check would."""
    reply = settings.client.host.poison(**address)
    text = f"pfn {reply.pfn:#x} poisoned"
    if reply.vm:
        text += f"; vm/{reply.vm} {'is lost' if reply.vm_lost else 'lives on'}"
    if reply.text:
        text += f": {reply.text}"
    settings.out.show(reply, text, names=[f"{reply.pfn:#x}"])


COMMANDS = [migrate, compact, poison]
