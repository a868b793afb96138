"""How operations are run: the lock, their steps, and where the lock is let go.

Owns ``Step`` and the driver. An operation is a generator: it runs under the lock and yields a
``Step`` where the lock may be let go: to move bytes, to let others in, or to wait. ``Driver.run``
drains one; a simulation interleaves several (``stepwise``), and a test can hold one between two
steps. Whatever was recorded is in the log before the lock goes, and before a caller is answered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

from msgspec import Struct, field

from rmemd.engine.answered import Answered
from rmemd.engine.calls import Calls, Run, looked_up, named
from rmemd.engine.cancel import Cancelled, never
from rmemd.engine.fairlock import FairLock
from rmemd.engine.faultrules import FaultRules
from rmemd.engine.journal import Journal
from rmemd.engine.tracing import Tracer
from rmemd.engine.waits import Operation, WaitFor, Waits
from rmemd.hooks.tx import Tx
from rmemd.store.controller import Contents, MemoryController

if TYPE_CHECKING:
    from rmemd.engine.core import Core, Options
    from rmemd.engine.monitors import Monitors

T = TypeVar("T")
# the movements that put bytes into the arena
MOVING = ("copy_in", "relocate")


class Step(Struct):
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


class _Decided(Struct, frozen=True):
    result: Any
    then: Callable[[], Steps[None]]


def decided(result: T, then: Callable[[], Steps[None]]) -> T:
    """Return what an operation came to, with what is still to be destroyed on account of it.

    Only an operation's own return can be this. The result is noted with the record that decides
    it, before the destruction, which lets the lock go. Reopening finds in the state what was
    not destroyed (``reopen.settle``).
    """
    return cast("T", _Decided(result, then))


class Call(Struct, Generic[T], frozen=True):
    """What ``Core.run`` was asked for; the attributes are its arguments."""

    operation: Callable[[], Steps[T]]
    who: str
    made_by: object
    cancelled: Callable[[], bool]
    run: Run | None = None


class Driver:
    """The half of the core that runs operations; ``Core`` has the state that they are about.

    Attributes:
        drive: runs an operation to its end, and returns its result; ``stepwise`` interleaves
            several instead.
        hold: told of each step between two transactions; a test holds operations there.
        tracer: told of the operations while they are recorded or replayed.
        breathe: called in a pause, without the lock; the daemon lets other threads in there.
        pause: called with seconds where a fault rule delays a step, without the lock; nothing here
            has a clock.
        watch: told of every transaction, while somebody watches (``engine.monitors``).
        draining: whether the daemon ends: who waits does not go on waiting.
        wakes: how often those who wait were told to look again; a measure, not state.
    """

    options: Options
    journal: Journal
    calls: Calls
    waits: Waits
    rules: FaultRules
    controller: MemoryController
    answered: Answered
    scrub: Callable[[], Iterable[Step]]
    destroy: Callable[[Callable[[], Steps[None]]], Steps[None]]

    def __init__(self) -> None:
        self._lock = FairLock()
        self._changed = threading.Condition(cast("threading.RLock", self._lock))
        self.drive: Callable[[Call[Any]], Any] = self.drain
        self.hold: Callable[[str], None] | None = None
        self.tracer: Tracer | None = None
        self.breathe: Callable[[], None] = lambda: None
        self.pause: Callable[[float], None] = lambda seconds: None
        self.watch: Monitors | None = None
        self.draining = False
        self.wakes = 0

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
        if run is not None and self.calls.is_known(run):
            return cast("T", self._as_before(run))
        return cast("T", self.drive(Call(operation, who, named_by or operation, cancelled, run)))

    def settle(self, act: Callable[[], T]) -> T:
        """Do something short under the lock, and no steps, once for a call that is repeated."""
        with self._lock:
            run = self.calls.next_run()
            if run is not None and self.calls.is_known(run):
                return cast("T", self._as_before(run))
            result = act()
            self.answered.revision = self.journal.revision
            if run is not None:
                self.calls.came_to(run, named(result), self.answered.revision)
            self.journal.flush()
            return result

    def drain(self, call: Call[T]) -> T:
        """Run an operation to its end in the calling thread: what ``drive`` is by default."""
        with self._lock:
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
            yield from self.destroy(then)
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

    def will_come_to(self, outcome: object) -> None:
        """Note what the present run will come to, as reopening finishes it if need be."""
        run = self.waits.current.run
        if run is not None:
            self.calls.came_to(run, named(outcome), self.journal.revision)

    def comes_to_nothing(self) -> None:
        """Take back ``will_come_to``: the run is refused after all."""
        run = self.waits.current.run
        if run is not None:
            self.calls.came_to_nothing(run)

    def read(self, query: Callable[[Self], T]) -> tuple[int, T]:
        """Run a query of this core under the lock; return the revision it saw, and its result."""
        # not by with: to let the lock go costs nothing by its own method
        lock = self._lock
        lock.acquire()
        try:
            revision = self.answered.revision = self.journal.revision
            return revision, query(self)
        finally:
            lock.release()

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
        with self._lock:
            yield

    def wake(self) -> None:
        """Have everybody who waits look again."""
        with self._lock:
            self.wake_waiting()

    def is_locked(self) -> bool:
        """Return whether the calling thread holds the lock, as it does in a step."""
        return self._lock.is_owned()

    def wake_waiting(self) -> None:
        """Have everybody who waits look again, from within an operation."""
        self.wakes += 1
        self._changed.notify_all()

    def _as_before(self, run: Run) -> Any:
        """Answer a run with what it came to when it was made before; that may be a refusal."""
        result, self.answered.revision = self.calls.known(run)
        return looked_up(cast("Core", self), result)

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
        if not tx.byte_ops:
            return []
        if self.watch is not None:
            self.watch.moving(tx)
        tx.written += [op.pfns for op in tx.byte_ops if op.kind in MOVING]
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
