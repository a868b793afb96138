"""One VM under test: what is done to it, and what its pages must read as afterwards.

Owns ``ModelGuest``, which the conformance kit drives. Each action goes through the engine's door,
as a VMM's or a guest's would, and keeps a model: what a page holds, or what it must never show
again. A page that the contract says nothing about is not in the model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from enum import Enum

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from rmemd.consumers.guard import Consumer
from rmemd.engine.engine import Engine
from rmemd.engine.migrate import Outcome
from rmemd.engine.programme import Instruction, Opcode, Pattern, make_rows
from rmemd.engine.vcpu import Exit, Exited
from rmemd.errors import PluginFault, RmemError
from rmemd.hooks.ops import NotifierOps
from rmemd.hooks.types import Agent, Content
from rmemd.model.files import FLAG_MMAP
from rmemd.model.vms import GUEST_MEMFD
from rmemd.testing.recorder import Recorder
from rmemd.units import I64, PAGE_SIZE, pages

PAGES = 32
GFN = 0x100
KEEP, PUNCH = 1, 3
PRIVATE, SHARED = 8, 0
HOLDER = "device/1"
FAILED_CALLS = (Exit.SHUTDOWN, Exit.INTERNAL_ERROR, Exit.MEMORY_FAULT, Exit.MMIO, Exit.NONE)


class Holds(Enum):
    """What is known of a page: its words, zeros, or words that it must not show any more."""

    WORDS = "words"
    ZERO = "zero"
    LOST = "lost"


class Known(Struct, frozen=True):
    """What is known of a page; ``seed`` makes its words, ``since`` says what happened to it."""

    holds: Holds
    seed: int
    since: str


class ModelGuest:
    """A VM with one slot of ``PAGES`` at ``GFN``, a file of its own and a vCPU.

    Attributes:
        broken: (rule, what) that the last action found.
        poisoned: frames that the kit poisoned; ``bad`` are the pages that have such a frame.
    """

    def __init__(
        self, engine: Engine, recorder: Recorder, variant: str, in_place: bool,
        config: Mapping[str, str], rng: random.Random,
    ) -> None:  # fmt: skip
        self.engine, self.recorder, self.rng = engine, recorder, rng
        self.broken: list[tuple[str, str]] = []
        self.poisoned: set[int] = set()
        self.bad: set[int] = set()
        self.pins: list[int] = []
        self.halves: dict[bool, dict[int, Known]] = {True: {}, False: {}}
        self.seed = 0
        self.slot, self.file_open = False, True
        info = engine.create_vm(variant, in_place, config).info
        self.vm, self.in_place, self.private_memory = info.vm, in_place, info.private_memory
        recorder.watch(self.consumer)
        flags = FLAG_MMAP if in_place else 0
        self.file = engine.create_file(self.vm, PAGES * PAGE_SIZE, flags).info.file
        self.change_slot()
        engine.create_vcpu(self.vm, 0)

    @property
    def consumer(self) -> Consumer:
        """Return the VM's consumer."""
        return self.engine.core.consumers[self.vm]

    @property
    def ops(self) -> NotifierOps:
        """Return the consumer's table as the plugin made it."""
        return self.recorder.tables[self.vm]

    @property
    def dead(self) -> bool:
        """Return whether the VM can only be destroyed."""
        return self.engine.core.vms.get(self.vm).info.state in ("dead", "frozen")

    @property
    def usable(self) -> bool:
        """Return whether the guest has memory."""
        return self.slot and self.file_open and not self.dead

    # --- the model ---------------------------------------------------------------------------
    def half(self, private: bool) -> dict[int, Known]:
        """Return the model of one half; in place there is one for both."""
        return self.halves[True if self.in_place else private]

    def is_private(self, page: int) -> bool:
        """Return the page's attribute."""
        core = self.engine.core
        if self.in_place:
            return bool(core.files.get(self.file).attributes.at(page) == 1)
        return bool(core.vms.get(self.vm).attributes.at(GFN + page) == 1)

    def lose(self, private: bool, page: int, since: str) -> None:
        """Note that a page must never show its words again."""
        known = self.half(private).pop(page, None)
        if known is not None and known.holds is not Holds.ZERO:
            self.half(private)[page] = Known(Holds.LOST, known.seed, since)

    def forget(self, private: bool, page: int) -> None:
        """Note that nothing is known of a page, but for what it must not show."""
        known = self.half(private).get(page)
        if known is not None and known.holds is not Holds.LOST:
            del self.half(private)[page]

    def frames(self, page: int, n: int, private: bool = True) -> I64:
        """Return the frames that pages have in one half of the file."""
        if not self.file_open:
            return np.empty(0, dtype=np.int64)
        found = self.engine.core.files.get(self.file).half(private).get(pages(page, n))
        return np.asarray(found[found > 0], dtype=np.int64) - 1

    def wrong(self, rule: str, what: str) -> None:
        """Note what is broken."""
        self.broken.append((rule, f"vm/{self.vm}: {what}"))

    # --- what the guest does -----------------------------------------------------------------
    def run(self, *programme: Instruction) -> Exited:
        """Run a programme to its exit; VMM and guest handle hypercalls and lazy acceptance."""
        self.engine.set_programme(self.vm, 0, programme, lazy_accept=True)
        exited = self.engine.run_vcpu(self.vm, 0)
        if isinstance(exited.refusal, PluginFault):
            raise exited.refusal
        return exited

    def do(self, opcode: Opcode, page: int, n: int, private: bool, value: int = 0) -> Instruction:
        """Return an instruction about whole pages."""
        gpa, length = (GFN + page) * PAGE_SIZE, n * PAGE_SIZE
        return Instruction(opcode, gpa, length, Pattern.WORDS, value, private)

    def stretch(self, page: int, n: int) -> tuple[int, bool]:
        """Return how many pages from ``page`` have its state, and the state."""
        private = self.is_private(page)
        same = [self.is_private(i) == private for i in range(page, page + n)]
        return (same.index(False) if False in same else n), private

    def write(self, page: int, n: int) -> None:
        """The guest writes words that it never wrote before."""
        n, private = self.stretch(page, n)
        self.seed += 1
        seed = self.vm << 32 | self.seed
        for i in range(page, page + n):
            self.forget(private, i)
        if self.run(self.do(Opcode.WRITE, page, n, private, seed)).reason is Exit.HLT:
            written = Known(Holds.WORDS, seed, "the guest wrote it")
            self.half(private).update(dict.fromkeys(range(page, page + n), written))

    def read(self, page: int, n: int) -> None:
        """The guest compares pages with what they must hold, and with what they must not."""
        for i in range(page, page + n):
            private = self.is_private(i)
            known = self.half(private).get(i)
            if known is None:
                self.run(self.do(Opcode.TOUCH, i, 1, private))
            else:
                self._compare(i, private, known)
            if self.dead:
                return

    def _compare(self, page: int, private: bool, known: Known) -> None:
        check = self.do(Opcode.CHECK, page, 1, private, known.seed)
        if known.holds is Holds.ZERO:
            check = replace(check, pattern=Pattern.BYTE, value=0)
        exited = self.run(check)
        came = exited.reason is Exit.HLT
        same = came and not exited.vcpu.mismatched
        where = f"gfn {GFN + page:#x}"
        if known.holds is Holds.LOST:
            if same:
                self.wrong("stale", f"{where} shows its old words after: {known.since}")
        elif not same:
            got = "other bytes" if came else f"{exited.reason.name} {exited.text or exited.refusal}"
            self.wrong("content", f"{where} must hold {known.holds.value}, {known.since}; {got}")
            self.half(private).pop(page)

    def call(self, page: int, n: int) -> None:
        """The guest makes a call of its vendor; the VMM converts if it is asked to."""
        opcode = self.rng.choice(
            (Opcode.ACCEPT, Opcode.VALIDATE, Opcode.RESCIND, Opcode.RELINQUISH, Opcode.SHARE,
             Opcode.UNSHARE)
        )  # fmt: skip
        was = {i: self.is_private(i) for i in range(page, page + n)}
        before = dict(self.halves[True]), dict(self.halves[False])
        if opcode not in (Opcode.ACCEPT, Opcode.VALIDATE):
            for i in was:
                self.forget(True, i)
                self.forget(False, i)
        exited = self.run(self.do(opcode, page, n, True))
        if exited.reason is Exit.HYPERCALL:
            self.halves[True], self.halves[False] = before
            self.convert(page, n, exited.value == PRIVATE)
            self.engine.run_vcpu(self.vm, 0)
        elif exited.reason not in FAILED_CALLS and opcode in (Opcode.SHARE, Opcode.UNSHARE):
            self.halves[True], self.halves[False] = before
            self._converted([i for i in was if self.is_private(i) != was[i]])

    # --- what the VMM and the host do -----------------------------------------------------------
    def build(self) -> None:
        """Populate some initial pages, where the vendor has that."""
        if self.ops.populate is not None:
            seed = self.vm << 32
            rows = make_rows(Pattern.WORDS, seed, pages(GFN, 4))
            self.engine.populate(self.vm, GFN * PAGE_SIZE, rows.tobytes())
            known = Known(Holds.WORDS, seed, "it was populated")
            self.half(True).update(dict.fromkeys(range(4), known))

    def finalize(self) -> None:
        """Finalize; call it only where the vendor has that."""
        self.engine.finalize(self.vm)

    def fault(self, page: int, n: int) -> None:
        """Fault pages in."""
        self.engine.pre_fault(self.vm, (GFN + page) * PAGE_SIZE, n * PAGE_SIZE)

    def allocate(self, page: int, n: int) -> None:
        """Allocate pages of the file, which maps nothing."""
        self.engine.fallocate(self.file, KEEP, page * PAGE_SIZE, n * PAGE_SIZE)

    def punch(self, page: int, n: int) -> None:
        """Punch pages out: what they held must never be seen again."""
        self.engine.fallocate(self.file, PUNCH, page * PAGE_SIZE, n * PAGE_SIZE)
        for i in range(page, page + n):
            self.lose(True, i, "its page was punched")
            self.bad.discard(i)

    def convert(self, page: int, n: int, private: bool | None = None) -> None:
        """Convert pages in the VM's own way."""
        if private is None:
            private = not self.is_private(page)
        changed = [i for i in range(page, page + n) if self.is_private(i) != private]
        attributes = PRIVATE if private else SHARED
        if self.in_place:
            self.engine.convert_file(self.file, page * PAGE_SIZE, n * PAGE_SIZE, attributes)
        else:
            size = n * PAGE_SIZE
            self.engine.set_attributes(self.vm, [((GFN + page) * PAGE_SIZE, size, attributes)])
        self._converted(changed)

    def _converted(self, changed: list[int]) -> None:
        for i in changed:
            content = self.recorder.contents.get((self.vm, GFN + i))
            if not self.in_place:
                # both halves live on, and whether the vendor keeps the private one is its own
                self.forget(True, i)
            elif content is Content.ZERO and i not in self.bad:
                self.halves[True][i] = Known(Holds.ZERO, 0, "its conversion answered ZERO")
            elif content is Content.NOISE and self._is_lost(i):
                # the raw bytes are as they were: converted back, the noise may be words again
                del self.halves[True][i]
            elif content is not None and content is not Content.PRESERVED:
                self.lose(True, i, f"its conversion answered {content.name}")

    def _is_lost(self, page: int) -> bool:
        known = self.halves[True].get(page)
        return known is not None and known.holds is Holds.LOST

    def migrate(self, page: int, n: int) -> None:
        """Move pages; those that are said to have moved hold what they held."""
        private = self.rng.random() < 0.8
        asked = self.frames(page, n, private)
        if not asked.size:
            return
        report = self.engine.migrate(asked, self.rng.choice((None, 0, 1)))
        for moved in report.moves:
            if isinstance(moved.refusal, PluginFault):
                raise moved.refusal
        if report.count(Outcome.MOVED) and private and self.ops.migrate_folio is None:
            self.wrong("null", "private pages moved, and migrate_folio is NULL")

    def pin(self, page: int, n: int) -> None:
        """Hold pages as a device's DMA does, or let one such hold go."""
        if self.pins and self.rng.random() < 0.6:
            self.engine.unpin(self.pins[-1])
            self.pins.pop()
            return
        offset, size = page * PAGE_SIZE, n * PAGE_SIZE
        self.pins.append(self.engine.pin(self.file, offset, size, "DMA", HOLDER))

    def poison(self, page: int, n: int) -> None:
        """The host finds a bad frame."""
        found = self.frames(page, n)
        if not found.size:
            return
        pfn = int(found[0])
        pgoff = self.engine.core.host.pgoff.at(pfn)
        self.engine.poison(pfn)
        self.poisoned.add(pfn)
        self.bad.add(pgoff)
        self.lose(True, pgoff, "its frame was poisoned")

    def inspect(self, page: int, n: int) -> None:
        """Look at pages as ``rmemctl page show`` does, and as the host would."""
        for pfn in self.frames(page, min(n, 2)).tolist():
            self.engine.page(pfn)
            self.engine.read_physical(pfn, 1, self.rng.choice((Agent.HOST_USER, Agent.DEVICE)))

    def change_slot(self) -> None:
        """Delete the slot, or add it again."""
        size = 0 if self.slot else PAGES * PAGE_SIZE
        self.engine.set_memory_region(
            self.vm, 0, GUEST_MEMFD, GFN * PAGE_SIZE, size, self.file, 0
        )  # fmt: skip
        self.slot = not self.slot
        for i in range(PAGES):
            self.forget(True, i)

    def close_file(self) -> None:
        """Close the file; nothing of it may be left."""
        self.engine.close_file(self.file)
        self.file_open = False

    def swap(self) -> None:
        """Have another object of the same variant take over."""
        registry = self.engine.core.registry
        before = registry.made
        registry.made = self.recorder.watch
        try:
            self.engine.swap_consumer(self.vm)
        finally:
            registry.made = before

    def destroy(self) -> None:
        """Destroy the VM."""
        self.engine.destroy_vm(self.vm)

    def teardown(self) -> Iterator[str]:
        """Give everything back, in either order; yield what was refused."""
        acts = [self.destroy, self.close_file] if self.file_open else [self.destroy]
        if self.rng.random() < 0.5:
            acts.reverse()
        for act in [*(lambda handle=handle: self.engine.unpin(handle) for handle in self.pins),
                    *acts]:  # fmt: skip
            try:
                try:
                    act()
                except PluginFault:
                    if not self.recorder.tripped:
                        raise
                    # the op that the kit broke raises once only
                    act()
            except RmemError as refusal:
                yield f"vm/{self.vm}: {refusal}"
