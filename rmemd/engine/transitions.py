"""What must hold from one committed transaction to the next: the invariants that no state shows.

Owns the table of monitors, each of which looks at one ``Transition`` and says in its docstring what
must hold. They write nothing. What they see is what ``engine.monitors`` hands them; numbers are
those of reliability.md §3.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from rmemd.engine.bracket import held_by_others, pin_entries
from rmemd.engine.commits import FILE_HALF, Transition, plain_sums
from rmemd.engine.core import Core
from rmemd.engine.pageinvariants import named
from rmemd.hooks.tables import Records
from rmemd.hooks.tx import COUNTERS, Tx
from rmemd.hooks.types import Runs, Why
from rmemd.model.files import PRIVATE, RestrictedFile, bindings_of
from rmemd.model.host import KEPT, POISON, Use
from rmemd.model.vms import Vm, unpack
from rmemd.units import I64, Bools, distinct

OF_SESSION = re.compile(r"(?:ledger/)?session (\d+)(?: pin \d+)?(?:/|$)")
# the tables whose keys are handles -> the counter that they come from
HANDLES = {"vms": "vm", "files": "file", "sessions": "session", "pins": "pin", "host/keys": "key"}
LOOKED_UP, INSTALLED, LOST = "fault: look up", "fault: install", "fault: lost race"


# --- the monitors ----------------------------------------------------------------------------
def flushed(t: Transition) -> Iterator[str]:
    """I6: a frame's owner changes only after every mapping of it was taken and flushed."""
    if "host/owner" not in t.written:
        return
    pfns, old, _ = t.changed("host/owner")
    pfns, old = pfns[old != 0], old[old != 0]
    for number in distinct(old).tolist():
        mine = pfns[old == number]
        pgoffs = t.old("host/pgoff", mine)
        for _, binding in bindings_of(t.before, number).items():
            inside = (pgoffs >= binding.pgoff) & (pgoffs < binding.pgoff + binding.npages)
            gfns = pgoffs[inside] - binding.pgoff + binding.gfn
            yield from _flushed_by(t, binding.vm, gfns, mine[inside])


def _flushed_by(t: Transition, vm: int, gfns: I64, pfns: I64) -> Iterator[str]:
    mirror = f"vm/{vm}/mirror"
    if mirror not in t.core.space.tables:
        return
    there, shared = unpack(t.old(mirror, gfns))
    mapped = there == pfns
    given = t.first_written("host/owner", pfns)
    cleared = t.first_written(mirror, gfns)
    yield from named("I6", mapped & (cleared > given), pfns, f"changed hands, mapped by vm/{vm}")
    flushed_at = np.full(gfns.size, len(t.tx.redo) + 1, dtype=np.int64)
    for hook in t.of("invalidate_start"):
        if hook.vm == vm:
            covered = np.isin(gfns, hook.args[0].gfns())
            flushed_at[covered] = np.minimum(flushed_at[covered], hook.after)
    late = mapped & ~shared & (flushed_at > given)
    yield from named("I6", late, pfns, f"changed hands before vm/{vm} had flushed it")


def unmapped(t: Transition) -> Iterator[str]:
    """I7: once a bracket has ended its consumer maps nothing of it, nor holds what it let go."""
    for hook in t.of("invalidate_end"):
        if not t.core.vms.exists(hook.vm):
            continue
        vm = t.core.vms.get(hook.vm)
        runs, why = hook.args[:2]
        gfns, pfns = runs.gfns(), runs.pfns()
        found, _ = unpack(vm.mirror.get(gfns))
        if why is Why.MIGRATE:
            wrong = found != pfns
            yield from named("I7", wrong, gfns, f"of {vm.info.label} does not map what was moved")
            continue
        yield from named("I7", found >= 0, gfns, f"of {vm.info.label} is mapped after its bracket")
        if t.core.consumers[hook.vm].ops.unpin is not None:
            held = (t.core.host.flags.get(pfns) & KEPT) == 0
            held &= _is_held(t.core, hook.vm, pfns)
            yield from named("I7", held, pfns, f"is held by {vm.info.label} after its bracket")


def _is_held(core: Core, vm: int, pfns: I64) -> Bools:
    held = np.zeros(pfns.size, dtype=np.bool_)
    for entry in pin_entries(core, core.vms.get(vm)):
        held |= core.ledger.held(entry, pfns)
    return held


def balanced(t: Transition) -> Iterator[str]:
    """I8: each start has its end over the same pages; a fault that one comes between retries."""
    started = _bracketed(t, "invalidate_start")
    ended = _bracketed(t, "invalidate_end")
    for vm in sorted(started.keys() | ended.keys()):
        if vm not in started or vm not in ended:
            yield f"I8: vm/{vm} had a start without an end, or an end without a start"
        elif not np.array_equal(started[vm], ended[vm]):
            yield f"I8: vm/{vm} had {started[vm].size} pages started and {ended[vm].size} ended"
    for vm in started:
        if t.core.vms.exists(vm):
            sequence = t.core.ranges.sequence(vm)
            if sequence <= t.history.sequences.get(vm, -1):
                yield f"I8: the invalidate sequence of vm/{vm} did not move"
            t.history.sequences[vm] = sequence
    yield from _raced(t)


