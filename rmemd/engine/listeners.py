"""Who is told at once of what happens to a session: the door that it came through.

Owns the table of listeners. They are called under the engine's lock, after the commit, so they
must not block, raise, or call the engine; a door puts the news in a queue and wakes whoever sends.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct


class Revoked(Struct, frozen=True):
    """A range of a file was taken back from the session, at a revision."""

    file: int
    pgoff: int
    npages: int
    revision: int


class Ended(Struct, frozen=True):
    """The session ended, whoever ended it; what it held, in pages, was let go."""

    released_pages: int
    revision: int


News = Revoked | Ended


class Listeners:
    """Callables by session."""

    def __init__(self) -> None:
        self._by_session: dict[int, Callable[[News], None]] = {}

    def add(self, session: int, listener: Callable[[News], None]) -> None:
        """Have a session's news told."""
        self._by_session[session] = listener

    def remove(self, session: int) -> None:
        """Have them told no more."""
        self._by_session.pop(session, None)

    def tell(self, session: int, news: News) -> None:
        """Tell, if anybody listens."""
        listener = self._by_session.get(session)
        if listener is not None:
            listener(news)
