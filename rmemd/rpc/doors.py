"""What a gRPC door knows of who comes through it.

Owns the way from a connection to a tenant. A Unix socket tells nothing of its peer, so there a
token from the session socket does; over TCP the certificate does, by its URI SAN and never by its
common name. Without TLS everybody on the loopback is one tenant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import grpc

from rmemd.access.callers import TCP, UNIX, Access, Caller
from rmemd.errors import TOKEN_UNKNOWN

TOKEN = "rmem-token"
REQUEST_ID = "rmem-request-id"
# By this metadata of a reply one tells a daemon from another that has none of its memory. A call
# that carries it means that daemon, and no other; one that carries it empty, or other metadata of
# ours without it, is told. Who sends nothing of ours would not look, and is spared it.
DAEMON = "rmem-daemon"
OURS = frozenset((TOKEN, REQUEST_ID, DAEMON))
INSECURE_TENANT = "insecure:loopback"
SPIFFE = "spiffe://"
Sent = Sequence[tuple[str, str | bytes]]


class Door(Protocol):
    """Says who makes a call."""

    access: Access

    def caller(self, context: grpc.ServicerContext, sent: Sent) -> Caller:
        """Return the caller of a call that has this metadata of ours.

        Raises:
            Unauthenticated: nobody knows who it is.
        """


class UnixDoor:
    """The Unix socket: a token, or the daemon's own user where the directory is private."""

    def __init__(self, access: Access) -> None:
        self.access = access

    def caller(self, context: grpc.ServicerContext, sent: Sent) -> Caller:
        """Return the caller of a token, or the daemon's own user."""
        return self.access.caller(UNIX, "", token_of(sent) if sent else "")


class TlsDoor:
    """TCP with mutual TLS: the tenant is the certificate's SPIFFE id."""

    def __init__(self, access: Access, trust_domain: str = "") -> None:
        self.access = access
        self._prefix = f"{SPIFFE}{trust_domain}/" if trust_domain else SPIFFE

    def caller(self, context: grpc.ServicerContext, sent: Sent) -> Caller:
        """Return the tenant that the certificate names, in its token's session if it has one."""
        names = spiffe_ids(cast("Mapping[str, Sequence[bytes]]", context.auth_context()))
        if len(names) != 1 or not names[0].startswith(self._prefix):
            raise TOKEN_UNKNOWN(
                "no such tenant", for_log=f"the certificate names {names or 'nobody'}"
            )
        return self.access.caller(TCP, names[0], token_of(sent))


class LoopbackDoor:
    """TCP without TLS, for one machine's loopback: everybody is the same tenant."""

    def __init__(self, access: Access) -> None:
        self.access = access

    def caller(self, context: grpc.ServicerContext, sent: Sent) -> Caller:
        """Return the one tenant, in its token's session if it has one."""
        return self.access.caller(TCP, INSECURE_TENANT, token_of(sent))


def spiffe_ids(known: Mapping[str, Sequence[bytes]]) -> list[str]:
    """Return the SPIFFE ids of a verified certificate; a good one has exactly one."""
    return [name.decode(errors="replace") for name in known.get("peer_spiffe_id", ())]


def sent_to_us(context: grpc.ServicerContext) -> Sent:
    """Return a call's metadata that is ours and not gRPC's or a tracer's."""
    sent = []
    # most calls have one pair, and it is gRPC's: a comprehension would cost more than the look
    for pair in context.invocation_metadata() or ():
        if pair[0] in OURS:
            sent.append(pair)
    return sent


def token_of(sent: Sent) -> str:
    """Return a call's token, "" if it has none; two are none that is good."""
    if not sent:
        return ""
    found = [str(value) for key, value in sent if key == TOKEN]
    if len(found) > 1:
        raise TOKEN_UNKNOWN("no such token", field=TOKEN)
    return found[0] if found else ""
