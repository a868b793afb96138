"""Doing it again: the operations of a trace on an engine of its own, interleaved as they were.

Owns ``Player``. One thread; each operation goes on where a line says that it had the lock again.
What was no state when it was recorded is given back: shared bytes, callers who went away, hooks
that took too long, what guests found where private bytes are stand-ins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from rmemd.engine import queries
from rmemd.engine.core import Core
from rmemd.engine.driver import Step
from rmemd.engine.sessions import TICKETS
from rmemd.engine.stepwise import Stepwise, Task
from rmemd.engine.waits import Operation
from rmemd.errors import INTERNAL, REASONS, TOKEN_UNKNOWN, RmemError
from rmemd.hooks.tx import Tx
from rmemd.store.memfd import Memfd
from rmemd.trace import checkpoint, state
from rmemd.trace.format import STATE, Asked, Line, Outcome, Trace, TraceError
from rmemd.trace.operations import call_of
from rmemd.trace.shared import FedMemfd
from rmemd.trace.standins import StandInController
from rmemd.trace.values import Digests, bytes_of, numbers_of, outcome, runs_of
from rmemd.units import I64, Bools

# operations whose bytes are their caller's
BRINGING = frozenset(("populate", "write_guest", "write_physical"))
# steps that an operation may take beyond the recorded ones, before it is left where it is
SURPLUS_MAX = 100_000


class Changes(Struct, frozen=True):
    """What is to be other than it was recorded.

    Attributes:
        consumers: the consumer to make in place of one, by name; "*" is any.
        config: options of every VM's consumer that are set.
        options: the engine's.
    """

    consumers: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.consumers or self.config or self.options)

    def consumer(self, name: str) -> str:
        """Return the consumer to make in place of one."""
        return self.consumers.get(name) or self.consumers.get("*", name)

    def to(self, wanted: Asked) -> Asked:
        """Return what is asked instead of what was."""
        args = dict(wanted.args)
        if args.get("consumer"):
            args["consumer"] = self.consumer(args["consumer"])
        if wanted.method == "create_vm" and self.config:
            args["config"] = {**args.get("config", {}), **self.config}
        return replace(wanted, args=args)


class Played(Struct, frozen=True):
    """An operation that was done again, or a state that was come to.

    Attributes:
        asked: the operation, ``None`` of a state.
        end: the recorded line, ``None`` of an operation that had no end.
        came_to: what came of it now.
        revision, writes: where the engine was then: committed transactions, and their digest.
        surplus: steps beyond the recorded ones.
    """

    asked: Asked | None
    end: Line | None
    came_to: Outcome
    revision: int
    writes: str
    surplus: int = 0


class Player:
    """One run of a trace.

    Attributes:
        engine: the engine, for whoever explains what came of it.
        tasks: the operations under way, by number.
    """

    def __init__(self, trace: Trace, changes: Changes, force_handles: bool = False) -> None:
        self._trace = trace
        self._changes = changes
        self._force_handles = force_handles
        self.engine = checkpoint.open_engine(trace.header, changes.options)
        self._core = self.engine.core
        self._core.controller = self._controller = StandInController(self._core.controller)
        with self._core.locked():
            # no operation's: it has no revision
            tx = Tx(self._core.space, "stand-ins")
            self._controller.seal(tx, np.arange(self._core.host.nframes, dtype=np.int64))
        self._swap_what_is_there()
        if trace.header.get("every_step"):
            self._core.hold = lambda name: None
        self._steps = Stepwise(self.engine)
        self._feeder = _Feeder(self._core_find, self._controller)
        self._core.tracer = self._feeder
        self.tasks: dict[int, Task] = {}
        self._left_over: dict[int, list[Line]] = {n: list(of) for n, of in trace.inputs.items()}
        self._now = 0
        self._feeder.overdue = {
            (line["overdue"], line["revision"]): [tuple(one) for one in line["hooks"]]
            for line in trace.lines
            if "overdue" in line
        }
        self._feeder.guard = self._core.guard
        self._feeder.journal = self._core.journal

    def close(self) -> None:
        """Let the engine go."""
        self._core.tracer = None
        for task in self.tasks.values():
            if not task.over:
                task.abandon()
        self.engine.close()

    def play(self) -> Iterator[Played]:
        """Do the operations; yield each when it is over, and each state when it is come to."""
        for index, line in enumerate(self._trace.lines):
            kind, number = next(iter(line.items()))
            if kind == "begin":
                yield from self._advance(number, index, self._start(number))
            elif kind == "step":
                task = self.tasks.get(number)
                if task is not None and not task.over:
                    yield from self._advance(number, index, task)
            elif kind == STATE:
                yield self._state(line)
            elif kind in _INPUTS:
                _INPUTS[kind](self, line)

    # --- operations --------------------------------------------------------------------------
    def _start(self, number: int) -> Task:
        wanted = self._changes.to(self._trace.asked[number])
        if self._force_handles:
            self._make_room(number)
            wanted = self._same_pages(wanted)
        gone_at = self._trace.ends.get(number, {}).get("gone_at", 0)
        count = iter(range(1, 1 << 62))
        call = call_of(
            wanted.method, wanted.args,
            lambda: next(count) >= gone_at > 0, partial(_check, self._trace.ends.get(number, {})),
        )  # fmt: skip
        self._turn_to(number)
        self._hand_in_ticket(wanted)
        self.tasks[number] = task = self._steps.start(call)
        return task

    def _hand_in_ticket(self, wanted: Asked) -> None:
        """Have a ticket be good that was: the doors keep them, beside the state."""
        ticket = wanted.args.get("ticket")
        refused = self._trace.ends.get(wanted.number, {}).get("refused", {})
        if ticket and refused.get("reason") != TOKEN_UNKNOWN.name:
            self._core.notes.set(TICKETS, bytes_of(ticket), True, flush=False)

    def _turn_to(self, number: int) -> None:
        self._now = self._feeder.now = number
        self._controller.brought = self._trace.asked[number].method in BRINGING

    def _advance(self, number: int, index: int, task: Task) -> Iterator[Played]:
        self._turn_to(number)
        if not task.over:
            task.advance()
        surplus = 0
        if self._trace.last[number] == index and number in self._trace.ends:
            while not task.over and not task.blocked and surplus < SURPLUS_MAX:
                task.advance()
                surplus += 1
        if task.over or (self._trace.last[number] == index and number in self._trace.ends):
            yield self._played(number, task, surplus)

    def _played(self, number: int, task: Task, surplus: int) -> Played:
        end = self._trace.ends.get(number)
        result = task.result
        if self._trace.asked[number].method == "shared_descriptor" and task.error is None:
            result = _closed(result)
        came_to = outcome(result, task.error, _NO_KEY) if task.over else {"waits": _where(task)}
        return Played(
            self._trace.asked[number], end, came_to, self._core.journal.revision,
            self._feeder.chain.digest, surplus,
        )  # fmt: skip

    def _state(self, line: Line) -> Played:
        named = [plugin["name"] for plugin in self._trace.header["plugins"]]
        tables = state.digests(self._core.space, named)
        return Played(
            None, line, {"tables": tables}, self._core.journal.revision, self._feeder.chain.digest
        )

    # --- what is there before, and beside ----------------------------------------------------
    def _swap_what_is_there(self) -> None:
        for vm in self._core.vms.all():
            wanted = self._changes.consumer(vm.info.consumer)
            if wanted != vm.info.consumer or self._changes.config:
                config = {**vm.info.config, **self._changes.config}
                try:
                    self.engine.swap_consumer(vm.info.vm, wanted, config)
                except RmemError as refusal:
                    raise TraceError(
                        f"{vm.info.label} was there when the recording began, and cannot become "
                        f"{wanted}: {refusal}"
                    ) from refusal

    def _make_room(self, number: int) -> None:
        """Have the object that the operation makes get the handle that it had."""
        made = self._trace.ends.get(number, {}).get("ok")
        counter = _COUNTERS.get(self._trace.asked[number].method)
        if counter is None or made is None:
            return
        handle = made[counter] if isinstance(made, dict) else made
        with self._core.tx("handles") as tx:
            counters = self._core.host.counters
            tx.set(counters, counter, max(handle - 1, counters.get(counter, 0)))

    def _same_pages(self, wanted: Asked) -> Asked:
        """Have a migration be of the guest's pages that it was of, wherever they lie now."""
        moves = self._trace.ends.get(wanted.number, {}).get("ok")
        if wanted.method != "migrate" or not moves:
            return wanted
        found = [
            queries.guest_frames(self._core, self._core.vms.get(move["vm"]), gfn, npages)
            for move in moves["moves"]
            if self._core.vms.exists(move["vm"])
            for gfn, npages in move["gfns"]
            if gfn >= 0
        ]
        pfns = np.concatenate(found) if found else numbers_of(())
        return replace(wanted, args={**wanted.args, "pfns": runs_of(pfns)})

    def _wrote(self, line: Line) -> None:
        label, writes = checkpoint.writes_of(line)
        with self._core.locked(), self._core.tx(label) as tx:
            for write in writes:
                tx.repeat(write)
            frames = [w.args[0] for w in writes if w.table == "host/stored" and w.op == "put"]
            for pfns in frames:
                self._controller.seal(tx, pfns)
            if "freed" in line:
                tx.freed.append(numbers_of(line["freed"]))
        self._core.wake()

    def _left(self, line: Line) -> None:
        self._core.running -= {(vm, vcpu) for vm, vcpu in line["left"]}
        self._core.wake()

    def _quotas(self, line: Line) -> None:
        self._core.quotas.set(*checkpoint.limits_of(line))

    def _core_find(self, key: dict[str, Any]) -> Line | None:
        """Return, and use up, the first input of the current operation that is about this."""
        lines = self._left_over.get(self._now, [])
        for at, line in enumerate(lines):
            if all(line.get(name) == value for name, value in key.items()):
                return lines.pop(at)
        return None


