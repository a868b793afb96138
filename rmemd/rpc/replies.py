"""What was answered to calls that change something, so that none is done twice.

Owns the store of answers. A client that lost its connection cannot know whether a call was carried
out; it sends the call again under the same request id (metadata "rmem-request-id", a UUID), and is
given the very answer that it missed: the reply's bytes, or the refusal's status. A repeat that
comes while the first is still at work waits for that one's end. An id belongs to its caller, tenant
and session: nobody else's repeat is one.

An answer is kept ten minutes, or until there are more than ``ENTRIES_MAX`` of them or
``BYTES_MAX`` bytes in them: then the oldest goes of the tenant who has most, so that nobody's calls
push out another's. Altogether that is 16 MiB of answers and, at not quite 1 KiB of bookkeeping for
each, as much again. Each is a note before it leaves, so a daemon that is started again gives it,
for another ten minutes. An answer that has a secret in it is kept in this process alone; what its
call came to in the engine stays noted as long, so that a repeat is given another secret for the
same thing.

Refusals that say UNAVAILABLE or CANCELLED are not kept: they ask for another attempt. A call that
waits when its client's connection breaks ends with one, and its repeat must wait anew instead of
being told so.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import grpc
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Struct, field

from rmemd.engine.calls import Key
from rmemd.engine.core import Core
from rmemd.errors import BAD_REQUEST, INTERRUPTED, REQUEST_ID_REUSED
from rmemd.rpc.doors import REQUEST_ID

KEPT_SECONDS = 600.0
SWEEP_SECONDS = 10.0
ENTRIES_MAX = 16384
BYTES_MAX = 16 << 20

# By its name an RPC changes nothing, and needs no id. Streams are neither: they are never repeated.
READS = ("Get", "List", "Read", "Explain", "Who", "Wait", "Check")
# calls whose answers have a secret, which is to be in no journal
SECRET = frozenset({"SessionService/OpenSession", "SessionService/CreateTicket"})
# the kind of notes, by tenant, session and id
REPLIES = "replies"
RPC = "rpc"
PASSING = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE})
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_NONCE, _TAG_BYTES = bytes(12), 16
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def mutates(method: str) -> bool:
    """Say whether a unary RPC may change something, and so must not be done twice."""
    return not method.startswith(READS)


class Answer(Struct):
    """How a call ended: with a reply's bytes, or with a refusal's status."""

    reply: bytes = b""
    status: grpc.Status | None = None

    @property
    def nbytes(self) -> int:
        """Return how many bytes it keeps."""
        if self.status is None:
            return len(self.reply)
        return sum(len(value) for _, value in self.status.trailing_metadata or ())


class KeptReply(Struct, frozen=True):
    """An answer as a note: of a call with these contents; its reply, or its refusal's status."""

    digest: bytes
    reply: bytes
    code: int = 0
    text: str = ""
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    @classmethod
    def of(cls, digest: bytes, answer: Answer) -> KeptReply:
        """Return an answer as a note."""
        status = answer.status
        if status is None:
            return cls(digest, answer.reply)
        metadata = tuple(status.trailing_metadata or ())
        return cls(digest, b"", status.code.value[0], status.details, metadata)

    @property
    def answer(self) -> Answer:
        """Return the answer."""
        if not self.code:
            return Answer(self.reply)
        return Answer(status=_Status(_CODES[self.code], self.text, self.metadata))


class _Status(grpc.Status):
    def __init__(
        self,
        code: grpc.StatusCode,
        details: str,
        trailing_metadata: tuple[tuple[str, str | bytes], ...],
    ) -> None:
        self.code = code
        self.details = details
        self.trailing_metadata = trailing_metadata


class Refused(Exception):
    """The repeat of a call that was refused; ``status`` is what the first was told."""

    def __init__(self, status: grpc.Status) -> None:
        super().__init__(status.details)
        self.status = status


class _Entry(Struct, eq=False):
    """One id: what was asked, and what was answered or who waits for that."""

    digest: bytes
    secret: bool = False
    ended: bool = False
    ended_at: float = 0.0
    answer: Answer | None = None
    waiting: list[threading.Event] | None = None


_Number = tuple[int, str]


class _Kept(Struct):
    """One tenant's entries, by session and id, oldest end first; the bytes of their answers."""

    entries: OrderedDict[_Number, _Entry] = field(default_factory=OrderedDict)
    nbytes: int = 0


class Turn:
    """The right to carry a call out, and the duty to say how it ended, once.

    Attributes:
        key: the name of the call for ``Core.calls``: the same for a repeat, and no other.
    """

    __slots__ = ("_entry", "_number", "_replies", "_tenant", "key")

    def __init__(self, replies: Replies, tenant: str, number: _Number, entry: _Entry) -> None:
        self._replies, self._tenant, self._number, self._entry = replies, tenant, number, entry
        self.key = call_key(tenant, number, entry.digest)

    def replied(self, reply: bytes) -> bytes:
        """Keep the reply, and return it."""
        self._replies.end(self._tenant, self._number, self._entry, Answer(reply))
        return reply

    def refused(self, status: grpc.Status | None) -> None:
        """Keep a refusal, unless it is a passing one; ``None`` if there is none to keep."""
        kept = None if status is None or status.code in PASSING else Answer(status=status)
        self._replies.end(self._tenant, self._number, self._entry, kept)


