"""The session socket's datagrams: fixed little-endian records, as docs/session.md has them.

Owns the layout, and the way from bytes to records and back. Pure: no socket, no engine. What
``decode`` refuses as ``Broken`` ends a session; what is wrong within one record is refused in that
record's result.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from msgspec import Struct

from rmemd.engine.listeners import News, Revoked
from rmemd.engine.pendingfaults import FAULT, Message
from rmemd.units import PAGE_SHIFT

MAGIC = 0x4D52  # "RM"
VERSION = 1
RECORDS_MAX = 1024
PAYLOAD_MAX = 128 << 10

# magic, version, kind, count, flags, payload_length, sequence
FRAME = struct.Struct("<HBBHHII")
# role, ticket_length, reserved; then the ticket
HELLO = struct.Struct("<HHI")
# session; then its token
RESUME = struct.Struct("<Q")
# session, vm, revision, role, token_length, tenant_length, reserved, records_max, payload_max;
# then the token and the tenant
WELCOME = struct.Struct("<QQQHHHHII")
# op, flags, tag, object, start, length, value, payload_offset, payload_length
RECORD = struct.Struct("<HHIQQQQII")
# tag, errno, code, reserved, value, revision, payload_offset, payload_length
RESULT = struct.Struct("<IIIIQQII")
# kind, flags, reserved, object, start, length, userfault, vm, gpa, revision
NOTICE = struct.Struct("<HHIQQQQQQQ")
DATAGRAM_MAX = FRAME.size + RECORDS_MAX * RECORD.size + PAYLOAD_MAX


class Kind(IntEnum):
    """What a datagram is."""

    HELLO = 1
    WELCOME = 2
    REQUEST = 3
    REPLY = 4
    NOTICE = 5
    REFUSED = 6


class FrameFlag(IntFlag):
    """STOP: the records after the first refused one are not carried out. ONE_WAY: no reply."""

    STOP = 1
    ONE_WAY = 2


class Role(IntEnum):
    """As rmem.v1.Role; TICKET: whatever the ticket is for; RESUME: who the session is already."""

    TICKET = 0
    HOST = 1
    GUEST = 2
    DEVICE = 3
    ADMIN = 4
    RESUME = 5


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


# what a record passes along makes the rest of its datagram wait: they are alone in theirs
PASSING = frozenset({Op.FD, Op.CREATE})


class Flag(IntFlag):
    """Of a record. PRIVATE: the guest's address, or the half, is private."""

    PRIVATE = 1
    READ_ONLY = 2
    KEEP = 4


class NoticeKind(IntEnum):
    """What a notice tells."""

    REVOKED = 1
    FAULT = 2
    REMOVED = 3
    CLOSED = 4


class NoticeFlag(IntFlag):
    """Of a fault: of the private half; by a write."""

    PRIVATE = 1
    WRITE = 2


class Record(NamedTuple):
    """One request; ``object`` is also what the access rules know it as."""

    op: int
    flags: int
    tag: int
    object: int
    start: int
    length: int
    value: int
    payload_offset: int
    payload_length: int

    @property
    def vm(self) -> int:
        """Return the object of an op on a VM."""
        return self.object

    @property
    def file(self) -> int:
        """Return the object of an op on a file."""
        return self.object

    @property
    def pin(self) -> int:
        """Return the object of an op on a pin."""
        return self.object


class Use(NamedTuple):
    """What of its record an op reads; the rest must be zero, so that it can get a meaning later.

    Attributes:
        fields: of object, start, length and value.
        payload: whether it has one.
        flags: those it knows.
    """

    fields: frozenset[str]
    payload: bool = False
    flags: int = 0


def _use(fields: str, payload: bool = False, flags: int = 0) -> Use:
    # a plain number, as those of enums are slow to combine
    return Use(frozenset(fields.split()), payload, int(flags))


