"""The store's half of the specification: frames and their holders, what is mapped, and fallocate.

Cites the reference section by section, and shares no code with the engine.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import Any

from .objects import PAGE, PRIVATE, ZERO, Expected, File, Frame, Vm

KEEP_SIZE, PUNCH_HOLE = 1, 2
DEFAULT, BIND, INTERLEAVE = 0, 2, 3
RM2 = "restrictedmem.md §2 "
FALLOCATE = RM2 + "fallocate"
MBIND = RM2 + "mbind"
NO_FRAMES: dict[str, Any] = {"errno": errno.ENOMEM, "reason": "NO_FRAMES"}
GONE: dict[str, Any] = {"errno": errno.EBADF, "reason": "NO_SUCH_FILE"}
UNALIGNED: dict[str, Any] = {"errno": errno.EINVAL, "reason": "NOT_PAGE_ALIGNED"}
BAD_RANGE: dict[str, Any] = {"errno": errno.EINVAL, "reason": "BAD_RANGE"}
# the memory behind an ordinary slot: nothing that is about guest_memfd is about it
ORDINARY = Expected("DESIGN.md §4, restricted file", errno=errno.EINVAL, reason="BAD_REQUEST")


class Store:
    """A host with what lives on it.

    Args:
        nodes: the frame numbers of each NUMA node.
        free: how many of each are free at the start.
    """

    def __init__(self, nodes: Sequence[range], free: Sequence[int]) -> None:
        self.nodes = tuple(nodes)
        self.room = list(free)
        self.frames: dict[Frame, None] = {}
        self.by_pfn: dict[int, Frame] = {}
        self.files: dict[int, File] = {}
        self.vms: dict[int, Vm] = {}
        # long-term pins by handle: (holder, frames, session)
        self.pins: dict[int, tuple[str, list[Frame], int]] = {}
        self.sessions: set[int] = set()
        # page fault handlers by handle: (file, pages, session)
        self.handlers: dict[int, tuple[int, range, int]] = {}

    # --- frames: reliability.md §3 I1 to I4, I12 -----------------------------------------------
    @property
    def everywhere(self) -> tuple[int, ...]:
        """Return every node, nearest first."""
        return tuple(range(len(self.nodes)))

    def free(self, nodes: Iterable[int] | None = None) -> int:
        """Return the free frames: all but owned, orphaned by a holder, poisoned or offline."""
        return sum(self.room[node] for node in (self.everywhere if nodes is None else nodes))

    def nodes_of(self, file: File, pgoff: int) -> tuple[int, ...]:
        """Return the nodes that a page's policy allows, in the order they are tried (§2 mbind)."""
        mode, nodes = file.policies.get(pgoff, (DEFAULT, ()))
        if mode == DEFAULT:
            return self.everywhere
        if mode == BIND:
            return nodes
        first = nodes[pgoff % len(nodes)]
        return (first, *(node for node in self.everywhere if node != first))

    def _add(self, frame: Frame) -> Frame:
        self.frames[frame] = None
        self.room[frame.node] -= 1
        if frame.pfn is not None:
            self.by_pfn[frame.pfn] = frame
        return frame

    def _forget(self, frame: Frame) -> None:
        del self.frames[frame]
        self.room[frame.node] += 1
        if frame.pfn is not None:
            del self.by_pfn[frame.pfn]

    def number(self, frame: Frame, pfn: int) -> None:
        """Learn which number a frame has."""
        frame.pfn = pfn
        self.by_pfn[pfn] = frame

    def node_of(self, pfn: int) -> int:
        """Return the node that a number lies in."""
        return next(i for i, numbers in enumerate(self.nodes) if pfn in numbers)

    def _take(self, file: File, pgoff: int, half: str, content: bytes = ZERO) -> Frame | None:
        node = next((n for n in self.nodes_of(file, pgoff) if self.room[n]), None)
        if node is None:
            return None
        frame = self._add(Frame((file.file, pgoff, half), node, content=content))
        file.pages[pgoff, half] = frame
        return frame

    def _lacking(self, file: File, pgoffs: Iterable[int], half: str) -> int | None:
        """Return the first of pages that would get no frame, None if all would."""
        room = list(self.room)
        for pgoff in pgoffs:
            if (pgoff, half) in file.pages:
                continue
            node = next((n for n in self.nodes_of(file, pgoff) if room[n]), None)
            if node is None:
                return pgoff
            room[node] -= 1
        return None

    def is_tight(self, number: int, span: range) -> bool:
        """Return whether which page is served first decides what there is for the others.

        It is nobody's promise, where policies differ and a node is nearly full.
        """
        file = self.files[number]
        policies = {file.policies.get(pgoff) for pgoff in span}
        return len(policies) > 1 and min(self.room) < 2 * len(span)

    def _settle(self, frame: Frame) -> None:
        """Free a frame whose last reference is gone (§2 free page); poison is never free (I4)."""
        if frame.page is None and not frame.elevated and not frame.poisoned and not frame.offline:
            self._forget(frame)

    def _truncate(self, file: File, key: tuple[int, str]) -> None:
        frame = file.pages.pop(key)
        frame.page = None
        self._settle(frame)

    def _hold(self, frame: Frame, holder: str, longterm: bool, n: int) -> None:
        frame.holds[holder, longterm] += n
        assert frame.holds[holder, longterm] >= 0
        self._settle(frame)

    # --- the secondary MMU ---------------------------------------------------------------------
    def _map(self, vm: Vm, gfn: int, frame: Frame, shared: bool) -> None:
        vm.maps[gfn] = (frame, shared)
        if vm.traits.pins and not shared:
            self._hold(frame, vm.label, False, 1)

    def _unmap(self, vm: Vm, gfn: int) -> None:
        """Clear a leaf; the reference that a consumer's pin holds goes with it (pkvm.md §7 c)."""
        frame, shared = vm.maps.pop(gfn, (None, True))
        if frame is None or shared:
            return
        if vm.traits.unmapped == "zero":
            frame.content = ZERO
        if vm.traits.pins:
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
            if frame is not None and half in (None, file.half(not shared)):
                self._unmap(vm, gfn)

    # --- fallocate -----------------------------------------------------------------------------
    def fallocate(self, number: int, mode: int, offset: int, length: int) -> Expected:
        """§2 fallocate: the checks in the kernel's order, then allocate or punch."""
        file = self.files[number]
        if not file.open:
            return Expected(FALLOCATE, **GONE)
        if file.anonymous:
            return ORDINARY
        if offset < 0 or length <= 0:
            return Expected(FALLOCATE, errno=errno.EINVAL)
        if mode & PUNCH_HOLE and not mode & KEEP_SIZE:
            return Expected(FALLOCATE, errno=errno.EOPNOTSUPP, reason="FALLOCATE_MODE")
        if offset + length > (1 << 63) - 1:
            return Expected(FALLOCATE, errno=errno.EFBIG, reason="OFFSET_TOO_BIG")
        if not mode & KEEP_SIZE or mode & ~(KEEP_SIZE | PUNCH_HOLE):
            return Expected(FALLOCATE, errno=errno.EOPNOTSUPP, reason="FALLOCATE_MODE")
        if offset % PAGE or length % PAGE:
            return Expected(FALLOCATE, **UNALIGNED)
        span = range(offset // PAGE, (offset + length) // PAGE)
        return self._punch(file, span) if mode & PUNCH_HOLE else self._allocate(file, span)

    def _allocate(self, file: File, span: range) -> Expected:
        """§2 allocate: past the end EINVAL, even straddling; what was done before ENOMEM stays."""
        section, taken = RM2 + "allocate", 0
        if span.stop > file.npages:
            return Expected(section, **BAD_RANGE)
        for pgoff in span:
            if (pgoff, PRIVATE) not in file.pages:
                if self._take(file, pgoff, PRIVATE) is None:
                    return Expected(section, progress=pgoff - span.start, **NO_FRAMES)
                taken += 1
        return Expected(section, taken)

    def _punch(self, file: File, span: range) -> Expected:
        """§2 punch: anything aligned is 0; unmap each bound view, truncate the restricted half."""
        gone = range(min(span.start, file.npages), min(span.stop, file.npages))
        present = [pgoff for pgoff in gone if (pgoff, PRIVATE) in file.pages]
        self._invalidate(file, gone, PRIVATE)
        for pgoff in present:
            self._truncate(file, (pgoff, PRIVATE))
        return Expected(RM2 + "punch", len(present))

    def set_policy(
        self, number: int, offset: int, length: int, mode: int, nodes: tuple[int, ...]
    ) -> Expected:
        """§2 mbind: stored on the inode by offset; later allocations only, and nothing moves."""
        file = self.files[number]
        if not file.open:
            return Expected(MBIND, **GONE)
        if offset % PAGE or length % PAGE:
            return Expected(MBIND, **UNALIGNED)
        span = range(offset // PAGE, (offset + length) // PAGE)
        if offset < 0 or length <= 0 or span.stop > file.npages:
            return Expected(MBIND, **BAD_RANGE)
        known = mode in (DEFAULT, BIND, INTERLEAVE) and bool(nodes) == (mode != DEFAULT)
        if not known or not set(nodes) <= set(self.everywhere):
            return Expected(MBIND, errno=errno.EINVAL)
        for pgoff in span:
            file.policies.pop(pgoff, None)
            if mode != DEFAULT:
                file.policies[pgoff] = (mode, tuple(sorted(set(nodes))))
        return Expected(MBIND)
