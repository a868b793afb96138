"""Who holds what: sessions, what each was granted, and the pins that clients took.

Owns the ``sessions`` and ``pins`` records. A session is a client that can end; what it made and
holds ends with it. Tokens, processes and leases are not state: the doors keep notes of them.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from rmemd.errors import NO_SUCH_PIN, NO_SUCH_SESSION
from rmemd.hooks.tables import Records, TableSpec
from rmemd.hooks.tx import Tx

HOST, GUEST, DEVICE, ADMIN = "host", "guest", "device", "admin"
ROLES = (HOST, GUEST, DEVICE, ADMIN)


class Owner(Struct, frozen=True):
    """On whose behalf something is made: a tenant, and the session it goes with (0: none)."""

    tenant: str = ""
    session: int = 0


NOBODY = Owner()


class GrantRange(Struct, frozen=True):
    """Pages pgoff..pgoff+npages of a file's shared half."""

    file: int
    pgoff: int
    npages: int
    read_only: bool = False

    def meets(self, pgoff: int, npages: int) -> bool:
        """Return whether it has a page of the range."""
        return self.pgoff < pgoff + npages and pgoff < self.pgoff + self.npages

    def without(self, pgoff: int, npages: int) -> tuple[GrantRange, ...]:
        """Return what is left when a range is taken out."""
        if not self.meets(pgoff, npages):
            return (self,)
        end, cut = self.pgoff + self.npages, pgoff + npages
        left = replace(self, npages=max(pgoff - self.pgoff, 0))
        right = replace(self, pgoff=min(cut, end), npages=max(end - cut, 0))
        return tuple(part for part in (left, right) if part.npages)


class SessionInfo(Struct, frozen=True):
    """A session's facts.

    Attributes:
        door: how it came in: "socket" (its process is its lease) or "lease".
        pid: its process, 0 if that is elsewhere.
        parent: the session whose ticket it redeemed, 0 if none.
        vm: the VM of a guest session, 0 for the others.
        grants: what a device may reach.
        closing: whether it is on its way out: it gets nothing more.
    """

    session: int
    tenant: str
    role: str
    door: str
    pid: int = 0
    parent: int = 0
    vm: int = 0
    grants: tuple[GrantRange, ...] = ()
    closing: bool = False

    @property
    def label(self) -> str:
        """Return how messages and the ledger name it."""
        return f"session {self.session}"

    @property
    def owner(self) -> Owner:
        """Return it as an owner."""
        return Owner(self.tenant, self.session)

    def may_reach(self, file: int, pgoff: int, npages: int, write: bool) -> bool:
        """Return whether its grants cover a range of a file; parts may come from several."""
        at, end = pgoff, pgoff + npages
        for grant in sorted(self.grants, key=lambda g: g.pgoff):
            if grant.file == file and grant.pgoff <= at and not (write and grant.read_only):
                at = max(at, grant.pgoff + grant.npages)
        return at >= end


class PagePin(Struct, frozen=True):
    """Pages that a client pinned.

    Attributes:
        holder: what refusals name it.
        frames: those that it holds, as the ledger has them (``as_runs``).
    """

    pin: int
    file: int
    pgoff: int
    npages: int
    purpose: str
    holder: str
    tenant: str
    session: int
    frames: bytes

    @property
    def owner(self) -> Owner:
        """Return on whose behalf it was made; its fields are its own, as each lies in a record."""
        return Owner(self.tenant, self.session)


class Sessions:
    """All sessions, and all pins of clients."""

    def __init__(self, tx: Tx) -> None:
        self._info: Records = tx.create(TableSpec("sessions", "records"))
        self._pins: Records = tx.create(TableSpec("pins", "records"))
        self._info.group_by(lambda _, info: info.parent)
        self._pins.group_by(lambda _, pin: pin.session)

    def open(self, tx: Tx, tenant: str, role: str, door: str, **facts: Any) -> SessionInfo:
        """Make a session."""
        number = tx.next_id("session")
        info = SessionInfo(number, tenant, role, door, **facts)
        tx.set(self._info, number, info)
        return info

    def update(self, tx: Tx, info: SessionInfo, **changes: Any) -> SessionInfo:
        """Change facts of a session."""
        info = replace(info, **changes)
        tx.set(self._info, info.session, info)
        return info

    def end(self, tx: Tx, session: int) -> None:
        """Forget a session."""
        tx.drop(self._info, session)

    def get(self, session: int) -> SessionInfo:
        """Return a session.

        Raises:
            NotFound: NO_SUCH_SESSION.
        """
        info: SessionInfo | None = self._info.get(session)
        if info is None:
            raise NO_SUCH_SESSION(f"session {session} does not exist", field="session")
        return info

    def alive(self, session: int) -> SessionInfo:
        """Return a session that is not on its way out.

        Raises:
            NotFound: NO_SUCH_SESSION.
        """
        info = self.get(session)
        if info.closing:
            raise NO_SUCH_SESSION(f"session {session} does not exist", field="session")
        return info

    def exists(self, session: int) -> bool:
        """Return whether the session is there, closing or not."""
        return session in self._info

    def is_alive(self, session: int) -> bool:
        """Return whether the session is there, and not on its way out."""
        return session in self._info and not self._info[session].closing

    def all(self) -> list[SessionInfo]:
        """Return every session, oldest first."""
        return [info for _, info in self._info.items()]

    def below(self, session: int) -> list[SessionInfo]:
        """Return a session and those opened below it, each before its children."""
        found = [self.get(session)]
        for info in found:
            found += [self._info[child] for child in self._info.grouped(info.session)]
        return found

    # --- pins --------------------------------------------------------------------------------
    def add_pin(self, tx: Tx, pin: PagePin) -> None:
        """Remember a pin."""
        tx.set(self._pins, pin.pin, pin)

    def drop_pin(self, tx: Tx, pin: int) -> None:
        """Forget a pin."""
        tx.drop(self._pins, pin)

    def pin(self, pin: int) -> PagePin:
        """Return a pin.

        Raises:
            NotFound: NO_SUCH_PIN.
        """
        found: PagePin | None = self._pins.get(pin)
        if found is None:
            raise NO_SUCH_PIN(f"no pin {pin}", field="pin")
        return found

    def pins(self) -> list[PagePin]:
        """Return every pin, oldest first."""
        return [pin for _, pin in self._pins.items()]

    def pins_of(self, session: int) -> list[PagePin]:
        """Return a session's pins."""
        return [self._pins[pin] for pin in self._pins.grouped(session)]
