"""Who calls: sessions, what they were granted, and their tickets (``client.sessions``)."""

from __future__ import annotations

from collections.abc import Iterable

from rmem.v1 import session_pb2, session_pb2_grpc

from .connection import Connection


class Sessions:
    """The session service."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = session_pb2_grpc.SessionServiceStub(connection.channel)

    async def whoami(self) -> session_pb2.WhoAmIResponse:
        """Return the caller's tenant, role, session, limits and use."""
        return await self._connection.call(self._stub.WhoAmI, session_pb2.WhoAmIRequest())

    async def list(self) -> session_pb2.ListSessionsResponse:
        """List the tenant's sessions; an admin's list is of everybody's."""
        request = session_pb2.ListSessionsRequest()
        return await self._connection.call(self._stub.ListSessions, request)

    async def open(
        self, *, lease_s: float = 0.0, ticket: bytes = b""
    ) -> session_pb2.OpenSessionResponse:
        """Open a session that lives as long as it is renewed; the reply has its token.

        Args:
            lease_s: seconds without a renewal after which it ends; 0: 30.
            ticket: one to redeem; none: a session of the caller's own role.
        """
        request = session_pb2.OpenSessionRequest(lease_seconds=lease_s, ticket=ticket)
        return await self._connection.call(self._stub.OpenSession, request)

    async def renew(self) -> float:
        """Begin the lease of the call's own session anew; return its seconds."""
        request = session_pb2.RenewSessionRequest()
        reply = await self._connection.call(self._stub.RenewSession, request)
        return reply.lease_seconds

    async def close(self, session: int = 0) -> session_pb2.CloseSessionResponse:
        """End a session with all it holds and those below it; 0: the call's own."""
        request = session_pb2.CloseSessionRequest(session=session)
        return await self._connection.call(self._stub.CloseSession, request)

    async def create_ticket(
        self,
        role: session_pb2.Role.ValueType,
        *,
        vm: int = 0,
        grants: Iterable[session_pb2.Grant] = (),
        tenant: str = "",
    ) -> bytes:
        """Make a ticket that another process redeems, once, for a session below this one.

        Args:
            role: ROLE_GUEST or ROLE_DEVICE; for an admin also ROLE_HOST.
            vm: the VM of a guest.
            grants: the ranges of a device.
            tenant: the tenant of a ROLE_HOST ticket; else the caller's.
        """
        request = session_pb2.CreateTicketRequest(role=role, vm=vm, grants=grants, tenant=tenant)
        reply = await self._connection.call(self._stub.CreateTicket, request)
        return reply.ticket

    async def revoke(
        self, file: int, offset_bytes: int, length_bytes: int
    ) -> session_pb2.RevokeGrantsResponse:
        """Take a range back from the sessions below this one; refused while one pins it."""
        request = session_pb2.RevokeGrantsRequest(
            file=file, offset_bytes=offset_bytes, length_bytes=length_bytes
        )
        return await self._connection.call(self._stub.RevokeGrants, request)
