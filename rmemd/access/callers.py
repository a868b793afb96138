"""Who calls: from what a door knows of its peer, and a token, to a caller.

Owns tokens, tickets and leases. None of them is state: they are lost with the daemon, and what is
kept of a token or ticket is its digest. Everything that is not good here looks the same: never
given out, used up, another door's, another tenant's, or of a session that has ended.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rmemd.engine.engine import Engine
from rmemd.engine.sessions import Closed
from rmemd.errors import (
    BAD_REQUEST,
    NO_SUCH_SESSION,
    ROLE_DENIED,
    TOKEN_REQUIRED,
    TOKEN_UNKNOWN,
    TOO_MANY,
    RmemError,
)
from rmemd.model.sessions import ADMIN, DEVICE, GUEST, HOST, GrantRange, Owner, SessionInfo

UNIX, TCP, SOCKET = "unix", "tcp", "socket"
TOKEN_BYTES = 32
TICKETS_MAX = 1024
LEASE_SECONDS = 30.0
LEASE_SECONDS_MAX = 24 * 3600.0
# a reaper that looks so much later than it meant to was stopped itself, not its clients
LATE_SECONDS = 2.0


@dataclass(frozen=True)
class Caller:
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


@dataclass(frozen=True)
class Policy:
    """Who may come in.

    Attributes:
        shared: whether other users may; then each call needs a token.
        local: the tenant of calls without a token, the daemon's own user.
        admins: tenants whose sessions may be admin.
    """

    shared: bool = False
    local: str = ""
    admins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ticket:
    """What the redeemer of a ticket gets."""

    tenant: str
    role: str
    parent: int
    vm: int
    grants: tuple[GrantRange, ...]


@dataclass(frozen=True)
class _Token:
    session: int
    tenant: str
    door: str


@dataclass
class _Lease:
    seconds: float
    due: float


class Access:
    """Tokens, tickets and leases of one daemon. Safe from any thread."""

    def __init__(
        self, engine: Engine, policy: Policy | None = None, clock: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.policy = policy or Policy()
        self._engine = engine
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: dict[bytes, _Token] = {}
        self._tickets: dict[bytes, Ticket] = {}
        self._leases: dict[int, _Lease] = {}
        self._looked = clock()
        # told of every new lease, so that whoever reaps looks when it is due
        self.on_lease: Callable[[], None] = lambda: None

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
        return Caller(self.policy.local, ADMIN, door=UNIX)

    def role_of(self, tenant: str) -> str:
        """Return the role that a tenant has by itself."""
        return ADMIN if tenant in self.policy.admins else HOST

    def _by_token(self, door: str, tenant: str, token: str) -> Caller:
        with self._lock:
            known = self._tokens.get(_digest(token.encode()))
        if known is None:
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
        return self._opened(self._engine.open_session(tenant, role, _kind(door), pid), door)

    def redeem(self, ticket: bytes, door: str, pid: int = 0) -> tuple[SessionInfo, str]:
        """Open the session that a ticket is for; return it with its token.

        Raises:
            Unauthenticated: TOKEN_UNKNOWN.
        """
        with self._lock:
            found = self._tickets.pop(_digest(ticket), None)
        if found is None or (found.parent and not self._is_alive(found.parent)):
            raise _unknown("ticket", "never given out, used up, or its issuer has ended")
        info = self._engine.open_session(
            found.tenant, found.role, _kind(door), pid, found.parent, found.vm, found.grants
        )
        return self._opened(info, door)

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
        with self._lock:
            mine = sum(other.tenant == ticket.tenant for other in self._tickets.values())
            if mine >= TICKETS_MAX:
                raise TOO_MANY(f"{TICKETS_MAX} tickets wait to be redeemed")
            self._tickets[_digest(secret)] = ticket
        return secret

    def close(self, session: int) -> Closed:
        """End a session and those below it, with everything they hold."""
        closed = self._engine.close_session(session)
        gone = set(closed.sessions)
        with self._lock:
            self._tokens = {k: t for k, t in self._tokens.items() if t.session not in gone}
            self._tickets = {k: t for k, t in self._tickets.items() if t.parent not in gone}
            for number in gone:
                self._leases.pop(number, None)
        return closed

    def _opened(self, info: SessionInfo, door: str) -> tuple[SessionInfo, str]:
        token = secrets.token_hex(TOKEN_BYTES)
        # a session of the socket calls through the Unix door, on this machine
        served = TCP if door == TCP else UNIX
        with self._lock:
            self._tokens[_digest(token.encode())] = _Token(info.session, info.tenant, served)
        return info, token

    def _is_alive(self, session: int) -> bool:
        sessions = self._engine.core.sessions
        return sessions.exists(session) and not sessions.get(session).closing

    # --- leases ------------------------------------------------------------------------------
    def lease(self, session: int, seconds: float) -> float:
        """Have a session end unless it is renewed in time; return the seconds."""
        seconds = seconds or LEASE_SECONDS
        if not 0 < seconds <= LEASE_SECONDS_MAX:
            raise BAD_REQUEST(
                f"lease_seconds {seconds} is not in 0..{LEASE_SECONDS_MAX:.0f}",
                field="lease_seconds",
            )
        with self._lock:
            self._leases[session] = _Lease(seconds, self._clock() + seconds)
        self.on_lease()
        return seconds

    def renew(self, session: int) -> float:
        """Begin a session's lease anew; return its seconds.

        Raises:
            NotFound: NO_SUCH_SESSION; it has no lease.
        """
        with self._lock:
            lease = self._leases.get(session)
            if lease is None:
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


def policy_of(shared: bool, uid: int, admins: Iterable[str]) -> Policy:
    """Return the policy of a daemon that runs as a user."""
    local = f"uid:{uid}"
    return Policy(shared, local, frozenset((local, "uid:0", *admins)))


def _kind(door: str) -> str:
    return "socket" if door == SOCKET else "lease"


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _unknown(what: str, why: str) -> RmemError:
    return TOKEN_UNKNOWN(f"no such {what}", field=f"rmem-{what}", for_log=why)
