"""Every leaf in every OP_STATE over every SEPT state, with the expectation taken from the csv."""

from __future__ import annotations

import csv
from importlib import resources
from typing import Any

import numpy as np
import pytest

from rmemd.hooks import AccessCode, CallAction, GuestCall
from rmemd.testing.hookbench import runs
from rmemd_tdx import leaves


def rows(name: str, key: str) -> dict[str, dict[str, str]]:
    with (resources.files("rmemd_tdx") / "data" / name).open(encoding="ascii") as file:
        return {row[key]: row for row in csv.DictReader(file)}


def i64(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


FLAGS = rows("sept_state_flags.csv", "state")
OPS = rows("op_state_flags.csv", "op_state")
ALLOW = rows("sept_state_allow.csv", "leaf")
OP_ALLOW = rows("op_state_allow.csv", "leaf")
LEAVES = {
    "TDH_MEM_PAGE_ADD": leaves.add,
    "TDH_MEM_PAGE_AUG": leaves.aug,
    "TDH_MEM_RANGE_BLOCK": leaves.block,
    "TDH_MEM_RANGE_UNBLOCK": leaves.unblock,
    "TDH_MEM_PAGE_REMOVE": leaves.remove,
    "TDH_MEM_PAGE_RELOCATE": leaves.relocate,
    "TDH_MR_EXTEND": leaves.extend,
    "TDH_MEM_RD": lambda tx, td, gfns: leaves.mem_rd_wr(tx, td, gfns, False),
    "TDH_MEM_WR": lambda tx, td, gfns: leaves.mem_rd_wr(tx, td, gfns, True),
}
TAKES_PAGE = {"TDH_MEM_PAGE_ADD", "TDH_MEM_PAGE_AUG", "TDH_MEM_PAGE_RELOCATE"}
# states after success, from tdx.md §2
BLOCKED = {
    "MAPPED": "BLOCKED", "BLOCKEDW": "BLOCKED", "PENDING": "PENDING_BLOCKED",
    "PENDING_BLOCKEDW": "PENDING_BLOCKED", "NL_MAPPED": "NL_BLOCKED",
}  # fmt: skip
UNBLOCKED = {"BLOCKED": "MAPPED", "PENDING_BLOCKED": "PENDING", "NL_BLOCKED": "NL_MAPPED"}


def flag(state: str, column: str) -> bool:
    return FLAGS[state][column] == "1"


def expected_status(leaf: str, op_state: str, state: str) -> str:
    """Return the status, by the order of checks in tdx.md §2; blocked pages are tracked here."""
    if OP_ALLOW[leaf][op_state] == "0":
        return "TDX_OP_STATE_INCORRECT"
    if ALLOW[leaf][state] == "0":
        if leaf == "TDH_MEM_RANGE_BLOCK" and flag(state, "any_blocked"):
            return "TDX_GPA_RANGE_ALREADY_BLOCKED|RCX"
        absent = not flag(state, "guest_accessible_leaf")
        if leaf == "TDH_MR_EXTEND" or (leaf in ("TDH_MEM_RD", "TDH_MEM_WR") and absent):
            return "TDX_EPT_ENTRY_NOT_PRESENT|RCX"
        return "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"
    due = OPS[op_state]["tlb_tracking_required"] == "1" and flag(state, "tlb_tracking_required")
    takes_out = leaf in ("TDH_MEM_PAGE_REMOVE", "TDH_MEM_PAGE_RELOCATE")
    if takes_out and due and not flag(state, "any_blocked"):
        return "TDX_GPA_RANGE_NOT_BLOCKED|RCX"
    return "TDX_SUCCESS"


def expected_state(leaf: str, op_state: str, state: str) -> str:
    """Return the state after success."""
    if leaf == "TDH_MEM_PAGE_REMOVE":
        return "REMOVED" if OPS[op_state]["import_in_progress"] == "1" else "FREE"
    return {
        "TDH_MEM_PAGE_ADD": "MAPPED",
        "TDH_MEM_PAGE_AUG": "PENDING",
        "TDH_MEM_RANGE_BLOCK": BLOCKED.get(state, ""),
        "TDH_MEM_RANGE_UNBLOCK": UNBLOCKED.get(state, ""),
        "TDH_MEM_PAGE_RELOCATE": UNBLOCKED.get(state, state),
    }.get(leaf, state)


@pytest.mark.parametrize("op_state", OPS)
@pytest.mark.parametrize("leaf", LEAVES)
def test_every_state(make_host: Any, leaf: str, op_state: str) -> None:
    host = make_host(debug="1")
    for gfn, state in enumerate(FLAGS):
        host.force(gfn, 10 + gfn, state)
    host.set("TD_EPOCH", 5)
    host.set("OP_STATE", op_state)
    for gfn, state in enumerate(FLAGS):
        target = i64(gfn << 12) if leaf == "TDH_MR_EXTEND" else i64(gfn)
        args = (target, i64(40 + gfn)) if leaf in TAKES_PAGE else (target,)
        status = host.status(LEAVES[leaf], *args)
        assert status == expected_status(leaf, op_state, state), state
        if status == "TDX_SUCCESS":
            assert host.state(gfn) == expected_state(leaf, op_state, state), state


@pytest.mark.parametrize("op_state", OPS)
@pytest.mark.parametrize(
    ("leaf", "function"), [("TDH_MEM_TRACK", leaves.track), ("TDH_MR_FINALIZE", leaves.finalize)]
)
def test_every_op_state(host: Any, leaf: str, function: Any, op_state: str) -> None:
    host.set("OP_STATE", op_state)
    allowed = OP_ALLOW[leaf][op_state] == "1"
    assert host.status(function) == ("TDX_SUCCESS" if allowed else "TDX_OP_STATE_INCORRECT")


@pytest.mark.parametrize("op_state", OPS)
def test_enter_in_every_op_state(host: Any, op_state: str) -> None:
    host.set("OP_STATE", op_state)
    allowed = OP_ALLOW["TDH_VP_ENTER"][op_state] == "1"
    expected = "TDX_SUCCESS" if allowed else "TDX_OP_STATE_INCORRECT"
    assert host.status(leaves.vp_enter, 0) == expected


TRACKED = {
    "TDH_MEM_PAGE_REMOVE": leaves.remove,
    "TDH_MEM_PAGE_RELOCATE": leaves.relocate,
    "TDH_MEM_RANGE_UNBLOCK": leaves.unblock,
}


@pytest.mark.parametrize(
    ("leaf", "op_state"),
    [(leaf, op) for leaf in TRACKED for op in OPS if OP_ALLOW[leaf][op] == "1"],
)
def test_tracking_is_demanded_by_the_flags(make_host: Any, op_state: str, leaf: str) -> None:
    host = make_host()
    host.force(0, 10, "BLOCKED")
    host.set("OP_STATE", op_state)
    host.run(lambda tx: tx.put(host.td.pamt.bepoch, i64(10), 1))
    args = (i64(0), i64(40)) if leaf in TAKES_PAGE else (i64(0),)
    due = OPS[op_state]["tlb_tracking_required"] == "1"
    operand = "SEPT_TREE" if leaf == "TDH_MEM_RANGE_UNBLOCK" else "RCX"
    expected = f"TDX_TLB_TRACKING_NOT_DONE|{operand}" if due else "TDX_SUCCESS"
    assert host.status(TRACKED[leaf], *args) == expected


@pytest.mark.parametrize("state", [s for s in FLAGS if not s.startswith("NL_")])
def test_accept_in_every_state(host: Any, state: str) -> None:
    host.force(0, 10, state)
    answer = host.run(host.ops.guest_call, 0, GuestCall.ACCEPT, i64(0), 0)
    if ALLOW["TDG_MEM_PAGE_ACCEPT"][state] == "1":
        assert (answer.action, answer.done, answer.status) == (CallAction.DONE, 1, 0)
        after = {"PENDING": "MAPPED", "PENDING_EXPORTED_DIRTY": "EXPORTED_DIRTY"}
        assert host.state(0) == after[state]
        return
    assert (answer.done, host.state(0)) == (0, state)
    if flag(state, "guest_accessible_leaf"):
        assert answer.status_name == "TDX_PAGE_ALREADY_ACCEPTED|0"
    elif state == "REMOVED":
        assert answer.status_name == "TDX_PAGE_SIZE_MISMATCH|0"
    else:
        assert answer.action is CallAction.FAULT


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("state", FLAGS)
def test_guest_access_in_every_state(host: Any, state: str, write: bool) -> None:
    host.force(0, 10, state)
    (code,) = host.run(host.ops.guest_access, 0, runs(0, 10), write).codes
    if flag(state, "guest_fully_accessible_leaf" if write else "guest_accessible_leaf"):
        assert code == AccessCode.OK
    elif flag(state, "any_pending_and_guest_acceptable"):
        assert code == AccessCode.EXCEPTION
    else:
        assert code == AccessCode.FAULT
