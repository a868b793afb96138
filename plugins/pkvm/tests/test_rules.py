"""The rules of pkvm.md §8 that apply, by number, through the hooks where the engine meets them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from rmemd.errors import Refused, RmemError
from rmemd.hooks import (
    AccessCode,
    Agent,
    CallAction,
    Content,
    GuestCall,
    HostAccess,
    Pin,
    Runs,
    Why,
)
from rmemd.testing.hookbench import HookBench, runs
from rmemd_pkvm import PkvmPlatform
from rmemd_pkvm.hypercalls import El2, frames

GFN, PFN = 0x100, 20
VARIANTS = ("pkvm-today", "pkvm-gmem")


def _a(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


class Lab:
    """A host with one protected VM."""

    def __init__(self, variant: str) -> None:
        self.platform = PkvmPlatform()
        self.bench = HookBench(self.platform, "pkvm", nframes=64)
        self.vm = self.bench.make_vm(variant)
        self.ops = self.bench.ops(self.vm)

    @property
    def el2(self) -> El2:
        return self.platform.el2

    def run(self, op: Any, *args: Any) -> Any:
        return self.bench.run(self.vm, op, *args)

    def map(self, gfn: int = GFN, pfn: int = PFN, npages: int = 1) -> Runs:
        mapped = runs(gfn, pfn, npages)
        self.run(self.ops.map, mapped)
        return mapped

    def call(self, call: GuestCall, *gfns: int, level: int = 0) -> Any:
        return self.run(self.ops.guest_call, 0, call, _a(*gfns), level)

    def names(self, *gfns: int) -> list[str]:
        assert self.ops.page_state is not None
        states = self.ops.page_state(_a(*gfns), _a(*gfns))
        return [states.names[code] for code in states.codes]

    def host(self, *pfns: int) -> list[int]:
        return list(self.el2.host_states(_a(*pfns)))

    def touch(self, agent: Agent, *pfns: int, write: bool = False) -> Any:
        return self.run(self.bench.platform.host_access, _a(*pfns), HostAccess(agent, write))

    def bytes_named(self) -> list[tuple[str, list[int]]]:
        return [(op.kind, op.pfns.tolist()) for op in self.bench.byte_ops]


@pytest.fixture(params=VARIANTS)
def lab(request: pytest.FixtureRequest) -> Lab:
    return Lab(request.param)


@pytest.fixture
def today() -> Lab:
    return Lab("pkvm-today")


@pytest.fixture
def gmem() -> Lab:
    return Lab("pkvm-gmem")


@contextmanager
def refused(lab: Lab, status: str, number: int) -> Iterator[None]:
    """Expect a refusal that carries the kernel's errno, and an untouched state."""
    with lab.bench.unchanged(), pytest.raises(RmemError) as caught:
        yield
    details = caught.value.details
    assert (details.vendor_status, details.vendor_value) == (status, -number)
    assert caught.value.errno == number
    assert details.rule
    assert details.state


# --- rules 1 to 8: donation and sharing ----------------------------------------------------------
def test_rule_1_donating_a_frame_that_is_not_owned_is_eperm_and_nothing_changes(lab: Lab) -> None:
    lab.run(lab.el2.call, "host_donate_hyp", frames(_a(PFN + 1)))
    with refused(lab, "-EPERM", 1):
        lab.map(npages=2)
    assert lab.names(GFN) == ["NOPAGE"]


def test_rule_1_a_frame_donated_to_one_guest_is_not_donated_to_another(lab: Lab) -> None:
    lab.map()
    other = lab.bench.make_vm("pkvm-gmem")
    with refused(lab, "-EPERM", 1):
        lab.bench.run(other, lab.bench.ops(other).map, runs(GFN, PFN))


def test_rule_2_an_occupied_ipa_takes_no_other_frame(lab: Lab) -> None:
    lab.map()
    with refused(lab, "-EPERM", 1):
        lab.map(pfn=PFN + 1)


def test_rule_2_the_same_frame_at_the_same_ipa_is_a_lost_race_and_done(lab: Lab) -> None:
    lab.map()
    with lab.bench.unchanged():
        lab.map()


