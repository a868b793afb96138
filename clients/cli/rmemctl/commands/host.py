"""``rmemctl host`` and ``rmemctl ready``: the host's memory and who uses it."""

from __future__ import annotations

from typing import Any

import click

from ..app import Command, Group, Settings, pass_settings
from ..output import Column, Facts, Table
from ..plain import enum_word
from ..units import PAGES, VM, count_text, pages_text, range_text, size_text
from .moves import run

BAR_WIDTH = 40

NODE_COLUMNS = [
    Column("NODE", lambda node: str(node.node), right=True),
    Column("PFN", lambda node: range_text(node.first_pfn, node.npages)),
    Column("SIZE", lambda node: pages_text(node.npages), right=True),
    Column("FREE", lambda node: pages_text(node.free_pages), right=True),
    Column("FREE 2 MiB", lambda node: str(node.free_2m_blocks), right=True),
    Column("FREE BLOCKS (order:count)", lambda node: orders_text(node.free_blocks), wrap=True),
]

USE_COLUMNS = [
    Column("USE", lambda row: row[0], words=True),
    Column("MEMORY", lambda row: pages_text(row[1]), right=True),
    Column("PAGES", lambda row: str(row[1]), right=True),
    Column("SHARE", lambda row: bar_text(row[1], row[2])),
]

ACCOUNT_COLUMNS = [
    Column("FILE", lambda account: f"file/{account.file}" if account.file else "total"),
    Column("VM", lambda account: f"vm/{account.vm}" if account.vm else "-"),
    Column("SIZE", lambda account: pages_text(account.size_pages), right=True),
    Column("PRIVATE", lambda account: pages_text(account.private_pages), right=True),
    Column("SHARED", lambda account: pages_text(account.shared_pages), right=True),
    Column("FOUND", lambda account: pages_text(account.found_pages), right=True),
    Column("DOUBLE", lambda account: pages_text(account.double_pages), right=True),
    Column("HELD", lambda account: pages_text(account.held_pages), right=True),
]

INVARIANT_COLUMNS = [
    Column("INVARIANT", lambda one: one.invariant),
    Column("STATUS", lambda one: enum_word(one, "status")),
    Column("MEANING", lambda one: one.meaning, wrap=True),
]

VIOLATION_COLUMNS = [
    Column("INVARIANT", lambda violation: violation.invariant),
    Column("VIOLATED", lambda violation: violation.text, wrap=True),
]

ACCOUNT_SUMS = [
    "size_pages", "private_pages", "shared_pages", "found_pages", "double_pages", "held_pages",
]  # fmt: skip


@click.group(cls=Group)
def host() -> None:
    """Look at the host's memory; take frames out of use."""


@host.command(watchable=True)
@pass_settings
def show(settings: Settings) -> None:
    """Show the host: what the daemon is, its nodes, and what the frames are used for."""
    reply = settings.client.host.get()
    facts = Facts(
        [
            ("rmemd", f"{reply.version}{' (mock: no hardware isolation)' if reply.mock else ''}"),
            ("revision", str(reply.revision)),
            ("seed", str(reply.seed)),
            ("memory", f"{pages_text(reply.nframes)}, {pages_text(reply.free_pages)} free"),
            ("has", has_text(reply)),
            ("daemon's own", daemon_text(reply)),
            ("kept by", kept_text(reply)),
            *([("read-only", reply.read_only)] if reply.read_only else []),
        ]
    )
    uses = [(enum_word(count, "use"), count.npages, reply.nframes) for count in reply.counts]
    settings.out.show(
        reply,
        facts,
        Table(USE_COLUMNS, [row for row in uses if row[1]]),
        Table(NODE_COLUMNS, reply.nodes),
        names=[f"node/{node.node}" for node in reply.nodes],
    )


@host.command(watchable=True)
@click.option("--vm", type=VM, default=0, help="Only this VM's files.")
@pass_settings
def accounting(settings: Settings, vm: int) -> None:
    """Show who uses what, file by file.

    FOUND is shared memory that a client filled in through its mapping; DOUBLE are pages whose
    private and shared half both exist; HELD are pages somebody pins or references.
    """
    reply = settings.client.host.accounting(vm)
    rows = list(reply.files)
    if len(rows) > 1:
        rows.append(account_total(rows))
    leaked = count_text(reply.leaked_pages, "frame")
    settings.out.show(
        reply,
        Table(ACCOUNT_COLUMNS, rows, empty="no restricted files"),
        f"{leaked} leaked" if reply.leaked_pages else "",
        items=reply.files,
        names=[f"file/{account.file}" for account in reply.files],
    )


