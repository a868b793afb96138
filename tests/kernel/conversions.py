"""Runners for x86/guest_memfd_conversions_test.c (in place), and the flags of restrictedmem."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EFAULT, EINVAL

from helpers import Guest, file_of, make_guest, refusal
from kernel.catalogue import Bench, runs

from rmemd.engine.memory import KEEP_SIZE, PUNCH_HOLE
from rmemd.engine.queries import account
from rmemd.errors import HOST_SIGBUS, UNKNOWN_FLAG
from rmemd.model.files import FLAG_INIT_SHARED, FLAG_MMAP
from rmemd.model.vms import ATTRIBUTE_PRIVATE
from rmemd.units import PAGE_SIZE

FILE = "x86/guest_memfd_conversions_test.c"
PUNCH = PUNCH_HOLE | KEEP_SIZE


class Converting:
    """A software-protected guest whose file is converted in place, page by page."""

    def __init__(self, bench: Bench, npages: int, shared: bool) -> None:
        flags = FLAG_MMAP | (FLAG_INIT_SHARED if shared else 0)
        self.guest: Guest = make_guest(bench.engine, "sw-protected", npages, flags=flags)
        self.npages = npages

    def convert(self, private: bool, pgoff: int = 0, npages: int | None = None) -> None:
        """Convert pages; left out, all of them."""
        self.guest.engine.convert_file(
            self.guest.file, pgoff * PAGE_SIZE, (npages or self.npages) * PAGE_SIZE,
            ATTRIBUTE_PRIVATE if private else 0,
        )  # fmt: skip

    def punch(self, pgoff: int = 0) -> None:
        """Punch a page that is there."""
        at = pgoff * PAGE_SIZE
        assert self.guest.engine.fallocate(self.guest.file, PUNCH, at, PAGE_SIZE) == 1

    def host_sigbus(self, pgoff: int = 0) -> None:
        """Require that the host can neither write nor read a page."""
        at = pgoff * PAGE_SIZE
        refusal(self.guest.host_write, at, b"\xee", reason=HOST_SIGBUS, errno=EFAULT)
        refusal(self.guest.host_read, at, 1, reason=HOST_SIGBUS, errno=EFAULT)

    def exchange(self, was: int, pgoff: int = 0) -> int:
        """Require that both sides see a byte, and each then the other's; return the last one."""
        at = pgoff * PAGE_SIZE
        assert self.guest.host_sees(at, 1, was)
        assert self.guest.sees(at, 1, was, private=False)
        self.guest.host_write(at, bytes([was + 1]))
        assert self.guest.sees(at, 1, was + 1, private=False)
        self.guest.fill(at, 1, was + 2, private=False)
        assert self.guest.host_sees(at, 1, was + 2)
        return was + 2

    def guest_sees(self, value: int, pgoff: int = 0) -> bool:
        """Return whether the guest reads a byte of a private page so."""
        return self.guest.sees(pgoff * PAGE_SIZE, 1, value)

    def pages_charged(self) -> int:
        """Return how many pages the file has."""
        found = account(self.guest.engine.core, file_of(self.guest.engine, self.guest.file))
        return found.private + found.shared + found.found


# --- one page --------------------------------------------------------------------------------
def _init_private(bench: Bench) -> Converting:
    one = Converting(bench, 1, shared=False)
    one.host_sigbus()
    assert one.guest_sees(0)
    one.guest.fill(0, 1, 0x41)
    assert one.guest_sees(0x41)
    return one


@runs(FILE, "init_private",
      "1 page, MMAP: host write and host read before any conversion; guest access")  # fmt: skip
def init_private(bench: Bench) -> None:
    _init_private(bench)


@runs(FILE, "init_private", "convert to shared")
def init_private_to_shared(bench: Bench) -> None:
    one = _init_private(bench)
    one.convert(private=False)
    one.exchange(0x41)


@runs(FILE, "init_private", "convert to private")
def init_private_and_back(bench: Bench) -> None:
    one = _init_private(bench)
    one.convert(private=False)
    last = one.exchange(0x41)
    one.convert(private=True)
    one.host_sigbus()
    assert one.guest_sees(last)


@runs(FILE, "init_shared", "1 page, MMAP|INIT_SHARED: host and guest")
def init_shared(bench: Bench) -> None:
    Converting(bench, 1, shared=True).exchange(0)


def _shared_to_private(bench: Bench) -> Converting:
    one = Converting(bench, 1, shared=True)
    last = one.exchange(0)
    one.convert(private=True)
    one.host_sigbus()
    assert one.guest_sees(last)
    return one


