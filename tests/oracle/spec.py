"""The generic layer as an executable specification: sets, dicts and one page at a time.

Written from the reference (restrictedmem.md, pkvm.md §7, reliability.md §3, DESIGN.md §4), slow and
obvious, and sharing no code with the engine. Every operation returns what must be said, naming the
section it follows. Where the reference leaves a choice (which frame, which page of a migration is
told first), nothing is predicted: the caller tells what was chosen, and only relations are kept.
"""

from __future__ import annotations

import errno

from .objects import PAGE, PRIVATE, Expected, File, Frame, Slot, Vm
from .store import CHANGING_ONLY, RM2, Store

EHWPOISON = 133
BIND = RM2 + "bind"
GET_PFN = RM2 + "get_pfn"
HOST_FAULT = RM2 + "host fault"
ATTRIBUTES = RM2 + "KVM_SET_MEMORY_ATTRIBUTES"
IN_PLACE = RM2 + "in-place conversion"
PRE_FAULT = "restrictedmem.md §3 pre_fault_memory_test"


class Spec(Store):
    """A host of ``total`` frames with what lives on it."""

    def destroy_vm(self, number: int) -> Expected:
        """§2 VM fd closed first: gmem still usable; what the consumer held is dropped (I14)."""
        vm = self.vms[number]
        for gfn in list(vm.maps):
            self._unmap(vm, gfn)
        for slot in list(vm.slots.values()):
            self._drop_slot(vm, slot)
        vm.destroyed = True
        return Expected(RM2 + "VM fd closed first")

    # --- memslots ------------------------------------------------------------------------------
    def add_slot(
        self, vm: int, number: int, gpa: int, size: int, file: int | None, offset: int
    ) -> Expected:
        """§2 bind, the checks in that order; ``file`` None is an ordinary slot.

        The caller names the memory behind an ordinary slot afterwards, by ``name_anonymous``.
        """
        guest = self.vms[vm]
        if guest.dead:
            return Expected("DESIGN.md §4, kvm_vm_dead", errno=errno.EIO, reason="VM_DEAD")
        if gpa % PAGE or size % PAGE or offset % PAGE:
            return Expected(BIND, errno=errno.EINVAL)
        gfn, npages, pgoff = gpa // PAGE, size // PAGE, offset // PAGE
        old = guest.slots.get(number)
        if old is not None and (old.restricted or old.npages != npages):
            return Expected(BIND + ", slot exists", errno=errno.EINVAL)
        others = {at for at in range(gfn, gfn + npages) if guest.slot_at(at) not in (None, old)}
        if others:
            return Expected(BIND + ", GPA overlap", errno=errno.EEXIST, reason="SLOT_OVERLAP")
        if old is not None:
            return self._move_slot(guest, old, gfn)
        if file is None:
            backing = File(0, vm, npages, False, anonymous=True)
            guest.slots[number] = Slot(number, gfn, npages, backing, 0, False)
            return Expected(BIND)
        found = self.files.get(file)
        if found is None or not found.open:
            return Expected(BIND + ", bad fd", errno=errno.EBADF, reason="NO_SUCH_FILE")
        if found.vm != vm or pgoff + npages > found.npages:
            return Expected(BIND + ", other VM or past EOF", errno=errno.EINVAL)
        if self._views(found, range(pgoff, pgoff + npages)):
            section = BIND + ", range already bound (6.18)"
            return Expected(section, errno=errno.EINVAL, reason="BINDING_OVERLAP")
        guest.slots[number] = Slot(number, gfn, npages, found, pgoff, True)
        return Expected(BIND)

    def _move_slot(self, vm: Vm, slot: Slot, gfn: int) -> Expected:
        """An ordinary slot set again: the same is a no-op, elsewhere it is zapped and moves."""
        if gfn != slot.gfn:
            for old in [old for old in vm.maps if slot.has(old)]:
                self._unmap(vm, old)
            slot.gfn = gfn
        return Expected("restrictedmem.md §3 set_memory_region_test, move")

    def name_anonymous(self, vm: int, number: int, file: int) -> None:
        """Say the handle of the memory behind an ordinary slot."""
        backing = self.vms[vm].slots[number].file
        backing.file = file
        self.files[file] = backing

    def delete_slot(self, vm: int, number: int) -> Expected:
        """§2 bound slot: the memslot code zaps, then the range is unbound; an empty one EINVAL."""
        guest = self.vms[vm]
        if guest.dead:
            return Expected("DESIGN.md §4, kvm_vm_dead", errno=errno.EIO, reason="VM_DEAD")
        slot = guest.slots.get(number)
        if slot is None:
            return Expected(RM2 + "bound slot", errno=errno.EINVAL, reason="NO_SUCH_SLOT")
        self._drop_slot(guest, slot)
        return Expected(RM2 + "unbind")

    def _drop_slot(self, vm: Vm, slot: Slot) -> None:
        for gfn in [gfn for gfn in vm.maps if slot.has(gfn)]:
            self._unmap(vm, gfn)
        del vm.slots[slot.slot]
        if slot.file.anonymous:
            for key in list(slot.file.pages):
                self._truncate(slot.file, key)
            slot.file.open = False

    # --- conversion ----------------------------------------------------------------------------
    def set_attributes(self, vm: int, gpa: int, size: int, attributes: int) -> Expected:
        """§2 KVM_SET_MEMORY_ATTRIBUTES: equal is 0 without events; no page is touched."""
        guest = self.vms[vm]
        if guest.dead:
            return Expected("DESIGN.md §4, kvm_vm_dead", errno=errno.EIO, reason="VM_DEAD")
        if guest.traits.in_place:
            return Expected(IN_PLACE, errno=errno.ENOTTY, reason="WRONG_PERSONALITY")
        if attributes & ~(8 if guest.traits.private_memory else 0):
            return Expected(ATTRIBUTES, errno=errno.EINVAL, reason="ATTRIBUTES_UNSUPPORTED")
        if size <= 0:
            return Expected(ATTRIBUTES, errno=errno.EINVAL, reason="BAD_RANGE")
        if gpa % PAGE or size % PAGE:
            return Expected(ATTRIBUTES, errno=errno.EINVAL, reason="NOT_PAGE_ALIGNED")
        gfns = set(range(gpa // PAGE, (gpa + size) // PAGE))
        wanted = gfns if not attributes else set()
        if not guest.traits.private_memory or guest.shared_gfns & gfns == wanted:
            return Expected(ATTRIBUTES)
        # the reference leaves open whether a leaf that agrees already is unmapped; here it stays
        for gfn in gfns & (guest.shared_gfns ^ wanted):
            self._unmap(guest, gfn)
        guest.shared_gfns = guest.shared_gfns - gfns | wanted
        return Expected(ATTRIBUTES)

    def convert_file(self, number: int, offset: int, size: int, attributes: int) -> Expected:
        """§2 in-place conversion, steps 1 to 5; a consumer's own pin does not stop its VM."""
        file = self.files[number]
        if not file.open:
            return Expected(IN_PLACE, errno=errno.EBADF, reason="NO_SUCH_FILE")
        if not file.in_place:
            return Expected(IN_PLACE, errno=errno.ENOTTY, reason="WRONG_PERSONALITY")
        if attributes & ~8:
            return Expected(IN_PLACE, errno=errno.EINVAL, reason="ATTRIBUTES_UNSUPPORTED")
        if size <= 0:
            return Expected(IN_PLACE, errno=errno.EINVAL, reason="BAD_RANGE")
        if offset % PAGE or size % PAGE:
            return Expected(IN_PLACE, errno=errno.EINVAL, reason="NOT_PAGE_ALIGNED")
        span = range(offset // PAGE, (offset + size) // PAGE)
        if span.stop > file.npages:
            return Expected(IN_PLACE, errno=errno.EINVAL, reason="BAD_RANGE")
        return self._convert(file, span, bool(attributes))

    def _convert(self, file: File, span: range, private: bool) -> Expected:
        wanted = set() if private else set(span)
        changed = (file.shared_pgoffs & set(span)) ^ wanted
        if not changed:
            return Expected(IN_PLACE + " 2", 0)
        own = self.vms[file.vm].label
        checked = changed if CHANGING_ONLY in self.excused else span
        for pgoff in sorted(checked) if private else ():
            frame = file.pages.get((pgoff, PRIVATE))
            if frame is not None and frame.elevated_for(own):
                section = IN_PLACE + " 4, reliability.md §3 I11"
                return Expected(
                    section, errno=errno.EAGAIN, reason="FOLIO_BUSY", offset=pgoff * PAGE
                )
        for pgoff in changed:
            self._invalidate(file, range(pgoff, pgoff + 1), None)
        file.shared_pgoffs = file.shared_pgoffs - set(span) | wanted
        return Expected(IN_PLACE + " 5", len(changed))

    # --- faults --------------------------------------------------------------------------------
    def _fault(self, vm: Vm, gfn: int) -> Expected:
        """Map one page as its attribute says (§2 get_pfn; pkvm.md §7: no reference is left)."""
        slot, private = vm.slot_at(gfn), vm.is_private(gfn)
        if slot is None:
            return Expected(PRE_FAULT, errno=errno.ENOENT, reason="NO_MEMSLOT")
        if private and not slot.restricted:
            section = "restrictedmem.md §3 private_access_memslot_not_private"
            return Expected(section, errno=errno.EFAULT, reason="MEMORY_FAULT")
        if not slot.file.open:
            return Expected(GET_PFN, errno=errno.EFAULT, reason="FILE_GONE")
        if gfn in vm.maps:
            return Expected(GET_PFN)
        pgoff, half = gfn - slot.gfn + slot.pgoff, slot.file.half(private)
        frame = slot.file.pages.get((pgoff, half)) or self._take((slot.file.file, pgoff, half))
        if frame is None:
            return Expected(GET_PFN, errno=errno.ENOMEM, reason="NO_FRAMES")
        if frame.poisoned:
            return Expected(GET_PFN, errno=EHWPOISON, reason="HW_POISON")
        vm.maps[gfn] = (frame, not private)
        if vm.traits.pins and private:
            self._hold(frame, vm.label, False, 1)
        return Expected(GET_PFN)

    def pre_fault(self, vm: int, gpa: int, size: int) -> Expected:
        """§3 pre_fault_memory: the size shrinks exactly when the call succeeds, page by page."""
        guest = self.vms[vm]
        if guest.dead:
            return Expected("DESIGN.md §4, kvm_vm_dead", errno=errno.EIO, reason="VM_DEAD")
        if gpa % PAGE or size % PAGE or size <= 0:
            return Expected(PRE_FAULT, errno=errno.EINVAL)
        gfns = range(gpa // PAGE, (gpa + size) // PAGE)
        for done, gfn in enumerate(gfns):
            said = self._fault(guest, gfn)
            if said.errno:
                return Expected(said.section, done) if done else said
        return Expected(PRE_FAULT, len(gfns))

    def touch(self, vm: int, gfn: int, private: bool) -> Expected:
        """A guest's read, as the exit's name and errno (§2 KVM_EXIT_MEMORY_FAULT)."""
        guest, section = self.vms[vm], RM2 + "KVM_EXIT_MEMORY_FAULT"
        if guest.dead:
            return Expected("DESIGN.md §4, kvm_vm_dead", errno=errno.EIO, reason="VM_DEAD")
        if private != guest.is_private(gfn):
            # the reference does not say whether a missing slot or a wrong attribute is told first
            exits = ("MEMORY_FAULT", errno.EFAULT)
            return Expected(section, None if guest.slot_at(gfn) is None else exits)
        said = self._fault(guest, gfn)
        if said.reason == "NO_MEMSLOT":
            exits = ("MEMORY_FAULT", errno.EFAULT) if private else ("MMIO", 0)
            return Expected("restrictedmem.md §3 private_mem_kvm_exits_test", exits)
        if said.errno in (errno.EFAULT, EHWPOISON):
            return Expected(said.section, ("MEMORY_FAULT", said.errno))
        # with any other errno the exit's reason is stale
        return Expected(section, ("", said.errno) if said.errno else ("HLT", 0))

    # --- the host's mapping, pins and references ------------------------------------------------
    def _host_pages(self, file: File, span: range, section: str) -> Expected | list[Frame]:
        """§2 host fault, all or nothing: past the file or private EFAULT; zero on first use."""
        private = set(span) - file.shared_pgoffs if file.in_place else set()
        if span.stop > file.npages or private:
            return Expected(section, errno=errno.EFAULT, reason="HOST_SIGBUS")
        half = file.half(False)
        frames = [file.pages.get((pgoff, half)) for pgoff in span]
        if any(frame is not None and frame.poisoned for frame in frames):
            return Expected(section, errno=EHWPOISON, reason="HW_POISON")
        if frames.count(None) > self.free:
            return Expected(section, errno=errno.ENOMEM, reason="NO_FRAMES")
        for pgoff in span:
            if (pgoff, half) not in file.pages:
                self._take((file.file, pgoff, half))
        return [file.pages[pgoff, half] for pgoff in span]

    def host_read(self, number: int, offset: int, length: int) -> Expected:
        """Read through the host's mapping."""
        file = self.files[number]
        if not file.open:
            return Expected(HOST_FAULT, errno=errno.EBADF, reason="NO_SUCH_FILE")
        span = range(offset // PAGE, -(-(offset + length) // PAGE))
        found = self._host_pages(file, span, HOST_FAULT)
        return found if isinstance(found, Expected) else Expected(HOST_FAULT)

    def pin(self, number: int, span: range, holder: str) -> tuple[Expected, list[Frame]]:
        """Pin shared pages as DMA does, through GUP; ``pinned`` takes the handle it got."""
        file, section = self.files[number], HOST_FAULT + ", through GUP"
        if not file.open:
            return Expected(section, errno=errno.EBADF, reason="NO_SUCH_FILE"), []
        if span.stop > file.npages:
            # the call names pages of the file, and no address that could be past a mapping
            return Expected(section, errno=errno.EINVAL, reason="BAD_RANGE"), []
        found = self._host_pages(file, span, section)
        if isinstance(found, Expected):
            return found, []
        for frame in found:
            self._hold(frame, holder, True, 1)
        return Expected(section), found

    def pinned(self, handle: int, holder: str, frames: list[Frame]) -> None:
        """Note the handle of a pin."""
        self.pins[handle] = (holder, frames)

    def unpin(self, handle: int) -> Expected:
        """Let a pin go; a page that was removed meanwhile is freed now (§2 free page)."""
        if handle not in self.pins:
            return Expected(RM2 + "free page", errno=errno.ENOENT, reason="NO_SUCH_PIN")
        holder, frames = self.pins.pop(handle)
        for frame in frames:
            self._hold(frame, holder, True, -1)
        return Expected(RM2 + "free page")

    def get_pages(self, number: int, span: range, holder: str) -> tuple[Expected, list[Frame]]:
        """restrictedmem.md §1 get_page: allocates if absent; one reference that the caller owns."""
        file, section = self.files[number], "restrictedmem.md §1 get_page"
        if not file.open:
            return Expected(section, errno=errno.EBADF, reason="NO_SUCH_FILE"), []
        if span.stop > file.npages:
            return Expected(section, errno=errno.EINVAL), []
        frames = [file.pages.get((pgoff, PRIVATE)) for pgoff in span]
        if any(frame is not None and frame.poisoned for frame in frames):
            return Expected(section, errno=EHWPOISON, reason="HW_POISON"), []
        if frames.count(None) > self.free:
            return Expected(section, errno=errno.ENOMEM, reason="NO_FRAMES"), []
        for pgoff in span:
            if (pgoff, PRIVATE) not in file.pages:
                self._take((number, pgoff, PRIVATE))
        got = [file.pages[pgoff, PRIVATE] for pgoff in span]
        for frame in got:
            self._hold(frame, holder, False, 1)
        return Expected(section), got

    def put_page(self, frame: Frame, holder: str) -> Expected:
        """Drop a reference; who has none is refused (I2: no anonymous reference)."""
        if not frame.holds[holder, False]:
            return Expected("reliability.md §3 I2", errno=errno.EINVAL, reason="NOT_HELD")
        self._hold(frame, holder, False, -1)
        return Expected("reliability.md §3 I2")

    # --- migration and poison ------------------------------------------------------------------
    def migration(self, frame: Frame) -> tuple[set[str], str]:
        """Return the outcomes that a page's migration may have, and the section (I9).

        A private folio, and in place every one, moves iff its VM has the hook; the NULL hook
        comes first and touches no count (§1 Migration).
        """
        if frame.page is None:
            return {"BUSY", "FAILED", "UNMOVABLE"}, "reliability.md §3 I1"
        file = self.files[frame.page[0]]
        vm = self.vms[file.vm]
        governed = frame.page[2] == PRIVATE
        if frame.poisoned:
            return {"FAILED", "UNMOVABLE", "BUSY"}, "reliability.md §3 I9, I13"
        if vm.dead and not vm.destroyed:
            return {"MOVED", "FAILED", "UNMOVABLE", "BUSY"}, "unspecified for a dead VM"
        if governed and (vm.destroyed or not vm.traits.movable):
            return {"UNMOVABLE"}, "restrictedmem.md §1 Migration, NULL hook"
        if frame.elevated:
            return {"BUSY"}, "DESIGN.md §4 Migration, reliability.md §3 I9"
        return {"MOVED"} if self.free else {"MOVED", "FAILED"}, "DESIGN.md §4 Migration"

    def zapped(self, frame: Frame) -> None:
        """Clear a page's shared leaves, which comes before it moves or not (pkvm.md §7 a 5)."""
        for vm in self.vms.values():
            for gfn in [gfn for gfn, leaf in vm.maps.items() if leaf == (frame, True)]:
                self._unmap(vm, gfn)

    def moved(self, frame: Frame) -> Frame:
        """Give a page another frame, to which its private leaf is re-pointed."""
        assert frame.page is not None
        number, pgoff, half = frame.page
        file = self.files[number]
        frame.page = None
        self.frames.discard(frame)
        new = self._take((number, pgoff, half))
        assert new is not None
        for vm, gfn in self._views(file, range(pgoff, pgoff + 1)):
            mapped, shared = vm.maps.get(gfn, (None, True))
            if mapped is frame:
                vm.maps[gfn] = (new, shared)
        return new

    def poison(self, frame: Frame | None) -> Expected:
        """§2 error_folio: unmapped and not truncated; poison is sticky (I13). None: a free frame.

        A value is whether the VM is lost: killed if its consumer has no error op (DESIGN.md §5).
        """
        section = RM2 + "error_folio"
        if frame is None:
            self.frames.add(Frame(None, poisoned=True))
            return Expected(section, False)
        frame.poisoned = True
        if frame.page is None:
            return Expected(section)
        number, pgoff, half = frame.page
        file = self.files[number]
        vm, span = self.vms[file.vm], range(pgoff, pgoff + 1)
        bound = bool(self._views(file, span))
        self._invalidate(file, span, half)
        private = half == PRIVATE and not (file.in_place and pgoff in file.shared_pgoffs)
        if not private or not bound:
            return Expected(section, False)
        if not vm.traits.poisoned:
            return Expected(section)
        return Expected(section, vm.traits.poisoned == "killed")