USES: dict[int, Use] = {
    Op.GET: _use("object start length"),
    Op.PUT: _use("", payload=True),
    Op.PIN: _use("object start length", payload=True),
    Op.UNPIN: _use("object"),
    Op.FAULT: _use("object start length"),
    Op.CONVERT: _use("object start length value"),
    Op.CONVERT_FILE: _use("object start length value"),
    Op.READ_SHARED: _use("object start length"),
    Op.WRITE_SHARED: _use("object start", payload=True),
    Op.READ_GUEST: _use("object start length value", flags=Flag.PRIVATE),
    Op.WRITE_GUEST: _use("object start value", payload=True, flags=Flag.PRIVATE),
    Op.FD: _use("object", flags=Flag.READ_ONLY),
    Op.USERFAULT_REGISTER: _use("object start length"),
    Op.USERFAULT_UNREGISTER: _use("object"),
    Op.USERFAULT_COPY: _use("object start", payload=True),
    Op.USERFAULT_ZERO: _use("object start length"),
    Op.USERFAULT_CONTINUE: _use("object start length", flags=Flag.PRIVATE),
    Op.USERFAULT_WAKE: _use("object start length"),
    Op.CREATE: _use("object start length value"),
    Op.CLOSE: _use("object", flags=Flag.KEEP),
}
_FIELDS = {"object": 3, "start": 4, "length": 5, "value": 6}
# by op: the positions in a record that must be zero, with their names
UNUSED: dict[int, tuple[tuple[int, str], ...]] = {
    op: (
        *((at, name) for name, at in _FIELDS.items() if name not in use.fields),
        *(() if use.payload else ((7, "payload_offset"), (8, "payload_length"))),
    )
    for op, use in USES.items()
}


# as plain numbers, which are quicker
_STOP, _ONE_WAY = int(FrameFlag.STOP), int(FrameFlag.ONE_WAY)


class Broken(Exception):
    """The datagram is none of ours; the message says why."""


class Frame(Struct):
    """A datagram's header, and what follows it."""

    kind: int
    count: int
    flags: int
    sequence: int
    records: memoryview
    payload: memoryview

    @property
    def stops(self) -> bool:
        """Return whether the first refusal ends it."""
        return bool(self.flags & _STOP)

    @property
    def is_one_way(self) -> bool:
        """Return whether nobody waits for a reply."""
        return bool(self.flags & _ONE_WAY)


class Hello(Struct, frozen=True):
    """The first datagram."""

    role: int
    ticket: bytes


class Resume(Struct, frozen=True):
    """What stands for the ticket where a session goes on that a daemon had before its restart."""

    session: int
    token: str


def decode(data: memoryview, expected: Kind) -> Frame:
    """Take a datagram apart.

    Raises:
        Broken: it is cut off, too long, of another kind or version, or has more than it says.
    """
    if len(data) < FRAME.size:
        raise Broken(f"{len(data)} bytes are no header")
    magic, version, kind, count, flags, payload_length, sequence = FRAME.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise Broken(f"magic {magic:#x}, version {version}; known are {MAGIC:#x}, {VERSION}")
    if kind != expected:
        raise Broken(f"kind {kind} where {expected.name} ({int(expected)}) is expected")
    if flags & ~(_STOP | _ONE_WAY):
        raise Broken(f"flags {flags:#x}")
    if count > RECORDS_MAX or payload_length > PAYLOAD_MAX:
        raise Broken(
            f"{count} records, {payload_length} bytes; at most {RECORDS_MAX}, {PAYLOAD_MAX}"
        )
    end = FRAME.size + count * RECORD.size
    if len(data) != end + payload_length:
        raise Broken(f"{len(data)} bytes where the header says {end + payload_length}")
    return Frame(kind, count, flags, sequence, data[FRAME.size : end], data[end:])


def decode_hello(data: memoryview) -> Hello:
    """Take the first datagram apart.

    Raises:
        Broken: it is no HELLO.
    """
    frame = decode(data, Kind.HELLO)
    if frame.count or frame.flags or len(frame.payload) < HELLO.size:
        raise Broken("a HELLO has no records, no flags, and 8 bytes at least")
    role, ticket_length, reserved = HELLO.unpack_from(frame.payload)
    if reserved or len(frame.payload) != HELLO.size + ticket_length:
        raise Broken("the HELLO's ticket is not as long as it says")
    if role not in set(Role):
        raise Broken(f"no role {role}")
    return Hello(role, bytes(frame.payload[HELLO.size :]))


