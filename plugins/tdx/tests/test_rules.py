"""The minimum rules of tdx.md §9, each under its number; the rest of the sections beside them."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest

from rmemd.hooks import (
    HOST_VIEWS,
    AccessCode,
    Agent,
    CallAction,
    GuestCall,
    HostAccess,
    HostView,
    Runs,
    Why,
)
from rmemd.testing.hookbench import runs
from rmemd_tdx import leaves


def i64(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


def accept(host: Any, *gfns: int, level: int = 0) -> Any:
    return host.run(host.ops.guest_call, 0, GuestCall.ACCEPT, i64(*gfns), level)


def codes(host: Any, page: Runs, write: bool = True) -> list[int]:
    return [int(c) for c in host.run(host.ops.guest_access, 0, page, write).codes]


ZERO_PAGE = np.zeros((1, 4096), dtype=np.uint8)
MRTD_ZERO = (
    "236f0efa607ff8843f1855d7ef80dc3dda8fb455787a186b8787212951eab009"
    "6e3193bb26f817c2b63c21f5e10f9938"
)
MRTD_PATTERN = (
    "1d6a39508485f397068c05784a4b63a370570e76aece69da8d9803c7ec110b31"
    "872fb82a115e9bb2ba454fad78293be6"
)


# --- MRTD (§8) ----------------------------------------------------------------------------------
def test_mrtd_of_a_zero_page_at_gpa_0(host: Any) -> None:
    host.populate(runs(0, 10), ZERO_PAGE)
    assert host.finalize().hex() == MRTD_ZERO


def test_mrtd_of_a_patterned_page_at_gpa_1000(host: Any) -> None:
    page = ((7 * np.arange(4096) + 3) & 255).astype(np.uint8).reshape(1, 4096)
    host.populate(runs(1, 10), page)
    assert host.finalize().hex() == MRTD_PATTERN


def test_mrtd_does_not_depend_on_batches_but_on_order_and_measure(make_host: Any) -> None:
    pages = np.arange(3 * 4096, dtype=np.uint32).astype(np.uint8).reshape(3, 4096)

    def digest(*batches: tuple[int, int], measure: bool = True) -> bytes:
        host = make_host()
        for first, n in batches:
            host.populate(runs(first, 10 + first, n), pages[first : first + n], measure)
        return bytes(host.finalize())

    assert digest((0, 3)) == digest((0, 1), (1, 2)) != digest((1, 2), (0, 1))
    assert digest((0, 3)) != digest((0, 3), measure=False)


def test_mrtd_falls_back_with_an_undone_populate(host: Any) -> None:
    page = runs(0, 10)
    host.refused(host.ops.populate, runs(0, 10), np.array([2], np.uint8), True, ZERO_PAGE)

    def undone(tx: Any) -> None:
        host.ops.populate(tx, runs(5, 15), np.array([1], np.uint8), True, ZERO_PAGE)
        raise KeyError("the engine changed its mind")

    with host.bench.unchanged(), pytest.raises(KeyError):
        host.run(undone)
    host.populate(page, ZERO_PAGE)
    assert host.finalize().hex() == MRTD_ZERO


def test_mrtd_that_was_lost_cannot_be_extended_but_closed(host: Any) -> None:
    host.populate(runs(0, 10), ZERO_PAGE)
    host.td.streams.clear()
    kinds = np.array([1], np.uint8)
    refusal = host.refused(host.ops.populate, runs(1, 11), kinds, True, ZERO_PAGE)
    assert refusal.reason.name == "TDX_MEASUREMENT_LOST"
    assert host.finalize().hex() == MRTD_ZERO


# --- the rules (§9) -----------------------------------------------------------------------------
@pytest.mark.parametrize("leaf", [leaves.add, leaves.aug])
def test_rule_01_one_hpa_never_backs_two_gpas(host: Any, leaf: Any) -> None:
    host.leaf(leaf, i64(0), i64(10))
    assert host.status(leaf, i64(1), i64(10)) == "TDX_PAGE_METADATA_INCORRECT|R8"
    assert host.status(leaf, i64(1, 2), i64(11, 11)) == "TDX_PAGE_METADATA_INCORRECT|R8"
    # the entry's state is looked at before the page
    assert host.status(leaf, i64(0), i64(10)) == "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"


def test_rule_01_relocate_to_a_used_page(make_running: Any) -> None:
    host = make_running("tdx-relocate")
    relocate = leaves.relocate
    # the page that is given is looked at last
    assert host.status(relocate, i64(0), i64(11)) == "TDX_GPA_RANGE_NOT_BLOCKED|RCX"
    host.leaf(leaves.block, i64(0))
    assert host.status(relocate, i64(0), i64(11)) == "TDX_TLB_TRACKING_NOT_DONE|RCX"
    host.leaf(leaves.track)
    assert host.status(relocate, i64(0), i64(11)) == "TDX_PAGE_METADATA_INCORRECT|R8"


def test_rule_02_add_after_finalize(running: Any) -> None:
    assert running.status(leaves.add, i64(9), i64(20)) == "TDX_OP_STATE_INCORRECT"
    refusal = running.refused(
        running.ops.populate, runs(9, 20), np.array([1], np.uint8), True, ZERO_PAGE
    )
    assert (refusal.reason.name, refusal.errno_name) == ("NOT_PAUSED", "EINVAL")


def test_rule_03_extend(host: Any) -> None:
    host.leaf(leaves.add, i64(0), i64(10))
    host.leaf(leaves.aug, i64(1), i64(11))
    assert host.status(leaves.extend, i64(0x100)) == "TDX_SUCCESS"
    assert host.status(leaves.extend, i64(0x80)) == "TDX_OPERAND_INVALID|RCX"
    for absent in (0x1000, 0x2000):
        assert host.status(leaves.extend, i64(0, absent)) == "TDX_EPT_ENTRY_NOT_PRESENT|RCX"
    host.leaf(leaves.block, i64(0))
    assert host.status(leaves.extend, i64(0)) == "TDX_EPT_ENTRY_NOT_PRESENT|RCX"


def test_rule_04_finalize_without_a_vcpu(make_host: Any) -> None:
    refusal = (lonely := make_host(vcpus=0)).refused(lonely.ops.finalize)
    assert refusal.details.vendor_status == "TDX_NO_VCPUS"
    assert refusal.details.vendor_value == 0xC000060900000000
    assert refusal.errno_name == "EIO"


@pytest.mark.parametrize("state", ["MAPPED", "PENDING"])
def test_rule_06_aug_over_a_used_entry(host: Any, state: str) -> None:
    host.force(0, 10, state)
    assert host.status(leaves.aug, i64(0), i64(20)) == "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"


def test_rule_07_access_before_accept(running: Any) -> None:
    assert codes(running, runs(0, 10, 2)) == [AccessCode.OK, AccessCode.EXCEPTION]
    answer = running.run(running.ops.guest_access, 0, runs(1, 11), False)
    assert (answer.exception.vector, answer.exception.code) == ("#VE", 48)


def test_rule_07_access_before_accept_with_ve_disabled(make_running: Any) -> None:
    host = make_running(sept_ve_disable="1")
    assert codes(host, runs(0, 10)) == [AccessCode.OK]
    host.bench.enter(host.vm, 0)
    answer = host.run(host.ops.guest_access, 0, runs(0, 10, 2), False)
    assert list(answer.codes) == [AccessCode.OK, AccessCode.STOP]
    # the accepted page is executed first, and the engine asks again: the TD lives until then
    assert not host.bench.space.tables[f"vm/{host.vm}/tdx/td"]["BUGGED"]
    answer = host.run(host.ops.guest_access, 0, runs(1, 11), False)
    assert list(answer.codes) == [AccessCode.STOP]
    assert "-EIO" in answer.stop
    refusal = host.refused(host.ops.enter, 1)
    assert (refusal.reason.name, refusal.errno_name) == ("VM_DEAD", "EIO")


def test_rule_08_accept_zeroes_and_is_not_repeated(running: Any) -> None:
    answer = accept(running, 1)
    assert (answer.action, answer.done, answer.status) == (CallAction.DONE, 1, 0)
    (op,) = running.bench.byte_ops
    assert (op.kind, op.pfns.tolist(), op.key_id) == ("zero", [11], running.td.fields["KEY"])
    again = accept(running, 1)
    assert (again.done, again.status) == (0, 0x00000B0A00000000)
    assert again.status_name == "TDX_PAGE_ALREADY_ACCEPTED|0"
    assert running.bench.byte_ops == []


def test_rule_09_accept_where_it_cannot(running: Any) -> None:
    assert accept(running, 5).action is CallAction.FAULT
    running.block(runs(1, 11))
    assert accept(running, 1).action is CallAction.FAULT
    # 2M over 4K children, then over nothing
    mismatch = accept(running, *range(512), level=1)
    assert (mismatch.done, mismatch.status) == (0, 0xC0000B0B00000001)
    assert accept(running, *range(512, 1024), level=1).action is CallAction.FAULT
    running.force(6, 20, "REMOVED")
    assert accept(running, 6).status == 0xC0000B0B00000000


def test_rule_09_accept_keeps_what_it_did(running: Any) -> None:
    running.run(running.ops.map, runs(2, 12, 2))
    answer = accept(running, 1, 2, 3, 4, 5)
    assert (answer.action, answer.done) == (CallAction.FAULT, 3)
    assert [running.state(gfn) for gfn in range(1, 5)] == ["MAPPED"] * 3 + ["FREE"]
    running.run(running.ops.map, runs(4, 14, 2))
    running.force(5, 15, "MAPPED")
    answer = accept(running, 4, 5)
    assert (answer.action, answer.done, answer.status_name) == (
        CallAction.DONE,
        1,
        "TDX_PAGE_ALREADY_ACCEPTED|0",
    )


@pytest.mark.parametrize(("gfns", "level"), [((1,), 2), (tuple(range(1, 513)), 1), ((1 << 39,), 0)])
def test_accept_of_a_bad_operand(running: Any, gfns: tuple[int, ...], level: int) -> None:
    assert accept(running, *gfns, level=level).status == 0xC000010000000001


def test_rule_10_remove_unblocked(host: Any, running: Any) -> None:
    host.leaf(leaves.add, i64(0), i64(10))
    assert host.status(leaves.remove, i64(0)) == "TDX_SUCCESS"
    assert running.status(leaves.remove, i64(0)) == "TDX_GPA_RANGE_NOT_BLOCKED|RCX"
    with pytest.raises(Exception, match="0xc0000b0600000001"):
        running.leaf(leaves.remove, i64(0))


@pytest.mark.parametrize("leaf", ["remove", "relocate"])
class TestTracking:
    """Rules 11 and 12 hold for REMOVE and RELOCATE alike."""

    def test_rule_11_blocked_without_track(self, running: Any, leaf: str) -> None:
        running.leaf(leaves.block, i64(0))
        assert self.attempt(running, leaf) == "TDX_TLB_TRACKING_NOT_DONE|RCX"
        running.leaf(leaves.track)
        assert self.attempt(running, leaf) == "TDX_SUCCESS"

    def test_rule_12_tracked_with_a_vcpu_inside(self, running: Any, leaf: str) -> None:
        running.run(running.ops.enter, 0)
        running.leaf(leaves.block, i64(0))
        running.leaf(leaves.track)
        assert self.attempt(running, leaf) == "TDX_TLB_TRACKING_NOT_DONE|RCX"
        # one that enters now sees the new epoch and does no harm
        running.run(running.ops.enter, 1)
        running.run(running.ops.leave, 0)
        assert self.attempt(running, leaf) == "TDX_SUCCESS"

    def test_a_bepoch_of_migration_is_never_tracked(self, running: Any, leaf: str) -> None:
        running.leaf(leaves.block, i64(0))
        running.leaf(leaves.track)
        running.run(lambda tx: tx.put(running.td.pamt.bepoch, i64(10), 1 << 63))
        assert self.attempt(running, leaf) == "TDX_TLB_TRACKING_NOT_DONE|RCX"

    def attempt(self, host: Any, leaf: str) -> str:
        args = (i64(0), i64(20)) if leaf == "relocate" else (i64(0),)
        return str(host.status(getattr(leaves, leaf), *args))


def test_rule_13_second_track_with_a_straggler(running: Any) -> None:
    running.run(running.ops.enter, 0)
    assert running.status(leaves.track) == "TDX_SUCCESS"
    assert running.status(leaves.track) == "TDX_PREVIOUS_TLB_EPOCH_BUSY"
    running.run(running.ops.leave, 0)
    assert running.status(leaves.track) == "TDX_SUCCESS"


def test_rule_14_block_twice(running: Any) -> None:
    running.leaf(leaves.block, i64(0))
    stamped = running.td.pamt.bepoch.at(10)
    running.leaf(leaves.track)
    assert running.status(leaves.block, i64(1, 0)) == "TDX_GPA_RANGE_ALREADY_BLOCKED|RCX"
    assert running.td.pamt.bepoch.at(10) == stamped


def test_rule_15_unblock(running: Any) -> None:
    unblock = leaves.unblock
    assert running.status(unblock, i64(0)) == "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"
    running.leaf(leaves.block, i64(0, 1))
    assert running.status(unblock, i64(0, 1)) == "TDX_TLB_TRACKING_NOT_DONE|SEPT_TREE"
    running.leaf(leaves.track)
    running.leaf(unblock, i64(0, 1))
    assert [running.state(0), running.state(1)] == ["MAPPED", "PENDING"]
    assert running.bench.byte_ops == []


def test_rule_16_relocate(make_running: Any) -> None:
    host = make_running("tdx-relocate")
    # the same HPA is refused before anybody asks whether it is blocked
    assert host.status(leaves.relocate, i64(0), i64(10)) == "TDX_OPERAND_INVALID|R8"
    host.block(runs(0, 10, 2))
    assert codes(host, runs(0, 10, 2)) == [AccessCode.FAULT] * 2
    host.run(host.ops.migrate_folio, i64(0, 1), i64(10, 11), i64(20, 21))
    moved, scrubbed = host.bench.byte_ops
    assert (moved.kind, moved.src.tolist(), moved.pfns.tolist(), moved.key_id) == (
        "relocate", [10], [20], host.td.fields["KEY"],
    )  # fmt: skip
    assert (scrubbed.kind, scrubbed.pfns.tolist()) == ("scrub", [10, 11])
    assert [host.state(0), host.state(1)] == ["MAPPED", "PENDING"]
    assert [host.pt(pfn) for pfn in (10, 11, 20, 21)] == [0, 0, 3, 3]
    host.run(host.ops.invalidate_end, runs(0, 20, 2), Why.MIGRATE, True)
    assert host.free(10, 11, 20, 21) == [False, False, True, True]
    assert codes(host, runs(0, 20)) == [AccessCode.OK]
    accept(host, 1)
    assert host.bench.byte_ops[0].pfns.tolist() == [21]
    host.zap(runs(0, 20, 2))
    assert host.free(20, 21) == [False, False]


def test_rule_16_what_the_td_never_had_moves_as_it_is(make_running: Any) -> None:
    host = make_running("tdx-relocate")
    host.run(host.ops.migrate_folio, i64(7), i64(30), i64(31))
    (moved,) = host.bench.byte_ops
    assert (moved.kind, moved.src.tolist(), moved.pfns.tolist(), moved.key_id) == (
        "relocate", [30], [31], 0,
    )  # fmt: skip
    assert [host.pt(30), host.pt(31)] == [0, 0]


def test_rule_16_a_move_that_fails_is_unblocked(make_running: Any) -> None:
    host = make_running("tdx-relocate")
    host.block(runs(0, 10, 2))
    host.refused(host.ops.migrate_folio, i64(0, 1), i64(10, 11), i64(20, 11))
    host.run(host.ops.invalidate_end, runs(0, 10, 2), Why.MIGRATE, False)
    assert [host.state(0), host.state(1)] == ["MAPPED", "PENDING"]
    # an end whose start was undone has nothing to unblock
    host.run(host.ops.invalidate_end, runs(0, 10, 2), Why.MIGRATE, False)
    assert host.td.fields["BUGGED"] == 0


@pytest.mark.parametrize("leaf", ["add", "aug", "block", "unblock", "remove", "relocate"])
def test_rule_17_level_and_gpa(host: Any, leaf: str) -> None:
    pages = (i64(20),) if leaf in ("add", "aug", "relocate") else ()
    function = getattr(leaves, leaf)
    for gfn, level in ((0, 1), (1 << 39, 0), (-1, 0)):
        assert host.status(function, i64(gfn), *pages, level) == "TDX_OPERAND_INVALID|RCX"


def test_rule_18_the_key_has_integrity_and_poison_is_fatal(running: Any) -> None:
    spec = running.bench.space.tables["host/keys"].get(running.td.fields["KEY"])
    assert spec.integrity
    assert not spec.plain
    assert running.run(running.ops.error, runs(0, 10), False) == ""
    assert running.td.fields["FATAL"] == 0
    lost = running.run(running.ops.error, runs(0, 10), True)
    assert "TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE" in lost
    assert "0x6000000500000000" in lost


def host_views(host: Any, write: bool, *pfns: int) -> list[str]:
    access = HostAccess(Agent.HOST_KERNEL, write)
    views = host.run(host.bench.platform.host_access, i64(*pfns), access).views
    return [HOST_VIEWS[view].value for view in views]


def test_rule_19_host_access(running: Any) -> None:
    zeros, raw = HostView.ZEROS.value, HostView.RAW.value
    # accepted: the TD's; pending: still the host's own bytes; frame 30: nobody's
    assert host_views(running, False, 10, 11, 30) == [zeros, raw, raw]
    assert host_views(running, True, 10, 11, 30) == [raw, raw, raw]
    # the host wrote over it: the memory controller keeps no key for the frame any more
    running.run(lambda tx: tx._tx.put(running.bench.space.tables["host/key"], i64(10), 0))
    assert host_views(running, False, 10) == [raw]


def test_rule_19_fatal_afterwards(running: Any) -> None:
    running.run(running.ops.error, runs(0, 10), True)
    refusal = running.refused(running.ops.enter, 0)
    assert refusal.details.vendor_status == "TDX_TD_FATAL"
    assert refusal.details.vendor_value == 0xE000060400000000
    assert running.status(leaves.block, i64(0)) == "TDX_TD_FATAL"
    running.bench.destroy(running.vm)
    assert running.free(10, 11) == [False, False]
    assert running.bench.byte_ops == []


def test_rule_20_a_removed_page_needs_its_reset(running: Any) -> None:
    assert running.free(10, 12) == [True, False]
    running.leaf(leaves.block, i64(0))
    running.leaf(leaves.track)
    running.leaf(leaves.remove, i64(0))
    assert running.pt(10) == 0
    assert running.free(10) == [True]
    running.run(leaves.reset, running.td.pamt, i64(10))
    assert running.free(10) == [False]
    assert running.bench.byte_ops == []


def test_rule_20_a_zap_resets_with_a_vcpu_inside(running: Any) -> None:
    running.bench.enter(running.vm, 0)
    running.zap(runs(0, 10, 2))
    assert running.free(10, 11) == [False, False]
    assert [running.state(0), running.state(1)] == ["FREE", "FREE"]


def test_rule_21_wbinvd_of_a_page_in_use(running: Any) -> None:
    assert running.status(leaves.wbinvd, i64(12)) == "TDX_SUCCESS"
    assert running.status(leaves.wbinvd, i64(12, 10)) == "TDX_PAGE_METADATA_INCORRECT|RCX"


def test_rule_22_teardown_with_a_vcpu_inside(running: Any) -> None:
    running.run(running.ops.enter, 0)
    kot = running.bench.space.tables["platform/tdx/kot"]
    assert running.status(leaves.teardown, kot) == "TDX_FLUSHVP_NOT_DONE"


def test_rule_24_a_busy_aug_is_a_fault_to_retry(running: Any) -> None:
    running.bench.injections["TDH_MEM_PAGE_AUG"] = "TDX_OPERAND_BUSY"
    refusal = running.refused(running.ops.map, runs(5, 20))
    assert refusal.details.vendor_status == "TDX_OPERAND_BUSY|SEPT_TREE"
    assert (refusal.reason.kind.name, refusal.errno_name) == ("BUSY", "EBUSY")
    running.run(running.ops.map, runs(5, 20))


ZAP_LEAVES = ("TDH_MEM_RANGE_BLOCK", "TDH_MEM_TRACK", "TDH_MEM_PAGE_REMOVE")


@pytest.mark.parametrize("point", ZAP_LEAVES)
def test_rule_24_a_zap_retries_once_with_vcpus_out(running: Any, point: str) -> None:
    running.bench.enter(running.vm, 0)
    running.bench.injections[point] = "TDX_OPERAND_BUSY"
    running.zap(runs(0, 10))
    assert running.state(0) == "FREE"
    assert running.td.fields["BUGGED"] == 0
    assert running.bench.inside[running.vm] == []
    assert running.bench.injections == {}


def test_rule_24_contention_sends_the_vcpus_out(make_running: Any) -> None:
    host = make_running("tdx-relocate")
    host.block(runs(0, 10))
    host.bench.enter(host.vm, 0)
    host.bench.injections["TDH_MEM_RANGE_UNBLOCK"] = "TDX_OPERAND_BUSY"
    host.run(host.ops.invalidate_end, runs(0, 10), Why.MIGRATE, False)
    assert (host.state(0), host.bench.inside[host.vm]) == ("MAPPED", [])


def test_rule_24_an_unblock_that_fails_bugs_the_vm(make_running: Any, always: Any) -> None:
    host = make_running("tdx-relocate")
    host.block(runs(0, 10))
    host.bench.injections = always(TDH_MEM_RANGE_UNBLOCK="TDX_OPERAND_BUSY")
    host.run(host.ops.invalidate_end, runs(0, 10), Why.MIGRATE, False)
    assert (host.state(0), host.td.fields["BUGGED"]) == ("BLOCKED", 1)


@pytest.mark.parametrize("point", [*ZAP_LEAVES, "TDH_PHYMEM_PAGE_WBINVD"])
def test_rule_24_second_failure_bugs_the_vm(make_running: Any, always: Any, point: str) -> None:
    host = make_running("tdx-2022")
    host.bench.injections = always({point: "TDX_OPERAND_BUSY"})
    host.zap(runs(0, 10))
    assert host.td.fields["BUGGED"] == 1
    assert host.free(10, 11, 12) == [True, True, False]
    assert host.run(host.ops.unpin, runs(0, 10)).tolist() == [True]
    host.bench.injections = {}
    for op, *args in ((host.ops.enter, 0), (host.ops.map, runs(5, 20)), (host.ops.finalize,)):
        refusal = host.refused(op, *args)
        assert (refusal.reason.name, refusal.errno_name) == ("VM_DEAD", "EIO")
    # the other pages can still be taken out, and the TD torn down
    host.zap(runs(1, 11))
    assert host.free(11) == [False]
    host.bench.destroy(host.vm)
    # RECLAIM takes back what the TD still has; a page that was removed but not flushed stays out
    assert host.free(10) == [point == "TDH_PHYMEM_PAGE_WBINVD"]


def test_rule_24_only_busy_is_retried(running: Any) -> None:
    running.bench.injections["TDH_MEM_TRACK"] = "TDX_PREVIOUS_TLB_EPOCH_BUSY"
    running.zap(runs(0, 10))
    assert running.td.fields["BUGGED"] == 1
    assert running.state(0) == "BLOCKED"


def test_rule_24_operands_of_contention(host: Any) -> None:
    host.leaf(leaves.add, i64(0), i64(10))
    for point, operand, leaf, args in (
        ("TDH_MEM_PAGE_ADD", "RDX", leaves.add, (i64(1), i64(11))),
        ("TDH_MR_EXTEND", "RDX", leaves.extend, (i64(0),)),
        ("TDH_MR_FINALIZE", "RCX", leaves.finalize, ()),
        ("TDH_MEM_TRACK", "TD_EPOCH", leaves.track, ()),
        ("TDH_MEM_RANGE_BLOCK", "SEPT_TREE", leaves.block, (i64(0),)),
    ):
        host.bench.injections[point] = "TDX_OPERAND_BUSY"
        assert host.status(leaf, *args) == f"TDX_OPERAND_BUSY|{operand}"


def test_rule_24_a_blocked_move_is_refused_not_bugged(make_running: Any, always: Any) -> None:
    host = make_running("tdx-relocate")
    host.bench.injections = always(TDH_MEM_RANGE_BLOCK="TDX_OPERAND_BUSY")
    refusal = host.refused(host.ops.invalidate_start, runs(0, 10), Why.MIGRATE)
    assert refusal.details.vendor_status == "TDX_OPERAND_BUSY|SEPT_TREE"


def test_a_status_that_does_not_exist_is_the_rule_makers_mistake(running: Any) -> None:
    running.bench.injections["TDH_MEM_RANGE_BLOCK"] = "TDX_NONSENSE"
    refusal = running.refused(running.ops.invalidate_start, runs(0, 10), Why.PUNCH)
    assert refusal.reason.name == "BAD_REQUEST"


def test_rule_25_a_reused_hkid_gets_a_new_key(host: Any) -> None:
    hkid, key = host.td.fields["HKID"], host.td.fields["KEY"]
    kot = host.bench.space.tables["platform/tdx/kot"]
    with host.bench.unchanged(), pytest.raises(Exception, match="TDX_HKID_NOT_FREE"):
        host.run(leaves.create, kot, 9, hkid)
    host.bench.destroy(host.vm)
    assert host.status(leaves.block, i64(0)) == "TDX_TD_KEYS_NOT_CONFIGURED"
    host.vm = host.bench.make_vm("tdx-today")
    assert host.td.fields["HKID"] == hkid
    assert host.td.fields["KEY"] != key
    assert host.bench.space.tables["host/vm_keys"].get(host.vm) == host.td.fields["KEY"]


# --- beside the rules ---------------------------------------------------------------------------
def test_hkids_run_out(host: Any) -> None:
    # 16 is the module's own; 17 to 63 are for guests, and one is taken
    for _ in range(46):
        host.bench.make_vm("tdx-today")
    with host.bench.unchanged(), pytest.raises(Exception, match="NO_KEY_SLOTS") as caught:
        host.bench.make_vm("tdx-today")
    assert caught.value.errno_name == "ENOSPC"


def test_config_is_checked(host: Any) -> None:
    with host.bench.unchanged(), pytest.raises(Exception, match="sept_ve_disable is 0 or 1"):
        host.bench.make_vm("tdx-today", {"sept_ve_disable": "yes"})


def test_only_debug_tds_can_be_peeked_at(make_host: Any) -> None:
    for debug, expected in (("0", "TDX_TD_NON_DEBUG"), ("1", "TDX_SUCCESS")):
        host = make_host(debug=debug)
        host.leaf(leaves.add, i64(0), i64(10))
        assert host.status(leaves.mem_rd_wr, i64(0), False) == expected


def test_nothing_runs_or_maps_before_finalize(host: Any) -> None:
    refusal = host.refused(host.ops.enter, 0)
    assert (refusal.reason.name, refusal.errno_name) == ("NOT_FINALIZED", "EINVAL")
    refusal = host.refused(host.ops.map, runs(0, 10))
    assert (refusal.reason.name, refusal.errno) == ("NOT_FINALIZED", errno.EOPNOTSUPP)


def test_a_vcpu_is_inside_once(running: Any) -> None:
    running.run(running.ops.enter, 0)
    refusal = running.refused(running.ops.enter, 0)
    assert refusal.details.vendor_status == "TDX_OPERAND_BUSY|RCX"


def test_finalize_twice(running: Any) -> None:
    refusal = running.refused(running.ops.finalize)
    assert (refusal.reason.name, refusal.errno_name) == ("NOT_PAUSED", "EINVAL")


def test_populate_needs_a_vcpu_and_normal_pages(make_host: Any) -> None:
    host = make_host(vcpus=0)
    normal, secrets = np.array([1], np.uint8), np.array([5], np.uint8)
    refusal = host.refused(host.ops.populate, runs(0, 10), normal, True, ZERO_PAGE)
    assert refusal.reason.name == "NO_SUCH_VCPU"
    host = make_host()
    refusal = host.refused(host.ops.populate, runs(0, 10), secrets, True, ZERO_PAGE)
    assert refusal.details.field == "kind"


def test_populate_copies_under_the_key(host: Any) -> None:
    pages = np.arange(8192, dtype=np.uint32).astype(np.uint8).reshape(2, 4096)
    assert host.populate(runs(0, 10, 2), pages).mapped
    (op,) = host.bench.byte_ops
    assert (op.kind, op.pfns.tolist(), op.key_id) == ("copy_in", [10, 11], host.td.fields["KEY"])
    assert (op.rows == pages).all()
    assert [host.state(0), host.state(1)] == ["MAPPED", "MAPPED"]


def test_a_busy_extend_is_eio_and_undoes_the_page(host: Any) -> None:
    host.bench.injections["TDH_MR_EXTEND"] = "TDX_OPERAND_BUSY"
    refusal = host.refused(host.ops.populate, runs(0, 10), np.array([1], np.uint8), True, ZERO_PAGE)
    assert refusal.errno_name == "EIO"
    assert host.populate(runs(0, 10), ZERO_PAGE)
    assert host.finalize().hex() == MRTD_ZERO


def test_a_zap_before_finalize_needs_no_tracking(host: Any) -> None:
    host.populate(runs(0, 10), ZERO_PAGE)
    host.zap(runs(0, 10), Why.CONVERT)
    assert host.td.fields["TD_EPOCH"] == 1
    assert host.free(10) == [False]


def test_an_empty_zap_tracks_nothing(running: Any) -> None:
    empty = np.empty(0, dtype=np.int64)
    with running.bench.unchanged():
        running.zap(Runs(empty, empty, empty))


def test_the_first_page_that_fails_is_named(running: Any) -> None:
    refusal = running.refused(lambda tx: leaves.block(tx, running.td, i64(1, 7, 0, 8)))
    assert (refusal.details.page, refusal.details.state) == ("gfn 0x7", "FREE")


def test_a_page_named_twice_is_refused(running: Any) -> None:
    refusal = running.refused(lambda tx: leaves.block(tx, running.td, i64(0, 1, 0)))
    assert refusal.reason.name == "BAD_REQUEST"


@pytest.mark.parametrize(("call", "private"), [(GuestCall.SHARE, False), (GuestCall.UNSHARE, True)])
def test_mapgpa_goes_to_the_vmm_and_not_to_the_sept(
    running: Any, call: GuestCall, private: bool
) -> None:
    with running.bench.unchanged():
        answer = running.run(running.ops.guest_call, 0, call, i64(0, 1), 0)
    assert (answer.action, answer.to_private) == (CallAction.HYPERCALL, private)


@pytest.mark.parametrize("call", [GuestCall.VALIDATE, GuestCall.RESCIND, GuestCall.RELINQUISH])
def test_calls_of_other_vendors_are_unknown(running: Any, call: GuestCall) -> None:
    with running.bench.unchanged():
        answer = running.run(running.ops.guest_call, 0, call, i64(0), 0)
    assert (answer.done, answer.status) == (0, 0xC000010000000000)
    assert answer.status_name == "TDX_OPERAND_INVALID|RAX"


@pytest.mark.parametrize(("to_private", "content"), [(False, "zero"), (True, "destroyed")])
def test_in_place_conversion(running: Any, to_private: bool, content: str) -> None:
    running.zap(runs(0, 10), Why.CONVERT)
    assert running.run(running.ops.convert, runs(0, 10), to_private).value == content


def test_in_place_conversion_of_a_page_that_stayed(running: Any, always: Any) -> None:
    running.bench.injections = always(TDH_MEM_PAGE_REMOVE="TDX_OPERAND_BUSY")
    running.zap(runs(0, 10), Why.CONVERT)
    assert running.run(running.ops.convert, runs(0, 10), False).value == "destroyed"


def test_page_states_have_their_names(running: Any) -> None:
    states = running.ops.page_state(i64(0, 1, 2), i64(10, 11, 12))
    assert [states.names[code] for code in states.codes] == ["MAPPED", "PENDING", "FREE"]


def test_variants_differ_in_pin_and_migrate_folio_only(make_host: Any) -> None:
    tables = {
        name: make_host(name).ops.implemented()
        for name in ("tdx-today", "tdx-2022", "tdx-relocate")
    }
    rows = {op: tuple(table[op] for table in tables.values()) for op in tables["tdx-today"]}
    differing = {op: row for op, row in rows.items() if len(set(row)) > 1}
    assert differing == {
        "pin": (False, True, False),
        "unpin": (False, True, False),
        "migrate_folio": (False, False, True),
    }
    assert rows["prepare"] == (False, False, False)
    assert [v.name for v in make_host().bench.platform.variants()] == list(tables)


def test_tdx_2022_holds_one_plain_reference(make_running: Any) -> None:
    host = make_running("tdx-2022")
    pin = host.run(host.ops.pin, runs(0, 10))
    assert (pin.purpose, pin.longterm) == ("secure EPT", False)
    host.zap(runs(0, 10))
    assert host.run(host.ops.unpin, runs(0, 10)).tolist() == [False]