@pytest.mark.parametrize("state", ["unknown", "unloaded", "protected", "not protected"])
def test_rule_3_no_loaded_vcpu_or_the_wrong_kind_of_vm_is_einval(lab: Lab, state: str) -> None:
    el2, kind = lab.el2, state != "not protected"
    handle = lab.run(el2.init_vm, kind)
    if state != "unloaded":
        lab.run(el2.vcpu_load, handle, 0)
    call = el2.host_share_guest if state == "protected" else el2.host_donate_guest
    with refused(lab, "-EINVAL", 22):
        lab.run(call, 0x4242 if state == "unknown" else handle, _a(PFN), _a(GFN))


def test_rule_4_no_table_memory_is_enomem_before_mutation_and_succeeds_later(lab: Lab) -> None:
    lab.bench.injections["__pkvm_host_donate_guest"] = "-ENOMEM"
    with refused(lab, "-ENOMEM", 12):
        lab.map()
    lab.map()
    assert lab.names(GFN) == ["OWNED"]


@pytest.mark.parametrize(("gfns", "pfns"), [((1, 2), (3, 3)), ((1, 1), (3, 4))])
def test_rule_5_a_request_that_names_a_page_twice_is_einval(
    lab: Lab, gfns: tuple[int, ...], pfns: tuple[int, ...]
) -> None:
    with refused(lab, "-EINVAL", 22):
        lab.run(lab.ops.map, Runs(_a(*gfns), _a(*pfns), _a(1, 1)))


def test_rule_6_a_frame_beyond_ram_is_eperm(lab: Lab) -> None:
    with refused(lab, "-EPERM", 1):
        lab.run(lab.el2.call, "host_share_hyp", frames(_a(64)))


def test_rule_7_shares_are_counted_and_the_frame_is_owned_after_the_last(lab: Lab) -> None:
    el2 = lab.el2
    handle = lab.run(el2.init_vm, False)
    lab.run(el2.vcpu_load, handle, 0)
    for gfn in (1, 2):
        lab.run(el2.host_share_guest, handle, _a(PFN), _a(gfn))
    with refused(lab, "-EPERM", 1):
        lab.run(el2.host_share_guest, handle, _a(PFN), _a(2))
    lab.run(el2.host_unshare_guest, handle, _a(1))
    assert lab.host(PFN) == [1]
    lab.run(el2.host_unshare_guest, handle, _a(2))
    assert lab.host(PFN) == [0]


def test_rule_7_a_full_share_counter_is_ebusy(lab: Lab) -> None:
    el2 = lab.el2
    handle = lab.run(el2.init_vm, False)
    lab.run(el2.vcpu_load, handle, 0)
    lab.run(el2.host_share_guest, handle, _a(PFN), _a(1))
    table: Any = lab.bench.space.tables["platform/pkvm/host_share_guest_count"]
    lab.run(lambda tx: tx.put(table, _a(PFN), (1 << 32) - 1))
    with refused(lab, "-EBUSY", 16):
        lab.run(el2.host_share_guest, handle, _a(PFN), _a(2))


def test_rule_8_unsharing_an_unmapped_gfn_is_enoent_and_a_protected_vm_einval(lab: Lab) -> None:
    handle = lab.run(lab.el2.init_vm, False)
    with refused(lab, "-ENOENT", 2):
        lab.run(lab.el2.host_unshare_guest, handle, _a(GFN))
    protected = lab.run(lab.el2.init_vm, True)
    with refused(lab, "-EINVAL", 22):
        lab.run(lab.el2.host_unshare_guest, protected, _a(GFN))


