"""The store's own operations: create, fallocate, close, and the NUMA policy.

Owns the checks that guest_memfd makes before it touches a page, in the kernel's order
(restrictedmem.md §2), and the punch: start(all), free, end(all), with bindings stable in between.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from rmemd.engine import frames
from rmemd.engine.bracket import invalidating, views_of, views_of_half
from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps, decided
from rmemd.errors import (
    BAD_NODE,
    BAD_RANGE,
    BAD_REQUEST,
    FALLOCATE_MODE,
    NOT_PAGE_ALIGNED,
    OFFSET_TOO_BIG,
    UNKNOWN_FLAG,
    Kind,
    RmemError,
)
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Why
from rmemd.model.files import (
    FLAG_ANONYMOUS,
    FLAGS_ADVERTISED,
    PRIVATE,
    Policy,
    RestrictedFile,
)
from rmemd.model.vms import Vm
from rmemd.units import I64, LOFF_MAX, PAGE_SIZE, bytes_to_pages, is_page_aligned, pages

KEEP_SIZE = 1
PUNCH_HOLE = 2
COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE, WRITE_ZEROES = 8, 16, 32, 64, 128
# what vfs_fallocate lets through to the file system; the rest it refuses before the sum is checked
VFS_MODES = {
    0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE, UNSHARE_RANGE,
    UNSHARE_RANGE | KEEP_SIZE, COLLAPSE_RANGE, INSERT_RANGE, WRITE_ZEROES,
}  # fmt: skip
MPOL_DEFAULT, MPOL_BIND, MPOL_INTERLEAVE = 0, 2, 3
# pages allocated, or punched of a shared half, in one transaction
BATCH_PAGES = 1 << 16


def create(
    core: Core, vm_id: int, size_bytes: int, flags: int, session: int = 0, spare: int = 0
) -> Steps[RestrictedFile]:
    """KVM_CREATE_GUEST_MEMFD: flags are checked before the size.

    ``spare`` is a file that the ``session`` which asks has closed, whose shared memory serves again
    if it was set aside and is of this size.
    """
    yield from ()
    vm = core.vms.alive(vm_id)
    if flags & ~FLAGS_ADVERTISED:
        raise UNKNOWN_FLAG(
            f"flags {flags:#x} has bits beyond MMAP|INIT_SHARED", field="flags",
            rule="restrictedmem.md §2: create",
        )  # fmt: skip
    if size_bytes <= 0 or not is_page_aligned(size_bytes):
        reason = NOT_PAGE_ALIGNED if size_bytes > 0 else BAD_RANGE
        raise reason(f"size {size_bytes} is not a positive multiple of 4096", field="size_bytes")
    if session:
        core.sessions.alive(session)
    with core.tx("create file") as tx:
        file = new_file(core, tx, vm, bytes_to_pages(size_bytes), flags)
    if spare and _is_its_own(core, file, session):
        core.shared.take(file.info.file, spare, session, file.info.size_pages)
    return file


def new_file(core: Core, tx: Tx, vm: Vm, size_pages: int, flags: int) -> RestrictedFile:
    """Make a file in a transaction."""
    file = core.files.create(tx, vm.info.vm, size_pages, flags, vm.info.in_place, vm.info.owner)
    tx.emit(
        "file_created", vm=vm.info.vm, file=file.info.file, npages=size_pages,
        tenant=vm.info.owner.tenant,
    )  # fmt: skip
    return file


def fallocate(core: Core, number: int, mode: int, offset: int, length: int) -> Steps[int]:
    """Allocate or punch; return the pages that changed. Source: restrictedmem.md §2, fallocate."""
    file = restricted(core, number)
    start, npages = _fallocate_range(mode, offset, length)
    if mode & PUNCH_HOLE:
        return (yield from punch(core, number, start, npages))
    if start + npages > file.info.size_pages:
        raise BAD_RANGE(
            f"{offset:#x}+{length:#x} ends past file/{number} of {file.info.size_pages} pages",
            field="length_bytes", rule="restrictedmem.md §2: allocate",
        )  # fmt: skip
    return (yield from _allocate(core, number, start, npages))


def _fallocate_range(mode: int, offset: int, length: int) -> tuple[int, int]:
    for field, value, bad in (
        ("offset_bytes", offset, offset < 0),
        ("length_bytes", length, length <= 0),
    ):
        if bad:
            raise BAD_RANGE(f"{field} {value} is out of range", field=field, rule="VFS: fallocate")
    if mode not in VFS_MODES:
        raise FALLOCATE_MODE(f"mode {mode:#x}", field="mode", rule="VFS: fallocate")
    if offset + length > LOFF_MAX:
        raise OFFSET_TOO_BIG(f"{offset:#x}+{length:#x}", field="length_bytes", rule="VFS: EFBIG")
    if not mode & KEEP_SIZE or mode & ~(KEEP_SIZE | PUNCH_HOLE):
        raise FALLOCATE_MODE(f"mode {mode:#x}", field="mode", rule="restrictedmem.md §2: fallocate")
    for field, value in (("offset_bytes", offset), ("length_bytes", length)):
        if not is_page_aligned(value):
            raise NOT_PAGE_ALIGNED(f"{field} {value:#x}", field=field, rule="restrictedmem.md §2")
    return bytes_to_pages(offset), bytes_to_pages(length)


def _allocate(core: Core, number: int, start: int, npages: int) -> Steps[int]:
    """Allocate in batches; the pages before the one that gets no frame stay (PREFIX).

    Linux goes folio by folio and stops at the error. Here the page that stops it is found by
    halves, with a transaction each.

    Raises:
        Exhausted: NO_FRAMES, QUOTA; ``progress_pages`` of the range are allocated.
    """
    done = allocated = 0
    n = BATCH_PAGES

    def one() -> Steps[int]:
        yield from ()
        core.ranges.require_idle("file", number, start + done, n)
        with core.tx("allocate") as tx:
            file = core.files.get(number)
            wanted = pages(start + done, n)
            holes = wanted[file.frames.get(wanted) == 0]
            if holes.size:
                pfns = frames.allocate(core, tx, file, holes, private=True)
                settle(core, tx, file, holes, pfns)
            return int(holes.size)

    while done < npages:
        n = min(n, npages - done)
        try:
            allocated += yield from core.unit(one)
        except RmemError as refusal:
            if n == 1 or refusal.reason.kind is not Kind.EXHAUSTED:
                raise refusal.with_details(progress_pages=done) from refusal
            n //= 2
        else:
            done += n
    return allocated


def settle(core: Core, tx: Tx, file: RestrictedFile, pgoffs: I64, pfns: I64) -> None:
    """In place, a shared page's bytes are in the shared memfd from the start."""
    if file.info.in_place:
        mark_shared(core, tx, pfns[file.attributes.get(pgoffs) != PRIVATE])


