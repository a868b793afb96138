"""A reentrant lock that goes to those who wait before it goes back to whoever let it go.

Owns ``FairLock``, made for ``threading.Condition``. A running vCPU lets the engine's lock go
between two steps and takes it again at once; with a plain lock a waiting thread, which must first
be given the interpreter, loses that race again and again.
"""

from __future__ import annotations

import threading
from typing import Any


class FairLock:
    """Who waits holds the turn; whoever comes next, the last owner too, waits for the turn."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        # of RLock, Condition needs methods that the published types lack
        self._lock: Any = threading.RLock()

    def acquire(self) -> bool:
        """Take the lock, once more if it is ours."""
        if self._lock._is_owned():
            taken: bool = self._lock.acquire()
            return taken
        with self._turn:
            taken = self._lock.acquire()
            return taken

    def release(self) -> None:
        """Let the lock go, once."""
        self._lock.release()

    def is_owned(self) -> bool:
        """Return whether the calling thread has the lock."""
        owned: bool = self._lock._is_owned()
        return owned

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    # --- what Condition asks of a reentrant lock ---------------------------------------------
    def _release_save(self) -> Any:
        return self._lock._release_save()

    def _acquire_restore(self, state: Any) -> None:
        with self._turn:
            self._lock._acquire_restore(state)

    def _is_owned(self) -> bool:
        return self.is_owned()
