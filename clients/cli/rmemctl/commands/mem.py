"""``rmemctl mem``: restricted files, the memory that VMs' private pages live in."""

from __future__ import annotations

import sys
from typing import IO

import click

from ..app import Group, Settings, pass_settings, private_option
from ..output import Column, Facts, Table
from ..units import (
    FILE,
    PAGE_BYTES,
    PAGES,
    PIN,
    SIZE,
    VM,
    count_text,
    pages_text,
    range_text,
    size_text,
)

FLAGS = {1: "mmap", 2: "init-shared"}

COLUMNS = [
    Column("FILE", lambda file: f"file/{file.file}"),
    Column("VM", lambda file: f"vm/{file.vm}" if file.vm else "-"),
    Column("SIZE", lambda file: size_text(file.size_bytes), right=True),
    Column("PRIVATE", lambda file: pages_text(file.private_pages), right=True),
    Column("SHARED", lambda file: pages_text(file.shared_pages), right=True),
    Column("FLAGS", lambda file: flags_text(file.flags)),
    Column("BOUND TO", lambda file: ", ".join(map(binding_text, file.bindings)) or "-", wrap=True),
]

BINDING_COLUMNS = [
    Column("PGOFF", lambda binding: range_text(binding.pgoff, binding.npages)),
    Column("SIZE", lambda binding: pages_text(binding.npages), right=True),
    Column("VM", lambda binding: f"vm/{binding.vm}"),
    Column("SLOT", lambda binding: str(binding.slot), right=True),
    Column("GFN", lambda binding: range_text(binding.gfn, binding.npages)),
]


@click.group(cls=Group)
def mem() -> None:
    """Make and change restricted files (guest_memfd).

    RANGE counts pages of the file: START, START+COUNT or START-END.
    """


@mem.command("list", watchable=True)
@pass_settings
def list_files(settings: Settings) -> None:
    """List the restricted files; PRIVATE and SHARED are the pages present."""
    reply = settings.client.files.list()
    settings.out.show(
        reply,
        Table(COLUMNS, reply.files, empty="no restricted files"),
        items=reply.files,
        names=[f"file/{file.file}" for file in reply.files],
    )


@mem.command(watchable=True)
@click.argument("file", type=FILE)
@pass_settings
def show(settings: Settings, file: int) -> None:
    """Show a file and its bindings."""
    found = settings.client.files.get(file)
    facts = Facts(
        [
            ("file", f"file/{found.file}"),
            ("vm", f"vm/{found.vm}" if found.vm else "-"),
            ("size", size_text(found.size_bytes)),
            ("flags", flags_text(found.flags)),
            ("block size", size_text(found.blksize_bytes)),
            ("private present", pages_text(found.private_pages)),
            ("shared present", pages_text(found.shared_pages)),
        ]
    )
    bindings = Table(BINDING_COLUMNS, found.bindings, empty="bound to no slot")
    settings.out.show(found, facts, bindings, names=[f"file/{file}"])


@mem.command()
@click.argument("vm", type=VM)
@click.argument("size", type=SIZE)
@click.option("--mmap", is_flag=True, help="The host can map its shared pages.")
@click.option("--init-shared", is_flag=True, help="Its pages are shared at first.")
@pass_settings
def create(settings: Settings, vm: int, size: int, mmap: bool, init_shared: bool) -> None:
    """Make a file of SIZE for VM and print its handle."""
    flags = (1 if mmap else 0) | (2 if init_shared else 0)
    made = settings.client.files.create(vm, size, flags=flags)
    reply = {"revision": settings.client.last_revision, "file": made}
    settings.out.show(reply, f"file/{made}", names=[f"file/{made}"])


@mem.command()
@click.argument("files", type=FILE, nargs=-1, required=True, metavar="FILE...")
@pass_settings
def close(settings: Settings, files: tuple[int, ...]) -> None:
    """Close files: bindings are cut, every page is freed."""
    for file in files:
        freed = settings.client.files.close(file)
        reply = {"revision": settings.client.last_revision, "freed_pages": freed}
        text = f"file/{file} closed, {count_text(freed, 'page')} freed"
        settings.out.show(reply, text, names=[f"file/{file}"])


@mem.command()
@click.argument("file", type=FILE)
@click.argument("range", type=PAGES)
@pass_settings
def allocate(settings: Settings, file: int, range: tuple[int, int]) -> None:
    """Allocate pages (fallocate)."""
    pages = settings.client.files.allocate(file, *in_bytes(range))
    reply = {"revision": settings.client.last_revision, "pages": pages}
    settings.out.show(reply, f"{count_text(pages, 'page')} allocated", names=[f"file/{file}"])


