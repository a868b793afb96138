"""snp.md §9 rules 14 to 19, 23, 25 and §7: the firmware's commands and the launch digest."""

import hashlib
from functools import partial

import numpy as np
import pytest

from rmemd.errors import REASONS, RmemError
from rmemd.hooks import AccessCode, CallAction, GuestCall, PageKind, Runs, Why
from rmemd_snp.firmware import extend_digest
from rmemd_snp.tables import ASSIGNED, IMMUTABLE, VALIDATED, VMSA

V1 = (
    "c0f2fb71777e0183fbccac13c661f7e95b4a8f66ee2e7ce2f8018b1bbaf92420"
    "f8bfb979af2c191ac322fad7d44b652f"
)
V2 = (
    "3db29c220b1199760606d3fc99013059046eeec96d65c5443a371d12bffe4829"
    "6ae00cf00cbcc1e64930b06c4d674f94"
)
KINDS = [
    PageKind.NORMAL, PageKind.NORMAL, PageKind.ZERO, PageKind.UNMEASURED,
    PageKind.SECRETS, PageKind.CPUID,
]  # fmt: skip


def arr(*numbers):
    return np.array(numbers, dtype=np.int64)


def u8(*numbers):
    return np.array(numbers, dtype=np.uint8)


def v2_rows(page_of):
    rows = np.zeros((6, 4096), dtype=np.uint8)
    rows[0], rows[1] = page_of(b"rmemd-a"), page_of(b"rmemd-b")
    rows[4:] = 0xA5
    return rows


# --- §7 --------------------------------------------------------------------------------------
def test_vector_v1(host):
    vm = host.vm()
    rows = np.tile(np.arange(256, dtype=np.uint8), 16).reshape(1, 4096)
    assert host.populate(vm, [0], [3], rows=rows).mapped is False
    assert host.run(vm, "finalize").hex() == V1


def test_vector_v2_in_one_batch_and_in_several(host, page_of):
    rows = v2_rows(page_of)
    one, many = host.vm(), host.vm()
    gfns = list(range(0x100, 0x106))
    host.populate(one, gfns, [3, 4, 5, 6, 7, 8], KINDS, rows)
    assert host.run(one, "finalize").hex() == V2
    for i, gfn in enumerate(gfns):
        host.populate(many, [gfn], [20 - i], [KINDS[i]], rows[i : i + 1])
    assert host.run(many, "finalize").hex() == V2


def test_measure_false_is_unmeasured_for_normal_pages_only(host, page_of):
    rows = v2_rows(page_of)
    digests = []
    for kinds, measure in ((KINDS, False), ([PageKind.UNMEASURED] * 2 + KINDS[2:], True)):
        vm = host.vm()
        first = 10 * vm
        host.populate(vm, list(range(6)), list(range(first, first + 6)), kinds, rows, measure)
        digests.append(host.run(vm, "finalize"))
    assert digests[0] == digests[1]
    assert digests[0].hex() != V2


def test_page_info_holds_fws_order_of_masks():
    row = np.zeros((1, 4096), dtype=np.uint8)
    info = bytes(48) + hashlib.sha384(bytes(4096)).digest()
    info += b"\x70\x00" + b"\x01" + b"\x00" + b"\x00" + b"\x0a\x0b\x0c"
    info += (0x123000).to_bytes(8, "little")
    assert len(info) == 0x70
    found = extend_digest(bytes(48), u8(1), arr(0x123), row, 0x0C0B0A)
    assert found == hashlib.sha384(info).digest()


def test_vmsa_is_measured_at_kvms_gpa_without_the_tsc_fields(host, page_of):
    row = page_of(b"vmsa").copy()
    bare = bytearray(row.tobytes())
    bare[0x2F0:0x300] = bytes(16)
    info = bytes(48) + hashlib.sha384(bare).digest()
    info += bytes([0x70, 0, 2, 0, 0, 0, 0, 0]) + (0xFFFFFFFFF000).to_bytes(8, "little")
    vm = host.vm()
    before = row.tobytes()
    host.populate(vm, [9], [3], [PageKind.VMSA], row.reshape(1, 4096))
    assert host.bench.byte_ops[0].rows.tobytes() == before, "what is encrypted is the whole page"
    assert host.run(vm, "finalize") == hashlib.sha384(info).digest()
    assert host.rmp.bits.at(3) == ASSIGNED | VALIDATED | VMSA


