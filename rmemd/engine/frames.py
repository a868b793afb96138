"""Frames of files: found or allocated, referenced, and given back.

Owns the way a frame comes to a file and leaves it. A page that is removed from its file while
somebody references it lives on without an owner and is freed at the last reference, as in Linux.
"""

from __future__ import annotations

import numpy as np

from rmemd.engine.core import Core
from rmemd.errors import HW_POISON
from rmemd.hooks.tables import Sparse
from rmemd.hooks.tx import Tx
from rmemd.model import buddy
from rmemd.model.files import RestrictedFile
from rmemd.model.host import ARENA, KEPT, POISON, Stored, Use
from rmemd.model.ledger import Entry
from rmemd.units import I64, Bools, distinct

MPOL_BIND = 2
MPOL_INTERLEAVE = 3
# as a plain number, which is quicker
_POISON = int(POISON)


def find(core: Core, tx: Tx, file: RestrictedFile, pgoffs: I64, private: bool) -> I64:
    """Return the frames of pages, allocating (zeroed) those that are holes.

    Raises:
        Exhausted: NO_FRAMES.
        Poisoned: HW_POISON; a page's frame is poisoned.
    """
    table = file.half(private)
    if pgoffs.size == 1 and (there := one_there(core, table, pgoffs.item())) is not None:
        return there
    pfns = np.asarray(table.get(pgoffs), dtype=np.int64) - 1
    holes = pfns < 0
    if np.count_nonzero(holes):
        pfns[holes] = allocate(core, tx, file, pgoffs[holes], private)
    poisoned = core.host.poisoned(pfns)
    if np.count_nonzero(poisoned):
        refuse_poisoned(file, pgoffs[poisoned], pfns[poisoned])
    return pfns


def one_there(core: Core, table: Sparse, pgoff: int) -> I64 | None:
    """Return the frame of one page, shape (1,), if it is there and sound, else None.

    Most calls are about one such page, and scalars cost a tenth of arrays for it.
    """
    pfn = table.at(pgoff) - 1
    if pfn < 0 or core.host.flags.at(pfn) & _POISON:
        return None
    return np.array([pfn])


def refuse_poisoned(file: RestrictedFile, pgoffs: I64, pfns: I64) -> None:
    """Raise HW_POISON for the first of poisoned pages."""
    raise HW_POISON(
        f"pgoff {int(pgoffs[0]):#x} of file/{file.info.file} is on a poisoned frame",
        page=f"pgoff {int(pgoffs[0]):#x}", state=f"pfn {int(pfns[0]):#x} poisoned",
        rule="restrictedmem.md §2: get_pfn",
    )  # fmt: skip


def allocate(core: Core, tx: Tx, file: RestrictedFile, pgoffs: I64, private: bool) -> I64:
    """Give holes frames, by the file's NUMA policy; return the frames.

    Raises:
        Exhausted: QUOTA, NO_FRAMES.
    """
    host = core.host
    core.quotas.charge_frames(core, file.info.owner.tenant, pgoffs.size)
    use = Use.PRIVATE if private else Use.SHARED
    pfns = np.empty(pgoffs.size, dtype=np.int64)
    for mask, nodes in _by_policy(core, file, pgoffs):
        pfns[mask] = buddy.take(host, tx, int(mask.sum()), use, nodes)
    _tell_fallback(core, tx, file, pgoffs, pfns)
    wipe(core, tx, pfns)
    tx.put(host.owner, pfns, file.info.file)
    tx.put(host.pgoff, pfns, pgoffs)
    if not private:
        tx.put(host.stored, pfns, int(Stored.SHARED))
    tx.put(file.half(private), pgoffs, pfns + 1)
    return pfns


def wipe(core: Core, tx: Tx, pfns: I64) -> None:
    """Have frames that were just taken read as zeros, whatever the host wrote while free."""
    host = core.host
    written = pfns[host.stored.get(pfns) != Stored.RAW_ZERO]
    tx.put(host.stored, written, int(Stored.RAW_ZERO))
    tx.put(host.key, written, 0)


def remove(core: Core, tx: Tx, file: RestrictedFile, pgoffs: I64, private: bool) -> I64:
    """Take pages out of their file and free their frames, or leave them to who references them.

    Returns:
        The frames that the pages had.
    """
    if not pgoffs.size:
        # most files have but one half
        return pgoffs
    table = file.half(private)
    pfns = np.asarray(table.get(pgoffs), dtype=np.int64) - 1
    tx.put(table, pgoffs, 0)
    tx.put(core.host.owner, pfns, 0)
    free = pfns[~referenced(core, pfns)]
    free_frames(core, tx, free)
    return pfns


def referenced(core: Core, pfns: I64) -> Bools:
    """Return which frames somebody references beyond the page cache."""
    held: Bools = (core.host.refs.get(pfns) > 0) | (core.host.pins.get(pfns) > 0)
    return held


def drop(core: Core, tx: Tx, entry: Entry, pfns: I64) -> None:
    """Drop a reference per frame; a frame without an owner goes with its last one."""
    core.ledger.drop(tx, entry, pfns)
    free_orphans(core, tx, pfns)


