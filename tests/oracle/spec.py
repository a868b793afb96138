"""The generic layer as an executable specification: sets, dicts and one page at a time.

Written from the reference (restrictedmem.md, pkvm.md §7, reliability.md §3, DESIGN.md §4), slow and
obvious, and sharing no code with the engine. Every operation returns what must be said, naming the
section it follows. Where the reference leaves a choice (which frame, which handle, which page of a
migration is told first), nothing is predicted: what was chosen is learned, and only relations are
kept. Here are the host's own operations; the others are below: ``holders``, ``access``,
``conversion``, ``layout``, ``store``.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Sequence

from .access import POISONED
from .holders import Holders
from .objects import PRIVATE, Expected, Frame
from .store import BAD_RANGE, RM2

EACH = "DESIGN.md §4 EACH"
MIGRATION = "DESIGN.md §4 Migration"
ERROR_FOLIO = RM2 + "error_folio"
OFFLINE = "DESIGN.md §4 offlining"
COMPACTION = "DESIGN.md §4 Compaction"
BLOCK = 512
# (source, destination or -1, outcome, errno, reason) of a page that was to move
Move = tuple[int, int, str, int, str]
# (section, expected, got)
Finding = tuple[str, object, object]
ERRNOS = {"UNMOVABLE": ("FOLIO_UNMOVABLE", 95), "BUSY": ("FOLIO_BUSY", 11)}


class Spec(Holders):
    """A host of NUMA nodes with what lives on it; ``reserved`` numbers were never free."""

    def __init__(
        self, nodes: Sequence[range], free: Sequence[int], reserved: Iterable[int] = ()
    ) -> None:
        super().__init__(nodes, free)
        self.reserved = frozenset(reserved)

    # --- migration -----------------------------------------------------------------------------
    def _outcomes(self, frame: Frame) -> tuple[frozenset[str], str]:
        """Return the outcomes that a page's migration may have, and the section (I9).

        A private folio, and in place every one, moves iff its VM has the hook; the NULL hook
        comes first and touches no count (§1 Migration).
        """
        if frame.page is None:
            return frozenset({"BUSY", "FAILED", "UNMOVABLE"}), "reliability.md §3 I1"
        file = self.files[frame.page[0]]
        vm = self.vms[file.vm]
        if frame.poisoned:
            return frozenset({"FAILED", "UNMOVABLE", "BUSY"}), "reliability.md §3 I9, I13"
        if vm.dead and not vm.destroyed:
            return frozenset({"MOVED", "FAILED", "UNMOVABLE", "BUSY"}), "unspecified when dead"
        governed = frame.page[2] == PRIVATE and not file.anonymous
        if governed and (vm.destroyed or not vm.traits.movable):
            return frozenset({"UNMOVABLE"}), "restrictedmem.md §1 Migration, NULL hook"
        if frame.elevated:
            return frozenset({"BUSY"}), MIGRATION + ", reliability.md §3 I9"
        return frozenset({"MOVED"}), MIGRATION

    def migrate(self, pfns: tuple[int, ...], node: int | None) -> Expected:
        """Each page moves or says why not. ``moved`` learns what became of them."""
        if node is not None and node not in self.everywhere:
            return Expected(MIGRATION, errno=errno.EINVAL, reason="BAD_NODE")
        frames = {pfn: self.by_pfn[pfn] for pfn in set(pfns) if pfn in self.by_pfn}
        moves = {pfn: self._outcomes(frame) for pfn, frame in frames.items()}
        told = frozenset(pfn for pfn, frame in frames.items() if frame.page is not None)
        return Expected(EACH, moves=moves, told=told)

    def moved(
        self, expected: Expected, moves: Iterable[Move], nodes: Sequence[int]
    ) -> list[Finding]:
        """Learn what became of pages; return what should not have.

        Args:
            expected: what was expected.
            moves: what is reported.
            nodes: those that destinations may lie in.
        """
        assert expected.moves is not None
        told, found = Counter[int](), list[Finding]()
        free, went, starved = self.free(nodes), 0, 0
        for src, dst, outcome, code, reason in moves:
            told[src] += 1
            may, section = expected.moves.get(src, (frozenset[str](), EACH))
            lacking = reason == "NO_FRAMES" and bool(may & {"MOVED", "BUSY"})
            starved += lacking
            if outcome not in may and not lacking:
                found.append((section, f"pfn {src}: {sorted(may)}", f"{outcome} {reason}"))
                continue
            if outcome in ERRNOS and len(may) == 1 and (reason, code) != ERRNOS[outcome]:
                found.append((section, f"pfn {src}: {ERRNOS[outcome]}", (reason, code)))
            if src in self.by_pfn and outcome in ("MOVED", "BUSY"):
                self._zap_shared(self.by_pfn[src])
            if outcome == "MOVED":
                went += 1
                found += self._move(self.by_pfn[src], dst, nodes)
        if starved and went < free:
            # a page's refusal is not its neighbours'
            found.append((EACH, f"{free} pages moved before frames run out", went))
        once = Counter(dict.fromkeys(expected.told, 1))
        for pfn, n in told.items():
            # what no page has (a hold or poison keeps it from being free) may be left out
            if n != 1:
                found.append((EACH, f"one outcome of pfn {pfn}", n))
        left = sorted(set(once) - set(told))
        if left:
            found.append((EACH, "an outcome of each page", f"none of {left}"))
        return found

    def _zap_shared(self, frame: Frame) -> None:
        """Clear a page's shared leaves, which comes before it moves or not (pkvm.md §7 a 5)."""
        for vm in self.vms.values():
            for gfn in [gfn for gfn, leaf in vm.maps.items() if leaf == (frame, True)]:
                self._unmap(vm, gfn)

    def _move(self, old: Frame, dst: int, nodes: Sequence[int]) -> list[Finding]:
        """Give a page another frame, to which its private leaf is re-pointed, with its bytes."""
        if dst in self.by_pfn or dst in self.reserved or dst < 0:
            return [("reliability.md §3 I1", f"pfn {old.pfn} to a free frame", dst)]
        if self.node_of(dst) not in nodes:
            return [(MIGRATION, f"pfn {old.pfn} to nodes {nodes}", f"pfn {dst}")]
        assert old.page is not None
        number, pgoff, half = old.page
        file = self.files[number]
        new = Frame(old.page, self.node_of(dst), dst, content=old.content, holds=old.holds)
        old.page, old.holds = None, Counter()
        self._forget(old)
        file.pages[pgoff, half] = self._add(new)
        for vm, gfn in self._views(file, range(pgoff, pgoff + 1)):
            mapped, shared = vm.maps.get(gfn, (None, True))
            if mapped is old:
                vm.maps[gfn] = (new, shared)
        return []

    # --- compaction and offlining --------------------------------------------------------------
    def compact(self, node: int) -> Expected:
        """Pages move together within a node; ``free_blocks`` says what that gave."""
        if node not in self.everywhere:
            return Expected(COMPACTION, errno=errno.EINVAL, reason="BAD_NODE")
        here = {pfn: frame for pfn, frame in self.by_pfn.items() if frame.node == node}
        return Expected(EACH, moves={pfn: self._outcomes(frame) for pfn, frame in here.items()})

    def free_blocks(self, node: int) -> int:
        """Return how many aligned 2 MiB blocks of a node have no used frame."""
        used = {pfn // BLOCK for pfn in (*self.by_pfn, *self.reserved)}
        numbers = self.nodes[node]
        return len(set(range(numbers.start // BLOCK, numbers.stop // BLOCK)) - used)

    def _numbers(self, pfn: int, npages: int) -> range | None:
        inside = pfn >= 0 and npages > 0 and pfn + npages <= self.nodes[-1].stop
        return range(pfn, pfn + npages) if inside else None

    def offline(self, pfn: int, npages: int) -> Expected:
        """What can move goes; ``went_offline`` learns the rest."""
        numbers = self._numbers(pfn, npages)
        if numbers is None:
            return Expected(OFFLINE, **BAD_RANGE)
        for number in [n for n in numbers if n not in self.by_pfn and n not in self.reserved]:
            self._add(Frame(None, self.node_of(number), number, offline=True))
        frames = {n: self.by_pfn[n] for n in numbers if n in self.by_pfn}
        owned = {n: frame for n, frame in frames.items() if frame.page is not None}
        moves = {n: self._outcomes(frame) for n, frame in owned.items()}
        return Expected(EACH, moves=moves, told=frozenset(owned))

    def went_offline(self, pfn: int, npages: int) -> None:
        """Have those frames of a range out of use that became free when their pages moved."""
        for number in range(pfn, pfn + npages):
            if number not in self.by_pfn and number not in self.reserved:
                self._add(Frame(None, self.node_of(number), number, offline=True))

    def online(self, pfn: int, npages: int) -> Expected:
        """Offline frames are free again, save for those that were poisoned (I13)."""
        numbers = self._numbers(pfn, npages)
        if numbers is None:
            return Expected(OFFLINE, **BAD_RANGE)
        found = [self.by_pfn[n] for n in numbers if n in self.by_pfn]
        back = [frame for frame in found if frame.offline and not frame.poisoned]
        for frame in back:
            self._forget(frame)
        return Expected(OFFLINE, len(back))

    # --- poison --------------------------------------------------------------------------------
    def poison(self, pfn: int) -> Expected:
        """§2 error_folio: unmapped and not truncated; poison is sticky (I13).

        The value is whether the VM is lost: killed if its consumer has no error op (DESIGN.md §5).
        """
        frame = self.by_pfn.get(pfn)
        if frame is None:
            self._add(Frame(None, self.node_of(pfn), pfn, poisoned=True))
            return Expected(ERROR_FOLIO, False)
        if frame.poisoned:
            return Expected(ERROR_FOLIO + ", I13", **POISONED)
        frame.poisoned = True
        if frame.page is None:
            return Expected(ERROR_FOLIO, False)
        number, pgoff, half = frame.page
        file, span = self.files[number], range(pgoff, pgoff + 1)
        vm, bound = self.vms[file.vm], bool(self._views(file, span))
        self._invalidate(file, span, half)
        private = half == PRIVATE and not (file.in_place and pgoff in file.shared_pgoffs)
        if not private or not bound:
            return Expected(ERROR_FOLIO, False)
        lost = vm.traits.dies_of_poison
        vm.dead = vm.dead or lost
        return Expected(ERROR_FOLIO, lost)
