"""A virtual machine as its VMM sees it: VM, restricted file, slots, vCPUs, conversion, launch.

Owns what a VMM does on the guest's behalf. A ``Machine`` is plain data, so that the VMM's process
can hand it to its vCPUs' processes; the functions take a client beside it. What the consumer can
do is asked of its ops table, never concluded from its name.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from rmem.v1 import consumer_pb2, types_pb2
from rmem_client import Client, RmemError
from rmem_client.constants import GUEST_MEMFD_FLAG_MMAP, MPOL_BIND, PAGE_BYTES
from rmem_client.pauses import pauses

from .firmware import Firmware
from .units import size_text

FIRMWARE_END = 1 << 32
RAM_SLOT, FIRMWARE_SLOT = 0, 1

# the daemon hears at once that the process of a running vCPU has ended; on a busy host "at once"
# may be seconds
LEAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Range:
    """A byte range of guest physical memory, in whole pages."""

    gpa: int
    size_bytes: int

    @property
    def npages(self) -> int:
        """Return how many pages it has."""
        return self.size_bytes // PAGE_BYTES

    @property
    def gfns(self) -> tuple[int, int]:
        """Return it as (first guest frame, pages)."""
        return self.gpa // PAGE_BYTES, self.npages

    def part(self, first_page: int, npages: int) -> Range:
        """Return some of its pages."""
        return Range(self.gpa + first_page * PAGE_BYTES, npages * PAGE_BYTES)


@dataclass(frozen=True)
class Machine:
    """A VM and its one restricted file: RAM from address 0, firmware up to 4 GiB.

    Attributes:
        vm: the VM's handle.
        file: the file's handle; RAM first in it, firmware behind.
        consumer: the consumer's full name.
        platform: its vendor.
        private_memory: whether the VM has private memory.
        in_place: whether it converts the file in place, or the VM's attributes.
        ops: the ops that its consumer implements.
        memory_bytes: size of RAM.
        firmware_bytes: size of the firmware, 0 without one.
        vcpus: how many vCPUs.
    """

    vm: int
    file: int
    consumer: str
    platform: str
    private_memory: bool
    in_place: bool
    ops: tuple[str, ...]
    memory_bytes: int
    firmware_bytes: int
    vcpus: int

    @property
    def firmware_gpa(self) -> int:
        """Return where the firmware begins: it ends at 4 GiB, as a PC's does."""
        return FIRMWARE_END - self.firmware_bytes

    def offset_of(self, gpa: int) -> int:
        """Return the file offset of a guest address."""
        if gpa < self.memory_bytes:
            return gpa
        return self.memory_bytes + gpa - self.firmware_gpa


def create(
    client: Client,
    consumer: consumer_pb2.Consumer,
    *,
    memory_bytes: int,
    firmware_bytes: int = 0,
    vcpus: int = 1,
    name: str = "",
    node: int | None = None,
) -> Machine:
    """Make a VM with its file, slots and vCPUs, in the order that every vendor accepts.

    Args:
        client: the daemon.
        consumer: the consumer, as ``client.consumers.list()`` gives it.
        memory_bytes: size of RAM.
        firmware_bytes: size of the firmware.
        vcpus: how many vCPUs.
        name: a name for people.
        node: NUMA node that all of its memory shall come from; ``None``: any.

    Raises:
        ValueError: RAM and firmware overlap.
        RmemError: the daemon's refusal; nothing is left of the VM then.
    """
    if firmware_bytes and memory_bytes > FIRMWARE_END - firmware_bytes:
        most = size_text(FIRMWARE_END - firmware_bytes)
        raise ValueError(
            f"RAM of {size_text(memory_bytes)} reaches the firmware, which ends at 4 GiB: "
            f"at most {most} fit below"
        )
    vm = client.vms.create(consumer.name, name=name)
    in_place = client.vms.get(vm).personality == types_pb2.PERSONALITY_IN_PLACE
    table = client.consumers.ops(vm)
    size = memory_bytes + firmware_bytes
    try:
        file = client.files.create(vm, size, flags=GUEST_MEMFD_FLAG_MMAP if in_place else 0)
    except RmemError:
        _destroy(client, vm)
        raise
    machine = Machine(
        vm=vm, file=file, consumer=consumer.name, platform=consumer.platform,
        private_memory=consumer.private_memory, in_place=in_place,
        ops=tuple(op.name for op in table.ops if op.implemented), memory_bytes=memory_bytes,
        firmware_bytes=firmware_bytes, vcpus=vcpus,
    )  # fmt: skip
    try:
        _furnish(client, machine, node)
    except RmemError:
        dispose(client, machine)
        raise
    return machine


