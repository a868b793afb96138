"""Faults and accesses of the specification: the guest's, the host's, and initial pages."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

from .conversion import Conversion
from .objects import ANY, DEAD, PAGE, Expected, File, Frame, Vm
from .store import BAD_RANGE, GONE, NO_FRAMES, RM2, UNALIGNED

EHWPOISON = 133
GET_PFN = RM2 + "get_pfn"
HOST_FAULT = RM2 + "host fault"
EXITS = RM2 + "KVM_EXIT_MEMORY_FAULT"
PRE_FAULT = "restrictedmem.md §3 pre_fault_memory_test"
POPULATE = RM2 + "populate"
HYPERCALL = "restrictedmem.md §3 private_mem_conversions_test, KVM_HC_MAP_GPA_RANGE"
HANDLED = "restrictedmem.md §4 userfaultfd: the fault waits, and a signal ends the wait"
TOO_EARLY = Expected("tdx.md §4", errno=errno.EOPNOTSUPP, reason="PRE_FAULT_TOO_EARLY")
UNFINISHED = Expected("tdx.md §4", errno=errno.EINVAL, reason="NOT_FINALIZED")
POISONED: dict[str, Any] = {"errno": EHWPOISON, "reason": "HW_POISON"}
INTERRUPTED: dict[str, Any] = {"errno": errno.EINTR, "reason": "INTERRUPTED"}
# most bytes that a guest's small read or write takes
ACCESS_MAX = 1 << 16


def pieces(start: int, length: int) -> Iterable[tuple[int, int, int]]:
    """Return (page, from, to) of the pages that a byte range lies in."""
    at, end = start, start + length
    while at < end:
        until = min((at // PAGE + 1) * PAGE, end)
        yield at // PAGE, at % PAGE, until - at // PAGE * PAGE
        at = until


class Access(Conversion):
    """Whoever touches a page."""

    # --- faults --------------------------------------------------------------------------------
    def _is_handled(self, file: File, pgoff: int, half: str) -> bool:
        """Return whether a fault on a page waits for a page fault handler."""
        ranges = [span for at, span, _ in self.handlers.values() if at == file.file]
        return (pgoff, half) not in file.pages and any(pgoff in span for span in ranges)

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
        if self._is_handled(slot.file, pgoff, half):
            return Expected(HANDLED, **INTERRUPTED)
        frame = slot.file.pages.get((pgoff, half)) or self._take(slot.file, pgoff, half)
        if frame is None:
            return Expected(GET_PFN, **NO_FRAMES)
        if frame.poisoned:
            return Expected(GET_PFN, **POISONED)
        self._map(vm, gfn, frame, not private)
        return Expected(GET_PFN)

    def pre_fault(self, vm: int, gpa: int, size: int) -> Expected:
        """§3 pre_fault_memory: the size shrinks exactly when the call succeeds, page by page."""
        guest = self.vms[vm]
        if guest.dead:
            return DEAD
        if gpa % PAGE or size % PAGE or size <= 0:
            return Expected(PRE_FAULT, errno=errno.EINVAL)
        if guest.building:
            return TOO_EARLY
        gfns = range(gpa // PAGE, (gpa + size) // PAGE)
        for done, gfn in enumerate(gfns):
            said = self._fault(guest, gfn)
            if said.errno:
                return Expected(said.section, done) if done else said
        return Expected(PRE_FAULT, len(gfns))

    # --- the guest -----------------------------------------------------------------------------
    def touch(self, vm: int, gpa: int, npages: int, private: bool) -> Expected:
        """A guest's read, as the exit's name, errno and address (§2 KVM_EXIT_MEMORY_FAULT)."""
        guest = self.vms[vm]
        if guest.dead:
            return DEAD
        if guest.building:
            return UNFINISHED
        for gfn in range(gpa // PAGE, gpa // PAGE + npages):
            said = self._touch(guest, gfn, private)
            if said is not None:
                return said
        return Expected(EXITS, ("HLT", 0, None))

    def _touch(self, vm: Vm, gfn: int, private: bool) -> Expected | None:
        """Return the exit that one page causes, None if it is there."""
        at = gfn * PAGE
        if private != vm.is_private(gfn):
            # the reference does not say whether a missing slot or a wrong attribute is told first
            told = ("MEMORY_FAULT", errno.EFAULT, at)
            return Expected(EXITS, None if vm.slot_at(gfn) is None else told)
        said = self._fault(vm, gfn)
        if not said.errno:
            return None
        if said.reason == "NO_MEMSLOT":
            exits = ("MEMORY_FAULT", errno.EFAULT, at) if private else ("MMIO", 0, at)
            return Expected("restrictedmem.md §3 private_mem_kvm_exits_test", exits)
        if said.errno in (errno.EFAULT, EHWPOISON):
            return Expected(said.section, ("MEMORY_FAULT", said.errno, at))
        if said.errno == errno.EINTR:
            return Expected(said.section, ("INTR", errno.EINTR, None))
        # with any other errno the exit's reason is stale
        return Expected(EXITS, ("", said.errno, None))

    def _reach(self, vm: Vm, gfn: int, private: bool) -> Frame | Expected:
        """Return the page that a guest's access finds, or what it is refused with."""
        if private != vm.is_private(gfn):
            code = ANY if vm.slot_at(gfn) is None else errno.EFAULT
            return Expected(EXITS, errno=code)
        said = self._fault(vm, gfn)
        if said.reason == "NO_MEMSLOT" and private:
            return Expected(said.section, errno=errno.EFAULT)
        return said if said.errno else vm.maps[gfn][0]

    def _access(self, vm: int, gpa: int, length: int) -> Expected | None:
        guest = self.vms[vm]
        if length > ACCESS_MAX or length <= 0:
            reason = "BAD_RANGE" if length <= 0 else "MESSAGE_TOO_BIG"
            return Expected("a guest's access", errno=ANY, reason=reason)
        if guest.dead:
            return DEAD
        return UNFINISHED if guest.building else None

    def read_guest(self, vm: int, gpa: int, length: int, private: bool) -> Expected:
        """Read as the guest does: what was written last, wherever it has been since (I8)."""
        refused = self._access(vm, gpa, length)
        if refused is not None:
            return refused
        parts: list[tuple[Frame, int, int]] = []
        for gfn, lo, hi in pieces(gpa, length):
            found = self._reach(self.vms[vm], gfn, private)
            if isinstance(found, Expected):
                return found
            parts.append((found, lo, hi))
        return reading("reliability.md §3 I8: what the guest wrote", parts)

    def write_guest(self, vm: int, gpa: int, data: bytes, private: bool) -> Expected:
        """Write as the guest does, up to the page that is refused."""
        refused = self._access(vm, gpa, len(data))
        if refused is not None:
            return refused
        at = 0
        for done, (gfn, lo, hi) in enumerate(pieces(gpa, len(data))):
            found = self._reach(self.vms[vm], gfn, private)
            if isinstance(found, Expected):
                code, reason = found.errno, found.reason
                return Expected(found.section, errno=code, reason=reason, progress=done)
            found.write(lo, data[at : at + hi - lo])
            at += hi - lo
        return Expected("DESIGN.md §4 vCPU")

    def map_gpa(self, vm: int, gpa: int, npages: int, to_private: bool) -> Expected:
        """The guest asks for a conversion: the VMM is told, and nothing has changed yet."""
        guest = self.vms[vm]
        if guest.dead:
            return DEAD
        if guest.building:
            return UNFINISHED
        if any(guest.slot_at(gfn) is None for gfn in range(gpa // PAGE, gpa // PAGE + npages)):
            # the reference does not say whether KVM looks for a slot
            return Expected(HYPERCALL)
        if not guest.traits.calls:
            return Expected("DESIGN.md §5, NULL: unknown call", ("HLT", 0, 0, 0))
        return Expected(HYPERCALL, ("HYPERCALL", gpa, npages * PAGE, 8 if to_private else 0))

    def answer(self, vm: int, code: int) -> Expected:
        """The VMM's answer to the call; the guest goes on, to the end of its programme."""
        return DEAD if self.vms[vm].dead else Expected(HYPERCALL, "HLT")

    # --- initial pages -------------------------------------------------------------------------
    def populate(self, vm: int, gpa: int, data: bytes) -> Expected:
        """§2 populate: private pages of a gmem slot only, before the VM is finalized."""
        guest = self.vms[vm]
        if guest.dead:
            return DEAD
        if gpa % PAGE or len(data) % PAGE:
            return Expected(POPULATE, **UNALIGNED)
        if not data:
            return Expected(POPULATE, **BAD_RANGE)
        if not guest.traits.measured:
            section, reason = "DESIGN.md §5, NULL", "OP_NOT_IMPLEMENTED_BY_CONSUMER"
            return Expected(section, errno=errno.EOPNOTSUPP, reason=reason)
        if guest.finalized:
            return Expected(POPULATE, errno=errno.EINVAL, reason="NOT_PAUSED")
        gfns = range(gpa // PAGE, (gpa + len(data)) // PAGE)
        for gfn in gfns:
            slot = guest.slot_at(gfn)
            if slot is None or not slot.restricted or not guest.is_private(gfn):
                # KVM stops at the page; here nothing of the range is taken
                return Expected(POPULATE, errno=errno.EINVAL, reason="NOT_PRIVATE")
        for done, gfn in enumerate(gfns):
            said = self._fault(guest, gfn)
            if said.errno:
                code, reason = said.errno, said.reason
                return Expected(POPULATE, errno=code, reason=reason, progress=done)
            guest.maps[gfn][0].content = data[done * PAGE : (done + 1) * PAGE]
        return Expected(POPULATE, len(gfns))

    # --- the host's mapping --------------------------------------------------------------------
    def _host_pages(self, file: File, span: range, section: str) -> Expected | list[Frame]:
        """§2 host fault, all or nothing: past the file or private EFAULT; zero on first use."""
        if file.in_place and not file.mappable and not file.anonymous:
            return Expected(RM2 + "mmap", errno=errno.ENODEV, reason="NOT_MAPPABLE")
        private = set(span) - file.shared_pgoffs if file.in_place else set()
        if span.stop > file.npages or private:
            return Expected(section, errno=errno.EFAULT, reason="HOST_SIGBUS")
        half = file.half(False)
        if any((pgoff, half) in file.pages and file.pages[pgoff, half].poisoned for pgoff in span):
            return Expected(section, **POISONED)
        if any(self._is_handled(file, pgoff, half) for pgoff in span):
            return Expected(HANDLED, **INTERRUPTED)
        if self._lacking(file, span, half) is not None:
            return Expected(section, **NO_FRAMES)
        for pgoff in span:
            if (pgoff, half) not in file.pages:
                self._take(file, pgoff, half)
        return [file.pages[pgoff, half] for pgoff in span]

    def _host(self, number: int, offset: int, length: int) -> Expected | list[Frame]:
        file = self.files[number]
        if not file.open:
            return Expected(HOST_FAULT, **GONE)
        if offset < 0 or length <= 0:
            return Expected(HOST_FAULT, **BAD_RANGE)
        span = range(offset // PAGE, -(-(offset + length) // PAGE))
        return self._host_pages(file, span, HOST_FAULT)

    def host_read(self, number: int, offset: int, length: int) -> Expected:
        """Read through the host's mapping."""
        found = self._host(number, offset, length)
        if isinstance(found, Expected):
            return found
        ends = [(lo, hi) for _, lo, hi in pieces(offset, length)]
        parts = [(frame, lo, hi) for frame, (lo, hi) in zip(found, ends, strict=True)]
        return reading(HOST_FAULT + ", what was written", parts)

    def host_write(self, number: int, offset: int, data: bytes) -> Expected:
        """Write through the host's mapping."""
        found = self._host(number, offset, len(data))
        if isinstance(found, Expected):
            return found
        at = 0
        for frame, (_, lo, hi) in zip(found, pieces(offset, len(data)), strict=True):
            frame.write(lo, data[at : at + hi - lo])
            at += hi - lo
        return Expected(HOST_FAULT)


def reading(section: str, parts: list[tuple[Frame, int, int]]) -> Expected:
    """Expect the bytes of pages, as far as they are known."""
    known = [None if f.content is None else f.content[lo:hi] for f, lo, hi in parts]
    value = None if None in known else b"".join(part for part in known if part is not None)
    return Expected(section, value, reading=tuple(parts))