def test_rule_9_pins_of_el2_keep_a_share_and_references_keep_a_donation(lab: Lab) -> None:
    frame = frames(_a(PFN))
    for call in ("host_share_hyp", "hyp_pin_shared_mem", "hyp_pin_shared_mem"):
        lab.run(lab.el2.call, call, frame)
    for _ in range(2):
        with refused(lab, "-EBUSY", 16):
            lab.run(lab.el2.call, "host_unshare_hyp", frame)
        with refused(lab, "-EPERM", 1):
            lab.run(lab.el2.call, "hyp_donate_host", frame)
        lab.run(lab.el2.call, "hyp_unpin_shared_mem", frame)
    lab.run(lab.el2.call, "host_unshare_hyp", frame)
    lab.run(lab.el2.call, "host_donate_hyp", frame)
    table: Any = lab.bench.space.tables["platform/pkvm/hyp_refcount"]
    lab.run(lambda tx: tx.put(table, _a(PFN), 1))
    with refused(lab, "-EBUSY", 16):
        lab.run(lab.el2.call, "hyp_donate_host", frame)


# --- rule 10: the guest's calls ------------------------------------------------------------------
def test_rule_10_sharing_an_unmapped_page_faults_and_is_repeated(lab: Lab) -> None:
    with lab.bench.unchanged():
        answer = lab.call(GuestCall.SHARE, GFN)
    assert (answer.action, answer.done) == (CallAction.FAULT, 0)
    lab.map()
    answer = lab.call(GuestCall.SHARE, GFN)
    assert (answer.action, answer.done, answer.status) == (CallAction.CONVERT, 1, 0)
    assert not answer.to_private
    assert (lab.names(GFN), lab.host(PFN)) == (["SHARED_OWNED"], [2])


def test_rule_10_a_repeated_share_and_a_poisoned_one_are_invalid_parameter(lab: Lab) -> None:
    lab.map(npages=2)
    lab.call(GuestCall.SHARE, GFN)
    lab.touch(Agent.HOST_KERNEL, PFN + 1)
    for gfn in (GFN, GFN + 1):
        with lab.bench.unchanged():
            answer = lab.call(GuestCall.SHARE, gfn)
        assert (answer.action, answer.done) == (CallAction.DONE, 0)
        assert (answer.status, answer.status_name) == (-3, "SMCCC_RET_INVALID_PARAMETER")


def test_rule_10_a_run_of_shares_stops_at_the_first_that_fails(lab: Lab) -> None:
    lab.map(npages=3)
    lab.call(GuestCall.SHARE, GFN + 2)
    answer = lab.call(GuestCall.SHARE, GFN, GFN + 1, GFN + 2)
    assert (answer.action, answer.done, answer.status) == (CallAction.CONVERT, 2, -3)
    assert lab.names(GFN, GFN + 1) == ["SHARED_OWNED"] * 2


def test_rule_10_a_run_of_shares_does_what_is_mapped_before_it_faults(lab: Lab) -> None:
    lab.map()
    answer = lab.call(GuestCall.SHARE, GFN, GFN + 1)
    assert (answer.action, answer.done, answer.status) == (CallAction.CONVERT, 1, 0)
    assert lab.call(GuestCall.SHARE, GFN + 1).action is CallAction.FAULT


def test_rule_10_unshare_is_the_inverse_and_only_that(lab: Lab) -> None:
    lab.map()
    assert lab.call(GuestCall.UNSHARE, GFN).status == -3
    lab.call(GuestCall.SHARE, GFN)
    answer = lab.call(GuestCall.UNSHARE, GFN)
    assert (answer.action, answer.done, answer.to_private) == (CallAction.CONVERT, 1, True)
    assert (lab.names(GFN), lab.host(PFN)) == (["OWNED"], [3])


def test_rule_10_a_call_at_2m_is_invalid_and_a_call_of_another_vendor_unknown(lab: Lab) -> None:
    lab.map()
    with lab.bench.unchanged():
        assert lab.call(GuestCall.SHARE, GFN, level=1).status == -3
        for call in (GuestCall.ACCEPT, GuestCall.VALIDATE, GuestCall.RESCIND):
            answer = lab.call(call, GFN)
            assert (answer.action, answer.done) == (CallAction.DONE, 0)
            assert (answer.status, answer.status_name) == (-1, "SMCCC_RET_NOT_SUPPORTED")


