"""Several operations of one engine in one thread, advanced one step at a time.

Owns ``Stepwise``, the driver of simulations: where ``Core.run`` drains an operation, it stops at
each step with the operation's transaction suspended, as others meet it while bytes are moved
without the lock. Whoever calls ``Task.advance`` is the scheduler; nothing here draws lots or has a
clock, and the delays of fault rules are steps like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

from rmemd.engine.core import Core
from rmemd.engine.driver import Call, Step

if TYPE_CHECKING:
    from rmemd.engine.engine import Engine


class DeadlockError(Exception):
    """Operations wait, and nobody is left who could end that; the text is the wait graph."""


class Task:
    """One operation under way.

    Attributes:
        label: its name in the wait graph, "" for a call that needed no steps.
        over: whether it has ended; then ``result`` or ``error`` says how.
        step: where it stands, None before its first step and after its end.
        result: what the engine's method returned.
        error: what it raised.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._call: Call[Any] | None = None
        self._steps: Generator[Step, None, Any] | None = None
        self._away = ExitStack()
        self._wakes = 0
        self._gone = False
        self.label = ""
        self.over = False
        self.step: Step | None = None
        self.result: Any = None
        self.error: Exception | None = None

    # --- where it stands -----------------------------------------------------------------------
    @property
    def blocked(self) -> bool:
        """Return whether it waits, and nothing has changed since it looked."""
        waits = self.step is not None and self.step.wait
        return waits and self._wakes == self._core.wakes

    @property
    def waits_outside(self) -> bool:
        """Return whether it waits for a page fault handler, who is no operation."""
        return self.step is not None and self.step.wait and self.step.interruptible

    # --- going on ------------------------------------------------------------------------------
    def advance(self) -> bool:
        """Do the work of the step where it stands and go on to the next; return whether not over.

        A step that waits is left, and come back to if what it waits for is still so.
        """
        assert not self.over
        failed = self._work()
        with self._core.locked():
            before, self._core.waits.current = self._core.waits.current, self._mine
            try:
                self._stand_at(self._leave_step(failed))
            except StopIteration as end:
                self._end(result=end.value)
            except Exception as error:
                self._end(error=error)
            finally:
                self._core.waits.current = before
        return not self.over

    def cancel(self) -> None:
        """Have its caller be gone: a wait that can be interrupted is, a vCPU comes back."""
        self._gone = True
        self._core.wake()

    def abandon(self) -> None:
        """Stop where it stands, as the process dies there; the engine is of no more use."""
        self.over = True
        with self._core.locked():
            self._away.close()
            if self._steps is not None:
                self._steps.close()

    def value(self) -> Any:
        """Return the result, or raise what the operation raised."""
        assert self.over
        if self.error is not None:
            raise self.error
        return self.result

    # --- by Stepwise ---------------------------------------------------------------------------
    def _begin(self, call: Callable[[], Any]) -> None:
        """Find out which steps a call of the engine has; one that has none is carried out."""

        def capture(wanted: Call[Any]) -> Any:
            assert self._call is None, "an operation that runs another one cannot be interleaved"
            self._call = wanted

        drive, self._core.drive = self._core.drive, capture
        try:
            self.result = call()
        except Exception as error:
            self.error = error
        finally:
            self._core.drive = drive
        self.over = self._call is None or self.error is not None
        if not self.over:
            self._take_up(cast("Call[Any]", self._call))

    def _take_up(self, call: Call[Any]) -> None:
        waits = self._core.waits
        with self._core.locked():
            before = waits.current
            self._mine = waits.begin(call.who, call.made_by)
            waits.current = before
        self.label = self._mine.label
        self._is_cancelled = lambda: self._gone or call.cancelled()
        self._mine.run = call.run
        self._steps = self._core.and_scrub(call.operation)

    def _work(self) -> Exception | None:
        """Do the work of the step where it stands, without the lock; return why it failed."""
        if self.step is None or self.step.wait:
            return None
        self._core.wake()
        try:
            self._core.work(self.step)
        except Exception as error:
            return error
        return None

    def _leave_step(self, failed: Exception | None) -> Step:
        """Go on after the step where it stands; return the next one."""
        assert self._steps is not None
        if self.step is None:
            return next(self._steps)
        try:
            self._away.close()
            if failed is None:
                self._core.come_back(self.step)
        except Exception as error:
            failed = error
        return self._steps.send(None) if failed is None else self._steps.throw(failed)

    def _stand_at(self, step: Step) -> None:
        """Stop at a step, or at the first after it that lets the lock go."""
        assert self._steps is not None
        while True:
            try:
                if not self._core.done_at_once(step, self._is_cancelled):
                    self._away.enter_context(self._core.away(step, self._mine))
                    break
            except Exception as error:
                step = self._steps.throw(error)
            else:
                step = self._steps.send(None)
        self.step = step
        self._wakes = self._core.wakes

    def _end(self, result: Any = None, error: Exception | None = None) -> None:
        assert self._steps is not None
        self._steps.close()
        self.over, self.step = True, None
        self.result, self.error = result, error
        self._core.waits.end(self._mine, self._mine)
        self._core.wake_waiting()
        self._core.journal.settle()


class Stepwise:
    """The operations of an engine that are under way.

    Attributes:
        tasks: those that are not over, oldest first.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tasks: list[Task] = []

    def start(self, call: Callable[[Engine], Any]) -> Task:
        """Take up a call of one method of the engine; it has not done anything yet.

        A method without steps (a query, a refusal of its arguments) is over at once.
        """
        task = Task(self._engine.core)
        task._begin(lambda: call(self._engine))
        if not task.over:
            self.tasks.append(task)
        return task

    def advance(self, task: Task) -> bool:
        """Advance a task by a step; return whether it is not over.

        Raises:
            DeadlockError: it waits for somebody who waits for it.
        """
        if not task.advance():
            self.tasks.remove(task)
        elif task.blocked:
            self._require_no_deadlock(stuck=False)
        return not task.over

    def ready(self) -> list[Task]:
        """Return the tasks that can be advanced, oldest first.

        Raises:
            DeadlockError: all wait, and for nobody outside.
        """
        able = [task for task in self.tasks if not task.blocked]
        if self.tasks and not able:
            self._require_no_deadlock(stuck=True)
        return able

    def finish(self) -> None:
        """Advance everything in turn to its end; who waits for somebody outside is cancelled.

        Raises:
            DeadlockError: somebody waits who cannot be helped.
        """
        while self.tasks:
            for task in self.ready() or self._cancelled():
                self.advance(task)

    def abandon(self) -> None:
        """Stop every task where it stands: the process dies."""
        for task in self.tasks:
            task.abandon()
        self.tasks.clear()

    def _cancelled(self) -> list[Task]:
        outside = [task for task in self.tasks if task.waits_outside]
        for task in outside:
            task.cancel()
        return outside

    def _require_no_deadlock(self, stuck: bool) -> None:
        graph = self._engine.core.waits.graph(self._engine.core.ledger)
        if graph.deadlock or (stuck and not any(task.waits_outside for task in self.tasks)):
            edges = [f"{e.waiter} waits for {e.holder}: {e.why} {e.pages}" for e in graph.edges]
            raise DeadlockError("; ".join([*graph.deadlock, *edges]))
