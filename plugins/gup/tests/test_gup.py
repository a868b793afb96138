"""The ordinary guest and the software-protected one keep nothing and hold nothing."""

from __future__ import annotations

import numpy as np
import pytest

from rmemd.errors import RmemError
from rmemd.hooks import CallAction, Content, GuestCall, Why
from rmemd.testing.hookbench import HookBench, runs
from rmemd_gup import GupPlatform

GFNS = np.array([0x10, 0x11], dtype=np.int64)


@pytest.fixture
def bench() -> HookBench:
    return HookBench(GupPlatform(), "gup", nframes=64)


def _ops(bench: HookBench, variant: str) -> set[str]:
    table = bench.ops(bench.make_vm(variant)).implemented()
    return {op for op, there in table.items() if there}


def test_the_ordinary_guest_has_the_pair_only(bench: HookBench) -> None:
    swap = {"export_state", "import_state"}
    assert _ops(bench, "gup") - swap == {"invalidate_start", "invalidate_end"}


def test_the_software_protected_guest_adds_conversion_and_its_call(bench: HookBench) -> None:
    added = _ops(bench, "sw-protected") - _ops(bench, "gup")
    assert added == {"convert", "error", "guest_call"}


def test_rule_20_neither_pins_what_it_maps(bench: HookBench) -> None:
    for variant in ("gup", "sw-protected"):
        assert _ops(bench, variant).isdisjoint({"pin", "unpin", "map"})


def test_rule_22_private_folios_of_guest_memfd_do_not_migrate(bench: HookBench) -> None:
    assert "migrate_folio" not in _ops(bench, "sw-protected")


def test_only_the_software_protected_guest_has_private_memory_and_in_place() -> None:
    found = {v.name: (v.private_memory, v.personalities[0]) for v in GupPlatform().variants()}
    assert found == {"gup": (False, "attributes"), "sw-protected": (True, "in-place")}


@pytest.mark.parametrize("why", list(Why))
@pytest.mark.parametrize("variant", ["gup", "sw-protected"])
def test_the_pair_and_destruction_keep_no_state(bench: HookBench, variant: str, why: Why) -> None:
    vm = bench.make_vm(variant)
    ops = bench.ops(vm)
    with bench.unchanged():
        bench.run(vm, ops.invalidate_start, runs(0x10, 3, 2), why)
        bench.run(vm, ops.invalidate_end, runs(0x10, 3, 2), why, False)
        bench.destroy(vm)
    assert bench.byte_ops == []


@pytest.mark.parametrize("to_private", [True, False])
def test_conversion_preserves_and_moves_no_bytes(bench: HookBench, to_private: bool) -> None:
    vm = bench.make_vm("sw-protected")
    with bench.unchanged():
        content = bench.run(vm, bench.ops(vm).convert, runs(0x10, 3, 2), to_private)
    assert content is Content.PRESERVED
    assert bench.byte_ops == []


@pytest.mark.parametrize("call", [GuestCall.SHARE, GuestCall.UNSHARE])
def test_map_gpa_range_exits_to_the_vmm(bench: HookBench, call: GuestCall) -> None:
    vm = bench.make_vm("sw-protected")
    answer = bench.run(vm, bench.ops(vm).guest_call, 0, call, GFNS, 0)
    assert answer.action is CallAction.HYPERCALL
    assert answer.to_private is (call is GuestCall.UNSHARE)


@pytest.mark.parametrize(
    "call", [c for c in GuestCall if c not in (GuestCall.SHARE, GuestCall.UNSHARE)]
)
def test_any_other_call_is_unknown_to_kvm(bench: HookBench, call: GuestCall) -> None:
    vm = bench.make_vm("sw-protected")
    answer = bench.run(vm, bench.ops(vm).guest_call, 0, call, GFNS, 0)
    assert (answer.action, answer.done) == (CallAction.DONE, 0)
    assert (answer.status, answer.status_name) == (-1000, "-KVM_ENOSYS")


def test_poison_is_survived_until_it_is_consumed(bench: HookBench) -> None:
    vm = bench.make_vm("sw-protected")
    assert bench.run(vm, bench.ops(vm).error, runs(0x10, 3), False) == ""
    assert "SIGBUS" in bench.run(vm, bench.ops(vm).error, runs(0x10, 3), True)


def test_memory_is_plain(bench: HookBench) -> None:
    bench.make_vm("sw-protected")
    keys = bench.space.tables["host/keys"].snapshot()
    assert [key.plain for key in keys.values()] == [True]


def test_an_unknown_variant_is_not_found(bench: HookBench) -> None:
    with bench.unchanged(), pytest.raises(RmemError) as caught:
        bench.make_vm("gop")
    assert caught.value.reason.name == "NO_SUCH_CONSUMER"
