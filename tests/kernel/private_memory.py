"""Runners for x86/private_mem_conversions_test.c and x86/private_mem_kvm_exits_test.c.

Memory is converted by VM attributes. The kernel's guests start with shared memory, so these VMs
are configured to. A software-protected guest asks for conversions by hypercall; for a `null` one,
which cannot, the VMM converts by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EFAULT

from helpers import BASE_GPA, Guest, file_of, halted, make_guest, touch
from kernel.catalogue import Bench, runs

from rmemd.engine.memory import KEEP_SIZE, PUNCH_HOLE
from rmemd.engine.programme import Instruction, Opcode
from rmemd.engine.queries import account
from rmemd.engine.vcpu import Exit, Exited
from rmemd.model.vms import ATTRIBUTE_PRIVATE, GUEST_MEMFD
from rmemd.units import PAGE_SIZE

FILE = "x86/private_mem_conversions_test.c"
EXITS = "x86/private_mem_kvm_exits_test.c"
PUNCH = PUNCH_HOLE | KEEP_SIZE
KB4, MB2 = PAGE_SIZE, 2 << 20
AREA = MB2 + KB4
RANGES = ((0, KB4), (0, MB2), (KB4, KB4), (KB4, MB2), (MB2, KB4))
ONE_PAGE = [r for r in RANGES if r[1] == KB4]
DEFAULT, INITIAL, P1, P2, P3, P4 = 0xAA, 0xCC, 0x11, 0x22, 0x33, 0x44
CONSUMERS = ("sw-protected", "null")


@dataclass
class Area:
    """2M+4K of a guest, its own vCPU's; offsets count from the area's start."""

    guest: Guest
    offset: int
    fallocate: bool

    def fill(self, at: int, size: int, value: int, private: bool = False) -> None:
        """Have the guest fill bytes."""
        self.guest.fill(self.offset + at, size, value, private)

    def sees(self, at: int, size: int, value: int, private: bool = False) -> bool:
        """Return whether the guest reads bytes so."""
        return size == 0 or self.guest.sees(self.offset + at, size, value, private)

    def host_sees(self, at: int, size: int, value: int) -> bool:
        """Return whether the host reads bytes so."""
        return self.guest.host_sees(self.offset + at, size, value)

    def host_fill(self, at: int, size: int, value: int) -> None:
        """Have the host fill bytes."""
        self.guest.host_write(self.offset + at, bytes([value]) * size)

    def shared_with_host(self, at: int, size: int, was: int, becomes: int) -> None:
        """Require that the host sees the guest's bytes, and the guest then the host's."""
        assert self.host_sees(at, size, was)
        self.host_fill(at, size, becomes)
        assert self.sees(at, size, becomes)

    def convert(self, at: int, size: int, private: bool, fallocate: bool | None = None) -> None:
        """Convert a range, with or without allocating or punching it first."""
        fallocate = self.fallocate if fallocate is None else fallocate
        guest, gpa = self.guest, self.guest.gpa + self.offset + at
        if guest.engine.core.consumers[guest.vm].ops.guest_call is None:
            self._convert(gpa, size, private, fallocate)
            return
        call = Opcode.UNSHARE if private else Opcode.SHARE
        exited = guest.run(Instruction(call, gpa, size))
        assert (exited.reason, exited.gpa, exited.size) == (Exit.HYPERCALL, gpa, size)
        assert bool(exited.value & ATTRIBUTE_PRIVATE) == private
        self._convert(gpa, size, private, fallocate)
        assert halted(guest.engine.run_vcpu(guest.vm, guest.vcpu, 0)).vcpu.call_status == 0

    def _convert(self, gpa: int, size: int, private: bool, fallocate: bool) -> None:
        engine, guest = self.guest.engine, self.guest
        if fallocate:
            engine.fallocate(guest.file, KEEP_SIZE if private else PUNCH, gpa - guest.gpa, size)
        engine.set_attributes(guest.vm, [(gpa, size, ATTRIBUTE_PRIVATE if private else 0)])

    def punch(self, at: int, size: int) -> None:
        """Punch a range, and convert nothing."""
        self.guest.engine.fallocate(self.guest.file, PUNCH, self.offset + at, size)

    def private_pages(self) -> int:
        """Return how many private pages the area has."""
        start, npages = self.offset // PAGE_SIZE, AREA // PAGE_SIZE
        return int(file_of(self.guest.engine, self.guest.file).frames.touched(start, npages).size)


def _areas(
    bench: Bench, consumer: str, fallocate: bool, vcpus: int = 1, slots: int = 1
) -> list[Area]:
    """Make a VM with an area per vCPU, its file in so many equal slots."""
    npages = vcpus * AREA // PAGE_SIZE
    guest = make_guest(bench.engine, consumer, npages, in_place=False, starts_private=False)
    if slots > 1:
        engine, each = bench.engine, guest.size // slots
        engine.set_memory_region(guest.vm, 0, 0, guest.gpa, 0)
        for slot in range(slots):
            at = slot * each
            engine.set_memory_region(
                guest.vm, slot, GUEST_MEMFD, guest.gpa + at, each, file=guest.file, offset=at
            )
    made = []
    for index in range(vcpus):
        if index:
            bench.engine.create_vcpu(guest.vm, index)
        own = Guest(bench.engine, guest.vm, guest.file, guest.gpa, npages, vcpu=index)
        made.append(Area(own, index * AREA, fallocate))
    return made


def _each(bench: Bench) -> Iterator[Area]:
    """One area of each consumer, without and with fallocate."""
    for consumer in CONSUMERS:
        for fallocate in (False, True):
            (area,) = _areas(bench, consumer, fallocate)
            yield area
            bench.engine.destroy_vm(area.guest.vm)
            bench.engine.close_file(area.guest.file)


# --- the kernel's guest code, part by part ----------------------------------------------------
def _default(area: Area) -> None:
    area.fill(0, AREA, DEFAULT)
    assert area.sees(0, AREA, DEFAULT)
    area.shared_with_host(0, AREA, DEFAULT, INITIAL)
    assert area.private_pages() == 0


def _to_private(area: Area, at: int, size: int) -> None:
    """Mark a range's shared bytes, make it private, and write one page or all of it."""
    area.fill(at, size, P1)
    area.convert(at, size, private=True)
    area.fill(at, KB4, P2, private=True)
    assert area.sees(at, KB4, P2, private=True)