def test_launched_bytes_are_named_under_the_guests_key(host, page_of):
    vm = host.vm()
    rows = v2_rows(page_of)
    host.populate(vm, list(range(6)), list(range(10, 16)), KINDS, rows)
    ops = {op.kind: op for op in host.bench.byte_ops}
    key = host.consumer(vm).guest.key
    assert ops.keys() == {"zero", "copy_in"}
    assert ops["zero"].pfns.tolist() == [12]
    assert ops["copy_in"].pfns.tolist() == [10, 11, 13, 14, 15]
    assert (ops["copy_in"].rows == rows[[0, 1, 3, 4, 5]]).all()
    assert ops["zero"].key_id == ops["copy_in"].key_id == key != 0


# --- launch ----------------------------------------------------------------------------------
def test_rule_15_a_launched_page_is_valid_already(host):
    vm = host.vm()
    host.populate(vm, [7], [3])
    assert host.state(3) == "Guest-Valid"
    host.run(vm, "finalize")
    host.map(vm, [7], [3])
    assert host.access(vm, [7], [3]).codes.tolist() == [AccessCode.OK]
    answer = host.call(vm, GuestCall.VALIDATE, 7)
    assert (answer.status, answer.status_name) == (0, "SUCCESS CF=1")


def test_populate_refuses_assigned_frames(host):
    vm = host.vm()
    host.prepare(vm, [8], [4])
    with host.bench.unchanged(), pytest.raises(RmemError) as caught:
        host.populate(vm, [7, 8], [3, 4])
    assert (caught.value.reason.name, caught.value.errno_name) == ("SNP_PAGE_ASSIGNED", "EEXIST")
    assert caught.value.details.page == "gfn 0x8"
    assert caught.value.details.state == "Guest-Invalid"


@pytest.mark.parametrize("kind", [0, 7])
def test_rule_14_page_type(host, kind):
    vm = host.vm()
    with host.refused("INVALID_PARAM", 0x16):
        host.populate(vm, [7, 8], [3, 4], [1, kind])


def test_rule_14_after_finish(host):
    vm = host.vm(finalized=True)
    with host.refused("INVALID_GUEST_STATE", 0x02) as caught:
        host.populate(vm, [7], [3])
    assert caught.value.details.rule == "snp.md §9 rule 14"
    assert "RUNNING" in caught.value.details.state
    with host.refused("INVALID_GUEST_STATE", 0x02):
        host.run(vm, "finalize")


def launch(host, vm, pfns, kinds=(1,)):
    rows = np.zeros((len(pfns), 4096), dtype=np.uint8)
    host.leaf(host.firmware.launch_update, host.context(vm), arr(*pfns), u8(*kinds), rows, vm=vm)


def set_guest(host, vm, **fields):
    context = host.context(vm)
    guest = host.firmware.guest(context)._replace(**fields)
    host.leaf(lambda tx: tx.set(host.firmware.guests, context, tuple(guest)))


def test_rule_14_checks_in_order_one_repair_at_a_time(host):
    """Everything wrong at once, and then each refusal repaired in the order of the checks."""
    vm = host.vm()
    asid, context = host.asid(vm), host.context(vm)
    set_guest(host, vm, state=0, asid=0)
    host.poke(3, bits=ASSIGNED, asid=asid + 1, gpa=7)
    host.poke(context, bits=ASSIGNED | IMMUTABLE)
    with host.refused("INVALID_GUEST", 0x10):
        launch(host, vm, [3], [0])
    host.poke(context, bits=ASSIGNED | IMMUTABLE | VMSA)
    with host.refused("INVALID_PAGE_STATE", 0x1A):
        launch(host, vm, [3], [0])
    host.poke(3, bits=ASSIGNED | IMMUTABLE)
    with host.refused("INVALID_PARAM", 0x16):
        launch(host, vm, [3], [0])
    with host.refused("INVALID_GUEST_STATE", 0x02):
        launch(host, vm, [3])
    set_guest(host, vm, state=1)
    with host.refused("INACTIVE", 0x08):
        launch(host, vm, [3])
    set_guest(host, vm, asid=asid)
    with host.refused("INVALID_PAGE_OWNER", 0x1C):
        launch(host, vm, [3])
    host.poke(3, asid=asid)
    launch(host, vm, [3])
    assert host.state(3) == "Guest-Valid"


