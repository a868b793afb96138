"""``rmemctl vm``: virtual machines, their memslots, attributes and initial image."""

from __future__ import annotations

from typing import IO

import click

from ..app import Group, Settings, pass_settings, private_option
from ..output import Column, Facts, Table
from ..plain import enum_word
from ..units import (
    ADDRESS,
    CONSUMER,
    FILE,
    PAGE_BYTES,
    PAGES,
    SETTING,
    SIZE,
    VM,
    count_text,
    pages_text,
    range_text,
    size_text,
)

PERSONALITIES = ["attributes", "in-place"]
PAGE_KINDS = ["normal", "vmsa", "zero", "unmeasured", "secrets", "cpuid"]
SLOT_FLAGS = {1: "log-dirty", 2: "read-only", 4: "guest-memfd"}

COLUMNS = [
    Column("VM", lambda vm: f"vm/{vm.vm}"),
    Column("NAME", lambda vm: vm.name or "-"),
    Column("CONSUMER", lambda vm: vm.consumer),
    Column("STATE", lambda vm: vm.state, words=True),
    Column("CONVERTS", lambda vm: enum_word(vm, "personality")),
    Column("SLOTS", lambda vm: str(len(vm.slots)), right=True),
    Column("VCPUS", lambda vm: str(vm.vcpus), right=True),
    Column("PRIVATE", lambda vm: pages_text(vm.mapped_private_pages), right=True),
    Column("SHARED", lambda vm: pages_text(vm.mapped_shared_pages), right=True),
    Column("LOCKED", lambda vm: pages_text(vm.locked_pages), right=True),
]