@mem.command()
@click.argument("file", type=FILE)
@click.argument("range", type=PAGES)
@pass_settings
def punch(settings: Settings, file: int, range: tuple[int, int]) -> None:
    """Punch a hole: all pages of the range are freed, or none."""
    pages = settings.client.files.punch(file, *in_bytes(range))
    reply = {"revision": settings.client.last_revision, "pages": pages}
    settings.out.show(reply, f"{count_text(pages, 'page')} freed", names=[f"file/{file}"])


@mem.command()
@click.argument("file", type=FILE)
@click.argument("range", type=PAGES)
@private_option
@pass_settings
def convert(settings: Settings, file: int, range: tuple[int, int], private: bool) -> None:
    """Convert pages in place, for VMs of that personality."""
    reply = settings.client.files.convert(file, *in_bytes(range), private=private)
    text = f"{count_text(reply.changed_pages, 'page')} now {'private' if private else 'shared'}"
    if reply.content:
        text += f", content {reply.content}"
    settings.out.show(reply, text, names=[f"file/{file}"])


@mem.command()
@click.argument("file", type=FILE)
@click.option("--offset", type=SIZE, default="0", help="Offset in bytes [default: 0].")
@click.option("--length", type=SIZE, default="4K", help="Length in bytes [default: 4K].")
@pass_settings
def read(settings: Settings, file: int, offset: int, length: int) -> None:
    """Read shared bytes as the host would: a hex dump on a terminal, raw bytes elsewhere."""
    data = settings.client.files.read_shared(file, offset, length)
    if settings.out.is_json:
        reply = {"revision": settings.client.last_revision, "data": data}
        settings.out.show(reply)
    elif sys.stdout.isatty():
        for line in hex_dump(data, offset):
            settings.out.line(line)
    else:
        sys.stdout.buffer.write(data)


@mem.command()
@click.argument("file", type=FILE)
@click.argument("source", type=click.File("rb"))
@click.option("--offset", type=SIZE, default="0", help="Offset in bytes [default: 0].")
@pass_settings
def write(settings: Settings, file: int, source: IO[bytes], offset: int) -> None:
    """Write shared bytes from the file SOURCE ("-": stdin) as the host would."""
    data = source.read()
    revision = settings.client.files.write_shared(file, offset, data)
    text = f"{count_text(len(data), 'byte')} written at offset {offset:#x}"
    settings.out.show({"revision": revision}, text, names=[f"file/{file}"])


@mem.command()
@click.argument("file", type=FILE)
@click.argument("range", type=PAGES)
@click.option("--purpose", default="rmemctl", show_default=True, help="Why: refusals say it.")
@click.option("--holder", default="", help="Who: refusals say it.")
@pass_settings
def pin(settings: Settings, file: int, range: tuple[int, int], purpose: str, holder: str) -> None:
    """Hold present pages in place, as DMA does, and print the pin's handle."""
    made = settings.client.files.pin(file, *in_bytes(range), purpose=purpose, holder=holder)
    reply = {"revision": settings.client.last_revision, "pin": made}
    settings.out.show(reply, f"pin/{made}", names=[f"pin/{made}"])


@mem.command()
@click.argument("pins", type=PIN, nargs=-1, required=True, metavar="PIN...")
@pass_settings
def unpin(settings: Settings, pins: tuple[int, ...]) -> None:
    """Let pins go."""
    for pin in pins:
        reply = settings.client.files.unpin(pin)
        settings.out.show(reply, f"pin/{pin} let go", names=[f"pin/{pin}"])


def in_bytes(pages: tuple[int, int]) -> tuple[int, int]:
    """Return a page range's offset and length in bytes."""
    start, npages = pages
    return start * PAGE_BYTES, npages * PAGE_BYTES


def hex_dump(data: bytes, offset: int) -> list[str]:
    """Return lines as hexdump -C has them, repeated lines as one "*"."""
    lines: list[str] = []
    before = b""
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        if row == before and start + 16 < len(data):
            if lines[-1] != "*":
                lines.append("*")
            continue
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        digits = f"{row[:8].hex(' ')}  {row[8:].hex(' ')}"
        lines.append(f"{offset + start:08x}  {digits:<48}  |{text}|")
        before = row
    return lines


def flags_text(flags: int) -> str:
    """Spell a file's flags."""
    return " ".join(name for bit, name in FLAGS.items() if flags & bit) or "-"


def binding_text(binding: object) -> str:
    """Name a binding's slot."""
    return f"vm/{binding.vm} slot {binding.slot}"  # type: ignore[attr-defined]


COMMANDS = [mem]
