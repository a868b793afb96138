"""A split virtqueue (virtio 1.x, 2.7): descriptor table, available ring and used ring.

Owns the layout and both sides. The driver writes through whatever stores the guest's bytes; the
device sees shared memory, which is untrusted input: every index, address, length and chain is
copied once, then judged, then used, so that no guest makes it crash, loop or leave its regions.

Order: the driver stores descriptors before the index that offers them, the device loads the index
first; used entries likewise. Python neither reorders accesses nor has barriers, so an uncontended
lock, which is one, stands at these places. Indexes are loaded and stored as whole 16-bit words.
"""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

DESC_BYTES, AVAIL_HEAD_BYTES, USED_HEAD_BYTES, USED_BYTES = 16, 4, 4, 8
# the words after each ring, of VIRTIO_F_EVENT_IDX: laid out, not used
EVENT_BYTES = 2
F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
SIZE_MAX = 32768
INDEX_BITS = 0xFFFF

DESC = struct.Struct("<QIHH")
AVAIL_ENTRY = struct.Struct("<H")
USED_ENTRY = struct.Struct("<II")

_BARRIER = threading.Lock()


def barrier() -> None:
    """Order what was stored or loaded before with what comes after."""
    with _BARRIER:
        return


class BadAddress(Exception):
    """A range outside the memory that one was given."""


class BadChain(Exception):
    """A chain of descriptors that a device must not follow; it is given back unused.

    Attributes:
        head: the chain's first descriptor.
    """

    def __init__(self, head: int, why: str) -> None:
        super().__init__(f"chain {head}: {why}")
        self.head = head


class RingBroken(Exception):
    """The available ring makes no sense: the device stops using it until it is reset."""


class RingFull(Exception):
    """The driver has no descriptors left."""


class Memory(Protocol):
    """Where a driver's bytes go: a guest's memory, or a mapping of it."""

    def load(self, address: int, size: int) -> bytes:
        """Return bytes."""
        ...

    def store(self, address: int, data: bytes) -> None:
        """Store bytes; one call of two bytes at an even address is one store."""
        ...


class View:
    """Memory that is mapped here (``Memory``, from address 0).

    Args:
        view: its bytes.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._words = view.cast("H")

    def load(self, address: int, size: int) -> bytes:
        """Return a copy of a range."""
        if size == 2 and not address % 2:
            return int.to_bytes(self._words[address // 2], 2, sys.byteorder)
        return bytes(self._view[address : address + size])

    def store(self, address: int, data: bytes) -> None:
        """Store bytes; two at an even address in one store."""
        if len(data) == 2 and not address % 2:
            self._words[address // 2] = int.from_bytes(data, sys.byteorder)
        else:
            self._view[address : address + len(data)] = data


@dataclass(frozen=True)
class Region:
    """A stretch of guest memory that this process was given.

    Attributes:
        address: guest physical address of its first byte.
        size: how many bytes.
        memory: what reaches them.
        base: the address of the first of them in that.
        read_only: whether it may be read only.
    """

    address: int
    size: int
    memory: Memory
    base: int = 0
    read_only: bool = False

    @property
    def end(self) -> int:
        """Return the address behind it."""
        return self.address + self.size

    def part(self, lo: int, hi: int) -> Region:
        """Return the part between two guest addresses."""
        base = self.base + lo - self.address
        return Region(lo, hi - lo, self.memory, base, self.read_only)


class Regions:
    """The shared memory that a process was given, by guest physical address (``Memory``)."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self._regions = tuple(regions)

    def require(self, address: int, size: int, *, write: bool = False) -> Region:
        """Return the region that a range lies in.

        Raises:
            BadAddress: none has all of it, or it may not be written.
        """
        for region in self._regions:
            if region.address <= address and address + size <= region.end:
                if write and region.read_only:
                    raise BadAddress(f"{address:#x}+{size:#x} is read-only")
                return region
        raise BadAddress(f"{address:#x}+{size:#x} is not in the memory that was given")

    def load(self, address: int, size: int) -> bytes:
        """Return a copy of a range.

        Raises:
            BadAddress: it is not in this memory.
        """
        region = self.require(address, size)
        return region.memory.load(region.base + address - region.address, size)

    def store(self, address: int, data: bytes) -> None:
        """Store bytes.

        Raises:
            BadAddress: they do not go in this memory.
        """
        region = self.require(address, len(data), write=True)
        region.memory.store(region.base + address - region.address, data)

    def without(self, address: int, size: int) -> Regions:
        """Return what is left of it once a range is taken back."""
        end = address + size
        left: list[Region] = []
        for region in self._regions:
            if end <= region.address or region.end <= address:
                left.append(region)
                continue
            around = ((region.address, address), (end, region.end))
            left += [region.part(lo, hi) for lo, hi in around if lo < hi]
        return Regions(left)


