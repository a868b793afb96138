"""``rmemctl fault``: rules by which named points go wrong."""

from __future__ import annotations

import click

from ..app import Group, Settings, pass_settings
from ..output import Column, Table
from ..units import RULE, VM

COLUMNS = [
    Column("RULE", lambda rule: f"rule/{rule.rule}"),
    Column("POINT", lambda rule: rule.point),
    Column("ERROR", lambda rule: rule.error or "-"),
    Column("VM", lambda rule: f"vm/{rule.vm}" if rule.vm else "any"),
    Column("NTH", lambda rule: str(rule.nth), right=True),
    Column("TIMES", lambda rule: str(rule.times or 1), right=True),
]


@click.group(cls=Group)
def fault() -> None:
    """Make ops, vendor leaves and the engine's own points go wrong."""


@fault.command("list", watchable=True)
@pass_settings
def list_rules(settings: Settings) -> None:
    """List the rules that still wait."""
    reply = settings.client.host.list_faults()
    settings.out.show(
        reply,
        Table(COLUMNS, reply.rules, empty="no fault rules"),
        items=reply.rules,
        names=[f"rule/{rule.rule}" for rule in reply.rules],
    )


@fault.command()
@click.argument("point")
@click.argument("error", default="injected")
@click.option("--vm", type=VM, default=0, help="Only for this VM [default: any].")
@click.option("--nth", type=int, default=1, show_default=True, help="From the Nth passage on.")
@click.option("--times", type=int, default=1, show_default=True, help="For so many passages.")
@pass_settings
def add(settings: Settings, point: str, error: str, vm: int, nth: int, times: int) -> None:
    """Make POINT fail with ERROR, and print the rule's handle.

    POINT is an op ("map", "migrate_folio"), the engine's "lost_race", or a vendor's leaf; ERROR
    is any text for an op, and for a leaf one of its own errors.
    """
    made = settings.client.host.add_fault(point, error, vm=vm, nth=nth, times=times)
    reply = {"revision": settings.client.last_revision, "rule": made}
    settings.out.show(reply, f"rule/{made}", names=[f"rule/{made}"])


@fault.command()
@click.argument("rules", type=RULE, nargs=-1, required=True, metavar="RULE...")
@pass_settings
def remove(settings: Settings, rules: tuple[int, ...]) -> None:
    """Remove rules."""
    for rule in rules:
        reply = settings.client.host.remove_fault(rule)
        settings.out.show(reply, f"rule/{rule} removed", names=[f"rule/{rule}"])


COMMANDS = [fault]
