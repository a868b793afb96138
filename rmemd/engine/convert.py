"""Conversion in place: one frame serves either state, and the consumer says what it then holds.

Owns the file's own attributes, and what both ways of conversion ask of a range; that by VM
attributes is ``engine.attributes``. Source: restrictedmem.md §2.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from rmemd.engine import frames
from rmemd.engine.bracket import View, held_by_others, in_progress, invalidating, views_of
from rmemd.engine.core import Core, private_key
from rmemd.engine.driver import Step, Steps, decided
from rmemd.engine.memory import mark_shared, restricted
from rmemd.errors import (
    ATTRIBUTES_UNSUPPORTED,
    BAD_RANGE,
    FOLIO_BUSY,
    NOT_PAGE_ALIGNED,
    OP_NOT_IMPLEMENTED_BY_CONSUMER,
    PLUGIN_NONSENSE,
    UNKNOWN_FLAG,
    WRONG_PERSONALITY,
)
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Content, Runs, Why
from rmemd.model.files import PRIVATE, RestrictedFile
from rmemd.model.host import ARENA, Stored, Use
from rmemd.model.vms import ATTRIBUTE_PRIVATE, Slot, Vm
from rmemd.store.controller import Contents, zeros_of
from rmemd.units import I64, MAX_GFN, PAGE_SIZE, U8, Bools, bytes_to_pages, is_page_aligned

RULE = "restrictedmem.md §2: KVM_SET_MEMORY_ATTRIBUTES"
RULE_IN_PLACE = "restrictedmem.md §2: in-place conversion"
ENOTTY = 25
# pages carried at once, so that the copy's memory is bounded
CARRY_PAGES = 2048
# of pages so many times as far apart on the average it is not asked which are holes
NEAR = 64


class Converted(Struct, frozen=True):
    """What an in-place conversion did: pages whose attribute changed, and what they hold."""

    changed_pages: int
    content: str


def supported(vm: Vm) -> int:
    """Return the attributes that a range of a VM can have."""
    return ATTRIBUTE_PRIVATE if vm.info.private_memory else 0


def check_range(
    vm: Vm, flags: int, attributes: int, start: int, size: int, path: str, start_field: str
) -> None:
    """Check what is asked of one byte range, as KVM and guest_memfd do.

    Args:
        vm: whose memory it is.
        flags: must be 0.
        attributes: ATTRIBUTE_PRIVATE or 0.
        start: in bytes.
        size: in bytes.
        path: where in the request the range is.
        start_field: how the request names ``start``.

    Raises:
        InvalidArgument: UNKNOWN_FLAG, ATTRIBUTES_UNSUPPORTED, BAD_RANGE, NOT_PAGE_ALIGNED.
    """
    if flags:
        raise UNKNOWN_FLAG(f"flags {flags:#x}", field="flags", rule=RULE)
    allowed = supported(vm)
    if attributes & ~allowed:
        raise ATTRIBUTES_UNSUPPORTED(
            f"attributes {attributes:#x}; {vm.info.label} supports {allowed:#x}",
            field=path + "attributes", rule=RULE,
        )  # fmt: skip
    if size <= 0 or start < 0 or start + size > MAX_GFN * PAGE_SIZE:
        raise BAD_RANGE(
            f"{start:#x}+{size:#x} is empty or wraps", field=path + "size_bytes", rule=RULE
        )
    for field, value in ((start_field, start), ("size_bytes", size)):
        if not is_page_aligned(value):
            raise NOT_PAGE_ALIGNED(f"{start:#x}+{size:#x}", field=path + field, rule=RULE)


def convert_file(
    core: Core, number: int, offset: int, size: int, attributes: int, flags: int
) -> Steps[Converted]:
    """Convert a byte range of a file in place: all of it or nothing."""
    file = restricted(core, number)
    vm = core.vms.alive(file.info.vm)
    if not file.info.in_place:
        raise WRONG_PERSONALITY(
            f"{vm.info.label} converts by VM attributes", field="file", rule=RULE_IN_PLACE
        )
    check_range(vm, flags, attributes, offset, size, "", "offset_bytes")
    if not vm.info.private_memory:
        raise ATTRIBUTES_UNSUPPORTED(
            f"{vm.info.label} has no private memory", field="file", rule=RULE_IN_PLACE
        )
    if offset + size > file.info.size_pages * PAGE_SIZE:
        raise BAD_RANGE(f"{offset:#x}+{size:#x} is past the file", field="size_bytes")
    start, npages = offset // PAGE_SIZE, bytes_to_pages(size)
    private = attributes == ATTRIBUTE_PRIVATE
    if core.consumer(vm).ops.convert is None:
        raise OP_NOT_IMPLEMENTED_BY_CONSUMER(
            f"{vm.info.consumer} has no convert: {vm.info.label} cannot convert in place",
            errno=ENOTTY, rule=RULE_IN_PLACE,
        )  # fmt: skip
    done = yield from core.unit(lambda: _convert_by_host(core, number, start, npages, private))
    return decided(done, partial(discard, core, number, start, npages, private, done))


def convert_by_guest(
    core: Core, tx: Tx, slot: Slot, gfn: int, npages: int, private: bool
) -> Steps[Converted]:
    """Carry out what a guest call asked for (CallAction.CONVERT), in the call's transaction.

    There is no invalidate pair: the vendor has changed the owner in place. ``discard`` comes after
    the commit.

    Raises:
        RmemError: declined; the caller undoes the call.
    """
    file = core.files.get(slot.file)
    vm = core.vms.alive(file.info.vm)
    if core.consumer(vm).ops.convert is None:
        raise PLUGIN_NONSENSE(f"{vm.info.consumer} answered CONVERT and has no convert")
    return (yield from _convert(core, tx, file, gfn - slot.gfn + slot.pgoff, npages, private, []))


def _convert_by_host(
    core: Core, number: int, start: int, npages: int, private: bool
) -> Steps[Converted]:
    file = core.files.get(number)
    if file.attributes.equals(start, npages, int(private)):
        return Converted(0, "")
    views = [replace(v, zapped=not private) for v in views_of(core, file, start, npages)]
    for view in views:
        core.ranges.require_idle("vm", view.vm.info.vm, view.gfn, view.npages)
    with core.tx("convert in place") as tx:
        return (yield from _convert(core, tx, file, start, npages, private, views))


def _convert(
    core: Core,
    tx: Tx,
    file: RestrictedFile,
    start: int,
    npages: int,
    private: bool,
    views: list[View],
) -> Steps[Converted]:
    """Convert in an open transaction; without ``views`` the guest's mapping stays in place."""
    vm = core.vms.alive(file.info.vm)
    core.ranges.require_idle("file", file.info.file, start, npages)
    if private:
        frames.charge_found(core, tx, file, frames.uncharged(core, file, start, npages))
    present = file.frames.touched(start, npages)
    changing = present[file.attributes.get(present) != int(private)]
    pfns = np.asarray(file.frames.get(changing), dtype=np.int64) - 1
    if private:
        # Linux asks of every folio of the range, also of those that are private already
        _require_unreferenced(core, file, vm, present)
    changed = npages - int(_count(file, start, npages, private))
    with invalidating(core, tx, views, Why.CONVERT):
        content = _ask(core, tx, vm, file, changing, pfns, private)
        tx.fill(file.attributes, start, npages, int(private))
    if not views:
        _remap(core, tx, vm, file, changing, pfns, private)
    if changing.size:
        key = private_key(core, vm)
        # made under the lock: two who come to need it at once would each make their own
        core.shared_memory(file)
        carry = partial(_carry, core, file, changing, pfns, private, content, key)
        with in_progress(core, file, start, npages):
            yield Step("convert", tx=tx, work=carry, vm=vm.info.vm)
        if private:
            tx.put(core.host.use, pfns, int(Use.PRIVATE))
        else:
            mark_shared(core, tx, pfns)
    held = content.value if changing.size else ""
    tx.emit(
        "range_converted", vm=vm.info.vm, file=file.info.file, pgoff=start, npages=npages,
        private=private, content=held,
    )  # fmt: skip
    return Converted(changed, held)


