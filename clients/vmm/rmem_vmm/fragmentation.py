"""The compaction experiment: a node whose every 2 MiB block is half full of guests' pages.

Owns how that comes about, which is as it does on a real host: a neighbour fills the node, half of
its pages go elsewhere (a random half of each block, by seed), the guests under test fault into
the holes, and the neighbour ends. Then the daemon compacts, and the guests check their bytes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rmem.v1 import consumer_pb2, host_pb2
from rmem_client import Client
from rmem_client import vcpus as instructions
from rmem_client.constants import PAGE_BYTES

from . import guest, machine
from .argument import answer_of
from .machine import Machine, Range
from .vcpu import Vcpu

BLOCK_PAGES = 512
HALF_PAGES = BLOCK_PAGES // 2
ELSEWHERE = 0
# how often guests that share a block take turns in it; every share is a multiple of it
TURNS_PER_BLOCK = 4
# pages named in one Migrate request, which is at most 64 KiB
REQUEST_PAGES = 4096
# GetPageMapResponse.packed: pfn, npages, use, vm, gfn
PACKED_COLUMNS = 5

Frames: TypeAlias = npt.NDArray[np.int64]


class CannotFragment(Exception):
    """The daemon's host does not allow the experiment."""


@dataclass(frozen=True)
class Share:
    """A consumer, and how many of each block's half are its guest's pages."""

    consumer: consumer_pb2.Consumer
    pages_per_block: int


@dataclass
class Compacted:
    """What compaction did to a node that held these guests; ``cells`` are the frames' VMs."""

    label: str
    guests: dict[str, int]
    pages: int
    blocks: int
    free_before: int
    free_after: int
    blocked: int
    moved: int
    unmovable: int
    busy: int
    failed: int
    named: tuple[str, ...]
    checked_pages: int
    mismatched_pages: int
    vms: dict[int, str] = field(default_factory=dict)
    cells_before: Frames = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    cells_after: Frames = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    arrived: Frames = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    stuck: Frames = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)

    @property
    def regained(self) -> int:
        """Return how many 2 MiB blocks are free that were not."""
        return self.free_after - self.free_before


def neighbour(consumers: Sequence[consumer_pb2.Consumer]) -> consumer_pb2.Consumer:
    """Return the consumer of the neighbour that leaves: one whose memory is not private.

    Raises:
        CannotFragment: the daemon has none.
    """
    for consumer in consumers:
        if not consumer.private_memory:
            return consumer
    raise CannotFragment("the daemon has no consumer without private memory, such as gup")


def compact_half_full(
    client: Client, label: str, shares: Sequence[Share], ballast: consumer_pb2.Consumer, seed: int
) -> Compacted:
    """Make the host's last node half full of these guests' pages, and compact it."""
    node = client.host.get().nodes[-1]
    blocks = node.npages // BLOCK_PAGES
    if node.free_pages != node.npages:
        raise CannotFragment(f"node {node.node} is not empty: {node.free_pages} pages are free")
    filler = _fill_with_holes(client, ballast, node, seed)
    guests = [_make(client, share, node.node, blocks) for share in shares]
    _fault_in(client, guests, shares, blocks)
    machine.dispose(client, filler)
    for subject in guests:
        _run(client, subject, [*guest.take(subject, _all(subject)), _write(subject)])
    before = _cells(client, node)
    reply = client.host.compact(node.node)
    after = _cells(client, node)
    checked, mismatched = _check(client, guests)
    result = _result(label, shares, guests, node, reply)
    result.checked_pages, result.mismatched_pages = checked, mismatched
    result.cells_before, result.cells_after = before, after
    for subject in guests:
        machine.dispose(client, subject)
    return result


def _fill_with_holes(
    client: Client, consumer: consumer_pb2.Consumer, node: host_pb2.Node, seed: int
) -> Machine:
    size = node.npages * PAGE_BYTES
    filler = machine.create(
        client, consumer, memory_bytes=size, name="the neighbour", node=node.node
    )
    client.vms.prefault(filler.vm, 0, size)
    rng = random.Random(seed)
    going = [
        (node.first_pfn + block + offset, 1)
        for block in range(0, node.npages, BLOCK_PAGES)
        for offset in sorted(rng.sample(range(BLOCK_PAGES), HALF_PAGES))
    ]
    for at in range(0, len(going), REQUEST_PAGES):
        part = going[at : at + REQUEST_PAGES]
        report = client.host.migrate(pfns=part, node=ELSEWHERE).report
        if report.moved != len(part):
            raise CannotFragment(f"{len(part) - report.moved} pages of {consumer.name} stay put")
    return filler