def test_launch_update_sets_and_measures_the_vmpl_masks(host):
    vm = host.vm()
    host.leaf(host.rmp.rmpupdate, arr(3), ASSIGNED | IMMUTABLE, 7, host.asid(vm))
    row = np.zeros((1, 4096), dtype=np.uint8)
    leaf = host.firmware.launch_update
    host.leaf(leaf, host.context(vm), arr(3), u8(1), row, 0x0C0B0A, vm=vm)
    assert host.rmp.vmpl.at(3) == 0x0C0B0A
    assert host.run(vm, "finalize") == extend_digest(bytes(48), u8(1), arr(7), row, 0x0C0B0A)


def test_rule_14_the_first_page_in_error_decides(host):
    vm = host.vm()
    asid = host.asid(vm)
    host.leaf(host.rmp.rmpupdate, arr(3, 4, 5), ASSIGNED | IMMUTABLE, arr(7, 8, 9), asid)
    host.poke(4, asid=asid + 1)
    host.poke(5, bits=ASSIGNED)
    with host.refused("INVALID_PAGE_OWNER", 0x1C) as caught:
        launch(host, vm, [3, 4, 5], [1, 1, 1])
    assert caught.value.details.page == "pfn 0x4"


def test_entering_before_launch_finish_is_einval(host):
    vm = host.vm()
    with host.bench.unchanged(), pytest.raises(RmemError) as caught:
        host.bench.enter(vm, 0)
    assert (caught.value.reason.name, caught.value.errno_name) == ("NOT_FINALIZED", "EINVAL")
    host.run(vm, "finalize")
    host.bench.enter(vm, 0)


@pytest.mark.parametrize(
    ("point", "op"),
    [("SNP_LAUNCH_UPDATE", "populate"), ("SNP_LAUNCH_FINISH", "finalize")],
)
def test_a_firmware_status_can_be_injected(host, point, op):
    vm = host.vm()
    host.bench.injections[point] = "BAD_MEASUREMENT"
    with host.refused("BAD_MEASUREMENT", 0x0B):
        host.populate(vm, [7], [3]) if op == "populate" else host.run(vm, op)


# --- policy ----------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["0x10000", "0x4030000", "0x1030000"])
def test_launch_start_refuses_bad_policies(host, policy):
    with host.refused("POLICY_FAILURE", 0x07):
        host.vm(policy=policy)


def test_ciphertext_hiding_policy_needs_hiding(host):
    host.vm(policy="0x1030000", ciphertext_hiding="1")


@pytest.mark.parametrize(
    "config",
    [{"policy": "banana"}, {"policy": "-1"}, {"ciphertext_hiding": "2"}, {"colour": "red"}],
)
def test_bad_options_are_refused_by_name(host, config):
    with host.bench.unchanged(), pytest.raises(RmemError) as caught:
        host.vm(**config)
    assert caught.value.details.field == f"config.{next(iter(config))}"


def test_unknown_variant(host):
    with host.bench.unchanged(), pytest.raises(RmemError) as caught:
        host.vm("snp-teleport")
    assert caught.value.reason.name == "NO_SUCH_CONSUMER"


def test_variants_differ_in_migrate_folio_only(host):
    tables = {
        v.name: host.bench.ops(host.vm(v.name)).implemented() for v in host.platform.variants()
    }
    assert list(tables) == ["snp-move", "snp-swap-disable"]
    move, disabled = tables.values()
    assert move["migrate_folio"]
    assert not disabled["migrate_folio"]
    del move["migrate_folio"], disabled["migrate_folio"]
    assert move == disabled
    assert {op for op, present in move.items() if not present} == {"pin", "unpin", "resume"}


