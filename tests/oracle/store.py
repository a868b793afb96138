"""Host memory, files and the secondary MMU of the executable specification.

The lower half of ``spec``, under its rules: what is free, what a file has, what is mapped, and
fallocate. Cites the reference section by section, and shares no code with the engine.
"""

from __future__ import annotations

import errno

from .objects import PAGE, PRIVATE, Expected, File, Frame, Traits, Vm

# rules that may be excused, because the engine is known not to keep them: test_oracle.py has a
# sequence for each that must fail as long as it is excused
WHOLE_BATCHES = "an allocation that runs out of frames keeps no prefix"
NO_FILTER = "a punch, or poison, of one half unmaps the leaf of the other half too"
CHANGING_ONLY = "conversion in place checks the references of the pages that change, not of all"

KEEP_SIZE, PUNCH_HOLE = 1, 2
RM2 = "restrictedmem.md §2 "
FALLOCATE = RM2 + "fallocate"


class Store:
    """A host of ``total`` frames with what lives on it."""

    def __init__(self, total: int, excused: frozenset[str] = frozenset()) -> None:
        self.total = total
        self.excused = excused
        self.frames: set[Frame] = set()
        self.files: dict[int, File] = {}
        self.vms: dict[int, Vm] = {}
        self.pins: dict[int, tuple[str, list[Frame]]] = {}

    # --- frames: reliability.md §3 I1 to I4, I12 -----------------------------------------------
    @property
    def free(self) -> int:
        """Return the free frames: all but owned, orphaned by a holder, or poisoned."""
        return self.total - len(self.frames)

    def _take(self, page: tuple[int, int, str]) -> Frame | None:
        if not self.free:
            return None
        frame = Frame(page)
        self.frames.add(frame)
        self.files[page[0]].pages[page[1], page[2]] = frame
        return frame

    def _settle(self, frame: Frame) -> None:
        """Free a frame whose last reference is gone (§2 free page); poison is never free (I4)."""
        if frame.page is None and not frame.elevated and not frame.poisoned:
            self.frames.discard(frame)

    def _truncate(self, file: File, key: tuple[int, str]) -> None:
        frame = file.pages.pop(key)
        frame.page = None
        self._settle(frame)

    def _hold(self, frame: Frame, holder: str, longterm: bool, n: int) -> None:
        frame.holds[holder, longterm] += n
        assert frame.holds[holder, longterm] >= 0
        self._settle(frame)

    # --- the secondary MMU ---------------------------------------------------------------------
    def _unmap(self, vm: Vm, gfn: int) -> None:
        """Clear a leaf; the reference that a consumer's pin holds goes with it (pkvm.md §7 c)."""
        frame, shared = vm.maps.pop(gfn, (None, True))
        if frame is not None and vm.traits.pins and not shared:
            self._hold(frame, vm.label, False, -1)

    def _views(self, file: File, pgoffs: range) -> list[tuple[Vm, int]]:
        """Return (VM, gfn) of every page of a range that is bound (§2 punch, "bound view")."""
        return [
            (vm, slot.gfn + pgoff - slot.pgoff)
            for vm in self.vms.values()
            for slot in vm.slots.values()
            if slot.file is file
            for pgoff in pgoffs
            if slot.pgoff <= pgoff < slot.pgoff + slot.npages
        ]

    def _invalidate(self, file: File, pgoffs: range, half: str | None) -> None:
        """Unmap bound pages; ``half`` is the invalidate filter of §2 flags, None for none."""
        for vm, gfn in self._views(file, pgoffs):
            frame, shared = vm.maps.get(gfn, (None, True))
            mine = half in (None, file.half(not shared)) or NO_FILTER in self.excused
            if frame is not None and mine:
                self._unmap(vm, gfn)

    # --- objects -------------------------------------------------------------------------------
    def create_vm(self, vm: int, traits: Traits) -> None:
        """Make a VM; a confidential one starts private (DESIGN.md §4 VM)."""
        self.vms[vm] = Vm(vm, traits)

    def create_file(self, vm: int, file: int, npages: int, init_shared: bool) -> None:
        """Make a file; INIT_SHARED says what its pages start as (§2 flags)."""
        made = File(file, vm, npages, self.vms[vm].traits.in_place)
        if init_shared:
            made.shared_pgoffs = set(range(npages))
        self.files[file] = made

    def close_file(self, number: int) -> Expected:
        """§2 close last ref: invalidate whole file, free; the slot stays."""
        section = RM2 + "close last ref"
        file = self.files[number]
        if not file.open:
            return Expected(section, errno=errno.EBADF, reason="NO_SUCH_FILE")
        self._invalidate(file, range(file.npages), None)
        for key in list(file.pages):
            self._truncate(file, key)
        file.open = False
        return Expected(section)

    # --- fallocate -----------------------------------------------------------------------------
    def fallocate(self, number: int, mode: int, offset: int, length: int) -> Expected:
        """§2 fallocate: the checks in the kernel's order, then allocate or punch."""
        file = self.files[number]
        if not file.open:
            return Expected(FALLOCATE, errno=errno.EBADF, reason="NO_SUCH_FILE")
        if offset < 0 or length <= 0:
            return Expected(FALLOCATE, errno=errno.EINVAL)
        if mode & PUNCH_HOLE and not mode & KEEP_SIZE:
            return Expected(FALLOCATE, errno=errno.EOPNOTSUPP, reason="FALLOCATE_MODE")
        if offset + length > (1 << 63) - 1:
            return Expected(FALLOCATE, errno=errno.EFBIG, reason="OFFSET_TOO_BIG")
        if not mode & KEEP_SIZE or mode & ~(KEEP_SIZE | PUNCH_HOLE):
            return Expected(FALLOCATE, errno=errno.EOPNOTSUPP, reason="FALLOCATE_MODE")
        if offset % PAGE or length % PAGE:
            return Expected(FALLOCATE, errno=errno.EINVAL, reason="NOT_PAGE_ALIGNED")
        span = range(offset // PAGE, (offset + length) // PAGE)
        return self._punch(file, span) if mode & PUNCH_HOLE else self._allocate(file, span)

    def _allocate(self, file: File, span: range) -> Expected:
        """§2 allocate: past the end EINVAL, even straddling; what was done before ENOMEM stays."""
        section, taken = RM2 + "allocate", 0
        if span.stop > file.npages:
            return Expected(section, errno=errno.EINVAL, reason="BAD_RANGE")
        missing = sum((pgoff, PRIVATE) not in file.pages for pgoff in span)
        if missing > self.free and WHOLE_BATCHES in self.excused:
            return Expected(section, errno=errno.ENOMEM, reason="NO_FRAMES")
        for pgoff in span:
            if (pgoff, PRIVATE) not in file.pages:
                if self._take((file.file, pgoff, PRIVATE)) is None:
                    return Expected(section, errno=errno.ENOMEM, reason="NO_FRAMES")
                taken += 1
        return Expected(section, taken)

    def _punch(self, file: File, span: range) -> Expected:
        """§2 punch: anything aligned is 0; unmap each bound view, truncate the restricted half."""
        gone = [pgoff for pgoff in range(file.npages) if pgoff in span]
        present = [pgoff for pgoff in gone if (pgoff, PRIVATE) in file.pages]
        self._invalidate(file, range(gone[0], gone[-1] + 1) if gone else range(0), PRIVATE)
        for pgoff in present:
            self._truncate(file, (pgoff, PRIVATE))
        return Expected(RM2 + "punch", len(present))
