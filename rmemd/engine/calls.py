"""Exactly once: what a call of the engine came to, until its caller was answered.

Owns the results of runs that were made on behalf of a named call. A daemon may die after a call is
carried out and before its client hears of it; the client asks again, and each run of the repeated
call is answered with what it came to the first time. The result goes into the journal in the frame
of the run's last record, so there is never one without the other, unless the run let the lock go
in between: then a repeat runs again on what the first one left, as an interrupted ioctl does, or
goes on from how far that got, where a page cannot be done twice.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from rmemd.engine.notes import Notes
from rmemd.errors import REASONS, Details, RmemError
from rmemd.model.files import RestrictedFile
from rmemd.model.vms import Vm

if TYPE_CHECKING:
    from rmemd.engine.core import Core

RESULTS = "results"
PROGRESS = "progress"
# what names a call, and a run of it: the call's name with the run's number behind it
Key = tuple[Hashable, ...]
Run = tuple[Hashable, ...]
# a result as a journal keeps it: what it is, then itself or, of an object of the model, its number
Named = tuple[str, Any]
_PLAIN, _VM, _FILE = "", "vm", "file"


class _Current(threading.local):
    def __init__(self) -> None:
        self.key: Key | None = None
        self.runs = 0


class _Naming:
    """The block in which a thread's runs are those of one call."""

    __slots__ = ("_before", "_current", "_key")

    def __init__(self, current: _Current, key: Key) -> None:
        self._current = current
        self._key = key

    def __enter__(self) -> None:
        current = self._current
        self._before = current.key, current.runs
        current.key, current.runs = self._key, 0

    def __exit__(self, *_: object) -> None:
        self._current.key, self._current.runs = self._before


class Calls:
    """Results of runs by call and number, of calls that are not answered yet."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._results = notes.of_kind(RESULTS)
        self._progress = notes.of_kind(PROGRESS)
        self._current = _Current()
        self._by_call: dict[Key, list[Run]] = {}

    def of(self, key: Key) -> _Naming:
        """Have this thread's runs, in a ``with`` block, be those of a call; ``key`` is plain."""
        return _Naming(self._current, key)

    def name(self, key: Key | None) -> None:
        """Have this thread's runs from now on be those of a call; None: of none."""
        current = self._current
        current.key, current.runs = key, 0

    def next_run(self) -> Run | None:
        """Return the name of the run that begins; None if it is of no named call."""
        current = self._current
        key = current.key
        if key is None:
            return None
        current.runs = number = current.runs + 1
        return *key, number

    def is_repeat(self) -> bool:
        """Return whether the run that this thread makes next was made before the daemon died."""
        current = self._current
        key = current.key
        # of a call that begins there is nothing
        return key in self._by_call and self.is_known((*key, current.runs + 1))

    def unanswered(self) -> list[Key]:
        """Return the calls that have results, oldest first."""
        return list(self._by_call)

    def is_known(self, run: Run) -> bool:
        """Return whether a run was made before the daemon died, and came to something."""
        return run in self._results

    def known(self, run: Run) -> tuple[Named, int]:
        """Return what a run that is known came to the first time, and at which revision."""
        kind, value, revision = self._results[run]
        return (kind, value), revision

    def came_to(self, run: Run, result: Named, revision: int) -> None:
        """Note what a run came to, at which revision, in the frame of its last record."""
        kind, value = result
        self._notes.set(RESULTS, run, (kind, value, revision), flush=False)
        self._by_call.setdefault(run[:-1], []).append(run)

    def came_to_nothing(self, run: Run) -> None:
        """Take back what a run was to come to: it was refused after all."""
        self._notes.drop(RESULTS, run)

    def got_before(self, run: Run) -> int:
        """Return how far a run got when it was made before, 0 if it was not."""
        done: int = self._progress.get(run, 0)
        return done

    def got_to(self, run: Run, done: int) -> None:
        """Note how far a run has got, in the frame of its last record."""
        self._notes.set(PROGRESS, run, done, flush=False)
        self._by_call.setdefault(run[:-1], []).append(run)

    def forget(self, key: Key) -> None:
        """Forget a call's results: its answer is kept, or has arrived.

        The journal is not told. A daemon that reads them back must see from the answers that it
        has, or from the calls that came later, that nobody will repeat this one.
        """
        for run in self._by_call.pop(key, ()):
            self._notes.let_go(RESULTS, run)
            if run in self._progress:
                self._notes.drop(PROGRESS, run)

    def restore(self) -> None:
        """Take over the results that a journal had."""
        self._by_call.clear()
        for run in (*self._results, *self._progress):
            self._by_call.setdefault(run[:-1], []).append(run)


class _Refused(Struct, frozen=True):
    """A result that says what was refused, and that refusal by its reason's name."""

    result: Any
    reason: str
    message: str
    details: Details
    errno: int


def named(result: Any) -> Named:
    """Return a result as a journal keeps it: by numbers and names instead of objects."""
    if result is None or type(result) is int:
        return _PLAIN, result
    refusal = getattr(result, "refusal", None)
    if isinstance(refusal, RmemError):
        bare = replace(result, refusal=None)
        return _PLAIN, _Refused(
            bare, refusal.reason.name, refusal.message, refusal.details, refusal.errno
        )
    if isinstance(result, Vm):
        return _VM, result.info.vm
    if isinstance(result, RestrictedFile):
        return _FILE, result.info.file
    return _PLAIN, result


def looked_up(core: Core, result: Named) -> Any:
    """Return the result that was kept.

    Raises:
        NotFound: NO_SUCH_VM, NO_SUCH_FILE; what was made is gone by now.
    """
    kind, kept = result
    if isinstance(kept, _Refused):
        made = REASONS[kept.reason](kept.message, errno=kept.errno)
        return replace(
            kept.result, refusal=type(made)(made.reason, made.message, kept.details, kept.errno)
        )
    if kind == _PLAIN:
        return kept
    return core.vms.get(kept) if kind == _VM else core.files.get(kept)
