"""Devices in processes of their own: what their pins hold up, and what they cannot reach.

Owns two scenarios: a conversion that a device's pin delays, and a vhost-user-like disk that sees
shared memory alone. Both go on until the range is the guest's again and the device is out of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from rmem_client import RmemError, vcpus
from rmem_client.constants import PAGE_BYTES

from .. import driver, pattern
from .. import guest as guests
from ..channel import Message
from ..cpu import Outcome
from ..guestvm import HIGH_GPA, Device, GrantSpec, Guest
from ..host import QUEUE_ENTRIES, Host
from ..machine import Range
from ..ring import Buffer, Layout
from ..virtio import (
    BLK_HEADER,
    BLK_IN,
    BLK_OK,
    BLK_OUT,
    CHECK_HEADER,
    CHECK_OK,
    CHECK_RECEIVE,
    CHECK_STATUS,
    SECTOR_BYTES,
)
from .report import Report, Settings

RAM_BYTES = 4 << 20
EAGAIN = 11
# what the guest is answered while the host pins the page: pKVM's hypervisor says nothing more
STILL_HELD = {"pkvm": (-3, "SMCCC_RET_INVALID_PARAMETER")}
# in RAM, beside private memory: the queue, requests' headers and statuses, receive buffers
QUEUE = Range(1 << 20, 16 * PAGE_BYTES)
HEADER, STATUS = QUEUE.gpa + 8 * PAGE_BYTES, QUEUE.gpa + 9 * PAGE_BYTES
RECEIVE = Range(2 << 20, 8 * PAGE_BYTES)
PRIVATE = Range(0, 64 * PAGE_BYTES)
# a disk's memory is a slot of its own, which a device may map
DISK_SLOT, DISK_POOL = 5, Range(HIGH_GPA, 1 << 20)
DISK_BYTES = 1 << 20


def dma_pin_blocks_conversion(settings: Settings, consumers: tuple[str, ...]) -> Iterator[Report]:
    """A pins a shared page; the guest converts it; A lets go."""
    for consumer in consumers:
        with Host(settings.socket_dir) as host:
            report = Report(consumer)
            guest = host.create(consumer, memory_bytes=RAM_BYTES)
            host.launch(guest)
            cpu = host.start_cpu(guest)
            host.run(cpu, [
                vcpus.share(QUEUE.gpa, QUEUE.size_bytes),
                vcpus.share(RECEIVE.gpa, RECEIVE.size_bytes), vcpus.halt(),
            ])  # fmt: skip
            grants = [GrantSpec(QUEUE), GrantSpec(RECEIVE)]
            device = host.start_device(guest, "checker", QUEUE.gpa, grants)
            post(host, guest, device, report)
            _refused(host, guest, device, report)
            _let_go(host, guest, device, report, settings.seed)
            _converted(host, guest, device, report)
            yield report


def post(host: Host, guest: Guest, device: Device, report: Report) -> None:
    """Post a receive buffer: the device holds it from now until something comes in."""
    header = CHECK_HEADER.pack(CHECK_RECEIVE, RECEIVE.npages, RECEIVE.gpa, 0, 0)
    buffers = [
        Buffer(HEADER, CHECK_HEADER.size),
        Buffer(RECEIVE.gpa, RECEIVE.size_bytes, writable=True),
        Buffer(STATUS, CHECK_STATUS.size, writable=True),
    ]
    stores = [(HEADER, header), (STATUS, b"\xff" * CHECK_STATUS.size)]
    host.do(guest.cpus[0], driver.request(QUEUE.gpa, buffers, stores=stores, wait=False))
    host.wait(device.child, "keeps")
    offset = guest.slot_at(RECEIVE.gpa).offset_of(RECEIVE.gpa)
    pins = host.client.files.pins(guest.machine.file).pins
    held = [pin for pin in pins if pin.offset_bytes == offset]
    said = f"{held[0].holder}, {held[0].purpose}" if held else ""
    report.expect("pins of the receive buffer", len(held), 1, said)


def _refused(host: Host, guest: Guest, device: Device, report: Report) -> None:
    asked = host.run(guest.cpus[0], [vcpus.unshare(RECEIVE.gpa, RECEIVE.size_bytes), vcpus.halt()])
    wanted, name = STILL_HELD.get(guest.machine.platform, (-EAGAIN, "EAGAIN"))
    report.expect("the guest asks for it as private", asked.call_status, wanted, name)
    try:
        host.revoke(guest, RECEIVE)
        named = []
    except RmemError as refusal:
        named = refusal.holders
    by_device = [h for h in named if h.name.startswith(f"session {device.child.session} ")]
    said = " and ".join(map(str, named)) or "nobody named"
    report.require("who holds it, as the VMM is told", bool(by_device), said)
    where = offset_message(guest, RECEIVE)
    device.child.tell({"do": "reach", **where})
    reached = host.wait(device.child, "reached")
    report.expect("the device still reaches it", reached["mapped"], "reached")


def _let_go(host: Host, guest: Guest, device: Device, report: Report, seed: int) -> None:
    """Something comes in: the buffer is filled and given back, and the pin with it."""
    packet = pattern.words(seed, RECEIVE.gpa, RECEIVE.size_bytes)
    device.child.tell({"do": "deliver", "data": packet.hex()})
    host.wait(device.child, "released")
    back = host.do(guest.cpus[0], driver.collect(QUEUE.gpa, [(STATUS, CHECK_STATUS.size)]))
    status, _ = CHECK_STATUS.unpack(bytes.fromhex(back["loaded"][0]))
    report.expect("the device delivers and lets go", status, CHECK_OK, "received")
    got = host.run(
        guest.cpus[0], [vcpus.check(RECEIVE.gpa, RECEIVE.size_bytes, seed=seed), vcpus.halt()]
    )
    report.expect("pages received, checked", got.checked_pages, RECEIVE.npages)


def _converted(host: Host, guest: Guest, device: Device, report: Report) -> None:
    cpu = guest.cpus[0]
    again = unshare(host, guest, RECEIVE)
    report.expect("the guest asks again", again.call_status, 0, "success")
    revoked = host.wait(device.child, "revoked")
    report.expect("the device is told", revoked["ranges"], [[RECEIVE.gpa, RECEIVE.size_bytes]],
                  "revoked")  # fmt: skip
    device.child.tell({"do": "reach", **offset_message(guest, RECEIVE)})
    reached = host.wait(device.child, "reached")
    report.require("the device tries all the same", refused(reached), text_of(reached))
    taken = [*guests.take(guest.machine, RECEIVE), *guests.fill(guest.machine, RECEIVE, 9)]
    used = host.run(cpu, [*taken, vcpus.halt()])
    report.expect("private pages, checked", used.checked_pages, RECEIVE.npages)
    report.figures["conversions refused"] = guest.retries
    report.figures["conversions done"] = sum(guest.conversions.values())


def offset_message(guest: Guest, where: Range) -> Message:
    """Return a guest range with the file range behind it, for an order."""
    slot = guest.slot_at(where.gpa)
    return {
        "gpa": where.gpa, "size_bytes": where.size_bytes, "file": slot.file,
        "offset": slot.offset_of(where.gpa),
    }  # fmt: skip


def unshare(host: Host, guest: Guest, where: Range) -> Outcome:
    """Have the guest make a range private, and the devices lose it.

    Where the hypervisor converts without asking the VMM (pKVM), the host is out of the range at
    once; the VMM takes the grants back when it hears of it.
    """
    done = host.run(guest.cpus[0], [vcpus.unshare(where.gpa, where.size_bytes), vcpus.halt()])
    if "HYPERCALL" not in done.exits and not done.call_status:
        host.revoke(guest, where)
    return done


def refused(reached: Message) -> bool:
    """Return whether a device got at a range in no way."""
    return "reached" not in (reached["mapped"], reached["read"], reached["pinned"])


def text_of(reached: Message) -> str:
    """Return what the daemon answered a device."""
    return f"read: {reached['read']}; pin: {reached['pinned']}"


def vhost_user_shared_only(settings: Settings, consumers: tuple[str, ...]) -> Iterator[Report]:
    """A disk maps the guest's bounce buffers, and is offered more than that."""
    for consumer in consumers:
        disk = os.memfd_create("disk")
        os.ftruncate(disk, DISK_BYTES)
        try:
            with Host(settings.socket_dir) as host:
                yield _disk(host, consumer, disk, settings.seed)
        finally:
            os.close(disk)


