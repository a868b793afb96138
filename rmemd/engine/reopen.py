"""Reopening: a state had back from its log, and what the end of its process left half-way.

Owns what a log begins with (``checkpoint``), reading it back (``open_log``, ``read``), and the
steps by which the engine then agrees with its memfds (``settle``). Outcomes are applied, nothing is
executed again. What can have been under way is little, because of the order that bytes and records
keep: bytes in frames that nobody owned (they are punched), one write in place (its pages are old or
new, and the state is made to say which), and destruction that was recorded (it is done again).

Words: a process is *restarted*; an engine is *reopened*, once, from the log that it finds; what was
interrupted is *resumed* and goes on as itself: a transaction, a session, a consumer, a watch.
*Recovery* is all of that as users are promised it, and ``Recovered`` the report that they get.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct, field

from rmemd.engine.journal import Journal
from rmemd.engine.notes import Notes
from rmemd.engine.sharedmemory import SHARED_MEMFDS
from rmemd.errors import RmemError
from rmemd.hooks.tables import Space
from rmemd.hooks.tx import Tx
from rmemd.model.files import PRIVATE, RestrictedFile
from rmemd.model.host import ARENA, Stored, Use
from rmemd.model.vms import Vm, unpack
from rmemd.store.codec import NoteEntry, Record, decode, encode_note, encode_record
from rmemd.store.keeping import ARENA as ARENA_NAME
from rmemd.store.keeping import FILE_PREFIX, JOURNALS, Keeping
from rmemd.store.log import Log
from rmemd.units import I64, PAGE_SIZE, U8, U64, distinct, pages

if TYPE_CHECKING:
    from rmemd.engine.core import Core
    from rmemd.engine.driver import Steps

# notes of shared holes that are being filled: (file, pgoff) -> pages, until the record is written
FILLING = "filling"
# what a frame holds, which is all that a write in place changes
HELD = ("host/stored", "host/key", "host/mac", "host/flags")
LOST = "its memory was lost with the process that kept it"


class Opened(Struct):
    """A log, and what it began with; ``frames`` are those that were read back."""

    log: Log | None
    life: str
    facts: dict[str, Any]
    frames: Iterator[bytes] | None = None
    cut_bytes: int = 0

    @property
    def header(self) -> dict[str, Any]:
        """Return what each generation of the log begins with."""
        return {"life": self.life, "facts": self.facts}


class ReadBack(Struct):
    """What a log had.

    Attributes:
        records: how many were applied.
        cut_bytes: of a torn tail.
        in_flight: writes in place that may not have reached their frames: frames, sums of the new
            bytes, and what the frames held before, by table.
    """

    records: int = 0
    cut_bytes: int = 0
    in_flight: list[tuple[I64, U64, dict[str, Any]]] = field(default_factory=list)


class Recovered(Struct, frozen=True):
    """What reopening found and did.

    Attributes:
        revision: of the last record.
        undone_pages: pages of a write in place that had not reached them.
        stray_pages: pages of the arena that no record spoke of.
        scrubbed_frames: frames whose destruction was recorded and not done.
        lost: objects whose memory is gone, as messages name them, and what a consumer lost.
    """

    revision: int
    records: int
    cut_bytes: int
    undone_pages: int
    stray_pages: int
    scrubbed_frames: int
    lost: tuple[str, ...]


# --- reading -------------------------------------------------------------------------------------
def open_log(life: str, facts: dict[str, Any], keeping: Keeping, journalled: bool) -> Opened:
    """Open the log that was kept, or a new one if there is to be one.

    Raises:
        JournalUnreadable: it is of another boot or format.
    """
    kept = [fd for name in JOURNALS if (fd := keeping.take(name)) is not None]
    if len(kept) != len(JOURNALS) and not journalled:
        return Opened(None, life, facts)
    # the arena is kept when the log has begun already: a log that seems never to have is damaged
    had_log = ARENA_NAME in keeping.found
    log = Log((kept[0], kept[1]) if len(kept) == len(JOURNALS) else None, expected=had_log)
    for name, fd in zip(JOURNALS, log.fds, strict=True):
        keeping.keep(name, fd)
    found = log.found
    if found is None:
        opened = Opened(log, life, facts)
        log.begin_checkpoint(opened.header).commit()
        return opened
    header = found.header
    return Opened(log, header["life"], header["facts"], found.frames, found.cut)


def read(opened: Opened, space: Space, journal: Journal, notes: Notes) -> ReadBack | None:
    """Apply what a log has; None if it is new or there is none."""
    if opened.frames is None:
        return None
    done = ReadBack(cut_bytes=opened.cut_bytes)
    for frame in opened.frames:
        done.in_flight = []
        for entry in decode(frame):
            if isinstance(entry, NoteEntry):
                notes.restore(entry)
                continue
            if entry.digests:
                done.in_flight = [(*digest, held(space, digest[0])) for digest in entry.digests]
            for write in entry.writes:
                space.apply(write)
            journal.restore(entry)
            done.records += 1
    return done


def held(space: Space, pfns: I64) -> dict[str, Any]:
    """Return what frames hold, by table."""
    tables: Any = space.tables
    return {name: tables[name].get(pfns) for name in HELD}


def checkpoint(space: Space, journal: Journal, notes: Notes) -> Iterator[bytes]:
    """Return the entries that a log begins with: the newest events, the state, the notes."""
    for record in journal.newest_events():
        yield encode_record(record)
    for table in list(space.tables.values()):
        yield encode_record(Record(journal.revision, "checkpoint", tuple(table.content())))
    for note in notes.all():
        yield encode_note(note)


# --- agreeing with the memfds --------------------------------------------------------------------
def settle(core: Core, done: ReadBack) -> Steps[Recovered]:
    """Have state and memfds agree: finish what was recorded, undo what was not.

    Source: DESIGN §6, order with bytes; reliability.md I19, I20.
    """
    lost = _take_shared_memfds(core)
    undone = _undo_in_flight(core, done)
    strays, missing = core.controller.strays()
    core.controller.punch(strays)
    lost += _give_up(core, missing)
    for file in core.files.all():
        if file.info.in_place and core.has_shared_memory(file):
            _discard_halves(core, file)
    for (number, pgoff), npages in core.notes.items(FILLING):
        _empty(core, number, pages(pgoff, npages))
        core.notes.drop(FILLING, (number, pgoff))
    _discard_shared_in_arena(core)
    scrubbing = np.flatnonzero(core.host.use.view == int(Use.SCRUBBING)).astype(np.int64)
    core.scrub_later(scrubbing)
    yield from core.scrub()
    for vm in core.vms.all():
        try:
            said = core.consumer(vm).resume(partial(_plaintext, core, vm))
        except RmemError as refusal:
            said = str(refusal)
        if said:
            lost.append(f"{vm.info.label}: {said}")
    return Recovered(
        core.journal.revision, done.records, done.cut_bytes, undone, int(strays.size),
        int(scrubbing.size), tuple(lost),
    )  # fmt: skip


def _plaintext(core: Core, vm: Vm, gfns: I64) -> U8:
    """Return what a VM's mapped pages hold, for its own consumer; of others, zeros."""
    pfns, _ = unpack(vm.mirror.get(gfns))
    rows = np.zeros((gfns.size, PAGE_SIZE), dtype=np.uint8)
    there = pfns >= 0
    rows[there], _ = core.controller.read(pfns[there], int(core.host.vm_keys.get(vm.info.vm, 0)))
    return rows


