"""A device's process (``python -m rmem_vmm.device``): shared memory, a doorbell, and no more.

Owns the device's end of a virtqueue. The process is started with one descriptor; over it come a
ticket, which opens a session that reaches the granted ranges alone, a doorbell and an interrupt
(eventfds), and for a disk its file. It waits for the doorbell, for its VMM and for the daemon's
notices, all in one ``select``. It pins the pages of a request while it works on it; of a range
that was revoked it forgets the mapping.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Iterable
from typing import Any

from rmem_client import RmemError
from rmem_client.session import Session
from rmem_client.shared import SharedMemory

from .channel import Channel, Hangup, Message, be_child
from .ring import (
    BadAddress,
    BadChain,
    Chain,
    DeviceQueue,
    Layout,
    Region,
    Regions,
    RingBroken,
    View,
)
from .virtio import BlockDevice, Checker, Device, page_runs

# what one record of the session socket carries at most
PIECE_BYTES = 128 * 1024


class Port:
    """Shared memory that the daemon reads and writes for its grantee (``Memory``).

    A range that is part of a file is reached so: a descriptor would be of the whole file.

    Args:
        session: the grantee's session.
        file: the file.
    """

    def __init__(self, session: Session, file: int) -> None:
        self._session = session
        self._file = file

    def load(self, address: int, size: int) -> bytes:
        """Return bytes from an offset in the file on."""
        parts = [
            self._session.read_shared(self._file, address + at, min(PIECE_BYTES, size - at))
            for at in range(0, size, PIECE_BYTES)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def store(self, address: int, data: bytes) -> None:
        """Store bytes from an offset in the file on."""
        for at in range(0, len(data), PIECE_BYTES):
            self._session.write_shared(self._file, address + at, data[at : at + PIECE_BYTES])


class Grants:
    """The ranges that the device was granted: reached, pinned, and let go.

    Args:
        session: the device's session.
        ranges: file, offset, length and guest physical address of each, as the VMM says them.
        purpose: why it pins, which refusals will say.
    """

    def __init__(self, session: Session, ranges: Iterable[Message], purpose: str) -> None:
        self._session = session
        self._purpose = purpose
        self._ranges = list(ranges)
        self._mapped: list[SharedMemory] = []
        self.regions = Regions([self._region(grant) for grant in self._ranges])

    def _region(self, grant: Message) -> Region:
        gpa, length, read_only = grant["gpa"], grant["length"], grant["read_only"]
        if not grant["mapped"]:
            port = Port(self._session, grant["file"])
            return Region(gpa, length, port, grant["offset"], read_only)
        shared = self._session.shared_memory(
            grant["file"], grant["offset"], length, read_only=read_only
        ).__enter__()
        # mapped for as long as the process lives
        self._mapped.append(shared)
        return Region(gpa, length, View(shared.view), 0, read_only)

    def pin(self, address: int, size: int) -> int:
        """Hold pages in place; return the pin's handle.

        Raises:
            BadAddress: no grant has them.
        """
        for grant in self._ranges:
            at = address - grant["gpa"]
            if at >= 0 and at + size <= grant["length"]:
                offset = grant["offset"] + at
                return self._session.pin(grant["file"], offset, size, purpose=self._purpose)
        raise BadAddress(f"{address:#x}+{size:#x} was not granted")

    def unpin(self, pin: int) -> None:
        """Let pages go."""
        self._session.unpin(pin)

    def revoked(self, file: int, offset: int, length: int) -> list[tuple[int, int]]:
        """Forget a range of a file; return the guest memory that went, as (address, bytes)."""
        gone = []
        for grant in self._ranges:
            lo = max(offset, grant["offset"])
            hi = min(offset + length, grant["offset"] + grant["length"])
            if grant["file"] == file and lo < hi:
                gone.append((grant["gpa"] + lo - grant["offset"], hi - lo))
        for address, size in gone:
            self.regions = self.regions.without(address, size)
        return gone


class DeviceProcess:
    """The process: what rings, and what it does then."""

    def __init__(
        self, session: Session, channel: Channel, device: Device, grants: Grants, layout: Layout,
        doorbell: int, interrupt: int,
    ) -> None:  # fmt: skip
        self._session = session
        self._channel = channel
        self._device = device
        self._grants = grants
        self._queue: DeviceQueue | None = DeviceQueue(grants.regions, layout)
        self._doorbell = doorbell
        self._interrupt = interrupt
        self._pins: dict[int, list[int]] = {}
        self.figures = {"requests": 0, "refused": 0, "pins": 0, "interrupts": 0}

    def serve(self) -> None:
        """Serve until the VMM hangs up.

        Raises:
            Hangup: it has.
        """
        sources: list[Any] = [self._doorbell, self._channel, self._session]
        while True:
            ready, _, _ = select.select(sources, [], [])
            if self._doorbell in ready:
                os.eventfd_read(self._doorbell)
                self._work()
            if self._channel in ready:
                self._ordered(self._channel.receive()[0])
            self._take_notices()

    def _work(self) -> None:
        """Serve the ring until it is empty."""
        while self._queue is not None:
            try:
                chain = self._queue.pop()
                if chain is None:
                    return
                self._serve(self._queue, chain)
            except BadChain as bad:
                self._refuse(self._queue, bad)
            except RingBroken as broken:
                self._queue = None
                self._channel.send({"event": "needs_reset", "text": str(broken)})

    def _serve(self, queue: DeviceQueue, chain: Chain) -> None:
        try:
            self._pins[chain.head] = [self._grants.pin(*run) for run in page_runs(chain)]
        except (BadAddress, RmemError) as error:
            raise BadChain(chain.head, str(error)) from error
        self.figures["pins"] += len(self._pins[chain.head])
        try:
            written = self._device.handle(chain, queue.regions)
        except BadAddress as error:
            raise BadChain(chain.head, str(error)) from error
        if written is None:
            self._channel.send({"event": "keeps", "head": chain.head})
        else:
            self._complete(queue, chain.head, written)

    def _complete(self, queue: DeviceQueue, head: int, written: int) -> None:
        self._let_go(head)
        self.figures["requests"] += 1
        queue.push(head, written)
        self._ring()

    def _refuse(self, queue: DeviceQueue, bad: BadChain) -> None:
        self._let_go(bad.head)
        self.figures["refused"] += 1
        queue.push(bad.head, 0)
        self._channel.send({"event": "refused", "head": bad.head, "text": str(bad)})
        self._ring()

    def _let_go(self, head: int) -> None:
        for pin in self._pins.pop(head, []):
            self._grants.unpin(pin)

    def _ring(self) -> None:
        self.figures["interrupts"] += 1
        os.eventfd_write(self._interrupt, 1)

    def _take_notices(self) -> None:
        """Take what the daemon has told; a call may have read it while it waited for its answer."""
        while (notice := self._session.next_notice(0)) is not None:
            if notice.kind == "closed":
                raise Hangup
            if notice.kind == "revoked":
                self._give_up(notice.file, notice.offset_bytes, notice.length_bytes)

    def _give_up(self, file: int, offset: int, length: int) -> None:
        gone = self._grants.revoked(file, offset, length)
        if self._queue is not None:
            try:
                self._queue.use(self._grants.regions)
            except BadAddress:
                self._queue = None
        going_on = self._queue is not None
        self._channel.send({"event": "revoked", "ranges": gone, "queue": going_on})

    def _ordered(self, order: Message) -> None:
        if order["do"] == "deliver":
            self._deliver(bytes.fromhex(order["data"]))
        elif order["do"] == "reach":
            self._channel.send({"event": "reached", **self._reach(order)})
        elif order["do"] == "figures":
            self._channel.send({"event": "figures", **self.figures, **self._device.figures()})

    def _deliver(self, data: bytes) -> None:
        """Something came in from outside: fill the oldest receive buffer and give it back."""
        if self._queue is None or not isinstance(self._device, Checker) or not self._device.kept:
            return
        head = self._device.kept[0].head
        try:
            _, written = self._device.deliver(data, self._queue.regions)
        except (BadAddress, BadChain) as error:
            return self._refuse(self._queue, BadChain(head, str(error)))
        self._complete(self._queue, head, written)
        self._channel.send({"event": "released", "head": head})

    def _reach(self, order: Message) -> dict[str, Any]:
        """Try to get at guest memory through the mapping, and through the daemon."""
        file, offset, size = order["file"], order["offset"], order["size_bytes"]
        return {
            "mapped": _tried(lambda: self._grants.regions.load(order["gpa"], size)),
            "read": _tried(lambda: self._session.read_shared(file, offset, size)),
            "pinned": _tried(
                lambda: self._session.unpin(self._session.pin(file, offset, size, purpose="try"))
            ),
        }


def _tried(what: Callable[[], object]) -> str:
    """Return "reached", or why not."""
    try:
        what()
    except BadAddress as error:
        return str(error)
    except RmemError as refusal:
        return refusal.reason
    return "reached"


def _make(spec: Message, fds: list[int]) -> Device:
    if spec["kind"] == "block":
        return BlockDevice(fds[2], os.fstat(fds[2]).st_size)
    return Checker()


def _serve(channel: Channel) -> None:
    spec, fds = channel.receive()
    with Session.open(spec["socket_dir"], ticket=bytes.fromhex(spec["ticket"])) as session:
        device = _make(spec, fds)
        grants = Grants(session, spec["grants"], spec["purpose"])
        layout = Layout.at(spec["queue"]["gpa"], spec["queue"]["size"])
        process = DeviceProcess(session, channel, device, grants, layout, fds[0], fds[1])
        channel.send({"event": "ready", "session": session.number})
        process.serve()


def main() -> int:
    """Be one device; return the exit status."""
    return be_child(_serve, BadAddress, RmemError, OSError, ValueError)


if __name__ == "__main__":
    sys.exit(main())
