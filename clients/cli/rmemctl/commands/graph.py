"""``rmemctl host graph``: who waits for whom, as a table or for graphviz."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..app import Settings, pass_settings
from ..output import Column, Facts, Table
from .host import host

if TYPE_CHECKING:
    from rmem.v1 import host_pb2

COLUMNS = [
    Column("WHO", lambda edge: edge.waiter),
    Column("NOW", lambda edge: "waits" if edge.waiting else "was refused", words=True),
    Column("FOR", lambda edge: edge.holder or "-"),
    Column("WHY", lambda edge: edge.why),
    Column("PAGES", lambda edge: edge.pages or "-"),
    Column("REVISION", lambda edge: str(edge.revision), right=True),
]


@host.command("graph", watchable=True, graph=True)
@pass_settings
def graph(settings: Settings) -> None:
    """Show who waits for whom, and who was refused over whose pages.

    A call waits while a range is in progress elsewhere or bytes are on their way; it is refused
    over pages that somebody holds, and told here until that holder lets go. REVISION is when it
    began to wait, or was refused. -o dot is for graphviz: solid lines wait, dashed were refused.
    """
    reply = settings.client.host.wait_graph()
    settings.out.show(
        reply,
        Table(COLUMNS, reply.edges, empty="nobody waits"),
        Facts([("deadlock", circle_text(reply))]),
        items=reply.edges,
        names=dict.fromkeys(edge.waiter for edge in reply.edges),
        dot=dot_lines(reply),
    )


def circle_text(reply: host_pb2.GetWaitGraphResponse) -> str:
    """Write a deadlock as the circle that it is."""
    return " → ".join([*reply.deadlock, *reply.deadlock[:1]])


def dot_lines(reply: host_pb2.GetWaitGraphResponse) -> Iterator[str]:
    """Yield the graph in graphviz's language; those in a deadlock are red."""
    stuck = set(reply.deadlock)
    yield "digraph waits {"
    yield "  rankdir=LR;"
    yield "  node [shape=box];"
    for name in reply.deadlock:
        yield f"  {quoted(name)} [color=red];"
    for edge in reply.edges:
        label = f"{edge.why}\n{edge.pages}" if edge.pages else edge.why
        style = "" if edge.waiting else ", style=dashed"
        circle = edge.waiting and edge.waiter in stuck and edge.holder in stuck
        colour = ", color=red" if circle else ""
        ends = f"{quoted(edge.waiter)} -> {quoted(edge.holder or 'somebody')}"
        yield f"  {ends} [label={quoted(label)}{style}{colour}];"
    yield "}"


def quoted(text: str) -> str:
    """Write a text as graphviz's quoted id."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


COMMANDS = [graph]
