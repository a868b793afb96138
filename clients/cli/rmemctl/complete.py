"""What a shell may complete: asked of the daemon, and quietly nothing if it is not there.

Owns the questions. Each ``Known`` answers with handles and what they are; ``matching`` keeps those
that begin with what was typed. A shell waits for the answer, so a call may take a second at most,
and no failure is told: Tab is no place for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from rmem_client import Client

# (handle, what it is)
Choice: TypeAlias = tuple[str, str]
Known: TypeAlias = Callable[["Client"], Iterable[Choice]]


def matching(ctx: click.Context, known: Known, incomplete: str) -> list[CompletionItem[str]]:
    """Return the choices that begin with what is typed; "3" may be typed for "vm/3"."""
    if known is nothing:
        return []
    found = []
    for handle, what in _ask(ctx, known):
        number = handle.rpartition("/")[2]
        text = number if incomplete.isdecimal() else handle
        if text.startswith(incomplete):
            found.append(CompletionItem(text, help=what or None))
    return found


def _ask(ctx: click.Context, known: Known) -> list[Choice]:
    from .app import Settings

    settings = ctx.ensure_object(Settings)
    client = settings.completion_client()
    from rmem_client import RmemError

    try:
        return list(known(client))
    except RmemError:
        return []


def nothing(client: Client) -> Iterable[Choice]:
    """Know nothing: numbers and sizes are not completed."""
    return ()


def vms(client: Client) -> Iterable[Choice]:
    """Return the VMs with their consumers and names."""
    for vm in client.vms.list().vms:
        yield f"vm/{vm.vm}", f"{vm.consumer} {vm.name}".rstrip()


def files(client: Client) -> Iterable[Choice]:
    """Return the restricted files with the VMs that they were made for."""
    for file in client.files.list().files:
        yield f"file/{file.file}", f"vm/{file.vm}" if file.vm else ""


def pins(client: Client) -> Iterable[Choice]:
    """Return the pins with who holds them."""
    for pin in client.files.pins().pins:
        yield f"pin/{pin.pin}", f"{pin.holder}: {pin.purpose}"


def rules(client: Client) -> Iterable[Choice]:
    """Return the fault rules with their points."""
    for rule in client.host.list_faults().rules:
        yield f"rule/{rule.rule}", rule.point


def operations(client: Client) -> Iterable[Choice]:
    """Return the long jobs with what they do."""
    for job in client.jobs.list():
        yield job.name, f"{job.kind}, {'over' if job.done else 'runs'}"


def consumers(client: Client) -> Iterable[Choice]:
    """Return the consumers with what they stand for."""
    for consumer in client.consumers.list().consumers:
        yield consumer.name, consumer.summary