@runs(FILE, "init_shared", "convert to private")
def init_shared_to_private(bench: Bench) -> None:
    _shared_to_private(bench)


@runs(FILE, "init_shared", "convert back to shared")
def init_shared_and_back(bench: Bench) -> None:
    one = _shared_to_private(bench)
    one.guest.fill(0, 1, 0x61)
    one.convert(private=False)
    one.exchange(0x61)


# --- one page of several ---------------------------------------------------------------------
def _one_of_four(bench: Bench) -> Iterator[tuple[Converting, int]]:
    """Make each of four shared pages private in turn."""
    for at in range(4):
        four = Converting(bench, 4, shared=True)
        for pgoff in range(4):
            four.guest.host_write(pgoff * PAGE_SIZE, bytes([0x10 + pgoff]))
        four.convert(True, at, 1)
        yield four, at


@runs(FILE, "indexing", "4 pages shared, one of them (each in turn) made private")
def indexing(bench: Bench) -> None:
    for four, at in _one_of_four(bench):
        four.host_sigbus(at)
        assert four.guest_sees(0x10 + at, at)
        for pgoff in set(range(4)) - {at}:
            four.exchange(0x10 + pgoff, pgoff)


@runs(FILE, "indexing", "that page back to shared")
def indexing_back(bench: Bench) -> None:
    for four, at in _one_of_four(bench):
        four.convert(False, at, 1)
        for pgoff in range(4):
            four.exchange(0x10 + pgoff, pgoff)


# --- pages that are not there ----------------------------------------------------------------
@runs(FILE, "before_allocation_shared", "no page yet, shared to private")
def before_allocation_shared(bench: Bench) -> None:
    one = Converting(bench, 1, shared=True)
    one.convert(private=True)
    assert one.pages_charged() == 0
    one.host_sigbus()
    assert one.guest_sees(0)


@runs(FILE, "before_allocation_private", "no page yet, private to shared")
def before_allocation_private(bench: Bench) -> None:
    one = Converting(bench, 1, shared=False)
    one.convert(private=False)
    assert one.pages_charged() == 0
    one.exchange(0)


def _layouts(bench: Bench) -> Iterator[tuple[Converting, list[int]]]:
    """Touch page 4 and one other of eight shared ones, and make all private."""
    for other in range(8):
        eight = Converting(bench, 8, shared=True)
        for pgoff in (4, other):
            eight.guest.host_write(pgoff * PAGE_SIZE, bytes([0x20 + pgoff]))
        touched = {4, other}
        assert eight.pages_charged() == len(touched)
        eight.convert(private=True)
        yield eight, [0x20 + pgoff if pgoff in touched else 0 for pgoff in range(8)]


@runs(FILE, "unallocated_folios",
      "8 pages, page 4 and one other (each of 8) touched; all to private")  # fmt: skip
def unallocated(bench: Bench) -> None:
    for eight, wanted in _layouts(bench):
        for pgoff, value in enumerate(wanted):
            eight.host_sigbus(pgoff)
            assert eight.guest_sees(value, pgoff)


@runs(FILE, "unallocated_folios", "then each page back to shared")
def unallocated_back(bench: Bench) -> None:
    for eight, _ in _layouts(bench):
        for pgoff in range(8):
            eight.guest.fill(pgoff * PAGE_SIZE, 1, 0x30 + pgoff)
            eight.convert(False, pgoff, 1)
            eight.exchange(0x30 + pgoff, pgoff)


@runs(FILE, "truncate", "shared page written, punched")
def truncate_shared(bench: Bench) -> None:
    one = Converting(bench, 1, shared=True)
    assert one.exchange(0) != 0
    one.punch()
    one.exchange(0)


@runs(FILE, "truncate", "converted to private, written by the guest, punched")
def truncate_private(bench: Bench) -> None:
    one = Converting(bench, 1, shared=True)
    one.exchange(0)
    one.convert(private=True)
    one.guest.fill(0, 1, 0x51)
    one.punch()
    one.host_sigbus()
    assert one.guest_sees(0)


# --- restrictedmem, the one of its cases that is not about its backing file system --------------
@runs("restrictedmem_hugepage_test.c", "invalid_flags (RFC 18 Feb 2023)", "unknown flag value")
def unknown_flag(bench: Bench) -> None:
    vm = bench.engine.create_vm("sw-protected").info.vm
    for flags in (4, 0xDEADBEEF, (1 << 64) - 1):
        refusal(bench.engine.create_file, vm, PAGE_SIZE, flags, reason=UNKNOWN_FLAG, errno=EINVAL)
