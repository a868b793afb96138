"""Recording: what an engine is asked and what comes of it, as lines of a trace.

Owns ``Recorder``. While it records, it stands in front of the engine's operations (each is replaced
on the engine's object, so that an engine that is not recorded is none the slower) and is the core's
``tracer``. Lines about the lock and commits are written under the lock, in their order.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict

from rmemd.engine.cancel import Cancelled, never
from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.engine import Engine
from rmemd.engine.migrate import Report
from rmemd.engine.waits import Operation
from rmemd.errors import INTERRUPTED, RmemError
from rmemd.hooks.tx import Tx
from rmemd.store.memfd import Memfd
from rmemd.trace import checkpoint, state
from rmemd.trace.format import STATE, Line
from rmemd.trace.operations import AT_ONCE, OPERATIONS, plain_arguments, signature
from rmemd.trace.shared import RecordedMemfd
from rmemd.trace.sink import Sink
from rmemd.trace.values import Digests, outcome, runs_of
from rmemd.units import I64, Bools

LIMIT_BYTES = 64 << 20
DRAIN = "drain"


class _Entry(Struct, eq=False):
    """One operation while it is recorded."""

    method: str
    args: dict[str, Any]
    number: int = 0
    gone_at: int = 0
    asked: int = 0
    declined: bool = False
    end: Line = field(default_factory=dict)

    def ask(self, cancelled: Callable[[], bool]) -> bool:
        """Ask whether the caller has gone; note the first time that it has."""
        self.asked += 1
        gone = cancelled()
        if gone and not self.gone_at:
            self.gone_at = self.asked
        return gone

    def be_checked(self, check: Callable[[Core], None], core: Core) -> None:
        """Have the caller check what it asked for; note if it refuses."""
        try:
            check(core)
        except RmemError:
            self.declined = True
            raise


class _Asked(Cancelled):
    """What an operation asks in place of what its caller gave."""

    def __init__(self, entry: _Entry, cancelled: Callable[[], bool]) -> None:
        super().__init__(partial(entry.ask, cancelled), lambda tell: None)
        self._inner = cancelled

    def wake(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called when the caller goes."""
        if isinstance(self._inner, Cancelled):
            self._inner.wake(wake)


def _listen(entry: _Entry, given: dict[str, Any]) -> None:
    """Hear what an operation asks of its caller while it runs."""
    if "cancelled" in given:
        given["cancelled"] = _Asked(entry, given["cancelled"])
    if "check" in given:
        given["check"] = partial(entry.be_checked, given["check"])
    report = given.get("report")
    if isinstance(report, Report):
        report.cancelled = _Asked(entry, report.cancelled)


class _Current(threading.local):
    entry: _Entry | None = None