def _take_shared_memfds(core: Core) -> list[str]:
    """Take what was kept of files that are there, let the rest go; return the files that lost."""
    had = {number for number, _ in core.notes.items(SHARED_MEMFDS)}
    lost = []
    for file in core.files.all():
        name = core.shared.name(file.info.file)
        if name in core.keeping.found:
            core.shared_memory(file)
        elif file.info.file in had:
            lost.append(f"file/{file.info.file}")
            _lose(core, file.info.vm)
    for name in [name for name in core.keeping.found if name.startswith(FILE_PREFIX)]:
        fd = core.keeping.take(name)
        assert fd is not None
        os.close(fd)
        core.keeping.drop(name)
    return lost


def _undo_in_flight(core: Core, done: ReadBack) -> int:
    """Have pages that the last write in place did not reach hold what they held before."""
    label = "reopen: a write that was cut off"
    return sum(undo_in_place(core, label, *in_flight) for in_flight in done.in_flight)


def undo_in_place(core: Core, label: str, pfns: I64, sums: U64, before: dict[str, Any]) -> int:
    """Have frames that a write in place did not reach hold what they held; return how many.

    Args:
        core: the engine's core.
        label: of the transaction.
        pfns: the frames that were to be written.
        sums: of the bytes that were to be there.
        before: what the frames held (``held``).
    """
    tables: Any = core.space.tables
    old = core.controller.sums(pfns) != sums
    if old.any():
        with core.tx(label) as tx:
            for name, values in before.items():
                tx.put(tables[name], pfns[old], values[old])
    return int(old.sum())