SLOT_COLUMNS = [
    Column("SLOT", lambda slot: str(slot.slot), right=True),
    Column("GFN", lambda slot: range_text(slot.gpa // PAGE_BYTES, slot.size_bytes // PAGE_BYTES)),
    Column("SIZE", lambda slot: size_text(slot.size_bytes), right=True),
    Column("FILE", lambda slot: file_text(slot.file, slot.file_open), words=True),
    Column("OFFSET", lambda slot: size_text(slot.file_offset_bytes), right=True),
    Column("FLAGS", lambda slot: flags_text(slot.flags)),
]

ATTRIBUTE_COLUMNS = [
    Column("GFN", lambda run: range_text(run.gpa // PAGE_BYTES, run.size_bytes // PAGE_BYTES)),
    Column("SIZE", lambda run: size_text(run.size_bytes), right=True),
    Column("IS", lambda run: "private" if run.attributes & 8 else "shared", words=True),
]

STEP_COLUMNS = [
    Column("STEP", lambda step: step.step),
    Column("REFERENCES", lambda step: str(step.references), right=True),
    Column("PINS", lambda step: str(step.pins), right=True),
]


@click.group(cls=Group)
def vm() -> None:
    """Make and change virtual machines."""


@vm.command("list", watchable=True)
@pass_settings
def list_vms(settings: Settings) -> None:
    """List the VMs; PRIVATE and SHARED are what is mapped."""
    reply = settings.client.vms.list()
    settings.out.show(
        reply,
        Table(COLUMNS, reply.vms, empty="no VMs"),
        items=reply.vms,
        names=[f"vm/{one.vm}" for one in reply.vms],
    )


@vm.command(watchable=True)
@click.argument("vm", type=VM)
@pass_settings
def show(settings: Settings, vm: int) -> None:
    """Show a VM and its slots."""
    found = settings.client.vms.get(vm)
    facts = Facts(
        [
            ("vm", f"vm/{found.vm}"),
            ("name", found.name),
            ("consumer", found.consumer),
            ("state", found.state),
            ("dead because", found.dead_reason),
            ("converts", enum_word(found, "personality")),
            ("vcpus", str(found.vcpus)),
            ("mapped private", pages_text(found.mapped_private_pages)),
            ("mapped shared", pages_text(found.mapped_shared_pages)),
            ("locked", pages_text(found.locked_pages)),
            ("measurement", found.measurement.hex()),
        ]
    )
    slots = Table(SLOT_COLUMNS, found.slots, empty="no slots")
    settings.out.show(found, facts, slots, names=[f"vm/{found.vm}"])


@vm.command()
@click.argument("consumer", type=CONSUMER)
@click.option("--name", default="", help="A name for people.")
@click.option(
    "--personality",
    type=click.Choice(PERSONALITIES),
    help="How it converts [default: as the consumer does].",
)
@click.option(
    "--config", type=SETTING, multiple=True, metavar="KEY=VALUE", help="A consumer's option."
)
@click.option("--private/--shared", default=None, help="How its memory starts.")
@click.option("--memlock", type=SIZE, default="0", help="RLIMIT_MEMLOCK [default: no limit].")
@pass_settings
def create(
    settings: Settings,
    consumer: str,
    name: str,
    personality: str | None,
    config: tuple[tuple[str, str], ...],
    private: bool | None,
    memlock: int,
) -> None:
    """Make a VM with a CONSUMER ("tdx-today"; see `consumers list`) and print its handle."""
    from rmem.v1 import types_pb2

    chosen = "UNSPECIFIED" if personality is None else personality.upper().replace("-", "_")
    made = settings.client.vms.create(
        consumer,
        personality=types_pb2.Personality.Value(f"PERSONALITY_{chosen}"),
        config=dict(config),
        memlock_pages=-(-memlock // PAGE_BYTES),
        name=name,
        starts_private=private,
    )
    reply = {"revision": settings.client.last_revision, "vm": made}
    settings.out.show(reply, f"vm/{made}", names=[f"vm/{made}"])


@vm.command("swap-consumer")
@click.argument("vm", type=VM)
@click.argument("consumer", type=CONSUMER, default="")
@click.option(
    "-c", "--config", type=SETTING, multiple=True, metavar="KEY=VALUE", help="A consumer's option."
)
@pass_settings
def swap_consumer(
    settings: Settings, vm: int, consumer: str, config: tuple[tuple[str, str], ...]
) -> None:
    """Replace a VM's consumer while it runs; its pages keep their bytes.

    Without CONSUMER its own is made anew. Refused if live state relies on an op that would be lost.
    """
    reply = settings.client.vms.swap_consumer(vm, consumer, config=dict(config))
    changed = "" if reply.previous == reply.consumer else f", was {reply.previous}"
    facts = Facts(
        [
            ("consumer", f"{reply.consumer}{changed}"),
            ("gained", " ".join(reply.gained)),
            ("lost", " ".join(reply.lost)),
            ("state", f"{reply.state_kind} version {reply.state_version}"),
            ("carried over", count_text(reply.carried_entries, "record")),
            ("held no more", pages_text(reply.released_pages)),
            ("held now", pages_text(reply.held_pages)),
            ("movability changed", pages_text(reply.reclassified_pages)),
            ("stood still", f"{reply.pause_us} µs"),
        ]
    )
    settings.out.show(reply, facts, names=[f"vm/{vm}"])


@vm.command()
@click.argument("vms", type=VM, nargs=-1, required=True, metavar="VM...")
@pass_settings
def destroy(settings: Settings, vms: tuple[int, ...]) -> None:
    """Destroy VMs: unmap everything, give the vendor's resources back; files live on."""
    for handle in vms:
        reply = settings.client.vms.destroy(handle)
        settings.out.show(reply, f"vm/{handle} destroyed", names=[f"vm/{handle}"])


@vm.command()
@click.argument("vm", type=VM)
@click.argument("slot", type=int)
@click.option("--gpa", type=ADDRESS, help="Guest physical address.")
@click.option("--size", type=SIZE, help="Its size.")
@click.option("--file", type=FILE, default=0, help="The restricted file to bind [default: none].")
@click.option("--offset", type=SIZE, default=0, help="Offset in that file [default: 0].")
@click.option("--read-only", is_flag=True, help="KVM_MEM_READONLY.")
@click.option("--delete", is_flag=True, help="Delete the slot.")
@pass_settings
def slot(
    settings: Settings,
    vm: int,
    slot: int,
    gpa: int | None,
    size: int | None,
    file: int,
    offset: int,
    read_only: bool,
    delete: bool,
) -> None:
    """Add, change or delete a memslot."""
    if delete:
        reply = settings.client.vms.delete_memory_region(vm, slot)
        settings.out.show(reply, f"slot {slot} of vm/{vm} deleted", names=[str(slot)])
        return
    if gpa is None or size is None:
        raise click.UsageError("a slot needs --gpa and --size (or --delete)")
    reply = settings.client.vms.set_memory_region(
        vm,
        slot,
        gpa=gpa,
        size_bytes=size,
        file=file,
        file_offset_bytes=offset,
        flags=(4 if file else 0) | (2 if read_only else 0),
    )
    where = range_text(gpa // PAGE_BYTES, size // PAGE_BYTES)
    settings.out.show(reply, f"slot {slot} of vm/{vm} set: gfn {where}", names=[str(slot)])


@vm.command()
@click.argument("vm", type=VM)
@click.argument("gfns", type=PAGES, nargs=-1, required=True, metavar="GFNS...")
@private_option
@pass_settings
def convert(settings: Settings, vm: int, gfns: tuple[tuple[int, int], ...], private: bool) -> None:
    """Make guest frames private or shared (KVM_SET_MEMORY_ATTRIBUTES).

    For VMs that convert in place, use `rmemctl mem convert`.
    """
    attributes = 8 if private else 0
    ranges = [(start * PAGE_BYTES, npages * PAGE_BYTES, attributes) for start, npages in gfns]
    reply = settings.client.vms.set_memory_attributes(vm, ranges)
    text = f"{count_text(reply.done_ranges, 'range')} {'private' if private else 'shared'}"
    if reply.unchanged_ranges:
        text += f", {reply.unchanged_ranges} of them before already"
    settings.out.show(reply, text, names=[f"vm/{vm}"])


@vm.command()
@click.argument("vm", type=VM)
@click.argument("source", type=click.File("rb"))
@click.option("--gpa", type=ADDRESS, required=True, help="Guest physical address of the first.")
@click.option("--kind", type=click.Choice(PAGE_KINDS), default="normal", show_default=True)
@click.option("--measure/--no-measure", default=True, help="Measure the content [default: yes].")
@pass_settings
def populate(
    settings: Settings, vm: int, source: IO[bytes], gpa: int, kind: str, measure: bool
) -> None:
    """Take initial private pages in from the file SOURCE ("-": stdin).

    The last page is filled up with zeros.
    """
    from rmem.v1 import vm_pb2

    data = source.read()
    data += bytes(-len(data) % PAGE_BYTES)
    reply = settings.client.vms.populate(
        vm,
        gpa,
        data,
        kind=vm_pb2.PageKind.Value(f"PAGE_KIND_{kind.upper()}"),
        measure=measure,
    )
    text = f"{count_text(reply.done_pages, 'page')} taken in at gpa {gpa:#x}"
    settings.out.show(reply, text, names=[f"vm/{vm}"])


@vm.command()
@click.argument("vm", type=VM)
@pass_settings
def finalize(settings: Settings, vm: int) -> None:
    """Close the measurement and print it; vCPUs may run from then on."""
    measurement = settings.client.vms.finalize(vm)
    reply = {"revision": settings.client.last_revision, "measurement": measurement}
    settings.out.show(reply, measurement.hex() or "finalized, unmeasured", names=[f"vm/{vm}"])


@vm.command()
@click.argument("vm", type=VM)
@click.argument("gfns", type=PAGES)
@click.option("--trace", is_flag=True, help="Show the first page's references at every step.")
@pass_settings
def prefault(settings: Settings, vm: int, gfns: tuple[int, int], trace: bool) -> None:
    """Fault guest frames in (KVM_PRE_FAULT_MEMORY)."""
    start, npages = gfns
    reply = settings.client.vms.prefault(vm, start * PAGE_BYTES, npages * PAGE_BYTES, trace=trace)
    text = f"{count_text(reply.done_pages, 'page')} mapped"
    if reply.left_bytes:
        text += f", {size_text(reply.left_bytes)} left"
    if reply.retries:
        text += f", begun again {count_text(reply.retries, 'time')}"
    settings.out.show(reply, text, Table(STEP_COLUMNS, reply.steps), names=[f"vm/{vm}"])


@vm.command(watchable=True)
@click.argument("vm", type=VM)
@click.argument("gfns", type=PAGES, required=False)
@pass_settings
def attributes(settings: Settings, vm: int, gfns: tuple[int, int] | None) -> None:
    """Show which guest frames are private and which shared [default: all that slots cover]."""
    start, npages = gfns or (0, slots_end(settings, vm))
    reply = settings.client.vms.get_memory_attributes(vm, start * PAGE_BYTES, npages * PAGE_BYTES)
    settings.out.show(
        reply,
        Table(ATTRIBUTE_COLUMNS, reply.runs, empty="no attributes"),
        items=reply.runs,
        names=[
            range_text(run.gpa // PAGE_BYTES, run.size_bytes // PAGE_BYTES) for run in reply.runs
        ],
    )


def slots_end(settings: Settings, vm: int) -> int:
    """Return the first guest frame after all slots."""
    slots = settings.client.vms.get(vm).slots
    if not slots:
        raise click.UsageError(f"vm/{vm} has no slots; name the guest frames")
    return max(one.gpa + one.size_bytes for one in slots) // PAGE_BYTES


def file_text(file: int, is_open: bool) -> str:
    """Name a slot's file, saying so if it was closed under it."""
    return "-" if not file else f"file/{file}" if is_open else f"file/{file} (closed)"


def flags_text(flags: int) -> str:
    """Spell a slot's flags."""
    return " ".join(name for bit, name in SLOT_FLAGS.items() if flags & bit) or "-"


COMMANDS = [vm]