def _furnish(client: Client, machine: Machine, node: int | None) -> None:
    vm, file = machine.vm, machine.file
    ram, firmware = machine.memory_bytes, machine.firmware_bytes
    if node is not None:
        client.files.set_policy(file, 0, ram + firmware, policy=MPOL_BIND, nodes=[node])
    client.vms.set_memory_region(vm, RAM_SLOT, gpa=0, size_bytes=ram, file=file)
    if firmware:
        client.vms.set_memory_region(
            vm, FIRMWARE_SLOT, gpa=machine.firmware_gpa, size_bytes=firmware, file=file,
            file_offset_bytes=ram,
        )  # fmt: skip
    for index in range(machine.vcpus):
        client.vcpus.create(vm, index)


def load_firmware(client: Client, machine: Machine, firmware: Firmware) -> str:
    """Bring the firmware into the guest's memory; return the way that was taken.

    Private by populate where the table has it. Where it is NULL, a VM that converts in place
    (pKVM) gets the image through shared memory, which is then converted. A consumer that has
    neither leaves its VMM the shared memory alone.
    """
    gpa, offset = machine.firmware_gpa, machine.offset_of(machine.firmware_gpa)
    if "populate" in machine.ops:
        client.vms.populate(machine.vm, gpa, firmware.image)
        return "populated, measured"
    if machine.private_memory:
        convert(client, machine, gpa, machine.firmware_bytes, private=False)
    client.files.write_shared(machine.file, offset, firmware.image)
    if not firmware_is_private(machine):
        return "left in shared memory"
    convert(client, machine, gpa, machine.firmware_bytes, private=True)
    return "shared, converted in place"


def firmware_is_private(machine: Machine) -> bool:
    """Say whether the firmware ends up in private memory."""
    return machine.private_memory and ("populate" in machine.ops or machine.in_place)


def finalize(client: Client, machine: Machine) -> bytes:
    """Close the launch where the vendor measures one; return the measurement, else nothing."""
    return client.vms.finalize(machine.vm) if "finalize" in machine.ops else b""


def convert(client: Client, machine: Machine, gpa: int, size_bytes: int, *, private: bool) -> None:
    """Convert a range of guest memory in the VM's own way.

    In place, the file's one page serves either state. By attributes both halves may exist, so the
    VMM gives the private half back when the range becomes shared.
    """
    offset = machine.offset_of(gpa)
    if machine.in_place:
        client.files.convert(machine.file, offset, size_bytes, private=private)
        return
    client.vms.convert(machine.vm, gpa, size_bytes, private=private)
    if not private:
        client.files.punch(machine.file, offset, size_bytes)


def dispose(client: Client, machine: Machine) -> int:
    """Destroy the VM and close its file; return how many pages that freed.

    A vCPU that runs is waited for: its process may have been killed a moment ago.
    """
    _destroy(client, machine.vm)
    return client.files.close(machine.file)


def _destroy(client: Client, vm: int) -> None:
    end = time.monotonic() + LEAVE_SECONDS
    for pause in pauses():
        try:
            client.vms.destroy(vm)
        except RmemError as refusal:
            if refusal.reason != "VM_IN_USE" or time.monotonic() > end:
                raise
            time.sleep(pause)
        else:
            return


def frames_of(client: Client, subject: Machine, ranges: Iterable[Range]) -> list[tuple[int, int]]:
    """Return the frames that guest memory is on, as (first, pages), whether mapped or not."""
    wanted = [(subject.offset_of(r.gpa) // PAGE_BYTES, r.npages) for r in ranges]
    found = []
    for run in client.host.frame_runs():
        if run.file != subject.file:
            continue
        for start, npages in wanted:
            first = max(start, run.pgoff)
            end = min(start + npages, run.pgoff + run.npages)
            if first < end:
                found.append((run.pfn + first - run.pgoff, end - first))
    return found
