"""What the tests share: one TD on a bench, its leaves, and refusals that leave no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rmemd.errors import RmemError
from rmemd.hooks import GuestCall, PageKind, Runs, Why
from rmemd.hooks.tables import same_state
from rmemd.testing.hookbench import HookBench, runs
from rmemd_tdx import TdxPlatform
from rmemd_tdx import tables as t


def i64(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


class Always(dict):
    """Injections that do not wear off."""

    def pop(self, point: str, default: str = "") -> str:
        return self.get(point, default)


class Host:
    """A bench with one TD. ``td`` are its tables, as the leaves take them."""

    def __init__(self, variant: str = "tdx-today", vcpus: int = 2, **config: str) -> None:
        self.bench = HookBench(TdxPlatform(), "tdx", nframes=64)
        self.vm = self.bench.make_vm(variant, config, vcpus)

    @property
    def consumer(self) -> Any:
        return self.bench.ops(self.vm).invalidate_start.__self__

    @property
    def td(self) -> Any:
        return self.consumer.td

    @property
    def ops(self) -> Any:
        return self.bench.ops(self.vm)

    def run(self, op: Any, *args: Any) -> Any:
        """Run a hook."""
        return self.bench.run(self.vm, op, *args)

    def leaf(self, leaf: Any, *args: Any) -> Any:
        """Run a leaf."""
        return self.bench.run(self.vm, leaf, self.td, *args)

    def refused(self, op: Any, *args: Any) -> RmemError:
        """Run a hook that must refuse and change nothing."""
        with self.bench.unchanged(), pytest.raises(RmemError) as caught:
            self.run(op, *args)
        return caught.value

    def status(self, leaf: Any, *args: Any) -> str:
        """Run a leaf; return its status. One that fails must change nothing."""
        before, caught = self.bench.space.snapshot(), None
        try:
            self.leaf(leaf, *args)
        except RmemError as refusal:
            caught = refusal.details
        if caught is None:
            return "TDX_SUCCESS"
        assert same_state(before, self.bench.space.snapshot()) == []
        assert caught.vendor_value == t.value_of(caught.vendor_status)
        assert caught.rule
        return caught.vendor_status

    def set(self, name: str, value: Any) -> None:
        """Force a field of the TD."""
        self.run(lambda tx: tx.set(self.td.fields, name, value))

    def force(self, gfn: int, pfn: int, state: str) -> None:
        """Force a page into a state, its frame's PAMT entry to match."""
        used = state not in ("FREE", "REMOVED")

        def write(tx: Any) -> None:
            tx.put(self.td.sept, i64(gfn), t.CODE[state])
            tx.put(self.td.hpa, i64(gfn), pfn if used else 0)
            tx.put(self.td.pamt.page_type, i64(pfn), t.PT_REG if used else t.PT_NDA)
            tx.put(self.td.pamt.owner, i64(pfn), self.vm if used else 0)

        self.run(write)

    def state(self, gfn: int) -> str:
        """Return the name of a page's state."""
        return str(t.STATES[self.td.sept.at(gfn)])

    def pt(self, pfn: int) -> int:
        """Return a frame's page type."""
        return int(self.td.pamt.page_type.at(pfn))

    def finalize(self) -> Any:
        """Finalize the TD and return MRTD."""
        return self.run(self.ops.finalize)

    def populate(self, page: Runs, source: Any, measure: bool = True) -> Any:
        """Populate normal pages."""
        kinds = np.full(page.total, PageKind.NORMAL, dtype=np.uint8)
        return self.run(self.ops.populate, page, kinds, measure, source)

    def zap(self, page: Runs, why: Why = Why.PUNCH) -> None:
        """Run the bracket of a zap."""
        self.run(self.ops.invalidate_start, page, why)
        self.run(self.ops.invalidate_end, page, why, True)

    def block(self, page: Runs) -> None:
        """Start a move: BLOCK, TRACK, kick."""
        self.run(self.ops.invalidate_start, page, Why.MIGRATE)

    def free(self, *pfns: int) -> list[bool]:
        """Return which frames cannot be given back."""
        return list(self.run(self.bench.platform.free, i64(*pfns)))


@pytest.fixture
def host() -> Host:
    """A TD that is being built."""
    return Host()


@pytest.fixture
def running() -> Host:
    """A finalized TD: gfn 0 (frame 10) accepted, gfn 1 (frame 11) pending."""
    return running_host()


def running_host(variant: str = "tdx-today", **config: str) -> Host:
    made = Host(variant, **config)
    made.finalize()
    made.run(made.ops.map, runs(0, 10, 2))
    made.run(made.ops.guest_call, 0, GuestCall.ACCEPT, i64(0), 0)
    return made


@pytest.fixture
def make_host() -> type[Host]:
    """Make a TD of a variant."""
    return Host


@pytest.fixture
def make_running() -> Any:
    """Make a finalized TD of a variant, with the pages of ``running``."""
    return running_host


@pytest.fixture
def always() -> type[Always]:
    """Make injections that do not wear off."""
    return Always
