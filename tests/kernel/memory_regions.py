"""Runners for set_memory_region_test.c: memslots and the bindings of restricted files."""

from __future__ import annotations

from collections.abc import Callable
from errno import EEXIST, EINVAL

from helpers import (
    BASE_GPA,
    Guest,
    check,
    file_of,
    halted,
    make_guest,
    refusal,
    slot_of,
    touch,
    vm_of,
)
from kernel.catalogue import Bench, runs

from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.programme import Instruction, Opcode
from rmemd.engine.vcpu import Exit, Exited
from rmemd.errors import (
    BINDING_FOREIGN,
    BINDING_OVERLAP,
    NO_SLOT_NUMBERS,
    SLOT_INVALID,
    SLOT_OVERLAP,
)
from rmemd.model.vms import GUEST_MEMFD, LOG_DIRTY, NR_MEMSLOTS, READONLY
from rmemd.units import PAGE_SIZE

FILE = "set_memory_region_test.c"
MB2 = 2 << 20
# the kernel's test spins until it sees a change; so many reads stand for that
SPINS = 8
WITH_FILES = (("sw-protected", True), ("sw-protected", False), ("null", False), ("gup", False))


def _add(
    engine: Engine, vm: int, slot: int, gpa: int, size: int, file: int, offset: int = 0
) -> None:
    engine.set_memory_region(vm, slot, GUEST_MEMFD, gpa, size, file=file, offset=offset)


# --- flags and numbers -----------------------------------------------------------------------
@runs(FILE, "invalid_memory_region_flags", "v2 ioctl with each unsupported bit")
def unsupported_flags(bench: Bench) -> None:
    for consumer, in_place in WITH_FILES:
        vm = bench.engine.create_vm(consumer, in_place=in_place).info.vm
        for flag in [1 << bit for bit in range(32)]:
            if flag & (LOG_DIRTY | READONLY | GUEST_MEMFD):
                continue
            refusal(
                bench.engine.set_memory_region, vm, 0, flag, 0, MB2,
                reason=SLOT_INVALID, errno=EINVAL,
            )  # fmt: skip


def _flags_with_file(bench: Bench, flag: int) -> None:
    for consumer, in_place in WITH_FILES:
        vm = bench.engine.create_vm(consumer, in_place=in_place).info.vm
        file = bench.engine.create_file(vm, MB2).info.file
        error = refusal(
            bench.engine.set_memory_region, vm, 0, GUEST_MEMFD | flag, 0, MB2, file=file,
            reason=SLOT_INVALID, errno=EINVAL,
        )  # fmt: skip
        assert error.details.field == "flags"


@runs(FILE, "invalid_memory_region_flags",
      "private attribute supported: GUEST_MEMFD with dirty logging")  # fmt: skip
def dirty_log_with_file(bench: Bench) -> None:
    _flags_with_file(bench, LOG_DIRTY)


@runs(FILE, "invalid_memory_region_flags",
      "private attribute supported: GUEST_MEMFD with read-only")  # fmt: skip
def read_only_with_file(bench: Bench) -> None:
    _flags_with_file(bench, READONLY)


@runs(FILE, "add_max_memory_regions", "KVM_CAP_NR_MEMSLOTS")
def slot_limit(bench: Bench) -> None:
    assert NR_MEMSLOTS > 0


@runs(FILE, "add_max_memory_regions", "fill every slot number below the limit")
def every_slot(bench: Bench) -> None:
    vm = bench.engine.create_vm("gup").info.vm
    for slot in range(NR_MEMSLOTS):
        bench.engine.set_memory_region(vm, slot, 0, slot * MB2, MB2)
    assert len(vm_of(bench.engine, vm).slots) == NR_MEMSLOTS


@runs(FILE, "add_max_memory_regions", "one slot more")
def one_slot_more(bench: Bench) -> None:
    vm = bench.engine.create_vm("gup").info.vm
    bench.engine.set_memory_region(vm, NR_MEMSLOTS - 1, 0, 0, MB2)
    refusal(
        bench.engine.set_memory_region, vm, NR_MEMSLOTS, 0, MB2, MB2,
        reason=NO_SLOT_NUMBERS, errno=EINVAL,
    )  # fmt: skip


# --- whose file ------------------------------------------------------------------------------
@runs(FILE, "add_private_memory_region", "bind an ordinary memfd")
def bind_ordinary_memory(bench: Bench) -> None:
    for consumer, in_place in WITH_FILES:
        vm = bench.engine.create_vm(consumer, in_place=in_place).info.vm
        # the memory behind an ordinary slot is the one kind of file that is no restricted one
        bench.engine.set_memory_region(vm, 0, 0, 0, MB2)
        memory = slot_of(bench.engine, vm, 0).file
        refusal(_add, bench.engine, vm, 1, MB2, MB2, memory, reason=BINDING_FOREIGN, errno=EINVAL)


