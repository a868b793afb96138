"""What a call carries besides its request, and when it is sent again.

Owns request ids, the token's metadata and the pauses between attempts, for both halves of this
library. A call that may change something has an id of its own: should the connection be lost, it
is sent again under the same id, and the daemon, which remembers what it answered, does it once.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator
from typing import TypeAlias

from google.protobuf.message import Message

from .address import Token

REQUEST_ID = "rmem-request-id"
TOKEN = "rmem-token"
# what a stream's first metadata says: which daemon it comes from
DAEMON = "rmem-daemon"

CLOSED = "this client was closed meanwhile"

DEFAULT_DEADLINE_S = 30.0
DEFAULT_RECONNECT_S = 10.0

# Seconds before the second attempt, at most; each further pause may be twice as long. Their length
# is drawn, so that the clients of one daemon do not all come back in the same moment.
PAUSE_S = 0.02
PAUSE_MAX_S = 1.0

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


def metadata_of(request: Message, token: Token) -> Metadata | None:
    """Return a call's metadata; a new id with each call of this function."""
    told = identity(token)
    if not mutates(type(request)):
        return told
    requested = ((REQUEST_ID, str(uuid.uuid4())),)
    return requested if told is None else told + requested


def identity(token: Token) -> Metadata | None:
    """Return what says who calls."""
    text = token if isinstance(token, str) else token()
    return ((TOKEN, text),) if text else None


def pauses() -> Iterator[float]:
    """Yield the seconds to let pass before each further attempt."""
    longest = PAUSE_S
    while True:
        yield random.uniform(0.0, longest)
        longest = min(2 * longest, PAUSE_MAX_S)


def remaining(end: float) -> float:
    """Return the seconds until ``end``, a time of ``time.monotonic``, and at least 0."""
    return max(0.0, end - time.monotonic())
