"""Invariants of who has what: slots, handles, sessions, tenants, quotas, descriptors, secrets.

Owns a part of ``engine.invariants``, about I3, I14-I18, I20, I21, I23 and I24: each reads every
table it needs and writes none, and says in its docstring what must hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np

from rmemd.engine.core import Core
from rmemd.engine.pageinvariants import named
from rmemd.engine.quotas import UNLIMITED, frames_used, pinned_pages, sessions_open
from rmemd.hooks.tables import Write
from rmemd.model.host import Stored, Use
from rmemd.model.sessions import ADMIN
from rmemd.model.vms import Vm
from rmemd.store.keeping import ARENA, FILE_PREFIX
from rmemd.store.memfd import is_sealed
from rmemd.units import MAX_GFN, distinct

# what is looked at for secrets: frames, bytes of each, and the newest events and records
SAMPLED = 8
LINE = 16
TOLD = 64
# fewer different bytes are found by chance where numbers are written down
LINE_VALUES = 12


def slots(core: Core) -> Iterator[str]:
    """I3: slots, the slot map and the files' bindings say the same.

    I17: a slot lies inside its file.
    """
    bound = {
        (file.info.file, *key, binding.pgoff, binding.npages, binding.gfn)
        for file in core.files.all()
        for key, binding in file.bindings.items()
    }
    slots = {
        (slot.file, vm.info.vm, index, slot.pgoff, slot.npages, slot.gfn)
        for vm in core.vms.all()
        for index, slot in vm.slots.items()
        if core.files.exists(slot.file)
    }
    for name in sorted(bound ^ slots):
        yield f"I3: slot and binding differ at (file, vm, slot, pgoff, npages, gfn) {name}"
    for vm in core.vms.all():
        for index, slot in vm.slots.items():
            if not _is_inside(core, slot.file, slot.pgoff, slot.npages):
                yield f"I17: slot {index} of {vm.info.label} is not inside file/{slot.file}"
        yield from _slot_map(vm)


def _is_inside(core: Core, number: int, pgoff: int, npages: int) -> bool:
    """Return whether pages are a file's, or the file is gone."""
    if not core.files.exists(number):
        return True
    return 0 <= pgoff < pgoff + npages <= core.files.get(number).info.size_pages


def _slot_map(vm: Vm) -> Iterator[str]:
    covered = 0
    for index, slot in vm.slots.items():
        covered += slot.npages
        if not vm.slotmap.equals(slot.gfn, slot.npages, index + 1):
            yield f"I3: the slot map of {vm.info.label} differs from slot {index}"
    _, counts, values = vm.slotmap.runs(0, MAX_GFN)
    if int(counts[values != 0].sum()) != covered:
        yield f"I3: the slot map of {vm.info.label} covers more than its slots"


def handles(core: Core) -> Iterator[str]:
    """I16: no handle is above its counter, so none is given out twice, and VMs have a consumer.

    A key is there for as long as bytes are under it.
    """
    numbers = {
        "vm": [vm.info.vm for vm in core.vms.all()],
        "file": [file.info.file for file in core.files.all()],
        "key": [number for number, _ in core.host.keys.items()],
        "session": [info.session for info in core.sessions.all()],
        "pin": [pin.pin for pin in core.sessions.pins()],
        "userfault": [one.userfault for one in core.userfaults.all()],
    }
    for counter, used in numbers.items():
        if max(used, default=0) > core.host.counters.get(counter, 0):
            yield f"I16: {counter} {max(used)} is above the counter"
    under = core.host.key.view
    for key in distinct(under[under != 0]).tolist():
        if key not in core.host.keys:
            yield f"I16: bytes are under key {key}, which is gone"
    if set(numbers["vm"]) != set(core.consumers):
        yield "I16: VMs and consumers are not the same"


