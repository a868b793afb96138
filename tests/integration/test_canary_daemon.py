"""The canary: bytes that guests write in private are found nowhere outside of the guests.

Two guests write 64 MiB each of a known pattern. It is looked for in the arena, the log at debug
level, every event, and every reply that a host can get. The search itself is shown to work on the
one page that a guest publishes.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from daemons import DEBUGGABLE, Daemon
from numpy.typing import NDArray

from rmem.v1 import types_pb2, vcpu_pb2
from rmem_client import Client, Event, Progress, RmemError, vcpus
from rmemd.engine.programme import Pattern, make_rows

PAGE = 4096
MIB = 1 << 20
PAGES = 64 * MIB // PAGE
FIRST = 0x1000
CALL_FRAMES = 256
FILTER_BITS = 24


class Needles:
    """What is searched for: 16 bytes at two places of every page of the pattern.

    Aligned data (frames, memory) is searched for all of them, by a filter on each 64-bit word and
    an exact comparison of what passes; text and messages for some, at any offset and as people
    and programs write bytes.
    """

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        words = rows.view(np.uint64)
        self.pairs = np.concatenate((words[:, 0:2], words[:, 256:258]))
        self.first = np.sort(self.pairs[:, 0])
        self._filter = np.zeros(1 << FILTER_BITS, dtype=np.bool_)
        self._filter[self.first & np.uint64((1 << FILTER_BITS) - 1)] = True
        some = self.pairs[:: self.pairs.shape[0] // 128]
        self.snippets = [pair.tobytes() for pair in some]

    def in_memory(self, data: bytes) -> int:
        """Count the snippets that 8-byte-aligned data has."""
        words = np.frombuffer(data, dtype=np.uint64, count=len(data) // 8)
        passed = self._filter[words & np.uint64((1 << FILTER_BITS) - 1)]
        candidates = words[passed]
        at = np.minimum(np.searchsorted(self.first, candidates), self.first.size - 1)
        return int((self.first[at] == candidates).sum())

    def in_text(self, data: bytes) -> list[str]:
        """Return which snippets some bytes have, in any spelling; 8 bytes are enough."""
        found = []
        for snippet in self.snippets:
            half = snippet[:8]
            number = int.from_bytes(half, "little")
            spelt = (
                half, half.hex().encode(), half.hex(" ").encode(), str(number).encode(),
                f"{number:x}".encode(), repr(half)[2:-1].encode(),
                base64.b64encode(snippet[:6]), ", ".join(map(str, half)).encode(),
                " ".join(map(str, half[:6])).encode(),
            )  # fmt: skip
            found += [snippet.hex() for one in spelt if one in data]
        return found


@dataclass(frozen=True)
class Guest:
    """A guest that has written the pattern of its seed into its private memory."""

    consumer: str
    vm: int
    file: int
    seed: int


def launch(client: Client, consumer: str, seed: int) -> Guest:
    """Make a guest, have it write 64 MiB, check them, and publish its first page."""
    vm = client.vms.create(consumer)
    size = (PAGES + 1) * PAGE
    file = client.files.create(vm, size)
    gpa, shared = FIRST * PAGE, (FIRST + PAGES) * PAGE
    client.vms.set_memory_region(vm, 0, gpa=gpa, size_bytes=size, file=file)
    client.vcpus.create(vm, 0)
    client.vms.finalize(vm)
    take = vcpus.accept if consumer.startswith("tdx") else vcpus.validate
    programme = [
        take(gpa, PAGES * PAGE),
        vcpus.write(gpa, PAGES * PAGE, seed=seed, private=True),
        vcpus.share(shared, PAGE),
        vcpus.copy(gpa, PAGE, to_gpa=shared, private=True),
        vcpus.halt(),
    ]
    client.vcpus.set_programme(vm, 0, programme)
    exited = client.vcpus.run(vm, 0)
    assert exited.exit_reason == vcpu_pb2.EXIT_REASON_HYPERCALL, exited
    client.vms.convert(vm, shared, PAGE, private=False)
    assert client.vcpus.run(vm, 0).exit_reason == vcpu_pb2.EXIT_REASON_HLT
    guest = Guest(consumer, vm, file, seed)
    check(client, guest)
    return guest


def check(client: Client, guest: Guest) -> None:
    """The guest itself reads what it wrote, every page of it."""
    programme = [
        vcpus.check(FIRST * PAGE, PAGES * PAGE, seed=guest.seed, private=True),
        vcpus.halt(),
    ]
    client.vcpus.set_programme(guest.vm, 0, programme)
    exited = client.vcpus.run(guest.vm, 0)
    assert exited.exit_reason == vcpu_pb2.EXIT_REASON_HLT, exited
    assert (exited.checked_pages, exited.mismatched_pages) == (PAGES, 0)


def arena(daemon: Daemon) -> Iterator[bytes]:
    """Yield the data of the daemon's arena, hole by hole skipped."""
    (number,) = [fd for fd, what in daemon.fds().items() if "memfd:rmemd-arena" in what]
    fd = os.open(f"/proc/{daemon.process.pid}/fd/{number}", os.O_RDONLY)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(fd, start, os.SEEK_HOLE)
            for piece in range(start, at, 64 * MIB):
                yield os.pread(fd, min(64 * MIB, at - piece), piece)
    finally:
        os.close(fd)


