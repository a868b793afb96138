"""``rmemd`` with a moment at which it kills itself: ``python launcher.py serve ...``.

A keeper starts a daemon again as it was started, so each life comes through here, counts itself,
and is told by its plan at which passage of which method it is to be killed. Nothing else of the
daemon differs, except that its log is begun anew sooner.
"""

from __future__ import annotations

import faulthandler
import importlib
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from crash.plans import (
    AFTER,
    ARMED,
    BEFORE,
    ENVIRONMENT,
    KILLED,
    LIVES,
    NUMBER,
    POINTS,
    WITHIN,
    Plan,
    read,
)

CHECKPOINT_BYTES = 96 << 10
# what a call is asked for, made half of it
HALVES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "write": lambda one, fd, view, offset: (one, fd, view[: max(1, view.nbytes // 2)], offset),
    "fallocate_each": lambda one, fd, mode, offsets, lengths: (
        one, fd, mode, offsets[: -(-offsets.size // 2)], lengths[: -(-lengths.size // 2)],
    ),
}  # fmt: skip


class Trap:
    """Kills this process at the nth passage of a method."""

    def __init__(self, plan: Plan, life: int, directory: Path) -> None:
        self._plan = plan
        self._life = life
        self._lock = threading.Lock()
        self._left = plan.nth
        with (directory / ARMED).open("rb") as file:
            self._armed = mmap.mmap(file.fileno(), NUMBER, access=mmap.ACCESS_READ)
        self._killed = os.open(directory / KILLED, os.O_WRONLY | os.O_CLOEXEC)

    def set(self) -> None:
        """Lay it."""
        module, owner, name = POINTS[self._plan.point].where
        holder = getattr(importlib.import_module(module), owner)
        setattr(holder, name, self._around(getattr(holder, name)))

    def _around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        when = self._plan.when

        def trapped(*args: Any, **named: Any) -> Any:
            if when == BEFORE:
                self._pass()
            if when == WITHIN and self._is_due():
                real(*HALVES[real.__name__](*args))
                self._kill()
            done = real(*args, **named)
            if when == AFTER:
                self._pass()
            return done

        return trapped

    def _pass(self) -> None:
        if self._is_due():
            self._kill()

    def _is_due(self) -> bool:
        armed = int.from_bytes(self._armed[:], "little")
        if not self._plan.at_start and armed != self._life:
            return False
        with self._lock:
            self._left -= 1
            return self._left == 0

    def _kill(self) -> None:
        now = time.monotonic_ns().to_bytes(NUMBER, "little")
        os.pwrite(self._killed, now, self._life * NUMBER)
        os.kill(os.getpid(), signal.SIGKILL)


def count_life(directory: Path) -> int:
    """Return which life this is, from 0, and count it."""
    with (directory / LIVES).open("ab") as lives:
        lives.write(b".")
        lives.flush()
        return lives.tell() - 1


def main() -> None:
    """Be ``rmemd``."""
    # what its threads do, told to the log where somebody waits in vain
    faulthandler.register(signal.SIGUSR1)
    directory = Path(os.environ[ENVIRONMENT])
    life = count_life(directory)
    plan = read(directory, life)
    journal: Any = importlib.import_module("rmemd.engine.journal")
    journal.CHECKPOINT_BYTES, journal.CHECKPOINT_RATIO = CHECKPOINT_BYTES, 0
    if plan is not None:
        Trap(plan, life, directory).set()
    from rmemd.daemon.cli import main as rmemd

    rmemd(prog_name="rmemd")


if __name__ == "__main__":
    main()