@dataclass(frozen=True)
class Layout:
    """Where a queue lies: guest physical addresses of its three parts."""

    size: int
    descriptors: int
    available: int
    used: int

    @classmethod
    def at(cls, address: int, size: int) -> Layout:
        """Return a queue of ``size`` entries laid out from an address on.

        Raises:
            ValueError: the size is no power of two up to 32768, or the address not aligned by 16.
        """
        if not 0 < size <= SIZE_MAX or size & (size - 1) or address % DESC_BYTES:
            raise ValueError(f"no queue of {size} entries at {address:#x}")
        available = address + size * DESC_BYTES
        behind = available + AVAIL_HEAD_BYTES + size * AVAIL_ENTRY.size + EVENT_BYTES
        return cls(size, address, available, (behind + 3) & ~3)

    @property
    def size_bytes(self) -> int:
        """Return how many bytes it takes from ``descriptors`` on."""
        return self.used + USED_HEAD_BYTES + self.size * USED_BYTES + EVENT_BYTES - self.descriptors


@dataclass(frozen=True)
class Buffer:
    """A stretch of guest memory in a chain; ``writable`` by the device."""

    address: int
    size: int
    writable: bool = False


@dataclass(frozen=True)
class Used:
    """A chain that the device has given back: its head, and how many bytes it wrote."""

    head: int
    written: int


class DriverQueue:
    """The driver's side: it offers chains and collects them.

    Args:
        memory: where the queue's bytes are stored.
        layout: where the queue lies.
    """

    def __init__(self, memory: Memory, layout: Layout) -> None:
        self._memory = memory
        self._layout = layout
        self._free = list(range(layout.size))
        self._chains: dict[int, list[int]] = {}
        self._offered = 0
        self._collected = 0

    @property
    def in_flight(self) -> int:
        """Return how many chains the device has."""
        return len(self._chains)

    def reset(self) -> None:
        """Make both rings empty."""
        at = self._layout
        self._memory.store(at.available, bytes(AVAIL_HEAD_BYTES))
        self._memory.store(at.used, bytes(USED_HEAD_BYTES))
        self.__init__(self._memory, at)  # type: ignore[misc]

    def add(self, buffers: Sequence[Buffer]) -> int:
        """Write one chain and put it in the ring; return its head. ``offer`` shows it.

        Raises:
            RingFull: there are not enough descriptors.
            ValueError: no buffer, or one that the device reads behind one that it writes.
        """
        kinds = [buffer.writable for buffer in buffers]
        if not buffers or sorted(kinds) != kinds:
            raise ValueError("a chain has what the device reads first, then what it writes")
        if len(buffers) > len(self._free):
            raise RingFull(f"{len(buffers)} descriptors wanted, {len(self._free)} are free")
        taken = [self._free.pop(0) for _ in buffers]
        for index, buffer, following in zip(taken, buffers, [*taken[1:], None], strict=True):
            flags = (F_WRITE if buffer.writable else 0) | (0 if following is None else F_NEXT)
            entry = DESC.pack(buffer.address, buffer.size, flags, following or 0)
            self._memory.store(self._layout.descriptors + index * DESC_BYTES, entry)
        slot = self._layout.available + AVAIL_HEAD_BYTES
        slot += self._offered % self._layout.size * AVAIL_ENTRY.size
        self._memory.store(slot, AVAIL_ENTRY.pack(taken[0]))
        self._chains[taken[0]] = taken
        self._offered = self._offered + 1 & INDEX_BITS
        return taken[0]

    def offer(self) -> None:
        """Show the device all chains added so far; the doorbell is the caller's."""
        barrier()
        self._memory.store(self._layout.available + 2, self._offered.to_bytes(2, "little"))
        barrier()

    def collect(self) -> list[Used]:
        """Return the chains that came back since the last time.

        Raises:
            RingBroken: the device gave back what it never had.
        """
        index = int.from_bytes(self._memory.load(self._layout.used + 2, 2), "little")
        barrier()
        found = []
        while self._collected != index:
            at = self._layout.used + USED_HEAD_BYTES
            at += self._collected % self._layout.size * USED_BYTES
            head, written = USED_ENTRY.unpack(self._memory.load(at, USED_BYTES))
            if head not in self._chains:
                raise RingBroken(f"the device gave chain {head} back, which it does not have")
            self._free += self._chains.pop(head)
            self._collected = self._collected + 1 & INDEX_BITS
            found.append(Used(head, written))
        return found


