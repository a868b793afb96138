"""What can be asked without changing anything: page maps, pages, accounts.

Owns the read side. Every query runs under the lock and answers for one revision.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rmemd.engine import frames
from rmemd.engine.compact import movable_frames
from rmemd.engine.core import Core
from rmemd.engine.fault import is_private
from rmemd.errors import FOLIO_BUSY, FOLIO_UNMOVABLE, HW_POISON, Holder
from rmemd.model.files import RestrictedFile
from rmemd.model.host import POISON, Stored, Use
from rmemd.model.ledger import PIN_BIAS
from rmemd.model.vms import Slot, Vm, unpack
from rmemd.units import I64, pages

STORED_NAMES = {
    Stored.RAW_ZERO: "raw zero", Stored.KEY_ZERO: "zero under key", Stored.BYTES: "bytes",
    Stored.SHARED: "shared", Stored.TAINTED: "tainted",
}  # fmt: skip


@dataclass
class FrameMap:
    """Frames as parallel columns, one entry per frame asked for."""

    pfns: I64
    use: I64
    file: I64
    pgoff: I64
    vm: I64
    gfn: I64
    mapped: np.ndarray
    state: I64
    poisoned: np.ndarray
    state_names: list[str] = field(default_factory=lambda: [""])

    def breaks(self) -> I64:
        """Return the indices at which a new run begins."""
        new = np.zeros(self.pfns.size, dtype=np.bool_)
        new[:1] = True
        for same in (self.use, self.file, self.vm, self.mapped, self.state, self.poisoned):
            new[1:] |= same[1:] != same[:-1]
        owned = self.file[1:] > 0
        new[1:] |= owned & (np.diff(self.pgoff) != 1)
        new[1:] |= owned & (self.gfn[1:] >= 0) & (np.diff(self.gfn) != 1)
        return np.flatnonzero(new).astype(np.int64)


@dataclass(frozen=True)
class Page:
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


@dataclass(frozen=True)
class Account:
    """One file's use of memory, in pages."""

    file: int
    vm: int
    size: int
    private: int
    shared: int
    found: int
    double: int
    held: int


def frame_map(core: Core, start: int, npages: int) -> FrameMap:
    """Return what frames are used for, by whom, and in which vendor state."""
    host = core.host
    pfns = pages(start, npages)
    owner = host.owner.get(pfns).astype(np.int64)
    none = np.full(pfns.size, -1, dtype=np.int64)
    found = FrameMap(
        pfns, host.use.get(pfns).astype(np.int64), owner, host.pgoff.get(pfns),
        np.zeros(pfns.size, dtype=np.int64), none, np.zeros(pfns.size, dtype=np.bool_),
        np.zeros(pfns.size, dtype=np.int64), (host.flags.get(pfns) & POISON) != 0,
    )  # fmt: skip
    for number in np.unique(owner[owner > 0]).tolist():
        _fill_in(core, found, core.files.get(number), np.flatnonzero(owner == number))
    return found


def _fill_in(core: Core, found: FrameMap, file: RestrictedFile, at: I64) -> None:
    pgoffs = found.pgoff[at]
    for binding, lo, n in file.bound(int(pgoffs.min()), int(np.ptp(pgoffs)) + 1):
        mine = at[(pgoffs >= lo) & (pgoffs < lo + n)]
        if not mine.size or not core.vms.exists(binding.vm):
            continue
        vm = core.vms.get(binding.vm)
        gfns = found.pgoff[mine] - binding.pgoff + binding.gfn
        found.vm[mine], found.gfn[mine] = binding.vm, gfns
        mapped_to, _ = unpack(vm.mirror.get(gfns))
        found.mapped[mine] = mapped_to == found.pfns[mine]
        private = mine[found.use[mine] == Use.PRIVATE]
        if private.size:
            _name_states(core, found, vm, private)


