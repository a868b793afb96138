"""What was answered to calls that change something, so that none is done twice.

Owns the store of answers. A client that lost its connection cannot know whether a call was carried
out; it sends the call again under the same request id (metadata "rmem-request-id", a UUID), and is
given the very answer that it missed: the reply's bytes, or the refusal's status. A repeat that
comes while the first is still at work waits for that one's end. An id belongs to its caller, tenant
and session: nobody else's repeat is one.

An answer is kept ten minutes, or until there are more than ``ENTRIES_MAX`` of them or
``BYTES_MAX`` bytes in them: then the oldest goes of the tenant who has most, so that nobody's calls
push out another's. Altogether that is 16 MiB of answers and, at not quite 1 KiB of bookkeeping for
each, as much again. The store is lost with the daemon, as the memory is that the calls were about.

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
from dataclasses import dataclass, field
from hashlib import sha256

import grpc

from rmemd.errors import BAD_REQUEST, INTERRUPTED, REQUEST_ID_REUSED

REQUEST_ID = "rmem-request-id"
KEPT_SECONDS = 600.0
SWEEP_SECONDS = 10.0
ENTRIES_MAX = 16384
BYTES_MAX = 16 << 20

# By its name an RPC changes nothing, and needs no id. Streams are neither: they are never repeated.
READS = ("Get", "List", "Read", "Explain", "Who", "Wait", "Check")
PASSING = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE})
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def mutates(method: str) -> bool:
    """Say whether a unary RPC may change something, and so must not be done twice."""
    return not method.startswith(READS)


@dataclass(slots=True)
class Answer:
    """How a call ended: with a reply's bytes, or with a refusal's status."""

    reply: bytes = b""
    status: grpc.Status | None = None

    @property
    def nbytes(self) -> int:
        """Return how many bytes it keeps."""
        if self.status is None:
            return len(self.reply)
        return sum(len(value) for _, value in self.status.trailing_metadata or ())


class Refused(Exception):
    """The repeat of a call that was refused; ``status`` is what the first was told."""

    def __init__(self, status: grpc.Status) -> None:
        super().__init__(status.details)
        self.status = status


@dataclass(eq=False, slots=True)
class _Entry:
    """One id: what was asked, and what was answered or who waits for that."""

    digest: bytes
    ended: bool = False
    ended_at: float = 0.0
    answer: Answer | None = None
    waiting: list[threading.Event] | None = None


_Number = tuple[int, str]


@dataclass
class _Kept:
    """One tenant's entries, by session and id, oldest end first; the bytes of their answers."""

    entries: OrderedDict[_Number, _Entry] = field(default_factory=OrderedDict)
    nbytes: int = 0


class Turn:
    """The right to carry a call out, and the duty to say how it ended, once."""

    def __init__(self, replies: Replies, tenant: str, number: _Number, entry: _Entry) -> None:
        self._replies, self._tenant, self._number, self._entry = replies, tenant, number, entry

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
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        entries_max: int = ENTRIES_MAX,
        bytes_max: int = BYTES_MAX,
    ) -> None:
        self._clock = clock
        self._entries_max, self._bytes_max = entries_max, bytes_max
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._entries = 0
        self._nbytes = 0
        self._swept_at = clock()

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
            found = self._claim(tenant, number, digest)
            if isinstance(found, Turn):
                return found
            if found.answer is not None:
                return _again(found.answer)
            self._wait(found, context)

    def end(self, tenant: str, number: _Number, entry: _Entry, answer: Answer | None) -> None:
        """Have a call ended: keep its answer, or forget the call if there is none to keep."""
        with self._lock:
            if entry.ended:
                return
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

    def _claim(self, tenant: str, number: _Number, digest: bytes) -> Turn | _Entry:
        with self._lock:
            self._sweep()
            kept = self._kept.setdefault(tenant, _Kept())
            entry = kept.entries.get(number)
            if entry is not None and self._is_old(entry):
                self._forget(tenant, number)
                kept, entry = self._kept.setdefault(tenant, kept), None
            if entry is None:
                entry = kept.entries[number] = _Entry(digest)
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

    # --- the bounds, all under the lock -------------------------------------------------------
    def _is_old(self, entry: _Entry) -> bool:
        return entry.ended and entry.ended_at <= self._clock() - KEPT_SECONDS

    def _sweep(self) -> None:
        """Drop what is too old, of everybody, but not at every call."""
        now = self._clock()
        if now < self._swept_at + SWEEP_SECONDS:
            return
        self._swept_at = now
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
        self._entries -= 1
        if entry.answer is not None:
            kept.nbytes -= entry.answer.nbytes
            self._nbytes -= entry.answer.nbytes
        if not kept.entries:
            del self._kept[tenant]


def _again(answer: Answer) -> bytes:
    if answer.status is not None:
        raise Refused(answer.status)
    return answer.reply


def _digest(method: str, data: bytes) -> bytes:
    digest = sha256(method.encode() + b"\0")
    digest.update(data)
    return digest.digest()


def _request_id(context: grpc.ServicerContext) -> str | None:
    found = [value for key, value in context.invocation_metadata() or () if key == REQUEST_ID]
    if not found:
        return None
    text = str(found[0]).lower()
    if len(found) > 1 or not _UUID.fullmatch(text):
        raise BAD_REQUEST("a request id is one UUID, 8-4-4-4-12 digits", field=REQUEST_ID)
    return text
