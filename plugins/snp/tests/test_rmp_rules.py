"""snp.md §9 rules 1 to 12, 21, 24: the RMP, the CPU's checks and the frames that go back."""

import numpy as np
import pytest

from rmemd.errors import RmemError
from rmemd.hooks import (
    HOST_VIEWS,
    AccessCode,
    Agent,
    CallAction,
    Content,
    GuestCall,
    HostView,
    PageKind,
    Runs,
    Why,
)
from rmemd_snp.rmp import OVERLAP_RETRIES
from rmemd_snp.tables import ASSIGNED, IMMUTABLE, VALIDATED, VMSA

OK, FAULT, EXCEPTION = AccessCode.OK, AccessCode.FAULT, AccessCode.EXCEPTION


def arr(*numbers):
    return np.array(numbers, dtype=np.int64)


@pytest.mark.parametrize(
    ("name", "bits", "asid", "gpa"),
    [
        ("Hypervisor", 0, 0, 0),
        ("HV-Fixed", IMMUTABLE, 0, 0),
        ("Reclaim", ASSIGNED, 0, 0),
        ("Firmware", ASSIGNED | IMMUTABLE, 0, 0),
        ("Context", ASSIGNED | IMMUTABLE | VMSA, 0, 0),
        ("Metadata", ASSIGNED | IMMUTABLE, 0, 7),
        ("Metadata", ASSIGNED | IMMUTABLE | VMSA, 0, 7),
        ("Pre-Guest", ASSIGNED | IMMUTABLE, 3, 0),
        ("Pre-Swap", ASSIGNED | IMMUTABLE | VALIDATED, 3, 9),
        ("Guest-Invalid", ASSIGNED, 3, 0),
        ("Guest-Valid", ASSIGNED | VALIDATED | VMSA, 3, 9),
    ],
)
def test_states_are_named_as_section_1_does(host, name, bits, asid, gpa):
    host.poke(5, bits=bits, asid=asid, gpa=gpa)
    vm = host.vm()
    answer = host.bench.ops(vm).page_state(arr(0), arr(5))
    assert answer.names[answer.codes[0]] == name == host.state(5)


def test_rule_1_rmpupdate_of_an_immutable_entry_is_fail_permission(host):
    host.leaf(host.rmp.rmpupdate, arr(3), ASSIGNED | IMMUTABLE, 7, 1)
    with host.refused("FAIL_PERMISSION", 2, "EINVAL") as caught:
        host.leaf(host.rmp.rmpupdate, arr(2, 3), ASSIGNED, 7, 1)
    assert caught.value.details.page == "pfn 0x3"
    assert caught.value.details.state == "Pre-Guest"
    assert caught.value.details.rule == "snp.md §9 rule 1"


@pytest.mark.parametrize(
    ("bits", "gpa", "asid", "kept"),
    [
        (ASSIGNED, 7, 1, True),
        (ASSIGNED | IMMUTABLE, 7, 1, True),
        (ASSIGNED, 8, 1, False),
        (ASSIGNED, 7, 2, False),
        (0, 0, 0, False),
    ],
)
def test_rule_2_only_immutable_may_change_without_losing_validated(host, bits, gpa, asid, kept):
    host.poke(3, bits=ASSIGNED | VALIDATED | VMSA, gpa=7, asid=1, vmpl=0x030201)
    host.leaf(host.rmp.rmpupdate, arr(3), bits, gpa, asid)
    extra = VALIDATED | VMSA if kept else 0
    assert host.rmp.bits.at(3) == bits | extra
    assert host.rmp.vmpl.at(3) == (0x030201 if kept else 0)
    assert (host.rmp.gpa.at(3), host.rmp.asid.at(3)) == (gpa, asid)


@pytest.mark.parametrize(("bits", "after"), [(VALIDATED, "Pre-Swap"), (0, "Pre-Guest")])
def test_rule_3_immutable_only_update(host, bits, after):
    host.poke(3, bits=ASSIGNED | bits, gpa=7, asid=1)
    host.leaf(host.rmp.rmpupdate, arr(3), ASSIGNED | IMMUTABLE, 7, 1)
    assert host.state(3) == after


@pytest.mark.parametrize(("gpa", "asid", "bits"), [(1, 0, 0), (0, 1, 0), (0, 0, IMMUTABLE)])
def test_open_point_an_unassigned_entry_must_be_zero(host, gpa, asid, bits):
    with host.refused("FAIL_PERMISSION", 2, "EINVAL"):
        host.leaf(host.rmp.rmpupdate, arr(3), bits, gpa, asid)


