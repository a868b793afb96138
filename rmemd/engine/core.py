"""The engine's core: the lock, transactions and steps.

Owns ``Core``, which every operation is written against. An operation is a generator: it runs under
the lock and yields a ``Step`` where the lock may be let go: to move bytes, to let others in, or to
wait. ``Core.run`` drains one; a simulation could interleave several, and a test can hold one
between two steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from rmemd.consumers.guard import Consumer, Guard
from rmemd.consumers.registry import Registry
from rmemd.engine import reopen
from rmemd.engine.answered import Answered
from rmemd.engine.calls import Calls, Run, looked_up, named
from rmemd.engine.cancel import Cancelled, never
from rmemd.engine.fairlock import FairLock
from rmemd.engine.faultrules import FaultRules
from rmemd.engine.journal import Journal
from rmemd.engine.listeners import Listeners
from rmemd.engine.notes import Notes
from rmemd.engine.pendingfaults import PendingFaults
from rmemd.engine.quotas import Quotas
from rmemd.engine.ranges import Ranges
from rmemd.engine.tracing import Tracer
from rmemd.engine.waits import GaveUp, Operation, Retry, WaitFor, Waits
from rmemd.errors import NO_SUCH_VM
from rmemd.hooks.tables import Space
from rmemd.hooks.tx import Held, Tx
from rmemd.model.buddy import give
from rmemd.model.files import Files, RestrictedFile
from rmemd.model.host import ARENA, Host, Use
from rmemd.model.ledger import Ledger
from rmemd.model.sessions import Sessions
from rmemd.model.userfaults import Userfaults
from rmemd.model.vms import Vcpu, Vm, Vms
from rmemd.store.controller import Contents, MemoryController, page_sums
from rmemd.store.keeping import ARENA as ARENA_NAME
from rmemd.store.keeping import Keeping, file_name
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


@dataclass
class Step:
    """A place where the lock may be let go.

    ``tx`` set: its byte operations (and ``work``, which answers with contents) are done without
    the lock, with the transaction suspended. ``work`` alone: done without the lock. Neither: a
    pause, named so that a test can hold the operation there. ``wait``: wait until something
    changed; ``on`` tells the wait graph what for. An ``interruptible`` one says in ``cancelled``
    that the caller has gone, instead of waiting on. A fault rule can delay it by its ``name``
    (``faultrules.at_step``) and ``vm``, 0 where it is of none. The rest is what came of it:
    ``delay_seconds`` of fault rules, and the ``contents`` that its work made of frames.
    """

    name: str
    tx: Tx | None = None
    work: Callable[[], list[Contents] | None] | None = None
    wait: bool = False
    on: WaitFor | None = None
    interruptible: bool = False
    cancelled: bool = False
    vm: int = 0
    delay_seconds: float = 0
    contents: list[Contents] = field(default_factory=list)


Steps = Generator[Step, None, T]


@dataclass(frozen=True)
class _Decided:
    result: Any
    then: Callable[[], Steps[None]]


def decided(result: T, then: Callable[[], Steps[None]]) -> T:
    """Return what an operation came to, with what is still to be destroyed on account of it.

    Only an operation's own return can be this. The result is noted with the record that decides
    it, before the destruction, which lets the lock go. A restart finds in the state what was not
    destroyed (``reopen.settle``).
    """
    return cast("T", _Decided(result, then))


@dataclass(frozen=True)
class Call(Generic[T]):
    """What ``Core.run`` was asked for; the attributes are its arguments."""

    operation: Callable[[], Steps[T]]
    who: str
    made_by: object
    cancelled: Callable[[], bool]
    run: Run | None = None


@dataclass(frozen=True)
class Options:
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


class Core:
    """State, stores and the rules by which they are changed.

    Attributes:
        answered: at which revision what each thread asked was carried out.
        leaving: VMs whose session ends; their vCPUs exit.
        read_only: why no caller may change anything, "" where they may.
        quotas: the limits of tenants.
        listeners: who is told of what happens to a session.
        drive: runs an operation to its end, and returns its result; ``stepwise`` interleaves
            several instead.
        watch: told of every transaction, while somebody watches (``engine.monitors``).
        watched: who watched last, with what was found.
        parts: what ``engine.invariants`` checks beside its own, from those above the engine.
        hold: told of each step between two transactions; a test holds operations there.
        tracer: told of the operations while they are recorded or replayed.
        breathe: called in a pause, without the lock; the daemon lets other threads in there.
        pause: called with seconds where a fault rule delays a step, without the lock; nothing here
            has a clock.
        scrubbed_frames: frames whose bytes were destroyed since the start; a measure, not state.
        waits: who waits for whom.
        wakes: how often those who wait were told to look again; a measure, not state.
    """

    def __init__(self, options: Options, guard: Guard, keeping: Keeping) -> None:
        self._lock = FairLock()
        self._changed = threading.Condition(cast("threading.RLock", self._lock))
        self.keeping = keeping
        self.space = Space()
        opened = reopen.open_log(options.life, options.facts, keeping, options.journalled)
        self.life = opened.life
        self.options = options = replace(options, **opened.facts)
        self.journal = Journal(opened.log, opened.header, options.kept_records)
        self.notes = Notes(self.journal, self._changed)
        self.calls = Calls(self.notes)
        self.answered = Answered()
        self.read_back = reopen.read(opened, self.space, self.journal, self.notes)
        self.waits = Waits(self.journal)
        self.wakes = 0
        self.rules = FaultRules(options.seed)
        self.guard = guard
        self.consumers: dict[int, Consumer] = {}
        self.running: set[tuple[int, int]] = set()
        self.draining = False
        self.read_only = ""
        self.leaving: set[int] = set()
        self.quotas = Quotas()
        self.listeners = Listeners()
        self.drive: Callable[[Call[Any]], Any] = self.drain
        self.watch: Monitors | None = None
        self.watched: Monitors | None = None
        self.parts: list[Part] = []
        self.hold: Callable[[str], None] | None = None
        self.tracer: Tracer | None = None
        self.breathe: Callable[[], None] = lambda: None
        self.pause: Callable[[float], None] = lambda seconds: None
        self.ranges = Ranges(self.waits, self.wake_waiting)
        self._scrub: list[I64] = []
        self.scrubbed_frames = 0
        self._shared: dict[int, Memfd] = {}
        self.registry = Registry(self.space, guard, self)
        tx = Tx(self.space, "start", reopening=self.read_back is not None)
        self.host = Host(self.space, tx, options.nframes, options.nnodes)
        self.ledger = Ledger(self.host, tx)
        self.files = Files(self.space, tx)
        self.vms = Vms(self.space, tx)
        self.sessions = Sessions(tx)
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

    # --- running operations ------------------------------------------------------------------
    def run(
        self,
        operation: Callable[[], Steps[T]],
        who: str = "",
        named_by: object = None,
        cancelled: Callable[[], bool] = never,
        repeatable: bool = False,
    ) -> T:
        """Run an operation to its end and return its result.

        Args:
            operation: makes its steps.
            who: its name in the wait graph; default: "call N" and the method of the engine that
                made ``named_by`` (default: ``operation``).
            named_by: see ``who``.
            cancelled: whether the caller has gone; a wait that can be interrupted then is. Unless
                it is a ``Cancelled``, whoever makes it true must call ``wake``.
            repeatable: whether a repeat of the call that it is made for just runs again, instead
                of being told what it came to (``calls``).
        """
        run = None if repeatable else self.calls.next_run()
        known = None if run is None else self.calls.known(run)
        if known is not None:
            result, self.answered.revision = known
            return cast("T", looked_up(self, result))
        return cast("T", self.drive(Call(operation, who, named_by or operation, cancelled, run)))

    def drain(self, call: Call[T]) -> T:
        """Run an operation to its end in the calling thread: what ``drive`` is by default."""
        with self._changed:
            before = self.waits.current
            mine = self.waits.begin(call.who, call.made_by)
            if self.tracer is not None:
                self.tracer.begun(mine)
            mine.run = call.run
            steps = self.and_scrub(call.operation)
            try:
                step = next(steps)
                while True:
                    step = self._take(steps, step, mine, call.cancelled)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                steps.close()
                if self.tracer is not None:
                    self.tracer.ended(mine)
                self.waits.end(mine, before)
                self.wake_waiting()
                self.answered.revision = mine.ended_at
                self.journal.settle()

    def and_scrub(self, operation: Callable[[], Steps[T]]) -> Steps[T]:
        """Run an operation, then give back what it freed, even if it was refused in the end.

        What it came to is noted first, so that this goes with its last record.
        """
        before = self.journal.revision
        try:
            result = yield from operation()
        except Exception:
            self.waits.current.ended_at = self.journal.revision
            yield from self.scrub()
            raise
        self.waits.current.ended_at = self.journal.revision
        then = None
        if isinstance(result, _Decided):
            result, then = result.result, result.then
        run = self.waits.current.run
        if run is not None and self.journal.revision != before:
            self.calls.came_to(run, named(result), self.journal.revision)
        if then is not None:
            yield from then()
        yield from self.scrub()
        return result

    def got_before(self) -> int:
        """Return how far the present run got when it was made before, 0 if it was not."""
        run = self.waits.current.run
        return 0 if run is None else self.calls.got_before(run)

    def got_to(self, done: int) -> None:
        """Note how far the present run has got, in the frame of its last record."""
        run = self.waits.current.run
        if run is not None:
            self.calls.got_to(run, done)

    def read(self, query: Callable[[], T]) -> tuple[int, T]:
        """Run a query under the lock; return the revision it saw, and its result."""
        with self._changed:
            revision = self.answered.revision = self.journal.revision
            return revision, query()

    def wait_for_revision(self, revision: int, timeout: float) -> int:
        """Wait until the revision is past ``revision``; return the present one."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.journal.revision > revision or self.draining, timeout
            )
            return self.journal.revision

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, for who advances an operation step by step."""
        with self._changed:
            yield

    def wake(self) -> None:
        """Have everybody who waits look again."""
        with self._changed:
            self.wake_waiting()

    def is_locked(self) -> bool:
        """Return whether the calling thread holds the lock, as it does in a step."""
        return self._lock.is_owned()

    def wake_waiting(self) -> None:
        """Have everybody who waits look again, from within an operation."""
        self.wakes += 1
        self._changed.notify_all()

    def _take(
        self, steps: Steps[T], step: Step, mine: Operation, cancelled: Callable[[], bool]
    ) -> Step:
        try:
            if not self.done_at_once(step, cancelled):
                with self.away(step, mine):
                    if step.wait:
                        self._changed.wait()
                    else:
                        with self._unlocked():
                            self.work(step)
                self.come_back(step)
        except Exception as error:
            self.waits.current = mine
            return steps.throw(error)
        # others ran while the lock was let go
        self.waits.current = mine
        return steps.send(None)

    def done_at_once(self, step: Step, cancelled: Callable[[], bool]) -> bool:
        """Do a step that does not let the lock go: few bytes, or a wait whose caller has gone."""
        if step.wait:
            step.cancelled = step.interruptible and self._has_gone(cancelled)
            return step.cancelled
        step.delay_seconds = self.rules.delay(step.vm, step.name)
        tx = step.tx
        if tx is None or step.work is not None or self.hold is not None or step.delay_seconds:
            return False
        if sum(op.pfns.size for op in tx.byte_ops) > self.options.inline_pages:
            return False
        self.controller.apply(tx, self._perform(tx))
        return True

    @contextmanager
    def away(self, step: Step, mine: Operation) -> Iterator[None]:
        """Have others meet an operation as they do while its step lets the lock go."""
        self.journal.flush()
        try:
            if step.wait:
                with self.waits.waiting(mine, step.on or WaitFor("", step.name)):
                    yield
            elif step.tx is None:
                yield
            else:
                step.tx.suspend()
                with self.waits.holding(step.tx):
                    yield
        finally:
            if self.tracer is not None:
                self.tracer.resumed(mine, step)

    def work(self, step: Step) -> None:
        """Do a step's own work, for which the lock is not needed."""
        if self.hold is not None:
            self.hold(step.name)
        if step.delay_seconds:
            self.pause(step.delay_seconds)
        if step.tx is not None:
            step.contents += self._perform(step.tx)
        if step.work is not None:
            step.contents += step.work() or []
        elif step.tx is None:
            self.breathe()

    def come_back(self, step: Step) -> None:
        """Go on after a step, under the lock: what its transaction did counts again."""
        if step.tx is not None:
            step.tx.resume()
            self.controller.apply(step.tx, step.contents)

    def _has_gone(self, cancelled: Callable[[], bool]) -> bool:
        # subscribed before asked, so that a caller who goes in between is not missed
        if isinstance(cancelled, Cancelled):
            cancelled.wake(self.wake)
        return cancelled()

    def _perform(self, tx: Tx) -> list[Contents]:
        """Do the byte work that a transaction has named and that is not done yet."""
        if self.watch is not None:
            self.watch.moving(tx)
        contents = self.controller.perform(tx.byte_ops)
        tx.byte_ops.clear()
        return contents

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        self.wake_waiting()
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()

    # --- transactions ------------------------------------------------------------------------
    @contextmanager
    def tx(self, label: str) -> Iterator[Tx]:
        """Open a transaction; commit it at the end of the block, undo it on any exception.

        Bytes that were named and not moved in a step are moved here, under the lock.
        """
        tx = Tx(self.space, label)
        try:
            yield tx
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
            if tx in self.space.holders:
                tx.release()
            else:
                tx.rollback()
            raise
        if committed:
            if self.tracer is not None:
                self.tracer.committed(tx)
            if self.watch is not None:
                self.watch.committed(tx)
            if self.pending_faults.waiting:
                self.pending_faults.settle()
        self._scrub.extend(tx.freed)

    def _name_tenants(self, tx: Tx) -> None:
        """Have each event say whose it is, so that nobody else is told."""
        for _, fields in tx.events:
            if "tenant" not in fields:
                vm, file = fields.get("vm", 0), fields.get("file", 0)
                if vm and self.vms.exists(vm):
                    fields["tenant"] = self.vms.get(vm).info.owner.tenant
                elif file and self.files.exists(file):
                    fields["tenant"] = self.files.get(file).info.owner.tenant

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

    def scrub(self) -> Steps[None]:
        """Destroy the bytes of frames whose freeing is recorded, then give the frames back.

        If the system refuses, the next operation tries again; nobody gets the frames until then.
        """
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
        if number not in self._shared:
            name = file_name(number)
            kept = self.keeping.take(name)
            self._shared[number] = Memfd(
                f"rmemd-file-{number}", file.info.size_pages, kept, self.options.system
            )
            self.keeping.keep(name, self._shared[number].fd)
            self.notes.set(reopen.SHARED_MEMFDS, number, True, flush=False)
        memfd = self._shared[number]
        return memfd if self.tracer is None else self.tracer.shared(number, memfd)

    def has_shared_memory(self, file: RestrictedFile) -> bool:
        """Return whether anything was ever shared of a file."""
        return file.info.file in self._shared

    def shared_descriptors(self) -> dict[int, int]:
        """Return the descriptor of each shared memfd, by file."""
        return {file: memfd.fd for file, memfd in self._shared.items()}

    def forget_shared_memory(self, file: int) -> None:
        """Close a file's shared memfd; what clients have mapped stays theirs."""
        memfd = self._shared.pop(file, None)
        if memfd is not None:
            # its bytes go with the last descriptor: not before the record that says so
            self.notes.drop(reopen.SHARED_MEMFDS, file, flush=True)
            self.keeping.drop(file_name(file))
            memfd.close()

    def close(self) -> None:
        """Let go of every memfd; what is kept of them is somebody else's."""
        for memfd in self._shared.values():
            memfd.close()
        self._shared.clear()
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