def userfaults(core: Core) -> Iterator[str]:
    """I3: fault handlers have files that are there, and what waits, waits for holes of theirs.

    I17: a fault handler's range lies inside its file.
    """
    for one, after in pairwise([*core.userfaults.all(), None]):
        assert one is not None
        if not core.files.exists(one.file):
            yield f"I3: userfault {one.userfault} is of file/{one.file}, which is gone"
        elif one.npages <= 0 or one.end > core.files.get(one.file).info.size_pages:
            yield f"I17: userfault {one.userfault} is not inside file/{one.file}"
        if after is not None and after.file == one.file and after.pgoff < one.end:
            yield f"I3: userfaults {one.userfault} and {after.userfault} overlap"
    for fault in core.pending_faults.waiting:
        if not fault.pgoffs.size:
            # it was woken, and looks again when its turn comes
            continue
        where = f"of file/{fault.file} is waited for"
        if not core.files.exists(fault.file):
            yield f"I3: page {int(fault.pgoffs[0]):#x} {where}, and the file is gone"
            continue
        covered = core.userfaults.covers(fault.file, fault.pgoffs)
        yield from named("I3", ~covered, fault.pgoffs, f"{where}, and has no handler")
        half = core.files.get(fault.file).half(fault.private)
        there = half.get(fault.pgoffs) != 0
        yield from named("I3", there, fault.pgoffs, f"{where}, and is there")
        if fault.vm and not core.vms.exists(fault.vm):
            yield f"I3: page {int(fault.pgoffs[0]):#x} {where} by vm/{fault.vm}, which is gone"


def sessions(core: Core) -> Iterator[str]:
    """I14: nobody holds or owns anything in the name of a session that is gone.

    I17: what a device is granted lies inside its file.
    """
    alive = {info.session for info in core.sessions.all()}
    for pin in core.sessions.pins():
        if pin.owner.session and pin.owner.session not in alive:
            yield f"I14: pin {pin.pin} is of session {pin.owner.session}, which is gone"
    labels = {info.label for info in core.sessions.all()}
    for entry in core.ledger.entries():
        if entry.holder.startswith("session ") and entry.holder not in labels:
            yield f"I14: {entry.holder} holds pages ({entry.purpose}), and is gone"
    owners = [(vm.info.label, vm.info.owner) for vm in core.vms.all()]
    owners += [(f"file/{file.info.file}", file.info.owner) for file in core.files.all()]
    for name, owner in owners:
        if owner.session and owner.session not in alive:
            yield f"I14: {name} is of session {owner.session}, which is gone"
    for info in core.sessions.all():
        for grant in info.grants:
            if not _is_inside(core, grant.file, grant.pgoff, grant.npages):
                yield f"I17: {info.label} is granted what is not inside file/{grant.file}"
        if info.parent and info.parent not in alive:
            yield f"I14: {info.label} is below session {info.parent}, which is gone"
    for one in core.userfaults.all():
        if one.session and one.session not in alive:
            yield f"I14: userfault {one.userfault} is of session {one.session}, which is gone"


def tenants(core: Core) -> Iterator[str]:
    """I15: who has something of a file, or of a VM, is of its tenant, or an admin."""
    roles = {info.session: info.role for info in core.sessions.all()}
    # what was made for nobody is anybody's
    tenant_of = {
        file.info.file: file.info.owner.tenant
        for file in core.files.all()
        if file.info.owner.tenant
    }
    for vm in core.vms.all():
        for index, slot in vm.slots.items():
            if tenant_of.get(slot.file, vm.info.owner.tenant) != vm.info.owner.tenant:
                yield f"I15: slot {index} of {vm.info.label} has another tenant's file/{slot.file}"
    has = [(f"pin {pin.pin}", pin.owner.session, pin.owner.tenant, pin.file)
           for pin in core.sessions.pins()]  # fmt: skip
    for info in core.sessions.all():
        has += [(info.label, info.session, info.tenant, grant.file) for grant in info.grants]
        of_vm = core.vms.get(info.vm).info.owner.tenant if core.vms.exists(info.vm) else info.tenant
        if of_vm != info.tenant:
            yield f"I15: {info.label} is a guest of another tenant's vm/{info.vm}"
    for name, session, tenant, number in has:
        foreign = tenant_of.get(number, tenant) != tenant
        if session and foreign and roles.get(session) != ADMIN:
            yield f"I15: {name} reaches another tenant's file/{number}"


