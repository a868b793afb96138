"""Random hypercalls against a specification written from pkvm.md §1, with §8's invariants.

``spec`` is pure and per page, in the style of the ghost specification (pkvm.md §5): it takes the
abstract state before and the arguments, and gives the errno and the abstract state after. It
knows nothing of the plugin's table.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rmemd.errors import RmemError
from rmemd.testing.hookbench import HookBench
from rmemd_pkvm import PkvmPlatform
from rmemd_pkvm.hypercalls import frames

EPERM, ENOENT, EAGAIN, EBUSY, EHWPOISON = -1, -2, -11, -16, -133
FRAMES, GFNS, GUESTS = range(3), range(3), ("n", "p", "q")  # n is not protected


@dataclass(frozen=True)
class State:
    """Maps from frames to owners and borrowers, and from (guest, gfn) to leaves."""

    owner: dict[int, Any] = field(default_factory=lambda: dict.fromkeys(FRAMES, "host"))
    hyp_shared: dict[int, int] = field(default_factory=dict)  # frame -> EL2's pins
    leaves: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)


def _without(mapping: dict[Any, Any], key: Any) -> dict[Any, Any]:
    return {k: v for k, v in mapping.items() if k != key}


def spec(s: State, op: str, pfn: int, guest: str, gfn: int) -> tuple[int, State]:
    """Return what EL2 answers and the state afterwards."""
    at = (guest, gfn)
    kind, leaf_pfn = s.leaves.get(at, ("", -1))
    shared_at = [a for a, (k, f) in s.leaves.items() if k == "borrowed" and f == pfn]
    host_has = s.owner[pfn] == "host"
    plain = host_has and pfn not in s.hyp_shared and not shared_at
    if op == "host_share_hyp":
        return (0, replace(s, hyp_shared={**s.hyp_shared, pfn: 0})) if plain else (EPERM, s)
    if op in ("hyp_pin_shared_mem", "hyp_unpin_shared_mem"):
        if pfn not in s.hyp_shared:
            return EPERM, s
        pins = s.hyp_shared[pfn] + (1 if op == "hyp_pin_shared_mem" else -1)
        return (EBUSY, s) if pins < 0 else (0, replace(s, hyp_shared={**s.hyp_shared, pfn: pins}))
    if op == "host_unshare_hyp":
        if pfn not in s.hyp_shared:
            return EPERM, s
        freed = replace(s, hyp_shared=_without(s.hyp_shared, pfn))
        return (EBUSY, s) if s.hyp_shared[pfn] else (0, freed)
    if op == "host_donate_hyp":
        return (0, replace(s, owner={**s.owner, pfn: "hyp"})) if plain else (EPERM, s)
    if op == "hyp_donate_host":
        back = replace(s, owner={**s.owner, pfn: "host"})
        return (0, back) if s.owner[pfn] == "hyp" else (EPERM, s)
    if op == "host_share_guest":
        if kind or not host_has or pfn in s.hyp_shared:
            return EPERM, s
        return 0, replace(s, leaves={**s.leaves, at: ("borrowed", pfn)})
    if op == "host_unshare_guest":
        return (0, replace(s, leaves=_without(s.leaves, at))) if kind else (ENOENT, s)
    if op == "host_donate_guest":
        if not plain or kind:
            return EPERM, s
        return 0, State({**s.owner, pfn: at}, s.hyp_shared, {**s.leaves, at: ("owned", pfn)})
    if op in ("guest_share_host", "guest_unshare_host"):
        wanted, then = ("owned", "lent") if op == "guest_share_host" else ("lent", "owned")
        if kind == wanted:
            return 0, replace(s, leaves={**s.leaves, at: (then, leaf_pfn)})
        return {"": ENOENT, "poison": EHWPOISON}.get(kind, EPERM), s
    if op == "host_force_reclaim_page_guest":
        if s.owner[pfn] == "hyp":
            return EPERM, s
        if host_has or s.leaves[s.owner[pfn]][0] == "lent":
            return EAGAIN, s
        poisoned = {**s.leaves, s.owner[pfn]: ("poison", -1)}
        return 0, State({**s.owner, pfn: "host"}, s.hyp_shared, poisoned)
    assert op == "host_reclaim_page_guest"
    if not kind:
        return ENOENT, s
    owner = s.owner if kind == "poison" else {**s.owner, leaf_pfn: "host"}
    return 0, State(owner, s.hyp_shared, _without(s.leaves, at))


class Machine:
    """The plugin under the same calls."""

    def __init__(self) -> None:
        platform = PkvmPlatform()
        self.bench = HookBench(platform, "pkvm", nframes=len(FRAMES))
        self.vm = self.bench.make_vm("pkvm-gmem")
        self.el2 = platform.el2
        self.handles = {g: self._run(self.el2.init_vm, g != "n") for g in GUESTS}
        for handle in self.handles.values():
            self._run(self.el2.vcpu_load, handle, 0)

    def _run(self, op: Any, *args: Any) -> Any:
        return self.bench.run(self.vm, op, *args)

    def do(self, op: str, pfn: int, guest: str, gfn: int) -> int:
        e, handle = self.el2, self.handles[guest]
        p, g = np.array([pfn], dtype=np.int64), np.array([gfn], dtype=np.int64)
        try:
            if op in ("host_share_guest", "host_donate_guest"):
                self._run(getattr(e, op), handle, p, g)
            elif op in ("host_unshare_guest", "host_reclaim_page_guest"):
                self._run(getattr(e, op), handle, g)
            elif op in ("guest_share_host", "guest_unshare_host"):
                self._run(e.call, op, e.pages_of(handle, g))
            elif op == "host_force_reclaim_page_guest":
                return int(self._run(e.host_force_reclaim_page_guest, p)[0])
            else:
                self._run(e.call, op, frames(p))
        except RmemError as refused:
            return -refused.errno
        return 0

    def abstract(self) -> State:
        """Read the tables as the specification's maps, checking §8's invariants on the way."""
        tables: Any = self.bench.space.tables
        every = np.arange(len(FRAMES), dtype=np.int64)
        column = {n: tables[f"platform/pkvm/{n}"].get(every).tolist() for n in (
            "host_state", "hyp_state", "annotation", "hyp_refcount", "host_share_guest_count"
        )}  # fmt: skip
        leaves: dict[tuple[str, int], tuple[str, int]] = {}
        gfns = np.array(GFNS, dtype=np.int64)
        for guest, handle in self.handles.items():
            states = self.el2.guest_states(handle, gfns).tolist()
            found = self.el2.guest_pfns(handle, gfns).tolist()
            kinds = ("owned", "lent", "borrowed", "", "poison")
            leaves |= {(guest, g): (kinds[states[g]], found[g]) for g in GFNS if kinds[states[g]]}
        owner, hyp_shared = {}, {}
        for pfn in FRAMES:
            host, hyp = column["host_state"][pfn], column["hyp_state"][pfn]
            at = [a for a, (k, f) in leaves.items() if f == pfn and k in ("owned", "lent")]
            borrowed = [a for a, (k, f) in leaves.items() if f == pfn and k == "borrowed"]
            # one exclusive owner
            assert (host in (0, 1)) + (hyp == 0) + len(at) == 1
            # NOPAGE on the host exactly where there is an annotation
            assert (host == 3) == (column["annotation"][pfn] != 0)
            # the share count is that of the live borrowings
            assert column["host_share_guest_count"][pfn] == len(borrowed)
            # each borrower has its lender
            assert (hyp == 2 or bool(borrowed)) == (host == 1)
            assert (host == 2) == (bool(at) and leaves[at[0]][0] == "lent")
            owner[pfn] = "host" if host in (0, 1) else "hyp" if hyp == 0 else at[0]
            if hyp == 2:
                hyp_shared[pfn] = column["hyp_refcount"][pfn]
        return State(owner, hyp_shared, leaves)


OPS = {
    "": ("host_share_hyp", "hyp_pin_shared_mem", "hyp_unpin_shared_mem", "host_unshare_hyp",
         "host_donate_hyp", "hyp_donate_host", "host_force_reclaim_page_guest"),
    "n": ("host_share_guest", "host_unshare_guest"),
    "p": ("host_donate_guest", "guest_share_host", "guest_unshare_host", "host_reclaim_page_guest"),
}  # fmt: skip
STEPS = st.one_of(
    st.tuples(st.sampled_from(OPS[""]), st.sampled_from(FRAMES), st.just("n"), st.just(0)),
    st.tuples(
        st.sampled_from(OPS["n"]), st.sampled_from(FRAMES), st.just("n"), st.sampled_from(GFNS)
    ),
    st.tuples(
        st.sampled_from(OPS["p"]),
        st.sampled_from(FRAMES),
        st.sampled_from(("p", "q")),
        st.sampled_from(GFNS),
    ),
)


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, min_size=10, max_size=60))
def test_random_hypercalls_follow_the_specification(
    steps: list[tuple[str, int, str, int]],
) -> None:
    machine, expected = Machine(), State()
    for step in steps:
        code, expected = spec(expected, *step)
        if code:
            with machine.bench.unchanged():
                assert machine.do(*step) == code, step
        else:
            assert machine.do(*step) == 0, step
        assert machine.abstract() == expected, step