def test_rule_4_overlap_is_repeated_and_then_gives_up(host, monkeypatch):
    asked = []
    monkeypatch.setattr(
        host.bench, "injected", lambda tx, vm, point: asked.append(point) or "FAIL_OVERLAP"
    )
    with host.refused("FAIL_OVERLAP", 4, "EINVAL"):
        host.leaf(host.rmp.rmpupdate, arr(3), ASSIGNED, 7, 1)
    assert asked == ["RMPUPDATE"] * (OVERLAP_RETRIES + 1)


def test_rule_4_one_overlap_is_repeated_and_succeeds(host):
    vm = host.vm()
    host.bench.injections["RMPUPDATE"] = "FAIL_OVERLAP"
    host.prepare(vm, [7], [3])
    assert host.state(3) == "Guest-Invalid"
    assert not host.bench.injections


def test_rule_5_the_vmsa_of_a_running_vcpu_is_in_use(host):
    vm = host.vm()
    host.populate(vm, [7], [3], [PageKind.VMSA])
    host.run(vm, "finalize")
    host.bench.enter(vm, 0)
    with host.refused("FAIL_INUSE", 3, "EINVAL") as caught:
        host.run(vm, "migrate_folio", arr(7), arr(3), arr(4))
    assert caught.value.reason.name == "SNP_RMP_IN_USE"
    assert host.free([3]) == [True]
    host.run(vm, "invalidate_start", Runs(arr(), arr(), arr()), Why.MIGRATE)
    assert host.bench.inside[vm] == []
    host.run(vm, "migrate_folio", arr(7), arr(3), arr(4))
    host.bench.enter(vm, 0)
    assert (host.rmp.in_use.at(3), host.rmp.in_use.at(4)) == (0, 1)


@pytest.mark.parametrize("change", ["bits", "immutable", "asid"])
def test_vmrun_refuses_a_vmsa_that_is_no_longer_one(host, change):
    vm = host.vm()
    host.populate(vm, [7], [3], [PageKind.VMSA])
    host.run(vm, "finalize")
    bits = ASSIGNED | VALIDATED
    host.poke(
        3,
        **{
            "bits": {"bits": bits},
            "immutable": {"bits": bits | VMSA | IMMUTABLE},
            "asid": {"asid": 9},
        }[change],
    )
    with host.refused("VMEXIT_INVALID", -1, ""):
        host.bench.enter(vm, 0)


def test_rule_6_host_writes_to_assigned_pages_fault(host):
    vm = host.vm()
    host.prepare(vm, [7], [3])
    answer = host.host([2, 3], write=True)
    assert [HOST_VIEWS[view] for view in answer.views] == [HostView.RAW, HostView.FAULT]
    assert answer.fault == "#PF (RMP, error bit 31)"
    assert "IOMMU" in host.host([3], write=True, agent=Agent.DEVICE).fault
    host.free([3])
    answer = host.host([3], write=True)
    assert (answer.views.tolist(), answer.fault) == ([HOST_VIEWS.index(HostView.RAW)], "")


@pytest.mark.parametrize(("hiding", "view"), [("0", HostView.RAW), ("1", HostView.ONES)])
def test_rule_7_host_reads_give_ciphertext_or_ones(host, hiding, view):
    host.prepare(host.vm(), [7], [3])
    vm = host.vm(ciphertext_hiding=hiding)
    host.prepare(vm, [7], [4])
    answer = host.host([2, 3, 4], write=False)
    assert [HOST_VIEWS[v] for v in answer.views] == [HostView.RAW, HostView.RAW, view]


@pytest.mark.parametrize(
    "forged",
    [
        {"asid": 2},
        {"gpa": 8},
        {"bits": ASSIGNED | VALIDATED | IMMUTABLE},
        {"bits": 0},
        {"bits": VALIDATED},
        {"asid": 2, "bits": ASSIGNED},
    ],
)
def test_rule_8_wrong_asid_gpa_or_immutable_is_npf_before_validated(host, forged):
    vm = host.vm(finalized=True)
    host.fault(vm, [7], [3])
    host.call(vm, GuestCall.VALIDATE, 7)
    assert host.access(vm, [7], [3]).codes.tolist() == [OK]
    host.poke(3, **forged)
    for write in (False, True):
        answer = host.access(vm, [7], [3], write)
        assert (answer.codes.tolist(), answer.exception) == ([FAULT], None)


def test_rule_9_unvalidated_is_vc_404(host):
    vm = host.vm(finalized=True)
    host.fault(vm, [7, 8], [3, 4])
    host.call(vm, GuestCall.VALIDATE, 8)
    answer = host.access(vm, [6, 7, 8], [2, 3, 4], write=True)
    assert answer.codes.tolist() == [FAULT, EXCEPTION, OK]
    assert (answer.exception.vector, answer.exception.code) == ("#VC", 0x404)


