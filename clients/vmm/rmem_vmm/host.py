"""The VMM of confidential guests with devices: slots, children, conversions, doorbells.

Owns the host side. The VMM holds a session of the host role, which VMs, files, pins and its
children's sessions go with; each child redeems a ticket for what it may do, and no more. The VMM
waits for its children's messages alone. Before memory becomes private it is taken back from the
devices: while one of them pins it, the guest is answered EAGAIN, and asks again.
"""

from __future__ import annotations

import errno
import os
import selectors
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rmem.v1 import session_pb2
from rmem_client import Client, RmemError
from rmem_client.constants import GUEST_MEMFD_FLAG_MMAP
from rmem_client.session import Session
from rmem_client.vcpus import Instruction

from . import cpu, machine
from .channel import SILENCE_SECONDS, Child, ChildFailed, Hangup, Message
from .guestvm import Device, GrantSpec, Guest, Slot
from .machine import Range
from .vmm import find_consumer

KICK = cpu.TO_VMM
QUEUE_ENTRIES = 256


class Host:
    """One VMM process.

    Args:
        socket_dir: the daemon's directory.

    Attributes:
        client: the daemon, on behalf of the VMM's session.
        session: that session.
    """

    def __init__(self, socket_dir: str | Path) -> None:
        self.socket_dir = str(socket_dir)
        self.session = Session.open(socket_dir, role="host")
        self.client = Client(socket_dir, token=self.session.token)
        self._guests: list[Guest] = []
        self._children: list[Child] = []
        self._fds: list[int] = []
        self._kept: list[tuple[Child, Message]] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the children and the session, with which the VMs and files go."""
        for child in self._children:
            child.kill()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        self._selector.close()
        self.client.close()
        self.session.close()

    # --- memory ------------------------------------------------------------------------------
    def create(
        self, consumer: str, *, memory_bytes: int, vcpus: int = 1, node: int | None = None
    ) -> Guest:
        """Make a VM with RAM from address 0; ``launch`` starts it."""
        found = find_consumer(self.client, consumer)
        made = machine.create(
            self.client, found, memory_bytes=memory_bytes, vcpus=vcpus, name=consumer, node=node
        )
        ram = Slot(machine.RAM_SLOT, Range(0, memory_bytes), made.file)
        guest = Guest(made, {ram.slot: ram}, self.eventfd())
        self._guests.append(guest)
        return guest

    def plug(self, guest: Guest, slot: int, gpa: int, size_bytes: int) -> Slot:
        """Add a slot with a file of its own; the guest may be running."""
        flags = GUEST_MEMFD_FLAG_MMAP if guest.machine.in_place else 0
        file = self.client.files.create(guest.machine.vm, size_bytes, flags=flags)
        self.client.vms.set_memory_region(
            guest.machine.vm, slot, gpa=gpa, size_bytes=size_bytes, file=file
        )
        guest.slots[slot] = Slot(slot, Range(gpa, size_bytes), file)
        return guest.slots[slot]

    def unplug(self, guest: Guest, slot: Slot) -> int:
        """Delete a slot and close its file; return how many pages that freed."""
        self.client.vms.delete_memory_region(guest.machine.vm, slot.slot)
        del guest.slots[slot.slot]
        return self.client.files.close(slot.file)

    def launch(self, guest: Guest) -> None:
        """Close the launch, where the vendor has one; vCPUs may run from then on."""
        machine.finalize(self.client, guest.machine)

    def destroy(self, guest: Guest) -> int:
        """Destroy a VM and its files; return how many pages that freed."""
        self.client.vms.destroy(guest.machine.vm)
        freed = [self.client.files.close(slot.file) for slot in guest.slots.values()]
        self._guests.remove(guest)
        return sum(freed)

    def convert(self, guest: Guest, where: Range, *, private: bool) -> None:
        """Convert a range of one slot in the VM's own way.

        Raises:
            RmemError: Busy where a device pins it; nothing has changed then.
        """
        slot = guest.slot_at(where.gpa)
        offset = slot.offset_of(where.gpa)
        files, vm = self.client.files, guest.machine.vm
        if private and guest.devices:
            self.revoke(guest, where)
        if guest.machine.in_place:
            files.convert(slot.file, offset, where.size_bytes, private=private)
        else:
            self.client.vms.convert(vm, where.gpa, where.size_bytes, private=private)
            if not private and guest.punches:
                files.punch(slot.file, offset, where.size_bytes)
        guest.conversions["to private" if private else "to shared"] += 1

    def revoke(self, guest: Guest, where: Range) -> None:
        """Take a range of one slot back from the devices.

        Raises:
            Busy: one of them pins it.
        """
        slot = guest.slot_at(where.gpa)
        offset = slot.offset_of(where.gpa)
        self.client.sessions.revoke(slot.file, offset, where.size_bytes)

    # --- children ----------------------------------------------------------------------------
    def eventfd(self) -> int:
        """Make an eventfd, which lives as long as the VMM."""
        fd = os.eventfd(0)
        self._fds.append(fd)
        return fd

    def start_cpu(self, guest: Guest, index: int = 0) -> Child:
        """Start the process of a vCPU, which the guest's devices interrupt."""
        vm = guest.machine.vm
        ticket = self.client.sessions.create_ticket(session_pb2.ROLE_GUEST, vm=vm)
        child = self._start(
            f"vCPU {index} of {guest.label}", "rmem_vmm.cpu",
            {"vm": vm, "index": index, "ticket": ticket.hex()},
            [guest.interrupt],
        )  # fmt: skip
        guest.cpus.append(child)
        return child

    def start_device(
        self, guest: Guest, kind: str, queue_gpa: int, grants: Iterable[GrantSpec],
        *, disk: int | None = None,
    ) -> Device:  # fmt: skip
        """Start a device's process on ranges of the guest's shared memory."""
        specs = [self._grant(guest, grant) for grant in grants]
        ticket = self.client.sessions.create_ticket(
            session_pb2.ROLE_DEVICE,
            grants=[
                session_pb2.Grant(
                    file=s["file"], offset_bytes=s["offset"], length_bytes=s["length"],
                    read_only=s["read_only"],
                )
                for s in specs
            ],
        )  # fmt: skip
        doorbell = self.eventfd()
        child = self._start(
            f"{kind} device of {guest.label}", "rmem_vmm.device",
            {
                "ticket": ticket.hex(), "kind": kind, "grants": specs, "purpose": f"{kind} DMA",
                "queue": {"gpa": queue_gpa, "size": QUEUE_ENTRIES},
            },
            [doorbell, guest.interrupt, *([] if disk is None else [disk])],
        )  # fmt: skip
        device = Device(child, doorbell)
        guest.devices.append(device)
        return device

    def start_child(self, name: str, module: str, spec: Message, fds: Sequence[int] = ()) -> Child:
        """Start another process of the VMM."""
        return self._start(name, module, spec, fds)

    def _start(self, name: str, module: str, spec: Message, fds: Sequence[int]) -> Child:
        child = Child(name, module)
        self._children.append(child)
        child.tell({"socket_dir": self.socket_dir, **spec}, fds)
        child.session = child.next()["session"]
        self._selector.register(child.channel, selectors.EVENT_READ, child)
        return child

    @staticmethod
    def _grant(guest: Guest, grant: GrantSpec) -> dict[str, Any]:
        slot = guest.slot_at(grant.where.gpa)
        return {
            "file": slot.file, "offset": slot.offset_of(grant.where.gpa),
            "length": grant.where.size_bytes, "gpa": grant.where.gpa, "mapped": grant.mapped,
            "read_only": grant.read_only,
        }  # fmt: skip

    # --- the loop ----------------------------------------------------------------------------
    def run(self, child: Child, programme: Iterable[Instruction]) -> cpu.Outcome:
        """Have a vCPU run a programme to its end, answering exits of all vCPUs meanwhile.

        Raises:
            ChildFailed: the guest was lost, or found bytes that it did not write.
        """
        self.order(child, programme)
        return self.finish(child)

    def attempt(self, child: Child, programme: Iterable[Instruction]) -> cpu.Outcome:
        """Have a vCPU run a programme; return what came of it, whatever that is."""
        self.order(child, programme)
        return cpu.outcome_of(self.wait(child, "done"))

    def do(self, child: Child, order: Message) -> Message:
        """Give a vCPU's process an order, and wait until it is carried out."""
        child.tell(order)
        return self.wait(child, "done")

    def order(self, child: Child, programme: Iterable[Instruction]) -> None:
        """Have a vCPU begin a programme."""
        child.tell({"do": "run", "programme": cpu.dump(programme)})

    def finish(self, child: Child) -> cpu.Outcome:
        """Wait until the programme of a vCPU has ended; return what came of it."""
        return require_intact(child, cpu.outcome_of(self.wait(child, "done")))

    def wait(self, child: Child, event: str) -> Message:
        """Wait until a child says ``event``, answering exits meanwhile."""
        return self.wait_for(lambda who, said: who is child and said["event"] == event)

    def wait_for(self, wanted: Callable[[Child, Message], bool]) -> Message:
        """Serve the children until one says what is wanted; return that.

        What is not wanted now is kept for later.

        Raises:
            ChildFailed: one ended, failed, or all are silent.
        """
        for at, (child, said) in enumerate(self._kept):
            if wanted(child, said):
                del self._kept[at]
                return said
        while True:
            child, said = self._next()
            if said["event"] == "exit":
                self._answer(child, said)
            elif wanted(child, said):
                return said
            else:
                self._kept.append((child, said))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Serve the children until something that their exits change is so."""
        while not condition():
            child, said = self._next()
            if said["event"] == "exit":
                self._answer(child, said)
            else:
                self._kept.append((child, said))

    def _next(self) -> tuple[Child, Message]:
        ready = self._selector.select(SILENCE_SECONDS)
        if not ready:
            raise ChildFailed("all processes of the VMM are silent")
        child: Child = ready[0][0].data
        try:
            said, _ = child.channel.receive()
        except Hangup:
            raise child.ended() from None
        if said["event"] == "failed":
            raise ChildFailed(f"{child.name}: {said['text']}")
        return child, said

    def _answer(self, child: Child, exit: Message) -> None:
        guest = next(guest for guest in self._guests if child in guest.cpus)
        child.tell({"answer": self._handle(guest, exit), "stop": guest.stop})

    def _handle(self, guest: Guest, exit: Message) -> int:
        """Handle an exit as a VMM's vCPU thread does; return the guest's answer, an errno."""
        if exit["exit"] == cpu.IO:
            number = exit["value"] - KICK
            if number < len(guest.devices):
                os.eventfd_write(guest.devices[number].doorbell, 1)
            else:
                guest.on_signal(exit["value"])
            return 0
        where = Range(exit["gpa"], exit["size_bytes"])
        try:
            self.convert(guest, where, private=exit["private"])
        except RmemError as refusal:
            guest.refusals.append(refusal)
            if refusal.errno == errno.EAGAIN:
                guest.retries += 1
            return -(refusal.errno or errno.EFAULT)
        except LookupError:
            return -errno.EINVAL
        return 0

    def kill(self, child: Child) -> None:
        """Kill a child, as the kernel does when memory is short."""
        self._selector.unregister(child.channel)
        self._children.remove(child)
        child.kill()


def require_intact(child: Child, outcome: cpu.Outcome) -> cpu.Outcome:
    """Return the outcome of a guest that was not lost and has found all its bytes.

    Raises:
        ChildFailed: it was, or has not.
    """
    if outcome.lost:
        raise ChildFailed(f"{child.name}: {outcome.lost}")
    if outcome.mismatched_pages:
        raise ChildFailed(
            f"{child.name}: {outcome.mismatched_pages} of {outcome.checked_pages} pages checked "
            f"are wrong, the first at gfn {outcome.first_mismatch_gfn:#x}"
        )
    return outcome