def free_orphans(core: Core, tx: Tx, pfns: I64) -> None:
    """Free those frames that have neither owner nor reference any more."""
    host = core.host
    # seldom any: what else there is to know of a frame is asked of those without an owner
    if pfns.size == 1 and host.owner.at(pfns.item()):
        return
    pfns = pfns[host.owner.get(pfns) == 0]
    if pfns.size:
        in_use = np.isin(host.use.get(pfns), (Use.PRIVATE, Use.SHARED))
        free_frames(core, tx, pfns[in_use & ~referenced(core, pfns)])


def free_frames(core: Core, tx: Tx, pfns: I64) -> None:
    """Give frames that nobody owns back to the host.

    What a vendor cannot reclaim is leaked, what is poisoned stays out of use, and bytes in the
    arena are destroyed before the frame can be taken again.
    """
    if not pfns.size:
        return
    host = core.host
    refused = np.zeros(pfns.size, dtype=np.bool_)
    for platform in core.registry.platforms.values():
        if platform.ops.free is not None:
            refused |= platform.call(tx, 0, "free", pfns)
    # a reference that was never dropped: put_page() is not called after a failed removal
    refused |= (host.flags.get(pfns) & KEPT) != 0
    leak(core, tx, pfns[refused])
    freed = pfns[~refused]
    flags = host.flags.get(freed)
    tx.put(host.stored, freed, int(Stored.RAW_ZERO))
    tx.put(host.key, freed, 0)
    tx.put(host.mac, freed, 0)
    bad = (flags & POISON) != 0
    dirty = ~bad & ((flags & ARENA) != 0)
    tx.put(host.use, freed[bad], int(Use.POISONED))
    tx.put(host.use, freed[dirty], int(Use.SCRUBBING))
    if dirty.any():
        tx.freed.append(freed[dirty])
    clean = freed[~bad & ~dirty]
    if clean.size:
        buddy.give(host, tx, clean)


def leak(core: Core, tx: Tx, pfns: I64) -> None:
    """Take frames out of use for good: counted, never reused."""
    if pfns.size:
        tx.put(core.host.use, pfns, int(Use.LEAKED))
        tx.emit("frames_leaked", npages=pfns.size, first_pfn=int(pfns[0]))


def charge_found(core: Core, tx: Tx, file: RestrictedFile, found: I64) -> None:
    """Charge shared pages that a client filled in by itself, of those that are ``uncharged``.

    Clients write through their descriptor without an event, so such pages are looked for where it
    matters. When the host has no frame left, or the tenant may have none, they stay uncharged.
    """
    if file.info.in_place:
        # what a client put beside a private page is no page of the file: it is discarded
        found = found[(file.attributes.get(found) == 0) & (file.frames.get(found) == 0)]
    free = sum(buddy.free_pages(core.host, node) for node in core.host.nodes)
    found = found[: min(free, core.quotas.room(core, file.info.owner.tenant))]
    if found.size:
        allocate(core, tx, file, found, private=False)
        tx.emit("shared_found", file=file.info.file, npages=found.size)


def uncharged(core: Core, file: RestrictedFile, start: int, npages: int) -> I64:
    """Return the pages present in the shared memfd that no frame is charged for."""
    if not core.has_shared_memory(file):
        return np.empty(0, dtype=np.int64)
    # what the daemon itself is moving, no client has filled in
    there = core.ranges.idle(
        "file", file.info.file, core.shared_memory(file).present(start, npages)
    )
    if file.info.in_place:
        # one frame serves either state: a page is found if it is private, or a hole
        shared = (file.attributes.get(there) == 0) & (file.frames.get(there) != 0)
        found: I64 = there[~shared]
    else:
        found = there[file.shared.get(there) == 0]
    return found


def _tell_fallback(core: Core, tx: Tx, file: RestrictedFile, pgoffs: I64, pfns: I64) -> None:
    """Tell of interleaved pages that got a node which their policy has not."""
    numbers, policies = file.policy_at(pgoffs)
    for number, policy in policies.items():
        if policy.policy == MPOL_INTERLEAVE:
            on = core.host.nodes_of(pfns[numbers == number])
            elsewhere = int((~np.isin(on, policy.nodes)).sum())
            if elsewhere:
                tx.emit("numa_fallback", file=file.info.file, npages=elsewhere)


def _by_policy(
    core: Core, file: RestrictedFile, pgoffs: I64
) -> list[tuple[Bools, tuple[int, ...]]]:
    every = tuple(node.node for node in core.host.nodes)
    numbers, policies = file.policy_at(pgoffs)
    groups: list[tuple[Bools, tuple[int, ...]]] = []
    for number in distinct(numbers).tolist():
        mask = numbers == number
        policy = policies.get(number)
        if policy is None or not policy.nodes:
            groups.append((mask, every))
        elif policy.policy == MPOL_INTERLEAVE:
            turn = pgoffs % len(policy.nodes)
            # a node that is full is passed over, as by a preferred policy (numa_memory_policy.rst)
            groups += [
                (mask & (turn == i), (node, *(other for other in every if other != node)))
                for i, node in enumerate(policy.nodes)
                if (mask & (turn == i)).any()
            ]
        else:
            groups.append((mask, policy.nodes))
    return groups
