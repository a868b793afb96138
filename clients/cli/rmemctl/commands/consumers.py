"""``rmemctl consumers``: the vendor back ends and what each declares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from ..app import Group, Settings, pass_settings
from ..output import Column, Table
from ..units import VM

if TYPE_CHECKING:
    from rmem.v1 import consumer_pb2

PLUGIN_COLUMNS = [
    Column("PLUGIN", lambda plugin: plugin.name),
    Column("VERSION", lambda plugin: plugin.version or "-"),
    Column("DISTRIBUTION", lambda plugin: plugin.distribution or "-"),
    Column("STATUS", lambda plugin: "quarantined" if plugin.quarantined else "ok", words=True),
    Column("ERROR", lambda plugin: plugin.error, wrap=True),
]

CONSUMER_COLUMNS = [
    Column("CONSUMER", lambda consumer: consumer.name),
    Column("PLATFORM", lambda consumer: consumer.platform),
    Column("PRIVATE", lambda consumer: "yes" if consumer.private_memory else "no", words=True),
    Column("OPTIONS", lambda consumer: options_text(consumer), wrap=True),
    Column("STANDS FOR", lambda consumer: consumer.summary, wrap=True),
]

RELOADED_COLUMNS = [
    Column("VM", lambda reloaded: f"vm/{reloaded.vm}"),
    Column("CONSUMER", lambda reloaded: reloaded.swap.consumer),
    Column("GAINED", lambda reloaded: " ".join(reloaded.swap.gained) or "-"),
    Column("LOST", lambda reloaded: " ".join(reloaded.swap.lost) or "-"),
    Column("STOOD STILL", lambda reloaded: f"{reloaded.swap.pause_us} µs", right=True),
]

VM_OPS_COLUMNS = [
    Column("OP", lambda op: op.name),
    Column("DECLARED", lambda op: declared(op.implemented), words=True),
]


@click.group(cls=Group)
def consumers() -> None:
    """List, load and reload vendor back ends, and the ops that each declares."""


@consumers.command("list", watchable=True)
@pass_settings
def list_consumers(settings: Settings) -> None:
    """Show every consumer's ops table side by side, and the plugins.

    "NULL" is an op that the consumer does not implement: with migrate_folio NULL its private
    pages are unmovable.
    """
    reply = settings.client.consumers.list()
    settings.out.show(
        reply,
        ops_table(reply.consumers),
        Table(CONSUMER_COLUMNS, reply.consumers),
        Table(PLUGIN_COLUMNS, reply.plugins),
        items=reply.consumers,
        names=[consumer.name for consumer in reply.consumers],
    )


@consumers.command("ops", watchable=True)
@click.argument("vm", type=VM)
@pass_settings
def ops(settings: Settings, vm: int) -> None:
    """Show the ops table of one VM's consumer."""
    reply = settings.client.consumers.ops(vm)
    settings.out.show(
        reply,
        Table(VM_OPS_COLUMNS, reply.ops, title=f"vm/{vm}: {reply.consumer}"),
        items=reply.ops,
        names=[op.name for op in reply.ops if op.implemented],
    )


@consumers.command()
@click.argument("names", nargs=-1, metavar="[PLUGIN]...")
@pass_settings
def load(settings: Settings, names: tuple[str, ...]) -> None:
    """Load plugins that were installed since the daemon started [default: all of them].

    Install them in the daemon's own environment first (`pip install`).
    """
    reply = settings.client.consumers.load(*names)
    settings.out.show(
        reply,
        Table(PLUGIN_COLUMNS, reply.plugins, empty="nothing new is installed"),
        Table(CONSUMER_COLUMNS, reply.consumers),
        items=reply.plugins,
        names=[plugin.name for plugin in reply.plugins],
    )


@consumers.command()
@click.argument("name", metavar="PLUGIN")
@pass_settings
def unload(settings: Settings, name: str) -> None:
    """Take out a plugin that no VM uses."""
    reply = settings.client.consumers.unload(name)
    text = f"{name} unloaded: {', '.join(reply.consumers)} no longer offered"
    settings.out.show(reply, text, names=[name])


@consumers.command()
@click.argument("name", metavar="PLUGIN")
@pass_settings
def reload(settings: Settings, name: str) -> None:
    """Load a plugin's code anew and swap every VM of it: all of them, or nothing happens."""
    reply = settings.client.consumers.reload(name)
    text = f"{name} reloaded: {reply.previous_version or '-'} -> {reply.version or '-'}"
    table = Table(RELOADED_COLUMNS, reply.vms, empty="no VM has a consumer of it")
    settings.out.show(reply, text, table, items=reply.vms, names=[f"vm/{r.vm}" for r in reply.vms])


def ops_table(consumers: Sequence[consumer_pb2.Consumer]) -> Table:
    """Return the table of tables: ops as rows, consumers as columns."""
    tables = {c.name: {op.name: op.implemented for op in c.ops} for c in consumers}
    names = dict.fromkeys(op for table in tables.values() for op in table)
    columns = [Column("OP", lambda op: op)]
    for name, table in tables.items():
        # "tdx-today" over two lines: eight variants fit into a terminal
        header = name.replace("-", "-\n", 1)
        columns.append(Column(header, _declared_by(table), words=True))
    return Table(columns, list(names), empty="no consumers: see the plugins")


def _declared_by(table: dict[str, bool]) -> Callable[[str], str]:
    return lambda op: declared(table.get(op, False))


def declared(implemented: bool) -> str:
    """Say whether an op is declared, in the words of the thread."""
    return "yes" if implemented else "NULL"


def options_text(consumer: consumer_pb2.Consumer) -> str:
    """Write a consumer's options and their defaults."""
    return " ".join(f"{key}={consumer.options[key]}" for key in sorted(consumer.options)) or "-"


COMMANDS = [consumers]
