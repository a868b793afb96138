"""The in-kernel ownership selftest, as a matrix: one frame, two gfns, each call in each state.

The expected errnos and effects are written from pkvm.md §1, not from the plugin's table. Each cell
asserts the return code and every component's state (pkvm.md §5 "In-kernel selftest").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rmemd.errors import RmemError
from rmemd.testing.hookbench import HookBench
from rmemd_pkvm import PkvmPlatform
from rmemd_pkvm.hypercalls import El2, frames

PFN, GFN0, GFN1 = 7, 0x40, 0x41
OWNED, SHARED_OWNED, BORROWED, NOPAGE, POISON = range(5)
HOST, HYP, GUEST = range(3)
EPERM, ENOENT, EAGAIN, EBUSY, EHWPOISON = -1, -2, -11, -16, -133


def _a(number: int) -> Any:
    return np.array([number], dtype=np.int64)


class Lab:
    """One frame, a non-protected (n) and a protected (p) guest, each with a loaded vCPU."""

    def __init__(self) -> None:
        platform = PkvmPlatform()
        self.bench = HookBench(platform, "pkvm", nframes=16)
        self.vm = self.bench.make_vm("pkvm-today")
        self.el2: El2 = platform.el2
        self.n: int = self.run(lambda tx: self.el2.init_vm(tx, protected=False))
        self.p: int = self.run(lambda tx: self.el2.init_vm(tx, protected=True))
        for handle in (self.n, self.p):
            self.run(lambda tx, h=handle: self.el2.vcpu_load(tx, h, 0))

    def run(self, op: Callable[..., Any]) -> Any:
        return self.bench.run(self.vm, op)

    def do(self, name: str) -> int:
        """Make one call and return its errno as EL2 would."""
        e, pfn = self.el2, _a(PFN)
        gfn = _a(GFN1 if name.endswith("1") else GFN0)
        ops: dict[str, Callable[..., Any]] = {
            "share0": lambda tx: e.host_share_guest(tx, self.n, pfn, gfn),
            "unshare0": lambda tx: e.host_unshare_guest(tx, self.n, gfn),
            "donate0": lambda tx: e.host_donate_guest(tx, self.p, pfn, gfn),
            "gshare0": lambda tx: e.call(tx, "guest_share_host", e.pages_of(self.p, gfn)),
            "gunshare0": lambda tx: e.call(tx, "guest_unshare_host", e.pages_of(self.p, gfn)),
            "relinquish0": lambda tx: e.call(
                tx, "guest_relinquish_to_host", e.pages_of(self.p, gfn)
            ),
            "reclaim0": lambda tx: e.host_reclaim_page_guest(tx, self.p, gfn),
            "force": lambda tx: int(e.host_force_reclaim_page_guest(tx, pfn)[0]),
        }
        op = ops.get(name.replace("1", "0"), lambda tx: e.call(tx, name, frames(pfn)))
        try:
            return self.run(op) or 0
        except RmemError as refused:
            return refused.details.vendor_value or -refused.errno

    def state(self) -> dict[str, int]:
        """Read every component of the frame's state."""
        tables: Any = self.bench.space.tables
        at = {name: tables[f"platform/pkvm/{name}"].at(PFN) for name in (
            "host_state", "hyp_state", "annotation", "hyp_refcount", "host_share_guest_count"
        )}  # fmt: skip
        seen = {"host": at["host_state"], "hyp": at["hyp_state"], "pins": at["hyp_refcount"]}
        seen["shares"] = at["host_share_guest_count"]
        seen["owner"] = (at["annotation"] >> 1) & 7
        for vm, handle in (("n", self.n), ("p", self.p)):
            for i, gfn in enumerate((GFN0, GFN1)):
                seen[f"{vm}{i}"] = int(self.el2.guest_states(handle, _a(gfn))[0])
        return seen


