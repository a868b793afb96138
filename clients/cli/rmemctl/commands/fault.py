"""``rmemctl fault``: rules by which named points go wrong."""

from __future__ import annotations

import click

from ..app import Group, Settings, pass_settings
from ..output import Column, Table
from ..plain import enum_word
from ..units import RULE, VM

COLUMNS = [
    Column("RULE", lambda rule: f"rule/{rule.rule}"),
    Column("POINT", lambda rule: rule.point),
    Column("ERROR", lambda rule: rule.error or "-"),
    Column("VM", lambda rule: f"vm/{rule.vm}" if rule.vm else "any"),
    Column("NTH", lambda rule: str(rule.nth), right=True),
    Column("TIMES", lambda rule: str(rule.times or 1), right=True),
    Column("CHANCE", lambda rule: f"{rule.probability or 1:g}", right=True),
    Column("DELAY", lambda rule: f"{rule.delay_ms} ms" if rule.delay_ms else "-", right=True),
    Column("PASSED", lambda rule: str(rule.passages), right=True),
    Column("HIT", lambda rule: str(rule.hits), right=True),
]

POINT_COLUMNS = [
    Column("POINT", lambda point: point.point),
    Column("KIND", lambda point: enum_word(point, "kind")),
    Column("PLUGIN", lambda point: point.plugin or "-"),
    Column("PASSED", lambda point: str(point.passages), right=True),
    Column("MEANING", lambda point: point.meaning or "-", wrap=True),
]


@click.group(cls=Group)
def fault() -> None:
    """Make ops, vendor leaves and the engine's own points go wrong or take their time."""


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


@fault.command(watchable=True)
@pass_settings
def points(settings: Settings) -> None:
    """List the points at which rules can strike.

    An op or a vendor's leaf can go wrong, a step can be delayed. A plugin may pass points that it
    does not declare: they are listed once it has.
    """
    reply = settings.client.host.fault_points()
    settings.out.show(
        reply,
        Table(POINT_COLUMNS, reply.points),
        items=reply.points,
        names=[point.point for point in reply.points],
    )


@fault.command()
@click.argument("point")
@click.argument("positional", required=False, metavar="[ERROR]")
@click.option("--error", help="What goes wrong there, as ERROR [default: injected].")
@click.option("--vm", type=VM, default=0, help="Only for this VM [default: any].")
@click.option("--nth", type=int, default=1, show_default=True, help="From the Nth passage on.")
@click.option("--times", type=int, default=1, show_default=True, help="Hit so many passages.")
@click.option(
    "--probability",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Of each passage to be hit; which are depends on the daemon's seed.",
)
@click.option(
    "--delay-ms",
    type=click.IntRange(0, 60_000),
    default=0,
    help="Delay a step by so many milliseconds instead of making a point fail.",
)
@pass_settings
def add(
    settings: Settings, point: str, positional: str | None, error: str | None, vm: int, nth: int,
    times: int, probability: float, delay_ms: int,
) -> None:  # fmt: skip
    """Make POINT fail with ERROR, or delay it; print the rule's handle.

    POINT is an op ("map", "migrate_folio"), the engine's "lost_race", or a vendor's leaf; ERROR
    is any text for an op, and for a leaf one of its own errors. Only a step ("step/guest",
    "step/migrate") can be delayed, and nothing else can be done to it. `rmemctl fault points`
    lists them all.
    """
    if error is not None and positional is not None:
        raise click.UsageError("ERROR is given twice")
    made = settings.client.host.add_fault(
        point, positional if error is None else error, vm=vm, nth=nth, times=times,
        probability=probability, delay_ms=delay_ms,
    )  # fmt: skip
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