def physical(
    client: Client, nframes: int, level: types_pb2.AccessLevel.ValueType
) -> Iterator[bytes]:
    """Yield what the host gets of all frames; what it is refused, as the error's text."""
    for pfn in range(0, nframes, CALL_FRAMES):
        try:
            yield client.host.read_physical(pfn, CALL_FRAMES, level=level)
        except RmemError as error:
            if error.reason != "HOST_ACCESS_FAULT":
                raise
            yield str(error.as_dict()).encode()


@pytest.mark.timeout(180)
def test_the_pattern_is_found_nowhere(daemons: Callable[..., Daemon]) -> None:
    daemon = daemons("--host-memory", "512M", "--log-level", "debug", *DEBUGGABLE)
    client = daemon.client(deadline_s=120)
    begun = client.host.get().revision
    guests = [launch(client, "tdx-relocate", 11), launch(client, "snp-move", 22)]
    gfns = np.arange(FIRST, FIRST + PAGES, dtype=np.int64)
    needles = Needles(
        np.concatenate([make_rows(Pattern.WORDS, guest.seed, gfns) for guest in guests])
    )
    assert needles.pairs.shape == (4 * PAGES, 2)
    # the search finds what is there to be found: the page that each guest has published
    for guest in guests:
        published = client.files.read_shared(guest.file, PAGES * PAGE, PAGE)
        assert needles.in_memory(published) == 2
        plain = make_rows(Pattern.WORDS, guest.seed, gfns[:1]).tobytes()
        assert published == plain
    assert needles.in_text(b"x" + needles.snippets[5].hex().encode())
    assert needles.in_text(b"xyz" + needles.snippets[7] + b"z")

    # pages that have moved are elsewhere, in both places
    for guest in guests:
        moved = client.host.migrate(vm=guest.vm, gfns=[(FIRST, 512)]).report.moved
        assert moved == 512

    data = 0
    for piece in arena(daemon):
        data += len(piece)
        assert not needles.in_memory(piece)
        for snippet in needles.snippets[::16]:
            assert snippet not in piece, "not even unaligned"
    assert data >= 2 * PAGES * PAGE, "both guests' bytes are in the arena, as ciphertext"

    nframes = client.host.get().nframes
    published_frames = [client.host.page(file=g.file, pgoff=PAGES).pfn for g in guests]
    for level in (types_pb2.ACCESS_LEVEL_SOFTWARE, types_pb2.ACCESS_LEVEL_BUS):
        seen = 0
        for at, reply in enumerate(physical(client, nframes, level)):
            mine = [pfn for pfn in published_frames if pfn // CALL_FRAMES == at]
            faulted = len(reply) != CALL_FRAMES * PAGE
            assert needles.in_memory(reply) == (0 if faulted else 2 * len(mine))
            seen += len(reply)
        assert seen
        if level == types_pb2.ACCESS_LEVEL_BUS:
            assert seen == nframes * PAGE, "beneath the CPU's checks nothing faults"

    replies = bytearray()
    for run in client.host.frame_runs():
        replies += run.SerializeToString()
    for guest in guests:
        for gfn in range(FIRST, FIRST + PAGES, 1024):
            replies += client.host.page(vm=guest.vm, gfn=gfn).SerializeToString()
        replies += client.vms.get(guest.vm).SerializeToString()
        replies += client.files.get(guest.file).SerializeToString()
    assert not needles.in_text(bytes(replies))

    last, events = client.host.get().revision, bytearray()
    with client.watch(start_revision=begun) as watch:
        for item in watch:
            if isinstance(item, Event):
                events += f"{item.kind} {item.operation} {dict(item.fields)}\n".encode()
            if isinstance(item, Progress) and item.revision >= last:
                break
    assert b"folio_migrated" in events
    assert not needles.in_text(bytes(events))

    for guest in guests:
        check(client, guest)
    daemon.stop()
    log = daemon.log.encode()
    assert b"RunVcpu" in log, "the log is at debug level"
    assert not needles.in_text(log)