def decode_resume(ticket: bytes) -> Resume:
    """Take the ticket of a HELLO of role RESUME apart.

    Raises:
        Broken: it is no session with a token.
    """
    try:
        (session,) = RESUME.unpack_from(ticket)
        token = ticket[RESUME.size :].decode("ascii")
    except (struct.error, UnicodeDecodeError) as error:
        raise Broken("a resumed session has 8 bytes of number, and its token") from error
    return Resume(session, token)


def frame(
    kind: Kind, sequence: int, records: bytes = b"", payload: bytes = b"", count: int = 0
) -> bytes:
    """Put a datagram together."""
    head = FRAME.pack(MAGIC, VERSION, kind, count, 0, len(payload), sequence)
    return b"".join((head, records, payload))


def welcome(
    session: int, vm: int, revision: int, role: str, token: str, tenant: str, sequence: int
) -> bytes:
    """Put the answer to a HELLO together."""
    key, name = token.encode(), tenant.encode()
    body = WELCOME.pack(
        session, vm, revision, Role[role.upper()], len(key), len(name), 0, RECORDS_MAX, PAYLOAD_MAX
    )
    return frame(Kind.WELCOME, sequence, payload=body + key + name)


class Reply:
    """The reply to a request, as it grows: one result a record, and their payload.

    Attributes:
        fd: a descriptor that goes with it, -1 if none; whoever sends the reply closes it.
    """

    def __init__(self, sequence: int) -> None:
        self.fd = -1
        self._sequence = sequence
        self._results: list[bytes] = []
        self._payload: list[bytes] = []
        self._length = 0

    @property
    def room(self) -> int:
        """Return how many bytes of payload still fit."""
        return PAYLOAD_MAX - self._length

    def done(
        self,
        tag: int,
        value: int,
        revision: int,
        payload: bytes = b"",
        errno: int = 0,
        code: int = 0,
    ) -> None:
        """Add the result of a record that was carried out; the payload must fit."""
        size = len(payload)
        at = self._length if size else 0
        self._results.append(RESULT.pack(tag, errno, code, 0, value, revision, at, size))
        if size:
            self._payload.append(payload)
            self._length += size

    def refused(
        self, tag: int, errno: int, code: int, revision: int, payload: bytes, progress: int
    ) -> None:
        """Add a refusal; where its text does not fit any more, the numbers must do."""
        text = payload if len(payload) <= self.room else b""
        self.done(tag, progress, revision, text, errno, code)

    def encode(self) -> bytes:
        """Put the datagram together."""
        count = len(self._results)
        head = FRAME.pack(MAGIC, VERSION, Kind.REPLY, count, 0, self._length, self._sequence)
        return b"".join((head, *self._results, *self._payload))


def notice_of(news: News) -> bytes:
    """Encode what a session is told of itself."""
    if isinstance(news, Revoked):
        start, length = news.pgoff << PAGE_SHIFT, news.npages << PAGE_SHIFT
        return NOTICE.pack(
            NoticeKind.REVOKED, 0, 0, news.file, start, length, 0, 0, 0, news.revision
        )
    return NOTICE.pack(
        NoticeKind.CLOSED, 0, 0, 0, 0, news.released_pages << PAGE_SHIFT, 0, 0, 0, news.revision
    )


def fault_notice(message: Message, revision: int) -> bytes:
    """Encode a fault that waits for the session, or pages that were punched from its ranges."""
    kind = NoticeKind.FAULT if message.kind == FAULT else NoticeKind.REMOVED
    flags = NoticeFlag.PRIVATE * message.private | NoticeFlag.WRITE * message.write
    gpa = max(message.gfn, 0) << PAGE_SHIFT
    return NOTICE.pack(
        kind, flags, 0, message.file, message.pgoff << PAGE_SHIFT, message.npages << PAGE_SHIFT,
        message.userfault, message.vm, gpa, revision,
    )  # fmt: skip


def notices(records: list[bytes]) -> bytes:
    """Put notices together in one datagram."""
    return frame(Kind.NOTICE, 0, b"".join(records), count=len(records))
