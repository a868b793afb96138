"""Where a request breaks several rules at once, the kernel's first check answers.

Every case breaks at least two. Source: restrictedmem.md §2; the fallocate modes that the VFS lets
through were read off Linux 6.18 with a memfd.
"""

from __future__ import annotations

from dataclasses import dataclass
from errno import EBADF, EDQUOT, EEXIST, EFAULT, EFBIG, EINVAL, ENODEV, ENOMEM, ENOTTY, EOPNOTSUPP

import pytest
from helpers import BASE_GPA, MakeEngine, file_of, make_guest, refusal, slot_of

from rmemd.engine.engine import Engine
from rmemd.engine.memory import KEEP_SIZE, PUNCH_HOLE
from rmemd.engine.quotas import Limits
from rmemd.errors import (
    ATTRIBUTES_UNSUPPORTED,
    BAD_RANGE,
    BAD_REQUEST,
    BINDING_FOREIGN,
    BINDING_OVERLAP,
    FALLOCATE_MODE,
    HOST_SIGBUS,
    NO_FRAMES,
    NO_SLOT_NUMBERS,
    NO_SUCH_FILE,
    NO_SUCH_SLOT,
    NOT_MAPPABLE,
    NOT_PAGE_ALIGNED,
    OFFSET_TOO_BIG,
    QUOTA,
    SLOT_IMMUTABLE,
    SLOT_INVALID,
    SLOT_OVERLAP,
    UNKNOWN_FLAG,
    WRONG_PERSONALITY,
    Reason,
)
from rmemd.model.files import FLAG_INIT_SHARED, FLAG_MMAP
from rmemd.model.vms import ATTRIBUTE_PRIVATE, GUEST_MEMFD, LOG_DIRTY, NR_MEMSLOTS
from rmemd.units import LOFF_MAX, PAGE_SIZE

NPAGES = 4
SIZE = NPAGES * PAGE_SIZE
PUNCH = PUNCH_HOLE | KEEP_SIZE
ZERO_RANGE, COLLAPSE_RANGE, UNSHARE_RANGE = 0x10, 0x08, 0x40
U64_MAX = (1 << 64) - 1


# --- create ----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, -PAGE_SIZE, 1])
def test_create_checks_flags_before_the_size(engine: Engine, size: int) -> None:
    vm = engine.create_vm("sw-protected").info.vm
    refusal(engine.create_file, vm, size, 1 << 2, reason=UNKNOWN_FLAG, errno=EINVAL)


# --- fallocate -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "offset", "length", "reason", "errno"),
    [
        pytest.param(0xDEAD, -1, 0, BAD_RANGE, EINVAL, id="negative offset, any mode"),
        pytest.param(0xDEAD, 1, 0, BAD_RANGE, EINVAL, id="empty, any mode"),
        pytest.param(PUNCH_HOLE, LOFF_MAX, 1, FALLOCATE_MODE, EOPNOTSUPP, id="VFS before the sum"),
        pytest.param(
            COLLAPSE_RANGE | KEEP_SIZE, LOFF_MAX, 1, FALLOCATE_MODE, EOPNOTSUPP,
            id="a pair that the VFS refuses",
        ),
        pytest.param(1 << 8, LOFF_MAX, 1, FALLOCATE_MODE, EOPNOTSUPP, id="an unknown bit"),
        pytest.param(0, LOFF_MAX, 1, OFFSET_TOO_BIG, EFBIG, id="the sum, mode 0"),
        pytest.param(ZERO_RANGE, LOFF_MAX, 1, OFFSET_TOO_BIG, EFBIG, id="the sum, a known mode"),
        pytest.param(PUNCH, 1, LOFF_MAX, OFFSET_TOO_BIG, EFBIG, id="the sum before alignment"),
        pytest.param(0, 1, 1, FALLOCATE_MODE, EOPNOTSUPP, id="no KEEP_SIZE before alignment"),
        pytest.param(
            UNSHARE_RANGE | KEEP_SIZE, 1, 1, FALLOCATE_MODE, EOPNOTSUPP,
            id="another mode before alignment",
        ),
        pytest.param(KEEP_SIZE, SIZE, 1, NOT_PAGE_ALIGNED, EINVAL, id="alignment before the end"),
        pytest.param(KEEP_SIZE, 0, SIZE + PAGE_SIZE, BAD_RANGE, EINVAL, id="straddling the end"),
    ],
)  # fmt: skip
def test_fallocate(
    engine: Engine, mode: int, offset: int, length: int, reason: Reason, errno: int
) -> None:
    guest = make_guest(engine, "sw-protected", NPAGES)
    refusal(engine.fallocate, guest.file, mode, offset, length, reason=reason, errno=errno)
    assert all(guest.pfn(pgoff) < 0 for pgoff in range(NPAGES))


