"""Who holds pages: pins, references, sessions with all that is theirs, page fault handlers."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from .access import HOST_FAULT, POISONED, Access
from .objects import ANY, PAGE, PRIVATE, ZERO, Expected, File
from .store import BAD_RANGE, GONE, NO_FRAMES, ORDINARY, RM2, UNALIGNED

DEVICE = "device/1"
FREE_PAGE = RM2 + "free page"
GET_PAGE = "restrictedmem.md §1 get_page"
I2, I14 = "reliability.md §3 I2", "reliability.md §3 I14"
UFFD = "restrictedmem.md §4 userfaultfd; ioctl_userfaultfd(2)"
NO_SESSION: dict[str, Any] = {"errno": errno.ENOENT, "reason": "NO_SUCH_SESSION"}
UNHANDLED: dict[str, Any] = {"errno": errno.ENOENT, "reason": "NO_SUCH_USERFAULT"}


class Holders(Access):
    """Clients, and what goes with them."""

    def _is_gone(self, session: int) -> bool:
        return bool(session) and session not in self.sessions

    def _span(self, number: int, offset: int, length: int, section: str) -> Expected | range:
        """Return the pages of an aligned range inside a file."""
        file = self.files[number]
        if not file.open:
            return Expected(section, **GONE)
        if offset % PAGE or length % PAGE:
            return Expected(section, **UNALIGNED)
        span = range(offset // PAGE, (offset + length) // PAGE)
        if offset < 0 or length <= 0 or span.stop > file.npages:
            return Expected(section, **BAD_RANGE)
        return span

    # --- pins and references -------------------------------------------------------------------
    def pin(self, number: int, offset: int, length: int, session: int) -> Expected:
        """Pin shared pages as DMA does, through GUP. ``pinned`` takes the handle."""
        span = self._span(number, offset, length, HOST_FAULT + ", through GUP")
        if isinstance(span, Expected):
            return span
        if self._is_gone(session):
            return Expected(I14, **NO_SESSION)
        found = self._host_pages(self.files[number], span, HOST_FAULT + ", through GUP")
        if isinstance(found, Expected):
            return found
        holder = f"session {session}" if session else DEVICE
        for frame in found:
            self._hold(frame, holder, True, 1)
        self.pins[0] = (holder, found, session)
        return Expected(HOST_FAULT + ", through GUP")

    def unpin(self, handle: int) -> Expected:
        """Let a pin go; a page that was removed meanwhile is freed now (§2 free page)."""
        if handle not in self.pins:
            return Expected(FREE_PAGE, errno=errno.ENOENT, reason="NO_SUCH_PIN")
        holder, frames, _ = self.pins.pop(handle)
        for frame in frames:
            self._hold(frame, holder, True, -1)
        return Expected(FREE_PAGE)

    def get_pages(self, number: int, offset: int, length: int, session: int) -> Expected:
        """restrictedmem.md §1 get_page: allocates if absent; one reference that the caller owns."""
        if self.files[number].open and self.files[number].anonymous:
            return ORDINARY
        span = self._span(number, offset, length, GET_PAGE)
        if isinstance(span, Expected):
            return span
        if self._is_gone(session):
            return Expected(I14, **NO_SESSION)
        file = self.files[number]
        there = [file.pages[pgoff, PRIVATE] for pgoff in span if (pgoff, PRIVATE) in file.pages]
        poisoned = any(frame.poisoned for frame in there)
        lacking = self._lacking(file, span, PRIVATE) is not None
        if poisoned and lacking:
            # the reference does not say which page is looked at first
            return Expected(GET_PAGE, errno=ANY)
        if poisoned or lacking:
            return Expected(GET_PAGE, **(POISONED if poisoned else NO_FRAMES))
        for pgoff in span:
            if (pgoff, PRIVATE) not in file.pages:
                self._take(file, pgoff, PRIVATE)
            self._hold(file.pages[pgoff, PRIVATE], f"session {session}", False, 1)
        return Expected(GET_PAGE)

    def put_pages(self, pfns: tuple[int, ...], session: int) -> Expected:
        """Drop references; who has none is refused (I2: no anonymous reference)."""
        if self._is_gone(session):
            return Expected(I14, **NO_SESSION)
        holder = (f"session {session}", False)
        frames = [self.by_pfn.get(pfn) for pfn in pfns]
        held = [frame for frame in frames if frame is not None and frame.holds[holder]]
        if len(held) != len(pfns) or len(set(pfns)) != len(pfns):
            return Expected(I2, errno=errno.EINVAL, reason="NOT_HELD")
        for frame in held:
            self._hold(frame, *holder, -1)
        return Expected(I2, len(pfns))

    # --- sessions ------------------------------------------------------------------------------
    def open_session(self) -> Expected:
        """DESIGN.md §3: a client that can end. The caller adds its handle."""
        return Expected("DESIGN.md §3")

    def close_session(self, number: int) -> Expected:
        """reliability.md §3 I14: what it held goes with it, and nothing of anybody else's."""
        if number not in self.sessions:
            return Expected(I14, **NO_SESSION)
        self.sessions.remove(number)
        for handle in [h for h, (_, _, session) in self.pins.items() if session == number]:
            self.unpin(handle)
        label = (f"session {number}", False)
        for frame in [frame for frame in self.frames if frame.holds[label]]:
            self._hold(frame, *label, -frame.holds[label])
        for handle in [h for h, (_, _, session) in self.handlers.items() if session == number]:
            del self.handlers[handle]
        for vm in [vm for vm in self.vms.values() if vm.session == number and not vm.destroyed]:
            self.destroy_vm(vm.vm)
        for file in [file for file in self.files.values() if file.session == number and file.open]:
            self._close(file)
        return Expected(I14)

    # --- page fault handlers -------------------------------------------------------------------
    def register(self, number: int, page: int, npages: int, session: int) -> Expected:
        """UFFDIO_REGISTER: a range that has a handler is EBUSY. The caller adds its handle."""
        if self._is_gone(session):
            return Expected(UFFD, **NO_SESSION)
        wrong = self._wrong_pages(number, page, npages)
        if wrong is not None:
            return wrong
        span = range(page, page + npages)
        for at, other, _ in self.handlers.values():
            if at == number and other.start < span.stop and span.start < other.stop:
                return Expected(UFFD, errno=errno.EBUSY, reason="USERFAULT_TAKEN")
        self.handlers[0] = (number, span, session)
        return Expected(UFFD)

    def unregister(self, handle: int, session: int) -> Expected:
        """UFFDIO_UNREGISTER; a session knows its own ranges, an admin (0) all."""
        if handle not in self.handlers or session not in (0, self.handlers[handle][2]):
            return Expected(UFFD, **UNHANDLED)
        del self.handlers[handle]
        return Expected(UFFD)

    def _wrong_pages(self, number: int, page: int, npages: int) -> Expected | None:
        file = self.files[number]
        if not file.open:
            return Expected(UFFD, **GONE)
        if page < 0 or npages <= 0 or page + npages > file.npages:
            return Expected(UFFD, **BAD_RANGE)
        return None

    def _served(self, number: int, page: int, session: int) -> bool:
        return any(
            at == number and page in span and session in (0, who)
            for at, span, who in self.handlers.values()
        )

    def _is_the_guests(self, file: File, page: int) -> bool:
        """Return whether a page is private, by its file or by the VM that it is bound to."""
        if file.in_place:
            return page not in file.shared_pgoffs
        return any(vm.is_private(gfn) for vm, gfn in self._views(file, range(page, page + 1)))

    def uf_copy(self, number: int, page: int, data: bytes, session: int) -> Expected:
        """UFFDIO_COPY: fills shared holes, page by page up to the one that is refused."""
        rows = (data[at : at + PAGE] for at in range(0, len(data), PAGE))
        return self._fill(number, page, len(data) // PAGE, session, rows)

    def uf_zeropage(self, number: int, page: int, npages: int, session: int) -> Expected:
        """UFFDIO_ZEROPAGE: the same with zeros."""
        return self._fill(number, page, npages, session, iter([ZERO] * npages))

    def _fill(
        self, number: int, page: int, npages: int, session: int, rows: Iterator[bytes]
    ) -> Expected:
        wrong = self._wrong_pages(number, page, npages)
        if wrong is not None:
            return wrong
        file = self.files[number]
        half = file.half(False)
        for done, (at, row) in enumerate(zip(range(page, page + npages), rows, strict=True)):
            if not self._served(number, at, session):
                return Expected(UFFD, progress=done, **UNHANDLED)
            if self._is_the_guests(file, at):
                section, reason = "DESIGN.md §4: the host knows no private byte", "PRIVATE_CONTENT"
                return Expected(section, errno=errno.EINVAL, reason=reason, progress=done)
            if (at, half) in file.pages:
                return Expected(UFFD, errno=errno.EEXIST, reason="PAGE_PRESENT", progress=done)
            if self._take(file, at, half, content=row) is None:
                return Expected(UFFD, progress=done, **NO_FRAMES)
        return Expected(UFFD, npages)

    def uf_continue(
        self, number: int, page: int, npages: int, private: bool, session: int
    ) -> Expected:
        """UFFDIO_CONTINUE: faults go on, on the pages that they would have got."""
        wrong = self._wrong_pages(number, page, npages)
        if wrong is not None:
            return wrong
        file = self.files[number]
        # ordinary memory has no private half
        half = file.half(private and not file.anonymous)
        for done, at in enumerate(range(page, page + npages)):
            if not self._served(number, at, session):
                return Expected(UFFD, progress=done, **UNHANDLED)
            if (at, half) not in file.pages and self._take(file, at, half) is None:
                return Expected(UFFD, progress=done, **NO_FRAMES)
        return Expected(UFFD, npages)
