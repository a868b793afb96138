"""``rmemctl session`` and ``rmemctl whoami``: who calls, in which role, with how much left."""

from __future__ import annotations

import click

from ..app import Command, Group, Settings, pass_settings
from ..output import Column, Facts, Table
from ..plain import enum_word
from ..units import PAGE_BYTES, pages_text, size_text

COLUMNS = [
    Column("SESSION", lambda one: f"session/{one.session}"),
    Column("TENANT", lambda one: one.tenant),
    Column("ROLE", lambda one: enum_word(one, "role")),
    Column("DOOR", lambda one: one.door),
    Column("PID", lambda one: str(one.pid) if one.pid else "-", right=True),
    Column("BELOW", lambda one: f"session/{one.parent}" if one.parent else "-"),
    Column("VM", lambda one: f"vm/{one.vm}" if one.vm else "-"),
    Column("VMS", lambda one: str(one.vms), right=True),
    Column("HOLDS", lambda one: pages_text(one.held_pages), right=True),
    Column("LEASE", lambda one: f"{one.lease_seconds:g} s" if one.lease_seconds else "-"),
    Column("GRANTS", lambda one: ", ".join(map(grant_text, one.grants)) or "-", wrap=True),
]

LIMIT_COLUMNS = [
    Column("LIMIT", lambda limit: limit.what),
    Column("USED", lambda limit: str(limit.used), right=True),
    Column("OF", lambda limit: "no limit" if limit.limit < 0 else str(limit.limit), right=True),
]


@click.group(cls=Group)
def session() -> None:
    """Look at sessions: the clients, as the daemon knows them."""


@session.command("list", watchable=True)
@pass_settings
def list_sessions(settings: Settings) -> None:
    """List the sessions of one's own tenant; an admin sees everybody's."""
    reply = settings.client.sessions.list()
    settings.out.show(
        reply,
        Table(COLUMNS, reply.sessions, empty="no sessions"),
        items=reply.sessions,
        names=[f"session/{one.session}" for one in reply.sessions],
    )


@click.command(cls=Command, watchable=True)
@pass_settings
def whoami(settings: Settings) -> None:
    """Show as whom the daemon takes these calls, and what limits there are."""
    reply = settings.client.sessions.whoami()
    facts = Facts(
        [
            ("tenant", reply.tenant or "-"),
            ("role", enum_word(reply, "role")),
            ("session", f"session/{reply.session}" if reply.session else "-"),
        ]
    )
    settings.out.show(reply, facts, Table(LIMIT_COLUMNS, reply.limits), names=[reply.tenant])


def grant_text(grant: object) -> str:
    """Name a range that a device was granted: "file/1 0x0+1 MiB ro"."""
    file: int = grant.file  # type: ignore[attr-defined]
    pgoff: int = grant.offset_bytes // PAGE_BYTES  # type: ignore[attr-defined]
    length: int = grant.length_bytes  # type: ignore[attr-defined]
    only = " ro" if grant.read_only else ""  # type: ignore[attr-defined]
    return f"file/{file} pgoff {pgoff:#x}+{size_text(length)}{only}"


COMMANDS = [session, whoami]