def quotas(core: Core) -> Iterator[str]:
    """I18: a tenant's frames, pins and sessions are within the highest limit it ever had."""
    names = {file.info.owner.tenant for file in core.files.all()}
    names |= {info.tenant for info in core.sessions.all()}
    for tenant in sorted(names):
        most = core.quotas.most(tenant)
        for what, limit, used in (
            ("frames", most.frames, frames_used),
            ("pinned pages", most.pinned_pages, pinned_pages),
            ("sessions", most.sessions, sessions_open),
        ):
            if limit != UNLIMITED and used(core, tenant) > limit:
                yield f"I18: {tenant or 'nobody'} has {used(core, tenant)} {what} of {limit}"


def descriptors(core: Core) -> Iterator[str]:
    """I20: each shared memfd is a live file's, or a spare one of a live session.

    I23: what can be passed is sealed and 0600: the shared memfds, and not the arena.
    """
    for session, _, _ in core.shared.spares():
        if not core.sessions.exists(session):
            yield f"I20: a spare memfd outlives session {session}"
    for number, fd in core.shared.descriptors().items():
        if not core.files.exists(number):
            yield f"I20: the shared memfd of file/{number} outlives it"
        if not is_sealed(fd):
            yield f"I23: the shared memfd of file/{number} is not sealed, or not 0600"


def kept(core: Core) -> Iterator[str]:
    """I20: what is kept beyond the process is the arena and each shared memfd, and no more."""
    names = core.keeping.names
    if names is None:
        return
    meant = core.shared.names() | {ARENA}
    there = {name for name in names if name.startswith(FILE_PREFIX) or name == ARENA}
    for name in sorted(meant - there):
        yield f"I20: {name} is not kept, and would be lost"
    for name in sorted(there - meant):
        yield f"I20: {name} is kept, and is nobody's"


def records(core: Core) -> Iterator[str]:
    """I21: the records that are kept count up by one, to the present revision."""
    revisions = [record.revision for record in core.journal.records]
    for one, after in pairwise(revisions):
        if after != one + 1:
            yield f"I21: revision {after} follows {one}"
    if revisions and revisions[-1] != core.journal.revision:
        yield f"I21: the last record is of {revisions[-1]}, not {core.journal.revision}"


def secrets(core: Core) -> Iterator[str]:
    """I24: lines of private pages, a sample of them, are in no event and no kept record."""
    journal = core.journal
    told = journal.events_after(max(journal.revision - TOLD, journal.oldest_revision()))
    written = [record.writes for record in islice(reversed(journal.records), TOLD)]
    text = repr([event.fields for event in told]).encode()
    data = b"".join(_bytes_of(write) for writes in written for write in writes)
    for pfn, line in _sample(core):
        if line in data or line.hex().encode() in text:
            yield f"I24: page {pfn:#x} holds private bytes that were written down or told"


def _bytes_of(write: Write) -> bytes:
    """Return what a record holds of bytes, as the log has it."""
    return b"".join(
        arg.tobytes() if isinstance(arg, np.ndarray) else repr(arg).encode() for arg in write.args
    )


def _sample(core: Core) -> Iterator[tuple[int, bytes]]:
    """Yield frames with a line of their plaintext that cannot be anything else's by chance."""
    host = core.host
    secret = [number for number, spec in host.keys.items() if not spec.plain]
    private = (host.use.view == Use.PRIVATE) & (host.stored.view == Stored.BYTES)
    pfns = np.flatnonzero(private & np.isin(host.key.view, secret))
    for pfn in pfns[:: max(pfns.size // SAMPLED, 1)][:SAMPLED].tolist():
        rows, failed = core.controller.read(np.array([pfn]), host.key.at(pfn))
        line = rows[0, :LINE].tobytes()
        if not failed.any() and len(set(line)) >= LINE_VALUES:
            yield pfn, line