def _count(file: RestrictedFile, start: int, npages: int, private: bool) -> int:
    _, counts, values = file.attributes.runs(start, npages)
    return int(counts[values == int(private)].sum())


def _ask(
    core: Core, tx: Tx, vm: Vm, file: RestrictedFile, pgoffs: I64, pfns: I64, private: bool
) -> Content:
    """Ask the consumer what present pages hold afterwards; it is told of those that are bound."""
    if not pgoffs.size:
        return Content.PRESERVED
    gfns = np.full(pgoffs.size, -1, dtype=np.int64)
    for binding, lo, n in file.bound(int(pgoffs[0]), int(pgoffs[-1] - pgoffs[0]) + 1):
        mask = (pgoffs >= lo) & (pgoffs < lo + n)
        gfns[mask] = pgoffs[mask] - binding.pgoff + binding.gfn
    bound = gfns >= 0
    runs = Runs.of_pages(gfns[bound], pfns[bound])
    answer: Content = core.consumer(vm).call(tx, "convert", runs, private)
    return answer


def _require_unreferenced(core: Core, file: RestrictedFile, vm: Vm, pgoffs: I64) -> None:
    """To private needs refcount == nr_pages + 1: nobody but the page cache and the consumer."""
    pfns = np.asarray(file.frames.get(pgoffs), dtype=np.int64) - 1
    extra = held_by_others(core, vm, pfns)
    if extra.any():
        at = int(np.flatnonzero(extra)[0])
        refusal = FOLIO_BUSY(
            f"pgoff {int(pgoffs[at]):#x} is referenced",
            page=f"pgoff {int(pgoffs[at]):#x}", rule=RULE_IN_PLACE,
            state="private" if file.attributes.at(int(pgoffs[at])) == PRIVATE else "shared",
            holders=core.ledger.holders(int(pfns[at])), error_offset=int(pgoffs[at]) * PAGE_SIZE,
        )  # fmt: skip
        raise core.waits.refused(refusal, int(pfns[at]))