class Replies:
    """The answers of one daemon. Safe from any thread.

    Args:
        clock: monotonic seconds.
        entries_max: how many answers are kept at most.
        bytes_max: how many bytes of answers are kept at most.
        core: in whose notes they are kept, too; without one they go with this object.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        entries_max: int = ENTRIES_MAX,
        bytes_max: int = BYTES_MAX,
        core: Core | None = None,
    ) -> None:
        self._core = core
        self._clock = clock
        self._entries_max, self._bytes_max = entries_max, bytes_max
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._entries = 0
        self._nbytes = 0
        self._begun_at = self._swept_at = clock()
        # dropped from here, and to be dropped from the notes when the lock is free
        self._dropped: list[tuple[str, _Number, _Entry]] = []
        # of calls that the daemon before this one did not answer, until nobody will repeat them
        self._unanswered: list[Key] = []
        self._given_up: list[Key] = []
        if core is not None:
            self._take_over(core)

    def __len__(self) -> int:
        return self._entries

    @property
    def nbytes(self) -> int:
        """Return the bytes of all answers that are kept."""
        return self._nbytes

    def turn(
        self, tenant: str, session: int, method: str, data: bytes, context: grpc.ServicerContext
    ) -> Turn | bytes | None:
        """Return what the first of a call was answered, or the turn to carry it out.

        Args:
            tenant: whose call it is.
            session: in which session, 0 if in none.
            method: the call, "VmService/CreateVm".
            data: its request.
            context: which knows its metadata, and when it is over.

        Returns:
            The reply's bytes; or the turn, whose holder must end it; or ``None`` for a call that
            has no id or needs none.

        Raises:
            Refused: the first was refused.
            InvalidArgument: BAD_REQUEST, REQUEST_ID_REUSED.
            Unavailable: INTERRUPTED; the caller is gone.
        """
        text = _request_id(context) if mutates(method.rpartition("/")[2]) else None
        if text is None:
            return None
        number, digest = (session, text), _digest(method, data)
        while True:
            found = self._claim(tenant, number, digest, method in SECRET)
            self._drop_notes()
            if isinstance(found, Turn):
                return found
            if found.answer is not None:
                return _again(found.answer)
            self._wait(found, context)

    def end(self, tenant: str, number: _Number, entry: _Entry, answer: Answer | None) -> None:
        """Have a call ended: keep its answer, or forget the call if there is none to keep."""
        if entry.ended:
            return
        self._note(tenant, number, entry, answer)
        with self._lock:
            waiting, entry.waiting = entry.waiting or (), None
            entry.ended, entry.ended_at = True, self._clock()
            if answer is None:
                self._forget(tenant, number)
            else:
                kept = self._kept[tenant]
                kept.entries.move_to_end(number)
                entry.answer = answer
                kept.nbytes += answer.nbytes
                self._nbytes += answer.nbytes
                self._shrink()
        for event in waiting:
            event.set()
        self._drop_notes()

    def _claim(self, tenant: str, number: _Number, digest: bytes, secret: bool) -> Turn | _Entry:
        with self._lock:
            self._sweep()
            kept = self._kept.get(tenant)
            entry = None if kept is None else kept.entries.get(number)
            if entry is not None and self._is_old(entry):
                self._forget(tenant, number)
                kept, entry = self._kept.get(tenant), None
            if entry is None:
                if kept is None:
                    kept = self._kept[tenant] = _Kept()
                entry = kept.entries[number] = _Entry(digest, secret)
                self._entries += 1
                return Turn(self, tenant, number, entry)
            if entry.digest != digest:
                raise REQUEST_ID_REUSED(
                    f"request id {number[1]} was that of a call with other contents",
                    field=REQUEST_ID,
                )
            return entry

    def _wait(self, entry: _Entry, context: grpc.ServicerContext) -> None:
        """Wait until a call has ended, or the one that waits for it is over."""
        event = threading.Event()
        with self._lock:
            if entry.ended:
                return
            entry.waiting = [*(entry.waiting or ()), event]
        if not context.add_callback(event.set):  # it is over already
            event.set()
        event.wait()
        if not context.is_active():
            with self._lock:
                entry.waiting = [other for other in entry.waiting or () if other is not event]
            raise INTERRUPTED("the caller went away while its call was carried out")

    # --- what survives -----------------------------------------------------------------------
    def _take_over(self, core: Core) -> None:
        """Go on with the answers, and the unanswered calls, of the daemon before this one."""
        now = self._clock()
        for (tenant, session, text), note in core.notes.items(REPLIES):
            answer, number = note.answer, (session, text)
            kept = self._kept.setdefault(tenant, _Kept())
            kept.entries[number] = _Entry(note.digest, ended=True, ended_at=now, answer=answer)
            kept.nbytes += answer.nbytes
            self._entries += 1
            self._nbytes += answer.nbytes
            core.calls.forget(call_key(tenant, number, note.digest))
        self._unanswered = [key for key in core.calls.unanswered() if _is_rpc(key)]

    def _note(self, tenant: str, number: _Number, entry: _Entry, answer: Answer | None) -> None:
        """Have an answer survive; what the call came to is then needed no more."""
        if self._core is None:
            return
        if answer is not None:
            if entry.secret and answer.status is None:
                return
            note = KeptReply.of(entry.digest, answer)
            self._core.notes.set(REPLIES, (tenant, *number), note)
        # after the note, so that no crash finds neither
        self._core.calls.forget(call_key(tenant, number, entry.digest))

    def _drop_notes(self) -> None:
        """Drop the notes of what was dropped here; not under the lock, for they take another."""
        if self._core is None or not (self._dropped or self._given_up):
            return
        with self._lock:
            dropped, self._dropped = self._dropped, []
            given_up, self._given_up = self._given_up, []
        for tenant, number, entry in dropped:
            self._core.notes.drop(REPLIES, (tenant, *number))
            if entry.secret:
                given_up.append(call_key(tenant, number, entry.digest))
        for key in given_up:
            self._core.calls.forget(key)

    # --- the bounds, all under the lock -------------------------------------------------------
    def _is_old(self, entry: _Entry) -> bool:
        return entry.ended and entry.ended_at <= self._clock() - KEPT_SECONDS

    def _sweep(self) -> None:
        """Drop what is too old, of everybody, but not at every call."""
        now = self._clock()
        if now < self._swept_at + SWEEP_SECONDS:
            return
        self._swept_at = now
        if now >= self._begun_at + KEPT_SECONDS:
            self._given_up += self._unanswered
            self._unanswered = []
        for tenant, kept in list(self._kept.items()):
            for number, entry in list(kept.entries.items()):
                if self._is_old(entry):
                    self._forget(tenant, number)
                elif entry.ended:
                    break

    def _shrink(self) -> None:
        while self._nbytes > self._bytes_max:
            if not self._drop_oldest_of(max(self._kept, key=lambda who: self._kept[who].nbytes)):
                return
        while self._entries > self._entries_max:
            biggest = max(self._kept, key=lambda who: len(self._kept[who].entries))
            if not self._drop_oldest_of(biggest):
                return

    def _drop_oldest_of(self, tenant: str) -> bool:
        """Drop a tenant's oldest answer; calls that are at work have none yet."""
        for number, entry in self._kept[tenant].entries.items():
            if entry.ended:
                self._forget(tenant, number)
                return True
        return False

    def _forget(self, tenant: str, number: _Number) -> None:
        kept = self._kept[tenant]
        entry = kept.entries.pop(number)
        if self._core is not None:
            self._dropped.append((tenant, number, entry))
        self._entries -= 1
        if entry.answer is not None:
            kept.nbytes -= entry.answer.nbytes
            self._nbytes -= entry.answer.nbytes
        if not kept.entries:
            del self._kept[tenant]


