"""Quotas of tenants on what the model holds: frames, pinned pages, sessions.

Owns the limits and the checks, which come before anything is allocated. What a tenant uses is
counted where its files and pins say it, and never kept twice: between two counts an upper bound is
carried along, so that a tenant far from its limit costs an addition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import Struct

from rmemd.errors import QUOTA, RmemError

if TYPE_CHECKING:
    from rmemd.engine.core import Core

UNLIMITED = -1


class Limits(Struct, frozen=True):
    """What one tenant may have at most; -1 is no limit."""

    frames: int = UNLIMITED
    pinned_pages: int = UNLIMITED
    sessions: int = UNLIMITED
    fds: int = UNLIMITED
    watches: int = UNLIMITED


class Quotas:
    """The limits in force. They are policy, not state: a daemon may change them as it runs.

    Attributes:
        in_force: the default, and those of tenants that have their own.
    """

    def __init__(self) -> None:
        self.in_force: tuple[Limits, dict[str, Limits]] = (Limits(), {})
        self._ever: list[tuple[Limits, dict[str, Limits]]] = []
        self._frames_at_most: dict[str, int] = {}
        self._pins_at_most: dict[str, int] = {}

    def set(self, default: Limits, tenants: Mapping[str, Limits] | None = None) -> None:
        """Put limits in force: ``tenants`` have their own, the others ``default``."""
        self.in_force = (default, dict(tenants or {}))
        self._ever.append(self.in_force)

    def of(self, tenant: str) -> Limits:
        """Return a tenant's limits."""
        return _limits_of(tenant, *self.in_force)

    def most(self, tenant: str) -> Limits:
        """Return the highest limits that a tenant ever had: it keeps what it got under those."""
        ever = [_limits_of(tenant, *limits) for limits in self._ever or [self.in_force]]
        values = {
            name: [getattr(limits, name) for limits in ever] for name in Limits.__struct_fields__
        }
        return Limits(**{
            name: UNLIMITED if UNLIMITED in found else max(found) for name, found in values.items()
        })  # fmt: skip

    def charge_frames(self, core: Core, tenant: str, npages: int) -> None:
        """Check that a tenant may have so many more frames.

        Raises:
            Exhausted: QUOTA.
        """
        limit = self.of(tenant).frames
        if limit == UNLIMITED:
            return
        at_most = self._frames_at_most.get(tenant)
        if at_most is None or at_most + npages > limit:
            at_most = frames_used(core, tenant) + _frames_coming(core, tenant)
        if at_most + npages > limit:
            self._frames_at_most[tenant] = at_most
            raise over("frames", tenant, at_most, npages, limit)
        self._frames_at_most[tenant] = at_most + npages

    def room(self, core: Core, tenant: str) -> int:
        """Return how many more frames a tenant may have."""
        limit = self.of(tenant).frames
        if limit == UNLIMITED:
            return core.host.nframes
        return max(limit - frames_used(core, tenant) - _frames_coming(core, tenant), 0)

    def charge_pins(self, core: Core, tenant: str, npages: int) -> None:
        """Check that a tenant may pin so many more pages.

        Raises:
            Exhausted: QUOTA.
        """
        limit = self.of(tenant).pinned_pages
        if limit == UNLIMITED:
            return
        at_most = self._pins_at_most.get(tenant)
        if at_most is None or at_most + npages > limit:
            at_most = pinned_pages(core, tenant)
        if at_most + npages > limit:
            self._pins_at_most[tenant] = at_most
            raise over("pinned_pages", tenant, at_most, npages, limit)
        self._pins_at_most[tenant] = at_most + npages

    def charge_session(self, core: Core, tenant: str) -> None:
        """Check that a tenant may open one more session.

        Raises:
            Exhausted: QUOTA.
        """
        limit = self.of(tenant).sessions
        if limit != UNLIMITED:
            used = sessions_open(core, tenant)
            if used >= limit:
                raise over("sessions", tenant, used, 1, limit)


def _limits_of(tenant: str, default: Limits, tenants: Mapping[str, Limits]) -> Limits:
    return tenants.get(tenant, default)


def over(what: str, tenant: str, used: int, more: int, limit: int) -> RmemError:
    """Return the refusal of something that would pass a limit."""
    return QUOTA(
        f"{what}: {tenant or 'nobody'} has {used} of {limit}, {more} more were asked for",
        state=f"{used} of {limit}", rule="reliability.md §3, I18", where=what,
    )  # fmt: skip


def frames_used(core: Core, tenant: str) -> int:
    """Return how many frames the tenant's files own, and those of its sessions' spare memory."""
    used = core.shared.spare_pages(tenant)
    for file in core.files.all():
        if file.info.owner.tenant == tenant:
            size = file.info.size_pages
            used += file.frames.touched(0, size).size + file.shared.touched(0, size).size
    return used


def pinned_pages(core: Core, tenant: str) -> int:
    """Return how many pages the tenant's clients hold: pinned, or referenced by their sessions."""
    pinned = sum(pin.npages for pin in core.sessions.pins() if pin.owner.tenant == tenant)
    holders = {info.label for info in core.sessions.all() if info.tenant == tenant}
    entries = [entry for entry in core.ledger.entries() if entry.holder in holders]
    return pinned + sum(map(core.ledger.count, entries))


def sessions_open(core: Core, tenant: str) -> int:
    """Return how many sessions the tenant has."""
    return sum(info.tenant == tenant for info in core.sessions.all())


def _frames_coming(core: Core, tenant: str) -> int:
    """Return how many frames suspended transactions may yet give the tenant's files."""
    tables = {
        table.name
        for file in core.files.all()
        if file.info.owner.tenant == tenant
        for table in (file.frames, file.shared)
    }
    return sum(
        write.args[0].size
        for tx in core.space.holders
        for write in tx.redo
        if write.op == "put" and write.table in tables
    )
