"""Conversion between private and shared, in both of Linux's ways, and what pages then hold."""

from __future__ import annotations

import errno

from .layout import Layout
from .objects import DEAD, PAGE, PRIVATE, ZERO, Expected, File, Traits
from .store import BAD_RANGE, GONE, ORDINARY, RM2, UNALIGNED

ATTRIBUTES = RM2 + "KVM_SET_MEMORY_ATTRIBUTES"
IN_PLACE = RM2 + "in-place conversion"
ATTRIBUTE_PRIVATE = 8


class Conversion(Layout):
    """The attributes of VMs, and of files in place."""

    def set_attributes(self, vm: int, gpa: int, size: int, attributes: int) -> Expected:
        """§2 KVM_SET_MEMORY_ATTRIBUTES: equal is 0 without events; no page is touched."""
        guest = self.vms[vm]
        if guest.dead:
            return DEAD
        if guest.traits.in_place:
            return Expected(IN_PLACE, errno=errno.ENOTTY, reason="WRONG_PERSONALITY")
        wrong = self._wrong_range(guest.traits, gpa, size, attributes, ATTRIBUTES)
        if wrong is not None:
            return wrong
        gfns = set(range(gpa // PAGE, (gpa + size) // PAGE))
        wanted = gfns if not attributes else set()
        if not guest.traits.private_memory or guest.shared_gfns & gfns == wanted:
            return Expected(ATTRIBUTES, 1)
        # the reference leaves open whether a leaf that agrees already is unmapped; here it stays
        for gfn in sorted(gfns & (guest.shared_gfns ^ wanted)):
            self._unmap(guest, gfn)
        guest.shared_gfns = guest.shared_gfns - gfns | wanted
        return Expected(ATTRIBUTES, 0)

    def _wrong_range(
        self, traits: Traits, start: int, size: int, attributes: int, section: str
    ) -> Expected | None:
        if attributes & ~(ATTRIBUTE_PRIVATE if traits.private_memory else 0):
            return Expected(section, errno=errno.EINVAL, reason="ATTRIBUTES_UNSUPPORTED")
        if size <= 0:
            return Expected(section, **BAD_RANGE)
        if start % PAGE or size % PAGE:
            return Expected(section, **UNALIGNED)
        return None

    def convert_file(self, number: int, offset: int, size: int, attributes: int) -> Expected:
        """§2 in-place conversion, steps 1 to 5; a consumer's own pin does not stop its VM."""
        file = self.files[number]
        if not file.open:
            return Expected(IN_PLACE, **GONE)
        if file.anonymous:
            return ORDINARY
        vm = self.vms[file.vm]
        if vm.destroyed:
            return Expected(IN_PLACE, errno=errno.ENOENT, reason="NO_SUCH_VM")
        if vm.dead:
            return DEAD
        if not file.in_place:
            return Expected(IN_PLACE, errno=errno.ENOTTY, reason="WRONG_PERSONALITY")
        wrong = self._wrong_range(vm.traits, offset, size, attributes, IN_PLACE)
        if wrong is not None:
            return wrong
        span = range(offset // PAGE, (offset + size) // PAGE)
        if span.stop > file.npages:
            return Expected(IN_PLACE, **BAD_RANGE)
        return self._convert(file, span, bool(attributes))

    def _convert(self, file: File, span: range, private: bool) -> Expected:
        wanted = set() if private else set(span)
        changed = (file.shared_pgoffs & set(span)) ^ wanted
        if not changed:
            return Expected(IN_PLACE + " 2", 0)
        vm = self.vms[file.vm]
        for pgoff in span if private else ():
            frame = file.pages.get((pgoff, PRIVATE))
            if frame is not None and frame.elevated_for(vm.label):
                section = IN_PLACE + " 4, reliability.md §3 I11"
                return Expected(
                    section, errno=errno.EAGAIN, reason="FOLIO_BUSY", offset=pgoff * PAGE
                )
        rule = vm.traits.to_private if private else vm.traits.to_shared
        for pgoff in sorted(changed):
            self._invalidate(file, range(pgoff, pgoff + 1), None)
            frame = file.pages.get((pgoff, PRIVATE))
            if frame is not None and rule == "zero":
                frame.content = ZERO
        file.shared_pgoffs = file.shared_pgoffs - set(span) | wanted
        return Expected(IN_PLACE + " 5", len(changed))