@dataclass(frozen=True)
class Chain:
    """A chain that the device works on: buffers that it reads, then buffers that it writes."""

    head: int
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]


class DeviceQueue:
    """The device's side, which trusts nothing that it finds.

    Args:
        regions: the memory that the device was given.
        layout: where the queue lies.

    Raises:
        BadAddress: the queue does not lie in that memory.
    """

    def __init__(self, regions: Regions, layout: Layout) -> None:
        self._layout = layout
        self._seen = 0
        self._done = 0
        self.use(regions)

    def use(self, regions: Regions) -> None:
        """Go on with other memory: less of it, after a range was taken back."""
        at = self._layout
        regions.require(at.descriptors, at.size * DESC_BYTES)
        regions.require(at.available, AVAIL_HEAD_BYTES + at.size * AVAIL_ENTRY.size)
        regions.require(at.used, USED_HEAD_BYTES + at.size * USED_BYTES, write=True)
        self.regions = regions

    def pop(self) -> Chain | None:
        """Take the next chain; ``None`` if there is none.

        Raises:
            BadChain: it must not be followed; give its head back with ``push(head, 0)``.
            RingBroken: the index or the entry is impossible.
        """
        at = self._layout
        offered = int.from_bytes(self.regions.load(at.available + 2, 2), "little")
        if offered == self._seen:
            return None
        if offered - self._seen & INDEX_BITS > at.size:
            raise RingBroken(f"index {offered} is more than {at.size} ahead of {self._seen}")
        barrier()
        entry = at.available + AVAIL_HEAD_BYTES + self._seen % at.size * AVAIL_ENTRY.size
        head = int.from_bytes(self.regions.load(entry, AVAIL_ENTRY.size), "little")
        if head >= at.size:
            raise RingBroken(f"entry {self._seen % at.size} names descriptor {head} of {at.size}")
        self._seen = self._seen + 1 & INDEX_BITS
        return self._follow(head)

    def push(self, head: int, written: int) -> None:
        """Give a chain back; the interrupt is the caller's."""
        at = self._layout
        entry = at.used + USED_HEAD_BYTES + self._done % at.size * USED_BYTES
        self.regions.store(entry, USED_ENTRY.pack(head, written))
        self._done = self._done + 1 & INDEX_BITS
        barrier()
        self.regions.store(at.used + 2, self._done.to_bytes(2, "little"))
        barrier()

    def _follow(self, head: int) -> Chain:
        reads: list[Buffer] = []
        writes: list[Buffer] = []
        index = head
        # a chain longer than the table goes in a circle
        for _ in range(self._layout.size):
            raw = self.regions.load(self._layout.descriptors + index * DESC_BYTES, DESC_BYTES)
            address, size, flags, following = DESC.unpack(raw)
            buffer = Buffer(address, size, bool(flags & F_WRITE))
            self._judge(head, buffer, flags, bool(writes))
            (writes if buffer.writable else reads).append(buffer)
            if not flags & F_NEXT:
                return Chain(head, tuple(reads), tuple(writes))
            if following >= self._layout.size:
                raise BadChain(head, f"next is descriptor {following} of {self._layout.size}")
            index = following
        raise BadChain(head, "it goes in a circle")

    def _judge(self, head: int, buffer: Buffer, flags: int, writes_seen: bool) -> None:
        if flags & F_INDIRECT:
            raise BadChain(head, "an indirect descriptor, which was not negotiated")
        if not buffer.size:
            raise BadChain(head, "a buffer of no bytes")
        if writes_seen and not buffer.writable:
            raise BadChain(head, "a buffer to read behind one to write")
        try:
            self.regions.require(buffer.address, buffer.size, write=buffer.writable)
        except BadAddress as error:
            raise BadChain(head, str(error)) from error