class _Feeder:
    """The core's tracer while it replays."""

    def __init__(
        self, find: Callable[[dict[str, Any]], Line | None], controller: StandInController
    ) -> None:
        self.chain = state.Chain()
        self.now = 0
        self.overdue: dict[tuple[int, int], list[Any]] = {}
        self.guard: Any = None
        self.journal: Any = None
        self._find = find
        self._controller = controller

    def begun(self, operation: Operation) -> None:
        """Nothing: lines say what begins."""

    def resumed(self, operation: Operation, step: Step) -> None:
        """Nothing: lines say what goes on."""

    def ended(self, operation: Operation) -> None:
        """Nothing: it is seen by who advances it."""

    def committing(self) -> None:
        """Have hooks be overdue that were."""
        if self.overdue:
            key = (self.now, self.journal.revision)
            self.guard.overdue.extend(self.overdue.pop(key, ()))

    def committed(self, tx: Tx) -> None:
        """Take in what was written."""
        self.chain.add(tx)

    def shared(self, file: int, memfd: Memfd) -> Memfd:
        """Have shared bytes be what they were when they were read."""
        return FedMemfd(memfd, lambda key: self._find({"file": file, **key}))

    def compared(self, vm: int, gfns: I64, pfns: I64, wrong: Bools) -> Bools:
        """Have a guest find of stand-ins what it found of the bytes."""
        unknown = self._controller.are_stand_ins(pfns)
        line = self._find({"vm": vm, "gfn": int(gfns[0]), "npages": gfns.size})
        found = numbers_of(line["wrong"] if line is not None else ())
        return np.where(unknown, np.isin(gfns, found), wrong)


_INPUTS: Mapping[str, Callable[[Player, Line], None]] = {
    "wrote": Player._wrote, "left": Player._left, "quotas": Player._quotas,
}  # fmt: skip
# which counter an operation takes its handle from
_COUNTERS = {
    "create_vm": "vm", "create_file": "file", "pin": "pin", "open_session": "session",
    "register_userfault": "userfault",
}  # fmt: skip
# of this run's bytes nothing but the length is compared
_NO_KEY = Digests(b"")


def _check(end: Line, core: Core) -> None:
    """Refuse what its caller refused when it was recorded."""
    if end.get("declined"):
        refused = end["refused"]
        raise REASONS.get(refused["reason"], INTERNAL)(refused["message"])


def _closed(descriptor: int) -> str:
    os.close(descriptor)
    return "a descriptor"


def _where(task: Task) -> str:
    return task.step.name if task.step is not None else ""
