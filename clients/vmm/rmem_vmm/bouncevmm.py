"""The VMM of one bounce-buffer guest, as a process (``python -m rmem_vmm.bouncevmm``).

Owns the life of one guest whose driver bounces everything to a device process; it tells its parent
each round. A guest that balloons has its private buffers punched out after every round, and faults
them in again in the next.
"""

from __future__ import annotations

import sys
from typing import Any

from rmem_client import RmemError, vcpus
from rmem_client.constants import PAGE_BYTES

from .bounce import CONTROL_BYTES, Traffic
from .channel import Channel, ChildFailed, Message, be_child
from .guestvm import HIGH_GPA, GrantSpec, Guest
from .host import Host
from .machine import Range
from .vmm import VmmFailed

BUFFER_BYTES, BATCH = 512 * 1024, 8
ROUND_BYTES = BUFFER_BYTES * BATCH
PRIVATE = Range(0, ROUND_BYTES)
RAM_BYTES = 2 * ROUND_BYTES
POOL_SLOT, POOL = 5, Range(HIGH_GPA, CONTROL_BYTES + ROUND_BYTES)


class BounceVmm:
    """One guest, its device, and what becomes of its private buffers.

    Args:
        host: the VMM's side.
        channel: to the parent.
        spec: consumer, bytes, seed, node, and whether it balloons.
    """

    def __init__(self, host: Host, channel: Channel, spec: Message) -> None:
        self._host = host
        self._channel = channel
        self._spec = spec
        self._rounds = 0
        self._guest: Guest | None = None
        self.figures: dict[str, Any] = {"punched_pages": 0, "punches": 0, "not_punched": 0}

    def run(self) -> dict[str, Any]:
        """Move all bytes; return the figures."""
        self._guest = guest = self._launch()
        cpu, spec = guest.cpus[0], self._spec
        self._host.run(cpu, [vcpus.share(POOL.gpa, POOL.size_bytes), vcpus.halt()])
        grant = GrantSpec(POOL, mapped=True)
        device = self._host.start_device(guest, "checker", POOL.gpa, [grant])
        guest.on_signal = lambda _: self._round_done(guest)
        done = self._host.do(cpu, self._traffic(guest).order())
        device.child.tell({"do": "figures"})
        checked = self._host.wait(device.child, "figures")
        return {
            "consumer": spec["consumer"], "vm": guest.machine.vm, "bytes": done["bytes"],
            "rounds": done["rounds"], "guest_pages": done["checked_pages"],
            "device_pages": checked["pages"], "device_wrong": checked["wrong_pages"],
            "requests": checked["requests"], "pins": checked["pins"], **self.figures,
        }  # fmt: skip

    def destroy(self) -> int:
        """Destroy the guest, if there is one; return how many pages that freed."""
        return 0 if self._guest is None else self._host.destroy(self._guest)

    def _launch(self) -> Guest:
        guest = self._host.create(
            self._spec["consumer"], memory_bytes=RAM_BYTES, node=self._spec["node"]
        )
        self._host.plug(guest, POOL_SLOT, POOL.gpa, POOL.size_bytes)
        self._host.launch(guest)
        self._host.start_cpu(guest)
        first, npages = PRIVATE.gfns
        self._channel.send(
            {
                "event": "launched", "vm": guest.machine.vm, "gfn": first, "npages": npages,
                "movable": "migrate_folio" in guest.machine.ops,
            }
        )  # fmt: skip
        return guest

    def _traffic(self, guest: Guest) -> Traffic:
        return Traffic(
            platform=guest.machine.platform, private=(PRIVATE.gpa, PRIVATE.size_bytes),
            shared=(POOL.gpa, POOL.size_bytes), buffer_bytes=BUFFER_BYTES, batch=BATCH,
            rounds=max(self._spec["bytes"] // ROUND_BYTES, 1), seed=self._spec["seed"],
            balloon=self._spec["balloon"],
            relinquish=self._spec["balloon"] and guest.machine.platform == "pkvm",
        )  # fmt: skip

    def _round_done(self, guest: Guest) -> None:
        """The buffers hold nothing that is needed: punch them, where the guest balloons."""
        self._rounds += 1
        if self._spec["balloon"]:
            files, file = self._host.client.files, guest.machine.file
            before = files.get(file).private_pages
            files.punch(file, PRIVATE.gpa, PRIVATE.size_bytes)
            gone = before - files.get(file).private_pages
            self.figures["punches"] += 1
            self.figures["punched_pages"] += gone
            self.figures["not_punched"] += PRIVATE.size_bytes // PAGE_BYTES - gone
        self._channel.send({"event": "round", "round": self._rounds})


def _serve(channel: Channel) -> None:
    spec, _ = channel.receive()
    with Host(spec["socket_dir"]) as host:
        channel.send({"event": "ready", "session": host.session.number})
        vmm = BounceVmm(host, channel, spec)
        channel.send({"event": "done", **vmm.run()})
        # somebody may still be moving its pages
        channel.receive()
        channel.send({"event": "gone", "freed_pages": vmm.destroy()})


def main() -> int:
    """Be one VMM; return the exit status."""
    return be_child(_serve, ChildFailed, RmemError, VmmFailed)


if __name__ == "__main__":
    sys.exit(main())