def mark_shared(core: Core, tx: Tx, pfns: I64) -> None:
    """Have frames' bytes be those of their file's shared memfd."""
    from rmemd.model.host import Stored, Use

    tx.put(core.host.stored, pfns, int(Stored.SHARED))
    tx.put(core.host.key, pfns, 0)
    tx.put(core.host.use, pfns, int(Use.SHARED))


def punch(core: Core, number: int, start: int, npages: int) -> Steps[int]:
    """Punch private pages out (and, in place, shared ones); return how many were there."""
    size = core.files.get(number).info.size_pages
    npages = max(min(start + npages, size) - start, 0)
    if npages == 0:
        return 0

    def one() -> Steps[I64]:
        yield from ()
        core.ranges.require_idle("file", number, start, npages)
        file = core.files.get(number)
        with core.tx("punch") as tx:
            present = file.frames.touched(start, npages)
            views = views_of_half(core, file, start, npages, private=True)
            with invalidating(core, tx, views, Why.PUNCH):
                frames.remove(core, tx, file, present, private=True)
            if present.size:
                tx.emit("punched", file=number, pgoff=int(present[0]), npages=present.size)
            if file.info.in_place and core.has_shared_memory(file):
                tx.set(core.files.discards, (number, start), npages)
            return present

    present = yield from core.unit(one)
    core.pending_faults.removed(number, present, private=True)
    done = int(present.size)
    if (number, start) not in core.files.discards:
        return done
    return decided(done, partial(_discard, core, number, start, npages))


