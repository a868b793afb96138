"""The session socket's datagrams as a client sees them: what docs/session.md says, in structs.

Owns the layout on this side. Nothing here knows a socket. The errors, and gRPC with them, are
imported with the first refusal: a device process that is refused nothing does without.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from rmem.v1 import session_pb2

if TYPE_CHECKING:
    from .errors import RmemError

MAGIC = 0x4D52
VERSION = 1
RECORDS_MAX = 1024
PAYLOAD_MAX = 128 << 10
STOP = 1
ONE_WAY = 2
PRIVATE = 1
READ_ONLY = 2
KEEP = 4
WRITE = 2

FRAME = struct.Struct("<HBBHHII")
HELLO = struct.Struct("<HHI")
RESUME = struct.Struct("<Q")
WELCOME = struct.Struct("<QQQHHHHII")
RECORD = struct.Struct("<HHIQQQQII")
RESULT = struct.Struct("<IIIIQQII")
NOTICE = struct.Struct("<HHIQQQQQQQ")
DATAGRAM_MAX = FRAME.size + RECORDS_MAX * RECORD.size + PAYLOAD_MAX

ROLES = {"": 0, "host": 1, "guest": 2, "device": 3, "admin": 4, "resume": 5}
_ROLE_NAMES = {number: name for name, number in ROLES.items()}
ECANCELED = 125


class Kind(IntEnum):
    """What a datagram is."""

    HELLO = 1
    WELCOME = 2
    REQUEST = 3
    REPLY = 4
    NOTICE = 5
    REFUSED = 6


class Op(IntEnum):
    """What a record asks for."""

    GET = 1
    PUT = 2
    PIN = 3
    UNPIN = 4
    FAULT = 5
    CONVERT = 6
    CONVERT_FILE = 7
    READ_SHARED = 8
    WRITE_SHARED = 9
    READ_GUEST = 10
    WRITE_GUEST = 11
    FD = 12
    USERFAULT_REGISTER = 13
    USERFAULT_UNREGISTER = 14
    USERFAULT_COPY = 15
    USERFAULT_ZERO = 16
    USERFAULT_CONTINUE = 17
    USERFAULT_WAKE = 18
    CREATE = 19
    CLOSE = 20


# as a plain number, which is quicker
_REQUEST = int(Kind.REQUEST)
REPLY = int(Kind.REPLY)
NOTICE_KINDS = {1: "revoked", 2: "fault", 3: "removed", 4: "closed"}


class Record(NamedTuple):
    """One request. ``payload`` goes behind all records of the datagram."""

    op: int
    object: int = 0
    start: int = 0
    length: int = 0
    value: int = 0
    flags: int = 0
    payload: bytes = b""


class Result(NamedTuple):
    """How one request went: ``error`` is None if it was carried out."""

    value: int
    revision: int
    data: bytes
    error: RmemError | None


class Welcome(NamedTuple):
    """What a daemon says of a new session."""

    session: int
    vm: int
    revision: int
    role: str
    token: str
    tenant: str
    records_max: int
    payload_max: int


@dataclass(frozen=True)
class Notice:
    """What a session is told without having asked.

    Attributes:
        kind: "revoked": a range of ``file`` was taken back. "fault": pages of a registered range
            are missing, and somebody waits. "removed": pages of one were punched out. "closed":
            the session has ended; ``length_bytes`` of pages were let go.
        file: the file; ``offset_bytes`` and ``length_bytes`` are the range in it.
        userfault: the registration's handle.
        vm: whose access it was, 0 if the host's; ``gpa`` is where.
        private: whether the private half is meant.
        write: whether it was a write.
        revision: of the state that it tells of.
    """

    kind: str
    file: int
    offset_bytes: int
    length_bytes: int
    userfault: int
    vm: int
    gpa: int
    private: bool
    write: bool
    revision: int


class Datagram(NamedTuple):
    """A datagram's header, and what follows it."""

    kind: int
    nrecords: int
    sequence: int
    body: memoryview


