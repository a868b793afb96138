"""A guest with devices, as its VMM keeps it: slots, processes, grants, and what was counted.

Owns plain data; ``host.py`` acts on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from rmem_client import RmemError

from .channel import Child
from .machine import Machine, Range

# where slots beyond RAM begin, above the firmware
HIGH_GPA = 1 << 32


@dataclass(frozen=True)
class Slot:
    """A memslot: a guest range, and the file range behind it."""

    slot: int
    where: Range
    file: int
    offset: int = 0

    def offset_of(self, gpa: int) -> int:
        """Return the file offset of a guest address."""
        return self.offset + gpa - self.where.gpa


@dataclass
class Guest:
    """A VM with its slots and processes.

    Attributes:
        machine: VM, RAM, consumer.
        slots: its slots by number, RAM's among them.
        interrupt: the eventfd by which devices interrupt its vCPU.
        cpus: processes of its vCPUs.
        devices: its devices, by the doorbell's number.
        conversions: conversions done for it, by direction.
        retries: conversions that it was told to ask for again.
        refusals: why conversions were refused, oldest first.
        on_signal: what the VMM does at the guest's other signals.
        stop: whether its programmes end at their next exit.
        punches: whether the VMM gives the private half back of what becomes shared.
    """

    machine: Machine
    slots: dict[int, Slot]
    interrupt: int
    cpus: list[Child] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    conversions: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    refusals: list[RmemError] = field(default_factory=list)
    on_signal: Callable[[int], None] = lambda _: None
    stop: bool = False
    punches: bool = True

    @property
    def label(self) -> str:
        """Return its name for people."""
        return f"{self.machine.consumer} vm/{self.machine.vm}"

    def slot_at(self, gpa: int) -> Slot:
        """Return the slot that has a guest address.

        Raises:
            LookupError: none has.
        """
        for slot in self.slots.values():
            if slot.where.gpa <= gpa < slot.where.gpa + slot.where.size_bytes:
                return slot
        raise LookupError(f"{self.label}: no slot at {gpa:#x}")


@dataclass
class Device:
    """A device: its process, and the eventfd that is its doorbell."""

    child: Child
    doorbell: int


@dataclass(frozen=True)
class GrantSpec:
    """What a device is granted: a guest range; ``mapped``: by a descriptor of the whole file."""

    where: Range
    mapped: bool = False
    read_only: bool = False
