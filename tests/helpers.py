"""Small helpers around an in-process engine: a guest with one file, and refusals checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.programme import Instruction, Opcode, Pattern
from rmemd.engine.vcpu import Exit, Exited
from rmemd.errors import Reason, RmemError
from rmemd.model.files import RestrictedFile
from rmemd.model.vms import GUEST_MEMFD, Slot, Vm
from rmemd.units import PAGE_SIZE

BASE_GPA = 4 << 30


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class MakeEngine(Protocol):
    """Makes an engine; options as in ``Options``."""

    def __call__(self, **options: int | None) -> Engine: ...


def new_engine(clock: Callable[[], float], **options: Any) -> Engine:
    """Make an engine that keeps every journal record and is watched; close it yourself."""
    defaults = {"nframes": 16384, "nnodes": 2, "seed": 1, "kept_records": None}
    engine = Engine(Options(**{**defaults, **options}), Guard(clock))
    engine.watch()
    return engine


def refusal(
    call: Callable[..., Any], *args: Any, reason: Reason, errno: int, **kwargs: Any
) -> RmemError:
    """Make a call that must be refused for one reason and with one errno; return the refusal."""
    with pytest.raises(RmemError) as caught:
        call(*args, **kwargs)
    found = caught.value
    assert (found.reason.name, found.errno) == (reason.name, errno), str(found)
    return found


def write(gpa: int, length: int, value: int, private: bool = True) -> Instruction:
    """Return a guest's filling bytes with one value."""
    return Instruction(Opcode.WRITE, gpa, length, Pattern.BYTE, value, private)


def check(gpa: int, length: int, value: int, private: bool = True) -> Instruction:
    """Return a guest's comparing bytes with one value."""
    return Instruction(Opcode.CHECK, gpa, length, Pattern.BYTE, value, private)


def touch(gpa: int, length: int, private: bool = True) -> Instruction:
    """Return a guest's reading bytes."""
    return Instruction(Opcode.TOUCH, gpa, length, private=private)


@dataclass
class Guest:
    """A VM with one file behind ``npages`` pages from ``gpa``, and a vCPU.

    Offsets are in bytes from ``gpa``, which is also the file's start.
    """

    engine: Engine
    vm: int
    file: int
    gpa: int
    npages: int
    vcpu: int = 0

    @property
    def size(self) -> int:
        """Return the guest's memory in bytes."""
        return self.npages * PAGE_SIZE

    def run(self, *programme: Instruction, answer: int = 0) -> Exited:
        """Run a programme from its first instruction to the first exit."""
        self.engine.set_programme(self.vm, self.vcpu, programme)
        return self.engine.run_vcpu(self.vm, self.vcpu, answer)

    def fill(self, offset: int, length: int, value: int, private: bool = True) -> None:
        """Have the guest fill bytes, to the programme's end."""
        halted(self.run(write(self.gpa + offset, length, value, private)))

    def mismatches(self, offset: int, length: int, value: int, private: bool = True) -> int:
        """Have the guest compare bytes; return how many pages differ."""
        exited = self.run(check(self.gpa + offset, length, value, private))
        halted(exited)
        return exited.vcpu.mismatched

    def sees(self, offset: int, length: int, value: int, private: bool = True) -> bool:
        """Return whether every byte has the value, as the guest reads it."""
        return self.mismatches(offset, length, value, private) == 0

    def host_read(self, offset: int = 0, length: int = PAGE_SIZE) -> bytes:
        """Read through the host's mapping."""
        return self.engine.read_shared(self.file, offset, length)

    def host_write(self, offset: int, data: bytes) -> None:
        """Write through the host's mapping."""
        self.engine.write_shared(self.file, offset, data)

    def host_sees(self, offset: int, length: int, value: int) -> bool:
        """Return whether every byte has the value, as the host reads it."""
        return self.host_read(offset, length) == bytes([value]) * length

    def pfn(self, pgoff: int, private: bool = True) -> int:
        """Return the frame of a page, -1 for a hole."""
        return file_of(self.engine, self.file).half(private).at(pgoff) - 1


def halted(exited: Exited) -> Exited:
    """Require that a vCPU ended at its programme's end."""
    assert exited.reason is Exit.HLT, f"{exited.reason.name} at {exited.gpa:#x}: {exited.refusal}"
    return exited


def vm_of(engine: Engine, vm: int) -> Vm:
    """Return a VM's tables."""
    return engine.core.vms.get(vm)


def file_of(engine: Engine, file: int) -> RestrictedFile:
    """Return a file's tables."""
    return engine.core.files.get(file)


def slot_of(engine: Engine, vm: int, slot: int) -> Slot:
    """Return a memslot."""
    found: Slot = vm_of(engine, vm).slots[slot]
    return found


def make_guest(
    engine: Engine,
    consumer: str,
    npages: int = 4,
    *,
    flags: int = 0,
    in_place: bool | None = None,
    starts_private: bool | None = None,
    config: Mapping[str, str] | None = None,
    gpa: int = BASE_GPA,
    restricted: bool = True,
    finalize: bool = True,
) -> Guest:
    """Make a VM with one slot of ``npages`` at ``gpa`` and vCPU 0; finalize it if it can be.

    ``restricted`` False gives it an ordinary slot; ``file`` is then the memory behind that.
    """
    vm = engine.create_vm(
        consumer, in_place=in_place, config=config, starts_private=starts_private
    ).info.vm
    size = npages * PAGE_SIZE
    if restricted:
        file = engine.create_file(vm, size, flags).info.file
        engine.set_memory_region(vm, 0, GUEST_MEMFD, gpa, size, file=file)
    else:
        engine.set_memory_region(vm, 0, 0, gpa, size)
        file = slot_of(engine, vm, 0).file
    engine.create_vcpu(vm, 0)
    if finalize and engine.core.consumers[vm].ops.finalize is not None:
        engine.finalize(vm)
    return Guest(engine, vm, file, gpa, npages)
