"""Conversions in a storm: each map converts, by every vCPU at once; then a reserved pool instead.

Owns one scenario. Seconds are told and never judged.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from rmem_client import vcpus
from rmem_client.constants import PAGE_BYTES
from rmem_client.vcpus import Instruction

from .. import guest as guests
from ..bounce import CONTROL_BYTES, Traffic
from ..channel import Message
from ..guestvm import HIGH_GPA, GrantSpec, Guest
from ..host import Host
from ..machine import Range
from .report import Report, Settings

# a burst's map, as a disk's request is at most
MAP_BYTES = 256 * 1024
PART_BYTES = 1 << 20
POOL_SLOT, POOL = 5, Range(HIGH_GPA, CONTROL_BYTES + 4 * MAP_BYTES)


def conversion_storm(settings: Settings, consumers: tuple[str, ...]) -> Iterator[Report]:
    """Convert for every map, then bounce through a pool; the pool's end says its name."""
    for consumer in consumers:
        with Host(settings.socket_dir) as host:
            report = Report(consumer)
            memory = max(4 << 20, settings.vcpus * PART_BYTES)
            guest = host.create(consumer, memory_bytes=memory, vcpus=settings.vcpus)
            host.plug(guest, POOL_SLOT, POOL.gpa, POOL.size_bytes)
            host.launch(guest)
            for index in range(settings.vcpus):
                host.start_cpu(guest, index)
            _content(host, guest, report)
            _storm(host, guest, settings, report)
            _pool(host, guest, settings, report)
            yield report


def _content(host: Host, guest: Guest, report: Report) -> None:
    """What a page holds after the guest has shared it is the vendor's affair."""
    where = Range(0, MAP_BYTES)
    seen = host.attempt(guest.cpus[0], [
        *guests.take(guest.machine, where), *guests.fill(guest.machine, where, 1),
        vcpus.share(where.gpa, where.size_bytes),
        vcpus.check(where.gpa, where.size_bytes, seed=1),
        vcpus.unshare(where.gpa, where.size_bytes), vcpus.halt(),
    ])  # fmt: skip
    kept = where.npages - seen.mismatched_pages
    wanted = where.npages if guest.machine.platform == "pkvm" else 0
    report.expect("pages that kept their bytes when shared", kept, wanted,
                  f"{kept} of {where.npages}")  # fmt: skip


def _storm(host: Host, guest: Guest, settings: Settings, report: Report) -> None:
    """All vCPUs map, write, unmap: two conversions a time."""
    guest.conversions.clear()
    times = max(settings.conversions // 2, 1)
    begun = time.monotonic()
    for index, cpu in enumerate(guest.cpus):
        host.order(cpu, _maps(guest, index, times))
    done = [host.finish(cpu) for cpu in guest.cpus]
    seconds = time.monotonic() - begun
    checked = sum(outcome.checked_pages for outcome in done)
    exits = sum(outcome.exits.get("HYPERCALL", 0) for outcome in done)
    each = len(guest.cpus) * times
    pages = MAP_BYTES // PAGE_BYTES
    report.expect("pages checked in both states", checked, 2 * each * pages)
    asked = dict(sorted(guest.conversions.items()))
    if exits:
        report.expect("hypercalls, answered by converting", asked,
                      {"to private": each, "to shared": each},
                      f"{exits} by {len(guest.cpus)} vCPUs")  # fmt: skip
    else:
        # the hypervisor converts, and its VMM hears nothing of it
        report.expect("hypercalls that left the hypervisor", asked, {}, "none")
    report.figures["conversions"] = 2 * each
    report.figures["conversions/s"] = round(2 * each / seconds)


def _maps(guest: Guest, index: int, times: int) -> list[Instruction]:
    where = Range(index * PART_BYTES, MAP_BYTES)
    seed = 100 + index
    once = [
        vcpus.share(where.gpa, where.size_bytes),
        vcpus.write(where.gpa, where.size_bytes, seed=seed),
        vcpus.check(where.gpa, where.size_bytes, seed=seed),
        vcpus.unshare(where.gpa, where.size_bytes),
        *guests.take(guest.machine, where),
        *guests.fill(guest.machine, where, seed + 50),
    ]
    before = list(guests.take(guest.machine, where))
    return [*before, *once, vcpus.loop(len(before), times - 1), vcpus.halt()]


def _pool(host: Host, guest: Guest, settings: Settings, report: Report) -> None:
    """The same maps through a reserved pool: no conversion, until it is full."""
    cpu = guest.cpus[0]
    host.run(cpu, [vcpus.share(POOL.gpa, POOL.size_bytes), vcpus.halt()])
    guest.conversions.clear()
    device = host.start_device(guest, "checker", POOL.gpa, [GrantSpec(POOL, mapped=True)])
    done = host.do(cpu, _bursts(guest, settings, batch=4))
    report.expect("pages through the pool, checked", done["checked_pages"],
                  8 * 4 * MAP_BYTES // PAGE_BYTES)  # fmt: skip
    report.expect("conversions for them", sum(guest.conversions.values()), 0)
    report.figures["pool, most slots taken"] = f"{done['high_water_slots']} of {done['pool_slots']}"
    refused = host.do(cpu, _bursts(guest, settings, batch=5))
    said = refused.get("refused", "nothing was refused")
    report.require("one map more than fits", said.startswith("swiotlb pool is full"), said)
    device.child.tell({"do": "figures"})
    figures = host.wait(device.child, "figures")
    report.expect("pages that the device found wrong", figures["wrong_pages"], 0)
    report.figures["requests"] = figures["requests"]


def _bursts(guest: Guest, settings: Settings, batch: int) -> Message:
    return Traffic(
        platform=guest.machine.platform, private=(2 << 20, 5 * MAP_BYTES),
        shared=(POOL.gpa, POOL.size_bytes), buffer_bytes=MAP_BYTES, batch=batch, rounds=8,
        seed=settings.seed,
    ).order()  # fmt: skip