@runs(FILE, "add_private_memory_region", "bind a guest_memfd of another VM")
def bind_foreign(bench: Bench) -> None:
    for consumer, in_place in WITH_FILES:
        vm, other = (bench.engine.create_vm(consumer, in_place=in_place).info.vm for _ in "12")
        file = bench.engine.create_file(other, MB2).info.file
        refusal(_add, bench.engine, vm, 0, 0, MB2, file, reason=BINDING_FOREIGN, errno=EINVAL)


@runs(FILE, "add_private_memory_region",
      "bind that file in its own VM, then close it and free the VM")  # fmt: skip
def bind_in_its_own(bench: Bench) -> None:
    for consumer, in_place in WITH_FILES:
        vm, other = (bench.engine.create_vm(consumer, in_place=in_place).info.vm for _ in "12")
        file = bench.engine.create_file(other, MB2).info.file
        refusal(_add, bench.engine, vm, 0, 0, MB2, file, reason=BINDING_FOREIGN, errno=EINVAL)
        _add(bench.engine, other, 0, 0, MB2, file)
        _close_then_destroy(bench.engine, other, file)
        bench.engine.destroy_vm(vm)


def _close_then_destroy(engine: Engine, vm: int, file: int) -> None:
    engine.close_file(file)
    assert slot_of(engine, vm, 0).file == file
    engine.destroy_vm(vm)
    assert not engine.core.vms.exists(vm)


@runs(FILE, "add_private_memory_region", "bind with every offset 1..page-1")
def bind_odd_offsets(bench: Bench) -> None:
    vm = bench.engine.create_vm("sw-protected").info.vm
    file = bench.engine.create_file(vm, MB2).info.file
    for offset in range(1, PAGE_SIZE):
        error = refusal(
            _add, bench.engine, vm, 0, 0, MB2, file, offset, reason=SLOT_INVALID, errno=EINVAL
        )
        assert error.details.field == "file_offset_bytes"


@runs(FILE, "add_private_memory_region",
      "bind own file at offset 0, close the fd before the VM")  # fmt: skip
def bind_own(bench: Bench) -> None:
    for consumer, in_place in WITH_FILES:
        vm = bench.engine.create_vm(consumer, in_place=in_place).info.vm
        file = bench.engine.create_file(vm, MB2).info.file
        _add(bench.engine, vm, 0, 0, MB2, file)
        assert len(file_of(bench.engine, file).bindings) == 1
        _close_then_destroy(bench.engine, vm, file)


# --- overlaps --------------------------------------------------------------------------------
def _halves(engine: Engine, consumer: str, in_place: bool) -> tuple[int, int]:
    """Bind the halves of a file of 4 MiB side by side, and delete the first."""
    vm = engine.create_vm(consumer, in_place=in_place).info.vm
    file = engine.create_file(vm, 2 * MB2).info.file
    _add(engine, vm, 0, BASE_GPA, MB2, file)
    _add(engine, vm, 1, BASE_GPA + MB2, MB2, file, MB2)
    # as with fd -1: deletion looks at neither file nor gpa
    engine.set_memory_region(vm, 0, 0, BASE_GPA, 0, file=-1)
    return vm, file


def _overlapping(bench: Bench, add: Callable[[Engine, int, int], None], gpa_overlaps: bool) -> None:
    by_default = Options(nframes=512).binding_overlap_errno
    # 6.18's answer, unless configured (DESIGN §4)
    assert by_default == EINVAL
    for wanted in (EINVAL, EEXIST):
        engine = bench.make_engine(binding_overlap_errno=wanted)
        for consumer, in_place in WITH_FILES:
            vm, file = _halves(engine, consumer, in_place)
            if gpa_overlaps:
                refusal(add, engine, vm, file, reason=SLOT_OVERLAP, errno=EEXIST)
            else:
                refusal(add, engine, vm, file, reason=BINDING_OVERLAP, errno=wanted)


@runs(FILE, "add_overlapping_private_memory_regions",
      "two adjacent halves of one file in two slots; delete the "
      "first with size 0 and fd -1")  # fmt: skip
def halves(bench: Bench) -> None:
    for consumer, in_place in WITH_FILES:
        vm, file = _halves(bench.engine, consumer, in_place)
        assert [n for n, _ in vm_of(bench.engine, vm).slots.items()] == [1]
        assert [b.slot for _, b in file_of(bench.engine, file).bindings.items()] == [1]


@runs(FILE, "add_overlapping_private_memory_regions",
      "re-add with file range over the front half of the other binding, gpa free")  # fmt: skip
