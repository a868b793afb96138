"""The engine's core: the state with its stores, and the transactions by which it changes.

Owns ``Core``, which every operation is written against; ``driver`` is how operations run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from rmemd.consumers.guard import Consumer, Guard
from rmemd.consumers.registry import Registry
from rmemd.engine import reopen
from rmemd.engine.answered import Answered
from rmemd.engine.calls import Calls
from rmemd.engine.driver import Driver, Step, Steps
from rmemd.engine.faultrules import FaultRules
from rmemd.engine.journal import Journal
from rmemd.engine.listeners import Listeners
from rmemd.engine.notes import Notes
from rmemd.engine.pendingfaults import PendingFaults
from rmemd.engine.quotas import Quotas
from rmemd.engine.ranges import Ranges
from rmemd.engine.sharedmemory import SharedMemory
from rmemd.engine.waits import GaveUp, Retry, Waits
from rmemd.errors import NO_SUCH_VM
from rmemd.hooks.tables import Space
from rmemd.hooks.tx import Held, Tx
from rmemd.model.buddy import give
from rmemd.model.files import Files, RestrictedFile
from rmemd.model.host import ARENA, Host, Stored, Use
from rmemd.model.ledger import Ledger
from rmemd.model.sessions import Sessions
from rmemd.model.userfaults import Userfaults
from rmemd.model.vms import Vcpu, Vm, Vms
from rmemd.store.controller import Contents, MemoryController, page_sums
from rmemd.store.keeping import ARENA as ARENA_NAME
from rmemd.store.keeping import Keeping
from rmemd.store.memfd import Memfd
from rmemd.store.system import SYSTEM, System
from rmemd.units import I64, U8

if TYPE_CHECKING:
    from rmemd.engine.invariants import Part
    from rmemd.engine.monitors import Monitors

T = TypeVar("T")
# byte work up to this many pages is done under the lock: letting go would cost more
INLINE_PAGES = 8
# the options that a log was written under
FACTS = ("nframes", "nnodes", "seed", "binding_overlap_errno")


class Options(Struct, frozen=True):
    """What an engine is made with.

    Attributes:
        binding_overlap_errno: EEXIST (17) as Linux 7.2, or EINVAL (22) as up to 7.1.
        inline_pages: byte work up to this many pages is done under the lock.
        kept_records: journal records kept in memory too, None for all.
        system: makes the system calls about memfds.
        journalled: whether there is a log, from which the state can be had back.
        life: names the memory: what lives and dies with it, whoever runs the engine.
        plugins: entry points to load beside the installed ones.
    """

    nframes: int
    nnodes: int = 1
    seed: int = 0
    binding_overlap_errno: int = 22
    inline_pages: int = INLINE_PAGES
    kept_records: int | None = 0
    system: System = SYSTEM
    journalled: bool = False
    life: str = ""
    plugins: tuple[EntryPoint, ...] = ()

    @property
    def facts(self) -> dict[str, int]:
        """Return what a log is of: with other options it would mean another state."""
        return {name: getattr(self, name) for name in FACTS}


class _Transaction:
    """The block in which a transaction is open."""

    __slots__ = ("_core", "_tx")

    def __init__(self, core: Core, label: str) -> None:
        self._core = core
        self._tx = Tx(core.space, label)

    def __enter__(self) -> Tx:
        return self._tx

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._core.commit(self._tx)
        else:
            self._core.undo(self._tx)


class Core(Driver):
    """State, stores and the rules by which they are changed.

    Attributes:
        answered: at which revision what each thread asked was carried out.
        leaving: VMs whose session ends; their vCPUs exit.
        read_only: why no caller may change anything, "" where they may.
        quotas: the limits of tenants.
        listeners: who is told of what happens to a session.
        watched: who watched last, with what was found.
        parts: what ``engine.invariants`` checks beside its own, from those above the engine.
        shared: the shared memfds of files, and the spare ones.
        scrubbed_frames: frames whose bytes were destroyed since the start; a measure, not state.
        waits: who waits for whom.
    """

    def __init__(self, options: Options, guard: Guard, keeping: Keeping) -> None:
        super().__init__()
        self.keeping = keeping
        self.space = Space()
        opened = reopen.open_log(options.life, options.facts, keeping, options.journalled)
        self.life = opened.life
        self.options = options = replace(options, **opened.facts)
        self.journal = Journal(opened.log, opened.header, options.kept_records)
        self.notes = Notes(self.journal, self._lock)
        self.calls = Calls(self.notes)
        self.answered = Answered()
        self.read_back = reopen.read(opened, self.space, self.journal, self.notes)
        self.waits = Waits(self.journal)
        self.rules = FaultRules(options.seed)
        self.guard = guard
        guard.passages = self.rules
        self.consumers: dict[int, Consumer] = {}
        self.running: set[tuple[int, int]] = set()
        self.read_only = ""
        self.leaving: set[int] = set()
        self.quotas = Quotas()
        self.listeners = Listeners()
        self.watched: Monitors | None = None
        self.parts: list[Part] = []
        self.ranges = Ranges(self.waits, self.wake_waiting)
        self._scrub: list[I64] = []
        self._put_off: list[Callable[[], Steps[None]]] = []
        self.scrubbed_frames = 0
        self.shared = SharedMemory(keeping, self.notes, options.system)
        self.registry = Registry(self.space, guard, self)
        tx = Tx(self.space, "start", reopening=self.read_back is not None)
        self.host = Host(self.space, tx, options.nframes, options.nnodes)
        self.sessions = Sessions(tx)
        self.ledger = Ledger(self.host, self.sessions, tx)
        self.files = Files(self.space, tx)
        self.vms = Vms(self.space, tx)
        self.userfaults = Userfaults(tx)
        self.pending_faults = PendingFaults(self.userfaults)
        self.registry.load_installed(tx, options.nframes, options.plugins)
        self.controller = MemoryController(
            self.host, options.seed, keeping.take(ARENA_NAME), options.system
        )
        keeping.keep(ARENA_NAME, self.controller.arena_fd)
        self.journal.checkpoint = partial(reopen.checkpoint, self.space, self.journal, self.notes)
        if self.read_back is not None:
            reopen.resume_consumers(self, tx)
            self.calls.restore()
        if tx.redo:
            self.journal.append(tx)
            self.journal.flush()

    # --- transactions ------------------------------------------------------------------------
    def tx(self, label: str) -> _Transaction:
        """Open a transaction; commit it at the end of the block, undo it on any exception.

        Bytes that were named and not moved in a step are moved here, under the lock.
        """
        return _Transaction(self, label)

    def commit(self, tx: Tx) -> None:
        """Have a transaction be recorded, and those told who are told of each.

        Raises:
            BaseException: it cannot be, and is undone.
        """
        try:
            if tx.byte_ops:
                # what was named after the last step, or by an operation that has none
                self.controller.apply(tx, self._perform(tx))
            if self.tracer is not None:
                self.tracer.committing()
            self._freeze_overdue(tx)
            committed = bool(tx.redo or tx.events)
            if committed:
                self._name_tenants(tx)
                self.journal.append(tx)
        except BaseException:
            self.undo(tx)
            raise
        tx.views.clear()
        if committed:
            if self.tracer is not None:
                self.tracer.committed(tx)
            if self.watch is not None:
                self.watch.committed(tx)
            if self.pending_faults.waiting:
                self.pending_faults.settle()
        if tx.freed:
            self._scrub += tx.freed

    def undo(self, tx: Tx) -> None:
        """Take back a transaction; the bytes that it moved are destroyed later."""
        if tx in self.space.holders:
            tx.release()
        else:
            tx.rollback()
        tx.views.clear()
        self._put_off += [partial(self._empty, pfns) for pfns in tx.written]

    def _name_tenants(self, tx: Tx) -> None:
        """Have each event say whose it is, so that nobody else is told."""
        for _, fields in tx.events:
            if "tenant" not in fields:
                vm, file = fields.get("vm", 0), fields.get("file", 0)
                if vm and self.vms.exists(vm):
                    fields["tenant"] = self.vms.get(vm).info.owner.tenant
                elif file and self.files.exists(file):
                    fields["tenant"] = self.files.get(file).info.owner.tenant

    def at_once(self, act: Callable[[], T]) -> Steps[T]:
        """Do what never lets the lock go, again from the start while others are in its way."""
        while True:
            try:
                return act()
            except (Held, Retry) as met:
                on = self.waits.obstacle(met)
            yield Step("wait", wait=True, on=on)

    def unit(
        self, make: Callable[[], Steps[T]], give_up: Callable[[], bool] = lambda: False
    ) -> Steps[T]:
        """Run one transaction's steps, again from the start while others are in its way.

        Raises:
            GaveUp: ``give_up`` said so, after a wait.
        """
        while True:
            try:
                return (yield from make())
            except (Held, Retry) as met:
                on = self.waits.obstacle(met)
            if give_up():
                raise GaveUp
            yield Step("wait", wait=True, on=on)

    def write_in_place(self, tx: Tx, contents: Contents, raw: U8) -> dict[str, Any]:
        """Record a write into frames that somebody owns; ``store_in_place`` comes next.

        The sums say after a crash which of its pages the write had reached.

        Returns:
            What the frames held, for ``store_in_place``.
        """
        before = reopen.held(self.space, contents.pfns)
        self.controller.apply(tx, [contents])
        tx.in_place.append((contents.pfns, page_sums(raw)))
        return before

    def store_in_place(self, contents: Contents, raw: U8, before: dict[str, Any]) -> None:
        """Write the bytes of a write in place, after its record.

        Raises:
            OSError: the system refused; frames that were not reached hold what they held before.
        """
        self.journal.flush()
        try:
            self.controller.store_raw(contents.pfns, raw)
        except OSError:
            reopen.undo_in_place(self, "write that failed", contents.pfns, page_sums(raw), before)
            raise

    def scrub_later(self, pfns: I64) -> None:
        """Have frames that are recorded as freed be destroyed by the next ``scrub``."""
        if pfns.size:
            self._scrub.append(pfns)

    def destroy(self, then: Callable[[], Steps[None]]) -> Steps[None]:
        """Destroy bytes as a record says; if the system refuses, the next operation tries again.

        What the record decided stands, so its caller is not refused on that account. ``then``
        looks at the state anew each time.
        """
        try:
            yield from then()
        except OSError:
            self._put_off.append(then)

    def _empty(self, pfns: I64) -> Steps[None]:
        """Destroy bytes of a transaction that was undone, in frames that nobody owns."""

        def one() -> Steps[None]:
            yield from ()
            strays = pfns[(self.host.flags.get(pfns) & ARENA) == 0]
            with self.tx("bytes of what was undone") as tx:
                # whoever takes one of them at this moment is waited for; nothing is recorded
                tx.put(self.host.use, strays, self.host.use.get(strays))
                self.controller.punch(strays)
                tx.rollback()

        yield from self.unit(one)

    def scrub(self) -> Iterable[Step]:
        """Destroy the bytes of frames whose freeing is recorded, then give the frames back.

        If the system refuses, the next operation tries again; nobody gets the frames until then.
        """
        # most of the time there are none, and the steps of nothing cost as much as a look-up
        return self._scrubbed() if self._scrub or self._put_off else ()

    def _scrubbed(self) -> Steps[None]:
        put_off, self._put_off = self._put_off, []
        for then in put_off:
            yield from self.destroy(then)
        while self._scrub:
            pfns = self._scrub.pop()
            try:
                yield Step("scrub", work=partial(self.controller.punch, pfns))
            except OSError:
                self._scrub.append(pfns)
                return
            self.scrubbed_frames += pfns.size
            yield from self.unit(partial(self._give_back, pfns))

    def _give_back(self, pfns: I64) -> Steps[None]:
        yield from ()
        with self.tx("scrub") as tx:
            tx.put(self.host.flags, pfns, self.host.flags.get(pfns) & ~ARENA)
            # what the host wrote to them since they were freed is destroyed too
            written = pfns[self.host.stored.get(pfns) != Stored.RAW_ZERO]
            tx.put(self.host.stored, written, int(Stored.RAW_ZERO))
            bad = self.host.poisoned(pfns)
            tx.put(self.host.use, pfns[bad], int(Use.POISONED))
            give(self.host, tx, pfns[~bad])

    def _freeze_overdue(self, tx: Tx) -> None:
        while self.guard.overdue:
            vm, where, took = self.guard.overdue.pop()
            if self.vms.exists(vm) and self.vms.get(vm).info.state != "dead":
                text = f"{where} took {took:.1f} s"
                self.vms.update(tx, self.vms.get(vm), state="frozen", dead_reason=text)
                tx.emit("vm_frozen", vm=vm, reason=text)

    # --- vCPUs in and out of the guest ---------------------------------------------------------
    def enter(self, tx: Tx, vm: Vm, index: int) -> Vcpu:
        """Have a vCPU enter the guest if it is outside; the vendor may refuse."""
        vcpu = vm.vcpu(index)
        if vcpu.inside:
            return vcpu
        consumer = self.consumer(vm)
        if consumer.ops.enter is not None:
            consumer.call(tx, "enter", index)
        vcpu = replace(vcpu, inside=True)
        tx.set(vm.vcpus, index, vcpu)
        return vcpu

    def leave(self, tx: Tx, vm: Vm, index: int) -> None:
        """Have a vCPU that is in the guest leave it."""
        consumer = self.consumer(vm)
        if consumer.ops.leave is not None:
            consumer.call(tx, "leave", index)
        tx.set(vm.vcpus, index, replace(vm.vcpu(index), inside=False))

    # --- objects beside the tables -----------------------------------------------------------
    def consumer(self, vm: Vm) -> Consumer:
        """Return a VM's consumer."""
        return self.consumers[vm.info.vm]

    def shared_memory(self, file: RestrictedFile) -> Memfd:
        """Return a file's shared memfd, made when it is first needed."""
        number = file.info.file
        memfd = self.shared.of(number, file.info.size_pages)
        return memfd if self.tracer is None else self.tracer.shared(number, memfd)

    def has_shared_memory(self, file: RestrictedFile) -> bool:
        """Return whether anything was ever shared of a file."""
        return self.shared.has(file.info.file)

    def close(self) -> None:
        """Let go of every memfd; what is kept of them is somebody else's."""
        self.shared.close()
        self.controller.close()
        self.journal.close()

    # --- what hooks may ask ------------------------------------------------------------------
    def kick(self, tx: Tx, vm: int) -> None:
        """Have the VM's vCPUs leave the guest; they stand between two steps, so at once."""
        found = self.vms.get(vm)
        for index, vcpu in found.vcpus.items():
            if vcpu.inside:
                self.leave(tx, found, index)
            else:
                # held until the transaction ends: it must not enter on the state before
                tx.set(found.vcpus, index, vcpu)

    def vcpu_count(self, vm: int) -> int:
        """Count the VM's vCPUs."""
        if not self.vms.exists(vm):
            raise NO_SUCH_VM(f"vm/{vm} does not exist")
        return len(self.vms.get(vm).vcpus)

    def kill(self, tx: Tx, vm: int, reason: str) -> None:
        """Mark the VM dead."""
        kill(self, tx, self.vms.get(vm), reason)

    def injected(self, tx: Tx, vm: int, point: str) -> str:
        """Return what a fault rule says should go wrong at a point now."""
        return self.rules.passage(vm, point)


def kill(core: Core, tx: Tx, vm: Vm, reason: str) -> None:
    """Mark a VM dead (kvm_vm_dead): from now on it can only be destroyed."""
    core.vms.update(tx, vm, state="dead", dead_reason=reason)
    tx.emit("vm_died", vm=vm.info.vm, reason=reason)


def private_key(core: Core, vm: Vm) -> int:
    """Return the key that the VM's private accesses go through."""
    key: Any = core.host.vm_keys.get(vm.info.vm, 0)
    return int(key)
