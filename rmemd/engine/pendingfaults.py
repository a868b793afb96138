"""Faults that wait for a page fault handler, and what the handlers are told of them.

Owns the table of pending faults. It is no state: a pending fault is an operation that waits, and
goes with it. What has been told is kept by page, so that two vCPUs on one page are told once, and a
page that is punched and faults again is told again. Everything is under the engine's lock; nothing
here does any I/O: ``notify`` is whoever brings the news to a session.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from msgspec import Struct

from rmemd.model.userfaults import Userfaults
from rmemd.units import I64, coalesce, distinct, pages

NO_PAGES: I64 = np.empty(0, dtype=np.int64)
FAULT, REMOVED = "fault", "removed"


class Message(Struct, frozen=True):
    """What a handler is told: a "fault" on holes of a range, or pages "removed" by a punch.

    Attributes:
        userfault: the registration.
        pgoff: the first page in the file; all ``npages`` are to be resolved.
        private: whether the private half is meant (in place there is one).
        write: whether the first access was a write.
        vm: the VM whose access it is, 0 if the host's.
        gfn: guest frame of the first page, -1 if the host's.
    """

    kind: str
    userfault: int
    file: int
    pgoff: int
    npages: int
    private: bool
    write: bool = False
    vm: int = 0
    gfn: int = -1


class Missing(Exception):
    """A fault met holes of registered ranges: it must wait for the handler and begin again.

    Attributes:
        pgoffs: the holes.
        shift: gfn less pgoff of a guest's fault.
        still: says which of the holes are holes still, none when the fault is to look again.
    """

    def __init__(
        self, file: int, pgoffs: I64, private: bool, write: bool, vm: int, shift: int,
        still: Callable[[], I64],
    ) -> None:  # fmt: skip
        super().__init__(f"{pgoffs.size} pages of file/{file}")
        self.file, self.pgoffs, self.private, self.write = file, pgoffs, private, write
        self.vm, self.shift, self.still = vm, shift, still


class PendingFaults:
    """The faults that wait.

    Attributes:
        waiting: in the order in which they came; ``pgoffs`` of each are what it still waits for.
        notify: called with a session that there is something to take for; it must not block.
    """

    def __init__(self, userfaults: Userfaults) -> None:
        self._userfaults = userfaults
        self.waiting: list[Missing] = []
        self.notify: Callable[[int], None] = lambda session: None
        self._told: dict[tuple[int, bool], I64] = {}
        self._removed: dict[tuple[int, int, bool], I64] = {}

    # --- by the engine -----------------------------------------------------------------------
    def add(self, fault: Missing) -> None:
        """Have a fault wait; handlers hear of it unless all of its pages were told."""
        self.waiting.append(fault)
        self._announce(fault.file)

    def leave(self, fault: Missing) -> None:
        """Have a fault wait no more, resolved or not."""
        self.waiting.remove(fault)
        self._forget_told()

    def settle(self) -> None:
        """Look again what each fault waits for: something was committed."""
        for fault in self.waiting:
            fault.pgoffs = fault.still()
        self._forget_told()

    def removed(self, file: int, pgoffs: I64, private: bool) -> None:
        """Tell handlers of pages that were punched out of their ranges (UFFD_EVENT_REMOVE)."""
        if not self._userfaults:
            return
        for session in self._sessions(file):
            gone = pgoffs[self._userfaults.covers(file, pgoffs, session)]
            if gone.size:
                key = (session, file, private)
                self._removed[key] = np.union1d(self._removed.get(key, NO_PAGES), gone)
                self.notify(session)

    def again(self, file: int, pgoff: int, npages: int) -> None:
        """Have what waits in a range told once more (UFFDIO_WAKE: the access faults again)."""
        for key in [key for key in self._told if key[0] == file]:
            told = self._told[key]
            self._told[key] = told[(told < pgoff) | (told >= pgoff + npages)]
        self._announce(file)

    def forget_session(self, session: int) -> None:
        """Drop what a session has not taken."""
        for key in [key for key in self._removed if key[0] == session]:
            del self._removed[key]

    # --- by the handlers ---------------------------------------------------------------------
    def pending(self, session: int | None = None) -> list[Message]:
        """Return what waits for a session (for any, by default), told or not."""
        every = (self._of(fault, session, fault.pgoffs) for fault in self.waiting)
        return [message for messages in every for message in messages]

    def take(self, session: int) -> list[Message]:
        """Return what a session was not told yet: what was removed first, then faults."""
        messages = self._take_removed(session)
        for fault in self.waiting:
            key = (fault.file, fault.private)
            told = self._told.get(key, NO_PAGES)
            fresh = np.setdiff1d(fault.pgoffs, told)
            found = self._of(fault, session, fresh)
            for message in found:
                told = np.union1d(told, pages(message.pgoff, message.npages))
            if found:
                self._told[key] = told
                messages += found
        return messages

    def _take_removed(self, session: int) -> list[Message]:
        messages = []
        for key in [key for key in self._removed if key[0] == session]:
            _, file, private = key
            messages += self._messages(REMOVED, file, self._removed.pop(key), private, session)
        return messages

    def _of(self, fault: Missing, session: int | None, pgoffs: I64) -> list[Message]:
        return self._messages(
            FAULT, fault.file, pgoffs, fault.private, session, fault.write, fault.vm, fault.shift
        )

    def _messages(
        self, kind: str, file: int, pgoffs: I64, private: bool, session: int | None,
        write: bool = False, vm: int = 0, shift: int = 0,
    ) -> list[Message]:  # fmt: skip
        messages = []
        for one in self._userfaults.of_file(file):
            if session in (None, one.session):
                mine = pgoffs[(pgoffs >= one.pgoff) & (pgoffs < one.end)]
                for start, count in zip(*(ends.tolist() for ends in coalesce(mine)), strict=True):
                    gfn = start + shift if vm else -1
                    messages.append(
                        Message(kind, one.userfault, file, start, count, private, write, vm, gfn)
                    )
        return messages

    # --- who is told -------------------------------------------------------------------------
    def _announce(self, file: int) -> None:
        """Notify the sessions that have something to take of a file."""
        untold = [
            np.setdiff1d(fault.pgoffs, self._told.get((file, fault.private), NO_PAGES))
            for fault in self.waiting if fault.file == file
        ]  # fmt: skip
        wanted = distinct(np.concatenate([NO_PAGES, *untold]))
        for session in self._sessions(file):
            if self._userfaults.covers(file, wanted, session).any():
                self.notify(session)

    def _sessions(self, file: int) -> list[int]:
        return sorted({one.session for one in self._userfaults.of_file(file)})

    def _forget_told(self) -> None:
        """A page that nobody waits for will be told again when it faults again."""
        for key in list(self._told):
            waited = [f.pgoffs for f in self.waiting if (f.file, f.private) == key]
            left = np.intersect1d(self._told[key], np.concatenate([NO_PAGES, *waited]))
            if left.size:
                self._told[key] = left
            else:
                del self._told[key]
