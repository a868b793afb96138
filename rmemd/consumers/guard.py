"""Calling a plugin's hooks: answers checked, faults named, time measured.

Owns the only calls from rmemd into plugin code. A refusal passes through with the plugin's name on
it; any other exception and any answer outside the contract become a PluginFault, and the caller
undoes the transaction. Hooks run inline: the deadline cannot stop one, but an overdue hook freezes
its VM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sized
from typing import Any, Protocol

import numpy as np
from msgspec import Struct, field

from rmemd.errors import PLUGIN_NONSENSE, PLUGIN_RAISED, REASONS, RmemError
from rmemd.hooks.hooktx import HookServices, HookTx
from rmemd.hooks.ops import NotifierOps, PlatformOps
from rmemd.hooks.state import State, is_sound
from rmemd.hooks.tx import Held, Tx
from rmemd.hooks.types import (
    HOST_VIEWS,
    AccessAnswer,
    AccessCode,
    CallAction,
    CallAnswer,
    Content,
    HostAnswer,
    PageStates,
    Pin,
    Populated,
    Runs,
)
from rmemd.units import I64, U8

# a hook that runs longer than this freezes its VM
DEADLINE_SECONDS = 2.0
# what a plugin may raise; the rest ends the daemon's thread
CAUGHT = (Exception, SystemExit, GeneratorExit)
# an argument that an op does not have
_NONE = object()


class Passages(Protocol):
    """What is known of the passages of points (``engine.faultrules``), read at every hook."""

    @property
    def passed(self) -> defaultdict[str, int]:
        """How often each point was passed."""

    @property
    def waiting(self) -> Sized:
        """The rules that wait; while there is none, a passage is only counted."""


class _Unruled(Struct):
    """No fault rules, where nobody has any."""

    passed: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    waiting: Sized = ()


class Guard(Struct):
    """What every guarded call shares.

    Attributes:
        clock: seconds, monotonic; handed in, since nothing below the daemon reads a clock.
        deadline_seconds: how long a hook may take.
        overdue: (vm, hook, seconds) of overdue calls, until the engine has frozen their VMs.
        report: told of a plugin's fault with its traceback at hand; the daemon logs it.
        watch: told of each hook that agreed in a transaction: (tx, vm, op, its arguments, answer).
        passages: of the points that a fault rule can strike at; the engine's, once it is there.
        other_calls: hooks called since the start that are no passages.
        overdue_calls: hooks that took too long, since the start.
    """

    clock: Callable[[], float]
    deadline_seconds: float = DEADLINE_SECONDS
    overdue: list[tuple[int, str, float]] = field(default_factory=list)
    report: Callable[[str, BaseException], None] = lambda where, error: None
    watch: Callable[[Tx, int, str, tuple[Any, ...], Any], None] | None = None
    passages: Passages = field(default_factory=_Unruled)
    other_calls: int = 0
    overdue_calls: int = 0

    @property
    def calls(self) -> int:
        """Return how many hooks were called since the start, or failed instead by a rule."""
        passed = self.passages.passed
        return self.other_calls + sum(passed.get(op, 0) for op in _ANSWERS)

    def call(self, vm: int, where: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a hook.

        Raises:
            RmemError: as the hook refused, with ``where`` added, or PLUGIN_RAISED.
            Held: a write met a suspended transaction; not the plugin's doing.
        """
        begun = self.clock()
        try:
            return function(*args)
        except Held:
            raise
        except CAUGHT as error:
            raise self.failed(where, error) from error
        finally:
            took = self.clock() - begun
            self.other_calls += 1
            if took > self.deadline_seconds:
                self.is_overdue(vm, where, took)

    def failed(self, where: str, error: BaseException) -> RmemError:
        """Return what a hook's exception is for the engine."""
        if isinstance(error, RmemError):
            return error.with_details(where=error.details.where or where)
        self.report(where, error)
        return PLUGIN_RAISED(f"{where} raised {type(error).__name__}", where=where)

    def is_overdue(self, vm: int, where: str, took: float) -> None:
        """Remember a call that took too long."""
        self.overdue_calls += 1
        self.overdue.append((vm, where, took))


