"""A reentrant lock that goes to those who wait before it goes back to whoever let it go.

Owns ``FairLock``, made for ``threading.Condition``. A running vCPU lets the engine's lock go
between two steps and takes it again at once; with a plain lock a waiting thread, which must first
be given the interpreter, loses that race again and again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class FairLock:
    """Who waits holds the turn; whoever comes next, the last owner too, waits for the turn.

    Attributes:
        release: lets the lock go, once.
        is_owned: returns whether the calling thread has the lock.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        # of RLock, Condition needs methods that the published types lack
        lock: Any = threading.RLock()
        self._lock = lock
        self.release: Callable[[], None] = lock.release
        self.is_owned: Callable[[], bool] = lock._is_owned
        # what else Condition asks of a reentrant lock
        self._is_owned = lock._is_owned
        self._release_save = lock._release_save

    def acquire(self) -> bool:
        """Take the lock, once more if it is ours."""
        taken: bool
        if not self._turn.locked() or self.is_owned():
            # where nobody waits there is no turn to wait for
            taken = self._lock.acquire(False)
            if taken:
                return True
        with self._turn:
            taken = self._lock.acquire()
            return taken

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()

    def _acquire_restore(self, state: Any) -> None:
        with self._turn:
            self._lock._acquire_restore(state)