@pytest.mark.parametrize(
    ("variant", "policy"), [("snp-swap-disable", "0x30000"), ("snp-move", "0x2030000")]
)
def test_rule_25_swap_disable_makes_the_hook_null_and_the_leaf_fail(host, variant, policy):
    vm = host.vm(variant, policy=policy)
    assert host.bench.ops(vm).migrate_folio is None
    assert host.consumer(vm).guest.policy == 0x2030000
    moving(host, vm)
    with host.refused("POLICY_FAILURE", 0x07) as caught:
        move(host, vm)
    assert caught.value.details.rule == "snp.md §9 rule 25"


# --- ASIDs -----------------------------------------------------------------------------------
def test_rule_16_every_asid_is_dirty_after_init_and_flush_needs_wbinvd(host):
    assert not host.firmware.clean.view.any()
    with host.refused("WBINVD_REQUIRED", 0x0E):
        host.leaf(host.firmware.df_flush)
    host.vm()
    assert host.firmware.clean.get(arr(1, 2, 3, 4)).all()


def new_guest(host):
    """Make a guest by leaves, up to ACTIVATE, in the kernel's last frame."""
    context = host.rmp.kernel[-1]
    host.leaf(host.rmp.rmpupdate, arr(context), ASSIGNED | IMMUTABLE)
    host.leaf(host.firmware.gctx_create, context)
    return context


def test_rule_16_activate_checks_in_order_one_repair_at_a_time(make_host):
    host = make_host(npackages=2)
    owner = host.vm(finalized=True)
    asid = host.asid(owner)
    host.prepare(owner, [7], [3])
    context = new_guest(host)
    activate = partial(host.leaf, host.firmware.activate)
    with host.refused("INVALID_GUEST", 0x10):
        activate(3, 2048)
    with host.refused("INVALID_GUEST_STATE", 0x02):
        activate(context, 2048)
    host.leaf(host.firmware.launch_start, context, 0x130000, False)
    with host.refused("INVALID_ASID", 0x0D):
        activate(context, 2048)
    with host.refused("INVALID_CONFIG", 0x03):
        activate(context, asid)
    host.free([3])
    with host.refused("POLICY_FAILURE", 0x07):
        activate(context, asid)
    guest = host.firmware.guest(context)
    host.leaf(
        lambda tx: tx.set(host.firmware.guests, context, tuple(guest._replace(policy=0x30000)))
    )
    for missing in (0, 5, 2047):
        with host.refused("INVALID_ASID", 0x0D):
            activate(context, missing)
    with host.refused("ASID_OWNED", 0x0C):
        activate(context, asid)
    host.bench.destroy(owner)
    with host.refused("DFFLUSH_REQUIRED", 0x0F):
        activate(context, asid)
    with host.refused("WBINVD_REQUIRED", 0x0E):
        host.leaf(host.firmware.df_flush)
    host.leaf(host.firmware.wbinvd)
    host.leaf(host.firmware.df_flush)
    activate(context, asid)
    with host.refused("ACTIVE", 0x12):
        activate(context, 2)


def test_rule_16_active_comes_before_dirty(host):
    vm = host.vm()
    other = host.vm(finalized=True)
    dirty = host.asid(other)
    host.bench.destroy(other)
    with host.refused("ACTIVE", 0x12):
        host.leaf(host.firmware.activate, host.context(vm), dirty)


@pytest.mark.parametrize("ran", [False, True])
def test_rule_16_an_asid_is_dirty_only_if_its_guest_ran(host, ran):
    vm = host.vm(finalized=ran)
    asid = host.asid(vm)
    host.bench.destroy(vm)
    assert host.firmware.clean.at(asid) == (not ran)


def test_clean_asids_are_taken_before_dirty_ones(host):
    first = host.vm(finalized=True)
    assert host.asid(first) == 1
    host.bench.destroy(first)
    assert [host.asid(host.vm()) for _ in range(4)] == [2, 3, 4, 1]