def _bracketed(t: Transition, op: str) -> dict[int, I64]:
    found: dict[int, list[I64]] = {}
    for hook in t.of(op):
        runs: Runs = hook.args[0]
        found.setdefault(hook.vm, []).append(runs.gfns())
    return {vm: np.sort(np.concatenate(parts)) for vm, parts in found.items()}


def _raced(t: Transition) -> Iterator[str]:
    history, mine = t.history, t.core.waits.current
    if t.tx.label == LOOKED_UP:
        history.lookups[mine] = Counter(history.invalidations)
    elif t.tx.label == INSTALLED:
        then = history.lookups.pop(mine, history.invalidations)
        for vm in {int(name.split("/")[1]) for name in t.written if name.endswith("/mirror")}:
            if then[vm] != history.invalidations[vm]:
                yield f"I8: a fault of vm/{vm} looked up before an invalidation was installed"
    elif t.tx.label == LOST:
        history.lookups.pop(mine, None)


def one_owner(t: Transition) -> Iterator[str]:
    """I10: a moved page has one owner, the new frame, and its bytes; the old frame is let go."""
    host = t.core.host
    for number, pgoffs, src, dst in t.moves:
        name = f"file/{number}"
        wrong = (host.owner.get(dst) != number) | (host.pgoff.get(dst) != pgoffs)
        yield from named("I10", wrong, dst, f"was moved to, and is not {name}'s")
        wrong = (host.owner.get(src) == number) | np.isin(
            host.use.get(src), (Use.PRIVATE, Use.SHARED)
        )
        # unless another page was moved here in the same transaction
        yield from named("I10", wrong & ~np.isin(src, dst), src, f"was moved from, still {name}'s")
    for hook in t.of("migrate_folio"):
        for copied in hook.copies:
            # what was busy has stayed, and its new frame was handed back
            moved = t.core.host.owner.get(copied.dst) != 0
            wrong = moved & (copied.sums != plain_sums(t.core, copied.dst, copied.key))
            yield from named("I10", wrong, copied.src, "is not what its new frame holds")


def converted(t: Transition) -> Iterator[str]:
    """I11: a range converts as a whole, and to private in place only if nobody else holds it."""
    for kind, fields in t.tx.events:
        if kind == "range_converted":
            file = t.core.files.get(fields["file"])
            wanted = int(bool(fields["private"]))
            if not file.attributes.equals(fields["pgoff"], fields["npages"], wanted):
                yield f"I11: file/{file.info.file} converted a part of what was asked for"
            if wanted:
                yield from _unheld(t, file, fields["pgoff"], fields["npages"])
        elif kind == "attributes_set":
            vm = t.core.vms.get(fields["vm"])
            if not _all_set(t, vm, fields["gfn"], fields["npages"], fields):
                yield f"I11: {vm.info.label} converted a part of what was asked for"


def _all_set(t: Transition, vm: Vm, gfn: int, npages: int, fields: Mapping[str, Any]) -> bool:
    wanted = int(bool(fields["private"]))
    if "ranges" not in fields:
        return vm.attributes.equals(gfn, npages, wanted)
    # scattered from there on: as many pages as were told, and no others
    at = t.touched(vm.attributes.name)
    at = at[np.asarray(vm.attributes.get(at)) == wanted]
    return at.size == npages and int(at[0]) == gfn


def _unheld(t: Transition, file: RestrictedFile, start: int, npages: int) -> Iterator[str]:
    pgoffs = file.frames.touched(start, npages)
    turned = t.old(file.attributes.name, pgoffs) != PRIVATE
    pfns = np.asarray(file.frames.get(pgoffs[turned]), dtype=np.int64) - 1
    if pfns.size and t.core.vms.exists(file.info.vm):
        held = held_by_others(t.core, t.core.vms.get(file.info.vm), pfns)
        yield from named("I11", held, pfns, f"of file/{file.info.file} is private and referenced")


def quarantined(t: Transition) -> Iterator[str]:
    """I12: what a vendor refused to give back is leaked, and what is leaked stays so."""
    host = t.core.host
    for hook in t.of("free"):
        refused = hook.args[0][np.asarray(hook.answer, dtype=np.bool_)]
        wrong = host.use.get(refused) != Use.LEAKED
        yield from named("I12", wrong, refused, "was refused by its vendor, and is not leaked")
    if "host/use" in t.written:
        pfns, old, _ = t.changed("host/use")
        yield from named("I12", old == Use.LEAKED, pfns, "was leaked, and came back")


