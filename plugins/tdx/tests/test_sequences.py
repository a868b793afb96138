"""Random sequences of leaves against a dictionary per page, written from tdx.md §2, §3 and §5."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmemd_tdx import leaves

GFNS, FRAMES, VCPUS = range(4), range(10, 16), range(3)
gfns, frames = st.sampled_from(GFNS), st.sampled_from(FRAMES)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("aug"), gfns, frames),
        st.tuples(st.just("relocate"), gfns, frames),
        st.tuples(st.sampled_from(["accept", "block", "unblock", "remove"]), gfns),
        st.tuples(st.just("track")),
        st.tuples(st.sampled_from(["vp_enter", "td_exit"]), st.sampled_from(VCPUS)),
    ),
    max_size=40,
)


@dataclass(frozen=True)
class Page:
    frame: int
    accepted: bool = False
    blocked_in: int = 0

    @property
    def state(self) -> str:
        if self.accepted:
            return "BLOCKED" if self.blocked_in else "MAPPED"
        return "PENDING_BLOCKED" if self.blocked_in else "PENDING"


class Oracle:
    """A running TD. A blocked page is safe once the epoch has moved on and no vCPU that entered
    in its epoch or before is inside."""

    def __init__(self) -> None:
        self.pages: dict[int, Page] = {}
        self.epoch = 1
        self.inside: dict[int, int] = {}

    def used(self) -> set[int]:
        return {page.frame for page in self.pages.values()}

    def unsafe(self, page: Page) -> str:
        if not page.blocked_in:
            return "TDX_GPA_RANGE_NOT_BLOCKED|RCX"
        stale = [vcpu for vcpu, epoch in self.inside.items() if epoch <= page.blocked_in]
        if stale or self.epoch <= page.blocked_in:
            return "TDX_TLB_TRACKING_NOT_DONE|RCX"
        return ""

    def aug(self, gfn: int, frame: int) -> str:
        if gfn in self.pages:
            return "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"
        if frame in self.used():
            return "TDX_PAGE_METADATA_INCORRECT|R8"
        self.pages[gfn] = Page(frame)
        return ""

    def accept(self, gfn: int) -> str:
        page = self.pages.get(gfn)
        if page is None or page.blocked_in:
            return "TD exit"
        self.pages[gfn] = replace(page, accepted=True)
        return "TDX_PAGE_ALREADY_ACCEPTED|0" if page.accepted else ""

    def block(self, gfn: int) -> str:
        page = self.pages.get(gfn)
        if page is None:
            return "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"
        if page.blocked_in:
            return "TDX_GPA_RANGE_ALREADY_BLOCKED|RCX"
        self.pages[gfn] = replace(page, blocked_in=self.epoch)
        return ""

    def unblock(self, gfn: int) -> str:
        page = self.pages.get(gfn)
        if page is None or not page.blocked_in:
            return "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"
        if self.unsafe(page):
            return "TDX_TLB_TRACKING_NOT_DONE|SEPT_TREE"
        self.pages[gfn] = replace(page, blocked_in=0)
        return ""

    def remove(self, gfn: int) -> str:
        page = self.pages.get(gfn)
        if page is None:
            return "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"
        if not (problem := self.unsafe(page)):
            del self.pages[gfn]
        return problem

    def relocate(self, gfn: int, frame: int) -> str:
        page = self.pages.get(gfn)
        if page is None:
            return "TDX_EPT_ENTRY_STATE_INCORRECT|RCX"
        if frame == page.frame:
            return "TDX_OPERAND_INVALID|R8"
        if problem := self.unsafe(page):
            return problem
        if frame in self.used():
            return "TDX_PAGE_METADATA_INCORRECT|R8"
        self.pages[gfn] = Page(frame, page.accepted)
        return ""

    def track(self) -> str:
        if self.epoch - 1 in self.inside.values():
            return "TDX_PREVIOUS_TLB_EPOCH_BUSY"
        self.epoch += 1
        return ""

    def vp_enter(self, vcpu: int) -> str:
        if vcpu in self.inside:
            return "TDX_OPERAND_BUSY|RCX"
        self.inside[vcpu] = self.epoch
        return ""

    def td_exit(self, vcpu: int) -> str:
        del self.inside[vcpu]
        return ""


def perform(host: Any, name: str, arguments: list[int]) -> str:
    """Run a step on the plugin; return its status as the oracle spells it."""
    if name in ("vp_enter", "td_exit"):
        status = host.status(getattr(leaves, name), *arguments)
    elif name == "accept":
        target = np.array(arguments, dtype=np.int64)
        done = host.leaf(leaves.accept, target, 0)
        status = "TD exit" if done.td_exit else done.status
    else:
        pages = [np.array([number], dtype=np.int64) for number in arguments]
        status = host.status(getattr(leaves, name), *pages)
    return "" if status == "TDX_SUCCESS" else str(status)


@settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps)
def test_any_sequence(make_host: Any, sequence: list[tuple[Any, ...]]) -> None:
    host, oracle = make_host(vcpus=len(VCPUS)), Oracle()
    host.finalize()
    for name, *arguments in sequence:
        if name == "td_exit" and arguments[0] not in oracle.inside:
            continue
        assert perform(host, name, arguments) == getattr(oracle, name)(*arguments)
        for gfn in GFNS:
            page = oracle.pages.get(gfn)
            assert host.state(gfn) == (page.state if page else "FREE")
        assert [host.pt(frame) == 3 for frame in FRAMES] == [
            frame in oracle.used() for frame in FRAMES
        ]
