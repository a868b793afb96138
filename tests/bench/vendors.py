"""A guest's memory faulted in, accepted, migrated and punched, per vendor, by a running daemon.

Owns what is done to a guest: each op in one call, and the same page by page through unary calls.
The latter is taken of a sample of the pages and told per page, as the former is; both are clients
of the same daemon, whose journal, metrics and hooks are on. What a vendor refuses is left out under
the name of its refusal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rmem_client import Client, RmemError
from rmem_client.instructions import accept, validate
from tests.bench.harness import ROUNDS, Figure, LeftOut, of, on_cpus, rmemd

PAGE = 4096
PAGES, QUICK_PAGES = 1 << 18, 1 << 12
SAMPLE, QUICK_SAMPLE = 256, 32
# one call of 1 GiB may encrypt it twice
DEADLINE_S = 120.0
RESTRICTED = 4
UNIT = "pages/s"
# how a guest says that it takes pages, by the plugin that its vendor is played by
ACCEPTS = {"tdx": accept, "snp": validate}


@dataclass(frozen=True)
class Guest:
    """A finalized VM with one slot of ``npages`` at address 0 and a vCPU.

    Attributes:
        platform: the plugin of its consumer.
    """

    client: Client
    platform: str
    vm: int
    file: int
    npages: int

    @classmethod
    def launch(cls, client: Client, consumer: str, platform: str, npages: int) -> Guest:
        """Make one whose pages are all private and not there yet."""
        vm = client.vms.create(consumer)
        file = client.files.create(vm, npages * PAGE)
        client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=npages * PAGE, file=file)
        client.vcpus.create(vm)
        if any(op.implemented for op in client.consumers.ops(vm).ops if op.name == "finalize"):
            client.vms.finalize(vm)
        return cls(client, platform, vm, file, npages)

    def end(self) -> None:
        """Give everything back."""
        self.client.vms.destroy(self.vm)
        self.client.files.close(self.file)

    def fault(self, page: int, n: int) -> None:
        """Map pages."""
        self.client.vms.prefault(self.vm, page * PAGE, n * PAGE)

    def accept(self, page: int, n: int) -> None:
        """Have the guest take pages: all that its programme says, or its next page."""
        self.client.vcpus.run(self.vm, max_instructions=1)

    def migrate(self, page: int, n: int) -> None:
        """Move pages to other frames."""
        report = self.client.host.migrate(vm=self.vm, gfns=[(page, n)]).report
        if report.moved != n:
            raise Refused(report.runs[0].refusal.reason or "a page did not move")

    def punch(self, page: int, n: int) -> None:
        """Take pages out of the file."""
        self.client.files.punch(self.file, page * PAGE, n * PAGE)

    def programme(self, extents: list[tuple[int, int]]) -> None:
        """Have the guest's next instructions accept pages."""
        said = [ACCEPTS[self.platform](page * PAGE, n * PAGE) for page, n in extents]
        self.client.vcpus.set_programme(self.vm, 0, said)


class Refused(Exception):
    """What a vendor will not have done, by the name of its refusal."""


OPS: dict[str, Callable[[Guest, int, int], None]] = {
    "fault": Guest.fault, "accept": Guest.accept, "migrate": Guest.migrate, "punch": Guest.punch,
}  # fmt: skip


def figures(folder: Path, quick: bool) -> Iterator[Figure | LeftOut]:
    """Yield a figure per vendor and op, without a bar: unary calls are as slow as gRPC is."""
    npages, sample = (QUICK_PAGES, QUICK_SAMPLE) if quick else (PAGES, SAMPLE)
    memory = f"{4 * npages * PAGE >> 20}M"
    with (
        on_cpus(2),
        rmemd(folder, "--host-memory", memory) as daemon,
        Client(daemon.socket_dir, deadline_s=DEADLINE_S) as client,
    ):
        for consumer in client.consumers.list().consumers:
            if not consumer.private_memory:
                yield LeftOut(consumer.name, "it has no private memory")
                continue
            launch = partial(Guest.launch, client, consumer.name, consumer.platform)
            yield from _vendor(consumer.name, launch, npages, sample, 2 if quick else ROUNDS)


def _vendor(
    name: str, launch: Callable[[int], Guest], npages: int, sample: int, rounds: int
) -> Iterator[Figure | LeftOut]:
    size = f"{npages * PAGE >> 20} MiB"
    rates: dict[str, list[tuple[float, float]]] = {}
    refused: dict[str, str] = {}
    for turn in range(rounds + 1):
        one_call = _rates(launch(npages), npages, npages, refused)
        by_page = _rates(launch(npages), sample, 1, refused)
        if turn:
            for op in one_call.keys() & by_page.keys():
                rates.setdefault(op, []).append((one_call[op], by_page[op]))
    for op in OPS:
        goal = f"{name}: {op} {size} in one call / page by page"
        if op in rates:
            yield of(goal, rates[op], unit=UNIT)
        elif op in refused:
            yield LeftOut(goal, refused[op])


def _rates(guest: Guest, npages: int, step: int, refused: dict[str, str]) -> dict[str, float]:
    """Do each op to the guest's first pages, ``step`` pages a call; return the pages a second."""
    rates = {}
    extents = [(page, step) for page in range(0, npages, step)]
    for name, op in OPS.items():
        if name == "accept":
            if guest.platform not in ACCEPTS:
                continue
            guest.programme(extents)
        begun = time.perf_counter()
        try:
            for page, n in extents:
                op(guest, page, n)
        except (RmemError, Refused) as refusal:
            refused[name] = refusal.reason if isinstance(refusal, RmemError) else str(refusal)
            continue
        rates[name] = npages / (time.perf_counter() - begun)
    guest.end()
    return rates
