"""Which ranges of files have a page fault handler: registrations, by file.

Owns the ``userfaults`` records. A registration says that a fault on a hole of its range is told to
a session, which resolves it, instead of allocating a page (userfaultfd's UFFDIO_REGISTER). Faults
that wait are not state: they are operations that wait (``engine.pendingfaults``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.errors import NO_SUCH_USERFAULT, USERFAULT_TAKEN, Holder
from rmemd.hooks.tables import Records, TableSpec
from rmemd.hooks.tx import Tx
from rmemd.units import I64, Bools


class Registration(Struct, frozen=True):
    """A range of a file, in pages, the faults of which go to a session (0: an admin)."""

    userfault: int
    file: int
    pgoff: int
    npages: int
    session: int

    @property
    def end(self) -> int:
        """Return the first page after the range."""
        return self.pgoff + self.npages

    @property
    def holder(self) -> str:
        """Return how messages name the handler."""
        return f"session {self.session}" if self.session else "admin"


class Userfaults:
    """All registrations. False when there are none, which is all that a fault asks then."""

    def __init__(self, tx: Tx) -> None:
        made: Any = tx.create(TableSpec("userfaults", "records"))
        # file -> registrations, ascending by pgoff
        self._by_file: Records = made

    def __len__(self) -> int:
        return len(self._by_file)

    def of_file(self, file: int) -> tuple[Registration, ...]:
        """Return a file's registrations, ascending by pgoff."""
        found: tuple[Registration, ...] = self._by_file.get(file, ())
        return found

    def all(self) -> list[Registration]:
        """Return every registration."""
        return [one for _, ones in self._by_file.items() for one in ones]

    def get(self, userfault: int, session: int | None = None) -> Registration:
        """Return a registration of a session (of any, by default).

        Raises:
            NotFound: NO_SUCH_USERFAULT; not there, or another session's.
        """
        for one in self.all():
            if one.userfault == userfault and session in (None, one.session):
                return one
        raise NO_SUCH_USERFAULT(f"no userfault {userfault}", field="userfault")

    def add(self, tx: Tx, made: Registration) -> None:
        """Register a range.

        Raises:
            AlreadyExists: USERFAULT_TAKEN; part of it is registered.
        """
        present = self.of_file(made.file)
        for other in present:
            if other.pgoff < made.end and made.pgoff < other.end:
                raise USERFAULT_TAKEN(
                    f"pgoff {max(other.pgoff, made.pgoff):#x} of file/{made.file} is registered",
                    field="pgoff", page=f"pgoff {max(other.pgoff, made.pgoff):#x}",
                    state=f"userfault {other.userfault}",
                    holders=(Holder(other.holder, "userfault", 1),),
                    rule="userfaultfd_register: a range that another userfaultfd has is EBUSY",
                )  # fmt: skip
        self._put(tx, made.file, (*present, made))

    def drop(self, tx: Tx, gone: Iterable[Registration]) -> None:
        """Take registrations back."""
        gone = set(gone)
        for file in sorted({one.file for one in gone}):
            self._put(tx, file, [one for one in self.of_file(file) if one not in gone])

    def of_session(self, session: int) -> list[Registration]:
        """Return a session's registrations."""
        return [one for one in self.all() if one.session == session]

    def covers(self, file: int, pgoffs: I64, session: int | None = None) -> Bools:
        """Return which pages are in a range that a session (any, by default) registered."""
        mine = [one for one in self.of_file(file) if session in (None, one.session)]
        if not mine:
            return np.zeros(pgoffs.size, dtype=np.bool_)
        starts = np.array([one.pgoff for one in mine], dtype=np.int64)
        ends = np.array([one.end for one in mine], dtype=np.int64)
        at = np.searchsorted(starts, pgoffs, side="right") - 1
        covered: Bools = (at >= 0) & (pgoffs < ends[at])
        return covered

    def _put(self, tx: Tx, file: int, ones: Iterable[Registration]) -> None:
        left = tuple(sorted(ones, key=lambda one: one.pgoff))
        if left:
            tx.set(self._by_file, file, left)
        else:
            tx.drop(self._by_file, file)