def test_rule_11_pvalidate_to_the_current_value_is_cf_1(host):
    vm = host.vm(finalized=True)
    host.fault(vm, [7, 8], [3, 4])
    first = host.call(vm, GuestCall.VALIDATE, 7)
    assert (first.action, first.done, first.status, first.status_name) == (
        CallAction.DONE, 1, 0, "SUCCESS",
    )  # fmt: skip
    again = host.call(vm, GuestCall.VALIDATE, 7)
    assert (again.done, again.status, again.status_name) == (1, 0, "SUCCESS CF=1")
    assert host.states(3, 4) == ["Guest-Valid", "Guest-Invalid"]
    both = host.call(vm, GuestCall.VALIDATE, 7, 2)
    assert (both.done, both.status_name) == (2, "SUCCESS CF=1")
    assert host.call(vm, GuestCall.RESCIND, 7, 2).status_name == "SUCCESS"
    assert host.states(3, 4) == ["Guest-Invalid", "Guest-Invalid"]


def test_rule_12_pvalidate_2m_on_4k_entries(host):
    vm = host.vm(finalized=True)
    host.fault(vm, [512, 513], [3, 4])
    answer = host.call(vm, GuestCall.VALIDATE, 512, 512, level=1)
    assert (answer.action, answer.done, answer.status, answer.status_name) == (
        CallAction.DONE, 0, 6, "FAIL_SIZEMISMATCH",
    )  # fmt: skip
    unaligned = host.call(vm, GuestCall.VALIDATE, 513, 512, level=1)
    assert (unaligned.done, unaligned.status, unaligned.status_name) == (0, 1, "FAIL_INPUT")
    nowhere = host.call(vm, GuestCall.VALIDATE, 1025, 512, level=1)
    assert nowhere.status == 1, "alignment is checked before the mapping"
    assert host.call(vm, GuestCall.VALIDATE, 1024, 512, level=1).action is CallAction.FAULT
    assert host.states(3, 4) == ["Guest-Invalid", "Guest-Invalid"]


def test_pvalidate_stops_at_the_first_page_without_a_mapping(host):
    vm = host.vm(finalized=True)
    host.fault(vm, [7, 8, 10], [3, 4, 6])
    answer = host.call(vm, GuestCall.VALIDATE, 7, 4)
    assert (answer.action, answer.done) == (CallAction.FAULT, 2)
    assert host.states(3, 4, 6) == ["Guest-Valid", "Guest-Valid", "Guest-Invalid"]
    host.fault(vm, [9], [5])
    assert host.call(vm, GuestCall.VALIDATE, 9, 2).done == 2


@pytest.mark.parametrize("forged", [{"asid": 2}, {"gpa": 8}, {"bits": ASSIGNED | IMMUTABLE}])
def test_pvalidate_of_a_foreign_or_immutable_entry_is_npf(host, forged):
    vm = host.vm(finalized=True)
    host.fault(vm, [7], [3])
    host.poke(3, **forged)
    with host.bench.unchanged():
        answer = host.call(vm, GuestCall.VALIDATE, 7)
    assert (answer.action, answer.done) == (CallAction.FAULT, 0)


def test_pvalidate_code_can_be_injected(host):
    vm = host.vm(finalized=True)
    host.fault(vm, [7], [3])
    host.bench.injections["PVALIDATE"] = "FAIL_SIZEMISMATCH"
    assert host.call(vm, GuestCall.VALIDATE, 7).status == 6
    assert host.state(3) == "Guest-Invalid"


def test_injecting_a_code_that_does_not_exist_is_refused(host):
    vm = host.vm()
    host.bench.injections["RMPUPDATE"] = "FAIL_SILLY"
    with host.bench.unchanged(), pytest.raises(RmemError, match="FAIL_SILLY"):
        host.prepare(vm, [7], [3])


def test_page_state_changes_exit_to_the_vmm(host):
    vm = host.vm(finalized=True)
    for call, to_private in ((GuestCall.SHARE, False), (GuestCall.UNSHARE, True)):
        answer = host.call(vm, call, 7, 3)
        assert (answer.action, answer.to_private) == (CallAction.HYPERCALL, to_private)


@pytest.mark.parametrize("call", [GuestCall.ACCEPT, GuestCall.RELINQUISH])
def test_calls_of_other_vendors_are_unknown(host, call):
    vm = host.vm(finalized=True)
    with host.bench.unchanged():
        answer = host.call(vm, call, 7)
    assert (answer.action, answer.exception.vector) == (CallAction.EXCEPTION, "#UD")