def poison_stays(t: Transition) -> Iterator[str]:
    """I13: poison is never taken off nor copied from, and is told once, as it comes."""
    told = Counter(int(fields["pfn"]) for kind, fields in t.tx.events if kind == "poisoned")
    if "host/flags" in t.written:
        pfns, old, new = t.changed("host/flags")
        was, now = (old & POISON) != 0, (new & POISON) != 0
        yield from named("I13", was & ~now, pfns, "was poisoned, and is not any more")
        fresh = set(pfns[now & ~was].tolist())
    else:
        fresh = set()
    for pfn in sorted(fresh | told.keys()):
        if told[pfn] != (pfn in fresh):
            yield f"I13: page {pfn:#x} was told to be poisoned {told[pfn]} times"
    for hook in t.of("migrate_folio"):
        src = hook.args[1]
        bad = (t.old("host/flags", src) & POISON) != 0
        yield from named("I13", bad, src, "is poisoned, and was copied from")


def only_its_own(t: Transition) -> Iterator[str]:
    """I14: what goes with a session is its own; nobody else's pages or holds change."""
    if t.tx.label != "release session":
        return
    ending = {number for number, info in t.before.records("sessions").items() if info.closing}
    entries = {write.args[0].holder for _, write in t.written.get("ledger", ())}
    pins = t.before.records("pins")
    entries |= {pins[write.args[0]].holder for _, write in t.written.get("pins", ())}
    for name in sorted({*t.written, *entries}):
        match = OF_SESSION.match(name)
        of_holds = name in entries or name.startswith("ledger/")
        if of_holds and not (match and int(match[1]) in ending):
            yield f"I14: the end of a session changed {name}"
        # a vendor's own tables may follow the frames that are freed
        if name.startswith(("file/", "vms", "files")):
            yield f"I14: the end of a session changed {name}"


def fresh(t: Transition) -> Iterator[str]:
    """I16: a handle is new when it is given, and counters only go up."""
    if COUNTERS in t.written:
        before, after = t.before.tables.get(COUNTERS), t.core.host.counters
        for counter, number in before.items() if isinstance(before, Records) else ():
            if after.get(counter, 0) < number:
                yield f"I16: the counter of {counter} went back to {after.get(counter, 0)}"
    for table in t.written.keys() & HANDLES.keys():
        known, counter = t.before.records(table), HANDLES[table]
        given = t.before.records(COUNTERS).get(counter, 0)
        for _, write in t.written[table]:
            number = write.args[0]
            if write.op == "set" and number not in known and number <= given:
                yield f"I16: {counter} {number} was given before"


def counted(t: Transition) -> Iterator[str]:
    """I21: each transaction has the revision after the last one's."""
    if t.revision != t.history.revision + 1:
        yield f"I21: revision {t.revision} follows {t.history.revision}"


def placed(t: Transition) -> Iterator[str]:
    """I22: a page that is allocated lies on a node of its policy, or that it does not is told."""
    if any(kind == "numa_fallback" for kind, _ in t.tx.events):
        return
    for name in t.written:
        match = FILE_HALF.fullmatch(name)
        if not match or name not in t.core.space.tables:
            continue
        file = t.core.files.get(int(match[1]))
        if not len(file.policies):
            continue
        at, old, new = t.changed(name)
        at, pfns = at[(old == 0) & (new != 0)], new[(old == 0) & (new != 0)] - 1
        numbers, policies = file.policy_at(at)
        nodes = t.core.host.nodes
        on = np.minimum(pfns // nodes[0].npages, len(nodes) - 1)
        for number, policy in policies.items():
            wrong = (numbers == number) & ~np.isin(on, policy.nodes)
            yield from named("I22", wrong, pfns, f"of {name} is on a node that its policy has not")


def in_a_step(t: Transition) -> Iterator[str]:
    """I25: what is overdue has frozen its VM by the time that its transaction is committed."""
    for vm, where, _ in t.core.guard.overdue:
        yield f"I25: {where} was overdue, and vm/{vm} goes on"


def untold(tx: Tx, canaries: tuple[bytes, ...]) -> Iterator[str]:
    """I24: canaries that a test has put into private pages are in no record and no event."""
    if not canaries:
        return
    data = b"".join(
        arg.tobytes() if isinstance(arg, np.ndarray) else repr(arg).encode()
        for write in tx.redo
        for arg in write.args
    )
    text = data + repr(tx.events).encode()
    for canary in canaries:
        if canary in text or canary.hex().encode() in text:
            yield "I24: a canary was written down or told"


MONITORS: tuple[Callable[[Transition], Iterator[str]], ...] = (
    flushed, unmapped, balanced, one_owner, converted, quarantined, poison_stays, only_its_own,
    fresh, counted, placed, in_a_step,
)  # fmt: skip