def _name_states(core: Core, found: FrameMap, vm: Vm, at: I64) -> None:
    states = core.consumer(vm).page_state(found.gfn[at], found.pfns[at])
    if states is None:
        return
    base = {name: i for i, name in enumerate(found.state_names)}
    for name in states.names:
        if name not in base:
            base[name] = len(found.state_names)
            found.state_names.append(name)
    numbers = np.array([base[name] for name in states.names], dtype=np.int64)
    found.state[at] = numbers[states.codes]


def page(core: Core, pfn: int) -> Page:
    """Return everything known of the page on a frame."""
    host = core.host
    m = frame_map(core, pfn, 1)
    vm = core.vms.get(int(m.vm[0])) if m.vm[0] else None
    private = bool(m.use[0] == Use.PRIVATE)
    if vm is not None:
        private = bool(is_private(core, vm, m.gfn[:1], vm.slot_at(int(m.gfn[0])))[0])
    cached = int(host.owner.at(pfn) != 0)
    references, pins = cached + host.refs.at(pfn), host.pins.at(pfn)
    return Page(
        pfn, host.node_of(pfn), Use(host.use.at(pfn)), int(m.file[0]),
        int(m.pgoff[0]) if m.file[0] else 0, int(m.vm[0]), int(m.gfn[0]), private,
        bool(m.mapped[0]), m.state_names[int(m.state[0])],
        STORED_NAMES[Stored(host.stored.at(pfn))],
        references, pins, cached, core.ledger.holders(pfn),
        _why_unmovable(core, pfn, references + pins * PIN_BIAS, cached), bool(m.poisoned[0]),
    )  # fmt: skip


def _why_unmovable(core: Core, pfn: int, counted: int, expected: int) -> str:
    if core.host.flags.at(pfn) & POISON:
        return HW_POISON.name
    if not movable_frames(core, np.array([pfn]))[0]:
        return FOLIO_UNMOVABLE.name if core.host.owner.at(pfn) else ""
    return FOLIO_BUSY.name if counted > expected else ""


def guest_frames(core: Core, vm: Vm, gfn: int, npages: int) -> I64:
    """Return the frames behind a guest range, mapped or not; pages without a frame are left out."""
    found, _ = unpack(vm.mirror.get(vm.mirror.touched(gfn, npages)))
    behind = [found]
    _, _, numbers = vm.slotmap.runs(gfn, npages)
    for number in np.unique(numbers[numbers > 0]).tolist():
        slot: Slot = vm.slots[number - 1]
        if not core.files.exists(slot.file):
            continue
        lo, hi = max(slot.gfn, gfn), min(slot.gfn + slot.npages, gfn + npages)
        file, first = core.files.get(slot.file), lo - slot.gfn + slot.pgoff
        for table in (file.frames, file.shared):
            behind.append(table.get(table.touched(first, hi - lo)) - 1)
    return np.unique(np.concatenate(behind))


def account(core: Core, file: RestrictedFile) -> Account:
    """Return a file's use of memory; pages that clients filled in are found, not yet charged."""
    size = file.info.size_pages
    frames_at, shared_at = file.frames.touched(0, size), file.shared.touched(0, size)
    found = frames.uncharged(core, file, 0, size)
    in_place_shared = 0
    if file.info.in_place:
        in_place_shared = int((file.attributes.get(frames_at) == 0).sum())
        double = np.intersect1d(found, frames_at).size
    else:
        double = np.intersect1d(frames_at, np.union1d(shared_at, found)).size
    pfns = np.concatenate((file.frames.get(frames_at), file.shared.get(shared_at))) - 1
    held = int(frames.referenced(core, np.asarray(pfns, dtype=np.int64)).sum())
    return Account(
        file.info.file, file.info.vm, size, int(frames_at.size) - in_place_shared,
        int(shared_at.size) + in_place_shared, int(found.size), int(double), held,
    )  # fmt: skip


def mapped_counts(core: Core, vm: Vm) -> tuple[int, int]:
    """Return how many private and shared pages a VM has mapped."""
    private = shared = 0
    for _, slot in vm.slots.items():
        one, other = vm.mapped(slot.gfn, slot.npages)
        private, shared = private + one.total, shared + other.total
    return private, shared