class Recorder:
    """A recording of one engine.

    Args:
        engine: the engine.
        limit_bytes: the trace ends when it would be longer.
        key: of the digests; a new one, which nobody knows, unless a test gives it.
        state_every: operations between two digests of the whole state; 0: none but at both ends.

    Attributes:
        sink: the lines.
        operations: how many began.
    """

    def __init__(
        self,
        engine: Engine,
        limit_bytes: int = LIMIT_BYTES,
        key: bytes | None = None,
        state_every: int = 0,
    ) -> None:
        self._engine = engine
        self._core = engine.core
        self._digests = Digests(secrets.token_bytes(32) if key is None else key)
        self._state_every = state_every
        self._current = _Current()
        self._running: dict[Operation, _Entry] = {}
        self._before: set[tuple[int, int]] = set()
        self._chain = state.Chain()
        self._quotas: Any = None
        self._platforms: list[str] = []
        self.sink = Sink(limit_bytes)
        self.operations = 0

    # --- beginning and end -------------------------------------------------------------------
    def start(self, cancelled: Callable[[], bool] = never) -> int:
        """Begin, as soon as no bytes are under way; return the revision of the begin.

        It is an operation like any other, which may wait.

        Raises:
            Unavailable: INTERRUPTED; the caller went away.
        """
        return self._core.run(self._begin, who="trace", cancelled=cancelled, repeatable=True)

    def stop(self, why: str = "stopped") -> None:
        """End; operations that are under way have no end in the trace."""
        with self._core.locked():
            if self._core.tracer is self:
                self._say_state()
                self._detach()
            self.sink.end(why)

    def _begin(self) -> Steps[int]:
        core = self._core
        yield from core.scrub()
        while core.space.holders or core.ranges.any_in_progress:
            step = Step("trace", wait=True, interruptible=True)
            yield step
            if step.cancelled:
                raise INTERRUPTED("bytes are under way", state="waits to begin a recording")
            yield from core.scrub()
        # the journal's part of what came before is not the trace's
        core.journal.flush()
        self._platforms = sorted(core.registry.platforms)
        self._before = set(core.running)
        self.sink.write(checkpoint.header(core))
        self._say_state()
        core.tracer = self
        for name in (*OPERATIONS, *AT_ONCE):
            setattr(self._engine, name, self._recorded(name, getattr(self._engine, name)))
        setattr(self._engine, DRAIN, self._drained(self._engine.drain))
        return core.journal.revision

    def _detach(self) -> None:
        self._core.tracer = None
        for name in (*OPERATIONS, *AT_ONCE, DRAIN):
            vars(self._engine).pop(name, None)

    def _say(self, line: Line) -> None:
        if not self.sink.write(line) and self._core.tracer is self:
            # full: who holds no lock now comes by again with the next line that needs it
            self._detach_when_locked()

    def _detach_when_locked(self) -> None:
        if self._core.is_locked():
            self._detach()

    def _say_state(self) -> None:
        tables = state.digests(self._core.space, self._platforms)
        self._say({
            STATE: state.total(tables), "operations": self.operations,
            "revision": self._core.journal.revision, "tables": tables,
        })  # fmt: skip

    def _drained(self, drain: Callable[[], None]) -> Callable[[], None]:
        """Have the recording end before vCPUs are made to exit, which no operation asked for."""

        def called() -> None:
            self.stop("drained")
            drain()

        return called

    # --- calls -------------------------------------------------------------------------------
    def _recorded(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        at_once = name in AT_ONCE

        @wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            bound = signature(name).bind(None, *args, **kwargs)
            given = bound.arguments
            del given["self"]
            entry = _Entry(name, plain_arguments(given, self._digests))
            _listen(entry, given)
            outer, self._current.entry = self._current.entry, entry
            lock: AbstractContextManager[None] = self._core.locked() if at_once else nullcontext()
            try:
                with lock:
                    result = method(**given)
                    self._finish(entry, "a descriptor" if name == "shared_descriptor" else result)
            except Exception as error:
                self._finish(entry, None, error)
                raise
            finally:
                self._current.entry = outer
            return result

        return called

    def _finish(self, entry: _Entry, result: Any, error: BaseException | None = None) -> None:
        if self.sink.stopped:
            return
        if not entry.end:
            # refused before it had the lock, or done within one hold of it
            with self._core.locked():
                self._number(entry)
                self._note_end(entry)
        self._say({**entry.end, **outcome(result, error, self._digests)})

    def _number(self, entry: _Entry) -> None:
        if self._state_every and self.operations % self._state_every == 0:
            self._say_state()
        self.operations += 1
        entry.number = self.operations
        if self._core.quotas.in_force is not self._quotas:
            self._quotas = self._core.quotas.in_force
            default, tenants = self._quotas
            self._say({
                "quotas": asdict(default),
                "tenants": {name: asdict(limits) for name, limits in tenants.items()},
            })  # fmt: skip
        line: Line = {"begin": entry.number, "method": entry.method, "args": entry.args}
        owner = entry.args.get("owner") or {"session": entry.args.get("session", 0)}
        if any(owner.values()):
            line["for"] = owner
        self._say(line)

    def _note_end(self, entry: _Entry) -> None:
        entry.end = {
            "end": entry.number, "revision": self._core.journal.revision,
            "writes": self._chain.digest,
        }  # fmt: skip
        if entry.gone_at:
            entry.end["gone_at"] = entry.gone_at
        if entry.declined:
            entry.end["declined"] = True

    # --- by the core -------------------------------------------------------------------------
    def begun(self, operation: Operation) -> None:
        """Number an operation that has the lock for the first time."""
        entry = self._current.entry
        if entry is not None and not entry.number:
            self._running[operation] = entry
            self._number(entry)

    def resumed(self, operation: Operation, step: Step) -> None:
        """Note that an operation goes on: the interleaving."""
        entry = self._running.get(operation)
        if entry is not None:
            self._say({"step": entry.number, "at": step.name})

    def ended(self, operation: Operation) -> None:
        """Note where an operation's end is among the others' steps."""
        entry = self._running.pop(operation, None)
        if entry is not None:
            self._note_end(entry)
        elif self._before:
            self._say_left()

    def _say_left(self) -> None:
        """Say which vCPUs came out that were running before the recording began."""
        left = self._before - self._core.running
        if left:
            self._before -= left
            self._say({"left": sorted(map(list, left))})

    def committing(self) -> None:
        """Note hooks that took too long: their VMs are frozen now."""
        if self._core.guard.overdue:
            self._say({
                "overdue": self._number_now(), "revision": self._core.journal.revision,
                "hooks": [list(one) for one in self._core.guard.overdue],
            })  # fmt: skip

    def committed(self, tx: Tx) -> None:
        """Take in what was written; what older operations write is not executed again, but said."""
        self._chain.add(tx)
        if self._number_now() == 0:
            self._say(checkpoint.written(self._core.journal.revision, tx))

    def shared(self, file: int, memfd: Memfd) -> Memfd:
        """Have what an operation reads of shared bytes recorded."""
        entry = self._current.entry
        if entry is None or not entry.number:
            return memfd

        def tell(what: dict[str, Any]) -> None:
            self._say({"read": entry.number, "file": file, **what})

        return RecordedMemfd(memfd, tell)

    def compared(self, vm: int, gfns: I64, pfns: I64, wrong: Bools) -> Bools:
        """Note which private pages a guest found other than it expected."""
        if wrong.any():
            self._say({
                "compared": self._number_now(), "vm": vm, "gfn": int(gfns[0]),
                "npages": gfns.size, "wrong": runs_of(gfns[wrong]),
            })  # fmt: skip
        return wrong

    def _number_now(self) -> int:
        entry = self._running.get(self._core.waits.current)
        return entry.number if entry is not None else 0