@pytest.mark.parametrize("limit", [-1, 300], ids=["the host's frames", "a quota"])
def test_an_allocation_that_is_stopped_keeps_the_pages_before(
    make_engine: MakeEngine, limit: int
) -> None:
    """restrictedmem.md §2, allocate: folio by folio, ENOMEM at the one that there is none for."""
    engine = make_engine(nframes=512, nnodes=1)
    engine.core.quotas.set(Limits(frames=limit))
    left = 512 if limit < 0 else limit
    reason, errno = (NO_FRAMES, ENOMEM) if limit < 0 else (QUOTA, EDQUOT)
    guest = make_guest(engine, "null", 600)
    # two pages are there before, one of them behind the page that is refused
    for pgoff in (3, 599):
        engine.fallocate(guest.file, KEEP_SIZE, pgoff * PAGE_SIZE, PAGE_SIZE)
    whole = (guest.file, KEEP_SIZE, 0, guest.size)
    stopped = refusal(engine.fallocate, *whole, reason=reason, errno=errno)
    assert stopped.details.progress_pages == left - 1
    there = [pgoff for pgoff in range(600) if guest.pfn(pgoff) >= 0]
    assert there == [*range(left - 1), 599]
    assert engine.fallocate(guest.file, PUNCH, 0, PAGE_SIZE) == 1


# --- bind ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bind:
    """A request that is right but for what a case changes."""

    slot: int = 1
    flags: int = GUEST_MEMFD
    gpa: int = BASE_GPA + SIZE
    size: int = SIZE
    userspace_addr: int = 0
    file: str = "free"
    offset: int = 0


# what is there: slot 0 at BASE_GPA with the first half of "taken"; "foreign" is another VM's
OVERLAP = BASE_GPA + SIZE - PAGE_SIZE
BINDS = [
    # the shape, whatever else is wrong
    (Bind(flags=GUEST_MEMFD | LOG_DIRTY, slot=0, gpa=OVERLAP), SLOT_INVALID, EINVAL),
    (Bind(size=PAGE_SIZE + 1, slot=0, gpa=OVERLAP, file="none"), SLOT_INVALID, EINVAL),
    (Bind(gpa=OVERLAP + 1, file="none"), SLOT_INVALID, EINVAL),
    (Bind(userspace_addr=1, gpa=OVERLAP), SLOT_INVALID, EINVAL),
    (Bind(offset=1, gpa=OVERLAP), SLOT_INVALID, EINVAL),
    (Bind(offset=U64_MAX - PAGE_SIZE + 1, gpa=OVERLAP), SLOT_INVALID, EINVAL),
    (Bind(slot=NR_MEMSLOTS, gpa=OVERLAP, file="none"), NO_SLOT_NUMBERS, EINVAL),
    # the slot exists
    (Bind(slot=0, gpa=OVERLAP, file="none"), SLOT_IMMUTABLE, EINVAL),
    # the overlap of guest addresses wins over everything about the file
    (Bind(gpa=OVERLAP, file="none"), SLOT_OVERLAP, EEXIST),
    (Bind(gpa=OVERLAP, file="foreign", offset=1 << 40), SLOT_OVERLAP, EEXIST),
    (Bind(gpa=OVERLAP, offset=1 << 40), SLOT_OVERLAP, EEXIST),
    (Bind(gpa=OVERLAP, file="taken"), SLOT_OVERLAP, EEXIST),
    # then the file, then its range
    (Bind(file="none", offset=1 << 40), NO_SUCH_FILE, EBADF),
    (Bind(file="foreign", offset=1 << 40), BINDING_FOREIGN, EINVAL),
    (Bind(file="memory", offset=1 << 40), BINDING_FOREIGN, EINVAL),
    (Bind(file="taken", size=4 * SIZE), SLOT_INVALID, EINVAL),
    (Bind(file="free", offset=1 << 63), SLOT_INVALID, EINVAL),
    (Bind(file="taken"), BINDING_OVERLAP, EINVAL),
]


