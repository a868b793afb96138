"""The shared memfds of files: made, kept beyond the process, handed on, and let go.

Owns them, and what is known of who was given a descriptor of each. What was passed cannot be taken
back, so a file's memfd goes with it and serves nobody else. But one that a single session was ever
given can serve that session again, as it is: it becomes a *spare*. To overwrite pages that are
there is many times cheaper than to give them back and have new ones. A spare goes with its session,
and its pages count as frames of the session's tenant.
"""

from __future__ import annotations

from msgspec import Struct

from rmemd.engine.notes import Notes
from rmemd.store.keeping import Keeping, file_name
from rmemd.store.memfd import Memfd
from rmemd.store.system import System

# the kind of notes: by file, as which file's its memfd is kept
SHARED_MEMFDS = "shared memfds"
# more than this one session does not set aside; the oldest goes
SPARES_MAX = 16
SPARE_PAGES_MAX = 1 << 17
# what may have a descriptor of a memfd: nobody yet, one session, or who knows
NOBODY, ANYBODY = 0, -1


class _Held(Struct):
    """A memfd, under whose number it is kept, and the one session that was given it."""

    memfd: Memfd
    kept_as: int
    given_to: int = NOBODY


class _Spare(Struct):
    """A memfd that waits for a session's next file."""

    held: _Held
    tenant: str

    @property
    def session(self) -> int:
        return self.held.given_to


class SharedMemory:
    """The shared memfds of one engine's files; used under its lock."""

    def __init__(self, keeping: Keeping, notes: Notes, system: System) -> None:
        self._keeping = keeping
        self._notes = notes
        self._system = system
        self._held: dict[int, _Held] = {}
        # by the file whose it was last
        self._spares: dict[int, _Spare] = {}

    def of(self, number: int, npages: int) -> Memfd:
        """Return a file's memfd, made when it is first needed, or what was kept of it."""
        held = self._held.get(number)
        if held is None:
            held = self._held[number] = self._make(number, npages)
        return held.memfd

    def _make(self, number: int, npages: int) -> _Held:
        kept_as = self._kept_as(number)
        found = self._keeping.take(file_name(kept_as))
        memfd = Memfd(f"rmemd-file-{number}", npages, found, self._system)
        self._keeping.keep(file_name(kept_as), memfd.fd)
        self._notes.set(SHARED_MEMFDS, number, kept_as, flush=False)
        # who was given one that an earlier process had is not known
        return _Held(memfd, kept_as, NOBODY if found is None else ANYBODY)

    def has(self, number: int) -> bool:
        """Return whether anything was ever shared of a file."""
        return number in self._held

    def forget(self, number: int) -> None:
        """Close a file's memfd, whose end is recorded; what clients have mapped stays theirs."""
        held = self._held.pop(number, None)
        if held is not None:
            # its bytes go with the last descriptor: not before the record that says so
            self._notes.drop(SHARED_MEMFDS, number, flush=True)
            self._close(held)

    def close(self) -> None:
        """Close every memfd; what is kept of them is somebody else's."""
        for held in [*self._held.values(), *(spare.held for spare in self._spares.values())]:
            held.memfd.close()
        self._held.clear()
        self._spares.clear()

    def npages(self, number: int) -> int:
        """Return how many pages a file's memfd has."""
        return self._held[number].memfd.npages

    # --- questions ---------------------------------------------------------------------------
    def descriptors(self) -> dict[int, int]:
        """Return the descriptor of each memfd, by file."""
        return {number: held.memfd.fd for number, held in self._held.items()}

    def name(self, number: int) -> str:
        """Return the name under which a file's memfd is kept, or would be."""
        return file_name(self._kept_as(number))

    def names(self) -> set[str]:
        """Return the names under which memfds are kept, spare ones too."""
        held = [*self._held.values(), *(spare.held for spare in self._spares.values())]
        return {file_name(one.kept_as) for one in held}

    def spares(self) -> list[tuple[int, str, int]]:
        """Return session, tenant and pages of each spare."""
        return [
            (spare.session, spare.tenant, spare.held.memfd.npages)
            for spare in self._spares.values()
        ]

    def spare_pages(self, tenant: str) -> int:
        """Return the pages of a tenant's spares."""
        return sum(npages for _, owner, npages in self.spares() if owner == tenant)

    # --- who was given a descriptor ----------------------------------------------------------
    def give(self, number: int, session: int) -> None:
        """Know that a session is given a descriptor of a file's memfd; 0: somebody else is."""
        held = self._held[number]
        alone = session and held.given_to in (NOBODY, session)
        held.given_to = session if alone else ANYBODY

    def is_only(self, number: int, session: int) -> bool:
        """Return whether this session, and nobody else, was given a descriptor of a file's."""
        held = self._held.get(number)
        return held is not None and held.given_to == session > 0

    # --- spares ------------------------------------------------------------------------------
    def set_aside(self, number: int, tenant: str) -> None:
        """Make the memfd of a file that is gone a spare of who was given it."""
        held = self._held.pop(number)
        self._notes.drop(SHARED_MEMFDS, number, flush=True)
        self._spares[number] = _Spare(held, tenant)
        self._make_room(held.given_to)

    def take(self, number: int, spare: int, session: int, npages: int) -> None:
        """Have a session's spare serve its new file, if there is one of this size."""
        found = self._spares.get(spare)
        if found is None or found.session != session or found.held.memfd.npages != npages:
            return
        del self._spares[spare]
        self._held[number] = found.held
        self._notes.set(SHARED_MEMFDS, number, found.held.kept_as, flush=False)

    def let_go(self, session: int) -> None:
        """Close a session's spares."""
        for number, _ in self._of(session):
            self._close(self._spares.pop(number).held)

    def _make_room(self, session: int) -> None:
        mine = self._of(session)
        while len(mine) > SPARES_MAX or sum(npages for _, npages in mine) > SPARE_PAGES_MAX:
            number, _ = mine.pop(0)
            self._close(self._spares.pop(number).held)

    def _of(self, session: int) -> list[tuple[int, int]]:
        """Return a session's spares, oldest first: the file that each was of, and its pages."""
        return [
            (number, spare.held.memfd.npages)
            for number, spare in self._spares.items()
            if spare.session == session
        ]

    def _close(self, held: _Held) -> None:
        self._keeping.drop(file_name(held.kept_as))
        held.memfd.close()

    def _kept_as(self, number: int) -> int:
        kept_as = self._notes.get(SHARED_MEMFDS, number, number)
        # as logs had it before there were spares
        return number if kept_as is True else int(kept_as)