def test_relinquish_clears_the_page_and_returns_it_and_skips_what_is_unmapped(lab: Lab) -> None:
    lab.map(npages=2)
    lab.call(GuestCall.SHARE, GFN + 1)
    answer = lab.call(GuestCall.RELINQUISH, GFN - 1, GFN, GFN + 1)
    assert (answer.action, answer.done, answer.status) == (CallAction.DONE, 2, -3)
    assert lab.bytes_named() == [("scrub", [PFN])]
    assert (lab.names(GFN), lab.host(PFN)) == (["NOPAGE"], [0])
    access = lab.run(lab.ops.guest_access, 0, runs(GFN, PFN), False)
    assert access.codes.tolist() == [AccessCode.FAULT]
    lab.map()
    assert lab.names(GFN) == ["OWNED"]


# --- rules 12 to 14: the host touches a page -----------------------------------------------------
def test_rule_12_the_vmm_gets_sigsegv_and_page_and_guest_are_unharmed(lab: Lab) -> None:
    lab.map()
    with lab.bench.unchanged():
        answer = lab.touch(Agent.HOST_USER, PFN, PFN + 1, write=True)
    assert answer.views.tolist() == [3, 0]  # fault, raw
    assert answer.fault == "SIGSEGV, SEGV_ACCERR"
    assert answer.destroyed is None or not answer.destroyed.any()


def test_rule_13_the_kernels_touch_zeroes_the_page_and_poisons_the_ipa(lab: Lab) -> None:
    lab.map(npages=2)
    answer = lab.touch(Agent.HOST_KERNEL, PFN, PFN + 30, PFN + 31)
    assert answer.views.tolist() == [0, 0, 0]
    assert answer.destroyed.tolist() == [True, False, False]
    assert (lab.names(GFN, GFN + 1), lab.host(PFN)) == (["POISON", "OWNED"], [0])
    access = lab.run(lab.ops.guest_access, 0, runs(GFN, PFN, 2), False)
    assert access.codes.tolist() == [AccessCode.EFAULT, AccessCode.OK]
    assert (access.status, access.stop[:7]) == (-14, "-EFAULT")
    with refused(lab, "-EFAULT", 14):
        lab.map(pfn=PFN + 5)


def test_rule_13_the_pin_of_a_poisoned_page_is_still_held(today: Lab) -> None:
    mapped = today.map()
    today.touch(Agent.HOST_KERNEL, PFN)
    assert today.run(today.ops.unpin, mapped).tolist() == [True]
    today.run(today.ops.invalidate_start, mapped, Why.CLOSE)
    assert today.run(today.ops.unpin, mapped).tolist() == [False]


def test_rule_14_force_reclaim_of_host_memory_is_eagain_and_of_el2s_eperm(lab: Lab) -> None:
    lab.map()
    lab.call(GuestCall.SHARE, GFN)
    lab.run(lab.el2.call, "host_donate_hyp", frames(_a(1)))
    with lab.bench.unchanged():
        verdicts = lab.run(lab.el2.host_force_reclaim_page_guest, _a(0, PFN, 1))
        assert verdicts.tolist() == [-11, -11, -1]
        answer = lab.touch(Agent.HOST_KERNEL, 0, PFN, 1)
    assert answer.views.tolist() == [0, 0, 3]
    assert "hypervisor-protected" in answer.fault


def test_rule_14_force_reclaim_finds_each_guest_from_the_frame_alone(lab: Lab) -> None:
    other = lab.bench.make_vm("pkvm-gmem")
    lab.map()
    lab.bench.run(other, lab.bench.ops(other).map, runs(GFN + 1, PFN + 1))
    lab.touch(Agent.HOST_KERNEL, PFN, PFN + 1)
    assert lab.names(GFN, GFN + 1) == ["POISON", "NOPAGE"]
    page_state = lab.bench.ops(other).page_state
    assert page_state is not None
    assert page_state(_a(GFN + 1), _a(PFN + 1)).codes.tolist() == [4]


def test_devices_are_not_checked_because_the_base_tree_programs_no_iommu(lab: Lab) -> None:
    lab.map()
    with lab.bench.unchanged():
        assert lab.touch(Agent.DEVICE, PFN, write=True).views.tolist() == [0]


