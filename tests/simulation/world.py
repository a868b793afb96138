"""One simulated host: an engine, the clients on it, and what must be true after every step.

Owns the scheduler. Everything under way is a script (``clients``) whose present call is a task of
``Stepwise``; an action starts one, advances one by a step, or has something go wrong. Nothing here
looks at a clock or draws lots: what happens is a function of the actions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from keeping import Kept

from rmemd.consumers.guard import INJECTABLE, Guard
from rmemd.engine import faultpoints
from rmemd.engine.core import Core, Options
from rmemd.engine.engine import Engine
from rmemd.engine.fault import LOST_RACE
from rmemd.engine.stepwise import DeadlockError, Stepwise, Task
from rmemd.errors import PluginFault, RmemError
from rmemd.hooks.tables import same_state
from rmemd.model.files import FLAG_ANONYMOUS
from rmemd.model.host import Use

from .actions import Action, Shape
from .checks import Accesses, Checks, watching
from .clients import Clients, Script
from .content import Contents
from .faults import FAILURES, MISDEEDS, Clock, FaultyConsumers, FaultySystem
from .figures import Figures, Trace, read_log

# what is under way at once; more wait to be started
SCRIPTS_MAX = 6
POISON_MAX = 12
KEPT_RECORDS = 256
# refusals that rules make vendors utter
ERRORS = ("PLUGIN_RAISED", "VENDOR_BUSY", "NO_FRAMES", "FOLIO_BUSY")
# of these, a call that was refused changed nothing
ALL = frozenset((
    "unpin", "pin", "get_pages", "put_pages", "finalize", "revoke", "open_session", "open_device",
    "set_policy", "register_pager", "unregister_pager",
))  # fmt: skip


class ViolationError(AssertionError):
    """Something that must be true is not; the message says what, after which step."""


@dataclass
class Running:
    """A script under way, and the call of it that is made now.

    Attributes:
        client: the session whose end is its end.
        gone: whether its client is.
        revisions: what the present call has committed; ``crashed``: and then the daemon died.
        key: the present call's, by which a repeat is known.
    """

    name: str
    script: Script
    client: int
    task: Task | None = None
    gone: bool = False
    revisions: int = 0
    key: tuple[str, int] = ("", 0)
    call: Callable[[Engine], Any] | None = None
    crashed: bool = False


class World:
    """See the module."""

    def __init__(self, seed: int, shape: Shape) -> None:
        self.shape = shape
        self.clock, self.system = Clock(), FaultySystem()
        self.faulty = FaultyConsumers(self.clock)
        self._options = Options(
            nframes=shape.nframes, nnodes=shape.nnodes, seed=seed, kept_records=KEPT_RECORDS,
            system=self.system, journalled=shape.crashes, life=str(seed),
        )  # fmt: skip
        self._accesses, self._open = Accesses(), ExitStack()
        self._open.enter_context(watching(self._accesses))
        self._power_on({})
        self.clients = Clients(self)
        self.contents = Contents()
        self.running: list[Running] = []
        self.got: list[tuple[Any, Any]] = []
        self.offlined: list[tuple[int, int]] = []
        self.struck: Counter[str] = Counter()
        self.figures = Figures()
        self.poison_max = POISON_MAX if shape.hostile else 0
        offers = self.core.registry.offers
        self.kinds = [
            (name, personality == "in-place")
            for name in sorted(offers) for personality in offers[name].variant.personalities
        ]  # fmt: skip
        self.points = [*INJECTABLE, LOST_RACE, *faultpoints.STEPS]
        self.points += sorted({p for o in offers.values() for p in o.variant.points})
        self.trace = Trace()
        self._calls = 0
        self._checked = -1
        self._starting: Running | None = None
        if shape.spare:
            self.engine.offline(shape.spare, shape.nframes - shape.spare)

    def _power_on(self, found: dict[str, int]) -> None:
        """Start the engine, on what an earlier one left if it left anything."""
        self.kept = Kept(found)
        with self.system.unwatched():
            self.engine = Engine(self._options, Guard(self.clock), self.kept)
        self.steps = Stepwise(self.engine)
        self.checks = Checks(self.core, self._accesses)
        self.core.registry.made = self.faulty.watch
        for consumer in self.core.consumers.values():
            self.faulty.watch(consumer)
        if self.shape.apart:
            self.core.hold = lambda name: None
        if self.shape.watched:
            # what monitors read, they read without being hit themselves
            self.engine.watch()
            assert self.core.watched is not None
            for look in ("agreed", "moving", "committed"):
                setattr(self.core.watched, look, self._unhit(getattr(self.core.watched, look)))
            self.core.guard.watch = self.core.watched.agreed

    def _unhit(self, look: Callable[..., None]) -> Callable[..., None]:
        def unwatched(*args: Any) -> None:
            with self.system.unwatched():
                look(*args)

        return unwatched

    @property
    def core(self) -> Core:
        """Return the engine's core."""
        return self.engine.core

    def close(self) -> None:
        """Let the engine's memory go."""
        self.steps.abandon()
        self.engine.close()
        self.kept.close()
        self._open.close()

    # --- actions -------------------------------------------------------------------------------
    def act(self, action: Action) -> None:
        """Carry an action out, and check what must be true then."""
        name, *numbers = action
        own = getattr(self, f"_{name}", None)
        if own is not None:
            own(*numbers)
        elif len(self.running) >= SCRIPTS_MAX:
            self._go(sum(numbers))
        else:
            self._start(name, numbers)

    def finish(self) -> None:
        """Have everything come to its end, and look once more at all there is."""
        self._drain()
        self.system.fail(0, 0)
        self.faulty.fail(0, "")
        for rule in self.core.rules.all():
            self.engine.remove_fault_rule(rule.rule)
        for vm in [vm.info.vm for vm in self.core.vms.all()]:
            self._verify(vm)
        self._drain()
        self._end_everything()
        self.figures.verified = self.contents.verified
        self.figures.faults = self.struck
        self.figures.faults["system"] = self.system.struck
        self.figures.faults["consumer"] = self.faulty.struck
        self._note(f"end {self.core.journal.revision}")
        self.figures.trace = self.trace.hexdigest()

    def violated(self, what: str) -> None:
        """Say that something is not as it must be.

        Raises:
            ViolationError: always.
        """
        raise ViolationError(f"after step {self.figures.steps}: {what}")

    def cancelled(self) -> Callable[[], bool]:
        """Return what tells a call whether the client of the script that begins has gone."""
        starting = self._starting
        return lambda: starting is not None and starting.gone

    def _start(self, name: str, numbers: list[int]) -> None:
        running = Running(name, iter(()), self._client(numbers))  # type: ignore[arg-type]
        self._starting = running
        running.script = getattr(self.clients, name)(*numbers)
        self.running.append(running)
        self._next(running, lambda: next(running.script))

    def _client(self, numbers: list[int]) -> int:
        hosts = [info.session for info in self.core.sessions.all() if not info.parent]
        return hosts[numbers[0] % len(hosts)] if hosts and numbers else 0

    def _go(self, which: int) -> None:
        ready = [one for one in self.running if one.task is not None and not one.task.blocked]
        if ready:
            self._advance(ready[which % len(ready)])
        elif self.running:
            self._require_outsider()

    def _require_outsider(self) -> None:
        try:
            self.steps.ready()
        except DeadlockError as deadlock:
            self.violated(f"deadlock: {deadlock}")

    # --- what goes wrong -------------------------------------------------------------------------
    def _rule(self, which: int, point: int, nth: int, kind: int) -> None:
        at = self.points[point % len(self.points)]
        vms = [0, *(vm.info.vm for vm in self.core.vms.all())]
        delayed = at.startswith("step/")
        of_vm = not delayed or faultpoints.STEPS[at].of_vm
        for old in self.core.rules.all()[:-3]:
            self.engine.remove_fault_rule(old.rule)
        rule = self.engine.add_fault_rule(
            vms[which % len(vms)] if of_vm else 0, at,
            "" if delayed else ERRORS[kind % len(ERRORS)], nth % 4 + 1, 1 + kind % 2,
            delay_ms=5 if delayed else 0,
        )  # fmt: skip
        self._note(f"rule {rule}")

    def _system_fails(self, nth: int, kind: int) -> None:
        self.system.fail(nth + 1, FAILURES[kind % len(FAILURES)])

    def _consumer_fails(self, nth: int, kind: int) -> None:
        self.faulty.fail(nth + 1, MISDEEDS[kind % len(MISDEEDS)])

    def _cancel(self, which: int) -> None:
        if self.running:
            one = self.running[which % len(self.running)]
            self.struck["cancel"] += 1
            self._leave(one)

    def _die(self, which: int) -> None:
        """A client's process is gone: its calls are cancelled, its session is closed."""
        hosts = [info.session for info in self.core.sessions.all() if not info.closing]
        if len(hosts) < 2:
            return
        session = hosts[which % len(hosts)]
        self.struck["die"] += 1
        for one in self.running:
            if one.client == session:
                self._leave(one)
        self._start("close_session", [session])

    def _leave(self, one: Running) -> None:
        one.gone = True
        if one.task is not None:
            one.task.cancel()

    # --- going on --------------------------------------------------------------------------------
    def _advance(self, one: Running) -> None:
        task, before = one.task, self.core.journal.revision
        assert task is not None
        rules = {rule.rule: rule.hits for rule in self.core.rules.all()}
        try:
            self.steps.advance(task)
        except DeadlockError as deadlock:
            self.violated(f"deadlock: {deadlock}")
        self.figures.steps += 1
        self._count_hits(rules)
        self._look(one, before)
        if task.over:
            self._ended(one, task)

    def _count_hits(self, before: dict[int, int]) -> None:
        if before:
            after = {rule.rule: rule.hits for rule in self.core.rules.all()}
            # a rule is gone at its last hit
            hits = sum(after.get(number, was + 1) - was for number, was in before.items())
            self.struck["rule"] += hits

    def _ended(self, one: Running, task: Task) -> None:
        one.task = None
        self.core.calls.forget(one.key)
        if task.error is None:
            self.figures.ended[one.name, "ok"] += 1
            result = task.result
            self._next(one, lambda: one.script.send(result))
            return
        error = task.error
        self._judge(one, error)
        self._next(one, lambda: one.script.throw(error))

    def _judge(self, one: Running, error: Exception) -> None:
        if isinstance(error, PluginFault) and not self.shape.hostile:
            self.violated(f"{one.name}: a plugin failed: {error}")
        if isinstance(error, OSError):
            if not self.system.struck:
                self.violated(f"{one.name}: {error!r}, and no system call was made to fail")
        elif not isinstance(error, RmemError):
            raise error
        if one.name in ALL and one.crashed:
            self.violated(f"{one.name} was carried out, and its repeat was refused: {error}")
        if one.name in ALL and one.revisions:
            self.violated(f"{one.name} was refused ({error}) and changed something")
        reason = error.reason.name if isinstance(error, RmemError) else type(error).__name__
        self.figures.ended[one.name, reason] += 1

    def _next(self, one: Running, resume: Callable[[], Callable[[Engine], Any]]) -> None:
        """Have a script make its next call; one that needs no steps is answered at once."""
        self._starting = one
        while True:
            try:
                if one.gone:
                    one.script.close()
                    break
                call = resume()
            except (StopIteration, RmemError, OSError):
                break
            self._calls += 1
            one.call, one.key, one.crashed = call, ("call", self._calls), False
            task = self._make_call(one)
            if not task.over:
                return
            one.task = None
            if task.error is not None:
                self._judge(one, task.error)
                error = task.error
                resume = lambda error=error: one.script.throw(error)  # type: ignore[misc] # noqa: E731
            else:
                resume = lambda result=task.result: one.script.send(result)  # type: ignore[misc] # noqa: E731
        self.running.remove(one)

    def _make_call(self, one: Running) -> Task:
        """Make a script's call, or make it again after a crash."""
        assert one.call is not None
        with self.core.calls.of(one.key):
            one.task = task = self.steps.start(one.call)
        one.revisions = 0
        return task

    # --- crashes -------------------------------------------------------------------------------
    def _crash(self, kind: int) -> None:
        """The daemon is killed where it stands, and another one takes over what it left.

        Clients live on and repeat the calls that they were not answered.
        """
        self.struck["crash"] += 1
        self.steps.abandon()
        old, kept = self.engine, self.kept
        with self.system.unwatched():
            found = kept.copied()
            differing = same_state(old.core.space.snapshot(), read_log(found).snapshot())
            if differing:
                self.violated(f"I19: in the log {differing} are not what they were")
            old.close()
            kept.close()
        self._power_on(found)
        self._require_sound("crash")
        self._repeat()

    def _repeat(self) -> None:
        """Have clients make their calls again; the engine itself has finished what was closing."""
        for one in list(self.running):
            one.crashed, committed = one.revisions > 0, one.revisions
            task = self._make_call(one)
            one.revisions = committed
            if task.over:
                self._ended(one, task)

    # --- what must be true -----------------------------------------------------------------------
    def _look(self, one: Running, before: int) -> None:
        """Check the state after a step, and take it down in the trace.

        What is in the tables changes with a revision only, so it is checked when there is one.
        """
        task = one.task
        assert task is not None
        revision = self.core.journal.revision
        self.trace.take_down(self.core.journal)
        for record in list(self.core.journal.records)[-(revision - before) :] * (revision > before):
            one.revisions += record.label not in ("scrub", "leave")
        if revision != self._checked or task.over:
            self._checked = revision
            self._require_sound(f"{one.name} at {task.step and task.step.name}")
        suspended = sum(t.step is not None and t.step.tx is not None for t in self.steps.tasks)
        if len(self.core.space.holders) != suspended:
            self.violated(f"{len(self.core.space.holders)} held, {suspended} suspended")
        self._note(
            f"{one.name} {task.label} {task.step and task.step.name} "
            f"{type(task.error).__name__} {revision} {self.trace.state}"
        )

    def checked(self, engine: Engine) -> None:
        """Check as the daemon's own look at itself does."""
        with self.system.unwatched():
            found = engine.check()
        if found.violated:
            self.violated("; ".join(found.violated))

    def _require_sound(self, where: str) -> None:
        with self.system.unwatched():
            broken = self.checks.broken()
        if broken:
            self.violated(f"{where}: {'; '.join(broken)}")

    def _note(self, text: str) -> None:
        self.trace.note(text)

    # --- ends ------------------------------------------------------------------------------------
    def _drain(self) -> None:
        """Advance all that is under way to its end, in turn."""
        turns = 0
        while self.running:
            ready = [one for one in self.running if one.task is not None and not one.task.blocked]
            for one in ready:
                if one.task is not None:
                    self._advance(one)
            turns += 1
            if not ready or turns % 200 == 0:
                self._require_outsider()
                for one in list(self.running):
                    self._leave(one)
            if turns > 5000:
                stands = [(one.name, one.task and one.task.step) for one in self.running]
                self.violated(f"nothing ends any more: {stands}")
        with self.system.unwatched():
            # frames whose bytes the system would not destroy are tried again by whoever comes next
            self.core.run(self.core.scrub)
        self._require_quiet()

    def _require_quiet(self) -> None:
        """With nothing under way, nothing is held, waited for, in progress or in limbo."""
        core = self.core
        with self.system.unwatched():
            strays, missing = core.controller.strays()
        left = {
            "left in the arena": strays.tolist(), "gone from the arena": missing.tolist(),
            "held": core.space.holders, "running vCPUs": core.running,
            "vCPUs told to leave": core.leaving, "waiting faults": core.pending_faults.waiting,
            "waits": [e for e in core.waits.graph(core.ledger).edges if e.waiting],
            "in limbo": np.flatnonzero(core.host.use.view == Use.SCRUBBING).tolist(),
        }  # fmt: skip
        for what, found in left.items():
            if found:
                self.violated(f"nothing is under way, and {what}: {found}")

    def _verify(self, number: int) -> None:
        """Have a guest look at everything that is known of it."""
        vm = self.core.vms.get(number)
        if vm.info.state != "dead" and len(vm.vcpus):
            at = self.clients._of(vm)
            running = Running("verify", iter(()), 0)  # type: ignore[arg-type]
            self._starting = running
            running.script = self.clients.verify(at, 0, self.contents.of_vm(number))
            self.running.append(running)
            self._next(running, lambda: next(running.script))

    def _end_everything(self) -> None:
        """Without sessions and VMs, every frame is free that is not poisoned or offline."""
        for vm in [vm.info.vm for vm in self.core.vms.all()]:
            # a vendor may refuse; then the VM stays, and nobody else on its account
            with suppress(RmemError):
                self.engine.destroy_vm(vm)
        for file in [file.info for file in self.core.files.all()]:
            if not file.flags & FLAG_ANONYMOUS:
                self.engine.close_file(file.file)
        for pin in [pin.pin for pin in self.core.sessions.pins()]:
            self.engine.unpin(pin)
        for session in [info.session for info in self.core.sessions.all() if not info.parent]:
            self.engine.close_session(session)
        self._require_sound("end")
        self._require_quiet()
        host = self.core.host
        left = np.flatnonzero(np.isin(host.use.view, (Use.PRIVATE, Use.SHARED)))
        if left.size and not self.shape.hostile:
            self.violated(f"everything is gone, and pfn {left.tolist()[:9]} are in use")