def test_ciphertext_hiding_ends_with_the_guest_that_asked(make_host):
    host = make_host(max_asid=1)
    hidden = host.vm(ciphertext_hiding="1")
    host.prepare(hidden, [7], [3])
    host.bench.destroy(hidden)
    assert host.host([3], write=False).views.tolist() == [2], "until the page is freed"
    host.free([3])
    host.prepare(host.vm(), [7], [3])
    assert host.host([3], write=False).views.tolist() == [0]


def test_an_asid_with_pages_left_is_not_picked(make_host):
    host = make_host(max_asid=2)
    first = host.vm(finalized=True)
    host.prepare(first, [7], [3])
    asid, key = host.asid(first), host.consumer(first).guest.key
    host.bench.destroy(first)
    assert host.state(3) == "Guest-Invalid", "pages keep their entries"
    other = host.vm()
    assert host.asid(other) != asid
    with host.bench.unchanged(), pytest.raises(RmemError) as caught:
        host.vm()
    assert (caught.value.reason.name, caught.value.errno_name) == ("NO_KEY_SLOTS", "EBUSY")
    host.free([3])
    again = host.vm()
    assert host.asid(again) == asid
    assert host.consumer(again).guest.key > key, "a new key per activation"


def test_many_guests_come_and_go(make_host):
    host = make_host(max_asid=3)
    keys = set()
    for finalized in [True, False] * 6:
        vm = host.vm(finalized=finalized)
        keys.add(host.consumer(vm).guest.key)
        host.prepare(vm, [7], [3])
        host.bench.destroy(vm)
        host.free([3])
    assert len(keys) == 12
    assert not host.rmp.bits.view.any()
    assert len(host.firmware.guests) == 0


def test_decommission_of_no_context_is_10_and_leaves_a_firmware_page(host):
    vm = host.vm()
    context = host.context(vm)
    with host.refused("INVALID_GUEST", 0x10):
        host.leaf(host.firmware.decommission, 3)
    host.leaf(host.firmware.decommission, context)
    assert host.state(context) == "Firmware"


def test_gctx_create_needs_a_firmware_page_and_start_an_init_guest(host):
    with host.refused("INVALID_PAGE_STATE", 0x1A):
        host.leaf(host.firmware.gctx_create, 3)
    vm = host.vm()
    with host.refused("INVALID_GUEST_STATE", 0x02):
        host.leaf(host.firmware.launch_start, host.context(vm), 0x30000, False)
    host.leaf(host.firmware.decommission, host.context(vm))
    with host.refused("INVALID_GUEST", 0x10):
        host.leaf(host.firmware.launch_start, host.context(vm), 0, False)


# --- PAGE_MOVE -------------------------------------------------------------------------------
def moving(host, vm):
    """Bring pfn 3 to Pre-Swap and pfn 4 to Pre-Guest, for gfn 7."""
    asid = host.asid(vm)
    host.populate(vm, [7], [3])
    host.leaf(host.rmp.rmpupdate, arr(3, 4), ASSIGNED | IMMUTABLE, 7, asid)
    assert host.states(3, 4) == ["Pre-Swap", "Pre-Guest"]


def move(host, vm, src=(3,), dst=(4,)):
    host.leaf(host.firmware.page_move, host.context(vm), arr(*src), arr(*dst), vm=vm)


def test_rule_17_a_validated_page_moves_whole(host):
    vm = host.vm()
    host.populate(vm, [7], [3])
    host.poke(3, vmpl=0x0F0301)
    host.run(vm, "finalize")
    host.map(vm, [7], [3])
    runs = Runs(arr(7), arr(3), arr(1))
    host.run(vm, "invalidate_start", runs, Why.MIGRATE)
    assert host.call(vm, GuestCall.VALIDATE, 7).action is CallAction.FAULT
    host.run(vm, "migrate_folio", arr(7), arr(3), arr(4))
    (op,) = host.bench.byte_ops
    assert (op.kind, op.src.tolist(), op.pfns.tolist()) == ("relocate", [3], [4])
    assert op.key_id == host.consumer(vm).guest.key
    host.run(vm, "invalidate_end", Runs(arr(7), arr(4), arr(1)), Why.MIGRATE, True)
    assert host.states(3, 4) == ["Guest-Invalid", "Guest-Valid"]
    assert (host.rmp.gpa.at(3), host.rmp.asid.at(3)) == (7, host.asid(vm))
    assert (host.rmp.gpa.at(4), host.rmp.vmpl.at(4)) == (7, 0x0F0301)
    assert host.access(vm, [7], [4]).codes.tolist() == [AccessCode.OK]
    assert host.call(vm, GuestCall.VALIDATE, 7).status_name == "SUCCESS CF=1"
    assert host.host([3], write=True).fault
    assert host.host([3], write=True).views.tolist() == [3]
    # rule 21: a stale mapping of src shows nothing
    assert host.access(vm, [7], [3]).codes.tolist() == [AccessCode.EXCEPTION]
    assert host.free([3]) == [False]
    assert host.access(vm, [7], [3]).codes.tolist() == [AccessCode.FAULT]


