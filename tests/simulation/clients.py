"""What clients do: each action as the calls of the engine that a client makes, one after another.

A script is a generator of calls; it is sent what a call returned, and a refusal is raised in it at
the call, where it ends unless it knows better. What it was going to touch is chosen when it begins,
from what there is then, so by the time of the call it may be gone: that must be refused, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rmemd.engine.engine import Engine
from rmemd.engine.pendingfaults import FAULT
from rmemd.engine.programme import Instruction, Opcode, Pattern, make_rows
from rmemd.errors import PluginFault, RmemError
from rmemd.hooks import Agent
from rmemd.model.files import FLAG_INIT_SHARED, FLAG_MMAP
from rmemd.model.sessions import DEVICE, HOST, GrantRange, Owner, SessionInfo
from rmemd.model.vms import GUEST_MEMFD, Vm
from rmemd.units import PAGE_SIZE, pages

from .actions import PAGES
from .content import Page

if TYPE_CHECKING:
    from .world import World

Script = Generator[Callable[[Engine], Any], Any, None]

GFN = 0x100
PUNCH, KEEP = 3, 1
TENANTS = ("uid:1", "uid:2")
VMS_MAX, FILES_MAX, SESSIONS_MAX = 5, 8, 6
# conversion to shared and back takes the page from the guest, or leaves noise in it
FORGETFUL = ("tdx", "snp")
CALLED = (Opcode.ACCEPT, Opcode.VALIDATE, Opcode.SHARE, Opcode.UNSHARE, Opcode.RELINQUISH)
POLICIES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Target:
    """A VM with the file behind its slots, chosen for an action."""

    vm: int
    file: int
    pages: int
    gfn: int
    in_place: bool
    private_memory: bool
    platform: str
    owner: Owner

    def gpa(self, page: int) -> int:
        """Return the guest address of a page of the slot."""
        return (self.gfn + page) * PAGE_SIZE


class Clients:
    """Scripts by the name of their action."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._vcpus: set[tuple[int, int]] = set()

    # --- choosing ------------------------------------------------------------------------------
    def _session(self, which: int) -> SessionInfo | None:
        hosts = [s for s in self.world.core.sessions.all() if s.role == HOST and not s.closing]
        return hosts[which % len(hosts)] if hosts else None

    def _target(self, which: int) -> Target | None:
        vms = list(self.world.core.vms.all())
        return self._of(vms[which % len(vms)]) if vms else None

    def _of(self, vm: Vm) -> Target:
        info = vm.info
        slot = next((slot for _, slot in vm.slots.items()), None)
        mine = [f.info for f in self.world.core.files.all() if f.info.vm == info.vm]
        at = slot.file if slot is not None else (mine[0].file if mine else 0)
        gfn = slot.gfn - slot.pgoff if slot is not None else GFN
        size = next((f.size_pages for f in mine if f.file == at), PAGES)
        return Target(
            info.vm, at, size, gfn, info.in_place, info.private_memory, info.platform, info.owner
        )

    def _fellow(self, at: Target, which: int) -> SessionInfo | None:
        """Return a session of a VM's tenant: no other gets past the doors to it."""
        kin = [s for s in self.world.core.sessions.all() if s.tenant == at.owner.tenant]
        kin = [s for s in kin if s.role == HOST and not s.closing]
        return kin[which % len(kin)] if kin else None

    def _is_private(self, at: Target, page: int) -> bool:
        core = self.world.core
        if not at.private_memory:
            return False
        if at.in_place:
            there = core.files.exists(at.file)
            return there and core.files.get(at.file).attributes.at(page) == 1
        return core.vms.get(at.vm).attributes.at(at.gfn + page) == 1

    def _alike(self, at: Target, page: int, n: int) -> tuple[int, bool]:
        """Return how many pages from ``page`` are in one state, and whether they are private."""
        private = self._is_private(at, page)
        same = [self._is_private(at, i) == private for i in range(page, page + n)]
        return (same.index(False) if False in same else n), private

    def _pages(self, at: Target, page: int, n: int, private: bool | None = None) -> list[Page]:
        """Return the pages of a range as contents name them: in place there is one half."""
        halves = (True,) if at.in_place else (True, False) if private is None else (private,)
        return [(at.vm, at.gfn + i, half) for i in range(page, page + n) for half in halves]

    def _range(self, at: Target, page: int, n: int) -> tuple[int, int]:
        page %= at.pages
        return page, min(n, at.pages - page)

    # --- sessions ------------------------------------------------------------------------------
    def open_session(self, which: int) -> Script:
        if len(list(self.world.core.sessions.all())) < SESSIONS_MAX:
            yield lambda e: e.open_session(TENANTS[which % len(TENANTS)], HOST, "socket")

    def open_device(self, which: int, page: int, n: int) -> Script:
        at = self._target(which)
        parent = None if at is None else self._fellow(at, which // 8)
        if at is not None and parent is not None:
            grants = (GrantRange(at.file, *self._range(at, page, n)),)
            yield lambda e: e.open_session(
                parent.tenant, DEVICE, "socket", parent=parent.session, grants=grants
            )

    def revoke(self, which: int, page: int, n: int) -> Script:
        at = self._target(which)
        if at is not None:
            yield lambda e: e.revoke(at.owner.tenant, at.file, *self._range(at, page, n))

    def close_session(self, session: int) -> Script:
        """End a session whose client died: everything of its VMs may go at any moment."""
        mine = [vm.info.vm for vm in self.world.core.vms.all() if vm.info.owner.session == session]
        with self.world.contents.losing(*mine):
            try:
                yield lambda e: e.close_session(session)
            except (PluginFault, OSError):
                # what was injected strikes once
                yield lambda e: e.close_session(session)

    # --- VMs, files, slots ---------------------------------------------------------------------
    def create_vm(self, which: int, kind: int) -> Script:
        client = self._session(which)
        if client is None or len(list(self.world.core.vms.all())) >= VMS_MAX:
            return
        consumer, in_place = self.world.kinds[kind % len(self.world.kinds)]
        owner = Owner(client.tenant, client.session)
        made = yield lambda e: e.create_vm(consumer, in_place=in_place, owner=owner)
        vm, private, in_place = made.info.vm, made.info.private_memory, made.info.in_place
        file = 0
        if private:
            flags = (FLAG_MMAP | (FLAG_INIT_SHARED if kind & 0x100 else 0)) if in_place else 0
            file = (yield lambda e: e.create_file(vm, PAGES * PAGE_SIZE, flags)).info.file
        yield lambda e: e.set_memory_region(
            vm, 0, GUEST_MEMFD if private else 0, GFN * PAGE_SIZE, PAGES * PAGE_SIZE, file, 0
        )
        for index in range(2):
            yield lambda e, index=index: e.create_vcpu(vm, index)
        consumer_of = self.world.core.consumers.get(vm)
        if kind % 8 and consumer_of is not None and consumer_of.ops.finalize is not None:
            yield lambda e: e.finalize(vm)

    def destroy_vm(self, which: int) -> Script:
        at = self._target(which)
        if at is not None:
            with self.world.contents.losing(at.vm):
                yield lambda e: e.destroy_vm(at.vm)

    def create_file(self, which: int, kind: int) -> Script:
        at = self._target(which)
        if at is not None and len(list(self.world.core.files.all())) < FILES_MAX:
            flags = FLAG_MMAP if at.in_place else kind & 1
            yield lambda e: e.create_file(at.vm, PAGES * PAGE_SIZE, flags)

    def close_file(self, which: int) -> Script:
        files = list(self.world.core.files.all())
        if files:
            file = files[which % len(files)].info
            with self.world.contents.losing(file.vm):
                yield lambda e: e.close_file(file.file)

    def add_slot(self, which: int, page: int, n: int, kind: int) -> Script:
        at, files = self._target(which), list(self.world.core.files.all())
        if at is None or not files:
            return
        own = [f for f in files if f.info.vm == at.vm] or files
        file = own[kind % len(own)].info
        n = min(n, file.size_pages - page % file.size_pages)
        gpa = (GFN + (0, 16, 32)[kind % 3]) * PAGE_SIZE
        flags = GUEST_MEMFD if at.private_memory else 0
        offset = page % file.size_pages * PAGE_SIZE
        with self.world.contents.losing(at.vm):
            yield lambda e: e.set_memory_region(
                at.vm, kind % 3, flags, gpa, n * PAGE_SIZE, file.file, offset
            )

    def delete_slot(self, which: int, kind: int) -> Script:
        at = self._target(which)
        if at is None:
            return
        flags = GUEST_MEMFD if at.private_memory else 0
        vm = self.world.core.vms.get(at.vm)
        numbers = [number for number, _ in vm.slots.items()] or [0]
        slot = numbers[kind % len(numbers)]
        with self.world.contents.losing(at.vm):
            yield lambda e: e.set_memory_region(at.vm, slot, flags, at.gpa(0), 0)
        if kind & 1:
            yield lambda e: e.set_memory_region(
                at.vm, slot, flags, at.gpa(0), at.pages * PAGE_SIZE, at.file, 0
            )

    # --- pages ---------------------------------------------------------------------------------
    def allocate(self, which: int, page: int, n: int) -> Script:
        at = self._target(which)
        if at is not None:
            page, n = self._range(at, page, n)
            yield lambda e: e.fallocate(at.file, KEEP, page * PAGE_SIZE, n * PAGE_SIZE)

    def punch(self, which: int, page: int, n: int) -> Script:
        at = self._target(which)
        if at is None:
            return
        page, n = self._range(at, page, n)
        with self.world.contents.touching(self._pages(at, page, n)):
            yield lambda e: e.fallocate(at.file, PUNCH, page * PAGE_SIZE, n * PAGE_SIZE)

    def convert(self, which: int, page: int, n: int, flag: int) -> Script:
        at = self._target(which)
        if at is None:
            return
        page, n = self._range(at, page, n)
        private = not self._is_private(at, page) if flag else bool(which & 1)
        with self.world.contents.touching(self._converted(at, page, n)):
            yield self._convert(at, page, n, private)

    def _converted(self, at: Target, page: int, n: int) -> list[Page]:
        """Return the pages whose bytes a conversion may cost: a failed hook may cost any."""
        lost = at.platform in FORGETFUL or self.world.shape.hostile
        return self._pages(at, page, n) if lost else []

    def _convert(self, at: Target, page: int, n: int, private: bool) -> Callable[[Engine], Any]:
        attributes, size = 8 if private else 0, n * PAGE_SIZE
        if at.in_place:
            return lambda e: e.convert_file(at.file, page * PAGE_SIZE, size, attributes)
        return lambda e: e.set_attributes(at.vm, [(at.gpa(page), size, attributes)])

    def pre_fault(self, which: int, page: int, n: int) -> Script:
        at = self._target(which)
        if at is not None:
            cancelled = self.world.cancelled()
            yield lambda e: e.pre_fault(
                at.vm, at.gpa(page), n * PAGE_SIZE, traced=bool(which & 1), cancelled=cancelled
            )

    def populate(self, which: int, page: int, n: int, value: int) -> Script:
        at = self._target(which)
        if at is None:
            return
        page, n = self._range(at, page, n)
        rows = make_rows(Pattern.WORDS, value, pages(at.gfn + page, n))
        with self.world.contents.writing(self._pages(at, page, n, private=True), value) as wrote:
            yield lambda e: e.populate(at.vm, at.gpa(page), rows.tobytes(), 1, bool(which & 1))
            wrote.done = True

    def finalize(self, which: int) -> Script:
        at = self._target(which)
        if at is not None:
            yield lambda e: e.finalize(at.vm)

    def set_policy(self, which: int, page: int, n: int, kind: int) -> Script:
        at = self._target(which)
        if at is not None:
            page, n = self._range(at, page, n)
            nodes = (kind % self.world.shape.nnodes,)
            yield lambda e: e.set_policy(
                at.file, page * PAGE_SIZE, n * PAGE_SIZE, POLICIES[kind % 4], nodes
            )

    # --- the guest -----------------------------------------------------------------------------
    def guest_write(self, which: int, flag: int, page: int, n: int, value: int) -> Script:
        at = self._target(which)
        if at is None:
            return
        page, n = self._range(at, page, n)
        n, private = self._alike(at, page, n)
        write = self._words(Opcode.WRITE, at, page, n, private, value)
        with self.world.contents.writing(self._pages(at, page, n, private), value) as wrote:
            exited = yield from self._run(at, flag, (write,))
            wrote.done = exited is not None and exited.reason.name == "HLT"

    def guest_check(self, which: int, flag: int, page: int, n: int) -> Script:
        at = self._target(which)
        if at is not None:
            page, n = self._range(at, page, n)
            n, private = self._alike(at, page, n)
            yield from self.verify(at, flag, self._pages(at, page, n, private))

    def verify(self, at: Target, index: int, wanted: list[Page]) -> Script:
        """Have a guest compare pages with what is known of them."""
        # a page has two halves with bytes of their own; the guest reaches the one that counts
        private = {page: self._is_private(at, page[1] - at.gfn) for page in wanted}
        there = [page for page in wanted if at.in_place or page[2] == private[page]]
        expected = self.world.contents.begin_check(there)
        programme = [
            self._words(Opcode.CHECK, at, page[1] - at.gfn, 1, private[page], seed)
            for page, seed in expected.values.items()
        ]
        if not programme:
            return
        exited = yield from self._run(at, index, tuple(programme))
        if exited is None or exited.reason.name != "HLT":
            return
        sure = self.world.contents.undisturbed(expected)
        if len(sure) == len(expected.values):
            self.world.contents.verified += len(sure)
            if exited.vcpu.mismatched:
                where = exited.vcpu.first_mismatch
                self.world.violated(f"vm/{at.vm} reads other bytes than it wrote at {where:#x}")

    def guest_call(self, which: int, flag: int, page: int, n: int, kind: int) -> Script:
        at = self._target(which)
        if at is None:
            return
        page, n = self._range(at, page, n)
        opcode = CALLED[kind % len(CALLED)]
        call = Instruction(opcode, at.gpa(page), n * PAGE_SIZE, private=bool(kind & 32))
        with self.world.contents.touching(self._pages(at, page, n)):
            exited = yield from self._run(at, flag, (call,), lazy=False)
            if exited is not None and exited.reason.name == "HYPERCALL":
                # the VMM does what the guest asks for; whoever runs the vCPU next lets it go on
                yield self._convert(at, page, n, exited.value == 8)

    def guest_spin(self, which: int, flag: int, page: int) -> Script:
        """Have a vCPU go round until it is told to come back."""
        at = self._target(which)
        if at is None:
            return
        touch = Instruction(
            Opcode.TOUCH, at.gpa(page), PAGE_SIZE, private=self._is_private(at, page)
        )
        loop = Instruction(Opcode.LOOP, value=0, times=5 + which % 20)
        yield from self._run(at, flag, (touch, loop))

    def guest_io(self, which: int, flag: int, page: int, value: int) -> Script:
        at = self._target(which)
        if at is None:
            return
        private, cancelled = self._is_private(at, page), self.world.cancelled()
        if which & 1:
            yield lambda e: e.read_guest(at.vm, flag, at.gpa(page), 64, private, cancelled)
            return
        with self.world.contents.touching(self._pages(at, page, 1, private)):
            data = bytes([value]) * 64
            yield lambda e: e.write_guest(at.vm, flag, at.gpa(page), data, private, cancelled)

    def _words(
        self, opcode: Opcode, at: Target, page: int, n: int, private: bool, seed: int
    ) -> Instruction:
        length = n * PAGE_SIZE
        return Instruction(
            opcode, at.gpa(page), length, pattern=Pattern.WORDS, value=seed, private=private
        )

    def _run(
        self, at: Target, index: int, programme: tuple[Instruction, ...], lazy: bool = True
    ) -> Generator[Callable[[Engine], Any], Any, Any]:
        # a VMM gives a vCPU one thing to do at a time
        if (at.vm, index) in self._vcpus:
            return None
        self._vcpus.add((at.vm, index))
        try:
            yield lambda e: e.set_programme(at.vm, index, programme, lazy)
            return (yield self._running(at, index))
        finally:
            self._vcpus.discard((at.vm, index))

    def _running(self, at: Target, index: int) -> Callable[[Engine], Any]:
        cancelled = self.world.cancelled()
        return lambda e: e.run_vcpu(at.vm, index, cancelled=cancelled)

    # --- the host's mapping and pins -------------------------------------------------------------
    def host_write(self, which: int, page: int, n: int, value: int) -> Script:
        at = self._target(which)
        if at is None:
            return
        page, n = self._range(at, page, n)
        cancelled = self.world.cancelled()
        with self.world.contents.touching(self._pages(at, page, n, private=False)):
            data = bytes([value]) * (n * PAGE_SIZE)
            yield lambda e: e.write_shared(
                at.file, page * PAGE_SIZE, data, at.owner.session, cancelled
            )

    def host_read(self, which: int, page: int, n: int) -> Script:
        at = self._target(which)
        if at is not None:
            page, n = self._range(at, page, n)
            cancelled = self.world.cancelled()
            yield lambda e: e.read_shared(
                at.file, page * PAGE_SIZE, n * PAGE_SIZE, at.owner.session, cancelled
            )

    def pin(self, which: int, page: int, n: int) -> Script:
        at = self._target(which)
        by = None if at is None else self._fellow(at, which // 8)
        if at is None or by is None:
            return
        page, n = self._range(at, page, n)
        owner = Owner(by.tenant, by.session) if which & 3 else Owner(by.tenant)
        cancelled = self.world.cancelled()
        yield lambda e: e.pin(
            at.file, page * PAGE_SIZE, n * PAGE_SIZE, "DMA", "device/1", owner, cancelled
        )

    def unpin(self, which: int) -> Script:
        pins = list(self.world.core.sessions.pins())
        if pins:
            yield lambda e: e.unpin(pins[which % len(pins)].pin)

    def get_pages(self, which: int, page: int, n: int) -> Script:
        at = self._target(which)
        by = None if at is None else self._fellow(at, which // 8)
        if at is not None and by is not None:
            page, n = self._range(at, page, n)
            owner = Owner(by.tenant, by.session)
            pfns = yield lambda e: e.get_pages(at.file, page * PAGE_SIZE, n * PAGE_SIZE, owner)
            self.world.got.append((pfns, owner))

    def put_pages(self, which: int) -> Script:
        if self.world.got:
            pfns, owner = self.world.got.pop(which % len(self.world.got))
            yield lambda e: e.put_pages(pfns, owner)

    # --- the host ------------------------------------------------------------------------------
    def migrate(self, which: int, page: int, n: int, kind: int) -> Script:
        owned = np.flatnonzero(self.world.core.host.owner.view != 0)
        if owned.size:
            at = (which * PAGES + page) % owned.size
            node = kind % self.world.shape.nnodes if kind & 64 else None
            yield lambda e: e.migrate(owned[at : at + n].astype(np.int64), node)

    def compact(self, which: int) -> Script:
        yield lambda e: e.compact(which % self.world.shape.nnodes)

    def offline(self, pfn: int, n: int) -> Script:
        pfn %= self.world.shape.nframes - PAGES
        yield lambda e: e.offline(pfn, n)
        self.world.offlined.append((pfn, n))

    def online(self, which: int) -> Script:
        if self.world.offlined:
            pfn, n = self.world.offlined.pop(which % len(self.world.offlined))
            yield lambda e: e.online(pfn, n)

    def poison(self, pfn: int) -> Script:
        """The memory fails under a frame; a VM may die of it, and its page is lost."""
        pfn %= self.world.shape.nframes
        number = self.world.core.host.owner.at(pfn)
        there = number and self.world.core.files.exists(number)
        hit = [self.world.core.files.get(number).info.vm] if there else []
        self.world.struck["poison"] += 1
        with self.world.contents.losing(*hit):
            yield lambda e: e.poison(pfn)

    def poison_owned(self, which: int, page: int) -> Script:
        owned = np.flatnonzero(self.world.core.host.owner.view != 0)
        if owned.size and self.world.struck["poison"] < self.world.poison_max:
            yield from self.poison(int(owned[(which * PAGES + page) % owned.size]))

    def physical(self, pfn: int, kind: int) -> Script:
        """The host reads anything, and writes to what nobody owns."""
        pfn %= self.world.shape.nframes
        agent = (Agent.HOST_USER, Agent.DEVICE)[kind & 1]
        if kind & 2 and not self.world.core.host.owner.at(pfn):
            yield lambda e: e.write_physical(pfn, b"x" * PAGE_SIZE, agent)
        else:
            yield lambda e: e.read_physical(pfn, 1, agent)

    def swap(self, which: int, kind: int) -> Script:
        at = self._target(which)
        if at is not None:
            offers = self.world.core.registry.offers
            kin = [name for name in sorted(offers) if offers[name].platform == at.platform]
            yield lambda e: e.swap_consumer(at.vm, kin[kind % len(kin)] if kind & 1 else "")

    def check(self) -> Script:
        yield self.world.checked

    # --- page fault handlers -------------------------------------------------------------------
    def register_pager(self, which: int, page: int, n: int) -> Script:
        at = self._target(which)
        by = None if at is None else self._fellow(at, which // 8)
        if at is not None and by is not None:
            page, n = self._range(at, page, n)
            yield lambda e: e.register_userfault(at.file, page, n, by.session)

    def unregister_pager(self, which: int) -> Script:
        ranges = list(self.world.core.userfaults.all())
        if ranges:
            one = ranges[which % len(ranges)]
            yield lambda e: e.unregister_userfault(one.userfault, one.session)

    def page_in(self, which: int, kind: int) -> Script:
        """A handler takes what it is to resolve, and resolves it as it likes, or only partly."""
        sessions = sorted({one.session for one in self.world.core.userfaults.all()})
        if not sessions:
            return
        session = sessions[which % len(sessions)]
        told = yield lambda e: e.take_userfaults(session)
        for message in told or (yield lambda e: e.pending_userfaults(session)):
            if message.kind != FAULT:
                continue
            file, pgoff, n = message.file, message.pgoff, message.npages
            try:
                if message.private or kind % 3 == 0:
                    private = message.private
                    yield lambda e: e.userfault_continue(file, pgoff, n, private, session)  # noqa: B023
                elif kind % 3 == 1:
                    yield lambda e: e.userfault_zeropage(file, pgoff, n, session)  # noqa: B023
                else:
                    data = bytes(n * PAGE_SIZE)
                    yield lambda e: e.userfault_copy(file, pgoff, data, session)  # noqa: B023
            except RmemError:
                # it came too late, as pagers do
                yield lambda e: e.userfault_wake(file, pgoff, n, session)  # noqa: B023
