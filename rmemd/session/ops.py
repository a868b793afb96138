"""What the session socket's records do: each op is one engine method, the same that gRPC calls.

Owns the way from a record to the engine and its result back: what must be zero, who may
(``access.rules``, once a record), arguments, result. Each record is an operation of its own, and
what it came to is kept until the reply is sent: when the daemon dies before that, the client sends
the datagram again, and what was carried out is answered and not done once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rmem.v1 import session_pb2
from rmemd.access.callers import Caller
from rmemd.access.rules import admit
from rmemd.engine.calls import Key
from rmemd.engine.cancel import never
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.errors import (
    BAD_REQUEST,
    HANDING_OVER,
    INTERRUPTED,
    MESSAGE_TOO_BIG,
    NO_SUCH_SESSION,
    NOT_PAGE_ALIGNED,
    UNKNOWN_FLAG,
    RmemError,
)
from rmemd.rpc.dispatch import name_error
from rmemd.rpc.observe import Called, Observer, tell
from rmemd.rpc.status import code_of, refusal_of, shorten
from rmemd.session.descriptors import Passed
from rmemd.session.wire import PASSING, RECORD, UNUSED, USES, Flag, Frame, Op, Record, Reply, Use
from rmemd.units import I64, PAGE_SHIFT, PAGE_SIZE, is_page_aligned

ECANCELED = 125
CANCELLED_CODE = 1
MESSAGE_MAX = 512
# as plain numbers, since those of enums are slow to combine
PRIVATE, READ_ONLY, KEEP = map(int, Flag)
Result = tuple[int, bytes]
NOTHING = (0, b"")
READS = frozenset({Op.READ_SHARED, Op.READ_GUEST})
# of a session: the session, its datagram's sequence, the record's place in it
SESSION = "session"


def results_of(core: Core, session: int) -> list[Key]:
    """Return the calls of a session's records that have results, oldest first."""
    return [key for key in core.calls.unanswered() if key[:2] == (SESSION, session)]


def forget_results(core: Core, session: int, but_newest: bool = False) -> None:
    """Forget what records of a session came to: nobody will send them again.

    Of a datagram before the newest one the client has the reply.
    """
    found = results_of(core, session)
    newest = found[-1][2] if found and but_newest else None
    for key in found:
        if key[2] != newest:
            core.calls.forget(key)