def _one_page_apart(area: Area, at: int) -> None:
    assert area.host_sees(at, KB4, P1)
    assert area.sees(at, KB4, P2, private=True)


def _neighbours(area: Area, at: int, size: int) -> None:
    end = at + size
    assert area.sees(0, at, INITIAL)
    assert area.sees(end, AREA - end, INITIAL)


def _odd_pages(area: Area, at: int, size: int) -> None:
    """Make every odd page of a private range shared again."""
    for page in range(0, size, KB4):
        if page // KB4 % 2:
            area.convert(at + page, KB4, private=False)
            area.fill(at + page, KB4, P1)
            area.shared_with_host(at + page, KB4, P1, P3)


def _back_to_shared(area: Area, at: int, size: int) -> None:
    area.convert(at, size, private=False)
    area.fill(at, size, P3)
    area.shared_with_host(at, size, P3, P4)
    area.fill(at, size, INITIAL)


def _clean(area: Area) -> None:
    area.convert(0, AREA, private=False, fallocate=True)
    assert area.private_pages() == 0


def _explicit_conversion(area: Area) -> None:
    _default(area)
    for at, size in RANGES:
        _to_private(area, at, size)
        if size == KB4:
            _one_page_apart(area, at)
            _neighbours(area, at, size)
        _back_to_shared(area, at, size)
        _clean(area)


