"""Small scope to a fixpoint: every state that a few pages, frames and VMs can come to.

Two VMs with the same consumer share a handful of frames, and every operation of a closed set is
made in every state, breadth first, until no operation leads anywhere new. Each new state is
checked. Operations are whole ones: between two of them nothing is suspended, so a state is what the
tables say. (What comes between their steps is the simulation's: it would multiply the states by
where each operation stands.) States are equal but for the names of frames, pages and VMs; epochs
count by whether a flush came after, and bytes do not count at all.

One engine visits them all: every write to a table or a memfd is taken down with its inverse, so
that a state is gone to by undoing what leads up from here and doing again what leads down to it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import PARTS
from rmemd.errors import PluginFault, RmemError
from rmemd.hooks.tables import Sparse, Write
from rmemd.model.files import FLAG_MMAP
from rmemd.model.vms import GUEST_MEMFD
from rmemd.store.memfd import FALLOC_FL_PUNCH_HOLE
from rmemd.store.system import System
from rmemd.units import PAGE_SIZE

NFRAMES, GFN = 512, 0x100
PUNCH, KEEP = 3, 1
Change = tuple[Callable[[], object], Callable[[], object]]
Canonical = tuple[Any, ...]


class StateError(AssertionError):
    """A state that must not be, with the operations that lead to it."""


@dataclass(frozen=True)
class Scope:
    """What is explored.

    Attributes:
        consumer, in_place: of every VM.
        vms, npages: how many VMs of how many pages each.
        frames: how many frames there are for all of them.
        ops: names of ``Explorer``'s operations.
    """

    consumer: str
    in_place: bool
    vms: int = 2
    npages: int = 3
    frames: int = 4
    ops: tuple[str, ...] = ("fault", "punch", "convert", "migrate")


@dataclass
class Explored:
    """What came of it."""

    states: int = 0
    transitions: int = 0
    refused: int = 0
    deepest: int = 0


@dataclass
class _Node:
    parent: _Node | None
    depth: int
    op: str = ""
    changes: list[Change] = field(default_factory=list)

    def path(self) -> list[str]:
        return [
            *(self.parent.path() if self.parent is not None else ()),
            *([self.op] * bool(self.op)),
        ]


class _Recording(System):
    """The kernel; what memfds held before a call is taken down."""

    def __init__(self, changed: Callable[[Change], None]) -> None:
        self._changed = changed

    def write(self, fd: int, view: memoryview, offset: int) -> int:
        first, end = offset // PAGE_SIZE, -(-(offset + view.nbytes) // PAGE_SIZE)
        before = _hold(fd, first, end - first)
        done = super().write(fd, view, offset)
        self._changed((_putter(fd, _hold(fd, first, end - first)), _putter(fd, before)))
        return done

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        at = offset // PAGE_SIZE, length // PAGE_SIZE
        before = _hold(fd, *at)
        super().fallocate(fd, mode, offset, length)
        self._changed((_putter(fd, _hold(fd, *at)), _putter(fd, before)))


def _hold(fd: int, first: int, npages: int) -> dict[int, bytes | None]:
    """Return what pages of a memfd hold, None for holes."""
    found: dict[int, bytes | None] = {}
    for page in range(first, first + npages):
        at = page * PAGE_SIZE
        try:
            there = os.lseek(fd, at, os.SEEK_DATA) == at
        except OSError:
            there = False
        found[page] = os.pread(fd, PAGE_SIZE, at) if there else None
    return found


def _putter(fd: int, held: dict[int, bytes | None]) -> Callable[[], object]:
    def put() -> None:
        for page, data in held.items():
            if data is None:
                System().fallocate(fd, FALLOC_FL_PUNCH_HOLE | 1, page * PAGE_SIZE, PAGE_SIZE)
            else:
                os.pwrite(fd, data, page * PAGE_SIZE)

    return put


class Explorer:
    """See the module."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._changes: list[Change] = []
        self.engine = Engine(
            Options(nframes=NFRAMES, seed=1, system=_Recording(self._take_down)), Guard(lambda: 0.0)
        )
        self.core = self.engine.core
        self.vms = [self._make_vm() for _ in range(scope.vms)]
        self.engine.offline(scope.frames, NFRAMES - scope.frames)
        apply = self.core.space.apply

        def applied(write: Write) -> Write:
            inverse = [apply(write)]

            def again() -> None:
                # what destroyed a table must give back the one that there was this time
                inverse[0] = apply(write)

            self._take_down((again, lambda: apply(inverse[0])))
            return inverse[0]

        self.core.space.apply = applied  # type: ignore[method-assign]
        self._changes.clear()
        self.explored = Explored()
        self.root = _Node(None, 0)

    def close(self) -> None:
        """Let the engine go."""
        self.engine.close()

    def _make_vm(self) -> tuple[int, int]:
        scope, size = self.scope, self.scope.npages * PAGE_SIZE
        vm = self.engine.create_vm(scope.consumer, in_place=scope.in_place).info.vm
        flags = FLAG_MMAP if scope.in_place else 0
        file = self.engine.create_file(vm, size, flags).info.file
        self.engine.set_memory_region(vm, 0, GUEST_MEMFD, GFN * PAGE_SIZE, size, file, 0)
        self.engine.create_vcpu(vm, 0)
        if self.core.consumers[vm].ops.finalize is not None:
            self.engine.finalize(vm)
        self.core.shared_memory(self.core.files.get(file))
        return vm, file

    # --- operations ----------------------------------------------------------------------------
    def operations(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield every operation that can be tried in the present state, with its name.

        Of pages that are alike, in VMs that are alike, the first stands for all.
        """
        tried = set()
        for n, (vm, file) in enumerate(self.vms):
            whole = self._vm_form(vm, file)
            for page in range(self.scope.npages):
                alike = whole, self._row(vm, file, page)
                if alike in tried:
                    continue
                tried.add(alike)
                for name in self.scope.ops:
                    yield f"{name} vm {n} page {page}", getattr(self, f"_{name}")(vm, file, page)

    def _fault(self, vm: int, file: int, page: int) -> Callable[[], Any]:
        return lambda: self.engine.pre_fault(vm, (GFN + page) * PAGE_SIZE, PAGE_SIZE)

    def _allocate(self, vm: int, file: int, page: int) -> Callable[[], Any]:
        return lambda: self.engine.fallocate(file, KEEP, page * PAGE_SIZE, PAGE_SIZE)

    def _punch(self, vm: int, file: int, page: int) -> Callable[[], Any]:
        return lambda: self.engine.fallocate(file, PUNCH, page * PAGE_SIZE, PAGE_SIZE)

    def _convert(self, vm: int, file: int, page: int) -> Callable[[], Any]:
        private = self._attribute(vm, file, page) == 1
        wanted = 0 if private else 8
        if self.scope.in_place:
            return lambda: self.engine.convert_file(file, page * PAGE_SIZE, PAGE_SIZE, wanted)
        return lambda: self.engine.set_attributes(
            vm, [((GFN + page) * PAGE_SIZE, PAGE_SIZE, wanted)]
        )

    def _migrate(self, vm: int, file: int, page: int) -> Callable[[], Any]:
        pfns = [half.at(page) - 1 for half in self._halves(file)]
        there = np.array([pfn for pfn in pfns if pfn >= 0], dtype=np.int64)
        return lambda: self.engine.migrate(there)

    def _pin(self, vm: int, file: int, page: int) -> Callable[[], Any]:
        held = [
            pin.pin for pin in self.core.sessions.pins() if (pin.file, pin.pgoff) == (file, page)
        ]
        if held:
            return lambda: self.engine.unpin(held[0])
        return lambda: self.engine.pin(file, page * PAGE_SIZE, PAGE_SIZE, "DMA", "device")

    def _attribute(self, vm: int, file: int, page: int) -> int:
        if self.scope.in_place:
            return self.core.files.get(file).attributes.at(page)
        return self.core.vms.get(vm).attributes.at(GFN + page)

    # --- exploring -----------------------------------------------------------------------------
    def explore(self, states_max: int | None = None) -> Explored:
        """Go on until no operation leads to a new state.

        Raises:
            StateError: an invariant is broken; or more than ``states_max`` states.
        """
        root = here = self.root
        seen = {self._canonical()}
        self._check(root)
        left = deque([root])
        while left:
            node = left.popleft()
            self._go(here, node)
            here = node
            for name, call in list(self.operations()):
                found = self._try(node, name, call)
                form = self._canonical()
                if form not in seen:
                    seen.add(form)
                    self._check(found)
                    left.append(found)
                self._undo(found)
            if states_max is not None and len(seen) > states_max:
                raise StateError(f"more than {states_max} states")
        self._go(here, root)
        self.explored.states = len(seen)
        return self.explored

    def _try(self, node: _Node, name: str, call: Callable[[], Any]) -> _Node:
        self._changes = []
        found = _Node(node, node.depth + 1, name)
        self.explored.transitions += 1
        self.explored.deepest = max(self.explored.deepest, found.depth)
        try:
            call()
        except PluginFault as fault:
            raise StateError(f"{fault} after {found.path()}") from fault
        except RmemError:
            self.explored.refused += 1
        found.changes = self._changes
        return found

    def _check(self, node: _Node) -> None:
        broken = [line for part in PARTS for line in part(self.core)]
        if broken:
            raise StateError(f"{broken} after {node.path()}")

    def _take_down(self, change: Change) -> None:
        self._changes.append(change)

    def _undo(self, node: _Node) -> None:
        for _, undo in reversed(node.changes):
            undo()

    def _go(self, here: _Node, there: _Node) -> None:
        """Go from a state to another by way of the last one that leads to both."""
        down: list[_Node] = []
        while here is not there:
            if here.depth >= there.depth:
                self._undo(here)
                assert here.parent is not None
                here = here.parent
            else:
                assert there.parent is not None
                down.append(there)
                there = there.parent
        for node in reversed(down):
            for do, _ in node.changes:
                do()

    # --- which states are the same -------------------------------------------------------------
    def _canonical(self) -> Canonical:
        """Return the state without the names of frames, pages and VMs.

        A page's row has its frames in it; those that no page has come after.
        """
        halves = [half for _, file in self.vms for half in self._halves(file)]
        taken = {half.at(page) - 1 for half in halves for page in range(self.scope.npages)}
        others = sorted(self._frame(pfn, 0) for pfn in set(range(self.scope.frames)) - taken)
        return (*sorted(self._vm_form(vm, file) for vm, file in self.vms), *others)

    def _halves(self, file: int) -> tuple[Sparse, Sparse]:
        found = self.core.files.get(file)
        return found.frames, found.shared

    def _vm_form(self, vm: int, file: int) -> Canonical:
        return tuple(sorted(self._row(vm, file, page) for page in range(self.scope.npages)))

    def _row(self, vm: int, file: int, page: int) -> Canonical:
        entry = self.core.vms.get(vm).mirror.at(GFN + page)
        halves = [half.at(page) - 1 for half in self._halves(file)]
        pfn, shared = (entry >> 1) - 1, entry & 1
        mapped = -1 if not entry else (halves.index(pfn) if pfn in halves else 2) * 2 + shared
        pinned = sum((pin.file, pin.pgoff) == (file, page) for pin in self.core.sessions.pins())
        frames = [() if one < 0 else self._frame(one, vm) for one in halves]
        vendor = self.core.space.tables.get(f"vm/{vm}/tdx/sept")
        kept = 0 if vendor is None else vendor.at(GFN + page)  # type: ignore[union-attr]
        return self._attribute(vm, file, page), mapped, pinned, kept, *frames

    def _frame(self, pfn: int, vm: int) -> tuple[int, ...]:
        host, tables = self.core.host, self.core.space.tables
        columns = (host.use, host.stored, host.flags, host.refs, host.pins)
        owned = host.owner.at(pfn) != 0
        key: Any = host.keys.get(host.key.at(pfn))
        of_key = 0 if key is None else 1 + (key.owner == f"vm/{vm}")
        kind = tables["platform/tdx/pamt_type"].at(pfn)  # type: ignore[union-attr]
        known = (column.at(pfn) for column in columns)
        return (*known, owned, of_key, kind, self._flushed(pfn, kind))

    def _flushed(self, pfn: int, kind: int) -> int:
        """Return whether a TDX page's epoch is past: all that counts of it."""
        tables: Any = self.core.space.tables
        td = tables.get(f"vm/{tables['platform/tdx/pamt_owner'].at(pfn)}/tdx/td")
        if not kind or td is None:
            return 0
        return 1 + (tables["platform/tdx/pamt_bepoch"].at(pfn) < td["TD_EPOCH"])


def run(scope: Scope, states_max: int | None = None) -> Explored:
    """Explore a scope."""
    explorer = Explorer(scope)
    try:
        return explorer.explore(states_max)
    finally:
        explorer.close()


EVERY = ("fault", "allocate", "punch", "convert", "migrate", "pin")
SCOPES = (
    Scope("sw-protected", in_place=True, ops=("fault", "allocate", "punch", "convert", "migrate")),
    Scope("null", in_place=False),
    Scope("null", in_place=False, npages=2, ops=EVERY),
    Scope("tdx-today", in_place=False),
    Scope("tdx-relocate", in_place=False),
)
# what the suite has time for
SMALL = (
    Scope("sw-protected", in_place=True, npages=1, frames=3, ops=EVERY),
    Scope("null", in_place=False, npages=1, frames=3, ops=EVERY),
    Scope("tdx-today", in_place=False, npages=1, frames=3),
    Scope("tdx-relocate", in_place=False, npages=1, frames=3),
)
