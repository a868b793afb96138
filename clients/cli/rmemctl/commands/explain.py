"""``rmemctl explain``: what a refusal's reason means and what to try."""

from __future__ import annotations

import click

from ..app import Command, Settings, pass_settings
from ..output import Column, Facts, Table

COLUMNS = [
    Column("REASON", lambda info: info.reason),
    Column("CODE", lambda info: info.code.lower().replace("_", " ")),
    Column("ERRNO", lambda info: info.errno_name or "-"),
    Column("SAID WHEN", lambda info: info.cause, wrap=True),
]


@click.command(cls=Command)
@click.argument("reason", default="")
@pass_settings
def explain(settings: Settings, reason: str) -> None:
    """Explain a refusal's REASON; without one, list them all."""
    reply = settings.client.host.explain(reason.upper())
    if not reason:
        part: Table | Facts = Table(COLUMNS, reply.reasons, empty="no reasons")
        parts = [part]
    else:
        parts = [
            Facts(
                [
                    ("reason", info.reason),
                    ("said when", info.cause),
                    ("try", info.remedy),
                    ("code", info.code),
                    ("errno", info.errno_name),
                    ("source", info.source),
                ]
            )
            for info in reply.reasons
        ]
    settings.out.show(
        reply, *parts, items=reply.reasons, names=[info.reason for info in reply.reasons]
    )


COMMANDS = [explain]
