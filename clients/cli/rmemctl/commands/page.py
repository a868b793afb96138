"""``rmemctl page``: one page's whole story, and the map of all frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..app import Group, Settings, pass_settings
from ..framemap import draw
from ..output import Column, Facts, Table
from ..plain import enum_word
from ..units import FILE, PAGE, PAGES, VM, count_text, pages_text, range_text
from .moves import holder_text

if TYPE_CHECKING:
    from rmem.v1 import host_pb2

Function = TypeVar("Function", bound=Callable[..., Any])

MAP_COLUMNS = [
    Column("PFN", lambda run: range_text(run.pfn, run.npages)),
    Column("SIZE", lambda run: pages_text(run.npages), right=True),
    Column("USE", lambda run: "poisoned" if run.poisoned else enum_word(run, "use"), words=True),
    Column("VM", lambda run: f"vm/{run.vm}" if run.vm else "-"),
    Column("GFN", lambda run: f"{run.gfn:#x}" if bound(run) else "-"),
    Column("MAPPED", lambda run: yes_no(run.mapped) if run.vm else "-", words=True),
    Column("VENDOR STATE", lambda run: run.vendor_state or "-"),
    Column("FILE", lambda run: f"file/{run.file}" if run.file else "-"),
    Column("PGOFF", lambda run: f"{run.pgoff:#x}" if run.file else "-"),
]


@click.group(cls=Group)
def page() -> None:
    """Look at pages."""


def page_options(function: Function) -> Function:
    """Add the three ways to name a page; the function gets them as ``address``."""

    def gather(
        *args: Any,
        pfn: int | None,
        vm: int | None,
        gfn: int | None,
        file: int | None,
        pgoff: int | None,
        **kwargs: Any,
    ) -> Any:
        given = {"pfn": pfn, "vm": vm, "gfn": gfn, "file": file, "pgoff": pgoff}
        address = {key: value for key, value in given.items() if value is not None}
        if address.keys() not in ({"pfn"}, {"vm", "gfn"}, {"file", "pgoff"}):
            ways = "by --pfn, by --vm and --gfn, or by --file and --pgoff"
            raise click.UsageError(f"name the page {ways}")
        return function(*args, address=address, **kwargs)

    gather.__name__, gather.__doc__ = function.__name__, function.__doc__
    wrapped: Any = gather
    for name, kind, text in reversed(
        [
            ("--pfn", PAGE, "Host frame."),
            ("--vm", VM, "VM that --gfn belongs to."),
            ("--gfn", PAGE, "Guest frame."),
            ("--file", FILE, "Restricted file that --pgoff belongs to."),
            ("--pgoff", PAGE, "Page in the file."),
        ]
    ):
        wrapped = click.option(name, type=kind, help=text)(wrapped)
    return wrapped  # type: ignore[no-any-return]


@page.command(watchable=True)
@page_options
@pass_settings
def show(settings: Settings, address: dict[str, int]) -> None:
    """Tell a page's whole story: owner, states, references, who holds them, can it move."""
    reply = settings.client.host.page(**address)
    settings.out.show(reply, Facts(story(reply)), names=[f"{reply.pfn:#x}"])


@page.command("map", watchable=True)
@click.argument("pfns", type=PAGES, required=False)
@click.option("--draw", "picture", is_flag=True, help="Draw the frames as characters.")
@click.option("--used", is_flag=True, help="Leave free frames out of the table.")
@pass_settings
def page_map(settings: Settings, pfns: tuple[int, int] | None, picture: bool, used: bool) -> None:
    """Show what frames are used for, run by run [default: all frames].

    A run is consecutive in every respect; GFN and PGOFF name its first page.
    """
    runs = list(settings.client.host.frame_runs(*(pfns or (0, 0))))
    if used:
        runs = [run for run in runs if enum_word(run, "use") != "free"]
    from rmem.v1 import host_pb2

    settings.out.show(
        host_pb2.GetPageMapResponse(revision=settings.client.last_revision, runs=runs),
        draw(runs) if picture else Table(MAP_COLUMNS, runs, empty="no frames in use"),
        items=runs,
        names=[range_text(run.pfn, run.npages) for run in runs],
    )


def story(page: host_pb2.GetPageResponse) -> list[tuple[str, str]]:
    """Return a page's facts in the order in which one asks for them."""
    has_frame = page.pfn >= 0
    return [
        ("frame", f"pfn {page.pfn:#x} on node {page.node}" if has_frame else "none: not present"),
        ("used for", enum_word(page, "use") if has_frame else ""),
        ("poisoned", "yes" if page.poisoned else ""),
        ("file", f"file/{page.file} pgoff {page.pgoff:#x}" if page.file else "-"),
        ("guest", f"vm/{page.vm} gfn {page.gfn:#x}" if bound(page) else "-"),
        ("attribute", "private" if page.is_private else "shared"),
        ("mapped", yes_no(page.mapped)),
        ("vendor state", page.vendor_state or "-"),
        ("content", page.content or "-"),
        ("references", references_text(page)),
        *((("held by" if i == 0 else " "), holder_text(h)) for i, h in enumerate(page.holders)),
        ("movable", "yes" if page.movable else f"no: {page.unmovable_reason or 'not present'}"),
    ]


def references_text(page: host_pb2.GetPageResponse) -> str:
    """Say how many references there are and how many there may be for the page to move."""
    pins = f", {count_text(page.pins, 'long-term pin')}" if page.pins else ""
    return f"{page.references}{pins} ({page.expected_references} expected)"


def bound(where: host_pb2.FrameRun | host_pb2.GetPageResponse) -> bool:
    """Say whether a page is bound to a guest frame."""
    return where.vm != 0 and where.gfn >= 0


def yes_no(flag: bool) -> str:
    """Write a flag."""
    return "yes" if flag else "no"


COMMANDS = [page]