def _punch_hole(area: Area, precise: bool) -> None:
    area.convert(0, AREA, private=True, fallocate=False)
    for at, size in RANGES:
        area.punch(0, AREA)
        filled = (at, size) if precise else (0, AREA)
        area.fill(*filled, INITIAL, private=True)
        assert area.sees(*filled, INITIAL, private=True)
        area.punch(at, size)
        assert area.private_pages() == (filled[1] - size) // PAGE_SIZE
        assert area.sees(at, size, 0, private=True)
        if not precise:
            end = at + size
            assert area.sees(0, at, INITIAL, private=True)
            assert area.sees(end, AREA - end, INITIAL, private=True)


# --- the rows --------------------------------------------------------------------------------
@runs(FILE, "explicit_conversion",
      "without and with fallocate: default state; guest fills 2M+4K with 0xaa, host checks and "
      "writes 0xcc")  # fmt: skip
def default_state(bench: Bench) -> None:
    for area in _each(bench):
        _default(area)


@runs(FILE, "explicit_conversion",
      "without and with fallocate: ranges (0,4K) (4K,4K) (2M,4K) to private; guest writes a new "
      "pattern")  # fmt: skip
def one_page(bench: Bench) -> None:
    for area in _each(bench):
        _default(area)
        for at, size in ONE_PAGE:
            _to_private(area, at, size)
            _one_page_apart(area, at)
            _back_to_shared(area, at, size)
            _clean(area)


@runs(FILE, "explicit_conversion",
      "without and with fallocate: same ranges, bytes before and after")  # fmt: skip
def neighbours(bench: Bench) -> None:
    for area in _each(bench):
        _default(area)
        for at, size in ONE_PAGE:
            _to_private(area, at, size)
            _neighbours(area, at, size)
            _back_to_shared(area, at, size)
            _clean(area)


@runs(FILE, "explicit_conversion",
      "without and with fallocate: odd page frames inside a private range back to shared (jumped "
      "over for every range above one page, so not reached)")  # fmt: skip
