"""``rmemctl watch``: what happens, as it happens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from ..app import Command, Settings, pass_settings
from ..output import Output
from ..units import VM

if TYPE_CHECKING:
    from rmem_client import Watch, WatchItem

# a stream cannot know its widest cell beforehand; 0: as wide as it comes
WIDTHS = {"REVISION": 8, "KIND": 20, "VM": 6, "OPERATION": 16, "FIELDS": 0}


@click.command(cls=Command)
@click.option(
    "--from", "revision", type=int, default=0, help="Events after this revision [default: now]."
)
@click.option("--kind", "kinds", multiple=True, help="Only this kind; may be repeated.")
@click.option("--vm", type=VM, default=0, help="Only this VM.")
@click.option("--count", type=int, help="Stop after so many lines.")
@pass_settings
def watch(
    settings: Settings, revision: int, kinds: tuple[str, ...], vm: int, count: int | None
) -> None:
    """Print events until interrupted, one per line.

    With -o json (or jsonl) every message of the stream is a line: "event", "progress_revision"
    (the first says that the watch is in place) or "lost".
    """
    out = settings.out
    with settings.client.watch(start_revision=revision, kinds=kinds, vm=vm) as stream:
        if out.is_json:
            for item in islice(stream, count):
                out.json_line(message(item))
        else:
            if not settings.no_headers and out.form == "table":
                out.words(list(WIDTHS.items()))
            for cells in islice(lines(stream), count):
                _print(out, cells)


def message(item: WatchItem) -> dict[str, Any]:
    """Return an item as the message of the stream that it was."""
    from rmem_client import Event, Lost

    match item:
        case Event(revision, kind, vm, operation, fields):
            event = {"revision": revision, "kind": kind, "vm": vm, "operation": operation}
            return {"event": event | {"fields": dict(fields)}}
        case Lost(count):
            return {"lost": count}
        case _:
            return {"progress_revision": item.revision}


def lines(stream: Watch) -> Iterator[list[str]]:
    """Yield the cells of what people want to see: events, and what was lost."""
    from rmem_client import Event, Lost

    for item in stream:
        match item:
            case Event(revision, kind, vm, operation, fields):
                particulars = " ".join(f"{key}={fields[key]}" for key in sorted(fields))
                yield [str(revision), kind, f"vm/{vm}" if vm else "-", operation, particulars]
            case Lost(count):
                yield ["-", "lost", "-", "", f"{count} events: this watcher was too slow"]


def _print(out: Output, cells: list[str]) -> None:
    if out.form == "name":
        out.line(cells[1])
    else:
        out.words(list(zip(cells, WIDTHS.values(), strict=True)))


COMMANDS = [watch]