# --- rules 15 and 16: teardown -------------------------------------------------------------------
def test_rule_15_teardown_is_in_order_and_refuses_while_a_vcpu_is_loaded(lab: Lab) -> None:
    el2 = lab.el2
    handle = lab.run(el2.init_vm, True)
    lab.run(el2.vcpu_load, handle, 0)
    lab.run(el2.host_donate_guest, handle, _a(PFN), _a(GFN))
    with refused(lab, "-EINVAL", 22):  # reclaim before teardown starts
        lab.run(el2.reclaim_dying_guest_page, handle, _a(GFN))
    with refused(lab, "-EINVAL", 22):  # start with a reference
        lab.run(el2.start_teardown_vm, handle)
    lab.run(el2.vcpu_put, handle, 0)
    with refused(lab, "-EINVAL", 22):  # finalize before start
        lab.run(el2.finalize_teardown_vm, handle)
    lab.run(el2.start_teardown_vm, handle)
    with refused(lab, "-EINVAL", 22):  # second start
        lab.run(el2.start_teardown_vm, handle)
    with refused(lab, "-EINVAL", 22):  # nothing is loaded any more
        lab.run(el2.vcpu_load, handle, 0)
    lab.run(el2.reclaim_dying_guest_page, handle, _a(GFN))
    lab.run(el2.finalize_teardown_vm, handle)
    with refused(lab, "-EINVAL", 22):
        lab.run(el2.finalize_teardown_vm, handle)


def test_rule_15_the_vm_is_not_destroyed_under_a_vcpu(lab: Lab) -> None:
    lab.map()
    lab.bench.enter(lab.vm, 0)
    with refused(lab, "-EINVAL", 22):
        lab.bench.destroy(lab.vm)
    lab.run(lab.ops.leave, 0)
    lab.bench.destroy(lab.vm)


def test_rule_16_what_was_owned_is_cleared_first_what_was_shared_is_not(lab: Lab) -> None:
    mapped = lab.map(npages=3)
    lab.call(GuestCall.SHARE, GFN + 1)
    lab.touch(Agent.HOST_KERNEL, PFN + 2)
    lab.run(lab.ops.invalidate_start, mapped, Why.CLOSE)
    assert lab.bytes_named() == [("scrub", [PFN])]
    assert lab.host(PFN, PFN + 1, PFN + 2) == [0, 0, 0]
    assert lab.names(GFN, GFN + 1, GFN + 2) == ["NOPAGE"] * 3


def test_rule_16_destroying_reclaims_what_close_did_not_name(lab: Lab) -> None:
    lab.map(npages=2)
    lab.call(GuestCall.SHARE, GFN + 1)
    lab.run(lab.ops.invalidate_start, runs(GFN, PFN), Why.CLOSE)
    lab.bench.destroy(lab.vm)
    assert lab.bytes_named() == []
    assert lab.run(lab.bench.platform.free, _a(PFN, PFN + 1)).tolist() == [False, False]
    again = lab.bench.make_vm("pkvm-gmem")  # the slot of the VM is free again, and empty
    lab.bench.run(again, lab.bench.ops(again).map, runs(GFN, PFN, 2))


def test_close_of_pages_that_the_guest_never_had_is_nothing(lab: Lab) -> None:
    with lab.bench.unchanged():
        lab.run(lab.ops.invalidate_start, runs(GFN, PFN), Why.CLOSE)
        lab.run(lab.ops.invalidate_end, runs(GFN, PFN), Why.CLOSE, True)


# --- rule 19: invalidations ----------------------------------------------------------------------
@pytest.mark.parametrize("why", [Why.PUNCH, Why.CONVERT, Why.SLOT])
def test_rule_19_an_invalidation_does_not_unmap_a_pinned_page(today: Lab, why: Why) -> None:
    mapped = today.map(npages=2)
    with refused(today, "-EPERM", 1):
        today.run(today.ops.invalidate_start, mapped, why)


@pytest.mark.parametrize("why", [Why.MIGRATE, Why.POISON])
def test_rule_19_blocking_and_poison_leave_leaf_and_pin(today: Lab, why: Why) -> None:
    mapped = today.map()
    with today.bench.unchanged():
        today.run(today.ops.invalidate_start, mapped, why)
        assert today.run(today.ops.unpin, mapped).tolist() == [True]
        today.run(today.ops.invalidate_end, mapped, why, True)


