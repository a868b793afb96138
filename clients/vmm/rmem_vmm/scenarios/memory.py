"""Memory given back and taken again: ballooning, and slots that come and go under a guest.

Owns two scenarios. What they count is the daemon's accounting, before and after each step.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from rmem.v1 import host_pb2
from rmem_client import RmemError, vcpus
from rmem_client.constants import PAGE_BYTES
from rmem_client.vcpus import Instruction

from .. import guest as guests
from ..channel import Child
from ..cpu import TO_VMM, Outcome
from ..guestvm import HIGH_GPA, Guest
from ..host import Host
from ..machine import Range
from .report import Report, Settings

RAM_BYTES = 8 << 20
RESIDENT = Range(0, 256 * PAGE_BYTES)
BALLOON = Range(256 * PAGE_BYTES, 512 * PAGE_BYTES)
LAZY = Range(1024 * PAGE_BYTES, 64 * PAGE_BYTES)
# the guest's signal that one round of its work is done
ROUND = TO_VMM + 64
FOREVER = 1 << 40
HOT_SLOT, HOT_BYTES = 5, 2 << 20
# pKVM neither moves nor deletes a slot of a guest that has run (pkvm.md §4)
NO_SLOT = "exit MEMORY_FAULT"
VETO = ("pkvm", "PKVM_MEMSLOT")


def fill(guest: Guest, where: Range, seed: int) -> list[Instruction]:
    """Take memory over, write a pattern and check it."""
    return [*guests.take(guest.machine, where), *guests.fill(guest.machine, where, seed)]


def balloon(settings: Settings, consumers: tuple[str, ...]) -> Iterator[Report]:
    """Punch, give back, fault again; then a VMM that forgets to punch, and is found out."""
    for consumer in consumers:
        with Host(settings.socket_dir) as host:
            report = Report(consumer)
            guest = host.create(consumer, memory_bytes=RAM_BYTES)
            host.launch(guest)
            cpu = host.start_cpu(guest)
            host.run(cpu, [*fill(guest, RESIDENT, 1), *fill(guest, BALLOON, 2), vcpus.halt()])
            _inflate(host, guest, report)
            _deflate(host, guest, report)
            _forget_to_punch(host, guest, report)
            _fill_a_hole(host, guest, report)
            yield report


def _inflate(host: Host, guest: Guest, report: Report) -> None:
    cpu, subject = guest.cpus[0], guest.machine
    before, free = _private(host, guest), host.client.host.get().free_pages
    if subject.platform == "pkvm":
        # a protected guest gives pages up itself; the host could not take them
        host.run(cpu, [vcpus.relinquish(BALLOON.gpa, BALLOON.size_bytes), vcpus.halt()])
    host.client.files.punch(subject.file, BALLOON.gpa, BALLOON.size_bytes)
    after = _private(host, guest)
    report.expect("private pages before", before, RESIDENT.npages + BALLOON.npages)
    report.expect("… after the balloon has them", after, RESIDENT.npages)
    freed = host.client.host.get().free_pages - free
    report.expect("frames free again", freed, BALLOON.npages)
    kept = host.run(cpu, [guests.check(subject, RESIDENT, 1), vcpus.halt()])
    report.expect("pages left alone, checked", kept.checked_pages, RESIDENT.npages)
    report.figures["ballooned pages"] = BALLOON.npages


def _deflate(host: Host, guest: Guest, report: Report) -> None:
    """Give the memory back: what the guest faults in again must not be what was there."""
    cpu, subject = guest.cpus[0], guest.machine
    stale = guests.check(subject, BALLOON, 2)
    seen = host.attempt(cpu, [*guests.take(subject, BALLOON), stale, vcpus.halt()])
    report.expect(
        "old pages seen again", seen.checked_pages - seen.mismatched_pages, 0,
        f"0 of {seen.checked_pages}" if not seen.lost else seen.lost,
    )  # fmt: skip
    done = host.run(cpu, [*guests.fill(subject, BALLOON, 3), vcpus.halt()])
    report.expect("pages written anew, checked", done.checked_pages, BALLOON.npages)
    report.expect(
        "private pages, deflated", _private(host, guest), RESIDENT.npages + BALLOON.npages
    )


def _forget_to_punch(host: Host, guest: Guest, report: Report) -> None:
    """Convert to shared, and leave the private half where it is: both are there, and found."""
    cpu, subject, client = guest.cpus[0], guest.machine, host.client
    guest.punches = False
    host.run(cpu, [
        *fill(guest, LAZY, 4), vcpus.share(LAZY.gpa, LAZY.size_bytes),
        vcpus.write(LAZY.gpa, LAZY.size_bytes, seed=5), vcpus.halt(),
    ])  # fmt: skip
    wanted = 0 if subject.in_place else LAZY.npages
    said = "0: one frame for either state" if subject.in_place else ""
    report.expect("both halves, not punched", _account(host, guest).double_pages, wanted, said)
    if not subject.in_place:
        client.files.punch(subject.file, LAZY.gpa, LAZY.size_bytes)
        report.expect("both halves, punched", _account(host, guest).double_pages, 0)


def _fill_a_hole(host: Host, guest: Guest, report: Report) -> None:
    """Write to a hole of the shared half through the VMM's own mapping: no event, but found."""
    file = guest.machine.file
    spare = LAZY.part(LAZY.npages, 16)
    if guest.machine.in_place:
        host.run(guest.cpus[0], [vcpus.share(spare.gpa, spare.size_bytes), vcpus.halt()])
    before = _account(host, guest).found_pages
    with host.session.shared_memory(file, spare.gpa, spare.size_bytes) as shared:
        shared.view[:] = b"\x5a" * spare.size_bytes
    found = _account(host, guest).found_pages - before
    # in place, the guest's own page is what becomes shared, and there is no hole to fill
    wanted = 0 if guest.machine.in_place else spare.npages
    said = "0: no hole" if guest.machine.in_place else ""
    report.expect("filled through a mapping, found", found, wanted, said)
    with host.session.shared_memory(file) as shared, mmap.mmap(shared.fd, 0) as whole:
        whole.madvise(mmap.MADV_REMOVE, spare.gpa, spare.size_bytes)
    left = _account(host, guest).found_pages - before
    report.expect("… given back by MADV_REMOVE", left, 0)


