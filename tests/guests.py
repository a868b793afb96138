"""Guests for tests: a VM of any consumer, launched and driven through the engine's own door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmemd.consumers.guard import Consumer, Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.programme import Instruction, Opcode, Pattern
from rmemd.engine.vcpu import Exited
from rmemd.model.files import FLAG_MMAP
from rmemd.model.vms import GUEST_MEMFD, unpack
from rmemd.units import I64, PAGE_SIZE, pages

ACCEPTS = {"tdx": Opcode.ACCEPT, "snp": Opcode.VALIDATE}
KEEP, PUNCH = 1, 3
PRIVATE, SHARED = 8, 0


def make_engine(nframes: int = 4096, **options: Any) -> Engine:
    """Make a host with every installed plugin, watched; no clock ticks, all records are kept."""
    options.setdefault("kept_records", None)
    engine = Engine(Options(nframes=nframes, **options), Guard(clock=lambda: 0.0))
    engine.watch()
    return engine


def consumers() -> list[str]:
    """Return the name of every consumer variant that is installed."""
    made = make_engine()
    names = sorted(made.core.registry.offers)
    made.close()
    return names


@dataclass(eq=False)
class Guest:
    """A VM with one slot of ``npages`` at ``gfn``, bound to a file of its own, and vCPU 0."""

    engine: Engine
    consumer_name: str
    npages: int = 64
    gfn: int = 0x100
    in_place: bool | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    finalized: bool = True

    def __post_init__(self) -> None:
        made = self.engine.create_vm(self.consumer_name, self.in_place, self.config)
        self.vm = made.info.vm
        self.platform = made.info.platform
        self.in_place = made.info.in_place
        self.private = made.info.private_memory
        flags = FLAG_MMAP if self.in_place else 0
        size = self.npages * PAGE_SIZE
        self.file = self.engine.create_file(self.vm, size, flags).info.file
        self.engine.set_memory_region(self.vm, 0, GUEST_MEMFD, self.gpa(0), size, self.file, 0)
        self.engine.create_vcpu(self.vm, 0)
        if self.finalized and self.consumer.ops.finalize is not None:
            self.engine.finalize(self.vm)

    # --- names -------------------------------------------------------------------------------
    def gpa(self, page: int) -> int:
        """Return the guest address of the slot's page."""
        return (self.gfn + page) * PAGE_SIZE

    @property
    def consumer(self) -> Consumer:
        """Return the engine's consumer of the VM."""
        return self.engine.core.consumers[self.vm]

    def pfns(self, page: int, n: int = 1) -> I64:
        """Return the frames that the mirror maps the slot's pages to, -1 for none."""
        return unpack(self.engine.core.vms.get(self.vm).mirror.get(pages(self.gfn + page, n)))[0]

    def frames(self, page: int, n: int = 1) -> I64:
        """Return the frames of the file's private half, -1 for a hole."""
        found = self.engine.core.files.get(self.file).frames.get(pages(page, n))
        return np.asarray(found, dtype=np.int64) - 1

    # --- what the VMM does -------------------------------------------------------------------
    def fault(self, page: int, n: int = 1) -> None:
        """Fault pages in."""
        self.engine.pre_fault(self.vm, self.gpa(page), n * PAGE_SIZE)

    def allocate(self, page: int, n: int = 1) -> int:
        """Allocate pages of the file."""
        return self.engine.fallocate(self.file, KEEP, page * PAGE_SIZE, n * PAGE_SIZE)

    def punch(self, page: int, n: int = 1) -> int:
        """Punch pages out of the file."""
        return self.engine.fallocate(self.file, PUNCH, page * PAGE_SIZE, n * PAGE_SIZE)

    def convert(self, page: int, n: int, private: bool) -> None:
        """Convert pages, in the VM's own way."""
        attributes = PRIVATE if private else SHARED
        if self.in_place:
            self.engine.convert_file(self.file, page * PAGE_SIZE, n * PAGE_SIZE, attributes)
        else:
            self.engine.set_attributes(self.vm, [(self.gpa(page), n * PAGE_SIZE, attributes)])

    def populate(self, page: int, data: bytes) -> int:
        """Populate initial pages."""
        return self.engine.populate(self.vm, self.gpa(page), data)

    # --- what the guest does -----------------------------------------------------------------
    def run(self, *programme: Instruction, lazy: bool = False) -> Exited:
        """Run a programme on vCPU 0 until it exits."""
        self.engine.set_programme(self.vm, 0, programme, lazy)
        return self.engine.run_vcpu(self.vm, 0)

    def do(self, opcode: Opcode, page: int, n: int = 1, **fields: Any) -> Instruction:
        """Return an instruction about whole pages of the slot."""
        fields.setdefault("private", self.private)
        return Instruction(opcode, self.gpa(page), n * PAGE_SIZE, **fields)

    def accept(self, page: int, n: int = 1) -> None:
        """Accept or validate pages, where the vendor wants that."""
        if self.platform in ACCEPTS:
            exited = self.run(self.do(ACCEPTS[self.platform], page, n))
            assert exited.reason.name == "HLT", exited

    def write(self, page: int, n: int, seed: int, **fields: Any) -> Exited:
        """Write words made from a seed."""
        fields = {"pattern": Pattern.WORDS, "value": seed, **fields}
        return self.run(self.do(Opcode.WRITE, page, n, **fields))

    def check(self, page: int, n: int, seed: int, **fields: Any) -> Exited:
        """Compare with words made from a seed."""
        fields = {"pattern": Pattern.WORDS, "value": seed, **fields}
        return self.run(self.do(Opcode.CHECK, page, n, **fields))

    def holds(self, page: int, n: int, seed: int, **fields: Any) -> bool:
        """Return whether the guest reads what ``write`` with this seed wrote."""
        exited = self.check(page, n, seed, **fields)
        return exited.reason.name == "HLT" and not exited.vcpu.mismatched

    def zero(self, page: int, n: int, **fields: Any) -> bool:
        """Return whether the guest reads zeros."""
        return self.holds(page, n, 0, pattern=Pattern.BYTE, **fields)

    def fill(self, page: int, n: int, seed: int) -> None:
        """Accept pages and write to them."""
        self.accept(page, n)
        exited = self.write(page, n, seed)
        assert exited.reason.name == "HLT", exited