class Platform:
    """A vendor's host-wide half, guarded."""

    def __init__(self, name: str, ops: PlatformOps, guard: Guard, services: HookServices) -> None:
        self.name = name
        self.ops = ops
        self._guard = guard
        self._services = services

    def call(self, tx: Tx, vm: int, op: str, *args: Any) -> Any:
        """Call an op that is not NULL; ``...`` among the arguments stands for the hook's tx."""
        hook_tx = HookTx(
            tx, (f"platform/{self.name}/", f"vm/{vm}/{self.name}/"), vm, self._services
        )
        args = tuple(hook_tx if a is ... else a for a in args)
        if not any(a is hook_tx for a in args):
            args = (hook_tx, *args)
        where = f"{self.name}.{op}"
        tx.hook(where)
        answer = self._guard.call(vm, where, getattr(self.ops, op), *args)
        check = _PLATFORM_ANSWERS.get(op)
        if check is not None and not _sound(check, answer, args[1:]):
            raise _nonsense(where, answer)
        if self._guard.watch is not None:
            self._guard.watch(tx, vm, op, args[1:], answer)
        return answer


class Consumer:
    """One VM's consumer, guarded. ``ops`` says what is NULL; call only what is not."""

    def __init__(
        self,
        name: str,
        vm: int,
        platform: Platform,
        made: object,
        ops: NotifierOps,
        guard: Guard,
        services: HookServices,
    ) -> None:
        self.name = name
        self.vm = vm
        self.platform = platform
        self.made = made
        self._guard = guard
        self._services = services
        self._prefixes = (f"vm/{vm}/{platform.name}/", f"platform/{platform.name}/")
        self.ops = ops

    @property
    def ops(self) -> NotifierOps:
        """Return the table of ops; what is called is looked up once, when it is set."""
        return self._ops

    @ops.setter
    def ops(self, ops: NotifierOps) -> None:
        self._ops = ops
        # plain tuples: no other sequence is taken apart as fast
        self._hooks = {
            op: (getattr(ops, op), f"{self.name}.{op}", check) for op, check in _ANSWERS.items()
        }

    def call(
        self, tx: Tx, op: str, a: Any = _NONE, b: Any = _NONE, c: Any = _NONE, d: Any = _NONE
    ) -> Any:
        """Call an op that is not NULL with its arguments, and check its answer.

        This is called a few times for every operation, and each Python call costs as much as a
        hook that does nothing: so what ``Guard.call`` and ``Tx.hook`` do is written out here, and
        one argument, which most ops have, is neither packed nor unpacked.

        Raises:
            RmemError: the hook refused, or PLUGIN_RAISED, PLUGIN_NONSENSE.
        """
        function, where, check = self._hooks[op]
        guard = self._guard
        passages = guard.passages
        if not passages.waiting:
            passages.passed[op] += 1
        elif injected := self._services.injected(tx, self.vm, op):
            raise _injected(where, injected)
        hook_tx = tx.views.get(self)
        if hook_tx is None:
            hook_tx = tx.views[self] = HookTx(tx, self._prefixes, self.vm, self._services)
        tx.hooks.append((len(tx.redo), len(tx.events), where))
        begun = guard.clock()
        try:
            if b is _NONE and a is not _NONE:
                answer = function(hook_tx, a)
            else:
                answer = function(hook_tx, *_given(a, b, c, d))
        except Held:
            raise
        except CAUGHT as error:
            raise guard.failed(where, error) from error
        finally:
            took = guard.clock() - begun
            if took > guard.deadline_seconds:
                guard.is_overdue(self.vm, where, took)
        if answer is not check and not _sound(check, answer, _given(a, b, c, d)):
            raise _nonsense(where, answer)
        if guard.watch is not None:
            guard.watch(tx, self.vm, op, _given(a, b, c, d), answer)
        return answer

    def page_state(self, gfns: Any, pfns: Any) -> PageStates | None:
        """Return the vendor's states of pages, None where the op is NULL."""
        if self.ops.page_state is None:
            return None
        where = f"{self.name}.page_state"
        answer = self._guard.call(self.vm, where, self.ops.page_state, gfns, pfns)
        if not _sound(_states, answer, (gfns,)):
            raise _nonsense(where, answer)
        states: PageStates = answer
        return states

    def export_state(self, tx: Tx) -> State:
        """Return what the consumer keeps; call only if the op is not NULL.

        Raises:
            RmemError: the hook refused, or PLUGIN_RAISED, PLUGIN_NONSENSE.
        """
        where = f"{self.name}.export_state"
        injected = self._services.injected(tx, self.vm, "export_state")
        if injected:
            raise _injected(where, injected)
        answer = self._guard.call(self.vm, where, self.ops.export_state or _absent)
        if not _sound(lambda state, _: is_sound(state), answer, ()):
            raise _nonsense(where, answer)
        # the mapping may be of the plugin's own class; the state must outlive that
        return State(answer.kind, answer.version, dict(answer.tables))

    def resume(self, read: Callable[[I64], U8]) -> str:
        """Have what is not in tables be rebuilt; return what is lost, "" for nothing.

        Raises:
            RmemError: the hook refused, or PLUGIN_RAISED, PLUGIN_NONSENSE.
        """
        if self.ops.resume is None:
            return ""
        where = f"{self.name}.resume"
        answer = self._guard.call(self.vm, where, self.ops.resume, read)
        if not isinstance(answer, str):
            raise _nonsense(where, answer)
        return answer


