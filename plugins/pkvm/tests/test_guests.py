"""Random sequences of hooks on two guests, against a model of what pkvm.md §8 lets happen.

Also the invariant that needs bytes: no frame that the host can read holds what was a guest's
alone, unless the guest shared it or the frame was cleared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmemd.errors import RmemError
from rmemd.hooks import Agent, CallAction, GuestCall, HostAccess, Why
from rmemd.testing.hookbench import HookBench, runs
from rmemd_pkvm import PkvmPlatform

NFRAMES, GFNS = 6, (0x10, 0x11)
EPERM, EFAULT = 1, 14


@dataclass
class Model:
    """Leaves by (guest, gfn): ("owned" | "lent" | "poison", frame); frames with secrets."""

    forced_punch: bool
    leaves: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)
    secret: set[int] = field(default_factory=set)

    def used(self) -> dict[int, tuple[int, int]]:
        return {f: at for at, (kind, f) in self.leaves.items() if kind != "poison"}

    def take(self, at: tuple[int, int], kind: str) -> None:
        """The host gets the frame of a leaf back."""
        self.leaves[at] = (kind, -1)
        if not kind:
            del self.leaves[at]

    def map(self, at: tuple[int, int], pfn: int) -> int:
        kind, frame = self.leaves.get(at, ("", -1))
        if kind == "poison":
            return EFAULT
        if frame == pfn:
            return 0
        if kind or pfn in self.used():
            return EPERM
        self.leaves[at] = ("owned", pfn)
        self.secret.add(pfn)
        return 0

    def zap(self, at: tuple[int, int], why: Why) -> int:
        kind, _ = self.leaves.get(at, ("", -1))
        if why is Why.CLOSE and kind:
            self.take(at, "")
        if why in (Why.CLOSE, Why.MIGRATE, Why.POISON) or kind in ("", "poison"):
            return 0
        if why is Why.PUNCH and self.forced_punch and kind == "owned":
            self.take(at, "poison")
            return 0
        return EPERM

    def call(self, at: tuple[int, int], call: GuestCall) -> tuple[CallAction, int]:
        kind, frame = self.leaves.get(at, ("", -1))
        if call is GuestCall.RELINQUISH:
            if kind == "owned":
                self.take(at, "")
            return CallAction.DONE, 0 if kind in ("owned", "") else -3
        if not kind:
            return CallAction.FAULT, 0
        wanted, then = ("owned", "lent") if call is GuestCall.SHARE else ("lent", "owned")
        if kind != wanted:
            return CallAction.DONE, -3
        self.leaves[at] = (then, frame)
        (self.secret.discard if then == "lent" else self.secret.add)(frame)
        return CallAction.CONVERT, 0

    def kernel_touch(self, pfn: int) -> None:
        at = self.used().get(pfn)
        if at and self.leaves[at][0] == "owned":
            self.take(at, "poison")

    def move(self, at: tuple[int, int], dst: int) -> int:
        kind, _ = self.leaves.get(at, ("", -1))
        if kind != "owned":
            return EPERM if kind == "lent" else 0
        if dst in self.used():
            return EPERM
        self.leaves[at] = ("owned", dst)
        self.secret.add(dst)
        return 0


class Guests:
    """Two guests of one variant on one host."""

    def __init__(self, variant: str) -> None:
        self.bench = HookBench(PkvmPlatform(), "pkvm", nframes=NFRAMES)
        self.vms = [self.bench.make_vm(variant) for _ in range(2)]

    def run(self, guest: int, op: str, *args: Any) -> Any:
        return self.bench.run(self.vms[guest], getattr(self.bench.ops(self.vms[guest]), op), *args)

    def attempt(self, guest: int, op: str, *args: Any) -> int:
        try:
            self.run(guest, op, *args)
        except RmemError as refused:
            return refused.errno
        return 0

    def host_states(self) -> list[int]:
        """Return the host's states; a frame has an annotation exactly where it is NOPAGE."""
        tables: Any = self.bench.space.tables
        states: list[int] = tables["platform/pkvm/host_state"].view.tolist()
        annotated = tables["platform/pkvm/annotation"].view != 0
        assert annotated.tolist() == [state == 3 for state in states]
        return states

    def leaves(self) -> dict[tuple[int, int], str]:
        names = {}
        for guest, vm in enumerate(self.vms):
            page_state = self.bench.ops(vm).page_state
            assert page_state is not None
            states = page_state(np.array(GFNS, dtype=np.int64), np.zeros(2, dtype=np.int64))
            kinds = ("owned", "lent", "borrowed", "", "poison")
            found = [kinds[code] for code in states.codes]
            names |= {(guest, g): kind for g, kind in zip(GFNS, found, strict=True) if kind}
        return names


@pytest.mark.parametrize("variant", ["pkvm-today", "pkvm-gmem"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_random_hooks_keep_the_invariants(variant: str, data: st.DataObject) -> None:
    guests, model = Guests(variant), Model(variant == "pkvm-gmem")
    calls = [GuestCall.SHARE, GuestCall.UNSHARE, GuestCall.RELINQUISH]
    ops = ["map", "map", "zap", "call", "call", "touch"]
    ops += ["move"] if variant == "pkvm-gmem" else []
    for _ in range(data.draw(st.integers(5, 30))):
        op, guest = data.draw(st.sampled_from(ops)), data.draw(st.integers(0, 1))
        gfn, pfn = data.draw(st.sampled_from(GFNS)), data.draw(st.integers(0, NFRAMES - 1))
        at, frame = (guest, gfn), model.leaves.get((guest, gfn), ("", 0))[1]
        if op == "map":
            expected = model.map(at, pfn)
            assert guests.attempt(guest, "map", runs(gfn, pfn)) == expected
        elif op == "zap":
            why = data.draw(st.sampled_from(list(Why)))
            expected = model.zap(at, why)
            assert guests.attempt(guest, "invalidate_start", runs(gfn, frame), why) == expected
        elif op == "call":
            call = data.draw(st.sampled_from(calls))
            answer = guests.run(guest, "guest_call", 0, call, np.array([gfn], dtype=np.int64), 0)
            assert (answer.action, answer.status) == model.call(at, call)
        elif op == "touch":
            pfns, access = np.array([pfn]), HostAccess(Agent.HOST_KERNEL, False)
            touched = guests.bench.run(
                guests.vms[guest], guests.bench.platform.host_access, pfns, access
            )
            model.kernel_touch(pfn)
            model.secret -= set(pfns[touched.destroyed].tolist())
        else:
            src, dst = np.array([max(frame, 0)]), np.array([pfn])
            gfns = np.array([gfn], dtype=np.int64)
            assert guests.attempt(guest, "migrate_folio", gfns, src, dst) == model.move(at, pfn)
        cleared = {f for o in guests.bench.byte_ops if o.kind == "scrub" for f in o.pfns.tolist()}
        guests.bench.byte_ops.clear()
        model.secret -= cleared
        assert guests.leaves() == {a: kind for a, (kind, _) in model.leaves.items()}
        used = model.used()
        expected_hosts = [
            {"owned": 3, "lent": 2}[model.leaves[used[f]][0]] if f in used else 0
            for f in range(NFRAMES)
        ]
        assert guests.host_states() == expected_hosts
        assert all(expected_hosts[f] == 3 for f in model.secret)