class ProtocolError(Exception):
    """The daemon sent what this client does not understand."""


def hello(role: str, ticket: bytes) -> bytes:
    """Put the first datagram together; raises KeyError for a role that there is not."""
    body = HELLO.pack(ROLES[role], len(ticket), 0) + ticket
    return FRAME.pack(MAGIC, VERSION, Kind.HELLO, 0, 0, len(body), 0) + body


def resume(session: int, token: str) -> bytes:
    """Put the first datagram to a daemon that was started again together."""
    return hello("resume", RESUME.pack(session) + token.encode())


def request(sequence: int, records: list[Record], flags: int = 0) -> bytes:
    """Put a request together.

    Raises:
        ValueError: it is more than one datagram takes.
    """
    parts, payloads, at = [], [], 0
    for tag, one in enumerate(records):
        size = len(one.payload)
        parts.append(
            RECORD.pack(
                one.op, one.flags, tag, one.object, one.start, one.length, one.value,
                at if size else 0, size,
            )
        )  # fmt: skip
        if size:
            payloads.append(one.payload)
            at += size
    if len(records) > RECORDS_MAX or at > PAYLOAD_MAX:
        raise ValueError(f"{len(records)} records with {at} bytes are too much for one datagram")
    head = FRAME.pack(MAGIC, VERSION, _REQUEST, len(records), flags, at, sequence)
    return b"".join((head, *parts, *payloads))


def decode(data: memoryview) -> Datagram:
    """Take a datagram apart.

    Raises:
        ProtocolError: it is none.
    """
    if len(data) < FRAME.size:
        raise ProtocolError(f"{len(data)} bytes are no datagram")
    magic, version, kind, count, _, _, sequence = FRAME.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION):
        raise ProtocolError(f"magic {magic:#x}, version {version}")
    return Datagram(kind, count, sequence, data[FRAME.size :])


def welcome(body: memoryview) -> Welcome:
    """Take a WELCOME apart."""
    session, vm, revision, role, key, name, _, records, payload = WELCOME.unpack_from(body)
    at = WELCOME.size
    token, tenant = bytes(body[at : at + key]), bytes(body[at + key : at + key + name])
    return Welcome(
        session, vm, revision, _ROLE_NAMES[role], token.decode(), tenant.decode(), records, payload
    )


def results(datagram: Datagram) -> list[Result]:
    """Take a reply apart."""
    split = datagram.nrecords * RESULT.size
    payload = datagram.body[split:]
    found = RESULT.iter_unpack(datagram.body[:split])
    return [
        Result(value, revision, bytes(payload[at : at + size]) if size else b"", None)
        if not code
        else _refused(value, revision, bytes(payload[at : at + size]), code, errno)
        for _, errno, code, _, value, revision, at, size in found
    ]


def _refused(value: int, revision: int, data: bytes, code: int, errno: int) -> Result:
    error = refusal(data, code)
    error.errno = error.errno or errno
    return Result(value, revision, b"", error)


def refusal(data: bytes, code: int) -> RmemError:
    """Return the typed error of a refusal; without its text, that of its code."""
    from .errors import decode_session_refusal

    message = session_pb2.SessionRefusal.FromString(data)
    message.code = message.code or code
    return decode_session_refusal(message)


def notices(datagram: Datagram) -> list[Notice]:
    """Take a notice datagram apart."""
    found = []
    for kind, flags, _, file, start, length, userfault, vm, gpa, revision in NOTICE.iter_unpack(
        datagram.body[: datagram.nrecords * NOTICE.size]
    ):
        found.append(
            Notice(
                NOTICE_KINDS.get(kind, f"kind {kind}"), file, start, length, userfault, vm, gpa,
                bool(flags & PRIVATE), bool(flags & WRITE), revision,
            )
        )  # fmt: skip
    return found