def _account(host: Host, guest: Guest) -> host_pb2.FileAccount:
    files = host.client.host.accounting(guest.machine.vm).files
    return next(account for account in files if account.file == guest.machine.file)


def _private(host: Host, guest: Guest) -> int:
    return host.client.files.get(guest.machine.file).private_pages


def slot_hotplug(settings: Settings, consumers: tuple[str, ...]) -> Iterator[Report]:
    """Add a slot with a file while a vCPU works, use it from another, and take it away again."""
    for consumer in consumers:
        with Host(settings.socket_dir) as host:
            yield _hotplug(host, consumer)


def _hotplug(host: Host, consumer: str) -> Report:
    report = Report(consumer)
    guest = host.create(consumer, memory_bytes=RAM_BYTES, vcpus=2)
    host.launch(guest)
    worker, user = host.start_cpu(guest, 0), host.start_cpu(guest, 1)
    rounds: list[int] = []
    guest.on_signal = rounds.append

    def await_round() -> None:
        before = len(rounds)
        host.wait_until(lambda: len(rounds) > before)

    host.order(worker, _work(guest))
    await_round()
    free = host.client.host.get().free_pages
    _plug(host, guest, user, report)
    await_round()
    _unplug(host, guest, user, report, free)
    await_round()
    guest.stop = True
    done = host.finish(worker)
    report.expect(
        "the other vCPU's pages", done.checked_pages % RESIDENT.npages, 0,
        f"{done.checked_pages} checked in {len(rounds)} rounds, 0 wrong",
    )  # fmt: skip
    report.figures["rounds meanwhile"] = len(rounds)
    return report


def _work(guest: Guest) -> list[Instruction]:
    filled = fill(guest, RESIDENT, 1)
    loop = [guests.check(guest.machine, RESIDENT, 1), vcpus.signal(ROUND)]
    return [*filled, *loop, vcpus.loop(len(filled), FOREVER)]


def _plug(host: Host, guest: Guest, user: Child, report: Report) -> None:
    """Touch the range before there is a slot, and after."""
    where = Range(HIGH_GPA, HOT_BYTES)
    absent = host.attempt(user, [vcpus.touch(where.gpa, PAGE_BYTES, private=True), vcpus.halt()])
    report.require("touched before it is there", absent.lost.startswith(NO_SLOT), _exit(absent))
    host.plug(guest, HOT_SLOT, where.gpa, where.size_bytes)
    used = host.run(user, [*fill(guest, where, 7), vcpus.halt()])
    report.expect("pages of the new slot, checked", used.checked_pages, where.npages)


def _exit(outcome: Outcome) -> str:
    return outcome.lost.partition(" at ")[0] or "no exit"


def _unplug(host: Host, guest: Guest, user: Child, report: Report, free: int) -> None:
    where = Range(HIGH_GPA, HOT_BYTES)
    try:
        freed = host.unplug(guest, guest.slots[HOT_SLOT])
    except RmemError as refusal:
        vendor = guest.machine.platform
        report.expect("the slot is taken away", (vendor, refusal.reason), VETO, refusal.reason)
        return
    report.expect("the slot is taken away", guest.machine.platform != VETO[0], True, "yes")
    report.expect("pages freed with it", freed, where.npages)
    report.expect("frames free, as before", host.client.host.get().free_pages, free)
    gone = host.attempt(user, [guests.check(guest.machine, where, 7), vcpus.halt()])
    report.require("touched when it is gone", gone.lost.startswith(NO_SLOT), _exit(gone))
    host.plug(guest, HOT_SLOT, where.gpa, where.size_bytes)
    seen = host.attempt(user, [
        *guests.take(guest.machine, where), guests.check(guest.machine, where, 7), vcpus.halt(),
    ])  # fmt: skip
    stale = seen.checked_pages - seen.mismatched_pages
    report.expect("plugged again: old pages seen", stale, 0, f"0 of {seen.checked_pages}")
    host.unplug(guest, guest.slots[HOT_SLOT])
