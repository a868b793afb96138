"""An engine beside the specification: telling and finding a difference.

Owns the only bridge between the two: which frame number stands for which of the specification's
frames, and which refusal is which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.errors import RmemError
from rmemd.model.host import Use
from rmemd.units import pages

from .objects import PRIVATE, SHARED, Expected, File, Frame, Vm
from .spec import Spec
from .store import CHANGING_ONLY, NO_FILTER, WHOLE_BATCHES

BASE, SPAN = 0x100, 24
FILE_PAGES = 12
NFRAMES = 512
HOG_PAGES = 488
GUEST_MEMFD = 4
INIT_SHARED, MMAP = 2, 1
VMS_MAX, FILES_MAX = 5, 8
TENANT, DEVICE = "uid:1000", "device/1"

Op = tuple[Any, ...]

# what random runs go around; the specification excuses the others
EXCUSED = frozenset({WHOLE_BATCHES, NO_FILTER, CHANGING_ONLY})


class DifferenceError(AssertionError):
    """The engine and the specification disagree; the message says how, in words."""


class Pair:
    """One engine beside one specification."""

    def __init__(self, excused: frozenset[str] = EXCUSED) -> None:
        self.excused = excused
        options = Options(nframes=NFRAMES, nnodes=1, seed=1, kept_records=64)
        self.engine = Engine(options, Guard(lambda: 0.0))
        free = self.engine.core.host.counts()[Use.FREE]
        self.spec = Spec(free, excused)
        self.pfns: dict[Frame, int] = {}
        self.vms: list[int] = []
        self.files: list[int] = []
        self.got: list[tuple[Frame, int]] = []
        self.session = self.engine.open_session(TENANT, "host", "socket").session
        self.doing: Op = ()
        # what came of what, so that a test can require that runs get everywhere
        self.seen: Counter[tuple[str, str]] = Counter()

    def close(self) -> None:
        """Let the engine's memory go."""
        self.engine.close()

    # --- telling a difference ------------------------------------------------------------------
    def _differ(self, section: str, expected: object, got: object) -> DifferenceError:
        return DifferenceError(f"{self.doing}: expected {expected}, got {got} [{section}]")

    def _same(self, section: str, what: str, expected: object, got: object) -> None:
        if expected != got:
            raise self._differ(section, f"{what} {expected}", got)

    def _judge(
        self,
        expected: Expected,
        call: Callable[[], Any],
        read: Callable[[Any], object] = lambda v: v,
    ) -> Any:
        """Make a call; its result or refusal must be what the specification says."""
        try:
            result = call()
        except RmemError as refusal:
            self.seen[self.doing[0], refusal.reason.name] += 1
            self._judge_refusal(expected, refusal)
            return None
        if expected.errno:
            raise self._differ(expected.section, expected, f"ok, {read(result)}")
        if expected.value is not None and expected.value != read(result):
            raise self._differ(expected.section, expected, f"ok, {read(result)}")
        self.seen[self.doing[0], "ok"] += 1
        return result

    def _judge_refusal(self, expected: Expected, refusal: RmemError) -> None:
        got = f"{refusal} (errno {refusal.errno})"
        same = expected.errno and expected.errno == refusal.errno
        same = same and expected.reason in ("", refusal.reason.name)
        if same and expected.offset is not None:
            same = refusal.details.error_offset == expected.offset
        if not same:
            raise self._differ(expected.section, expected, got)

    # --- comparing -----------------------------------------------------------------------------
    def _compare(self) -> None:
        self.pfns = {f: pfn for f, pfn in self.pfns.items() if f in self.spec.frames}
        for number in self.files:
            self._compare_file(self.spec.files[number])
        self._compare_holders()
        for number in self.vms:
            self._compare_vm(self.spec.vms[number])
        free = self.engine.core.host.counts()[Use.FREE]
        self._same("reliability.md §3 I1 to I4", "free frames", self.spec.free, free)

    def _compare_file(self, file: File) -> None:
        name = f"file/{file.file}"
        self._same(
            "DESIGN.md §4", f"{name} open", file.open, self.engine.core.files.exists(file.file)
        )
        if not file.open:
            return
        found = self.engine.core.files.get(file.file)
        span = pages(0, file.npages)
        for half, table in ((PRIVATE, found.frames), (SHARED, found.shared)):
            got = {i: pfn - 1 for i, pfn in enumerate(table.get(span).tolist()) if pfn}
            mine = {pgoff: f for (pgoff, of), f in file.pages.items() if of == half}
            what = f"{name}: present {half} pages"
            self._same("DESIGN.md §4, halves", what, sorted(mine), sorted(got))
            for pgoff, frame in mine.items():
                self._bind(frame, got[pgoff], f"{name} pgoff {pgoff} {half}")
        if file.in_place:
            shared = set(np.flatnonzero(found.attributes.get(span) == 0).tolist())
            what = f"{name}: shared by attribute"
            self._same("restrictedmem.md §2 in-place", what, file.shared_pgoffs, shared)

    def _bind(self, frame: Frame, pfn: int, page: str) -> None:
        if self.pfns.setdefault(frame, pfn) != pfn:
            raise self._differ("reliability.md §3 I1", f"{page} on pfn {self.pfns[frame]}", pfn)

    def _compare_holders(self) -> None:
        pfns = list(self.pfns.values())
        if len(set(pfns)) != len(pfns):
            twice = [pfn for pfn, n in Counter(pfns).items() if n > 1]
            raise self._differ("reliability.md §3 I1", "frames of one page each", twice)
        host, at = self.engine.core.host, np.array(pfns, dtype=np.int64)
        counts = zip(host.refs.get(at).tolist(), host.pins.get(at).tolist(), strict=True)
        for (frame, pfn), got in zip(self.pfns.items(), counts, strict=True):
            mine = {who: n for who, n in frame.holds.items() if n}
            sums = (0, 0)
            for (_, longterm), n in mine.items():
                sums = (sums[0], sums[1] + n) if longterm else (sums[0] + n, sums[1])
            self._same("pkvm.md §7", f"pfn {pfn}: (references, pins)", sums, got)
            if mine:
                held: Counter[tuple[str, bool]] = Counter()
                for h in self.engine.core.ledger.holders(pfn):
                    # a pin's handle is part of its holder's name here
                    held[h.name.partition(" pin ")[0], h.longterm] += h.count
                self._same("reliability.md §3 I2", f"pfn {pfn}: holders", mine, dict(held))

    def _compare_vm(self, vm: Vm) -> None:
        found, gfns = self.engine.core.vms.get(vm.vm), pages(BASE, SPAN)
        entries = found.mirror.get(gfns).tolist()
        got = {BASE + i: ((e >> 1) - 1, bool(e & 1)) for i, e in enumerate(entries) if e}
        mine = {gfn: (self.pfns[f], shared) for gfn, (f, shared) in sorted(vm.maps.items())}
        what = f"{vm.label}: mapped {{gfn: (pfn, shared)}}"
        self._same("DESIGN.md §4 mirror, restrictedmem.md §2", what, mine, got)
        if vm.traits.private_memory and not vm.traits.in_place:
            shared = set((np.flatnonzero(found.attributes.get(gfns) == 0) + BASE).tolist())
            what = f"{vm.label}: shared by attribute"
            self._same("restrictedmem.md §2 attributes", what, vm.shared_gfns, shared)