def test_rule_18_an_unvalidated_page_stays_unvalidated(host):
    vm = host.vm(finalized=True)
    host.fault(vm, [7], [3])
    host.run(vm, "migrate_folio", arr(7), arr(3), arr(4))
    assert host.states(3, 4) == ["Guest-Invalid", "Guest-Invalid"]
    assert host.access(vm, [7], [4]).codes.tolist() == [AccessCode.EXCEPTION]


def test_rule_19_checks_in_order_one_repair_at_a_time(host):
    vm = host.vm()
    moving(host, vm)
    asid, context = host.asid(vm), host.context(vm)
    set_guest(host, vm, state=0, asid=0)
    host.poke(3, bits=ASSIGNED | VALIDATED, asid=asid + 1)
    host.poke(4, bits=ASSIGNED)
    host.poke(context, bits=ASSIGNED | IMMUTABLE)
    with host.refused("INVALID_GUEST", 0x10):
        move(host, vm)
    host.poke(context, bits=ASSIGNED | IMMUTABLE | VMSA)
    with host.refused("INVALID_GUEST_STATE", 0x02):
        move(host, vm)
    set_guest(host, vm, state=1)
    with host.refused("INACTIVE", 0x08):
        move(host, vm)
    set_guest(host, vm, asid=asid)
    with host.refused("INVALID_PAGE_STATE", 0x1A) as caught:
        move(host, vm)
    assert caught.value.details.rule == "snp.md §9 rule 19"
    host.poke(4, bits=ASSIGNED | IMMUTABLE)
    with host.refused("INVALID_PAGE_STATE", 0x1A):
        move(host, vm)
    host.poke(3, bits=ASSIGNED | VALIDATED | IMMUTABLE)
    with host.refused("INVALID_PAGE_OWNER", 0x1C):
        move(host, vm)
    host.poke(3, asid=asid)
    host.poke(4, asid=asid + 1)
    with host.refused("INVALID_PAGE_OWNER", 0x1C):
        move(host, vm)
    host.poke(4, asid=asid)
    move(host, vm)
    assert host.states(3, 4) == ["Guest-Invalid", "Guest-Valid"]


def test_rule_19_dst_may_not_be_pre_swap(host):
    vm = host.vm()
    moving(host, vm)
    host.poke(4, bits=ASSIGNED | VALIDATED | IMMUTABLE)
    with host.refused("INVALID_PAGE_STATE", 0x1A):
        move(host, vm)


def test_rule_17_dst_takes_srcs_gpa_whatever_its_own_was(host):
    vm = host.vm()
    moving(host, vm)
    host.poke(4, gpa=99)
    move(host, vm)
    assert (host.rmp.gpa.at(4), host.rmp.gpa.at(3)) == (7, 7)


def test_rule_19_a_refused_batch_moves_nothing(host):
    one, two = host.vm(finalized=True), host.vm(finalized=True)
    host.fault(one, [7], [3])
    host.fault(two, [8], [4])
    with host.refused("INVALID_PAGE_OWNER", 0x1C) as caught:
        host.run(one, "migrate_folio", arr(7, 8), arr(3, 4), arr(5, 6))
    assert caught.value.details.page == "pfn 0x4"


