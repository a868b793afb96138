"""One page's whole story: what a page map says of a frame, and who holds it.

Owns ``page``, the query that a VMM asks most. It reads single entries of the tables, where
``queries.frame_map`` reads columns of thousands: for one frame, arrays cost ten times the answer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rmemd.engine.core import Core
from rmemd.errors import FOLIO_BUSY, FOLIO_UNMOVABLE, HW_POISON, Holder
from rmemd.model.files import FLAG_ANONYMOUS, RestrictedFile
from rmemd.model.host import POISON, Stored, Use
from rmemd.model.ledger import PIN_BIAS
from rmemd.model.vms import Vm

# by number: members of an Enum are looked up slowly
_USES = {int(use): use for use in Use}
_STORED = {
    int(Stored.RAW_ZERO): "raw zero", int(Stored.KEY_ZERO): "zero under key",
    int(Stored.BYTES): "bytes", int(Stored.SHARED): "shared", int(Stored.TAINTED): "tainted",
}  # fmt: skip
_PRIVATE, _SHARED, _POISONED = int(Use.PRIVATE), int(Use.SHARED), int(POISON)
_NO_VM = (None, -1)


class Page(NamedTuple):
    """One page's whole story."""

    pfn: int
    node: int
    use: Use
    file: int
    pgoff: int
    vm: int
    gfn: int
    is_private: bool
    mapped: bool
    vendor_state: str
    content: str
    references: int
    pins: int
    expected: int
    holders: tuple[Holder, ...]
    unmovable: str
    poisoned: bool


def page(core: Core, pfn: int) -> Page:
    """Return everything known of the page on a frame."""
    host = core.host
    use, number = host.use.at(pfn), host.owner.at(pfn)
    refs, pins = host.refs.at(pfn), host.pins.at(pfn)
    file, pgoff, cached = None, 0, 0
    vm, gfn = _NO_VM
    if number:
        file, pgoff, cached = core.files.get(number), host.pgoff.at(pfn), 1
        vm, gfn = _guest(core, file, pgoff)
    is_private, mapped, state = use == _PRIVATE, False, ""
    if vm is not None:
        if is_private:
            state = _vendor_state(core, vm, gfn, pfn)
        is_private = _is_private(core, vm, gfn)
        # an entry has the frame beside a bit; 0 is none
        mapped = (vm.mirror.at(gfn) >> 1) - 1 == pfn
    poisoned = host.flags.at(pfn) & _POISONED != 0
    is_held = refs + pins * PIN_BIAS > 0
    unmovable = ""
    if poisoned:
        unmovable = HW_POISON.name
    elif not _may_be_asked(core, use, file):
        unmovable = FOLIO_UNMOVABLE.name if cached else ""
    elif is_held:
        unmovable = FOLIO_BUSY.name
    return Page(
        pfn, host.node_of(pfn), _USES[use], number, pgoff, 0 if vm is None else vm.info.vm, gfn,
        is_private, mapped, state, _STORED[host.stored.at(pfn)],
        cached + refs, pins, cached,
        # both columns are sums over the ledger
        core.ledger.holders(pfn) if is_held else (),
        unmovable, poisoned,
    )  # fmt: skip


def _guest(core: Core, file: RestrictedFile, pgoff: int) -> tuple[Vm | None, int]:
    """Return the VM that a page of a file is bound to and its guest frame, or none."""
    for binding, _, _ in file.bound(pgoff, 1):
        if core.vms.exists(binding.vm):
            return core.vms.get(binding.vm), pgoff - binding.pgoff + binding.gfn
    return _NO_VM


def _is_private(core: Core, vm: Vm, gfn: int) -> bool:
    """Say of one guest frame what ``fault.is_private`` says of many."""
    if not vm.info.in_place:
        return vm.attributes.at(gfn) == 1
    slot = vm.slot_at(gfn)
    if slot is None or not slot.restricted or not core.files.exists(slot.file):
        return False
    return core.files.get(slot.file).attributes.at(gfn - slot.gfn + slot.pgoff) == 1


def _vendor_state(core: Core, vm: Vm, gfn: int, pfn: int) -> str:
    consumer = core.consumer(vm)
    if consumer.ops.page_state is None:
        return ""
    states = consumer.page_state(np.array([gfn], np.int64), np.array([pfn], np.int64))
    return "" if states is None else states.names[int(states.codes[0])]


def _may_be_asked(core: Core, use: int, file: RestrictedFile | None) -> bool:
    """Say of one frame that is not poisoned what ``compact.movable_frames`` says of many."""
    if file is None or use not in (_PRIVATE, _SHARED):
        return False
    info = file.info
    # where in place one folio serves either state, the hook decides about all of the file's
    is_governed = use == _PRIVATE or (info.in_place and not info.flags & FLAG_ANONYMOUS)
    if not is_governed:
        return True
    return core.vms.exists(info.vm) and core.consumers[info.vm].ops.migrate_folio is not None
