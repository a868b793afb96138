"""Notices that a client was not sent yet, kept so that a daemon which is started again sends them.

Owns their notes. One is written in the frame of what it tells of, and dropped when the client's
socket has it, so a crash in between has it sent twice, and never not at all. Faults are no part of
it: whoever waits for a page waits anew, and is told of anew.
"""

from __future__ import annotations

from rmemd.engine.listeners import Ended, News
from rmemd.engine.notes import Notes
from rmemd.session.wire import notice_of

# the kind of notes
NOTICES = "notices"
# session, revision, file, first page
NoticeKey = tuple[int, int, int, int]
# an encoded notice, and the key of its note
Notice = tuple[bytes, NoticeKey | None]


class Undelivered:
    """The notices that were not sent yet. Safe from any thread."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def keep(self, session: int, news: News) -> NoticeKey | None:
        """Keep news of a session, under the engine's lock; return their key.

        The end of a session is not kept: who comes back for it is told then.
        """
        if isinstance(news, Ended):
            return None
        key = (session, news.revision, news.file, news.pgoff)
        self._notes.set(NOTICES, key, notice_of(news), flush=False)
        return key

    def of(self, session: int) -> list[Notice]:
        """Return the notices of a session, oldest first."""
        return [(data, key) for key, data in self._notes.items(NOTICES) if key[0] == session]

    def delivered(self, key: NoticeKey) -> None:
        """Forget a notice: the client has it."""
        self._notes.drop(NOTICES, key)

    def forget(self, session: int) -> None:
        """Forget the notices of a session that has ended."""
        for _, key in self.of(session):
            if key is not None:
                self._notes.drop(NOTICES, key)
