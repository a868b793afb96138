"""What one client has of a daemon, and what it knows of it: made, changed and verified.

Owns ``Guest``, a VM of one consumer with the pages that its vCPU has written, and ``Store``, a file
of shared bytes with pins on it and a file whose pages are counted. What a reply says is compared
with what the model says it must be, so that nothing can have been done twice unseen.
"""

from __future__ import annotations

import random
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rmem_client import vcpus
from rmem_client.constants import GUEST_MEMFD_FLAG_MMAP, PAGE_BYTES
from rmem_vmm import machine
from rmem_vmm.guest import Range, take
from rmem_vmm.vcpu import Vcpu

if TYPE_CHECKING:
    from rmem.v1 import consumer_pb2
    from rmem_client import Client
    from rmem_client.session import Session

NPAGES = 12
FRESH, PRIVATE, SHARED = "fresh", "private", "shared"
GRPC, SESSION = "grpc", "session"


class Wrong(Exception):
    """The daemon has not what it said."""


def require(what: str, found: object, wanted: object) -> None:
    """Compare.

    Raises:
        Wrong: they differ.
    """
    if found != wanted:
        raise Wrong(f"{what}: {found}, not {wanted}")


class Guest:
    """A VM whose pages are fresh, private or shared, and hold what its vCPU last wrote.

    Attributes:
        machine: the VM and its file.
        checked: pages that its vCPU has compared, ``wrong`` those that differed.
    """

    def __init__(self, client: Client, consumer: consumer_pb2.Consumer) -> None:
        self._client = client
        self.machine = machine.create(client, consumer, memory_bytes=NPAGES * PAGE_BYTES)
        machine.finalize(client, self.machine)
        self._states = [FRESH if self.machine.private_memory else SHARED] * NPAGES
        self._seeds: list[int | None] = [None] * NPAGES
        self.checked = self.wrong = 0

    @property
    def label(self) -> str:
        """Return its name for people."""
        return f"{self.machine.consumer} vm/{self.machine.vm}"

    # --- what is done ------------------------------------------------------------------------
    def write(self, rng: random.Random) -> None:
        """Have the guest write to pages that are in one state."""
        first, n = self._alike(rng)
        self._write(first, n, rng.getrandbits(32))

    def turn(self, rng: random.Random) -> None:
        """Have the guest ask for pages to be shared, or private again, and write to them."""
        first, n = self._alike(rng)
        if not self.machine.private_memory:
            return self._write(first, n, rng.getrandbits(32))
        where, seed = _pages(first, n), rng.getrandbits(32)
        is_private = self._states[first] == SHARED
        call = vcpus.unshare if is_private else vcpus.share
        programme = [call(where.gpa, where.size_bytes)]
        if is_private:
            programme += take(self.machine, where)
        elif self._states[first] == FRESH:
            programme = [*take(self.machine, where), *programme]
        self._run([*programme, _write(where, seed, is_private)])
        self._became(first, n, PRIVATE if is_private else SHARED, seed)

    def move(self, rng: random.Random, admin: Client) -> None:
        """Have the host move pages of the guest to other frames, as far as the vendor lets it."""
        first, n = self._alike(rng)
        admin.host.migrate(vm=self.machine.vm, gfns=[(first, n)])

    def check(self) -> None:
        """Have the guest compare every page that it has written.

        Raises:
            Wrong: one differs.
        """
        programme = [
            vcpus.check(
                page * PAGE_BYTES, PAGE_BYTES, seed=seed, private=self._states[page] != SHARED
            )
            for page, seed in enumerate(self._seeds)
            if seed is not None
        ]
        vcpu = self._run([*programme, vcpus.halt()])
        require(f"{self.label}: pages compared", vcpu.tally.checked_pages, len(programme))

    def dispose(self) -> None:
        """Destroy it."""
        machine.dispose(self._client, self.machine)

    def _write(self, first: int, n: int, seed: int) -> None:
        where, is_private = _pages(first, n), self._states[first] != SHARED
        programme = [_write(where, seed, is_private)]
        if self._states[first] == FRESH:
            programme = [*take(self.machine, where), *programme]
        self._run(programme)
        self._became(first, n, PRIVATE if is_private else SHARED, seed)

    def _run(self, programme: list[vcpus.Instruction]) -> Vcpu:
        vcpu = Vcpu(self._client, self.machine, 0)
        vcpu.run([*programme, vcpus.halt()])
        self.checked += vcpu.tally.checked_pages
        self.wrong += vcpu.tally.mismatched_pages
        require(f"{self.label}: pages that differ", vcpu.tally.mismatched_pages, 0)
        return vcpu

    def _became(self, first: int, n: int, state: str, seed: int) -> None:
        self._states[first : first + n] = [state] * n
        self._seeds[first : first + n] = [seed] * n

    def _alike(self, rng: random.Random) -> tuple[int, int]:
        """Return pages that are in one state: the first of them, and how many."""
        first = rng.randrange(NPAGES)
        same = next(len(list(run)) for _, run in groupby(self._states[first:]))
        return first, rng.randint(1, same)