def _disk(host: Host, consumer: str, disk: int, seed: int) -> Report:
    report = Report(consumer)
    guest = host.create(consumer, memory_bytes=RAM_BYTES)
    host.plug(guest, DISK_SLOT, DISK_POOL.gpa, DISK_POOL.size_bytes)
    host.launch(guest)
    cpu = host.start_cpu(guest)
    host.run(cpu, [
        *guests.take(guest.machine, PRIVATE), *guests.fill(guest.machine, PRIVATE, seed),
        vcpus.share(DISK_POOL.gpa, DISK_POOL.size_bytes), vcpus.halt(),
    ])  # fmt: skip
    device = host.start_device(
        guest, "block", DISK_POOL.gpa, [GrantSpec(DISK_POOL, mapped=True)], disk=disk
    )
    _write_and_read(host, guest, disk, seed, report)
    _offer_private(host, guest, device, report)
    _take_ring_back(host, guest, device, report)
    return report


BOUNCE = Range(DISK_POOL.gpa + 64 * PAGE_BYTES, PRIVATE.size_bytes)
DISK_HEADER, DISK_STATUS = DISK_POOL.gpa + 16 * PAGE_BYTES, DISK_POOL.gpa + 17 * PAGE_BYTES


def disk_request(kind: int, sector: int, data: Buffer) -> Message:
    """Return the order for a virtio-blk request."""
    return driver.request(
        DISK_POOL.gpa,
        [Buffer(DISK_HEADER, BLK_HEADER.size), data, Buffer(DISK_STATUS, 1, writable=True)],
        stores=[(DISK_HEADER, BLK_HEADER.pack(kind, 0, sector)), (DISK_STATUS, b"\xff")],
        loads=[(DISK_STATUS, 1)],
    )


