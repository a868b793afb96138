"""A vCPU: run, exit, handle, run again; and the process that is one (``python -m rmem_vmm.vcpu``).

Owns the exit handlers, as a table by exit reason. The process gets its orders as JSON lines on
standard input ("spec", then "go", then "stop") and tells its VMM on standard output what happens;
it has a channel to the daemon of its own, and ends with status 0 only if every byte was checked.
"""

from __future__ import annotations

import json
import select
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rmem.v1 import vcpu_pb2
from rmem_client import Client, RmemError
from rmem_client.constants import KVM_MEMORY_ATTRIBUTE_PRIVATE
from rmem_client.vcpus import Instruction

from . import guest
from .machine import Machine, convert

Exit = vcpu_pb2.RunVcpuResponse

# a page that faults again although it was converted: the VMM and the daemon disagree
CONVERSIONS_MAX = 3
EFAULT, EHWPOISON = 14, 133
RUN_DEADLINE_S = 60.0


class GuestFailed(Exception):
    """A guest ended in a way that it should not have; the message names VM and vCPU."""


@dataclass
class Tally:
    """What a vCPU has done so far: pages checked and found different, exits by reason."""

    checked_pages: int = 0
    mismatched_pages: int = 0
    first_mismatch_gfn: int = -1
    exits: Counter[str] = field(default_factory=Counter)

    def add(self, exit: Exit) -> None:
        """Add the counts of a programme that has ended, or is given up."""
        self.checked_pages += exit.checked_pages
        self.mismatched_pages += exit.mismatched_pages
        if self.first_mismatch_gfn < 0:
            self.first_mismatch_gfn = exit.first_mismatch_gfn


class Vcpu:
    """Runs programmes on one vCPU and handles its exits.

    Args:
        client: the daemon.
        machine: the VM.
        index: which of its vCPUs.
    """

    def __init__(self, client: Client, machine: Machine, index: int) -> None:
        self.tally = Tally()
        self._client = client
        self._machine = machine
        self._index = index
        self._answer = 0
        self._converted: Counter[int] = Counter()

    def run(
        self, programme: list[Instruction], on_signal: Callable[[int], bool] = lambda _: True
    ) -> None:
        """Run a programme to its HALT, or until ``on_signal`` says to give it up.

        Args:
            programme: the instructions.
            on_signal: told each signal's value; returns whether to go on.

        Raises:
            GuestFailed: the guest was lost, or an exit could not be handled.
        """
        self._client.vcpus.set_programme(self._machine.vm, self._index, programme)
        while True:
            exit = self._run_once()
            name = vcpu_pb2.ExitReason.Name(exit.exit_reason).removeprefix("EXIT_REASON_")
            self.tally.exits[name] += 1
            if exit.exit_reason == vcpu_pb2.EXIT_REASON_IO:
                if on_signal(exit.value):
                    continue
                return self.tally.add(exit)
            if exit.exit_reason == vcpu_pb2.EXIT_REASON_HLT:
                return self.tally.add(exit)
            HANDLERS.get(exit.exit_reason, Vcpu._lost)(self, exit)

    def _run_once(self) -> Exit:
        answer, self._answer = self._answer, 0
        return self._client.vcpus.run(
            self._machine.vm, self._index, hypercall_result=answer, deadline_s=RUN_DEADLINE_S
        )

    def _hypercall(self, exit: Exit) -> None:
        """KVM_HC_MAP_GPA_RANGE: convert as asked; the guest gets the errno of a refusal."""
        private = bool(exit.value & KVM_MEMORY_ATTRIBUTE_PRIVATE)
        try:
            convert(self._client, self._machine, exit.gpa, exit.size_bytes, private=private)
        except RmemError as refusal:
            self._answer = -(refusal.errno or EFAULT)

    def _memory_fault(self, exit: Exit) -> None:
        """The guest addressed memory in the other state: convert it on demand."""
        private = bool(exit.flags & KVM_MEMORY_ATTRIBUTE_PRIVATE)
        self._converted[exit.gpa] += 1
        if exit.errno != EFAULT or self._converted[exit.gpa] > CONVERSIONS_MAX:
            self._lost(exit)
        convert(self._client, self._machine, exit.gpa, exit.size_bytes, private=private)

    def _interrupted(self, exit: Exit) -> None:
        """Nothing to do: the guest goes on where it was."""

    def _lost(self, exit: Exit) -> None:
        reason = vcpu_pb2.ExitReason.Name(exit.exit_reason).removeprefix("EXIT_REASON_")
        what = exit.text or exit.refusal.reason or f"errno {exit.errno}"
        self.tally.add(exit)
        raise GuestFailed(f"{self.label}: exit {reason} at gpa {exit.gpa:#x}: {what}")

    @property
    def label(self) -> str:
        """Return the vCPU's name for people."""
        return f"{self._machine.consumer} vm/{self._machine.vm} vCPU {self._index}"

    def require_intact(self) -> None:
        """Raise GuestFailed unless pages were checked and none differed."""
        if self.tally.mismatched_pages:
            raise GuestFailed(
                f"{self.label}: {self.tally.mismatched_pages} of {self.tally.checked_pages} pages "
                f"checked are not what the guest wrote, the first at gfn "
                f"{self.tally.first_mismatch_gfn:#x}"
            )
        if not self.tally.checked_pages:
            raise GuestFailed(f"{self.label}: no page was checked")


