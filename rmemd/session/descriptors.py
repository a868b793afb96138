"""Descriptors that leave the daemon: the only place where one does.

Owns the check of invariant I23 (what is passed is a file's shared memfd, sealed against shrinking,
growing and unsealing, and of mode 0600) and the count per tenant, which is taken before a
descriptor is made.
"""

from __future__ import annotations

import array
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rmemd.engine.core import Core
from rmemd.engine.notes import Notes
from rmemd.engine.quotas import UNLIMITED, Quotas, over
from rmemd.store.memfd import is_shared_half, name_of

# the kind of notes: by session, whose it is and how many it was given
PASSED = "passed"


class Passed:
    """How many descriptors each tenant has been given by sessions that live.

    Args:
        quotas: the limits.
        notes: where the counts outlive the daemon; None: nowhere.
    """

    def __init__(self, quotas: Quotas, notes: Notes | None = None) -> None:
        self._quotas = quotas
        self._notes = notes
        self._lock = threading.Lock()
        self._by_session: dict[int, tuple[str, int]] = {}
        self._by_tenant: Counter[str] = Counter()
        for session, (tenant, count) in notes.items(PASSED) if notes is not None else ():
            self._by_session[session] = (tenant, count)
            self._by_tenant[tenant] += count

    def of(self, tenant: str) -> int:
        """Return a tenant's count."""
        return self._by_tenant[tenant]

    @contextmanager
    def one_more(self, tenant: str, session: int) -> Iterator[None]:
        """Charge a descriptor; it is given back if the block fails.

        Raises:
            Exhausted: QUOTA.
        """
        with self._lock:
            limit, used = self._quotas.of(tenant).fds, self._by_tenant[tenant]
            if limit != UNLIMITED and used >= limit:
                raise over("fds", tenant, used, 1, limit)
            self._add(tenant, session, 1)
        self._note(session)
        try:
            yield
        except BaseException:
            self.one_less(tenant, session)
            raise

    def one_less(self, tenant: str, session: int) -> None:
        """Give back a charge: the descriptor did not leave."""
        with self._lock:
            # unless the session has ended meanwhile, and its charges with it
            if session in self._by_session:
                self._add(tenant, session, -1)
        self._note(session)

    def forget(self, session: int) -> None:
        """Take a session's off the count: it has ended."""
        with self._lock:
            tenant, count = self._by_session.pop(session, ("", 0))
            self._by_tenant[tenant] -= count
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]
        if self._notes is not None and count:
            self._notes.drop(PASSED, session)

    def _note(self, session: int) -> None:
        # before the descriptor leaves, and not under the lock: notes take the engine's
        if self._notes is not None and session in self._by_session:
            self._notes.set(PASSED, session, self._by_session[session])

    def invariant(self, core: Core) -> Iterator[str]:
        """I18: a tenant's descriptors are those that its sessions were given, within its limit."""
        with self._lock:
            by_session, by_tenant = dict(self._by_session), dict(self._by_tenant)
        counted: Counter[str] = Counter()
        for tenant, count in by_session.values():
            counted[tenant] += count
        for tenant in sorted(counted.keys() | by_tenant.keys()):
            most, used = core.quotas.most(tenant).fds, by_tenant.get(tenant, 0)
            if used != counted[tenant]:
                yield f"I18: {tenant} has {counted[tenant]} descriptors, counted as {used}"
            if most != UNLIMITED and used > most:
                yield f"I18: {tenant} has {used} descriptors of {most}"

    def _add(self, tenant: str, session: int, n: int) -> None:
        _, count = self._by_session.get(session, (tenant, 0))
        self._by_session[session] = (tenant, count + n)
        self._by_tenant[tenant] += n


def send(sock: socket.socket, datagram: bytes, fd: int) -> None:
    """Send a datagram with a descriptor of a shared half."""
    require_sealed(fd)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))
    sock.sendmsg([datagram], [rights])


def require_sealed(fd: int) -> None:
    """Check that a descriptor is of a shared half: sealed, and nobody else's to open anew.

    Raises:
        AssertionError: it is not, and must not leave.
    """
    if not is_shared_half(fd):
        raise AssertionError(f"{name_of(fd)} must not leave")
