"""A driver in the guest that bounces everything: private memory, pool, ring, device, and back.

Owns the guest's side of the traffic. Each round writes a pattern to private buffers, copies them
to bounce buffers of the shared pool, offers them to the checker device in one go, waits for its
interrupt, copies the answers back to private memory and compares them there. The ring and the
requests are in shared memory and are stored by the guest itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rmem_client import vcpus
from rmem_client.constants import PAGE_BYTES
from rmem_client.vcpus import Instruction

from .channel import Message
from .cpu import TO_VMM, Cpu, GuestLost
from .guest import ACCEPT
from .machine import Range
from .ring import Buffer, DriverQueue
from .swiotlb import Mapping, Pool, PoolFull
from .virtio import CHECK_ECHO, CHECK_HEADER, CHECK_OK, CHECK_STATUS

# the guest's own signals
FILLED, ANSWERED = 1, 2
# to the VMM: the doorbell, and the end of a round
ROUND = TO_VMM + 64
# the queue and the requests' headers and statuses lie before the pool
CONTROL_BYTES = 64 * 1024
HEADERS_AT = 32 * 1024
HEADER_STRIDE = 64


@dataclass(frozen=True)
class Traffic:
    """What a driver is to do.

    Attributes:
        platform: the vendor, which decides how private memory is taken over.
        private: where its private buffers are.
        shared: the shared memory: control area, then the pool.
        buffer_bytes: bytes of one request.
        batch: requests of one round.
        rounds: how many rounds.
        seed: of the patterns.
        balloon: whether it gives its buffers back after each round.
        relinquish: whether it does so by a guest call of its own.
    """

    platform: str
    private: tuple[int, int]
    shared: tuple[int, int]
    buffer_bytes: int
    batch: int
    rounds: int
    seed: int
    balloon: bool = False
    relinquish: bool = False

    @property
    def bytes_bounced(self) -> int:
        """Return how many bytes go to the device; as many come back."""
        return self.rounds * self.batch * self.buffer_bytes

    def order(self) -> Message:
        """Return it as an order to the vCPU's process."""
        return {"do": "bounce", "queue": self.shared[0], **asdict(self)}

    @classmethod
    def ordered(cls, order: Message) -> Traffic:
        """Read it from an order."""
        said = {name: value for name, value in order.items() if name not in ("do", "queue")}
        return cls(**{**said, "private": tuple(said["private"]), "shared": tuple(said["shared"])})


class BounceDriver:
    """The driver, in the vCPU's process.

    Args:
        cpu: the vCPU.
        interrupt: eventfd of the device's interrupt.
        queue: the device's queue, from the beginning of the shared memory on.
        order: the traffic, as the VMM orders it.
    """

    def __init__(self, cpu: Cpu, interrupt: int, queue: DriverQueue, order: Message) -> None:
        self._cpu = cpu
        self._interrupt = interrupt
        self._traffic = Traffic.ordered(order)
        shared = Range(*self._traffic.shared)
        self._control = shared.gpa
        pool = Range(shared.gpa + CONTROL_BYTES, shared.size_bytes - CONTROL_BYTES)
        self._pool = Pool("swiotlb pool", pool, 16 * PAGE_BYTES)
        self._queue = queue
        self._statuses: dict[int, int] = {}
        self._round = 0
        self._batch: list[tuple[Range, Mapping]] = []
        self.checked_pages = self.wrong_pages = 0

    def run(self) -> dict[str, Any]:
        """Move all of the traffic; return the figures.

        Raises:
            GuestLost: a byte was not what it must be, or the guest was lost.
        """
        for number in range(self._traffic.rounds):
            self._round = number
            try:
                self._batch = list(self._map())
            except PoolFull as full:
                return {"refused": str(full), "checked_pages": self.checked_pages}
            outcome = self._cpu.run(self._programme(), self._on_signal)
            if outcome.lost or outcome.mismatched_pages:
                raise GuestLost(
                    outcome.lost
                    or f"round {self._round}: {outcome.mismatched_pages} pages came "
                    f"back wrong, the first at gfn {outcome.first_mismatch_gfn:#x}"
                )
            self.checked_pages += outcome.checked_pages
            for _, mapping in self._batch:
                self._pool.unmap(mapping)
        return {
            "bytes": self._traffic.bytes_bounced, "checked_pages": self.checked_pages,
            "rounds": self._traffic.rounds, "high_water_slots": self._pool.high_water,
            "pool_slots": self._pool.slots,
        }  # fmt: skip

    def _map(self) -> Iterator[tuple[Range, Mapping]]:
        first, _ = self._traffic.private
        for index in range(self._traffic.batch):
            size = self._traffic.buffer_bytes
            yield Range(first + index * size, size), self._pool.map(size)

    def _programme(self) -> Iterator[Instruction]:
        traffic = self._traffic
        seed, reply_seed = self._seeds()
        accept = ACCEPT.get(traffic.platform)
        if accept is not None and (traffic.balloon or not self._round):
            yield accept(traffic.private[0], traffic.batch * traffic.buffer_bytes)
        for private, bounce in self._batch:
            at, size = bounce.where.gpa, private.size_bytes
            yield vcpus.write(private.gpa, size, seed=seed, private=True)
            yield vcpus.copy(private.gpa, size, to_gpa=at, private=True)
        yield vcpus.signal(FILLED)
        yield vcpus.signal(TO_VMM)
        yield vcpus.signal(ANSWERED)
        for private, bounce in self._batch:
            size = private.size_bytes
            yield vcpus.copy(bounce.where.gpa, size, to_gpa=private.gpa, private=False)
            yield vcpus.check(private.gpa, size, seed=reply_seed, private=True)
        if traffic.relinquish:
            yield vcpus.relinquish(traffic.private[0], traffic.batch * traffic.buffer_bytes)
        yield vcpus.signal(ROUND)
        yield vcpus.halt()

    def _seeds(self) -> tuple[int, int]:
        seed = (self._traffic.seed << 24) + 2 * self._round
        return seed, seed + 1

    def _on_signal(self, value: int) -> None:
        if value == FILLED:
            self._offer()
        else:
            self._await_answers()

    def _offer(self) -> None:
        """Write requests and ring entries; the doorbell is the next instruction."""
        seed, reply_seed = self._seeds()
        for index, (private, bounce) in enumerate(self._batch):
            header = self._control + HEADERS_AT + index * HEADER_STRIDE
            status = header + CHECK_HEADER.size
            request = CHECK_HEADER.pack(CHECK_ECHO, private.npages, private.gpa, seed, reply_seed)
            self._cpu.shared.store(header, request + b"\xff" * CHECK_STATUS.size)
            data = bounce.where
            head = self._queue.add(
                [
                    Buffer(header, CHECK_HEADER.size),
                    Buffer(data.gpa, data.size_bytes),
                    Buffer(data.gpa, data.size_bytes, writable=True),
                    Buffer(status, CHECK_STATUS.size, writable=True),
                ]
            )
            self._statuses[head] = status
        self._queue.offer()

    def _await_answers(self) -> None:
        """Wait for the device's interrupts until every request is back."""
        while self._statuses:
            os.eventfd_read(self._interrupt)
            for used in self._queue.collect():
                status, wrong = CHECK_STATUS.unpack(
                    self._cpu.shared.load(self._statuses.pop(used.head), CHECK_STATUS.size)
                )
                if status != CHECK_OK or not used.written:
                    raise GuestLost(
                        f"round {self._round}: the device answered {status:#x}, {wrong} pages wrong"
                    )
