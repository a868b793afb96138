"""The null consumer has exactly the mandatory pair, and the one of a swap."""

from __future__ import annotations

import pytest

from rmemd.errors import RmemError
from rmemd.hooks import Why
from rmemd.testing.hookbench import HookBench, runs
from rmemd_null import NullPlatform


@pytest.fixture
def bench() -> HookBench:
    return HookBench(NullPlatform(), "null", nframes=8)


def test_it_has_exactly_the_two_pairs(bench: HookBench) -> None:
    table = bench.ops(bench.make_vm("null")).implemented()
    assert {op for op, there in table.items() if there} == {
        "invalidate_start", "invalidate_end", "export_state", "import_state",
    }  # fmt: skip


def test_its_platform_checks_and_reclaims_nothing(bench: HookBench) -> None:
    assert bench.platform.host_access is None
    assert bench.platform.free is None


def test_it_is_one_variant_with_private_memory_and_attributes() -> None:
    (variant,) = NullPlatform().variants()
    assert (variant.name, variant.private_memory) == ("null", True)
    assert variant.personalities[0] == "attributes"


@pytest.mark.parametrize("why", list(Why))
def test_the_pair_and_destruction_keep_no_state(bench: HookBench, why: Why) -> None:
    vm = bench.make_vm("null")
    with bench.unchanged():
        bench.run(vm, bench.ops(vm).invalidate_start, runs(1, 2), why)
        bench.run(vm, bench.ops(vm).invalidate_end, runs(1, 2), why, True)
        bench.destroy(vm)
    assert bench.byte_ops == []


def test_its_memory_is_plain_and_under_a_key(bench: HookBench) -> None:
    vm = bench.make_vm("null")
    keys = bench.space.tables["host/keys"].snapshot()
    vm_keys = bench.space.tables["host/vm_keys"].snapshot()
    assert keys[vm_keys[vm]].plain


def test_an_unknown_variant_is_not_found(bench: HookBench) -> None:
    with bench.unchanged(), pytest.raises(RmemError) as caught:
        bench.make_vm("nil")
    assert caught.value.reason.name == "NO_SUCH_CONSUMER"