HANDLERS: dict[int, Callable[[Vcpu, Exit], None]] = {
    vcpu_pb2.EXIT_REASON_HYPERCALL: Vcpu._hypercall,
    vcpu_pb2.EXIT_REASON_MEMORY_FAULT: Vcpu._memory_fault,
    vcpu_pb2.EXIT_REASON_INTR: Vcpu._interrupted,
}


@dataclass(frozen=True)
class Spec:
    """What a vCPU's process is told first."""

    socket_dir: str
    machine: Machine
    index: int
    seed: int
    work_pages: int

    def dumps(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, line: str) -> Spec:
        """Read it from a line of JSON."""
        said = json.loads(line)
        machine = said.pop("machine")
        machine["ops"] = tuple(machine["ops"])
        return cls(machine=Machine(**machine), **said)


class VcpuProcess:
    """The process: follows its VMM's orders and reports."""

    def __init__(self, spec: Spec, client: Client) -> None:
        self._vcpu = Vcpu(client, spec.machine, spec.index)
        self._machine = spec.machine
        self._mine = guest.layout(spec.machine, spec.index, spec.seed, spec.work_pages)
        self._rounds = 0

    def run(self) -> None:
        """Run the guest to its end; raise GuestFailed unless all its bytes are intact."""
        self._vcpu.run(guest.main_programme(self._machine, self._mine), self._on_signal)
        self._vcpu.require_intact()
        self._vcpu.run(guest.final_programme(self._machine, self._mine))
        self._vcpu.require_intact()

    def report(self, failure: str) -> None:
        """Tell the VMM how it ended."""
        tally = self._vcpu.tally
        say(
            "ended", failure=failure, rounds=self._rounds, checked_pages=tally.checked_pages,
            mismatched_pages=tally.mismatched_pages, exits=dict(tally.exits),
        )  # fmt: skip

    def _on_signal(self, value: int) -> bool:
        if value == guest.PUBLISHED:
            say("published")
            return sys.stdin.readline().strip() == "go"
        self._rounds += 1
        if self._rounds == 1:
            say("looping")
        stop, _, _ = select.select([sys.stdin], [], [], 0)
        return not stop


def say(event: str, **fields: Any) -> None:
    """Write one event as a line of JSON."""
    print(json.dumps({"event": event, **fields}), flush=True)


def main() -> int:
    """Be one vCPU; return the exit status."""
    spec = Spec.loads(sys.stdin.readline())
    with Client(spec.socket_dir) as client:
        process = VcpuProcess(spec, client)
        try:
            process.run()
        except (GuestFailed, RmemError) as error:
            process.report(str(error))
            return 1
        process.report("")
        return 0


if __name__ == "__main__":
    sys.exit(main())