class Store:
    """A VM of software alone, with a file of shared bytes and one whose pages are counted.

    Attributes:
        checked: pages whose bytes were compared.
    """

    def __init__(self, client: Client, session: Session) -> None:
        self._client, self._session = client, session
        self.vm = client.vms.create("sw-protected")
        size = NPAGES * PAGE_BYTES
        self.file = client.files.create(self.vm, size, flags=GUEST_MEMFD_FLAG_MMAP)
        self.counted = client.files.create(self.vm, size, flags=GUEST_MEMFD_FLAG_MMAP)
        client.vms.set_memory_region(self.vm, 0, gpa=0, size_bytes=size, file=self.file)
        session.convert_file(self.file, 0, size, private=False)
        self._memory = session.shared_memory(self.file)
        self._memory.__enter__()
        self._bytes = bytearray(size)
        self._allocated: set[int] = set()
        self._private = [True] * NPAGES
        self.pins: dict[int, tuple[int, int]] = {}
        self.checked = 0

    # --- what is done ------------------------------------------------------------------------
    def write(self, rng: random.Random, door: str) -> None:
        """Write shared bytes across a page's end."""
        at, data = rng.randrange(len(self._bytes) - 5000), rng.randbytes(5000)
        by = self._session if door == SESSION else self._client.files
        by.write_shared(self.file, at, data)
        self._bytes[at : at + len(data)] = data

    def poke(self, rng: random.Random, door: str) -> None:
        """Write through the mapping, without a word to the daemon."""
        at, data = rng.randrange(len(self._bytes) - 100), rng.randbytes(100)
        self._memory.view[at : at + len(data)] = data
        self._bytes[at : at + len(data)] = data

    def pin(self, rng: random.Random, door: str) -> None:
        """Pin shared pages."""
        first, n = _range(rng)
        by: Any = self._session if door == SESSION else self._client.files
        handle = by.pin(self.file, first * PAGE_BYTES, n * PAGE_BYTES, purpose="DMA")
        if handle in self.pins:
            raise Wrong(f"pin {handle} was given twice")
        self.pins[handle] = first, n

    def unpin(self, rng: random.Random, door: str) -> None:
        """Let a pin go, while there are some."""
        if not self.pins:
            return self.pin(rng, door)
        handle = rng.choice(list(self.pins))
        by: Any = self._session if door == SESSION else self._client.files
        by.unpin(handle)
        del self.pins[handle]

    def allocate(self, rng: random.Random, door: str) -> None:
        """Allocate pages of the other file, and count."""
        first, n = _range(rng)
        new = set(range(first, first + n)) - self._allocated
        done = self._client.files.allocate(self.counted, first * PAGE_BYTES, n * PAGE_BYTES)
        require("pages allocated", done, len(new))
        self._allocated |= new

    def punch(self, rng: random.Random, door: str) -> None:
        """Punch pages out of the other file, and count."""
        first, n = _range(rng)
        there = self._allocated & set(range(first, first + n))
        done = self._client.files.punch(self.counted, first * PAGE_BYTES, n * PAGE_BYTES)
        require("pages punched", done, len(there))
        self._allocated -= there

    def convert(self, rng: random.Random, door: str) -> None:
        """Convert pages of the other file, and count those that change."""
        first, n = _range(rng)
        private = rng.random() < 0.5
        changing = sum(was != private for was in self._private[first : first + n])
        by: Any = self._session if door == SESSION else self._client.files
        done = by.convert_file if door == SESSION else by.convert
        reply = done(self.counted, first * PAGE_BYTES, n * PAGE_BYTES, private=private)
        require("pages converted", reply.changed_pages, changing)
        self._private[first : first + n] = [private] * n

    # --- what is there -----------------------------------------------------------------------
    def check(self, rng: random.Random, door: str) -> None:
        """Compare every byte and count.

        Raises:
            Wrong: something differs.
        """
        size = len(self._bytes)
        by: Any = self._session if door == SESSION else self._client.files
        for how, found in (
            (door, by.read_shared(self.file, 0, size)), ("mapping", bytes(self._memory.view)),
        ):  # fmt: skip
            if found != self._bytes:
                raise Wrong(f"file/{self.file}: other bytes by {how}")
        self.checked += 2 * NPAGES
        found = self._client.files.get(self.counted)
        require("pages there", found.private_pages + found.shared_pages, len(self._allocated))

    def require_pins(self, holder: str) -> None:
        """Compare the pins that a session has."""
        listed = self._client.files.pins(self.file).pins
        found = {
            pin.pin: (pin.offset_bytes // PAGE_BYTES, pin.length_bytes // PAGE_BYTES)
            for pin in listed
        }
        require(f"pins of {holder}", found, self.pins)

    def dispose(self) -> None:
        """Let all of it go."""
        for pin in list(self.pins):
            self._session.unpin(pin)
        self._memory.close()
        self._client.vms.destroy(self.vm)
        for file in (self.file, self.counted):
            self._client.files.close(file)


def _range(rng: random.Random) -> tuple[int, int]:
    first = rng.randrange(NPAGES)
    return first, rng.randint(1, NPAGES - first)


def _pages(first: int, n: int) -> Range:
    return Range(first * PAGE_BYTES, n * PAGE_BYTES)


def _write(where: Range, seed: int, private: bool) -> vcpus.Instruction:
    return vcpus.write(where.gpa, where.size_bytes, seed=seed, private=private)
