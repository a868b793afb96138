"""What a simulated run leaves: its figures, and a trace that tells it from every other run."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from rmemd.engine.journal import Journal
from rmemd.hooks.tables import Space
from rmemd.store.codec import Record, decode
from rmemd.store.log import Log


@dataclass
class Figures:
    """What a run came to.

    Attributes:
        steps: steps of operations, each of which was checked.
        faults: what went wrong because somebody had it go wrong, by kind.
        ended: calls that ended, by action and "ok" or the refusal.
        compared: operations after which the state was compared with the oracle's.
        differences: how often it was another one.
    """

    steps: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    verified: int = 0
    compared: int = 0
    differences: int = 0
    trace: str = ""


@dataclass(frozen=True)
class Played:
    """How a run ended.

    Attributes:
        failure: what was violated, "" if nothing was; ``kind`` tells one failure from another.
        at: the action after which it was.
    """

    figures: Figures
    failure: str = ""
    kind: str = ""
    at: int = 0


def failed(figures: Figures, error: Exception, at: int) -> Played:
    """Say how a run failed: something is not as it must be, or an error that nobody expects."""
    if isinstance(error, AssertionError) and str(error):
        text = str(error).partition(": ")[2]
        # the rule of it, without the pages and revisions that it was seen at
        return Played(figures, str(error), _kind(text), at)
    where = "".join(traceback.format_exception(error)[-3:])
    return Played(figures, where, type(error).__name__, at)


def _kind(text: str) -> str:
    return "".join(c for c in text.rpartition(": ")[0] + text[-30:] if not c.isdigit())[-40:]


class Trace:
    """A digest over every step, and over what was written in it."""

    def __init__(self) -> None:
        self._steps = blake2b(digest_size=16)
        self._writes = blake2b(digest_size=8)
        self._seen = 0

    @property
    def state(self) -> str:
        """Return a digest of the state: of all that was written, in order."""
        return self._writes.hexdigest()

    def note(self, text: str) -> None:
        """Take a step down."""
        self._steps.update(text.encode())

    def take_down(self, journal: Journal) -> None:
        """Take down what was recorded since the last time."""
        fresh = journal.revision - self._seen
        self._seen = journal.revision
        for record in list(journal.records)[-fresh:] if fresh else ():
            self._writes.update(record.label.encode())
            for write in record.writes:
                self._writes.update(f"{write.table} {write.op}".encode())
                for arg in write.args:
                    is_array = isinstance(arg, np.ndarray)
                    self._writes.update(arg.tobytes() if is_array else repr(arg).encode())

    def hexdigest(self) -> str:
        """Return the digest of all steps."""
        return self._steps.hexdigest()


def read_log(found: dict[str, int]) -> Space:
    """Return the state that a log describes."""
    space = Space()
    log = Log.read((found["journal.0"], found["journal.1"]))
    assert log is not None
    for frame in log.frames:
        for entry in decode(frame):
            for write in entry.writes if isinstance(entry, Record) else ():
                space.apply(write)
    return space
