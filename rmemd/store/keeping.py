"""Descriptors that outlive the process: what a restarted daemon finds again.

Owns the interface. Guest memory and the journal lie in memfds, so whoever keeps their descriptors
keeps them: a keeper process or the service manager's descriptor store (``daemon.fdstore``). An
engine without one keeps nothing, and its memory goes with it.
"""

from __future__ import annotations

ARENA = "arena"
JOURNALS = ("journal.0", "journal.1")
FILE_PREFIX = "file."


def file_name(file: int) -> str:
    """Return the name of a file's shared memfd."""
    return f"{FILE_PREFIX}{file}"


class Keeping:
    """Nobody keeps anything.

    Attributes:
        found: descriptors by name that an earlier process left; whoever takes one owns it.
    """

    def __init__(self, found: dict[str, int] | None = None) -> None:
        self.found = dict(found or {})

    @property
    def names(self) -> list[str] | None:
        """Return the names of all that is kept; None of who keeps nothing, or cannot say."""
        return None

    def take(self, name: str) -> int | None:
        """Return a descriptor that was left, once; None if there is none of the name."""
        return self.found.pop(name, None)

    def keep(self, name: str, fd: int) -> None:
        """Have a descriptor kept under a name until ``drop``; it stays the caller's too."""

    def drop(self, name: str) -> None:
        """Have what is kept under a name let go."""
