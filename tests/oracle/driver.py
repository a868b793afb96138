"""The operations that are made on an engine and on the specification.

An operation is a tuple of a name and small numbers that are read modulo what there is, so that a
list of them means something after any of it was taken out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from rmemd.engine.migrate import Outcome
from rmemd.engine.programme import Instruction, Opcode
from rmemd.engine.vcpu import Exit
from rmemd.model.host import Use
from rmemd.model.sessions import Owner
from rmemd.units import PAGE_SIZE

from .objects import File, Frame, Traits, Vm
from .pair import (
    BASE,
    DEVICE,
    FILE_PAGES,
    FILES_MAX,
    GUEST_MEMFD,
    INIT_SHARED,
    MMAP,
    TENANT,
    VMS_MAX,
    Op,
    Pair,
)

# what is known of each consumer from outside: its personality, whether it can move and whether it
# pins; nothing else of it is the generic layer's
KINDS: dict[str, tuple[str, Traits]] = {
    "gup": ("gup", Traits(private_memory=False)),
    "sw-attributes": ("sw-protected", Traits(poisoned="lives")),
    "sw-in-place": ("sw-protected", Traits(in_place=True, poisoned="lives")),
    "null": ("null", Traits(poisoned="killed")),
    "tdx-today": ("tdx-today", Traits()),
    "tdx-2022": ("tdx-2022", Traits(pins=True)),
    "tdx-relocate": ("tdx-relocate", Traits(movable=True)),
    "relocate-in-place": ("tdx-relocate", Traits(in_place=True, movable=True)),
    "tdx-2022-in-place": ("tdx-2022", Traits(in_place=True, pins=True)),
}


class World(Pair):
    """One engine beside one specification, and every operation on them as a method."""

    def step(self, op: Op) -> None:
        """Do one operation on both and compare all that can be seen."""
        self.doing = op
        getattr(self, op[0])(*op[1:])
        self._bury()
        self._compare()

    # --- choosing ------------------------------------------------------------------------------
    def _vm(self, which: int) -> Vm | None:
        return self.spec.vms[self.vms[which % len(self.vms)]] if self.vms else None

    def _file(self, which: int) -> File | None:
        return self.spec.files[self.files[which % len(self.files)]] if self.files else None

    # --- operations: objects -------------------------------------------------------------------
    def create_vm(self, kind: str, whole: bool = True, npages: int = FILE_PAGES) -> None:
        """Make a VM; ``whole`` with memory that is bound and begins at BASE."""
        if len(self.vms) >= VMS_MAX:
            return
        consumer, traits = KINDS[kind]
        in_place = traits.in_place if traits.private_memory else None
        vm = self.engine.create_vm(consumer, in_place=in_place).info.vm
        self.engine.create_vcpu(vm, 0)
        if self.engine.core.consumers[vm].ops.finalize is not None:
            self.engine.finalize(vm)
        self.spec.create_vm(vm, traits)
        self.vms.append(vm)
        if whole and not traits.private_memory:
            self.add_slot(-1, 0, 0, npages, -1, 0)
        elif whole:
            self.create_file(-1, npages, MMAP)
            self.add_slot(-1, 0, 0, npages, -1, 0)

    def create_file(self, which: int, npages: int, flags: int) -> None:
        """Make a file of a VM that has private memory."""
        vm = self._vm(which)
        if vm is None or len(self.files) >= FILES_MAX or not vm.traits.private_memory:
            return
        file = self.engine.create_file(vm.vm, npages * PAGE_SIZE, flags | MMAP).info.file
        self.spec.create_file(vm.vm, file, npages, bool(flags & INIT_SHARED))
        self.files.append(file)

    def close_file(self, which: int) -> None:
        file = self._file(which)
        if file is not None and not file.anonymous:
            self._judge(self.spec.close_file(file.file), lambda: self.engine.close_file(file.file))

    def destroy_vm(self, which: int) -> None:
        vm = self._vm(which)
        if vm is not None:
            self._destroy(vm)

    def _destroy(self, vm: Vm) -> None:
        self._judge(self.spec.destroy_vm(vm.vm), lambda: self.engine.destroy_vm(vm.vm))
        self.vms.remove(vm.vm)

    def _bury(self) -> None:
        """Destroy what died, and forget files whose last page and handle are gone."""
        for vm in [self.spec.vms[number] for number in self.vms]:
            if vm.dead:
                self._destroy(vm)
        closed = [f for f in self.files if not self.spec.files[f].open]
        self.files = [f for f in self.files if f not in closed[:-1]]

    # --- operations: slots ---------------------------------------------------------------------
    def add_slot(
        self,
        which: int,
        slot: int,
        page: int,
        npages: int,
        which_file: int,
        pgoff: int,
        odd: int = 0,
    ) -> None:
        """Add a slot, ``odd`` bytes beside a page's start (in turn: address, size, offset)."""
        vm = self._vm(which)
        if vm is None:
            return
        # mostly a file of its own
        own = [f for f in self.files if self.spec.files[f].vm == vm.vm and which_file % 5]
        files = own or self.files
        file = self.spec.files[files[which_file % len(files)]] if files else None
        by = [int(odd == k) * 512 for k in (1, 2, 3)]
        gpa, size = (BASE + page) * PAGE_SIZE + by[0], npages * PAGE_SIZE + by[1]
        if not vm.traits.private_memory:
            expected = self.spec.add_slot(vm.vm, slot, gpa, size, None, 0)
            act = lambda: self.engine.set_memory_region(vm.vm, slot, 0, gpa, size)  # noqa: E731
            self._judge(expected, act)
            if not expected.errno and not self.spec.vms[vm.vm].slots[slot].file.file:
                made = self.engine.core.vms.get(vm.vm).slots[slot].file
                self.spec.name_anonymous(vm.vm, slot, made)
                self.files.append(made)
        elif file is not None:
            offset = pgoff * PAGE_SIZE + by[2]
            self._judge(
                self.spec.add_slot(vm.vm, slot, gpa, size, file.file, offset),
                lambda: self.engine.set_memory_region(
                    vm.vm, slot, GUEST_MEMFD, gpa, size, file.file, offset
                ),
            )

    def delete_slot(self, which: int, slot: int) -> None:
        vm = self._vm(which)
        if vm is not None:
            flags = GUEST_MEMFD if vm.traits.private_memory else 0
            self._judge(
                self.spec.delete_slot(vm.vm, slot),
                lambda: self.engine.set_memory_region(vm.vm, slot, flags, BASE * PAGE_SIZE, 0),
            )

    # --- operations: pages ---------------------------------------------------------------------
    def fallocate(self, which: int, mode: int, page: int, n: int, odd: int = 0) -> None:
        file = self._file(which)
        if file is None or file.anonymous:
            return
        offset, length = page * PAGE_SIZE + (odd & 1), n * PAGE_SIZE + (odd >> 1)
        self._judge(
            self.spec.fallocate(file.file, mode, offset, length),
            lambda: self.engine.fallocate(file.file, mode, offset, length),
        )

    def set_attributes(self, which: int, page: int, n: int, attributes: int, odd: int = 0) -> None:
        vm = self._vm(which)
        if vm is not None:
            gpa, size = (BASE + page) * PAGE_SIZE + odd, n * PAGE_SIZE
            self._judge(
                self.spec.set_attributes(vm.vm, gpa, size, attributes),
                lambda: self.engine.set_attributes(vm.vm, [(gpa, size, attributes)]),
            )

    def convert_file(self, which: int, page: int, n: int, attributes: int, odd: int = 0) -> None:
        file = self._file(which)
        if file is not None and not file.anonymous and not self.spec.vms[file.vm].destroyed:
            offset, size = page * PAGE_SIZE + odd, n * PAGE_SIZE
            self._judge(
                self.spec.convert_file(file.file, offset, size, attributes),
                lambda: self.engine.convert_file(file.file, offset, size, attributes),
                lambda converted: converted.changed_pages,
            )

    def pre_fault(self, which: int, page: int, n: int) -> None:
        vm = self._vm(which)
        if vm is not None:
            gpa, size = (BASE + page) * PAGE_SIZE, n * PAGE_SIZE
            done = self._judge(
                self.spec.pre_fault(vm.vm, gpa, size),
                lambda: self.engine.pre_fault(vm.vm, gpa, size),
                lambda found: found.done_pages,
            )
            if done is not None:
                section = "restrictedmem.md §3 pre_fault_memory_test"
                left = size - done.done_pages * PAGE_SIZE
                self._same(section, "bytes left", left, done.left_bytes)

    def touch(self, which: int, page: int, private: bool) -> None:
        """Have the guest read a page; a vendor whose guest must accept first is left out."""
        vm = self._vm(which)
        if vm is None or self.engine.core.vms.get(vm.vm).info.platform == "tdx":
            return
        read = Instruction(Opcode.TOUCH, (BASE + page) * PAGE_SIZE, PAGE_SIZE, private=private)
        self.engine.set_programme(vm.vm, 0, (read,))
        expected = self.spec.touch(vm.vm, BASE + page, private)
        self._judge(
            expected,
            lambda: self.engine.run_vcpu(vm.vm, 0),
            lambda e: ("" if e.reason is Exit.INTERNAL_ERROR else e.reason.name, e.errno),
        )
        self._adopt_death(vm)

    def _adopt_death(self, vm: Vm) -> None:
        """Take over whether poison killed a VM: that is its consumer's."""
        vm.dead = vm.dead or self.engine.core.vms.get(vm.vm).info.state == "dead"

    # --- operations: holders -------------------------------------------------------------------
    def host_read(self, which: int, page: int, n: int) -> None:
        file = self._file(which)
        if file is not None:
            self._judge(
                self.spec.host_read(file.file, page * PAGE_SIZE, n * PAGE_SIZE),
                lambda: self.engine.read_shared(file.file, page * PAGE_SIZE, n * PAGE_SIZE),
                lambda data: None,
            )

    def pin(self, which: int, page: int, n: int) -> None:
        file = self._file(which)
        if file is None:
            return
        expected, frames = self.spec.pin(file.file, range(page, page + n), DEVICE)
        at = (file.file, page * PAGE_SIZE, n * PAGE_SIZE, "DMA", DEVICE)
        handle = self._judge(expected, lambda: self.engine.pin(*at))
        if handle is not None:
            self.spec.pinned(handle, DEVICE, frames)

    def unpin(self, which: int) -> None:
        if self.spec.pins:
            handle = sorted(self.spec.pins)[which % len(self.spec.pins)]
            self._judge(self.spec.unpin(handle), lambda: self.engine.unpin(handle))
            self._judge(self.spec.unpin(handle), lambda: self.engine.unpin(handle))

    def get_pages(self, which: int, page: int, n: int) -> None:
        file = self._file(which)
        if file is None or file.anonymous:
            return
        holder = f"session {self.session}"
        expected, frames = self.spec.get_pages(file.file, range(page, page + n), holder)
        at = (file.file, page * PAGE_SIZE, n * PAGE_SIZE, Owner(TENANT, self.session))
        pfns = self._judge(expected, lambda: self.engine.get_pages(*at))
        if pfns is not None:
            self.got += zip(frames, pfns.tolist(), strict=True)

    def put_page(self, which: int) -> None:
        if self.got:
            frame, pfn = self.got.pop(which % len(self.got))
            expected = self.spec.put_page(frame, f"session {self.session}")
            owner = Owner(TENANT, self.session)
            self._judge(expected, lambda: self.engine.put_pages(np.array([pfn]), owner))

    # --- operations: the host ------------------------------------------------------------------
    def _frames(self, which: int, n: int) -> list[Frame]:
        """Return frames in the order of their numbers, from a chosen one."""
        known = sorted(self.pfns, key=self.pfns.__getitem__)
        start = which % len(known) if known else 0
        return known[start : start + n]

    def migrate(self, which: int, n: int) -> None:
        frames = {self.pfns[frame]: frame for frame in self._frames(which, n)}
        short = self.spec.free < len(frames)
        may = {pfn: self.spec.migration(frame) for pfn, frame in frames.items()}
        nobodys = {pfn: frame.page is None for pfn, frame in frames.items()}
        report = self.engine.migrate(np.array(list(frames), dtype=np.int64))
        told: Counter[int] = Counter()
        for moved in report.moves:
            for src, dst in zip(moved.src.tolist(), moved.dst.tolist(), strict=True):
                told[src] += 1
                self._judge_move(src, dst, moved, may[src], short)
                if moved.outcome in (Outcome.MOVED, Outcome.BUSY):
                    self.spec.zapped(frames[src])
                if moved.outcome is Outcome.MOVED:
                    del self.pfns[frames[src]]
                    self.pfns[self.spec.moved(frames[src])] = dst
        # a frame that no page has (a hold or poison keeps it from being free) may have no outcome
        pfns = Counter({pfn: told.get(pfn, 0) if nobodys[pfn] else 1 for pfn in frames})
        self._same("DESIGN.md §4 EACH", "outcomes", +pfns, told)

    def _judge_move(
        self, src: int, dst: int, moved: Any, may: tuple[set[str], str], short: bool
    ) -> None:
        outcome, section = moved.outcome.name, may[1]
        self.seen["migrate", outcome] += 1
        starved = short and outcome == "FAILED" and moved.refusal.reason.name == "NO_FRAMES"
        # the destination is reserved before references are looked at (DESIGN.md §4 Migration)
        if outcome not in may[0] and not (starved and may[0] & {"MOVED", "BUSY"}):
            raise self._differ(
                section, f"pfn {src}: {sorted(may[0])}", f"{outcome} {moved.refusal}"
            )
        if outcome == "MOVED" and (dst == src or dst in self.pfns.values()):
            raise self._differ("reliability.md §3 I1", f"pfn {src} to a free frame", dst)
        errnos = {"UNMOVABLE": ("FOLIO_UNMOVABLE", 95), "BUSY": ("FOLIO_BUSY", 11)}
        if outcome in may[0] and len(may[0]) == 1 and outcome in errnos:
            got = (moved.refusal.reason.name, moved.refusal.errno)
            self._same(section, f"pfn {src}", errnos[outcome], got)

    def poison(self, which: int) -> None:
        frames = self._frames(which, 1)
        frame = frames[0] if frames else None
        if frame is None or frame.poisoned:
            return
        expected = self.spec.poison(frame)
        self._judge(
            expected, lambda: self.engine.poison(self.pfns[frame]), lambda found: found.vm_lost
        )
        for vm in self.vms:
            self._adopt_death(self.spec.vms[vm])

    def poison_free(self, pfn: int) -> None:
        """Poison a frame that nobody has; it is never free again (I4, I13)."""
        if self.engine.core.host.use.at(pfn) == Use.FREE:
            self._judge(
                self.spec.poison(None), lambda: self.engine.poison(pfn), lambda p: p.vm_lost
            )