def test_rule_19_the_pin_is_longterm_and_falls_with_the_leaf(today: Lab) -> None:
    mapped = today.map()
    assert today.run(today.ops.pin, mapped) == Pin("protected guest", longterm=True)
    assert today.run(today.ops.unpin, runs(GFN, PFN, 2)).tolist() == [True, False]
    today.call(GuestCall.SHARE, GFN)
    assert today.run(today.ops.unpin, mapped).tolist() == [True]
    today.call(GuestCall.UNSHARE, GFN)
    today.call(GuestCall.RELINQUISH, GFN)
    assert today.run(today.ops.unpin, mapped).tolist() == [False]
    today.run(today.ops.invalidate_start, mapped, Why.PUNCH)


@pytest.mark.parametrize("why", list(Why))
def test_an_empty_pair_is_always_fine_before_the_first_run(lab: Lab, why: Why) -> None:
    nothing = Runs(_a(), _a(), _a())
    with lab.bench.unchanged():
        lab.run(lab.ops.invalidate_start, nothing, why)
        lab.run(lab.ops.invalidate_end, nothing, why, True)


def test_memslots_are_fixed_from_the_first_run_on(lab: Lab) -> None:
    lab.bench.enter(lab.vm, 0)
    lab.run(lab.ops.leave, 0)
    with refused(lab, "-EPERM", 1):
        lab.run(lab.ops.invalidate_start, Runs(_a(), _a(), _a()), Why.SLOT)


def test_rule_20_without_a_pin_punch_takes_the_page_by_force_and_zeroes_it(gmem: Lab) -> None:
    mapped = gmem.map(npages=2)
    gmem.run(gmem.ops.invalidate_start, mapped, Why.PUNCH)
    assert gmem.bytes_named() == [("scrub", [PFN, PFN + 1])]
    assert gmem.names(GFN, GFN + 1) == ["POISON"] * 2
    assert gmem.run(gmem.bench.platform.free, mapped.pfns()).tolist() == [False, False]


@pytest.mark.parametrize("why", [Why.CONVERT, Why.SLOT])
def test_without_a_pin_only_the_guest_gives_a_page_away_still(gmem: Lab, why: Why) -> None:
    mapped = gmem.map()
    with refused(gmem, "-EPERM", 1):
        gmem.run(gmem.ops.invalidate_start, mapped, why)


# --- conversion and content ----------------------------------------------------------------------
def test_conversion_preserves_and_only_the_guest_shares_or_unshares(lab: Lab) -> None:
    mapped = lab.map()
    fresh = runs(GFN + 8, PFN + 8)
    for to_private in (True, False):
        assert lab.run(lab.ops.convert, fresh, to_private) is Content.PRESERVED
    with refused(lab, "-EPERM", 1):
        lab.run(lab.ops.convert, mapped, False)
    lab.call(GuestCall.SHARE, GFN)
    assert lab.run(lab.ops.convert, mapped, False) is Content.PRESERVED
    with refused(lab, "-EPERM", 1):
        lab.run(lab.ops.convert, mapped, True)
    lab.call(GuestCall.UNSHARE, GFN)
    assert lab.run(lab.ops.convert, mapped, True) is Content.PRESERVED


def test_donation_keeps_what_was_converted_and_zeroes_what_never_was(lab: Lab) -> None:
    keys: Any = lab.bench.space.tables["host/key"]
    vm_keys: Any = lab.bench.space.tables["host/vm_keys"]
    keys.apply("put", (_a(PFN), vm_keys[lab.vm]))
    lab.map(npages=2)
    assert lab.bytes_named() == [("zero", [PFN + 1])]


def test_free_refuses_what_the_host_does_not_own(lab: Lab) -> None:
    lab.map(npages=2)
    lab.call(GuestCall.SHARE, GFN)
    frees = lab.run(lab.bench.platform.free, _a(PFN, PFN + 1, PFN + 2))
    assert frees.tolist() == [True, True, False]