CallKey = tuple[str, str, int, str, bytes]


def call_key(tenant: str, number: _Number, digest: bytes) -> CallKey:
    """Return what names a call with an id, by whose it is and what it says."""
    return (RPC, tenant, *number, digest)


def _is_rpc(key: Key) -> bool:
    return key[0] == RPC


def _again(answer: Answer) -> bytes:
    if answer.status is not None:
        raise Refused(answer.status)
    return answer.reply


def _digest(method: str, data: bytes) -> bytes:
    """Return 16 bytes that tell a call from others under its id: AES-GCM's tag of both parts.

    Of a large request a tag takes a tenth of a SHA-256's time, which would be a fifteenth of the
    call's. Its key is no secret: who makes two calls of one tag gets their own answer to the other.
    """
    return _tags().encrypt(_NONCE, method.encode(), data)[-_TAG_BYTES:]


@cache
def _tags() -> AESGCM:
    """Return what makes tags: the same in every daemon, as the next has to know our calls.

    It is made with the first call, since OpenSSL sets itself up with its first key.
    """
    return AESGCM(bytes(16))


def _request_id(context: grpc.ServicerContext) -> str | None:
    found = [value for key, value in context.invocation_metadata() or () if key == REQUEST_ID]
    if not found:
        return None
    text = str(found[0]).lower()
    if len(found) > 1 or not _UUID.fullmatch(text):
        raise BAD_REQUEST("a request id is one UUID, 8-4-4-4-12 digits", field=REQUEST_ID)
    return text
