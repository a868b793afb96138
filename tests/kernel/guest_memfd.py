"""Runners for guest_memfd_test.c: the file itself, by flag run and kind of VM."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EFAULT, EINVAL, ENODEV

from helpers import Guest, file_of, make_guest, refusal
from kernel.catalogue import Bench, runs

from rmemd.engine.engine import Engine
from rmemd.engine.memory import (
    KEEP_SIZE,
    MPOL_BIND,
    MPOL_DEFAULT,
    MPOL_INTERLEAVE,
    PUNCH_HOLE,
)
from rmemd.engine.queries import account
from rmemd.errors import (
    BAD_RANGE,
    BAD_REQUEST,
    HOST_SIGBUS,
    NOT_MAPPABLE,
    NOT_PAGE_ALIGNED,
    UNKNOWN_FLAG,
)
from rmemd.model.files import FLAG_INIT_SHARED, FLAG_MMAP, FLAGS_ADVERTISED, Policy
from rmemd.units import PAGE_SIZE

FILE = "guest_memfd_test.c"
NPAGES = 4
SIZE = NPAGES * PAGE_SIZE
PUNCH = PUNCH_HOLE | KEEP_SIZE
FLAG_RUNS = (0, FLAG_MMAP, FLAG_MMAP | FLAG_INIT_SHARED)
MMAP_RUNS = FLAG_RUNS[1:]
# the kernel runs every VM type; a file's flags decide what the host may map only in place, since
# an `attributes` VM's shared half is memory of its own (DESIGN §4)
IN_PLACE = (("gup", True), ("sw-protected", True))
VM_TYPES = (*IN_PLACE, ("gup", False), ("sw-protected", False), ("null", False))


def _guests(
    engine: Engine, flag_runs: tuple[int, ...], vm_types: tuple[tuple[str, bool], ...] = VM_TYPES
) -> Iterator[Guest]:
    for consumer, in_place in vm_types:
        for flags in flag_runs:
            yield make_guest(engine, consumer, NPAGES, flags=flags, in_place=in_place)


def _mappable(engine: Engine, flags: int = FLAG_MMAP | FLAG_INIT_SHARED) -> Iterator[Guest]:
    return _guests(engine, (flags,), IN_PLACE)


def _sigbus(guest: Guest, offset: int, write: bool = False) -> None:
    if write:
        refusal(guest.host_write, offset, b"\xaa", reason=HOST_SIGBUS, errno=EFAULT)
    else:
        refusal(guest.host_read, offset, 1, reason=HOST_SIGBUS, errno=EFAULT)


# --- creation --------------------------------------------------------------------------------
@runs(FILE, "guest_memfd_flags",
      "create with each single bit 0..63 that the flags capability advertises")  # fmt: skip
def advertised_flags(bench: Bench) -> None:
    for consumer, in_place in VM_TYPES:
        vm = bench.engine.create_vm(consumer, in_place=in_place).info.vm
        for flag in [1 << bit for bit in range(64) if FLAGS_ADVERTISED >> bit & 1]:
            assert bench.engine.create_file(vm, SIZE, flag).info.flags == flag


@runs(FILE, "guest_memfd_flags", "create with each single bit 0..63 that is not advertised")
def other_flags(bench: Bench) -> None:
    for consumer, in_place in VM_TYPES:
        vm = bench.engine.create_vm(consumer, in_place=in_place).info.vm
        for flag in [1 << bit for bit in range(64) if not FLAGS_ADVERTISED >> bit & 1]:
            refusal(bench.engine.create_file, vm, SIZE, flag, reason=UNKNOWN_FLAG, errno=EINVAL)


@runs(FILE, "create_guest_memfd_multiple", "create 1 page then 2 pages in one VM (flags 0)")
def two_files(bench: Bench) -> None:
    vm = bench.engine.create_vm("gup").info.vm
    for npages in (1, 2):
        made = bench.engine.create_file(vm, npages * PAGE_SIZE).info.file
        assert file_of(bench.engine, made).info.size_pages == npages


@runs(FILE, "create_guest_memfd_multiple", "fstat the first again after the second exists")
def two_files_apart(bench: Bench) -> None:
    vm = bench.engine.create_vm("gup").info.vm
    one = bench.engine.create_file(vm, PAGE_SIZE).info.file
    other = bench.engine.create_file(vm, 2 * PAGE_SIZE).info.file
    assert file_of(bench.engine, one).info.size_pages == 1
    assert one != other


@runs(FILE, "create_guest_memfd_invalid_sizes",
      "all flag runs: create with every size 1..page-1")  # fmt: skip
def odd_sizes(bench: Bench) -> None:
    vm = bench.engine.create_vm("gup").info.vm
    for flags in FLAG_RUNS:
        for size in range(1, PAGE_SIZE):
            refusal(
                bench.engine.create_file, vm, size, flags, reason=NOT_PAGE_ALIGNED, errno=EINVAL
            )


@runs(FILE, "file_size", "all flag runs: fstat")
def file_size(bench: Bench) -> None:
    for guest in _guests(bench.engine, FLAG_RUNS):
        assert file_of(bench.engine, guest.file).info.size_pages * PAGE_SIZE == SIZE
        # st_blksize: memory is charged page by page
        assert bench.engine.fallocate(guest.file, KEEP_SIZE, 0, PAGE_SIZE) == 1
        charged = account(bench.engine.core, file_of(bench.engine, guest.file))
        assert charged.private + charged.shared == 1


# --- the host's mapping ----------------------------------------------------------------------
@runs(FILE, "mmap_supported", "MMAP|INIT_SHARED: map 4 pages shared, fill with 0xaa")
def map_and_fill(bench: Bench) -> None:
    for guest in _mappable(bench.engine):
        guest.host_write(0, b"\xaa" * SIZE)
        assert guest.host_sees(0, SIZE, 0xAA)


@runs(FILE, "mmap_supported", "MMAP|INIT_SHARED: punch page 0")
def map_and_punch(bench: Bench) -> None:
    for guest in _mappable(bench.engine):
        guest.host_write(0, b"\xaa" * SIZE)
        assert bench.engine.fallocate(guest.file, PUNCH, 0, PAGE_SIZE) == 1
        assert guest.host_sees(0, PAGE_SIZE, 0)
        assert guest.host_sees(PAGE_SIZE, SIZE - PAGE_SIZE, 0xAA)


@runs(FILE, "mmap_supported", "MMAP|INIT_SHARED: refill page 0")
def map_and_refill(bench: Bench) -> None:
    for guest in _mappable(bench.engine):
        guest.host_write(0, b"\xaa" * SIZE)
        bench.engine.fallocate(guest.file, PUNCH, 0, PAGE_SIZE)
        guest.host_write(0, b"\xaa" * PAGE_SIZE)
        assert guest.host_sees(0, SIZE, 0xAA)


def _overflow(guest: Guest) -> None:
    """Fill 16 pages of a mapping as a CPU does, page by page, until SIGBUS."""
    for pgoff in range(NPAGES):
        guest.host_write(pgoff * PAGE_SIZE, b"\xaa" * PAGE_SIZE)
    for pgoff in range(NPAGES, 16):
        _sigbus(guest, pgoff * PAGE_SIZE, write=True)


@runs(FILE, "fault_overflow", "MMAP|INIT_SHARED: file 4 pages, map 16, fill the whole mapping")
def overflow(bench: Bench) -> None:
    for guest in _mappable(bench.engine):
        whole = b"\xaa" * (16 * PAGE_SIZE)
        refusal(guest.host_write, 0, whole, reason=HOST_SIGBUS, errno=EFAULT)
        _overflow(guest)


@runs(FILE, "fault_overflow", "MMAP|INIT_SHARED: read first byte past the file")
def overflow_read(bench: Bench) -> None:
    for guest in _mappable(bench.engine):
        _sigbus(guest, SIZE)


@runs(FILE, "fault_overflow", "MMAP|INIT_SHARED: read the in-file bytes afterwards")
def overflow_kept(bench: Bench) -> None:
    for guest in _mappable(bench.engine):
        _overflow(guest)
        assert guest.host_sees(0, SIZE, 0xAA)


@runs(FILE, "fault_private", "MMAP only: write to the mapping")
def private_write(bench: Bench) -> None:
    for guest in _mappable(bench.engine, FLAG_MMAP):
        for pgoff in range(NPAGES):
            _sigbus(guest, pgoff * PAGE_SIZE, write=True)


@runs(FILE, "fault_private", "MMAP only: read first byte")
def private_read(bench: Bench) -> None:
    for guest in _mappable(bench.engine, FLAG_MMAP):
        _sigbus(guest, 0)


@runs(FILE, "mmap_not_supported", "flags 0: mmap shared one page")
def not_mappable(bench: Bench) -> None:
    for guest in _mappable(bench.engine, 0):
        refusal(guest.host_read, 0, PAGE_SIZE, reason=NOT_MAPPABLE, errno=ENODEV)
        refusal(guest.host_write, 0, b"\xaa", reason=NOT_MAPPABLE, errno=ENODEV)


@runs(FILE, "mmap_not_supported", "flags 0: mmap shared whole file")
def not_mappable_at_all(bench: Bench) -> None:
    for guest in _mappable(bench.engine, 0):
        refusal(guest.host_read, 0, SIZE, reason=NOT_MAPPABLE, errno=ENODEV)


# --- NUMA ------------------------------------------------------------------------------------
def _bind(guest: Guest, pgoff: int, npages: int, policy: int, *nodes: int) -> None:
    guest.engine.set_policy(guest.file, pgoff * PAGE_SIZE, npages * PAGE_SIZE, policy, nodes)


def _touch_all(guest: Guest) -> list[int]:
    guest.host_write(0, b"\xaa" * SIZE)
    return [guest.engine.page(guest.pfn(pgoff))[1].node for pgoff in range(NPAGES)]


def _place(guest: Guest) -> list[int]:
    guest.host_write(0, b"\xaa")
    _bind(guest, 0, 1, MPOL_BIND, 0)
    guest.engine.fallocate(guest.file, PUNCH, 0, PAGE_SIZE)
    _bind(guest, 0, 2, MPOL_BIND, 1)
    _bind(guest, 2, 2, MPOL_BIND, 0)
    return _touch_all(guest)


@runs(FILE, "numa_allocation",
      "MMAP|INIT_SHARED, >= 2 nodes: touch page 0, bind it to node 0, punch; then bind pages 0-1 "
      "to node 1 and 2-3 to node 0, touch all")  # fmt: skip
def numa_placement(bench: Bench) -> None:
    for guest in _mappable(bench.engine):
        assert _place(guest) == [1, 1, 0, 0]


@runs(FILE, "numa_allocation",
      "MMAP|INIT_SHARED, >= 2 nodes: punch all, swap the two bindings, touch all")  # fmt: skip
def numa_swapped(bench: Bench) -> None:
    for guest in _mappable(bench.engine):
        _place(guest)
        assert bench.engine.fallocate(guest.file, PUNCH, 0, SIZE) == NPAGES
        _bind(guest, 0, 2, MPOL_BIND, 0)
        _bind(guest, 2, 2, MPOL_BIND, 1)
        assert _touch_all(guest) == [0, 0, 1, 1]


def _policies(guest: Guest) -> list[Policy]:
    return [guest.engine.get_policy(guest.file, n * PAGE_SIZE) for n in range(NPAGES)]


@runs(FILE, "mbind",
      "both MMAP runs, >= 2 nodes: MPOL_INTERLEAVE node 0 on pages "
      "0-1, query by address")  # fmt: skip
def mbind_interleave(bench: Bench) -> None:
    for guest in _guests(bench.engine, MMAP_RUNS):
        _bind(guest, 0, 2, MPOL_INTERLEAVE, 0)
        default = Policy(MPOL_DEFAULT, ())
        assert _policies(guest) == [Policy(MPOL_INTERLEAVE, (0,))] * 2 + [default] * 2


@runs(FILE, "mbind",
      "both MMAP runs, >= 2 nodes: MPOL_BIND node 0 on pages 2-3, query by address")  # fmt: skip
def mbind_bind(bench: Bench) -> None:
    for guest in _guests(bench.engine, MMAP_RUNS):
        _bind(guest, 0, 2, MPOL_INTERLEAVE, 0)
        _bind(guest, 2, 2, MPOL_BIND, 0)
        wanted = [Policy(MPOL_INTERLEAVE, (0,))] * 2 + [Policy(MPOL_BIND, (0,))] * 2
        assert _policies(guest) == wanted


@runs(FILE, "mbind", "both MMAP runs, >= 2 nodes: MPOL_DEFAULT on all, query by address")
def mbind_default(bench: Bench) -> None:
    for guest in _guests(bench.engine, MMAP_RUNS):
        _bind(guest, 0, 2, MPOL_INTERLEAVE, 0)
        _bind(guest, 2, 2, MPOL_BIND, 0)
        _bind(guest, 0, NPAGES, MPOL_DEFAULT)
        assert _policies(guest) == [Policy(MPOL_DEFAULT, ())] * NPAGES


@runs(FILE, "mbind", "both MMAP runs, >= 2 nodes: policy 999")
def mbind_invalid(bench: Bench) -> None:
    for guest in _guests(bench.engine, MMAP_RUNS):
        refusal(
            bench.engine.set_policy, guest.file, 0, SIZE, 999, (0,),
            reason=BAD_REQUEST, errno=EINVAL,
        )  # fmt: skip


# --- fallocate -------------------------------------------------------------------------------
@runs(FILE, "fallocate", "all flag runs: KEEP_SIZE over the whole file")
def allocate_whole(bench: Bench) -> None:
    for guest in _guests(bench.engine, FLAG_RUNS):
        assert bench.engine.fallocate(guest.file, KEEP_SIZE, 0, SIZE) == NPAGES


@runs(FILE, "fallocate", "all flag runs: punch at page-1, length page")
def punch_odd_offset(bench: Bench) -> None:
    _refused(bench, PUNCH, PAGE_SIZE - 1, PAGE_SIZE)


@runs(FILE, "fallocate", "all flag runs: KEEP_SIZE starting at the file size")
def allocate_at_end(bench: Bench) -> None:
    for guest in _guests(bench.engine, FLAG_RUNS):
        refusal(
            bench.engine.fallocate, guest.file, KEEP_SIZE, SIZE, PAGE_SIZE,
            reason=BAD_RANGE, errno=EINVAL,
        )  # fmt: skip


@runs(FILE, "fallocate", "all flag runs: KEEP_SIZE starting one page past the file size")
def allocate_past_end(bench: Bench) -> None:
    for guest in _guests(bench.engine, FLAG_RUNS):
        refusal(
            bench.engine.fallocate, guest.file, KEEP_SIZE, SIZE + PAGE_SIZE, PAGE_SIZE,
            reason=BAD_RANGE, errno=EINVAL,
        )  # fmt: skip


@runs(FILE, "fallocate", "all flag runs: punch starting at the file size")
def punch_at_end(bench: Bench) -> None:
    for guest in _guests(bench.engine, FLAG_RUNS):
        bench.engine.fallocate(guest.file, KEEP_SIZE, 0, SIZE)
        assert bench.engine.fallocate(guest.file, PUNCH, SIZE, PAGE_SIZE) == 0


@runs(FILE, "fallocate", "all flag runs: punch starting one page past the file size")
def punch_past_end(bench: Bench) -> None:
    for guest in _guests(bench.engine, FLAG_RUNS):
        bench.engine.fallocate(guest.file, KEEP_SIZE, 0, SIZE)
        assert bench.engine.fallocate(guest.file, PUNCH, SIZE + PAGE_SIZE, PAGE_SIZE) == 0


@runs(FILE, "fallocate", "all flag runs: punch at page, length page-1")
def punch_odd_length(bench: Bench) -> None:
    _refused(bench, PUNCH, PAGE_SIZE, PAGE_SIZE - 1)


@runs(FILE, "fallocate", "all flag runs: punch page 1")
def punch_one(bench: Bench) -> None:
    for guest in _guests(bench.engine, FLAG_RUNS):
        bench.engine.fallocate(guest.file, KEEP_SIZE, 0, SIZE)
        assert bench.engine.fallocate(guest.file, PUNCH, PAGE_SIZE, PAGE_SIZE) == 1
        assert [guest.pfn(pgoff) < 0 for pgoff in range(NPAGES)] == [False, True, False, False]


@runs(FILE, "fallocate", "all flag runs: KEEP_SIZE over the punched page 1")
def allocate_punched(bench: Bench) -> None:
    for guest in _guests(bench.engine, FLAG_RUNS):
        bench.engine.fallocate(guest.file, KEEP_SIZE, 0, SIZE)
        bench.engine.fallocate(guest.file, PUNCH, PAGE_SIZE, PAGE_SIZE)
        assert bench.engine.fallocate(guest.file, KEEP_SIZE, PAGE_SIZE, PAGE_SIZE) == 1


def _refused(bench: Bench, mode: int, offset: int, length: int) -> None:
    for guest in _guests(bench.engine, FLAG_RUNS):
        refusal(
            bench.engine.fallocate, guest.file, mode, offset, length,
            reason=NOT_PAGE_ALIGNED, errno=EINVAL,
        )  # fmt: skip


@runs(FILE, "invalid_punch_hole", "all flag runs: offset 0 with length 1, page-1, page+1")
def odd_punches_at_0(bench: Bench) -> None:
    for length in (1, PAGE_SIZE - 1, PAGE_SIZE + 1):
        _refused(bench, PUNCH, 0, length)


@runs(FILE, "invalid_punch_hole", "all flag runs: offset 1 with length 1, page-1, page, page+1")
def odd_punches_at_1(bench: Bench) -> None:
    for length in (1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1):
        _refused(bench, PUNCH, 1, length)


@runs(FILE, "invalid_punch_hole", "all flag runs: offset page with length 1, page-1, page+1")
def odd_punches_at_page(bench: Bench) -> None:
    for length in (1, PAGE_SIZE - 1, PAGE_SIZE + 1):
        _refused(bench, PUNCH, PAGE_SIZE, length)


# --- with a guest ----------------------------------------------------------------------------
@runs(FILE, "guest_memfd_guest",
      "default VM type, where the flags capability exists: read it")  # fmt: skip
def flags_capability(bench: Bench) -> None:
    assert FLAGS_ADVERTISED & FLAG_MMAP
    assert FLAGS_ADVERTISED & FLAG_INIT_SHARED


def _shared_with_guest(bench: Bench) -> Iterator[Guest]:
    for in_place in (False, True):
        flags = FLAG_MMAP | FLAG_INIT_SHARED
        guest = make_guest(bench.engine, "gup", 1, flags=flags, in_place=in_place)
        guest.host_write(0, b"\xaa" * PAGE_SIZE)
        yield guest


@runs(FILE, "guest_memfd_guest",
      "one page, MMAP|INIT_SHARED, bound at 4G with NULL userspace_addr; host fills 0xaa, guest "
      "reads")  # fmt: skip
def guest_reads(bench: Bench) -> None:
    for guest in _shared_with_guest(bench):
        assert guest.gpa == 4 << 30
        assert guest.sees(0, PAGE_SIZE, 0xAA, private=False)


@runs(FILE, "guest_memfd_guest", "guest fills 0xff, host maps again and reads")
def guest_writes(bench: Bench) -> None:
    for guest in _shared_with_guest(bench):
        guest.fill(0, PAGE_SIZE, 0xFF, private=False)
        assert guest.host_sees(0, PAGE_SIZE, 0xFF)
