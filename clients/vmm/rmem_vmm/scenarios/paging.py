"""Page faults resolved by another process, as with userfaultfd; and what happens when it dies.

Owns one scenario. The guest's RAM is registered by the pager: its shared holes are filled from the
pager's file, its private ones are let go on. Then the pager stops answering and is killed while a
vCPU waits for it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from rmem_client import Client, vcpus
from rmem_client.constants import PAGE_BYTES

from .. import guest as guests
from .. import pattern
from ..channel import Child, Message
from ..guestvm import Guest
from ..host import Host
from ..machine import Range
from .report import Report, Settings

RAM_BYTES = 4 << 20
SHARED = Range(1 << 20, 64 * PAGE_BYTES)
PRIVATE = Range(0, 64 * PAGE_BYTES)
# never touched before the pager is killed
LATE = Range(2 << 20, 16 * PAGE_BYTES)


def external_pager(settings: Settings, consumers: tuple[str, ...]) -> Iterator[Report]:
    """A handler process fills what the guest misses, and is then killed."""
    for consumer in consumers:
        source = os.memfd_create("pages")
        os.ftruncate(source, RAM_BYTES)
        os.pwrite(source, pattern.words(settings.seed, SHARED.gpa, SHARED.size_bytes), SHARED.gpa)
        try:
            with Host(settings.socket_dir) as host, Client(settings.socket_dir) as operator:
                yield _paged(host, operator, consumer, source, settings.seed)
        finally:
            os.close(source)


def _paged(host: Host, operator: Client, consumer: str, source: int, seed: int) -> Report:
    report = Report(consumer)
    guest = host.create(consumer, memory_bytes=RAM_BYTES)
    host.launch(guest)
    cpu = host.start_cpu(guest)
    pager = host.start_child(f"pager of {guest.label}", "rmem_vmm.pager", {}, [source])
    if not guest.machine.in_place:
        host.run(cpu, [vcpus.share(SHARED.gpa, SHARED.size_bytes), vcpus.halt()])
    pager.tell({"do": "register", "file": guest.machine.file, "offset": 0, "length": RAM_BYTES})
    host.wait(pager, "registered")
    if not guest.machine.in_place:
        # in place it is the guest's own pages that become shared, and they are no holes
        _filled(host, guest, pager, seed, report)
    _continued(host, guest, pager, report)
    _killed(host, operator, guest, pager, report)
    return report


def _filled(host: Host, guest: Guest, pager: Child, seed: int, report: Report) -> None:
    """The guest finds in shared memory what nobody wrote there: the pager's bytes."""
    cpu = guest.cpus[0]
    done = host.run(cpu, [vcpus.check(SHARED.gpa, SHARED.size_bytes, seed=seed), vcpus.halt()])
    report.expect("shared pages from the pager, checked", done.checked_pages, SHARED.npages)
    told = _resolved(host, pager, SHARED.npages)
    report.expect("faults that it copied", dict(told), {"copied": SHARED.npages},
                  f"{told['copied']} pages")  # fmt: skip
    report.figures["pages copied"] = told["copied"]


def _continued(host: Host, guest: Guest, pager: Child, report: Report) -> None:
    done = host.run(guest.cpus[0], [
        *guests.take(guest.machine, PRIVATE), *guests.fill(guest.machine, PRIVATE, 3), vcpus.halt()
    ])  # fmt: skip
    report.expect("private pages, checked", done.checked_pages, PRIVATE.npages)
    told = _resolved(host, pager, PRIVATE.npages)
    report.expect("faults that it let go on", dict(told), {"continued": PRIVATE.npages},
                  f"{told['continued']} pages")  # fmt: skip
    report.figures["pages continued"] = told["continued"]


def _killed(host: Host, operator: Client, guest: Guest, pager: Child, report: Report) -> None:
    """The pager holds a fault and is killed: the guest gets its page from the daemon."""
    cpu = guest.cpus[0]
    pager.tell({"do": "hold"})
    host.wait(pager, "holding")
    host.order(cpu, [
        *guests.take(guest.machine, LATE), *guests.fill(guest.machine, LATE, 4), vcpus.halt(),
    ])  # fmt: skip
    held = host.wait(pager, "holds")
    graph = operator.host.wait_graph()
    waits = [edge for edge in graph.edges if edge.why == "page fault handler"]
    said = f"{waits[0].waiter} waits for {waits[0].holder}" if waits else "nobody waits"
    report.require("a fault that it holds", held["pages"] > 0 and bool(waits), said)
    host.kill(pager)
    done = host.finish(cpu)
    report.expect("killed: the guest's pages, checked", done.checked_pages, LATE.npages)


def _resolved(host: Host, pager: Child, npages: int) -> Counter[str]:
    """Wait until the pager has told of so many pages; return them by what it did."""
    told: Counter[str] = Counter()
    while told.total() < npages:
        said: Message = host.wait(pager, "resolved")
        told[said["how"]] += said["pages"]
    return told
