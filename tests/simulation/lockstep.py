"""Runs beside the oracle: one operation at a time, by steps, and the oracle judges each.

Owns ``Lockstep``, the oracle's world with an engine that is checked after every step, dies between
operations and is reopened, and whose operations are refused for faults that the oracle can follow:
those that are ALL leave the state as it was. What other runs interleave, these say exactly.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from errno import EIO, ENOMEM, ENOSPC
from typing import Any

from keeping import Kept
from msgspec.structs import replace
from oracle import runs as oracle_runs
from oracle.driver import NFRAMES, DifferenceError, World
from oracle.hands import perform
from oracle.oracle import Op, Outcome

from rmemd.consumers.guard import INJECTABLE, Guard
from rmemd.engine.core import Options
from rmemd.engine.driver import Call
from rmemd.engine.engine import Engine
from rmemd.engine.stepwise import DeadlockError, Stepwise
from rmemd.hooks.tables import same_state

from .checks import Accesses, Checks, watching
from .faults import FaultySystem
from .figures import Figures, Played, Trace, failed, read_log

# operations of a run, as the oracle's driver draws them
LENGTH = 400
# one seed in so many is such a run
EVERY = 4
# an operation that is alone comes to its end; a caller of one that waits has gone by then
TURNS_MAX = 500
# operations that leave the state as it was when they are refused
ALL = frozenset((
    "pin", "unpin", "get_pages", "put_pages", "finalize", "open_session", "set_policy", "register",
    "unregister", "create_file", "add_slot", "set_attributes", "swap", "delete_slot",
    "convert_file",
))  # fmt: skip
ERRNOS = (ENOMEM, ENOSPC, EIO)
REASONS = ("PLUGIN_RAISED", "VENDOR_BUSY", "NO_FRAMES")
# of operations, so many are followed by a crash, and so many have a fault before them
CRASHES, FAULTS = 0.01, 0.15
OURS = frozenset(("crash", "fault"))


class ViolationError(AssertionError):
    """Something that must be true after every step is not."""


def make_run(seed: int, length: int = LENGTH) -> list[Op]:
    """Return the operations of a seed, with crashes and faults between them."""
    rng, made = random.Random(f"lockstep {seed}"), list[Op]()
    for op in oracle_runs.make_run(seed // EVERY, length):
        if op[0] in ALL and rng.random() < FAULTS:
            made.append(("fault", rng.randrange(4), rng.randrange(1 << 16)))
        made.append(op)
        if rng.random() < CRASHES:
            made.append(("crash",))
    return made


def play(seed: int, ops: Sequence[Op]) -> Played:
    """Play operations on a new world."""
    shapes = [op[1:] for op in ops if op[0] == "host"]
    world, at = Lockstep(seed, *(shapes[0] if shapes else (NFRAMES, 1))), 0
    try:
        for at, op in enumerate(ops):  # noqa: B007
            if op[0] != "host":
                world.step(op)
        world.finish()
    except Exception as error:
        world.figures.differences += isinstance(error, DifferenceError)
        return failed(world.figures, error, at)
    finally:
        world.close()
    return Played(world.figures)


class Lockstep(World):
    """See the module."""

    def __init__(self, seed: int, nframes: int, nnodes: int) -> None:
        self.figures, self.struck = Figures(), Counter[str]()
        self.system, self._trace = FaultySystem(), Trace()
        self._seed, self._armed = seed, ()
        self._accesses, self._open = Accesses(), ExitStack()
        self._open.enter_context(watching(self._accesses))
        super().__init__(nframes, nnodes)

    def step(self, op: Op) -> None:
        """Do one operation on both, or have something go wrong."""
        if op[0] == "crash":
            self._crash()
        elif op[0] == "fault":
            self._armed = op[1:]
        else:
            super().step(op)
            self._armed = ()

    def finish(self) -> None:
        """Die once more, and compare all there is."""
        self._crash()
        super().finish()
        self.figures.compared = self.done
        self.figures.faults = +self.struck
        self.figures.trace = self._trace.hexdigest()

    def close(self) -> None:
        """Let the engine's memory go."""
        super().close()
        self._kept.close()
        self._open.close()

    # --- the engine ----------------------------------------------------------------------------
    def _power_on(self, options: Options) -> Engine:
        self._options = replace(
            options, system=self.system, journalled=True, life=str(self._seed), kept_records=256
        )
        return self._reopen({})

    def _reopen(self, found: dict[str, int]) -> Engine:
        self._kept = Kept(found)
        engine = Engine(self._options, Guard(lambda: 0.0), self._kept)
        engine.core.hold = lambda name: None
        engine.core.drive = self._drive
        self._steps = Stepwise(engine)
        self._checks = Checks(engine.core, self._accesses)
        return engine

    def _drive(self, call: Call[Any]) -> Any:
        """Carry a call out by steps, and check after each."""
        task = self._steps.start(lambda engine: engine.core.drive(call))
        for turn in range(TURNS_MAX):
            if task.over:
                return task.value()
            if turn == TURNS_MAX // 2:
                task.cancel()
            try:
                self._steps.advance(task)
            except DeadlockError as deadlock:
                raise ViolationError(f"deadlock: {deadlock}") from deadlock
            self.figures.steps += 1
            self._require_sound(task.label)
        raise ViolationError(f"{task.label} does not end, and is alone: {task.step}")

    def _require_sound(self, where: str) -> None:
        with self.system.unwatched():
            broken = self._checks.broken()
        if broken:
            raise ViolationError(f"after step {self.figures.steps}: {where}: {'; '.join(broken)}")

    def _crash(self) -> None:
        """The daemon is killed between operations; the next one must agree with the oracle, too."""
        self.struck["crash"] += 1
        old, kept = self.engine, self._kept
        found = kept.copied()
        differing = same_state(old.core.space.snapshot(), read_log(found).snapshot())
        if differing:
            raise ViolationError(f"I19: in the log {differing} are not what they were")
        old.close()
        kept.close()
        self.engine = self._reopen(found)
        self._require_sound("crash")
        self._require(self.oracle.compare(self.engine, contents=True))
        self.done += 1

    # --- operations ----------------------------------------------------------------------------
    def _do(self, *op: Any) -> Outcome:
        faulty = self._armed and op[0] in ALL
        outcome = self._do_faulty(*op) if faulty else super()._do(*op)
        self._trace.take_down(self.engine.core.journal)
        said = outcome.reason or outcome.value
        self._trace.note(f"{op[0]} {said} {self.figures.steps} {self._trace.state}")
        return outcome

    def _do_faulty(self, *op: Any) -> Outcome:
        """Do an operation with a fault before it; refused for it, it has changed nothing."""
        before, struck = self.oracle.copy(), self.struck.total()
        expected = self.oracle.apply(op)
        self._arm(*self._armed)
        try:
            outcome = perform(self.engine, op)
        except OSError as error:
            outcome = Outcome(None, error.errno or EIO, "SYSTEM", text=str(error))
        finally:
            self._disarm()
        # bytes that the system would not destroy are destroyed by whoever comes next
        self.engine.core.run(self.engine.core.scrub)
        self.done += 1
        if outcome.errno and self.struck.total() > struck:
            self.oracle, self.spec = before, before.spec
        else:
            self._require(self.oracle.judge(op, expected, outcome))
        self._require(self.oracle.compare(self.engine, contents=True))
        return outcome

    def _arm(self, nth: int, kind: int) -> None:
        self._before, self._rules = self.system.struck, []
        if kind % 2:
            self.system.fail(nth // 2 + 1, ERRNOS[kind % len(ERRNOS)])
            return
        # every hook in turn may be the one that is asked
        self._rules = [
            self.engine.add_fault_rule(0, point, REASONS[kind % len(REASONS)], 1, 1).rule
            for point in INJECTABLE
        ]

    def _disarm(self) -> None:
        self._armed = ()
        self.system.fail(0, 0)
        self.struck["system"] += self.system.struck - self._before
        left = {rule.rule for rule in self.engine.core.rules.all()}
        self.struck["rule"] += len(self._rules) - len(left & set(self._rules))
        for rule in left:
            self.engine.remove_fault_rule(rule)
