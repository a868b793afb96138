"""``rmemctl page who`` and ``rmemctl pins``: who holds which pages, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from ..app import Group, Settings, pass_settings
from ..output import Column, Table
from ..units import FILE, PAGE_BYTES, PAGES, VM, count_text, range_text
from .page import page

if TYPE_CHECKING:
    from rmem.v1 import host_pb2
    from rmem_client import Client

# a call each
PAGES_MAX = 4096
NO_FRAME = "FRAME_NOT_OWNED"
FREE = 1
_SESSION, _PIN = re.compile(r"\bsession (\d+)"), re.compile(r" pin (\d+)$")


@dataclass(frozen=True)
class Hold:
    """Consecutive pages that somebody holds for one reason, as often each."""

    first: int
    npages: int
    holder: str
    purpose: str
    count: int
    longterm: bool
    session: int

    def goes_on(self, other: Hold) -> bool:
        """Say whether the other is the same hold on the page after."""
        return self.first + self.npages == other.first and self._why() == other._why()

    def _why(self) -> tuple[str, str, int, bool]:
        return self.holder, self.purpose, self.count, self.longterm


HOLD_COLUMNS = [
    Column("PAGES", lambda hold: range_text(hold.first, hold.npages)),
    Column("HELD BY", lambda hold: hold.holder),
    Column("FOR", lambda hold: hold.purpose),
    Column("EACH", lambda hold: str(hold.count), right=True),
    Column("AS", lambda hold: "long-term pin" if hold.longterm else "reference"),
    Column("SESSION", lambda hold: f"session/{hold.session}" if hold.session else "-"),
]

PIN_COLUMNS = [
    Column("PIN", lambda pin: f"pin/{pin.pin}"),
    Column("FILE", lambda pin: f"file/{pin.file}"),
    Column("PGOFF", lambda pin: range_text(*_pages_of(pin))),
    Column("HELD BY", lambda pin: pin.holder),
    Column("FOR", lambda pin: pin.purpose),
    Column("TENANT", lambda pin: pin.tenant or "-"),
    Column("SESSION", lambda pin: f"session/{pin.session}" if pin.session else "-"),
]


@page.command("who", watchable=True)
@click.option("--pfn", "pfns", type=PAGES, help="Host frames.")
@click.option("--vm", type=VM, help="VM that --gfn belongs to.")
@click.option("--gfn", "gfns", type=PAGES, help="Guest frames.")
@click.option("--file", type=FILE, help="Restricted file that --pgoff belongs to.")
@click.option("--pgoff", "pgoffs", type=PAGES, help="Pages in the file.")
@pass_settings
def who(
    settings: Settings,
    pfns: tuple[int, int] | None,
    vm: int | None,
    gfns: tuple[int, int] | None,
    file: int | None,
    pgoffs: tuple[int, int] | None,
) -> None:
    """Say who holds pages: the ledger of references and long-term pins.

    The pages are named by --pfn, by --vm and --gfn, or by --file and --pgoff, and may be a range.
    The page cache's own reference is not in the ledger.
    """
    match (pfns, vm, gfns, file, pgoffs):
        case ((start, npages), None, None, None, None):
            where: dict[str, int] = {}
            index = "pfn"
        case (None, int(), (start, npages), None, None):
            where, index = {"vm": vm}, "gfn"
        case (None, None, None, int(), (start, npages)):
            where, index = {"file": file}, "pgoff"
        case _:
            ways = "by --pfn, by --vm and --gfn, or by --file and --pgoff"
            raise click.UsageError(f"name the pages {ways}")
    if npages > PAGES_MAX:
        raise click.UsageError(f"{npages} pages; at most {PAGES_MAX} at a time")
    client = settings.client
    sessions = _sessions_of_pins(client)
    holds = merged(
        Hold(number, 1, one.name, one.purpose, one.count, one.longterm, session(one.name, sessions))
        for number, story in _stories(client, where, index, start, npages)
        for one in story.holders
    )
    settings.out.show(
        {"revision": client.last_revision, "index": index, "holds": [asdict(h) for h in holds]},
        Table(HOLD_COLUMNS, holds, empty=f"nobody holds {index} {range_text(start, npages)}"),
        items=[asdict(hold) for hold in holds],
        names=dict.fromkeys(hold.holder for hold in holds),
    )


@click.group(cls=Group)
def pins() -> None:
    """Look at pins: pages that clients hold in place, as DMA does."""


@pins.command("list", watchable=True)
@click.option("--file", type=FILE, default=0, help="Only of this file [default: all].")
@pass_settings
def list_pins(settings: Settings, file: int) -> None:
    """List the pins, with who holds what, and whose they are."""
    reply = settings.client.files.pins(file)
    held = count_text(sum(_pages_of(pin)[1] for pin in reply.pins), "page")
    settings.out.show(
        reply,
        Table(PIN_COLUMNS, reply.pins, empty="no pins"),
        f"{held} pinned" if reply.pins else "",
        items=reply.pins,
        names=[f"pin/{pin.pin}" for pin in reply.pins],
    )


def merged(holds: Iterator[Hold]) -> list[Hold]:
    """Join holds on consecutive pages; those of one page may be several."""
    found: list[Hold] = []
    # by what they are held for: the last hold of each
    open_at: dict[tuple[str, str, int, bool], int] = {}
    for hold in holds:
        at = open_at.get(hold._why())
        if at is not None and found[at].goes_on(hold):
            known = found[at]
            found[at] = Hold(**{**asdict(known), "npages": known.npages + 1})
        else:
            open_at[hold._why()] = len(found)
            found.append(hold)
    return found


def session(holder: str, sessions: dict[int, int]) -> int:
    """Return the session that a holder is or that its pin goes with, 0 for none."""
    named = _SESSION.search(holder)
    if named:
        return int(named[1])
    pin = _PIN.search(holder)
    return sessions.get(int(pin[1]), 0) if pin else 0


def _sessions_of_pins(client: Client) -> dict[int, int]:
    """Return the session of each pin; none where the daemon does not tell."""
    from rmem_client import Denied, NotServed

    try:
        return {pin.pin: pin.session for pin in client.files.pins().pins}
    except (Denied, NotServed):
        return {}


def _stories(
    client: Client, where: dict[str, int], index: str, start: int, npages: int
) -> Iterator[tuple[int, host_pb2.GetPageResponse]]:
    """Yield the story of each page that has a frame."""
    from rmem_client import RmemError

    for number in _in_use(client, start, npages) if index == "pfn" else _all(start, npages):
        try:
            yield number, client.host.page(**where, **{index: number})
        except RmemError as error:
            if error.reason != NO_FRAME:
                raise


def _in_use(client: Client, start: int, npages: int) -> Iterator[int]:
    """Yield the frames that are used for something: nobody holds a free one."""
    for run in client.host.frame_runs(start, npages):
        if run.use != FREE:
            yield from range(max(run.pfn, start), min(run.pfn + run.npages, start + npages))


def _all(start: int, npages: int) -> Iterator[int]:
    yield from range(start, start + npages)


def _pages_of(pin: object) -> tuple[int, int]:
    offset: int = pin.offset_bytes  # type: ignore[attr-defined]
    length: int = pin.length_bytes  # type: ignore[attr-defined]
    return offset // PAGE_BYTES, length // PAGE_BYTES


COMMANDS = [pins]
