"""SessionService: sessions, tickets and grants. Decode, call, encode; nothing else."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from rmem.v1 import session_pb2 as pb
from rmemd.access.callers import Access, Caller, Ticket, seconds_of_lease
from rmemd.access.rules import require_file, require_vm
from rmemd.engine import quotas
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.errors import BAD_REQUEST, NO_SUCH_SESSION, ROLE_DENIED
from rmemd.model.sessions import GrantRange, SessionInfo
from rmemd.rpc.dispatch import Call, open_streams
from rmemd.units import PAGE_SHIFT, PAGE_SIZE, is_page_aligned

log = structlog.get_logger("rmemd.session")

ROLES: dict[str, pb.Role.ValueType] = {
    "host": pb.ROLE_HOST, "guest": pb.ROLE_GUEST, "device": pb.ROLE_DEVICE, "admin": pb.ROLE_ADMIN,
}  # fmt: skip
_NAMES = {value: name for name, value in ROLES.items()}


class SessionService:
    """Sessions by handle; ``fds_passed`` says how many descriptors a tenant was given."""

    def __init__(
        self, engine: Engine, access: Access, fds_passed: Callable[[str], int] = lambda tenant: 0
    ) -> None:
        self._engine = engine
        self._access = access
        self._fds_passed = fds_passed

    def WhoAmI(self, request: pb.WhoAmIRequest, call: Call) -> pb.WhoAmIResponse:
        caller = call.caller
        revision, reply = self._engine.read(lambda core: self._who(core, caller))
        reply.revision = revision
        return reply

    def OpenSession(self, request: pb.OpenSessionRequest, call: Call) -> pb.OpenSessionResponse:
        caller, access = call.caller, self._access
        if caller.session:
            raise BAD_REQUEST("a session opens others below it by tickets", field="rmem-token")
        seconds = seconds_of_lease(request.lease_seconds)
        if request.ticket:
            info, token = access.redeem(request.ticket, caller.door)
        else:
            info, token = access.open(caller.tenant, caller.role, caller.door)
        access.lease(info.session, seconds)
        log.info("session_opened", session=info.session, role=info.role, tenant=info.tenant)
        revision, session = self._engine.read(lambda core: self._describe(core, info))
        return pb.OpenSessionResponse(revision=revision, session=session, token=token)

    def RenewSession(self, request: pb.RenewSessionRequest, call: Call) -> pb.RenewSessionResponse:
        seconds = self._access.renew(call.caller.session)
        return pb.RenewSessionResponse(revision=self._engine.answered, lease_seconds=seconds)

    def CloseSession(self, request: pb.CloseSessionRequest, call: Call) -> pb.CloseSessionResponse:
        number = request.session or call.caller.session
        closed = self._access.close(
            number, lambda core: _require_session(core, call.caller, number)
        )
        log.info(
            "session_close_called", session=number, released_pages=closed.released_pages,
            vms=list(closed.vms), by=call.caller.tenant,
        )  # fmt: skip
        return pb.CloseSessionResponse(
            revision=self._engine.answered, released_pages=closed.released_pages,
            vms=len(closed.vms),
        )  # fmt: skip

    def ListSessions(self, request: pb.ListSessionsRequest, call: Call) -> pb.ListSessionsResponse:
        revision, sessions = self._engine.read(
            lambda core: [
                self._describe(core, info)
                for info in core.sessions.all()
                if call.caller.sees(info.owner)
            ]
        )
        return pb.ListSessionsResponse(revision=revision, sessions=sessions)

    def CreateTicket(self, request: pb.CreateTicketRequest, call: Call) -> pb.CreateTicketResponse:
        ticket = self._engine.read(lambda core: _ticket(core, call.caller, request))[1]
        made = self._access.issue(call.caller, ticket)
        return pb.CreateTicketResponse(revision=self._engine.answered, ticket=made)

    def RevokeGrants(self, request: pb.RevokeGrantsRequest, call: Call) -> pb.RevokeGrantsResponse:
        pgoff, npages = _page_range(request.offset_bytes, request.length_bytes)
        files = self._engine.core.files
        # a file that is gone has no grants: the engine refuses it, unless this is a repeat
        there = files.exists(request.file)
        tenant = files.get(request.file).info.owner.tenant if there else ""
        losers = self._engine.revoke(tenant, request.file, pgoff, npages)
        return pb.RevokeGrantsResponse(
            revision=self._engine.answered, sessions=[info.session for info in losers]
        )

    def _who(self, core: Core, caller: Caller) -> pb.WhoAmIResponse:
        tenant, limits = caller.tenant, core.quotas.of(caller.tenant)
        used = {
            "frames": quotas.frames_used(core, tenant),
            "pinned_pages": quotas.pinned_pages(core, tenant),
            "sessions": quotas.sessions_open(core, tenant),
            "fds": self._fds_passed(tenant),
            "watches": open_streams(tenant),
        }
        return pb.WhoAmIResponse(
            tenant=tenant, role=ROLES[caller.role], session=caller.session,
            limits=[pb.Limit(what=what, limit=getattr(limits, what), used=n)
                    for what, n in used.items()],
        )  # fmt: skip

    def _describe(self, core: Core, info: SessionInfo) -> pb.Session:
        held = sum(map(core.ledger.count, core.ledger.entries_of(info.label)))
        held += sum(pin.npages for pin in core.sessions.pins_of(info.session))
        vms = len(core.vms.of_session(info.session))
        session = pb.Session(
            session=info.session, tenant=info.tenant, role=ROLES[info.role], door=info.door,
            pid=info.pid, parent=info.parent, vm=info.vm, held_pages=held, vms=vms,
            lease_seconds=self._access.lease_of(info.session),
        )  # fmt: skip
        for grant in info.grants:
            session.grants.add(
                file=grant.file, offset_bytes=grant.pgoff << PAGE_SHIFT,
                length_bytes=grant.npages << PAGE_SHIFT, read_only=grant.read_only,
            )  # fmt: skip
        return session


def _require_session(core: Core, caller: Caller, number: int) -> None:
    """A caller ends its own session, those below it, or as an admin any; a host its tenant's."""
    info = core.sessions.alive(number)
    mine = number == caller.session or (
        caller.role in ("host", "admin") and caller.sees(info.owner)
    )
    if not mine:
        raise NO_SUCH_SESSION(f"session {number} does not exist", field="session")


