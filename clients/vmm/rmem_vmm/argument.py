"""The argument of 2022, put to one consumer variant: who holds its pages, and may they move?

Owns the experiment. One small guest per variant goes through the steps of pkvm.md §7; references
and pins are read from the daemon at each, migrate is asked and its answer kept, a device's pin is
added to see whom a refusal names, and the guest says whether its bytes survived. Nothing here
knows what to expect of a variant; ``verdict.py`` compares the figures with each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from rmem.v1 import consumer_pb2, host_pb2, types_pb2
from rmem_client import Client, RmemError
from rmem_client import vcpus as instructions
from rmem_client.constants import PAGE_BYTES

from . import guest, machine
from .machine import RAM_SLOT, Machine, Range
from .vcpu import Vcpu

WORK = Range(0, 64 * PAGE_BYTES)
SHARED = Range(64 * PAGE_BYTES, 4 * PAGE_BYTES)
MEMORY_BYTES = 128 * PAGE_BYTES
FROM_NODE, TO_NODE = 0, 1
PUNCHED_PAGE, KEPT_PAGE = 1, 2
DEVICE, PURPOSE = "demo NIC", "DMA"


@dataclass(frozen=True)
class Failure:
    """How a vendor can fail to give a page back: where that is tried, and what goes wrong."""

    step: str
    point: str
    error: str
    times: int = 2


# the rows 6' of pkvm.md §7; a host without a vendor has no such step
FAILURES: dict[str, Failure] = {
    "tdx": Failure("zap", "TDH_MEM_PAGE_REMOVE", "TDX_OPERAND_BUSY"),
    "snp": Failure("zap", "RMPUPDATE", "FAIL_INUSE"),
    "pkvm": Failure("teardown", "__pkvm_host_reclaim_page_guest", "-EPERM"),
}


@dataclass(frozen=True)
class Count:
    """What a page's frame is held by: the page cache's reference included."""

    references: int
    pins: int
    use: str = ""
    note: str = ""
    refused: bool = False

    def __str__(self) -> str:
        return str(self.references) + (f"+{self.pins}p" if self.pins else "")


@dataclass(frozen=True)
class Answer:
    """What migrate answered, added up over the pages asked about."""

    asked: int
    moved: int
    unmovable: int
    busy: int
    failed: int
    reason: str = ""
    errno: str = ""
    named: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """Return the answer in a word; "mixed" if the pages did not all get the same."""
        for word in ("moved", "unmovable", "busy", "failed"):
            if getattr(self, word) == self.asked:
                return word
        return "mixed"


@dataclass
class Argued:
    """One variant's row: every figure is from a reply of the daemon."""

    consumer: str
    platform: str
    summary: str
    private_memory: bool
    ops: tuple[str, ...]
    null_ops: tuple[str, ...]
    steps: dict[str, Count | None] = field(default_factory=dict)
    holds: tuple[str, ...] = ()
    migrate: Answer = Answer(0, 0, 0, 0, 0)
    held: Answer = Answer(0, 0, 0, 0, 0)
    let_go: Answer = Answer(0, 0, 0, 0, 0)
    checked_pages: int = 0
    mismatched_pages: int = 0

    @property
    def survived_pages(self) -> int:
        """Return how many pages the guest found unchanged after the migrate."""
        return self.checked_pages - self.mismatched_pages


def argue(client: Client, consumer: consumer_pb2.Consumer) -> Argued:
    """Put the argument to one consumer variant."""
    subject = _make(client, consumer)
    implemented = {op.name: op.implemented for op in client.consumers.ops(subject.vm).ops}
    row = Argued(
        consumer.name, consumer.platform, consumer.summary, consumer.private_memory,
        tuple(name for name, there in implemented.items() if there),
        tuple(name for name, there in implemented.items() if not there),
    )  # fmt: skip
    _fault(client, subject, row)
    _migrate(client, subject, row)
    _hold(client, subject, row)
    _tear_down(client, subject, row)
    row.steps["removal fails"] = _fail(client, consumer)
    return row


def _make(client: Client, consumer: consumer_pb2.Consumer) -> Machine:
    subject = machine.create(
        client, consumer, memory_bytes=MEMORY_BYTES, name="the argument", node=FROM_NODE
    )
    machine.finalize(client, subject)
    return subject


def _fault(client: Client, subject: Machine, row: Argued) -> None:
    """Fault the first page in, losing the race once on the way."""
    client.host.add_fault("lost_race", "an invalidation came first", vm=subject.vm)
    reply = client.vms.prefault(subject.vm, WORK.gpa, PAGE_BYTES, trace=True)
    for step in reply.steps:
        row.steps[step.step] = Count(step.references, step.pins)


