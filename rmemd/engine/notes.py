"""Notes: small facts of the doors that must survive the daemon's process.

Owns results of calls that are not answered yet, answers by request id, tokens and the like: values
by kind and key, kept in the journal beside the state and never a part of it. They have no
revision, no watcher is told of them, and a replayed run need not have the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from rmemd.engine.fairlock import FairLock
from rmemd.engine.journal import Journal
from rmemd.store.codec import NoteEntry


class Notes:
    """Values by kind and key. Safe from any thread.

    Args:
        journal: where they are written.
        lock: the engine's, which guards the journal.
    """

    def __init__(self, journal: Journal, lock: FairLock) -> None:
        self._journal = journal
        self._lock = lock
        self._kinds: dict[str, dict[Hashable, Any]] = {}

    def get(self, kind: str, key: Hashable, default: Any = None) -> Any:
        """Return a note, or ``default``."""
        return self._kinds.get(kind, {}).get(key, default)

    def of_kind(self, kind: str) -> Mapping[Any, Any]:
        """Return the notes of a kind as they are at any time, to look them up by key."""
        return self._kinds.setdefault(kind, {})

    def items(self, kind: str) -> list[tuple[Any, Any]]:
        """Return the notes of a kind, oldest first."""
        with self._lock:
            return list(self._kinds.get(kind, {}).items())

    def set(self, kind: str, key: Hashable, value: Any, flush: bool = True) -> None:
        """Note a value; it is safe when this returns, or with the next frame (``flush`` False).

        Raises:
            OSError: the system has no memory left; nothing is noted.
        """
        with self._lock:
            self._journal.note(NoteEntry(kind, key, value, dropped=False), flush)
            self._kinds.setdefault(kind, {})[key] = value

    def drop(self, kind: str, key: Hashable, flush: bool = False) -> None:
        """Forget a note, if there is one."""
        with self._lock:
            if key in self._kinds.get(kind, {}):
                self._journal.note(NoteEntry(kind, key, None, dropped=True), flush)
                del self._kinds[kind][key]

    def let_go(self, kind: str, key: Hashable) -> None:
        """Forget a note without a word in the journal: who reads it back must know that it is over.

        That is cheaper, and the next checkpoint is without it. It takes no lock.
        """
        self._kinds.get(kind, {}).pop(key, None)

    def all(self) -> list[NoteEntry]:
        """Return every note, as a checkpoint has it."""
        return [
            NoteEntry(kind, key, value, dropped=False)
            for kind, notes in self._kinds.items()
            # a copy, as one may be let go of meanwhile
            for key, value in list(notes.items())
        ]

    def restore(self, entry: NoteEntry) -> None:
        """Take a note over from a journal that is read."""
        notes = self._kinds.setdefault(entry.kind, {})
        if entry.dropped:
            notes.pop(entry.key, None)
        else:
            notes[entry.key] = entry.value
