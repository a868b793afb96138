"""What can be asked without changing anything: page maps, accounts; ``onepage`` has a page's story.

Owns the read side. Every query runs under the lock and answers for one revision.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct, field

from rmemd.engine import frames
from rmemd.engine.core import Core
from rmemd.model.files import RestrictedFile
from rmemd.model.host import POISON, Use
from rmemd.model.vms import Slot, Vm, unpack
from rmemd.units import I64, distinct, pages


class FrameMap(Struct):
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


class Account(Struct, frozen=True):
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
    for number in distinct(owner[owner > 0]).tolist():
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


def guest_frames(core: Core, vm: Vm, gfn: int, npages: int) -> I64:
    """Return the frames behind a guest range, mapped or not; pages without a frame are left out."""
    found, _ = unpack(vm.mirror.get(vm.mirror.touched(gfn, npages)))
    behind = [found]
    _, _, numbers = vm.slotmap.runs(gfn, npages)
    for number in distinct(numbers[numbers > 0]).tolist():
        slot: Slot = vm.slots[number - 1]
        if not core.files.exists(slot.file):
            continue
        lo, hi = max(slot.gfn, gfn), min(slot.gfn + slot.npages, gfn + npages)
        file, first = core.files.get(slot.file), lo - slot.gfn + slot.pgoff
        for table in (file.frames, file.shared):
            behind.append(table.get(table.touched(first, hi - lo)) - 1)
    return distinct(np.concatenate(behind))


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