def test_prepare_takes_assigned_frames_as_they_are(host):
    one, two = host.vm(finalized=True), host.vm(finalized=True)
    host.fault(one, [7], [3])
    host.call(one, GuestCall.VALIDATE, 7)
    with host.bench.unchanged():
        host.prepare(two, [9], [3])
    host.prepare(two, [9, 10], [3, 4])
    assert host.states(3, 4) == ["Guest-Valid", "Guest-Invalid"]
    assert (host.rmp.asid.at(4), host.rmp.gpa.at(4)) == (host.asid(two), 10)
    assert host.access(two, [9], [3]).codes.tolist() == [FAULT]


def test_prepare_reports_einval_and_undoes_all(host):
    vm = host.vm()
    host.poke(4, bits=IMMUTABLE)
    with host.refused("FAIL_PERMISSION", 2, "EINVAL") as caught:
        host.prepare(vm, [7, 8], [3, 4])
    assert caught.value.details.state == "HV-Fixed"


@pytest.mark.parametrize("why", [Why.PUNCH, Why.CONVERT, Why.POISON, Why.SLOT, Why.CLOSE])
def test_a_zap_changes_no_rmp_entry(host, why):
    vm = host.vm(finalized=True)
    host.fault(vm, [7], [3])
    host.call(vm, GuestCall.VALIDATE, 7)
    host.bench.enter(vm, 0)
    runs = Runs(arr(7), arr(3), arr(1))
    host.run(vm, "invalidate_start", runs, why)
    host.run(vm, "invalidate_end", runs, why, True)
    assert host.state(3) == "Guest-Valid"
    assert host.bench.inside[vm] == [], "the flush kicks vCPUs"
    assert host.call(vm, GuestCall.VALIDATE, 7).action is CallAction.FAULT


def test_convert_in_place_is_noise_both_ways(host):
    vm = host.vm(finalized=True)
    host.fault(vm, [7], [3])
    runs = Runs(arr(7), arr(3), arr(1))
    assert host.run(vm, "convert", runs, False) is Content.NOISE
    assert host.state(3) == "Hypervisor"
    assert host.host([3], write=True).views.tolist() == [HOST_VIEWS.index(HostView.RAW)]
    with host.bench.unchanged():
        assert host.run(vm, "convert", runs, True) is Content.NOISE


def test_convert_to_shared_of_an_immutable_entry_is_refused(host):
    vm = host.vm(finalized=True)
    host.prepare(vm, [7, 8], [3, 4])
    host.poke(4, bits=ASSIGNED | IMMUTABLE)
    with host.refused("FAIL_PERMISSION", 2, "EINVAL"):
        host.run(vm, "convert", Runs(arr(7), arr(3), arr(2)), False)


def test_error_stops_the_vm_only_if_the_guest_consumed_it(host):
    vm = host.vm(finalized=True)
    runs = Runs(arr(7), arr(3), arr(1))
    with host.bench.unchanged():
        assert host.run(vm, "error", runs, False) == ""
        assert "#MC" in host.run(vm, "error", runs, True)


def test_rule_24_a_frame_whose_rmpupdate_fails_is_leaked(host):
    vm = host.vm()
    host.prepare(vm, [7, 8, 9], [3, 4, 5])
    host.poke(4, bits=ASSIGNED | IMMUTABLE)
    assert host.free([2, 3, 4, 5]) == [False, False, True, False]
    assert host.states(2, 3, 4, 5) == ["Hypervisor", "Hypervisor", "Pre-Guest", "Hypervisor"]


@pytest.mark.parametrize("code", ["FAIL_PERMISSION", "FAIL_INUSE", "FAIL_INPUT"])
def test_rule_24_by_injection(host, code):
    vm = host.vm()
    host.prepare(vm, [7, 8], [3, 4])
    host.bench.injections["RMPUPDATE"] = code
    assert host.free([2, 3, 4]) == [False, True, False]
    assert host.states(3, 4) == ["Guest-Invalid", "Hypervisor"]


def test_freeing_unassigned_frames_asks_nothing(host):
    host.bench.injections["RMPUPDATE"] = "FAIL_PERMISSION"
    host.poke(4, bits=IMMUTABLE)
    with host.bench.unchanged():
        assert host.free([3, 4]) == [False, False]


def test_a_frame_named_twice_is_refused(host):
    vm = host.vm()
    with host.bench.unchanged(), pytest.raises(RmemError, match="twice"):
        host.prepare(vm, [7, 8], [3, 3])
