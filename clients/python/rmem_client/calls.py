"""What a call carries besides its request, and when it is sent again.

Owns request ids and the metadata of a call, for both halves of this library. A call that may change
something has an id of its own: should the connection be lost, it is sent again under the same id,
and the daemon, which remembers what it answered, does it once.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import TypeAlias

from google.protobuf.message import Message

from .address import Token

REQUEST_ID = "rmem-request-id"
TOKEN = "rmem-token"
# By this metadata a daemon says which memory it has, to who sends it empty. Who was told sends it
# with each call, so that another daemon, to which the old handles mean other things, does not carry
# it out.
DAEMON = "rmem-daemon"

CLOSED = "this client was closed meanwhile"

DEFAULT_DEADLINE_S = 30.0
# by the names of RPCs: these change nothing, so nobody minds if they are done twice
READS = ("Get", "List", "Read", "Explain", "Who", "Wait", "Check")

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_mutates: dict[type[Message], bool] = {}


def mutates(kind: type[Message]) -> bool:
    """Say whether requests of a type may change something, and so need an id."""
    known = _mutates.get(kind)
    if known is None:
        known = _mutates[kind] = not kind.DESCRIPTOR.name.startswith(READS)
    return known


def metadata_of(request: Message, token: Token, daemon: str = "") -> Metadata:
    """Return a call's metadata; a new id with each call of this. ``daemon`` is "" if unknown."""
    told = (*(identity(token) or ()), (DAEMON, daemon))
    if mutates(type(request)):
        told += ((REQUEST_ID, str(uuid.uuid4())),)
    return told


def daemon_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Return which daemon a reply's metadata is of, "" if it does not say."""
    return next((str(value) for key, value in metadata or () if key == DAEMON), "")


def identity(token: Token) -> Metadata | None:
    """Return what says who calls."""
    text = token if isinstance(token, str) else token()
    return ((TOKEN, text),) if text else None