def _discard(core: Core, number: int, start: int, npages: int) -> Steps[None]:
    if not core.files.exists(number):
        return
    file = core.files.get(number)
    there = core.shared_memory(file).present(start, npages)
    # it may have been put off, and some of it be there again
    there = there[file.frames.get(there) == 0]
    with core.ranges.in_progress("file", number, start, npages):
        punch = partial(core.shared_memory(file).punch, there)
        yield Step("punch: shared", work=punch, vm=file.info.vm)
    with core.tx("punch: shared") as tx:
        tx.drop(core.files.discards, (number, start))


def close_file(core: Core, number: int, session: int = 0) -> Steps[int]:
    """Close a restricted file as its owner does; the memory behind a slot goes with the slot.

    Its shared memory is set aside for a session that nobody else can reach it beside.

    Raises:
        InvalidArgument: BAD_REQUEST; it is such memory.
    """
    restricted(core, number)
    freed, alone = yield from _close(core, number, session)
    end = partial(_set_aside, core, number, session) if alone else partial(forget, core, [number])
    return decided(freed, end)


def _is_alone(core: Core, number: int, session: int) -> bool:
    """Return whether nobody but a live session can reach a file's shared memory."""
    if not (core.shared.is_only(number, session) and core.sessions.is_alive(session)):
        return False
    file = core.files.get(number)
    if not _is_its_own(core, file, session):
        return False
    half = file.half(private=False)
    present = half.touched(0, file.info.size_pages)
    if not present.size:
        return True
    # who holds a page may write to it when the file is gone
    pfns = np.asarray(half.get(present), dtype=np.int64) - 1
    return not frames.referenced(core, pfns).any()


def _is_its_own(core: Core, file: RestrictedFile, session: int) -> bool:
    """Return whether a file is of a session's own tenant: an admin makes and closes others' too."""
    return core.sessions.get(session).tenant == file.info.owner.tenant


def _set_aside(core: Core, number: int, session: int) -> Steps[None]:
    """Have the shared memory of a file that is gone be spare, for the session's next one."""
    tenant = core.sessions.get(session).tenant
    try:
        core.quotas.charge_frames(core, tenant, core.shared.npages(number))
    except RmemError:
        # it counts as the tenant's frames, and there is no room for it
        yield from forget(core, [number])
    else:
        core.shared.set_aside(number, tenant)


def restricted(core: Core, number: int) -> RestrictedFile:
    """Return a restricted file; the memory behind a slot has no private half.

    Raises:
        NotFound: NO_SUCH_FILE.
        InvalidArgument: BAD_REQUEST; it is such memory.
    """
    file = core.files.get(number)
    if file.info.flags & FLAG_ANONYMOUS:
        raise BAD_REQUEST(
            f"file/{number} is the memory behind a slot, and goes with the slot", field="file",
            state="behind a slot", rule="Linux: such memory is no file of the VM's",
        )  # fmt: skip
    return file


def close(core: Core, number: int) -> Steps[None]:
    """Drop the last reference of a file, as a part of another operation."""
    yield from _close(core, number, session=0)
    yield from forget(core, [number])


def forget(core: Core, numbers: list[int]) -> Steps[None]:
    """Let the shared memory of files go that a record says are gone."""
    yield from ()
    for number in numbers:
        core.shared.forget(number)


