"""The daemon's check of itself: every so often all invariants, over the state as it is.

Owns the thread and its rhythm. A check holds the engine's lock for a sweep of the host, so the
pause is from the end of one to the beginning of the next. After it some transactions are watched
(``engine.monitors``), and what was seen is in the next check. What is violated is logged as errors;
the daemon goes on, since nobody knows which of its guests are concerned.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import structlog

from rmemd.engine.engine import Engine

if TYPE_CHECKING:
    from rmemd.engine.invariants import Checked

# a state that is broken is broken everywhere: the first lines say it
LOGGED_MAX = 20

log = structlog.get_logger("rmemd")


class SelfCheck:
    """Checks an engine every so many seconds; 0: not at all."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._every_seconds = 0.0
        self._watched = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False

    def every(self, seconds: float, watched: int = 0) -> None:
        """Set the pause between two checks, and how many transactions to watch after each.

        The first comes after a pause.
        """
        with self._changed:
            self._every_seconds, self._watched = seconds, watched
            if seconds and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="self-check", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Check no more; wait for a check that is under way."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while self._is_due():
            report(self._engine.check())
            if self._watched:
                self._engine.watch(self._watched)

    def _is_due(self) -> bool:
        """Wait out the pause; return whether to check, which is until the end."""
        with self._changed:
            # whoever changes the pause begins it anew
            while not self._ending and self._changed.wait(self._every_seconds or None):
                pass
            return not self._ending


def report(done: Checked) -> None:
    """Log what is violated, a line each, and how much is not logged."""
    for violated in done.violated[:LOGGED_MAX]:
        number, _, text = violated.partition(": ")
        log.error("invariant_violated", invariant=number, text=text, revision=done.revision)
    if len(done.violated) > LOGGED_MAX:
        log.error("invariants_violated", violations=len(done.violated), revision=done.revision)
