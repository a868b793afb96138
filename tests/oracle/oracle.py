"""The specification as a judge: what an operation must say, and whether an engine agrees.

Owns the bridge between an engine and ``Spec``: learning handles and frame numbers, which are
nobody's promise, and comparing everything that can be seen. Only ``compare`` looks at an engine,
and it changes nothing there.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmemd.engine.core import private_key
from rmemd.engine.engine import Engine
from rmemd.model.host import Use
from rmemd.units import pages

from .objects import ANY, PAGE, PRIVATE, SHARED, Expected, File, Frame, Vm
from .spec import Spec

Op = tuple[Any, ...]
# past every guest frame that operations are about
END = 1 << 12


@dataclass(frozen=True)
class Outcome:
    """What an engine said: a value, or a refusal with its errno, reason, offset and progress."""

    value: Any = None
    errno: int = 0
    reason: str = ""
    offset: int | None = None
    progress: int | None = None
    text: str = ""

    def __str__(self) -> str:
        if not self.errno:
            return f"ok, {str(self.value)[:120]}"
        at = "" if self.offset is None else f" at offset {self.offset:#x}"
        done = "" if self.progress is None else f" after {self.progress} pages"
        return f"{self.reason} (errno {self.errno}){at}{done}: {self.text}"


@dataclass(frozen=True)
class Difference:
    """A disagreement, in words: what the section expects of an operation, and what came."""

    op: Op
    section: str
    expected: object
    got: object

    def __str__(self) -> str:
        told = tuple(f"{len(a)} bytes" if isinstance(a, bytes) else a for a in self.op)
        return f"{told}: expected {self.expected}, got {self.got} [{self.section}]"


class Oracle:
    """A specification beside an engine; ``engine`` is fresh, and only its host is looked at."""

    def __init__(self, engine: Engine) -> None:
        host = engine.core.host
        use = host.use.get(pages(0, host.nframes))
        nodes = [range(node.first, node.end) for node in host.nodes]
        free = [int((use[node.start : node.stop] == Use.FREE).sum()) for node in nodes]
        self.spec = Spec(nodes, free, np.flatnonzero(use != Use.FREE).tolist())
        self._op: Op = ()

    def copy(self) -> Oracle:
        """Return one that goes its own way, for an operation whose fate is open."""
        return copy.deepcopy(self)

    def apply(self, op: Op) -> Expected:
        """Return what an operation must say; the specification is then in the state after it."""
        self._op = op
        expected: Expected = getattr(self.spec, op[0])(*op[1:])
        return expected

    # --- judging an answer ---------------------------------------------------------------------
    def judge(self, op: Op, expected: Expected, outcome: Outcome) -> list[Difference]:
        """Compare an answer with what was expected, and learn what it chose."""
        self._op = op
        if expected.errno or outcome.errno:
            right = self._same_refusal(expected, outcome)
            return [] if right else [self._differ(expected.section, expected, outcome)]
        if expected.moves is not None:
            return self._judge_moves(op, expected, outcome.value)
        found = []
        if expected.value is not None and expected.value != outcome.value:
            found.append(self._differ(expected.section, expected, outcome))
        self._learn(op, outcome.value)
        self._adopt(expected, outcome.value)
        return found

    def _same_refusal(self, expected: Expected, outcome: Outcome) -> bool:
        return (
            bool(expected.errno and outcome.errno)
            and expected.errno in (ANY, outcome.errno)
            and expected.reason in ("", outcome.reason)
            and expected.offset in (None, outcome.offset)
            and expected.progress in (None, outcome.progress or 0)
        )

    def _differ(self, section: str, expected: object, got: object) -> Difference:
        return Difference(self._op, section, expected, got)

    def _judge_moves(self, op: Op, expected: Expected, value: Any) -> list[Difference]:
        spec, moves = self.spec, value if op[0] == "migrate" else value[0]
        nodes: tuple[int, ...] = spec.everywhere
        before = spec.free_blocks(op[1]) if op[0] == "compact" else 0
        if op[0] == "compact" or (op[0] == "migrate" and op[2] is not None):
            nodes = (op[-1],)
        found = [self._differ(*finding) for finding in spec.moved(expected, moves, nodes)]
        if op[0] == "compact":
            blocks = (before, spec.free_blocks(op[1]))
            if value[1:] != blocks or blocks[0] > blocks[1]:
                found.append(self._differ("DESIGN.md §4 Compaction, free 2M", blocks, value[1:]))
        if op[0] == "offline":
            spec.went_offline(*op[1:])
        return found

    def _learn(self, op: Op, value: Any) -> None:
        """Take over handles."""
        spec, name = self.spec, op[0]
        if name == "create_vm":
            spec.named(spec.vms, value)
        elif name == "create_file":
            spec.named(spec.files, value)
        elif name == "add_slot" and value and value not in spec.files:
            spec.name_anonymous(op[1], op[2], value)
        elif name == "open_session":
            spec.sessions.add(value)
        elif name == "pin":
            spec.pins[value] = spec.pins.pop(0)
        elif name == "register":
            spec.handlers[value] = spec.handlers.pop(0)

    def _adopt(self, expected: Expected, data: bytes) -> None:
        """Learn what pages hold that nobody knew, where all of a page was read."""
        at = 0
        for frame, lo, hi in expected.reading:
            if frame.content is None and hi - lo == PAGE:
                frame.content = data[at : at + PAGE]
            at += hi - lo

    # --- comparing -----------------------------------------------------------------------------
    def compare(self, engine: Engine, contents: bool = False) -> list[Difference]:
        """Return where the engine's state is not the specification's; with bytes if asked for."""
        found = [self._differ(*said) for said in self._objects(engine)]
        for file in self.spec.files.values():
            if file.open and not found:
                found += [self._differ(*said) for said in self._file(engine, file)]
        if found:
            # what follows says nothing where frames are not known
            return found
        found += [self._differ(*said) for said in self._holders(engine)]
        for vm in self.spec.vms.values():
            if not vm.destroyed:
                found += [self._differ(*said) for said in self._vm(engine, vm)]
        if contents and not found:
            found += [self._differ(*said) for said in self._contents(engine)]
        return found

    def _objects(self, engine: Engine) -> Iterator[tuple[str, object, object]]:
        core, spec = engine.core, self.spec
        sessions = {info.session for info in core.sessions.all()}
        handlers = {
            one.userfault: (one.file, range(one.pgoff, one.end), one.session)
            for one in core.userfaults.all()
        }
        for what, mine, got in (
            ("VMs", _alive(spec), [vm.info.vm for vm in core.vms.all()]),
            ("files", sorted(n for n, f in spec.files.items() if f.open),
             [file.info.file for file in core.files.all()]),
            ("sessions", spec.sessions, sessions),
            ("pins", sorted(spec.pins), sorted(pin.pin for pin in core.sessions.pins())),
            ("handlers", spec.handlers, handlers),
        ):  # fmt: skip
            if mine != got:
                yield "DESIGN.md §4; reliability.md §3 I14", f"{what} {mine}", got
        use = core.host.use.get(pages(0, core.host.nframes))
        free = [int((use[n.start : n.stop] == Use.FREE).sum()) for n in spec.nodes]
        if free != spec.room:
            yield "reliability.md §3 I1 to I4", f"free frames by node {spec.room}", free

    def _file(self, engine: Engine, file: File) -> Iterator[tuple[str, object, object]]:
        name, found = f"file/{file.file}", engine.core.files.get(file.file)
        span = pages(0, file.npages)
        for half, table in ((PRIVATE, found.frames), (SHARED, found.shared)):
            there = table.touched(0, file.npages)
            got = dict(zip(there.tolist(), (table.get(there) - 1).tolist(), strict=True))
            mine = {pgoff: f for (pgoff, of), f in file.pages.items() if of == half}
            if sorted(mine) != sorted(got):
                yield "DESIGN.md §4, halves", f"{name}: {half} pages {sorted(mine)}", sorted(got)
                return
            for pgoff, frame in mine.items():
                yield from self._number(frame, got[pgoff], f"{name} pgoff {pgoff} {half}")
        if file.in_place:
            shared = set(np.flatnonzero(found.attributes.get(span) == 0).tolist())
            if shared != file.shared_pgoffs:
                what = f"{name}: shared by attribute {sorted(file.shared_pgoffs)}"
                yield "restrictedmem.md §2 in-place", what, sorted(shared)
        numbers, policies = found.policy_at(span)
        got = {i: policies[n] for i, n in enumerate(numbers.tolist()) if n}
        stored = {i: (one.policy, one.nodes) for i, one in got.items()}
        if stored != file.policies:
            yield "restrictedmem.md §2 mbind", f"{name}: policies {file.policies}", stored

    def _number(self, frame: Frame, pfn: int, page: str) -> Iterator[tuple[str, object, object]]:
        """Learn a new frame's number; a known one keeps it, and nobody else has it (I1)."""
        if frame.pfn is None and pfn not in self.spec.by_pfn:
            self.spec.number(frame, pfn)
            if self.spec.node_of(pfn) != frame.node:
                yield "restrictedmem.md §2 mbind", f"{page} on node {frame.node}", f"pfn {pfn}"
        elif frame.pfn != pfn:
            yield "reliability.md §3 I1", f"{page} on pfn {frame.pfn}", pfn

    def _holders(self, engine: Engine) -> Iterator[tuple[str, object, object]]:
        host = engine.core.host
        held_there = np.flatnonzero(host.refs.view | host.pins.view).tolist()
        held_here = [pfn for pfn, frame in self.spec.by_pfn.items() if frame.elevated]
        for pfn in sorted({*held_there, *held_here}):
            frame = self.spec.by_pfn.get(pfn)
            holds = frame.holds.items() if frame is not None else ()
            mine = {who: n for who, n in holds if n}
            sums = (0, 0)
            for (_, longterm), n in mine.items():
                sums = (sums[0], sums[1] + n) if longterm else (sums[0] + n, sums[1])
            got = (host.refs.at(pfn), host.pins.at(pfn))
            if sums != got:
                yield "pkvm.md §7", f"pfn {pfn}: (references, pins) {sums}", got
            if mine:
                held: Counter[tuple[str, bool]] = Counter()
                for h in engine.core.ledger.holders(pfn):
                    # a pin's handle is part of its holder's name here
                    held[h.name.partition(" pin ")[0], h.longterm] += h.count
                if mine != dict(held):
                    yield "reliability.md §3 I2", f"pfn {pfn}: holders {mine}", dict(held)

    def _vm(self, engine: Engine, vm: Vm) -> Iterator[tuple[str, object, object]]:
        found = engine.core.vms.get(vm.vm)
        facts = (vm.dead, vm.traits.consumer)
        if facts != (found.info.state == "dead", found.info.consumer):
            got = (found.info.state, found.info.consumer)
            yield "DESIGN.md §4, §5", f"{vm.label}: (dead, consumer) {facts}", got
        slots = {n: (s.gfn, s.npages, s.file.file, s.pgoff) for n, s in vm.slots.items()}
        there = {n: (s.gfn, s.npages, s.file, s.pgoff) for n, s in found.slots.items()}
        if slots != there:
            yield "restrictedmem.md §2 bind", f"{vm.label}: slots {slots}", there
        entries = found.mirror.touched(0, END)
        leaves = found.mirror.get(entries).tolist()
        pairs = zip(entries.tolist(), leaves, strict=True)
        mapped = {gfn: ((e >> 1) - 1, bool(e & 1)) for gfn, e in pairs}
        mine = {gfn: (f.pfn, shared) for gfn, (f, shared) in vm.maps.items()}
        if mine != mapped:
            what = f"{vm.label}: mapped {{gfn: (pfn, shared)}} {mine}"
            yield "DESIGN.md §4 mirror, restrictedmem.md §2", what, mapped
        if vm.traits.private_memory and not vm.traits.in_place:
            starts, counts, values = found.attributes.runs(0, END)
            runs = zip(starts[values == 0].tolist(), counts[values == 0].tolist(), strict=True)
            shared = {gfn for start, n in runs for gfn in range(start, start + n)}
            if shared != vm.shared_gfns:
                what = f"{vm.label}: shared by attribute {sorted(vm.shared_gfns)}"
                yield "restrictedmem.md §2 attributes", what, sorted(shared)

    # --- bytes ---------------------------------------------------------------------------------
    def _contents(self, engine: Engine) -> Iterator[tuple[str, object, object]]:
        """Bytes of the shared halves, and of private pages of consumers that put none between."""
        core, spec = engine.core, self.spec
        for file in spec.files.values():
            vm = spec.vms[file.vm]
            if not file.open:
                continue
            found = core.files.get(file.file)
            for (pgoff, half), frame in file.pages.items():
                if frame.content is None or frame.poisoned:
                    continue
                private = half == PRIVATE and not (file.in_place and pgoff in file.shared_pgoffs)
                if not private:
                    got = core.shared_memory(found).read_bytes(pgoff * PAGE, PAGE)
                elif vm.traits.plain and not vm.destroyed:
                    key = private_key(core, core.vms.get(vm.vm))
                    got = core.controller.read(np.array([frame.pfn]), key)[0].tobytes()
                else:
                    continue
                if got != frame.content:
                    what = f"file/{file.file} pgoff {pgoff} {half} holds {_told(frame.content)}"
                    yield "reliability.md §3 I8", what, _told(got)


def _alive(spec: Spec) -> list[int]:
    return sorted(number for number, vm in spec.vms.items() if not vm.destroyed)


def _told(data: bytes) -> str:
    """Say a page in a few words."""
    return f"{data[:4].hex()}...{data[-4:].hex()} ({len(set(data))} values)"