def odd_pages(bench: Bench) -> None:
    size = 16 * KB4
    for area in _each(bench):
        _default(area)
        area.convert(KB4, size, private=True)
        area.fill(KB4, size, P2, private=True)
        _odd_pages(area, KB4, size)
        for page in range(0, size, KB4):
            odd = bool(page // KB4 % 2)
            assert area.sees(KB4 + page, KB4, P3 if odd else P2, private=not odd)


@runs(FILE, "explicit_conversion",
      "without and with fallocate: ranges (0,2M) (4K,2M) to private; guest writes only the first "
      "page")  # fmt: skip
def many_pages(bench: Bench) -> None:
    for area in _each(bench):
        _default(area)
        for at, size in ((0, MB2), (KB4, MB2)):
            _to_private(area, at, size)
            # with fallocate every page is there, without it only the one that was written
            assert area.private_pages() == (size // KB4 if area.fallocate else 1)
            _clean(area)


@runs(FILE, "explicit_conversion",
      "without and with fallocate: every range back to shared; guest fills, host checks and "
      "overwrites")  # fmt: skip
def back_to_shared(bench: Bench) -> None:
    for area in _each(bench):
        _default(area)
        for at, size in RANGES:
            _to_private(area, at, size)
            _back_to_shared(area, at, size)


@runs(FILE, "explicit_conversion",
      "after each range: convert the whole area to shared with a punch")  # fmt: skip
def clean_slate(bench: Bench) -> None:
    for area in _each(bench):
        _default(area)
        for at, size in RANGES:
            _to_private(area, at, size)
            assert area.private_pages() > 0
            _clean(area)
            assert area.sees(at, size, P1)
            area.fill(at, size, INITIAL)


@runs(FILE, "punch_hole",
      "not precise: area private, all filled, punch each of the 5 "
      "ranges without conversion")  # fmt: skip
def punch_some(bench: Bench) -> None:
    for consumer in CONSUMERS:
        (area,) = _areas(bench, consumer, fallocate=False)
        _punch_hole(area, precise=False)


@runs(FILE, "punch_hole", "precise: only the range filled, then punched")
def punch_all(bench: Bench) -> None:
    for consumer in CONSUMERS:
        (area,) = _areas(bench, consumer, fallocate=False)
        _punch_hole(area, precise=True)


@runs(FILE, "mem_conversions", "several vCPUs, and slots dividing the file evenly (options)")
def vcpus_and_slots(bench: Bench) -> None:
    for consumer in CONSUMERS:
        for vcpus, slots in ((1, 3), (2, 1), (2, 2), (2, 6)):
            areas = _areas(bench, consumer, fallocate=False, vcpus=vcpus, slots=slots)
            for area in areas:
                _explicit_conversion(area)
            for area in areas:
                _punch_hole(area, precise=False)
            bench.engine.destroy_vm(areas[0].guest.vm)
            bench.engine.close_file(areas[0].guest.file)


@runs(FILE, "mem_conversions", "after the VM is freed: punch the whole file, then allocate it")
def after_the_vm(bench: Bench) -> None:
    for area in _each_kept(bench):
        engine, file = bench.engine, area.guest.file
        assert engine.fallocate(file, PUNCH, 0, AREA) == 1
        assert engine.fallocate(file, KEEP_SIZE, 0, AREA) == AREA // PAGE_SIZE
        assert account(engine.core, file_of(engine, file)).private == AREA // PAGE_SIZE
        engine.close_file(file)


def _each_kept(bench: Bench) -> Iterator[Area]:
    for consumer in CONSUMERS:
        (area,) = _areas(bench, consumer, fallocate=False)
        _to_private(area, 0, KB4)
        bench.engine.destroy_vm(area.guest.vm)
        yield area


# --- exits -----------------------------------------------------------------------------------
def _deleted(bench: Bench, consumer: str) -> Exited:
    """Delete the slot while the guest reads a private page of it, again and again."""
    guest = make_guest(bench.engine, consumer, 1, in_place=False)
    spins = 0

    def hold(step: str) -> None:
        nonlocal spins
        spins += step == "guest"
        if step == "guest" and spins == 8:
            bench.engine.set_memory_region(guest.vm, 0, 0, guest.gpa, 0)

    bench.engine.core.hold = hold
    try:
        return guest.run(touch(guest.gpa, 8), Instruction(Opcode.LOOP, value=0, times=64))
    finally:
        bench.engine.core.hold = None
        assert spins >= 8


def _without_file(bench: Bench, consumer: str) -> Exited:
    """Have the guest read a private page of a slot that has no restricted file."""
    guest = make_guest(
        bench.engine, consumer, 1, in_place=False, starts_private=False, restricted=False
    )
    bench.engine.set_attributes(guest.vm, [(guest.gpa, guest.size, ATTRIBUTE_PRIVATE)])
    return guest.run(touch(guest.gpa, 8))


def _efault(bench: Bench, make: Callable[[Bench, str], Exited]) -> None:
    for consumer in CONSUMERS:
        exited = make(bench, consumer)
        assert (exited.reason, exited.errno) == (Exit.MEMORY_FAULT, EFAULT)


def _fields(bench: Bench, make: Callable[[Bench, str], Exited]) -> None:
    for consumer in CONSUMERS:
        exited = make(bench, consumer)
        assert (exited.flags, exited.gpa, exited.size) == (ATTRIBUTE_PRIVATE, BASE_GPA, PAGE_SIZE)


@runs(EXITS, "private_access_memslot_deleted",
      "private page with gmem; slot deleted while the guest reads")  # fmt: skip
def slot_deleted(bench: Bench) -> None:
    _efault(bench, _deleted)


@runs(EXITS, "private_access_memslot_deleted", "exit fields")
def slot_deleted_fields(bench: Bench) -> None:
    _fields(bench, _deleted)


@runs(EXITS, "private_access_memslot_not_private",
      "slot without gmem, gpa marked private, guest reads")  # fmt: skip
def slot_not_private(bench: Bench) -> None:
    _efault(bench, _without_file)


@runs(EXITS, "private_access_memslot_not_private", "exit fields")
def slot_not_private_fields(bench: Bench) -> None:
    _fields(bench, _without_file)
