"""Rules of the vendors that only show when engine and plugin work together."""

from __future__ import annotations

import pytest
from guests import KEEP, Guest, make_engine
from helpers import refusal

from rmemd.engine import invariants
from rmemd.engine.engine import Engine
from rmemd.engine.programme import Instruction, Opcode, Pattern
from rmemd.engine.vcpu import Exit
from rmemd.errors import BAD_REQUEST, MEMLOCK, NOT_FINALIZED, NOT_PRIVATE
from rmemd.hooks.tables import same_state
from rmemd.hooks.types import Agent
from rmemd.model.files import FLAG_MMAP
from rmemd.model.vms import READONLY
from rmemd.units import PAGE_SIZE

EINVAL, EFAULT, ENOMEM = 22, 14, 12


def test_pkvm_rule_11_a_refused_unshare_is_invalid_parameter_and_changes_nothing(
    engine: Engine,
) -> None:
    guest = Guest(engine, "pkvm-gmem")
    guest.write(0, 1, seed=5)
    assert guest.run(guest.do(Opcode.SHARE, 0)).vcpu.call_status == 0
    pin = engine.pin(guest.file, 0, PAGE_SIZE, "DMA", "nic")
    engine.set_programme(guest.vm, 0, (guest.do(Opcode.UNSHARE, 0),))
    before = engine.core.space.snapshot()
    exited = engine.run_vcpu(guest.vm, 0)
    assert exited.reason is Exit.HLT
    assert (exited.vcpu.call_status, exited.vcpu.call_status_name) == (
        -3, "SMCCC_RET_INVALID_PARAMETER",
    )  # fmt: skip
    assert same_state(before, engine.core.space.snapshot()) == [f"vm/{guest.vm}/vcpus"]
    engine.unpin(pin)
    assert guest.run(guest.do(Opcode.UNSHARE, 0)).vcpu.call_status == 0
    assert guest.holds(0, 1, seed=5)
    assert invariants.check(engine.core) == []


def test_pkvm_rule_13_a_poisoned_ipa_fails_the_run_and_the_vm_lives(engine: Engine) -> None:
    guest = Guest(engine, "pkvm-today")
    guest.write(0, 2, seed=5)
    pfn = int(guest.pfns(0)[0])
    assert engine.read_physical(pfn, 1, Agent.HOST_KERNEL) == bytes(PAGE_SIZE)
    exited = guest.check(0, 1, seed=5)
    assert (exited.reason, exited.errno) == (Exit.NONE, EFAULT)
    assert guest.holds(1, 1, seed=5)
    assert engine.core.vms.get(guest.vm).info.state != "dead"


def test_pkvm_rule_17_a_page_that_was_relinquished_is_charged_once(engine: Engine) -> None:
    vm = engine.create_vm("pkvm-today", memlock_pages=1).info.vm
    file = engine.create_file(vm, 2 * PAGE_SIZE, FLAG_MMAP).info.file
    engine.set_memory_region(vm, 0, 4, 0, 2 * PAGE_SIZE, file)
    engine.create_vcpu(vm, 0)
    relinquish = Instruction(Opcode.RELINQUISH, 0, PAGE_SIZE)
    write = Instruction(Opcode.WRITE, 0, PAGE_SIZE, Pattern.BYTE, 7, private=True)
    engine.set_programme(vm, 0, (write, relinquish, write))
    assert engine.run_vcpu(vm, 0).reason is Exit.HLT
    refusal(engine.pre_fault, vm, PAGE_SIZE, PAGE_SIZE, reason=MEMLOCK, errno=ENOMEM)


def test_pkvm_converts_in_place_only(engine: Engine) -> None:
    refused = refusal(
        engine.create_vm, "pkvm-gmem", in_place=False, reason=BAD_REQUEST, errno=EINVAL
    )
    assert refused.details.field == "personality"


@pytest.mark.parametrize("consumer", ["tdx-today", "snp-move"])
def test_a_vcpu_does_not_run_before_finalize(engine: Engine, consumer: str) -> None:
    guest = Guest(engine, consumer, finalized=False)
    touch = guest.do(Opcode.TOUCH, 0)
    refusal(guest.run, touch, reason=NOT_FINALIZED, errno=EINVAL)
    assert int(guest.pfns(0)[0]) < 0


@pytest.mark.parametrize("consumer", ["tdx-today", "snp-move"])
def test_populating_without_a_slot_is_einval(engine: Engine, consumer: str) -> None:
    guest = Guest(engine, consumer, finalized=False)
    refusal(guest.populate, guest.npages, bytes(PAGE_SIZE), reason=NOT_PRIVATE, errno=EINVAL)


