"""A vCPU's process in the guest role (``python -m rmem_vmm.cpu``): it runs, and its VMM decides.

Owns the guest side of a VM whose VMM gives nothing away: the process has a ticket for one VM's
guest role, so that it may run the vCPU and load and store as the guest does, and cannot convert,
punch or share anything. Exits that need the host go to the VMM over the channel and are answered
there, as a VMM's own thread would.

Guest programmes move bytes in bulk; what a driver in the guest writes word by word (rings,
requests) it stores by ``GuestMemory``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rmem.v1 import vcpu_pb2
from rmem_client import Client, RmemError
from rmem_client.constants import KVM_MEMORY_ATTRIBUTE_PRIVATE
from rmem_client.session import Session
from rmem_client.vcpus import Instruction

from .channel import Channel, Message, be_child

RUN_DEADLINE_S = 60.0
EFAULT = 14
# EXIT_REASON_ names without the prefix, as the channel says them
HYPERCALL, MEMORY_FAULT, IO, HLT, INTR = "HYPERCALL", "MEMORY_FAULT", "IO", "HLT", "INTR"
# signals below this are the guest's own affair, those from it on go to the VMM
TO_VMM = 1 << 16


class GuestLost(Exception):
    """The guest ended in a way that it should not have."""


@dataclass
class Outcome:
    """What a programme came to."""

    checked_pages: int = 0
    mismatched_pages: int = 0
    first_mismatch_gfn: int = -1
    call_status: int = 0
    call_status_name: str = ""
    exits: dict[str, int] = field(default_factory=dict)
    lost: str = ""


class GuestMemory:
    """Guest memory as one vCPU loads and stores it (``ring.Memory``).

    Args:
        session: a session of the guest role.
        vm: the VM.
        index: the vCPU.
        private: whether the guest addresses it as private memory.
    """

    def __init__(self, session: Session, vm: int, index: int, *, private: bool = False) -> None:
        self._session = session
        self._at = (vm, index)
        self._private = private

    def load(self, address: int, size: int) -> bytes:
        """Return bytes."""
        return self._session.read_guest(*self._at, address, size, private=self._private)

    def store(self, address: int, data: bytes) -> None:
        """Store bytes."""
        self._session.write_guest(*self._at, address, data, private=self._private)


class Cpu:
    """One vCPU, run in the guest role.

    Args:
        client: the daemon, with the session's token.
        session: the session.
        channel: to the VMM.
        vm: the VM.
        index: which of its vCPUs.

    Attributes:
        shared: the guest's shared memory.
    """

    def __init__(
        self, client: Client, session: Session, channel: Channel, vm: int, index: int
    ) -> None:
        self._client = client
        self._channel = channel
        self._at = (vm, index)
        self.shared = GuestMemory(session, vm, index)

    def run(
        self, programme: Iterable[Instruction], on_signal: Callable[[int], None] | None = None
    ) -> Outcome:
        """Run a programme to its HALT.

        Args:
            programme: the instructions.
            on_signal: what the guest does at its own signals.

        Raises:
            GuestLost: an exit that nobody can handle.
        """
        self._client.vcpus.set_programme(*self._at, programme)
        exits: Counter[str] = Counter()
        answer = 0
        while True:
            exit = self._client.vcpus.run(
                *self._at, hypercall_result=answer, deadline_s=RUN_DEADLINE_S
            )
            answer = 0
            name = vcpu_pb2.ExitReason.Name(exit.exit_reason).removeprefix("EXIT_REASON_")
            exits[name] += 1
            if name == HLT:
                return _outcome(exit, exits)
            if name == IO and exit.value < TO_VMM:
                if on_signal is not None:
                    on_signal(exit.value)
            elif name in (HYPERCALL, MEMORY_FAULT, IO):
                reply = self._ask(name, exit)
                answer = reply["answer"]
                if reply["stop"]:
                    return _outcome(exit, exits)
                if name == MEMORY_FAULT and answer:
                    return _outcome(exit, exits, _why_lost(name, exit))
            elif name != INTR:
                return _outcome(exit, exits, _why_lost(name, exit))

    def _ask(self, name: str, exit: vcpu_pb2.RunVcpuResponse) -> Message:
        """Have the VMM handle an exit; return its answer to the guest, and whether to stop."""
        flags = exit.value if name == HYPERCALL else exit.flags
        return self._channel.ask(
            {
                "event": "exit", "exit": name, "gpa": exit.gpa, "size_bytes": exit.size_bytes,
                "private": bool(flags & KVM_MEMORY_ATTRIBUTE_PRIVATE), "value": exit.value,
            }
        )  # fmt: skip


def _outcome(exit: vcpu_pb2.RunVcpuResponse, exits: Counter[str], lost: str = "") -> Outcome:
    return Outcome(
        exit.checked_pages, exit.mismatched_pages, exit.first_mismatch_gfn,
        _signed(exit.call_status), exit.call_status_name, dict(exits), lost,
    )  # fmt: skip


def _signed(status: int) -> int:
    return status - (1 << 64) if status >> 63 else status


def _why_lost(name: str, exit: vcpu_pb2.RunVcpuResponse) -> str:
    what = exit.text or exit.refusal.reason or f"errno {exit.errno}"
    return f"exit {name} at gpa {exit.gpa:#x}: {what}"


def dump(programme: Iterable[Instruction]) -> str:
    """Return a programme as text for a message."""
    return vcpu_pb2.SetProgrammeRequest(programme=programme).SerializeToString().hex()


def load(text: str) -> list[Instruction]:
    """Return the programme of a message."""
    return list(vcpu_pb2.SetProgrammeRequest.FromString(bytes.fromhex(text)).programme)


def outcome_of(message: Message) -> Outcome:
    """Return the outcome that a message reports."""
    return Outcome(**message["outcome"])


def _serve(channel: Channel) -> None:
    """Do what the VMM orders until it hangs up."""
    spec, fds = channel.receive()
    with (
        Session.open(spec["socket_dir"], ticket=bytes.fromhex(spec["ticket"])) as session,
        Client(spec["socket_dir"], token=session.token) as client,
    ):
        cpu = Cpu(client, session, channel, spec["vm"], spec["index"])
        orders = Orders(cpu, fds[0])
        channel.send({"event": "ready", "session": session.number})
        while True:
            order, _ = channel.receive()
            channel.send({"event": "done", **orders.carry_out(order)})


class Orders:
    """What a VMM can order a vCPU's process to do, and what of it lasts."""

    def __init__(self, cpu: Cpu, interrupt: int) -> None:
        # the driver's module imports this one
        from .driver import ScriptedDriver

        self._cpu = cpu
        self._interrupt = interrupt
        self._scripted = ScriptedDriver
        self._drivers: dict[int, Any] = {}

    def carry_out(self, order: Message) -> dict[str, Any]:
        """Carry an order out; return what came of it."""
        match order["do"]:
            case "run":
                return {"outcome": asdict(self._cpu.run(load(order["programme"])))}
            case "request" | "collect" | "bounce" as what:
                at = order["queue"]
                if at not in self._drivers:
                    self._drivers[at] = self._scripted(self._cpu, self._interrupt, at)
                done: dict[str, Any] = getattr(self._drivers[at], what)(order)
                return done
            case unknown:
                raise ValueError(f"no order {unknown!r}")


def main() -> int:
    """Be one vCPU; return the exit status."""
    return be_child(_serve, GuestLost, RmemError, OSError, ValueError)


if __name__ == "__main__":
    # the drivers import this module by its name: its errors must be theirs
    from rmem_vmm.cpu import main as named

    sys.exit(named())