def _make(client: Client, share: Share, node: int, blocks: int) -> Machine:
    size = share.pages_per_block * blocks * PAGE_BYTES
    subject = machine.create(
        client, share.consumer, memory_bytes=size, name="fragmented", node=node
    )
    machine.finalize(client, subject)
    return subject


def _fault_in(
    client: Client, guests: Sequence[Machine], shares: Sequence[Share], blocks: int
) -> None:
    """Fault the guests in by turns, so that each has its share of each block, spread over it."""
    if len(guests) == 1:
        client.vms.prefault(guests[0].vm, 0, guests[0].memory_bytes)
        return
    for turn in range(blocks * TURNS_PER_BLOCK):
        for subject, share in zip(guests, shares, strict=True):
            size = share.pages_per_block // TURNS_PER_BLOCK * PAGE_BYTES
            client.vms.prefault(subject.vm, turn * size, size)


def _all(subject: Machine) -> Range:
    return Range(0, subject.memory_bytes)


def _write(subject: Machine) -> instructions.Instruction:
    return instructions.write(
        0, subject.memory_bytes, seed=subject.vm, private=subject.private_memory
    )


def _run(client: Client, subject: Machine, programme: list[instructions.Instruction]) -> Vcpu:
    vcpu = Vcpu(client, subject, 0)
    vcpu.run([*programme, instructions.halt()])
    return vcpu


def _check(client: Client, guests: Sequence[Machine]) -> tuple[int, int]:
    checked = mismatched = 0
    for subject in guests:
        vcpu = _run(client, subject, [guest.check(subject, _all(subject), subject.vm)])
        checked += vcpu.tally.checked_pages
        mismatched += vcpu.tally.mismatched_pages
    return checked, mismatched


def _cells(client: Client, node: host_pb2.Node) -> Frames:
    """Return, for each frame of a node, the VM whose page is on it: 0 if it is free."""
    pfn, end, parts = node.first_pfn, node.first_pfn + node.npages, []
    while True:
        reply = client.host.page_map(pfn, end - pfn)
        parts.append(np.frombuffer(reply.packed, dtype="<i8").reshape(-1, PACKED_COLUMNS))
        pfn = reply.next_pfn
        if not pfn or pfn >= end:
            break
    runs = np.concatenate(parts)
    free = runs[:, 2] == host_pb2.FRAME_USE_FREE
    # a frame that is used but bound to no VM is -1
    vms = np.where(free, 0, np.where(runs[:, 3] > 0, runs[:, 3], -1))
    return np.repeat(vms, runs[:, 1]).astype(np.int64)


def _result(
    label: str,
    shares: Sequence[Share],
    guests: Sequence[Machine],
    node: host_pb2.Node,
    reply: host_pb2.CompactResponse,
) -> Compacted:
    report, answer = reply.report, answer_of(reply.report)
    blocks = node.npages // BLOCK_PAGES
    return Compacted(
        label=label,
        guests={s.consumer.name: s.pages_per_block * blocks for s in shares},
        pages=sum(s.pages_per_block for s in shares) * blocks,
        blocks=blocks,
        free_before=reply.free_2m_before,
        free_after=reply.free_2m_after,
        blocked=reply.blocked_2m,
        moved=report.moved, unmovable=report.unmovable, busy=report.busy, failed=report.failed,
        named=answer.named,
        checked_pages=0,
        mismatched_pages=0,
        vms={subject.vm: subject.consumer for subject in guests},
        arrived=_offsets(report, host_pb2.MOVE_OUTCOME_MOVED, node.first_pfn),
        stuck=_offsets(report, host_pb2.MOVE_OUTCOME_UNMOVABLE, node.first_pfn),
    )  # fmt: skip


def _offsets(
    report: host_pb2.MoveReport, outcome: host_pb2.MoveOutcome.ValueType, first_pfn: int
) -> Frames:
    """Return the frames, from the node's first, that pages with an outcome are on now."""
    moved = outcome == host_pb2.MOVE_OUTCOME_MOVED
    found = [
        np.arange(run.npages, dtype=np.int64) + (run.dst_pfn if moved else run.src_pfn) - first_pfn
        for run in report.runs
        if run.outcome == outcome
    ]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
