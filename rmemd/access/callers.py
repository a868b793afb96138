"""Who calls: from what a door knows of its peer, and a token, to a caller.

Owns tokens, tickets and leases. They are no state but notes, which survive the daemon's process as
the state does; what is kept of a token or ticket is its digest, before the secret leaves. A lease
begins anew at a restart, since clocks do, too. Everything that is not good here looks the same:
never given out, used up, another door's, another tenant's, or of a session that has ended. Only a
token of another daemon's life says so, by what it begins with.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from msgspec import Struct

from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.sessions import TICKETS, Closed
from rmemd.errors import (
    BAD_REQUEST,
    MEMORY_LOST,
    NO_SUCH_SESSION,
    ROLE_DENIED,
    TOKEN_REQUIRED,
    TOKEN_UNKNOWN,
    TOO_MANY,
    RmemError,
)
from rmemd.model.sessions import ADMIN, DEVICE, GUEST, HOST, GrantRange, Owner, SessionInfo

UNIX, TCP, SOCKET = "unix", "tcp", "socket"
# how a session came in: its process is its lease, or it has one
SOCKETED, LEASED = "socket", "lease"
TOKEN_BYTES = 32
# so much of the daemon's life is in front of its tokens
LIFE_DIGITS = 8
_LIFE = re.compile(rf"[0-9a-f]{{{LIFE_DIGITS}}}\.")
# kinds of notes: by digest, by session; those of tickets are the engine's to use up
TOKENS, LEASES = "tokens", "leases"
TICKETS_MAX = 1024
LEASE_SECONDS = 30.0
LEASE_SECONDS_MAX = 24 * 3600.0
# a reaper that looks so much later than it meant to was stopped itself, not its clients
LATE_SECONDS = 2.0


class Caller(Struct, frozen=True):
    """On whose behalf a call is made.

    Attributes:
        role: "host", "guest", "device" or "admin".
        session: the session of its token, 0 if it has none.
        vm: the VM of a guest.
        door: "unix", "tcp" or "socket".
    """

    tenant: str
    role: str
    session: int = 0
    vm: int = 0
    door: str = UNIX

    @property
    def owner(self) -> Owner:
        """Return as whose what it makes counts."""
        return Owner(self.tenant, self.session)

    @property
    def is_admin(self) -> bool:
        """Return whether it is the operator."""
        return self.role == ADMIN

    def sees(self, owner: Owner) -> bool:
        """Return whether an object of this owner is there for it."""
        return self.is_admin or self.tenant == owner.tenant


class Policy(Struct, frozen=True, dict=True):
    """Who may come in.

    Attributes:
        shared: whether other users may; then each call needs a token.
        local: the tenant of calls without a token, the daemon's own user.
        admins: tenants whose sessions may be admin.
    """

    shared: bool = False
    local: str = ""
    admins: frozenset[str] = frozenset()

    @cached_property
    def operator(self) -> Caller:
        """Return who calls without a token on a socket that is the daemon's own user's alone."""
        return Caller(self.local, ADMIN, door=UNIX)


class Ticket(Struct, frozen=True):
    """What the redeemer of a ticket gets."""

    tenant: str
    role: str
    parent: int
    vm: int
    grants: tuple[GrantRange, ...]


class Token(Struct, frozen=True):
    """Whose calls carry a token, and through which door."""

    session: int
    tenant: str
    door: str


class Lease(Struct, frozen=True):
    """How long a session lives that is not renewed."""

    session: int
    seconds: float


class _Running(Struct):
    seconds: float
    due: float


class Access:
    """Tokens, tickets and leases of one daemon. Safe from any thread.

    Nothing here asks for the engine's lock, as notes do, while it holds its own.
    """

    def __init__(
        self, engine: Engine, policy: Policy | None = None, clock: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.policy = policy or Policy()
        self._engine = engine
        self._clock = clock
        self._notes = engine.core.notes
        self._lock = threading.Lock()
        # held from counting a tenant's tickets until there is one more
        self._issuing = threading.Lock()
        self._leases: dict[int, _Running] = {}
        self._looked = clock()
        # told of every new lease, so that whoever reaps looks when it is due
        self.on_lease: Callable[[], None] = lambda: None
        self._take_over()

    def _take_over(self) -> None:
        """Go on with what a daemon before this one left: leases anew, nothing of the gone."""
        core = self._engine.core
        now = self._clock()
        for info in core.sessions.all():
            if info.door == LEASED:
                # one that was opened, and no more, gets what it would have by default
                lease = self._notes.get(LEASES, info.session, Lease(info.session, LEASE_SECONDS))
                self._leases[info.session] = _Running(lease.seconds, now + lease.seconds)
        self._forget(lambda session: not core.sessions.exists(session))

    # --- callers -----------------------------------------------------------------------------
    def caller(self, door: str, tenant: str, token: str = "") -> Caller:
        """Say who calls through a gRPC door.

        Args:
            door: UNIX or TCP.
            tenant: what the door itself knows of its peer, "" if nothing.
            token: the call's token, "" if it has none.

        Raises:
            Unauthenticated: TOKEN_REQUIRED, TOKEN_UNKNOWN.
        """
        if token:
            return self._by_token(door, tenant, token)
        if door == TCP:
            return Caller(tenant, self.role_of(tenant), door=TCP)
        if self.policy.shared:
            raise TOKEN_REQUIRED("the call carries no token", field="rmem-token")
        return self.policy.operator

    def role_of(self, tenant: str) -> str:
        """Return the role that a tenant has by itself."""
        return ADMIN if tenant in self.policy.admins else HOST

    def _by_token(self, door: str, tenant: str, token: str) -> Caller:
        known: Token | None = self._notes.get(TOKENS, _digest(token.encode()))
        if known is None:
            self._require_own_life(token)
            raise _unknown("token", "never given out, or its session has ended")
        if known.door != door or (tenant and tenant != known.tenant):
            raise _unknown("token", f"given to {known.tenant} for the {known.door} door")
        try:
            info = self._engine.core.sessions.alive(known.session)
        except RmemError as ended:
            raise _unknown("token", "its session ends") from ended
        return Caller(info.tenant, info.role, info.session, info.vm, door)

    # --- sessions ----------------------------------------------------------------------------
    def open(self, tenant: str, role: str, door: str, pid: int = 0) -> tuple[SessionInfo, str]:
        """Open a session of a tenant's own; return it with its token."""
        if role == ADMIN and tenant not in self.policy.admins:
            raise ROLE_DENIED(f"{tenant} is no admin", field="role")
        if role not in (HOST, ADMIN):
            raise BAD_REQUEST(f"a {role} session needs a ticket", field="ticket")
        again = self._engine.core.calls.is_repeat()
        info = self._engine.open_session(tenant, role, _kind(door), pid)
        return self._opened(info, door, again)

    def resume(self, session: int, token: str) -> SessionInfo:
        """Return the session of the socket that a token is for.

        Raises:
            Lost: MEMORY_LOST; a daemon before this one gave it out.
            Unauthenticated: TOKEN_UNKNOWN.
        """
        caller = self._by_token(UNIX, "", token)
        if caller.session != session:
            raise _unknown("token", f"given to session {caller.session}")
        return self._engine.core.sessions.alive(session)

    def redeem(self, ticket: bytes, door: str, pid: int = 0) -> tuple[SessionInfo, str]:
        """Open the session that a ticket is for; return it with its token.

        Raises:
            Unauthenticated: TOKEN_UNKNOWN.
        """
        digest = _digest(ticket)
        # if this very call has used it up, whose answer was lost with the daemon, it names nothing
        again = self._engine.core.calls.is_repeat()
        found = Ticket("", HOST, 0, 0, ()) if again else self._good_ticket(digest)
        info = self._engine.open_session(
            found.tenant, found.role, _kind(door), pid, found.parent, found.vm, found.grants,
            ticket=digest,
        )  # fmt: skip
        return self._opened(info, door, again)

    def _good_ticket(self, digest: bytes) -> Ticket:
        found: Ticket | None = self._notes.get(TICKETS, digest)
        if found is None or (found.parent and not self._is_alive(found.parent)):
            raise _unknown("ticket", "never given out, used up, or its issuer has ended")
        return found

    def issue(self, caller: Caller, ticket: Ticket) -> bytes:
        """Make a ticket for one session below the caller's.

        Raises:
            Denied: ROLE_DENIED; only an admin speaks for another tenant.
            Exhausted: TOO_MANY.
        """
        if ticket.role not in (GUEST, DEVICE) and not caller.is_admin:
            raise ROLE_DENIED("a ticket is for a guest or a device", field="role")
        if ticket.role not in (HOST, GUEST, DEVICE):
            raise BAD_REQUEST(f"no ticket for role {ticket.role!r}", field="role")
        if ticket.tenant != caller.tenant and not caller.is_admin:
            raise ROLE_DENIED("only an admin speaks for another tenant", field="tenant")
        secret = secrets.token_bytes(TOKEN_BYTES)
        with self._issuing:
            waiting = self._notes.items(TICKETS)
            if sum(other.tenant == ticket.tenant for _, other in waiting) >= TICKETS_MAX:
                raise TOO_MANY(f"{TICKETS_MAX} tickets wait to be redeemed")
            self._notes.set(TICKETS, _digest(secret), ticket)
        return secret

    def close(self, session: int, check: Callable[[Core], None] = lambda core: None) -> Closed:
        """End a session and those below it, with everything they hold; ``check`` may refuse."""
        closed = self._engine.close_session(session, check)
        gone = set(closed.sessions)
        with self._lock:
            for number in gone:
                self._leases.pop(number, None)
        self._forget(gone.__contains__)
        return closed

    def _forget(self, is_gone: Callable[[int], bool]) -> None:
        """Drop the notes of sessions; a crash before that leaves them to ``_take_over``."""
        self._drop(TOKENS, lambda token: is_gone(token.session))
        self._drop(TICKETS, lambda ticket: bool(ticket.parent) and is_gone(ticket.parent))
        self._drop(LEASES, lambda lease: is_gone(lease.session))

    def _drop(self, kind: str, is_over: Callable[[Any], bool]) -> None:
        for key, value in self._notes.items(kind):
            if is_over(value):
                self._notes.drop(kind, key)

    def _opened(self, info: SessionInfo, door: str, again: bool) -> tuple[SessionInfo, str]:
        token = f"{self._life}{secrets.token_hex(TOKEN_BYTES)}"
        # a session of the socket calls through the Unix door, on this machine
        served = TCP if door == TCP else UNIX
        if again:
            # the answer to the repeat is the one that arrives; the first token reached nobody
            self._drop(TOKENS, lambda token: token.session == info.session)
        self._notes.set(TOKENS, _digest(token.encode()), Token(info.session, info.tenant, served))
        return info, token

    @property
    def _life(self) -> str:
        """Return what tokens begin with; nothing where memory goes with the process."""
        life = self._engine.core.life
        return f"{life[:LIFE_DIGITS]}." if life else ""

    def _require_own_life(self, token: str) -> None:
        begins = _LIFE.match(token)
        if begins is not None and begins[0] != self._life:
            raise MEMORY_LOST(
                "the token is of a daemon that has ended, and its sessions with it",
                field="rmem-token",
            )

    def _is_alive(self, session: int) -> bool:
        sessions = self._engine.core.sessions
        return sessions.exists(session) and not sessions.get(session).closing

    # --- leases ------------------------------------------------------------------------------
    def lease(self, session: int, seconds: float) -> float:
        """Have a session end unless it is renewed in time; return the seconds."""
        seconds = seconds_of_lease(seconds)
        self._notes.set(LEASES, session, Lease(session, seconds))
        with self._lock:
            self._leases[session] = _Running(seconds, self._clock() + seconds)
        self.on_lease()
        return seconds

    def renew(self, session: int) -> float:
        """Begin a session's lease anew; return its seconds.

        Raises:
            NotFound: NO_SUCH_SESSION; it has no lease.
        """
        with self._lock:
            lease = self._leases.get(session)
            if lease is None or not self._is_alive(session):
                raise NO_SUCH_SESSION(f"session {session} has no lease", field="session")
            lease.due = self._clock() + lease.seconds
            return lease.seconds

    def lease_of(self, session: int) -> float:
        """Return the seconds of a session's lease, 0 if it has none."""
        lease = self._leases.get(session)
        return lease.seconds if lease else 0.0

    def due(self, expected: float) -> tuple[list[int], float | None]:
        """Return the sessions whose lease is over, and the seconds until the next one is.

        ``expected`` is the clock's time at which the caller meant to look. One that comes late was
        held up together with the renewals that it did not see: all leases get that time back.
        """
        now = self._clock()
        with self._lock:
            late = now - max(expected, self._looked)
            if late > LATE_SECONDS:
                for lease in self._leases.values():
                    lease.due += late
            self._looked = now
            over = [session for session, lease in self._leases.items() if lease.due <= now]
            left = [lease.due - now for lease in self._leases.values() if lease.due > now]
        return over, min(left, default=None)


def seconds_of_lease(asked: float) -> float:
    """Return the seconds of a lease that is asked for, 0 for the default.

    Raises:
        InvalidArgument: BAD_REQUEST.
    """
    seconds = asked or LEASE_SECONDS
    if not 0 < seconds <= LEASE_SECONDS_MAX:
        raise BAD_REQUEST(
            f"lease_seconds {seconds} is not in 0..{LEASE_SECONDS_MAX:.0f}", field="lease_seconds"
        )
    return seconds


def policy_of(shared: bool, uid: int, admins: Iterable[str]) -> Policy:
    """Return the policy of a daemon that runs as a user."""
    local = f"uid:{uid}"
    return Policy(shared, local, frozenset((local, "uid:0", *admins)))


def _kind(door: str) -> str:
    return SOCKETED if door == SOCKET else LEASED


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _unknown(what: str, why: str) -> RmemError:
    return TOKEN_UNKNOWN(f"no such {what}", field=f"rmem-{what}", for_log=why)