def _given(*args: Any) -> tuple[Any, ...]:
    """Return the arguments that are there."""
    return tuple(arg for arg in args if arg is not _NONE)


def _absent() -> None:
    """Answer nonsense for a hook that is not there."""


def _injected(where: str, error: str) -> RmemError:
    reason = REASONS.get(error, PLUGIN_RAISED)
    return reason(f"{where} goes wrong by a fault rule: {error}", where=where, state="injected")


def _nonsense(where: str, answer: Any) -> RmemError:
    return PLUGIN_NONSENSE(f"{where} answered {type(answer).__name__}", where=where)


def _sound(check: Callable[[Any, Any], bool] | None, answer: Any, args: Any) -> bool:
    """Return whether an answer is within the contract; one that cannot even be read is not."""
    try:
        return answer is None if check is None else check(answer, args)
    except Exception:
        return False


def _of(kind: type) -> Callable[[Any, Any], bool]:
    return lambda answer, _: isinstance(answer, kind)


def _mask(answer: Any, n: int) -> bool:
    return isinstance(answer, np.ndarray) and answer.dtype == np.bool_ and answer.shape == (n,)


def _access(answer: Any, args: Any) -> bool:
    runs: Runs = args[1]
    if not isinstance(answer, AccessAnswer) or answer.codes.shape != (runs.total,):
        return False
    if (answer.codes == AccessCode.EXCEPTION).any() and answer.exception is None:
        return False
    return bool(answer.codes.max(initial=0) <= max(AccessCode))


def _called(answer: Any, args: Any) -> bool:
    if not isinstance(answer, CallAnswer) or not isinstance(answer.action, CallAction):
        return False
    if answer.action is CallAction.EXCEPTION and answer.exception is None:
        return False
    # an answer by which the guest gets no further would be asked for for ever
    stuck = answer.action in (CallAction.DONE, CallAction.CONVERT) and not answer.done
    return bool(0 <= answer.done <= args[2].size) and not (stuck and not answer.status)


def _states(answer: Any, args: Any) -> bool:
    if not isinstance(answer, PageStates) or answer.codes.shape != args[0].shape:
        return False
    return bool(answer.codes.dtype == np.uint8 and answer.codes.max(initial=0) < len(answer.names))


def _host_answer(answer: Any, args: Any) -> bool:
    if not isinstance(answer, HostAnswer) or answer.views.shape != args[0].shape:
        return False
    if answer.destroyed is not None and not _mask(answer.destroyed, args[0].size):
        return False
    return bool(answer.views.max(initial=0) < len(HOST_VIEWS))


# what an op answers; None: nothing
_ANSWERS: dict[str, Callable[[Any, Any], bool] | None] = {
    "invalidate_start": None,
    "invalidate_end": None,
    "prepare": None,
    "map": None,
    "pin": _of(Pin),
    "unpin": lambda answer, args: _mask(answer, args[0].total),
    "migrate_folio": None,
    "convert": _of(Content),
    "populate": _of(Populated),
    "finalize": _of(bytes),
    "enter": None,
    "leave": None,
    "guest_access": _access,
    "guest_call": _called,
    "error": _of(str),
    "import_state": None,
}
_PLATFORM_ANSWERS: dict[str, Callable[[Any, Any], bool]] = {
    "make_consumer": lambda answer, _: answer is not None,
    "destroy_consumer": lambda answer, _: answer is None,
    "host_access": _host_answer,
    "free": lambda answer, args: _mask(answer, args[0].size),
}
# the ops at which a fault rule can strike, in the table's order
INJECTABLE = tuple(
    op for op in NotifierOps.__struct_fields__ if op in _ANSWERS or op == "export_state"
)