def _bind(engine: Engine, bind: Bind, reason: Reason, errno: int) -> None:
    vm, other = (engine.create_vm("sw-protected").info.vm for _ in range(2))
    files = {
        "taken": engine.create_file(vm, 2 * SIZE).info.file,
        "free": engine.create_file(vm, SIZE).info.file,
        "foreign": engine.create_file(other, SIZE).info.file,
        "none": 1 << 20,
    }
    engine.set_memory_region(vm, 0, GUEST_MEMFD, BASE_GPA, SIZE, file=files["taken"])
    engine.set_memory_region(vm, 2, 0, 0, SIZE)
    files["memory"] = slot_of(engine, vm, 2).file
    before = engine.revision
    refusal(
        engine.set_memory_region, vm, bind.slot, bind.flags, bind.gpa, bind.size,
        files[bind.file], bind.offset, bind.userspace_addr, reason=reason, errno=errno,
    )  # fmt: skip
    assert engine.revision == before


@pytest.mark.parametrize(("bind", "reason", "errno"), BINDS)
def test_bind(engine: Engine, bind: Bind, reason: Reason, errno: int) -> None:
    _bind(engine, bind, reason, errno)


def test_a_gpa_overlap_wins_over_a_binding_overlap_in_every_release(
    make_engine: MakeEngine,
) -> None:
    for release in (EINVAL, EEXIST):
        engine = make_engine(binding_overlap_errno=release)
        _bind(engine, Bind(file="taken"), BINDING_OVERLAP, release)
        _bind(engine, Bind(gpa=OVERLAP, file="taken"), SLOT_OVERLAP, EEXIST)


def test_deletion_looks_at_the_shape_only(engine: Engine) -> None:
    guest = make_guest(engine, "sw-protected", NPAGES)
    for field in ("offset", "userspace_addr"):
        odd = {field: 1}
        refusal(
            engine.set_memory_region, guest.vm, 0, GUEST_MEMFD, 0, 0, **odd,
            reason=SLOT_INVALID, errno=EINVAL,
        )  # fmt: skip
    refusal(engine.set_memory_region, guest.vm, 9, 0, 0, 0, reason=NO_SUCH_SLOT, errno=EINVAL)
    engine.set_memory_region(guest.vm, 0, GUEST_MEMFD, 0, 0, file=1 << 20)
    assert not list(file_of(engine, guest.file).bindings.items())


def test_without_a_file_the_files_offset_does_not_count(engine: Engine) -> None:
    vm = engine.create_vm("gup").info.vm
    engine.set_memory_region(vm, 0, 0, 0, SIZE, file=0, offset=1)
    assert slot_of(engine, vm, 0).pgoff == 0


def test_a_slot_outlives_its_closed_file(engine: Engine) -> None:
    guest = make_guest(engine, "sw-protected", NPAGES)
    engine.close_file(guest.file)
    free = engine.create_file(guest.vm, SIZE).info.file
    for slot, reason, errno in ((0, SLOT_IMMUTABLE, EINVAL), (1, SLOT_OVERLAP, EEXIST)):
        refusal(
            engine.set_memory_region, guest.vm, slot, GUEST_MEMFD, BASE_GPA, SIZE, free,
            reason=reason, errno=errno,
        )  # fmt: skip
    engine.set_memory_region(guest.vm, 0, 0, BASE_GPA, 0)


# --- attributes ------------------------------------------------------------------------------
ATTRIBUTES = [
    ((1, SIZE + 1, 1), 1, UNKNOWN_FLAG),
    ((1, 0, 1), 0, ATTRIBUTES_UNSUPPORTED),
    ((1, 0, ATTRIBUTE_PRIVATE), 0, BAD_RANGE),
    ((U64_MAX, SIZE, ATTRIBUTE_PRIVATE), 0, BAD_RANGE),
    ((1, SIZE, ATTRIBUTE_PRIVATE), 0, NOT_PAGE_ALIGNED),
]


@pytest.mark.parametrize(("request_", "flags", "reason"), ATTRIBUTES)
def test_attributes_of_a_vm(
    engine: Engine, request_: tuple[int, int, int], flags: int, reason: Reason
) -> None:
    vm = engine.create_vm("sw-protected", in_place=False).info.vm
    refusal(engine.set_attributes, vm, [request_], flags, reason=reason, errno=EINVAL)


