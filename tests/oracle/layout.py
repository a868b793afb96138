"""VMs, files and memslots of the specification: made, bound, swapped, and how they go."""

from __future__ import annotations

import errno
from dataclasses import replace

from .kinds import KINDS
from .objects import DEAD, PAGE, Expected, File, Slot, Vm
from .store import GONE, ORDINARY, RM2, Store

BIND_SLOT = RM2 + "bind"
SWAP = "DESIGN.md §5 Swap"
INIT_SHARED, MMAP = 2, 1


class Layout(Store):
    """What there is, and where guests see it."""

    # --- VMs and files -------------------------------------------------------------------------
    def create_vm(self, kind: str, session: int) -> Expected:
        """DESIGN.md §4 VM: a confidential one starts private. ``named`` takes its handle."""
        if session and session not in self.sessions:
            return Expected("DESIGN.md §3", errno=errno.ENOENT, reason="NO_SUCH_SESSION")
        self.vms[0] = Vm(0, KINDS[kind], session)
        return Expected("DESIGN.md §4 VM")

    def finalize(self, number: int) -> Expected:
        """DESIGN.md §5 finalize: it may run from then on."""
        vm = self.vms[number]
        if vm.dead:
            return DEAD
        if not vm.traits.measured:
            section, reason = "DESIGN.md §5, NULL: unmeasured", "OP_NOT_IMPLEMENTED_BY_CONSUMER"
            return Expected(section, errno=errno.EOPNOTSUPP, reason=reason)
        vm.finalized = True
        return Expected("DESIGN.md §5 finalize")

    def destroy_vm(self, number: int) -> Expected:
        """§2 VM fd closed first: gmem still usable; what the consumer held is dropped (I14)."""
        vm = self.vms[number]
        for gfn in list(vm.maps):
            self._unmap(vm, gfn)
        for slot in list(vm.slots.values()):
            self._drop_slot(vm, slot)
        vm.destroyed = True
        return Expected(RM2 + "VM fd closed first")

    def create_file(self, vm: int, npages: int, flags: int) -> Expected:
        """§2 create; INIT_SHARED says what its pages start as. ``named`` takes its handle."""
        guest = self.vms[vm]
        if guest.dead:
            return DEAD
        if flags & ~(MMAP | INIT_SHARED):
            return Expected(RM2 + "create", errno=errno.EINVAL, reason="UNKNOWN_FLAG")
        if npages <= 0:
            return Expected(RM2 + "create", errno=errno.EINVAL)
        made = File(0, vm, npages, guest.traits.in_place, guest.session)
        made.mappable = bool(flags & MMAP)
        if flags & INIT_SHARED:
            made.shared_pgoffs = set(range(npages))
        self.files[0] = made
        return Expected(RM2 + "create")

    def named(self, table: dict[int, Vm] | dict[int, File], handle: int) -> None:
        """Learn the handle of what was made last."""
        made = table.pop(0)
        table[handle] = made  # type: ignore[assignment]
        if isinstance(made, Vm):
            made.vm = handle
        else:
            made.file = handle

    def close_file(self, number: int) -> Expected:
        """§2 close last ref: invalidate whole file, free; the slot stays."""
        section = RM2 + "close last ref"
        file = self.files[number]
        if not file.open:
            return Expected(section, **GONE)
        if file.anonymous:
            return ORDINARY
        self._close(file)
        return Expected(section)

    def _close(self, file: File) -> None:
        self._invalidate(file, range(file.npages), None)
        for key in list(file.pages):
            self._truncate(file, key)
        file.open = False
        for handle in [h for h, (at, _, _) in self.handlers.items() if at == file.file]:
            del self.handlers[handle]

    def swap(self, number: int, kind: str) -> Expected:
        """DESIGN.md §5: between variants of one state schema; bytes, frames and leaves stay.

        The holds of mapped private pages become those that the new consumer wants.
        """
        vm, new = self.vms[number], KINDS[kind]
        if vm.dead:
            return DEAD
        kin = [(traits.platform, traits.private_memory) for traits in (vm.traits, new)]
        if kin[0] != kin[1]:
            return Expected(SWAP, errno=errno.EINVAL, reason="SWAP_FOREIGN")
        change = int(new.pins) - int(vm.traits.pins)
        for frame, shared in vm.maps.values() if change else ():
            if not shared:
                self._hold(frame, vm.label, False, change)
        # how it converts was chosen when it was made
        vm.traits = replace(new, in_place=vm.traits.in_place)
        return Expected(SWAP)

    # --- memslots ------------------------------------------------------------------------------
    def add_slot(
        self, vm: int, number: int, gpa: int, size: int, file: int | None, offset: int
    ) -> Expected:
        """§2 bind, the checks in that order; ``file`` None is an ordinary slot.

        The caller names the memory behind an ordinary slot afterwards, by ``name_anonymous``.
        """
        guest = self.vms[vm]
        if guest.dead:
            return DEAD
        if gpa % PAGE or size % PAGE or (offset % PAGE and file is not None):
            return Expected(BIND_SLOT, errno=errno.EINVAL)
        gfn, npages, pgoff = gpa // PAGE, size // PAGE, offset // PAGE
        old = guest.slots.get(number)
        if old is not None and (old.restricted or file is not None or old.npages != npages):
            return Expected(BIND_SLOT + ", slot exists", errno=errno.EINVAL)
        others = {at for at in range(gfn, gfn + npages) if guest.slot_at(at) not in (None, old)}
        if others:
            return Expected(BIND_SLOT + ", GPA overlap", errno=errno.EEXIST, reason="SLOT_OVERLAP")
        if old is not None:
            return self._move_slot(guest, old, gfn)
        if file is None:
            in_place = guest.traits.in_place
            backing = File(0, vm, npages, in_place, guest.session, anonymous=True)
            backing.shared_pgoffs = set(range(npages))
            guest.slots[number] = Slot(number, gfn, npages, backing, 0, False)
            return Expected(BIND_SLOT)
        found = self.files.get(file)
        if found is None or not found.open:
            return Expected(BIND_SLOT + ", bad fd", **GONE)
        if found.vm != vm or found.anonymous or pgoff + npages > found.npages:
            return Expected(BIND_SLOT + ", other VM or past EOF", errno=errno.EINVAL)
        if self._views(found, range(pgoff, pgoff + npages)):
            section = BIND_SLOT + ", range already bound (6.18)"
            return Expected(section, errno=errno.EINVAL, reason="BINDING_OVERLAP")
        guest.slots[number] = Slot(number, gfn, npages, found, pgoff, True)
        return Expected(BIND_SLOT)

    def _move_slot(self, vm: Vm, slot: Slot, gfn: int) -> Expected:
        """An ordinary slot set again: the same is a no-op, elsewhere it is zapped and moves."""
        if gfn != slot.gfn:
            for old in [old for old in vm.maps if slot.has(old)]:
                self._unmap(vm, old)
            slot.gfn = gfn
        return Expected("restrictedmem.md §3 set_memory_region_test, move")

    def name_anonymous(self, vm: int, number: int, file: int) -> None:
        """Learn the handle of the memory behind an ordinary slot."""
        backing = self.vms[vm].slots[number].file
        backing.file = file
        self.files[file] = backing

    def delete_slot(self, vm: int, number: int) -> Expected:
        """§2 bound slot: the memslot code zaps, then the range is unbound; an empty one EINVAL."""
        guest = self.vms[vm]
        if guest.dead:
            return DEAD
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
            self._close(slot.file)