@host.command()
@pass_settings
def check(settings: Settings) -> None:
    """Check the invariants over the whole state; exit with 1 if one does not hold.

    The daemon serves nobody meanwhile: it sweeps all frames, files and VMs. Checked: all that an
    invariant is about was looked at. Sampled: some of it, or the transactions that were watched
    since the start. Unwatched: it is about transactions, and none was watched.
    """
    reply = settings.client.host.check()
    shown: list[Any] = [held_text(reply), Table(INVARIANT_COLUMNS, reply.checked)]
    if reply.violations:
        shown = [Table(VIOLATION_COLUMNS, reply.violations), *shown[1:]]
    settings.out.show(
        reply,
        *shown,
        items=reply.violations,
        names=[violation.invariant for violation in reply.violations],
    )
    if reply.violations:
        click.get_current_context().exit(1)


@host.command()
@click.argument("pfns", type=PAGES)
@pass_settings
def offline(settings: Settings, pfns: tuple[int, int]) -> None:
    """Empty frames and take them out of use; reports what could not be moved away."""
    run(settings, settings.client.jobs.offline(*pfns))


@host.command()
@click.argument("pfns", type=PAGES)
@pass_settings
def online(settings: Settings, pfns: tuple[int, int]) -> None:
    """Give offlined frames back to the allocator."""
    frames = settings.client.host.online(*pfns)
    reply = {"revision": settings.client.last_revision, "online": frames}
    settings.out.show(reply, f"{count_text(frames, 'frame')} came back")


@host.command()
@pass_settings
def upgrade(settings: Settings) -> None:
    """Have the daemon make way for a successor, new code included, that finds all it had.

    Guests, sessions and clients' calls go on with the successor. This is also how a daemon leaves
    safe mode.
    """
    done = settings.client.host.upgrade()
    before, after = done.before, done.after
    settings.out.show(
        {
            "revision": after.revision,
            "version_before": before.version,
            "version": after.version,
            "daemon_pid_before": before.daemon_pid,
            "daemon_pid": after.daemon_pid,
            "unserved_seconds": done.unserved_s,
        },
        Facts(
            [
                ("rmemd", f"{before.version} made way for {after.version}"),
                ("process", f"{before.daemon_pid} made way for {after.daemon_pid}"),
                ("revision", str(after.revision)),
                ("nothing served", f"for {done.unserved_s * 1000:.0f} ms"),
            ]
        ),
    )


@click.command(cls=Command)
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds.")
@pass_settings
def ready(settings: Settings, timeout: float) -> None:
    """Wait until the daemon serves; exit with 3 if it does not."""
    settings.client.wait_ready(timeout)
    settings.out.show({"socket": str(settings.client.socket)}, f"ready: {settings.client.socket}")


def has_text(reply: Any) -> str:
    """Say what there is."""
    counts = [(reply.vms, "VM"), (reply.files, "file"), (reply.sessions, "session")]
    return ", ".join(count_text(number, noun) for number, noun in counts)


def daemon_text(reply: Any) -> str:
    """Say what the daemon itself uses."""
    text = f"process {reply.daemon_pid}, {size_text(reply.daemon_rss_bytes)}"
    if reply.daemon_fds:
        text += f", {count_text(reply.daemon_fds, 'descriptor')}"
    return text


def kept_text(reply: Any) -> str:
    """Say who keeps the memory beyond the daemon's death, and how often it was started."""
    text = reply.kept_by or "nobody"
    if reply.keeper_pid:
        text += f", process {reply.keeper_pid}"
    starts = reply.starts_in_a_row
    return text if starts <= 1 else f"{text}; {count_text(starts, 'start')} in a row"


def held_text(reply: Any) -> str:
    """Say what holds, and for how long everybody else had to wait."""
    numbers = ", ".join(
        one.invariant for one in reply.checked if enum_word(one, "status") != "unwatched"
    )
    took = f"checked in {reply.held_seconds * 1000:.1f} ms"
    watched = count_text(reply.watched_transactions, "transaction")
    return f"{numbers} hold at revision {reply.revision} ({took}, {watched} watched)"


def orders_text(free_blocks: Any) -> str:
    """Write free blocks by order, as /proc/buddyinfo counts them, empty orders left out."""
    return " ".join(f"{order}:{count}" for order, count in enumerate(free_blocks) if count) or "-"


def bar_text(npages: int, total: int) -> str:
    """Draw a share as a bar with its percentage; the smallest share is still a mark."""
    share = npages / total if total else 0.0
    eighths = max(1, round(share * BAR_WIDTH * 8))
    bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return f"{share:>6.1%}  {bar}"


def account_total(accounts: list[Any]) -> Any:
    """Add accounts up into one without a file."""
    total = type(accounts[0])()
    for name in ACCOUNT_SUMS:
        setattr(total, name, sum(getattr(account, name) for account in accounts))
    return total


COMMANDS = [host, ready]