def _migrate(client: Client, subject: Machine, row: Argued) -> None:
    """Have the guest fill its pages, move them, and have it look again."""
    vcpu = Vcpu(client, subject, 0)
    fill = [*guest.take(subject, WORK), *guest.fill(subject, WORK, subject.vm)]
    vcpu.run([*fill, instructions.halt()])
    vcpu.require_intact()
    before = client.host.page(vm=subject.vm, gfn=0)
    row.holds = tuple(map(_holder, before.holders))
    reply = client.host.migrate(vm=subject.vm, gfns=[WORK.gfns], node=TO_NODE)
    row.migrate = answer_of(reply.report)
    row.steps["migrate"] = _count(client, client.host.page(vm=subject.vm, gfn=0).pfn)
    again = Vcpu(client, subject, 0)
    again.run([guest.check(subject, WORK, subject.vm), instructions.halt()])
    row.checked_pages = again.tally.checked_pages
    row.mismatched_pages = again.tally.mismatched_pages


def _hold(client: Client, subject: Machine, row: Argued) -> None:
    """Have a device pin shared pages, ask again, and once more after it has let go."""
    if subject.private_memory:
        machine.convert(client, subject, SHARED.gpa, SHARED.size_bytes, private=False)
    offset = subject.offset_of(SHARED.gpa)
    pin = client.files.pin(subject.file, offset, SHARED.size_bytes, purpose=PURPOSE, holder=DEVICE)
    frames = machine.frames_of(client, subject, [SHARED])
    ask = partial(client.host.migrate, pfns=frames, node=TO_NODE)
    row.held = answer_of(ask().report)
    client.files.unpin(pin)
    row.let_go = answer_of(ask().report)


def _tear_down(client: Client, subject: Machine, row: Argued) -> None:
    row.steps["zap"] = _zap(client, subject)
    pfn = client.host.page(file=subject.file, pgoff=KEPT_PAGE).pfn
    client.vms.destroy(subject.vm)
    row.steps["teardown"] = _count(client, pfn)
    client.files.close(subject.file)
    row.steps["closed"] = _count(client, pfn)


def _zap(client: Client, subject: Machine) -> Count:
    """Punch a private page; an ordinary VM's leaf goes with its slot. A refusal is noted."""
    pfn = client.host.page(file=subject.file, pgoff=PUNCHED_PAGE).pfn
    note = ""
    try:
        if subject.private_memory:
            client.files.punch(subject.file, PUNCHED_PAGE * PAGE_BYTES, PAGE_BYTES)
        else:
            client.vms.delete_memory_region(subject.vm, RAM_SLOT)
    except RmemError as refusal:
        note = f"{refusal.reason} ({refusal.errno_name})"
    return _count(client, pfn, note, refused=bool(note))


def _fail(client: Client, consumer: consumer_pb2.Consumer) -> Count | None:
    """On a guest of its own, have the vendor fail to give a page back."""
    failure = FAILURES.get(consumer.platform)
    if failure is None:
        return None
    subject = _make(client, consumer)
    vcpu = Vcpu(client, subject, 0)
    fill = [*guest.take(subject, WORK), *guest.fill(subject, WORK, subject.vm)]
    vcpu.run([*fill, instructions.halt()])
    pfn = client.host.page(file=subject.file, pgoff=PUNCHED_PAGE).pfn
    rule = client.host.add_fault(failure.point, failure.error, times=failure.times)
    note = ""
    try:
        if failure.step == "zap":
            client.files.punch(subject.file, PUNCHED_PAGE * PAGE_BYTES, PAGE_BYTES)
        else:
            client.vms.destroy(subject.vm)
    except RmemError as refusal:
        note = refusal.reason
    known = {vm.vm: vm for vm in client.vms.list().vms}
    dead = known[subject.vm].dead_reason if subject.vm in known else ""
    count = _count(client, pfn, note or dead, refused=bool(note))
    if any(waiting.rule == rule for waiting in client.host.list_faults().rules):
        client.host.remove_fault(rule)
    machine.dispose(client, subject)
    return count


def _count(client: Client, pfn: int, note: str = "", refused: bool = False) -> Count:
    page = client.host.page(pfn=pfn)
    use = host_pb2.FrameUse.Name(page.use).removeprefix("FRAME_USE_").lower()
    return Count(page.references, page.pins, use, note, refused)


def answer_of(report: host_pb2.MoveReport) -> Answer:
    """Add a report up; who was named are the holders, else the plugin that refused."""
    refusals = [run.refusal for run in report.runs if run.refusal.reason]
    named: dict[str, None] = {}
    for refusal in refusals:
        for who in [_holder(h) for h in refusal.holders] or [refusal.where]:
            named[who] = None
    first = refusals[0] if refusals else None
    return Answer(
        report.moved + report.unmovable + report.busy + report.failed, report.moved,
        report.unmovable, report.busy, report.failed, first.reason if first else "",
        first.errno_name if first else "", tuple(who for who in named if who),
    )  # fmt: skip


def _holder(holder: types_pb2.Holder) -> str:
    kind = "long-term pin" if holder.longterm else "reference"
    return f"{holder.name}: {holder.count} {kind} ({holder.purpose})"