def _remap(
    core: Core, tx: Tx, vm: Vm, file: RestrictedFile, pgoffs: I64, pfns: I64, private: bool
) -> None:
    """A guest's own conversion leaves its mapping in place, in the other state."""
    if not pgoffs.size:
        return
    for binding, lo, n in file.bound(int(pgoffs[0]), int(pgoffs[-1] - pgoffs[0]) + 1):
        mask = (pgoffs >= lo) & (pgoffs < lo + n)
        gfns = pgoffs[mask] - binding.pgoff + binding.gfn
        there = vm.mirror.get(gfns) != 0
        vm.install(tx, Runs.of_pages(gfns[there], pfns[mask][there]), shared=not private)


def _carry(
    core: Core,
    file: RestrictedFile,
    pgoffs: I64,
    pfns: I64,
    private: bool,
    content: Content,
    key: int,
) -> list[Contents]:
    """Move bytes between arena and shared memfd, as the consumer's answer says.

    Raises:
        OSError: the system refused; the half that was written to is empty again.
    """
    done = []
    try:
        for at in range(0, pgoffs.size, CARRY_PAGES):
            part = slice(at, at + CARRY_PAGES)
            if private:
                done += _to_private(core, file, pgoffs[part], pfns[part], content, key)
            else:
                _to_shared(core, file, pgoffs[part], pfns[part], content, key)
    except OSError:
        if private:
            core.controller.punch(pfns)
        else:
            core.shared_memory(file).punch(pgoffs)
        raise
    return done


def _to_private(
    core: Core, file: RestrictedFile, pgoffs: I64, pfns: I64, content: Content, key: int
) -> list[Contents]:
    controller = core.controller
    if content is Content.ZERO:
        return [zeros_of(pfns, key)]
    if content is Content.DESTROYED:
        holes, under = np.zeros(pfns.size, dtype=np.bool_), 0
    else:
        # what nobody has touched is not filled with zeros on the way
        holes = ~_present(core, file, pgoffs)
        under = key if content is Content.PRESERVED else 0
    done = [zeros_of(pfns[holes], under)] if holes.any() else []
    pgoffs, pfns = pgoffs[~holes], pfns[~holes]
    if pfns.size:
        scrambled = content is Content.DESTROYED
        rows = scramble(core, pfns) if scrambled else core.shared_memory(file).read(pgoffs)
        contents, raw = controller.write_plan(pfns, rows, under)
        controller.store_raw(pfns, raw)
        done.append(contents)
    return done


def _present(core: Core, file: RestrictedFile, pgoffs: I64) -> Bools:
    """Return which ascending pages are no holes of the shared memfd; True also where unlooked."""
    first, extent = int(pgoffs[0]), int(pgoffs[-1] - pgoffs[0]) + 1
    if extent > NEAR * pgoffs.size:
        return np.ones(pgoffs.size, dtype=np.bool_)
    return np.isin(pgoffs, core.shared_memory(file).present(first, extent))


def _to_shared(
    core: Core, file: RestrictedFile, pgoffs: I64, pfns: I64, content: Content, key: int
) -> None:
    shared, controller = core.shared_memory(file), core.controller
    if content is Content.ZERO:
        shared.punch(pgoffs)
        return
    if content is Content.DESTROYED:
        shared.write(pgoffs, scramble(core, pfns))
        return
    # a hole reads as zeros, too, and costs nothing
    zeros = controller.zeros(pfns, key if content is Content.PRESERVED else 0)
    shared.punch(pgoffs[zeros])
    pgoffs, pfns = pgoffs[~zeros], pfns[~zeros]
    if pfns.size:
        noise = content is Content.NOISE
        shared.write(pgoffs, controller.raw(pfns) if noise else controller.read(pfns, key)[0])


def scramble(core: Core, pfns: I64) -> U8:
    """Return bytes that nobody can have expected: what "destroyed" content reads as."""
    zeros = np.zeros((pfns.size, PAGE_SIZE), dtype=np.uint8)
    return core.controller.scrambler.encrypt(pfns + (core.journal.revision << 32), zeros)


def discard(
    core: Core, number: int, start: int, npages: int, private: bool, done: Converted
) -> Steps[None]:
    """Destroy, after the record, the copy of the bytes in the half that no longer counts."""
    if not done.content or not core.files.exists(number):
        return
    file = core.files.get(number)
    present = file.frames.touched(start, npages)
    # it may have been put off, and some of it been converted back
    present = present[file.attributes.get(present) == int(private)]
    with in_progress(core, file, start, npages):
        if private:
            punch = partial(core.shared_memory(file).punch, present)
            yield Step("convert: discard", work=punch, vm=file.info.vm)
            return
        pfns = np.asarray(file.frames.get(present), dtype=np.int64) - 1
        shared = core.host.stored.get(pfns) == Stored.SHARED
        dirty = pfns[shared & ((core.host.flags.get(pfns) & ARENA) != 0)]
        punch = partial(core.controller.punch, dirty)
        yield Step("convert: discard", work=punch, vm=file.info.vm)
        with core.tx("convert: discard") as tx:
            tx.put(core.host.flags, dirty, core.host.flags.get(dirty) & ~ARENA)
