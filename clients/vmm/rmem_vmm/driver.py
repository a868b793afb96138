"""A driver in the guest that does what its VMM scripts: stores, a chain, the doorbell, loads.

Owns the queue of a vCPU's process between orders. What it writes into the ring it writes as the
guest, whatever that is: a driver that misbehaves is an order with bad addresses in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rmem_client import vcpus

from .bounce import BounceDriver
from .channel import Message
from .cpu import TO_VMM, Cpu
from .ring import Buffer, DriverQueue, Layout

QUEUE_ENTRIES = 256


def request(
    queue_gpa: int,
    buffers: Iterable[Buffer],
    *,
    stores: Iterable[tuple[int, bytes]] = (),
    loads: Iterable[tuple[int, int]] = (),
    device: int = 0,
    wait: bool = True,
) -> Message:
    """Return the order for one request.

    Args:
        queue_gpa: where the queue lies.
        buffers: the chain.
        stores: what the guest stores before, as (address, bytes).
        loads: what it loads after, as (address, how many).
        device: which doorbell it rings.
        wait: whether it waits for the chain to come back.
    """
    return {
        "do": "request", "queue": queue_gpa, "device": device, "wait": wait,
        "buffers": [(b.address, b.size, b.writable) for b in buffers],
        "stores": [(address, data.hex()) for address, data in stores],
        "loads": list(loads),
    }  # fmt: skip


def collect(queue_gpa: int, loads: Iterable[tuple[int, int]] = ()) -> Message:
    """Return the order to wait for the next interrupt and collect what came back."""
    return {"do": "collect", "queue": queue_gpa, "loads": list(loads)}


class ScriptedDriver:
    """The driver, in the vCPU's process.

    Args:
        cpu: the vCPU.
        interrupt: eventfd of the device's interrupt.
        queue_gpa: where the queue lies.
    """

    def __init__(self, cpu: Cpu, interrupt: int, queue_gpa: int) -> None:
        self._cpu = cpu
        self._interrupt = interrupt
        self._queue = DriverQueue(cpu.shared, Layout.at(queue_gpa, QUEUE_ENTRIES))
        self._queue.reset()

    def bounce(self, order: Message) -> dict[str, Any]:
        """Carry an order for bounced traffic out."""
        return BounceDriver(self._cpu, self._interrupt, self._queue, order).run()

    def request(self, order: Message) -> dict[str, Any]:
        """Carry an order for a request out."""
        for address, data in order["stores"]:
            self._cpu.shared.store(address, bytes.fromhex(data))
        head = self._queue.add([Buffer(*buffer) for buffer in order["buffers"]])
        self._queue.offer()
        self._cpu.run([vcpus.signal(TO_VMM + order["device"]), vcpus.halt()])
        return self.collect(order) if order["wait"] else {"head": head, "written": -1, "loaded": []}

    def collect(self, order: Message) -> dict[str, Any]:
        """Wait for an interrupt; return the chain that came back, and what is to be loaded."""
        used = self._queue.collect()
        while not used:
            os.eventfd_read(self._interrupt)
            used = self._queue.collect()
        loaded = [self._cpu.shared.load(address, size).hex() for address, size in order["loads"]]
        return {"head": used[-1].head, "written": used[-1].written, "loaded": loaded}