def test_attributes_of_a_vm_without_private_memory(engine: Engine) -> None:
    vm = engine.create_vm("gup").info.vm
    private = [(0, SIZE, ATTRIBUTE_PRIVATE)]
    refusal(engine.set_attributes, vm, private, reason=ATTRIBUTES_UNSUPPORTED, errno=EINVAL)
    # the other value is a no-op
    before = engine.revision
    assert engine.set_attributes(vm, [(0, SIZE, 0)]) == 1
    assert engine.revision == before


@pytest.mark.parametrize(
    ("request_", "flags", "reason"),
    [
        *ATTRIBUTES,
        pytest.param((SIZE, 1, ATTRIBUTE_PRIVATE), 0, NOT_PAGE_ALIGNED, id="before the end"),
        pytest.param((SIZE, PAGE_SIZE, ATTRIBUTE_PRIVATE), 0, BAD_RANGE, id="the end"),
    ],
)
def test_attributes_of_a_file(
    engine: Engine, request_: tuple[int, int, int], flags: int, reason: Reason
) -> None:
    guest = make_guest(engine, "sw-protected", NPAGES)
    error = refusal(engine.convert_file, guest.file, *request_, flags, reason=reason, errno=EINVAL)
    assert error.details.error_offset is None


@pytest.mark.parametrize("attributes", [0, ATTRIBUTE_PRIVATE])
def test_a_file_of_a_vm_without_private_memory(engine: Engine, attributes: int) -> None:
    guest = make_guest(engine, "gup", NPAGES, in_place=True)
    refusal(
        engine.convert_file, guest.file, 0, SIZE, attributes,
        reason=ATTRIBUTES_UNSUPPORTED, errno=EINVAL,
    )  # fmt: skip


def test_each_personality_refuses_the_others_call_before_all_else(engine: Engine) -> None:
    by_vm = make_guest(engine, "sw-protected", NPAGES, in_place=False)
    in_place = make_guest(engine, "sw-protected", NPAGES, in_place=True)
    wrong = (1, 0, 1)
    refusal(engine.convert_file, by_vm.file, *wrong, 1, reason=WRONG_PERSONALITY, errno=ENOTTY)
    refusal(engine.set_attributes, in_place.vm, [wrong], 1, reason=WRONG_PERSONALITY, errno=ENOTTY)


# --- the host's mapping ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "offset", "length", "reason", "errno"),
    [
        pytest.param(0, 0, 0, BAD_RANGE, EINVAL, id="length before MMAP"),
        pytest.param(0, -1, 1, BAD_RANGE, EINVAL, id="offset before MMAP"),
        pytest.param(0, SIZE, 1, NOT_MAPPABLE, ENODEV, id="MMAP before the fault"),
        pytest.param(FLAG_MMAP, SIZE, 1, HOST_SIGBUS, EFAULT, id="past the file, private"),
        pytest.param(FLAG_MMAP, 0, 1, HOST_SIGBUS, EFAULT, id="private"),
    ],
)
def test_host_access(
    engine: Engine, flags: int, offset: int, length: int, reason: Reason, errno: int
) -> None:
    guest = make_guest(engine, "sw-protected", NPAGES, flags=flags)
    refusal(engine.read_shared, guest.file, offset, length, reason=reason, errno=errno)
    data = bytes(length)
    refusal(engine.write_shared, guest.file, offset, data, reason=reason, errno=errno)
    assert guest.pfn(0) < 0


def test_a_host_access_that_leaves_the_file_touches_nothing(engine: Engine) -> None:
    guest = make_guest(engine, "sw-protected", NPAGES, flags=FLAG_MMAP | FLAG_INIT_SHARED)
    refusal(
        guest.host_write, SIZE - PAGE_SIZE, bytes(2 * PAGE_SIZE), reason=HOST_SIGBUS, errno=EFAULT
    )
    assert guest.pfn(NPAGES - 1) < 0


def test_the_memory_behind_an_ordinary_slot_is_not_closed_as_a_file(engine: Engine) -> None:
    vm = engine.create_vm("gup").info.vm
    engine.set_memory_region(vm, 0, 0, 0, 4 * PAGE_SIZE)
    (file,) = [file.info.file for file in engine.core.files.all()]
    engine.pre_fault(vm, 0, PAGE_SIZE)
    refusal(engine.close_file, file, reason=BAD_REQUEST, errno=EINVAL)
    engine.set_memory_region(vm, 0, 0, 0, 0)
    assert not engine.core.files.exists(file)