class Operations:
    """The ops of one session.

    Args:
        engine: whose methods they are.
        caller: who asks.
        is_over: whether the session has ended; then nothing more is carried out.
        observers: told of each record as of a call.
        passed: counts the descriptors that are passed; None: of this engine, from now on.

    Attributes:
        hands_over: whether a record was not carried out because another daemon takes over.
    """

    def __init__(
        self,
        engine: Engine,
        caller: Caller,
        is_over: Callable[[], bool] = never,
        observers: Sequence[Observer] = (),
        passed: Passed | None = None,
    ) -> None:
        self._observers = observers
        self._passed = passed or Passed(engine.core.quotas)
        self._engine = engine
        self._caller = caller
        self._is_over = is_over
        self._calls = engine.core.calls
        self._answered = engine.core.answered
        self._session = caller.session
        self._owner = caller.owner
        self._name = f"session {caller.session}"
        # of the datagram that is served: what its records are known by, should it come again
        self._keys: list[Key] = []
        self.hands_over = False

    def serve(self, frame: Frame) -> Reply:
        """Carry a request's records out, in order; the reply's descriptor is the caller's."""
        reply = Reply(frame.sequence)
        self._keys.clear()
        stopped = False
        for at, record in enumerate(map(Record._make, RECORD.iter_unpack(frame.records))):
            if stopped:
                self._cancel(reply, record)
            elif not self._carry_out(frame, at, record, reply):
                stopped = frame.stops
        return reply

    def answered(self) -> None:
        """Forget what the records came to that were served last: the client has the reply."""
        for key in self._keys:
            self._calls.forget(key)
        self._keys.clear()

    def _carry_out(self, frame: Frame, at: int, record: Record, reply: Reply) -> bool:
        """Carry one record out; return whether it was."""
        begun = time.perf_counter()
        self._answered.revision = 0
        served = _SERVED.get(record.op, _UNKNOWN)
        if served.is_kept and not frame.is_one_way:
            key = (SESSION, self._session, frame.sequence, at)
            self._keys.append(key)
            self._calls.name(key)
        try:
            data = self._check(frame, record, served)
            value, payload = served.handler(self, record, data, reply)
        except Exception as error:
            refusal = self._refuse(reply, record, error, frame.sequence)
            ends = refusal.reason is INTERRUPTED and self._engine.core.draining
            self.hands_over |= ends or refusal.reason is HANDING_OVER
            code, reason = refusal.reason.kind.code, refusal.reason.name
        else:
            reply.done(record.tag, value, self._engine.answered, payload)
            code, reason = "OK", ""
        finally:
            self._calls.name(None)
        if self._observers:
            took = time.perf_counter() - begun
            tell(self._observers, Called(served.rule, code, reason, took, self._name))
        return not reason

    def _check(self, frame: Frame, record: Record, served: _Served) -> bytes:
        """Check what all ops have in common, and whether the caller may; return the payload.

        Raises:
            InvalidArgument: BAD_REQUEST, UNKNOWN_FLAG.
            RmemError: as ``access.rules.admit`` does.
        """
        if self._is_over():
            raise NO_SUCH_SESSION("the session has ended", field="session")
        if served is _UNKNOWN:
            raise BAD_REQUEST(f"no op {record.op}", field="op")
        use = served.use
        if record.flags & ~use.flags:
            raise UNKNOWN_FLAG(
                f"flags {record.flags:#x}; this op has {use.flags:#x}", field="flags"
            )
        for at, name in served.unused:
            if record[at]:
                raise BAD_REQUEST(f"{name} is {record[at]}, and unused: 0", field=name)
        # what a daemon before this one has carried out, it has admitted
        if not self._calls.is_repeat():
            admit(self._engine.core, self._caller, served.rule, record)
        if use.payload:
            return _payload(frame, record)
        if served.is_passing and (frame.count != 1 or frame.is_one_way):
            raise BAD_REQUEST(
                f"{Op(record.op).name} is alone in its datagram, and answered", field="op"
            )
        return b""

    def _refuse(self, reply: Reply, record: Record, error: Exception, sequence: int) -> RmemError:
        """Answer a record with what was raised; return that as a refusal."""
        revision = self._engine.answered
        refusal = name_error(error, f"{self._name} datagram {sequence}")
        message = session_pb2.SessionRefusal(
            message=shorten(refusal.message, MESSAGE_MAX),
            code=code_of(refusal),
            refusal=refusal_of(refusal, revision),
        )
        reply.refused(
            record.tag, refusal.errno, message.code, revision, message.SerializeToString(),
            refusal.details.progress_pages or 0,
        )  # fmt: skip
        return refusal

    def _cancel(self, reply: Reply, record: Record) -> None:
        reply.refused(record.tag, ECANCELED, CANCELLED_CODE, self._engine.revision, b"", 0)

    # --- pages held --------------------------------------------------------------------------
    def _get(self, r: Record, data: bytes, reply: Reply) -> Result:
        _require_room(r.length // PAGE_SIZE * 8, reply.room)
        pfns = self._engine.get_pages(r.object, r.start, r.length, self._owner)
        return pfns.size, pfns.astype("<i8").tobytes()

    def _put(self, r: Record, data: bytes, reply: Reply) -> Result:
        if not data or len(data) % 8:
            raise BAD_REQUEST(f"{len(data)} bytes are no frames", field="payload_length")
        pfns: I64 = np.frombuffer(data, dtype="<i8").astype(np.int64)
        return self._engine.put_pages(pfns, self._owner), b""

    def _pin(self, r: Record, data: bytes, reply: Reply) -> Result:
        purpose = _text(data)
        pin = self._engine.pin(
            r.object, r.start, r.length, purpose, "session", self._owner, self._is_over
        )
        return pin, b""

    def _unpin(self, r: Record, data: bytes, reply: Reply) -> Result:
        self._engine.unpin(r.object)
        return NOTHING

    # --- guest memory ------------------------------------------------------------------------
    def _fault(self, r: Record, data: bytes, reply: Reply) -> Result:
        done = self._engine.pre_fault(r.object, r.start, r.length, cancelled=self._is_over)
        return done.done_pages, b""

    def _convert(self, r: Record, data: bytes, reply: Reply) -> Result:
        return self._engine.set_attributes(r.object, [(r.start, r.length, r.value)]), b""

    def _convert_file(self, r: Record, data: bytes, reply: Reply) -> Result:
        done = self._engine.convert_file(r.object, r.start, r.length, r.value)
        return done.changed_pages, done.content.encode()

    def _read_guest(self, r: Record, data: bytes, reply: Reply) -> Result:
        _require_room(r.length, reply.room)
        read = self._engine.read_guest(
            r.object, r.value, r.start, r.length, bool(r.flags & PRIVATE), self._is_over
        )
        return len(read), read

    def _write_guest(self, r: Record, data: bytes, reply: Reply) -> Result:
        self._engine.write_guest(
            r.object, r.value, r.start, data, bool(r.flags & PRIVATE), self._is_over
        )
        return len(data), b""

    # --- the shared half ---------------------------------------------------------------------
    def _read_shared(self, r: Record, data: bytes, reply: Reply) -> Result:
        _require_room(r.length, reply.room)
        read = self._engine.read_shared(r.object, r.start, r.length, self._session, self._is_over)
        return len(read), read

    def _write_shared(self, r: Record, data: bytes, reply: Reply) -> Result:
        self._engine.write_shared(r.object, r.start, data, self._session, self._is_over)
        return len(data), b""

    # --- files, and descriptors of their shared half -----------------------------------------
    def _fd(self, r: Record, data: bytes, reply: Reply) -> Result:
        reply.fd = self._descriptor(r.object, bool(r.flags & READ_ONLY))
        return NOTHING

    def _create(self, r: Record, data: bytes, reply: Reply) -> Result:
        core, session = self._engine.core, self._session
        file = self._engine.create_file(r.object, r.length, r.value, session, r.start).info.file
        made_at = core.answered.revision
        # of memory that served the session before, it has a descriptor
        if not core.shared.is_only(file, session):
            try:
                reply.fd = self._descriptor(file, read_only=False)
            except Exception:
                self._engine.close_file(file)
                raise
        core.answered.revision = made_at
        return file, b""

    def _descriptor(self, file: int, read_only: bool) -> int:
        with self._passed.one_more(self._caller.tenant, self._session):
            return self._engine.shared_descriptor(file, self._session, read_only)

    def not_sent(self, reply: Reply) -> None:
        """Know that a reply with a descriptor did not leave."""
        self._passed.one_less(self._caller.tenant, self._session)

    def _close(self, r: Record, data: bytes, reply: Reply) -> Result:
        session = self._session if r.flags & KEEP else 0
        return self._engine.close_file(r.object, session), b""

    # --- page fault handlers -----------------------------------------------------------------
    def _register(self, r: Record, data: bytes, reply: Reply) -> Result:
        pgoff, npages = _pages(r.start, r.length)
        session = self._session
        return self._engine.register_userfault(r.object, pgoff, npages, session), b""

    def _unregister(self, r: Record, data: bytes, reply: Reply) -> Result:
        self._engine.unregister_userfault(r.object, self._session)
        return NOTHING

    def _copy(self, r: Record, data: bytes, reply: Reply) -> Result:
        pgoff, _ = _pages(r.start, 0)
        session = self._session
        return self._engine.userfault_copy(r.object, pgoff, data, session), b""

    def _zero(self, r: Record, data: bytes, reply: Reply) -> Result:
        pgoff, npages = _pages(r.start, r.length)
        session = self._session
        return self._engine.userfault_zeropage(r.object, pgoff, npages, session), b""

    def _continue(self, r: Record, data: bytes, reply: Reply) -> Result:
        pgoff, npages = _pages(r.start, r.length)
        private, session = bool(r.flags & PRIVATE), self._session
        return self._engine.userfault_continue(r.object, pgoff, npages, private, session), b""

    def _wake(self, r: Record, data: bytes, reply: Reply) -> Result:
        pgoff, npages = _pages(r.start, r.length)
        self._engine.userfault_wake(r.object, pgoff, npages, self._session)
        return NOTHING


class _Served(NamedTuple):
    """How the records of one op are served.

    Attributes:
        rule: what the access rules and the metrics know it as.
        use: what of a record it reads; ``unused``: what of one must be zero, and where it lies.
        is_kept: whether what it comes to is kept until its reply is sent. Others may be done again,
            and what they return, a guest's plaintext at that, is kept nowhere.
        is_passing: whether it is alone in its datagram, for a descriptor comes with the reply.
    """

    rule: str
    use: Use
    unused: tuple[tuple[int, str], ...]
    handler: Callable[[Operations, Record, bytes, Reply], Result]
    is_kept: bool
    is_passing: bool


def _nothing(_: Operations, r: Record, data: bytes, reply: Reply) -> Result:
    return NOTHING


_UNKNOWN = _Served("Session/unknown", Use(frozenset()), (), _nothing, False, False)
_SERVED: dict[int, _Served] = {
    op: _Served(f"Session/{op.name}", USES[op], UNUSED[op], handler, op not in READS, op in PASSING)
    for op, handler in {
        Op.GET: Operations._get, Op.PUT: Operations._put,
        Op.PIN: Operations._pin, Op.UNPIN: Operations._unpin,
        Op.FAULT: Operations._fault, Op.CONVERT: Operations._convert,
        Op.CONVERT_FILE: Operations._convert_file,
        Op.READ_SHARED: Operations._read_shared, Op.WRITE_SHARED: Operations._write_shared,
        Op.READ_GUEST: Operations._read_guest, Op.WRITE_GUEST: Operations._write_guest,
        Op.FD: Operations._fd, Op.CREATE: Operations._create, Op.CLOSE: Operations._close,
        Op.USERFAULT_REGISTER: Operations._register,
        Op.USERFAULT_UNREGISTER: Operations._unregister,
        Op.USERFAULT_COPY: Operations._copy, Op.USERFAULT_ZERO: Operations._zero,
        Op.USERFAULT_CONTINUE: Operations._continue, Op.USERFAULT_WAKE: Operations._wake,
    }.items()
}  # fmt: skip


def _payload(frame: Frame, record: Record) -> bytes:
    end = record.payload_offset + record.payload_length
    if end > len(frame.payload):
        raise BAD_REQUEST(
            f"it ends at {end} of {len(frame.payload)} bytes of payload", field="payload_length"
        )
    return bytes(frame.payload[record.payload_offset : end])


def _pages(start: int, length: int) -> tuple[int, int]:
    for field, value in (("start", start), ("length", length)):
        if not is_page_aligned(value):
            raise NOT_PAGE_ALIGNED(f"{field} {value:#x}", field=field)
    return start >> PAGE_SHIFT, length >> PAGE_SHIFT


def _require_room(nbytes: int, room: int) -> None:
    if nbytes > room:
        raise MESSAGE_TOO_BIG(f"{nbytes} bytes; the reply has room for {room}", field="length")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BAD_REQUEST("the purpose is no UTF-8", field="payload_offset") from error