def _write_and_read(host: Host, guest: Guest, disk: int, seed: int, report: Report) -> None:
    cpu, size = guest.cpus[0], PRIVATE.size_bytes
    host.run(cpu, [vcpus.copy(PRIVATE.gpa, size, to_gpa=BOUNCE.gpa, private=True), vcpus.halt()])
    written = host.do(cpu, disk_request(BLK_OUT, 8, Buffer(BOUNCE.gpa, size)))
    report.expect("write 64 pages to the disk", written["loaded"], [bytes([BLK_OK]).hex()], "OK")
    on_disk = os.pread(disk, size, 8 * SECTOR_BYTES)
    wrong = pattern.differing_pages(on_disk, pattern.words(seed, PRIVATE.gpa, size))
    report.expect("the disk's file, pages wrong", wrong, 0)
    host.run(cpu, [
        vcpus.write(BOUNCE.gpa, size, byte=0),
        vcpus.write(PRIVATE.gpa, size, byte=0, private=True), vcpus.halt(),
    ])  # fmt: skip
    read = host.do(cpu, disk_request(BLK_IN, 8, Buffer(BOUNCE.gpa, size, writable=True)))
    report.expect("read them back", read["loaded"], [bytes([BLK_OK]).hex()], "OK")
    checked = host.run(cpu, [
        vcpus.copy(BOUNCE.gpa, size, to_gpa=PRIVATE.gpa, private=False),
        guests.check(guest.machine, PRIVATE, seed), vcpus.halt(),
    ])  # fmt: skip
    report.expect("private pages, checked", checked.checked_pages, PRIVATE.npages)


def _offer_private(host: Host, guest: Guest, device: Device, report: Report) -> None:
    """A driver's bug, or a host's wish: a descriptor that names private memory."""
    cpu = guest.cpus[0]
    bad = host.do(cpu, disk_request(BLK_OUT, 0, Buffer(PRIVATE.gpa, PAGE_BYTES)))
    report.expect("a descriptor of private memory", bad["written"], 0, "refused, used length 0")
    why = host.wait(device.child, "refused")
    report.require("… why", "not in the memory" in why["text"], why["text"])
    good = host.do(cpu, disk_request(BLK_OUT, 0, Buffer(BOUNCE.gpa, PAGE_BYTES)))
    report.expect("the next request", good["loaded"], [bytes([BLK_OK]).hex()], "OK")
    device.child.tell({"do": "reach", **offset_message(guest, PRIVATE)})
    reached = host.wait(device.child, "reached")
    report.require("the device asks the daemon for it", refused(reached), text_of(reached))
    device.child.tell({"do": "figures"})
    figures = host.wait(device.child, "figures")
    report.figures["requests"] = figures["requests"]
    report.figures["illegal touches"] = figures["refused"]
    report.figures["pins"] = figures["pins"]


def _take_ring_back(host: Host, guest: Guest, device: Device, report: Report) -> None:
    """The guest makes the ring's memory private: the device loses it and stops."""
    npages = -(-Layout.at(0, QUEUE_ENTRIES).size_bytes // PAGE_BYTES)
    ring = DISK_POOL.part(0, npages)
    done = unshare(host, guest, ring)
    report.expect("the ring becomes private", done.call_status, 0, "success")
    revoked = host.wait(device.child, "revoked")
    report.expect("the device is told", revoked["ranges"], [[ring.gpa, ring.size_bytes]], "revoked")
    report.expect("… and stops using the queue", revoked["queue"], False, "stopped")