def test_rule_19_by_injection_the_source_stays_owned(host):
    vm = host.vm(finalized=True)
    host.fault(vm, [7], [3])
    host.bench.injections["SNP_PAGE_MOVE"] = "INVALID_PAGE_SIZE"
    with host.refused("INVALID_PAGE_SIZE", 0x19):
        host.run(vm, "migrate_folio", arr(7), arr(3), arr(4))
    runs = Runs(arr(7), arr(3), arr(1))
    host.run(vm, "invalidate_start", runs, Why.MIGRATE)
    host.run(vm, "invalidate_end", runs, Why.MIGRATE, False)
    answer = host.call(vm, GuestCall.VALIDATE, 7)
    assert (answer.action, answer.status_name) == (CallAction.DONE, "SUCCESS")
    assert host.state(3) == "Guest-Valid"


@pytest.mark.parametrize(("src", "dst"), [((3, 3), (4, 5)), ((3, 4), (5, 5)), ((3, 4), (4, 5))])
def test_a_move_that_names_a_frame_twice_is_refused(host, src, dst):
    vm = host.vm(finalized=True)
    host.fault(vm, [7, 8], [3, 4])
    with host.bench.unchanged(), pytest.raises(RmemError):
        host.run(vm, "migrate_folio", arr(7, 8), arr(*src), arr(*dst))


def test_frames_that_snp_never_held_move_as_they_are(host):
    vm = host.vm(finalized=True)
    host.fault(vm, [7], [3])
    host.run(vm, "migrate_folio", arr(6, 7), arr(2, 3), arr(4, 5))
    keys = {op.src.tolist()[0]: op.key_id for op in host.bench.byte_ops}
    assert keys == {2: 0, 3: host.consumer(vm).guest.key}
    assert host.states(2, 3, 4, 5) == ["Hypervisor", "Guest-Invalid", "Hypervisor", "Guest-Invalid"]
    with host.bench.unchanged():
        host.run(vm, "migrate_folio", arr(6), arr(2), arr(9))


def test_rule_21_src_is_out_of_reach_during_a_move(host):
    vm = host.vm()
    moving(host, vm)
    for pfn in (3, 4):
        assert host.access(vm, [7], [pfn]).codes.tolist() == [AccessCode.FAULT]


# --- PAGE_RECLAIM ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bits", "asid", "gpa", "after"),
    [
        (ASSIGNED | IMMUTABLE, 0, 0, "Reclaim"),
        (ASSIGNED | IMMUTABLE, 0, 7, "Reclaim"),
        (ASSIGNED | IMMUTABLE, 1, 7, "Guest-Invalid"),
        (ASSIGNED | IMMUTABLE | VALIDATED, 1, 7, "Guest-Valid"),
        (ASSIGNED | VALIDATED, 1, 7, "Guest-Valid"),
        (0, 0, 0, "Hypervisor"),
    ],
)
def test_rule_23_page_reclaim(host, bits, asid, gpa, after):
    host.poke(3, bits=bits, asid=asid, gpa=gpa)
    host.leaf(host.firmware.page_reclaim, arr(3))
    assert host.state(3) == after
    host.leaf(host.rmp.rmpupdate, arr(3), 0)
    assert host.state(3) == "Hypervisor"


@pytest.mark.parametrize("bits", [IMMUTABLE, ASSIGNED | IMMUTABLE | VMSA])
def test_rule_23_context_and_hv_fixed_are_refused(host, bits):
    host.poke(3, bits=bits)
    host.poke(2, bits=ASSIGNED | IMMUTABLE)
    with host.refused("INVALID_PAGE_STATE", 0x1A) as caught:
        host.leaf(host.firmware.page_reclaim, arr(2, 3))
    assert caught.value.details.rule == "snp.md §9 rule 23"


def test_every_firmware_status_has_a_reason():
    names = [name for name in REASONS if name.startswith("SNP_")]
    assert {"SNP_INVALID_PAGE_STATE", "SNP_POLICY_FAILURE", "SNP_INVALID_CONFIG"} <= set(names)
    assert all(REASONS[name].cause and REASONS[name].remedy for name in names)