REACH: dict[str, list[str]] = {
    "owned": [],
    "shared with EL2": ["host_share_hyp"],
    "pinned by EL2": ["host_share_hyp", "hyp_pin_shared_mem"],
    "owned by EL2": ["host_donate_hyp"],
    "shared once": ["share0"],
    "shared twice": ["share0", "share1"],
    "donated": ["donate0"],
    "lent by its guest": ["donate0", "gshare0"],
    "poisoned": ["donate0", "force"],
}
CALLS = (
    "host_share_hyp", "hyp_pin_shared_mem", "hyp_unpin_shared_mem", "host_unshare_hyp",
    "host_donate_hyp", "hyp_donate_host", "share0", "share1", "unshare0", "unshare1", "donate0",
    "donate1", "gshare0", "gunshare0", "relinquish0", "force", "reclaim0",
)  # fmt: skip
_P, _N, _A, _B, _H = EPERM, ENOENT, EAGAIN, EBUSY, EHWPOISON
# by state: the errno of each of CALLS. EL2 panics on an unpin too many; here it is -EBUSY.
#                        shr pin unp uns don hdo  s0  s1  u0  u1  d0  d1 gsh gun rel  fr rec
EXPECTED = {
    "owned":             (0, _P, _P, _P,  0, _P,  0,  0, _N, _N,  0,  0, _N, _N, _N, _A, _N),
    "shared with EL2":  (_P,  0, _B,  0, _P, _P, _P, _P, _N, _N, _P, _P, _N, _N, _N, _A, _N),
    "pinned by EL2":    (_P,  0,  0, _B, _P, _P, _P, _P, _N, _N, _P, _P, _N, _N, _N, _A, _N),
    "owned by EL2":     (_P, _P, _P, _P, _P,  0, _P, _P, _N, _N, _P, _P, _N, _N, _N, _P, _N),
    "shared once":      (_P, _P, _P, _P, _P, _P, _P,  0,  0, _N, _P, _P, _N, _N, _N, _A, _N),
    "shared twice":     (_P, _P, _P, _P, _P, _P, _P, _P,  0,  0, _P, _P, _N, _N, _N, _A, _N),
    "donated":          (_P, _P, _P, _P, _P, _P, _P, _P, _N, _N, _P, _P,  0, _P,  0,  0,  0),
    "lent by its guest": (_P, _P, _P, _P, _P, _P, _P, _P, _N, _N, _P, _P, _P, 0, _P, _A,  0),
    "poisoned":          (0, _P, _P, _P,  0, _P,  0,  0, _N, _N, _P,  0, _H, _H, _H, _A,  0),
}  # fmt: skip
EFFECTS: dict[str, dict[str, int]] = {
    "host_share_hyp": {"host": SHARED_OWNED, "hyp": BORROWED},
    "hyp_pin_shared_mem": {"pins": +1},
    "hyp_unpin_shared_mem": {"pins": -1},
    "host_unshare_hyp": {"host": OWNED, "hyp": NOPAGE},
    "host_donate_hyp": {"host": NOPAGE, "hyp": OWNED, "owner": HYP},
    "hyp_donate_host": {"host": OWNED, "hyp": NOPAGE, "owner": HOST},
    "share0": {"host": SHARED_OWNED, "n0": BORROWED, "shares": +1},
    "share1": {"host": SHARED_OWNED, "n1": BORROWED, "shares": +1},
    "unshare0": {"n0": NOPAGE, "shares": -1},
    "unshare1": {"n1": NOPAGE, "shares": -1},
    "donate0": {"host": NOPAGE, "p0": OWNED, "owner": GUEST},
    "donate1": {"host": NOPAGE, "p1": OWNED, "owner": GUEST},
    "gshare0": {"host": BORROWED, "p0": SHARED_OWNED, "owner": HOST},
    "gunshare0": {"host": NOPAGE, "p0": OWNED, "owner": GUEST},
    "relinquish0": {"host": OWNED, "p0": NOPAGE, "owner": HOST},
    "force": {"host": OWNED, "p0": POISON, "owner": HOST},
    "reclaim0": {"host": OWNED, "p0": NOPAGE, "owner": HOST},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("state", REACH)
def test_one_frame_two_gfns(state: str, call: str) -> None:
    lab = Lab()
    for step in REACH[state]:
        assert lab.do(step) == 0
    before = lab.state()
    expected = EXPECTED[state][CALLS.index(call)]
    if expected:
        with lab.bench.unchanged():
            assert lab.do(call) == expected
        return
    assert lab.do(call) == 0
    after = dict(before)
    for component, value in EFFECTS[call].items():
        counted = component in ("pins", "shares")
        after[component] = before[component] + value if counted else value
    if call.startswith("unshare"):  # the host's alone after the last share only
        after["host"] = OWNED if after["shares"] == 0 else SHARED_OWNED
    assert lab.state() == after


def test_the_annotation_names_owner_vm_and_gfn_as_the_kernel_packs_them() -> None:
    lab = Lab()
    lab.do("donate1")
    tables: Any = lab.bench.space.tables
    annotation = tables["platform/pkvm/annotation"].at(PFN)
    assert annotation >> 60 == 2  # KVM_HOST_INVALID_PTE_TYPE_DONATION
    assert annotation & 1 == 0
    extra = (annotation >> 4) & ((1 << 56) - 1)
    assert (extra & 0xFFFF, extra >> 16) == (lab.p, GFN1)


def test_an_injected_error_is_answered_once_and_changes_nothing() -> None:
    lab = Lab()
    lab.bench.injections["__pkvm_host_donate_guest"] = "-ENOMEM"
    with lab.bench.unchanged():
        assert lab.do("donate0") == -12
    assert lab.do("donate0") == 0