def _give_up(core: Core, missing: I64) -> list[str]:
    """Have frames whose page of the arena is gone say so; return the VMs that lost bytes."""
    host = core.host
    gone = missing[host.stored.get(missing) == Stored.BYTES]
    with core.tx("reopen: arena") as tx:
        tx.put(host.flags, missing, host.flags.get(missing) & ~ARENA)
        core.controller.taint(tx, gone)
    owners = distinct(host.owner.get(gone))
    vms = {core.files.get(n).info.vm for n in owners[owners > 0].tolist()}
    for vm in sorted(vms):
        _lose(core, vm)
    return [f"vm/{vm}" for vm in sorted(vms)]


def _lose(core: Core, number: int) -> None:
    if core.vms.exists(number):
        with core.tx("reopen: lost") as tx:
            core.kill(tx, number, LOST)


def _discard_halves(core: Core, file: RestrictedFile) -> None:
    """Empty what a file's shared memfd holds of pages that the state knows to be elsewhere.

    A private page has no bytes there: what is there was put by a conversion that was not recorded,
    or left by one that was. A punch that was recorded is in ``discards``.
    """
    number, size = file.info.file, file.info.size_pages
    there = core.shared_memory(file).present(0, size)
    _empty(core, number, there[file.attributes.get(there) == PRIVATE])
    for (owner, start), npages in core.files.discards.items():
        if owner == number:
            _empty(core, number, pages(start, npages))
            with core.tx("punch: shared") as tx:
                tx.drop(core.files.discards, (owner, start))


def _empty(core: Core, number: int, pgoffs: I64) -> None:
    if core.files.exists(number) and core.has_shared_memory(core.files.get(number)):
        core.shared_memory(core.files.get(number)).punch(pgoffs)


def _discard_shared_in_arena(core: Core) -> None:
    """Empty the arena's copy of pages whose bytes are in a shared memfd."""
    host = core.host
    copies = (host.stored.view == int(Stored.SHARED)) & (host.flags.view & ARENA != 0)
    pfns = np.flatnonzero(copies).astype(np.int64)
    core.controller.punch(pfns)
    with core.tx("convert: discard") as tx:
        tx.put(host.flags, pfns, host.flags.get(pfns) & ~ARENA)


def resume_consumers(core: Core, tx: Tx) -> None:
    """Make each VM's consumer anew over the tables that are there.

    Raises:
        RmemError: a plugin that a VM uses is not installed, or refuses its own tables.
    """
    for vm in core.vms.all():
        offer = core.registry.offer(vm.info.consumer)
        platform = core.registry.platforms[offer.platform]
        core.consumers[vm.info.vm] = core.registry.make_of(
            tx, vm.info.vm, platform, offer.variant, vm.info.config, importing=True
        )
