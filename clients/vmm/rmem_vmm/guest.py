"""What the guests do: where each vCPU's memory lies, and the programme that it executes.

Owns the guest side. Each vCPU has a part of RAM to itself: a working set that it fills and checks,
a buffer that it asks to be shared, a window that it uses as shared without asking, and on vCPU 0
room to show the firmware. Which call takes private memory over is the vendor's, so it is a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rmem_client import vcpus
from rmem_client.constants import PAGE_BYTES
from rmem_client.vcpus import Instruction

from .machine import Machine, Range, firmware_is_private

# signals: values of the IO exit
PUBLISHED, ROUND = 1, 2
FOREVER = 1 << 40

BUFFER_PAGES = 16
WORK_PAGES = 256

# how a guest takes over private pages that it was given, by platform; others need nothing
ACCEPT: dict[str, Callable[[int, int], Instruction]] = {
    "tdx": vcpus.accept,
    "snp": vcpus.validate,
}


@dataclass(frozen=True)
class Layout:
    """One vCPU's part of memory.

    Attributes:
        work: what it fills with its pattern and checks, private where the VM has private memory.
        buffer: what it asks to be shared.
        window: what it uses as shared without asking.
        show: where vCPU 0 shows the firmware; empty on the others.
        seed: of its pattern.
    """

    work: Range
    buffer: Range
    window: Range
    show: Range
    seed: int


def layout(machine: Machine, index: int, seed: int, work_pages: int = WORK_PAGES) -> Layout:
    """Return where a vCPU's memory lies.

    Raises:
        ValueError: RAM is too small for that.
    """
    size = machine.memory_bytes // machine.vcpus // PAGE_BYTES
    part = Range(index * size * PAGE_BYTES, size * PAGE_BYTES)
    show = machine.firmware_bytes // PAGE_BYTES if index == 0 else 0
    fixed = 2 * BUFFER_PAGES + show
    work = min(work_pages, size - fixed)
    if work < 2 * BUFFER_PAGES:
        raise ValueError(
            f"{machine.memory_bytes >> 20} MiB for {machine.vcpus} vCPUs is too little memory: "
            f"vCPU {index} needs {fixed + 2 * BUFFER_PAGES} pages and has {size}"
        )
    return Layout(
        work=part.part(0, work),
        buffer=part.part(work, BUFFER_PAGES),
        window=part.part(work + BUFFER_PAGES, BUFFER_PAGES),
        show=part.part(work + 2 * BUFFER_PAGES, show),
        seed=seed * 1000 + index,
    )


def main_programme(machine: Machine, mine: Layout) -> list[Instruction]:
    """Return the programme up to the loop that only the VMM ends."""
    programme = [
        *take(machine, mine.work),
        *fill(machine, mine.work, mine.seed),
        *_publish(machine, mine),
        vcpus.signal(PUBLISHED),
        *_take_back(machine, mine),
    ]
    loop_start = len(programme)
    return [
        *programme,
        check(machine, mine.work, mine.seed),
        vcpus.signal(ROUND),
        vcpus.loop(loop_start, FOREVER),
    ]


def final_programme(machine: Machine, mine: Layout) -> list[Instruction]:
    """Return the last programme: check everything once more and halt."""
    checks = [check(machine, mine.work, mine.seed)]
    if machine.private_memory:
        checks.append(check(machine, mine.buffer, mine.seed))
    return [*checks, vcpus.halt()]


def published(machine: Machine, mine: Layout) -> list[tuple[Range, Range]]:
    """Return (where the VMM reads it, what it is a copy of) of what the guest has published."""
    source = mine.work.part(0, 2 * BUFFER_PAGES)
    if not machine.private_memory:
        return [(source, source)]
    return [
        (mine.buffer, mine.work.part(0, BUFFER_PAGES)),
        (mine.window, mine.work.part(BUFFER_PAGES, BUFFER_PAGES)),
    ]


def take(machine: Machine, where: Range) -> Iterator[Instruction]:
    """Take private pages over, where the vendor wants that."""
    if machine.private_memory and machine.platform in ACCEPT:
        yield ACCEPT[machine.platform](where.gpa, where.size_bytes)


def fill(machine: Machine, where: Range, seed: int) -> Iterator[Instruction]:
    """Write the pattern and check it."""
    yield vcpus.write(where.gpa, where.size_bytes, seed=seed, private=machine.private_memory)
    yield check(machine, where, seed)


def check(machine: Machine, where: Range, seed: int) -> Instruction:
    """Compare a range with its pattern."""
    return vcpus.check(where.gpa, where.size_bytes, seed=seed, private=machine.private_memory)


def _publish(machine: Machine, mine: Layout) -> Iterator[Instruction]:
    if not machine.private_memory:
        return
    yield vcpus.share(mine.buffer.gpa, mine.buffer.size_bytes)
    for target, source in published(machine, mine):
        yield _copy(source, target)
    if mine.show.npages and firmware_is_private(machine):
        yield vcpus.share(mine.show.gpa, mine.show.size_bytes)
        yield _copy(Range(machine.firmware_gpa, machine.firmware_bytes), mine.show)


def _copy(source: Range, target: Range) -> Instruction:
    return vcpus.copy(source.gpa, source.size_bytes, to_gpa=target.gpa, private=True)


def _take_back(machine: Machine, mine: Layout) -> Iterator[Instruction]:
    if machine.private_memory:
        yield vcpus.unshare(mine.buffer.gpa, mine.buffer.size_bytes)
        yield from take(machine, mine.buffer)
        yield from fill(machine, mine.buffer, mine.seed)
