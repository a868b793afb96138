"""One page's whole story: what a page map says of a frame, and who holds it.

Owns ``page``, the query that a VMM asks most. It reads single entries of the tables, where
``queries.frame_map`` reads columns of thousands: for one frame, arrays cost ten times the answer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rmemd.consumers.guard import Consumer
from rmemd.engine.core import Core
from rmemd.errors import FOLIO_BUSY, FOLIO_UNMOVABLE, HW_POISON, Holder
from rmemd.model.files import FLAG_ANONYMOUS, PRIVATE, RestrictedFile
from rmemd.model.host import POISON, Stored, Use
from rmemd.model.ledger import PIN_BIAS

# by number: members of an Enum are looked up slowly
_USES = {int(use): use for use in Use}
_STORED = {
    int(Stored.RAW_ZERO): "raw zero", int(Stored.KEY_ZERO): "zero under key",
    int(Stored.BYTES): "bytes", int(Stored.SHARED): "shared", int(Stored.TAINTED): "tainted",
}  # fmt: skip
_PRIVATE, _SHARED, _POISONED = int(Use.PRIVATE), int(Use.SHARED), int(POISON)


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
    file, binding, pgoff, cached = None, None, 0, 0
    if number:
        file, pgoff, cached = core.files.get(number), host.pgoff.at(pfn), 1
        binding = file.binding_at(pgoff)
    is_private, mapped, state, vm, gfn = use == _PRIVATE, False, "", 0, -1
    if file is not None and binding is not None and core.vms.exists(binding.vm):
        vm, gfn = binding.vm, pgoff - binding.pgoff + binding.gfn
        view = core.vms.get(vm)
        consumer = core.consumers[vm]
        if is_private and consumer.ops.page_state is not None:
            state = _vendor_state(consumer, gfn, pfn)
        # what is bound is a restricted file's: in place its attributes say what is private
        attributes = file.attributes.at(pgoff) if view.info.in_place else view.attributes.at(gfn)
        is_private = attributes == PRIVATE
        # an entry has the frame beside a bit; 0 is none
        mapped = (view.mirror.at(gfn) >> 1) - 1 == pfn
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
        pfn, host.node_of(pfn), _USES[use], number, pgoff, vm, gfn, is_private, mapped, state,
        _STORED[host.stored.at(pfn)], cached + refs, pins, cached,
        # both columns are sums over the ledger
        core.ledger.holders(pfn) if is_held else (),
        unmovable, poisoned,
    )  # fmt: skip


def _vendor_state(consumer: Consumer, gfn: int, pfn: int) -> str:
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
    consumer = core.consumers.get(info.vm)
    return consumer is not None and consumer.ops.migrate_folio is not None