def _close(core: Core, number: int, session: int) -> Steps[tuple[int, bool]]:
    def one() -> tuple[int, bool]:
        alone = _is_alone(core, number, session)
        with core.tx("close file") as tx:
            return drop(core, tx, number), alone

    return core.at_once(one)


def drop(core: Core, tx: Tx, number: int) -> int:
    """Drop the last reference: whole-file invalidation, slots lose the file, pages are freed.

    ``forget`` comes after the record.
    """
    file = core.files.get(number)
    size = file.info.size_pages
    core.ranges.require_idle("file", number, 0, size)
    private, shared = file.frames.touched(0, size), file.shared.touched(0, size)
    with invalidating(core, tx, views_of(core, file, 0, size), Why.CLOSE):
        pass
    frames.remove(core, tx, file, private, private=True)
    frames.remove(core, tx, file, shared, private=False)
    core.userfaults.drop(tx, core.userfaults.of_file(number))
    core.files.destroy(tx, number)
    core.ranges.forget("file", number)
    freed = int(private.size + shared.size)
    tx.emit("file_closed", file=number, npages=freed, tenant=file.info.owner.tenant)
    return freed


# --- policy -------------------------------------------------------------------------
def set_policy(
    core: Core, number: int, offset: int, length: int, policy: int, nodes: tuple[int, ...]
) -> Steps[None]:
    """Store a NUMA policy by range (mbind); nothing moves. Source: restrictedmem.md §2, mbind."""
    yield from ()
    file = core.files.get(number)
    start, npages = byte_range(file, offset, length)
    if policy not in (MPOL_DEFAULT, MPOL_BIND, MPOL_INTERLEAVE):
        raise BAD_REQUEST(f"no policy {policy}", field="policy", rule="mbind(2)")
    if bool(nodes) == (policy == MPOL_DEFAULT):
        raise BAD_REQUEST("only MPOL_DEFAULT has no nodes", field="nodes", rule="mbind(2)")
    unknown = [node for node in nodes if not 0 <= node < len(core.host.nodes)]
    if unknown:
        raise BAD_NODE(f"no node {unknown[0]}", field="nodes")
    with core.tx("set policy") as tx:
        wanted = Policy(policy, tuple(sorted(set(nodes))))
        numbers, policies = core.files.policies(tx, file)
        known = dict(policies.items())
        index = 0
        if policy != MPOL_DEFAULT:
            index = next((i for i, p in known.items() if p == wanted), len(known) + 1)
            if index > 255:
                raise BAD_REQUEST("a file has at most 255 different policies", field="policy")
            tx.set(policies, index, wanted)
        tx.fill(numbers, start, npages, index)


def get_policy(core: Core, number: int, offset: int) -> Policy:
    """Return the policy at an offset."""
    file = core.files.get(number)
    start, _ = byte_range(file, offset, PAGE_SIZE)
    policy: Policy = file.policies.get(file.policy.at(start), Policy(MPOL_DEFAULT, ()))
    return policy


def byte_range(file: RestrictedFile, offset: int, length: int) -> tuple[int, int]:
    """Return (pgoff, npages) of a page-aligned byte range inside a file.

    Raises:
        InvalidArgument: BAD_RANGE, NOT_PAGE_ALIGNED.
    """
    if not is_page_aligned(offset | length):
        field, value = (
            ("length_bytes", length) if is_page_aligned(offset) else ("offset_bytes", offset)
        )
        raise NOT_PAGE_ALIGNED(f"{field} {value:#x}", field=field)
    if offset < 0 or length <= 0 or offset + length > file.info.size_pages * PAGE_SIZE:
        raise BAD_RANGE(
            f"{offset:#x}+{length:#x} is not inside file/{file.info.file}", field="offset_bytes"
        )
    return bytes_to_pages(offset), bytes_to_pages(length)