def test_rule_18_poison_is_a_signal_and_kills_when_consumed(lab: Lab) -> None:
    mapped = lab.map()
    with lab.bench.unchanged():
        assert lab.run(lab.ops.error, mapped, False) == ""
        assert "SIGBUS" in lab.run(lab.ops.error, mapped, True)


# --- rules 22 and 23: the hook of the thread -----------------------------------------------------
def test_rule_22_todays_migrate_folio_is_null(today: Lab) -> None:
    assert today.ops.migrate_folio is None


def test_rule_23_both_annotations_change_hands_and_the_old_frame_is_cleared(gmem: Lab) -> None:
    mapped = gmem.map(npages=2)
    gmem.run(gmem.ops.invalidate_start, mapped, Why.MIGRATE)
    gmem.run(
        gmem.ops.migrate_folio, _a(GFN, GFN + 1, GFN + 9), _a(PFN, PFN + 1, 30), _a(40, 41, 42)
    )
    named = [(op.kind, (op.src if op.src is not None else op.pfns).tolist(), op.pfns.tolist())
             for op in gmem.bench.byte_ops]  # fmt: skip
    assert named == [
        ("relocate", [PFN, PFN + 1], [40, 41]),
        ("relocate", [30], [42]),
        ("scrub", [PFN, PFN + 1], [PFN, PFN + 1]),
    ]
    assert [op.key_id for op in gmem.bench.byte_ops[:2]] == [1, 0]
    assert gmem.host(PFN, PFN + 1, 40, 41, 42) == [0, 0, 3, 3, 0]
    gmem.touch(Agent.HOST_KERNEL, 41)  # the annotation names gfn and VM at the new frame
    assert gmem.names(GFN, GFN + 1) == ["OWNED", "POISON"]


def test_rule_23_a_move_that_fails_leaves_the_source_mapped_and_owned(gmem: Lab) -> None:
    gmem.map(npages=2)
    gmem.run(gmem.el2.call, "host_donate_hyp", frames(_a(41)))
    with refused(gmem, "-EPERM", 1):
        gmem.run(gmem.ops.migrate_folio, _a(GFN, GFN + 1), _a(PFN, PFN + 1), _a(40, 41))
    gmem.bench.injections["__pkvm_host_move_guest"] = "-EAGAIN"
    with refused(gmem, "-EAGAIN", 11):
        gmem.run(gmem.ops.migrate_folio, _a(GFN), _a(PFN), _a(42))
    assert gmem.names(GFN) == ["OWNED"]


# --- variants ------------------------------------------------------------------------------------
def test_the_variants_differ_in_pin_and_migrate_folio_and_in_nothing_else() -> None:
    today, gmem = (Lab(v).ops.implemented() for v in VARIANTS)
    differing = {op for op in today if today[op] != gmem[op]}
    assert differing == {"pin", "unpin", "migrate_folio"}
    assert today["pin"]
    assert gmem["migrate_folio"]
    null = {op for op, there in today.items() if not there} - {"migrate_folio"}
    assert null == {"prepare", "populate", "finalize", "resume"}


def test_both_convert_in_place_and_have_private_memory() -> None:
    for variant in PkvmPlatform().variants():
        assert (variant.personalities, variant.private_memory) == (("in-place",), True)
        assert variant.name in VARIANTS


def test_el2_takes_255_vms_and_gives_a_slot_back(lab: Lab) -> None:
    for _ in range(254):
        lab.bench.make_vm("pkvm-today")
    with refused(lab, "-ENOMEM", 12):
        lab.bench.make_vm("pkvm-today")
    lab.bench.destroy(7)
    lab.bench.make_vm("pkvm-today")


def test_an_unknown_variant_is_not_found() -> None:
    bench = HookBench(PkvmPlatform(), "pkvm", nframes=4)
    with pytest.raises(RmemError) as caught:
        bench.make_vm("pkvm-tomorrow")
    assert not isinstance(caught.value, Refused)
    assert caught.value.reason.name == "NO_SUCH_CONSUMER"