def overlap_file_front(bench: Bench) -> None:
    _overlapping(bench, lambda e, vm, f: _add(e, vm, 0, BASE_GPA, MB2, f, MB2 // 2), False)


@runs(FILE, "add_overlapping_private_memory_regions", "same over the back half")
def overlap_file_back(bench: Bench) -> None:
    gpa = BASE_GPA - MB2
    _overlapping(bench, lambda e, vm, f: _add(e, vm, 0, gpa, MB2 // 2, f, MB2 + MB2 // 2), False)


@runs(FILE, "add_overlapping_private_memory_regions",
      "re-add with gpa range over the front half of the other slot, file range free")  # fmt: skip
def overlap_gpa_front(bench: Bench) -> None:
    _overlapping(bench, lambda e, vm, f: _add(e, vm, 0, BASE_GPA + MB2 // 2, MB2, f), True)


@runs(FILE, "add_overlapping_private_memory_regions", "same over the back half (2)")
def overlap_gpa_back(bench: Bench) -> None:
    gpa = BASE_GPA + MB2 + MB2 // 2
    _overlapping(bench, lambda e, vm, f: _add(e, vm, 0, gpa, MB2, f), True)


# --- slots in use ----------------------------------------------------------------------------
def _during_a_run(guest: Guest, change: Callable[[], None], *programme: Instruction) -> Exited:
    """Make a change to the VM while the programme loops in the guest; return its exit."""
    steps = 0

    def hold(step: str) -> None:
        nonlocal steps
        steps += step == "guest"
        if step == "guest" and steps == SPINS:
            change()

    loop = Instruction(Opcode.LOOP, value=0, times=4 * SPINS)
    guest.engine.core.hold = hold
    try:
        return guest.run(*programme, loop)
    finally:
        guest.engine.core.hold = None
        assert steps >= SPINS


def _region(bench: Bench) -> Guest:
    return make_guest(bench.engine, "gup", MB2 // PAGE_SIZE, restricted=False)


def _move(guest: Guest, gpa: int) -> None:
    guest.engine.set_memory_region(guest.vm, 0, 0, gpa, guest.size)


def _misaligned(bench: Bench) -> Guest:
    """Move a slot by one page while the guest reads its first page, then write 2 there."""
    guest = _region(bench)
    read = check(guest.gpa, 8, 0, private=False)
    exited = _during_a_run(guest, lambda: _move(guest, guest.gpa - PAGE_SIZE), read)
    # 0 or MMIO, before and after: no other value
    assert exited.reason in (Exit.HLT, Exit.MMIO)
    assert exited.vcpu.mismatched == 0
    guest.host_write(0, b"\x02" * 8)
    assert guest.sees(0, 8, 0, private=False)
    return guest


@runs(FILE, "move_memory_region",
      "slot-zap quirk on, and off where it can be disabled: move a "
      "slot in use by one page")  # fmt: skip
def move_slot(bench: Bench) -> None:
    guest = _misaligned(bench)
    # the value is where the slot has gone
    assert guest.sees(-PAGE_SIZE, 8, 2, private=False)


@runs(FILE, "move_memory_region", "same: move back")
def move_back(bench: Bench) -> None:
    guest = _misaligned(bench)
    guest.host_write(0, b"\x01" * 8)
    read = touch(guest.gpa, 8, private=False)
    exited = _during_a_run(guest, lambda: _move(guest, guest.gpa), read)
    assert exited.reason in (Exit.HLT, Exit.MMIO)
    assert guest.sees(0, 8, 1, private=False)


def _delete(guest: Guest) -> None:
    guest.engine.set_memory_region(guest.vm, 0, 0, guest.gpa, 0)


def _delete_in_use(guest: Guest) -> None:
    """Delete the slot while the guest reads 8 bytes of its third page."""
    at = guest.gpa + 2 * PAGE_SIZE
    exited = _during_a_run(guest, lambda: _delete(guest), touch(at, 8, private=False))
    assert (exited.reason, exited.gpa, exited.size) == (Exit.MMIO, at, 8)


@runs(FILE, "delete_memory_region", "same two modes: delete a slot in use")
def delete_slot(bench: Bench) -> None:
    _delete_in_use(_region(bench))


@runs(FILE, "delete_memory_region", "recreate it")
def recreate_slot(bench: Bench) -> None:
    guest = _region(bench)
    guest.fill(0, guest.size, 0xAA, private=False)
    _delete_in_use(guest)
    bench.engine.set_memory_region(guest.vm, 0, 0, guest.gpa, guest.size)
    assert guest.sees(0, guest.size, 0, private=False)


@runs(FILE, "delete_memory_region", "delete it again")
def delete_again(bench: Bench) -> None:
    guest = _region(bench)
    for _ in range(2):
        _delete_in_use(guest)
        bench.engine.set_memory_region(guest.vm, 0, 0, guest.gpa, guest.size)
        halted(guest.run(touch(guest.gpa, guest.size, private=False)))