def test_tdx_rule_08_accept_zeroes_whatever_the_page_held(engine: Engine) -> None:
    guest = Guest(engine, "tdx-today")
    guest.fault(0)
    pfn = int(guest.pfns(0)[0])
    engine.write_physical(pfn, b"\xa5" * PAGE_SIZE, Agent.HOST_KERNEL, bus=True)
    guest.accept(0)
    exited = guest.check(0, 1, seed=0, pattern=Pattern.BYTE, value=0)
    assert (exited.reason, exited.vcpu.mismatched) == (Exit.HLT, 0)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_conversion_leaves_the_pages_that_are_so_already(engine: Engine, in_place: bool) -> None:
    """KVM zaps what has the old attribute only; a TD would lose a page that is removed."""
    guest = Guest(engine, "tdx-today", in_place=in_place)
    guest.fill(0, 4, seed=1)
    guest.convert(1, 1, private=False)
    guest.convert(0, 4, private=True)
    assert guest.holds(0, 1, seed=1)
    assert guest.holds(2, 2, seed=1)
    assert int(guest.pfns(1)[0]) < 0


def test_tdx_rule_07_an_unaccepted_page_with_ve_disabled_kills_the_vm() -> None:
    engine = make_engine()
    guest = Guest(engine, "tdx-today", config={"sept_ve_disable": "1"})
    guest.accept(0)
    exited = guest.write(0, 2, seed=1)
    assert exited.reason is Exit.SHUTDOWN
    assert "-EIO" in exited.text
    assert engine.core.vms.get(guest.vm).info.state == "dead"
    engine.close()


def test_snp_an_instruction_of_another_vendor_is_undefined(engine: Engine) -> None:
    guest = Guest(engine, "snp-move")
    exited = guest.run(guest.do(Opcode.ACCEPT, 0))
    assert exited.reason is Exit.SHUTDOWN
    assert "#UD" in exited.text


def test_writes_to_a_read_only_slot_are_mmio(engine: Engine) -> None:
    vm = engine.create_vm("gup").info.vm
    engine.set_memory_region(vm, 0, READONLY, 0, PAGE_SIZE)
    engine.create_vcpu(vm, 0)
    touch = Instruction(Opcode.TOUCH, 0, PAGE_SIZE)
    write = Instruction(Opcode.WRITE, 0x10, 4)
    engine.set_programme(vm, 0, (touch, write))
    exited = engine.run_vcpu(vm, 0)
    assert (exited.reason, exited.gpa, exited.size) == (Exit.MMIO, 0x10, 4)
    assert exited.vcpu.instructions == 1


def test_a_share_stops_at_the_end_of_its_slot(engine: Engine) -> None:
    guest = Guest(engine, "pkvm-gmem", npages=4)
    other = engine.create_file(guest.vm, 4 * PAGE_SIZE, FLAG_MMAP).info.file
    engine.set_memory_region(guest.vm, 1, 4, guest.gpa(4), 4 * PAGE_SIZE, other)
    guest.write(0, 8, seed=3)
    assert guest.run(guest.do(Opcode.SHARE, 2, 4)).vcpu.call_status == 0
    core = engine.core
    assert core.files.get(guest.file).attributes.slice(0, 4).tolist() == [1, 1, 0, 0]
    assert core.files.get(other).attributes.slice(0, 4).tolist() == [0, 0, 1, 1]
    assert invariants.check(core) == []


def test_allocation_before_the_fault_changes_nothing_for_the_guest(engine: Engine) -> None:
    guest = Guest(engine, "tdx-today")
    assert engine.fallocate(guest.file, KEEP, 0, 4 * PAGE_SIZE) == 4
    guest.accept(0, 4)
    guest.write(0, 4, seed=9)
    assert guest.holds(0, 4, seed=9)


@pytest.mark.parametrize("consumer", ["pkvm-today", "pkvm-gmem"])
def test_a_guest_that_shared_pages_gives_every_frame_back(engine: Engine, consumer: str) -> None:
    free = engine.core.host.counts()
    guest = Guest(engine, consumer)
    guest.write(0, 4, seed=1)
    assert guest.run(guest.do(Opcode.SHARE, 1, 2)).vcpu.call_status == 0
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)
    assert engine.core.host.counts() == free
    assert invariants.check(engine.core) == []