def _ticket(core: Core, caller: Caller, request: pb.CreateTicketRequest) -> Ticket:
    role = _NAMES.get(request.role)
    if role is None:
        raise BAD_REQUEST(f"no role {request.role}", field="role")
    tenant = request.tenant or caller.tenant
    if role == "guest":
        require_vm(core, caller, request.vm)
        tenant = core.vms.get(request.vm).info.owner.tenant
    elif request.vm:
        raise BAD_REQUEST("only a guest has a VM", field="vm")
    grants = tuple(_grant(core, caller, i, grant) for i, grant in enumerate(request.grants))
    if (role == "device") != bool(grants):
        raise BAD_REQUEST("a device has ranges, and no other role has", field="grants")
    if grants:
        owners = {core.files.get(grant.file).info.owner.tenant for grant in grants}
        if len(owners) > 1:
            raise ROLE_DENIED("the ranges are of several tenants", field="grants")
        tenant = owners.pop()
    return Ticket(tenant, role, caller.session, request.vm, grants)


def _grant(core: Core, caller: Caller, index: int, grant: pb.Grant) -> GrantRange:
    require_file(core, caller, grant.file)
    pgoff, npages = _page_range(grant.offset_bytes, grant.length_bytes, f"grants[{index}].")
    return GrantRange(grant.file, pgoff, npages, grant.read_only)


def _page_range(offset: int, length: int, where: str = "") -> tuple[int, int]:
    for field, value in (("offset_bytes", offset), ("length_bytes", length)):
        if value < 0 or not is_page_aligned(value):
            raise BAD_REQUEST(f"{field} {value} is not whole pages", field=where + field)
    if not length:
        raise BAD_REQUEST("the range is empty", field=f"{where}length_bytes")
    return offset // PAGE_SIZE, length // PAGE_SIZE
