"""From bytes on the wire to a service's method and back.

Owns the one place where it is asked who calls and whether they may (``access.rules``); parsing, the
size of messages, the deadline, the log line and the last resort. Requests are parsed here and not
by grpc, so that malformed bytes are INVALID_ARGUMENT; whatever a method raises leaves as a typed
status, and an exception without a name leaves as a correlation id only.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from structlog.contextvars import STRUCTLOG_KEY_PREFIX

from rmemd.access.callers import Caller
from rmemd.access.rules import admit
from rmemd.engine.cancel import Cancelled
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.quotas import UNLIMITED, Quotas, over
from rmemd.errors import (
    BAD_REQUEST,
    INTERNAL,
    MEMORY_LOST,
    MESSAGE_TOO_BIG,
    SYSTEM_MEMORY,
    TOO_MANY,
    RmemError,
)
from rmemd.rpc.doors import DAEMON, Door, Sent, sent_to_us
from rmemd.rpc.lifecycle import Lifecycle
from rmemd.rpc.observe import Called, Observer, tell
from rmemd.rpc.replies import CallKey, Refused, Replies, Turn, mutates
from rmemd.rpc.status import shorten, to_status

BULK_BYTES = (1 << 20) + (1 << 16)
SMALL_BYTES = 1 << 16
STREAMS_MAX = 16
# a call that could go on for ever ends so long before its client gives up
DEADLINE_MARGIN_SECONDS = 0.1
BULK_METHODS = frozenset(
    {"WriteShared", "WritePhysical", "Populate", "SetMemoryAttributes", "SetProgramme"}
)

log = structlog.get_logger("rmemd.rpc")
_numbers = itertools.count(1)
# what ``structlog.contextvars.bind_contextvars(correlation=...)`` sets, without its look-ups
_correlated: ContextVar[Any] = ContextVar(f"{STRUCTLOG_KEY_PREFIX}correlation", default=...)


class Front:
    """What every call of a server passes through.

    Attributes:
        life: by this a client tells this daemon from another.
        process: what the ids of this process's calls begin with.
        log: bound once, where the module's is looked up at each call.
    """

    __slots__ = (
        "answered", "door", "engine", "life", "lifecycle", "log", "observers", "process", "replies",
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        door: Door,
        observers: Sequence[Observer] = (),
        life: str = "",
        lifecycle: Lifecycle | None = None,
    ) -> None:
        self.engine = engine
        self.answered = engine.core.answered
        self.door = door
        self.observers = observers
        # memory without a name goes with us
        self.life = life or engine.core.life or uuid.uuid4().hex
        self.lifecycle = lifecycle or Lifecycle()
        self.replies = Replies(core=engine.core)
        self.process = f"{os.getpid():x}"
        self.log: Any = log.bind()

    def behind(self, door: Door) -> Front:
        """Return the same behind another door: once-only holds whichever way a client comes."""
        other = copy.copy(self)
        other.door = door
        return other


class Call:
    """One call, as a service's method sees it.

    Attributes:
        caller: who makes it.
        key: its name, which a repeat of it has too; None if it has no request id.
    """

    __slots__ = ("_context", "caller", "key")

    def __init__(
        self, context: grpc.ServicerContext, caller: Caller, key: CallKey | None = None
    ) -> None:
        self._context = context
        self.caller = caller
        self.key = key

    def is_over(self) -> bool:
        """Return whether the client went away or its deadline is about to pass."""
        if not self._context.is_active():
            return True
        # None where the client set no deadline, whatever the stubs say
        remaining: float | None = self._context.time_remaining()
        return remaining is not None and remaining < DEADLINE_MARGIN_SECONDS

    def is_active(self) -> bool:
        """Return whether the client is still there."""
        return bool(self._context.is_active())

    def remaining_seconds(self) -> float:
        """Return how long a wait may take, so that its reply is in time.

        Of a call without a deadline it is longer than any wait may be.
        """
        remaining: float | None = self._context.time_remaining()
        return math.inf if remaining is None else remaining - DEADLINE_MARGIN_SECONDS

    @property
    def cancelled(self) -> Cancelled:
        """Return what an operation that may wait is given, to learn that its caller has gone."""
        return Cancelled(self.is_over, self.when_over)

    def when_over(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called when the call is over, whoever ended it."""
        self._context.add_callback(tell)


def add_service(
    server: grpc.Server, front: Front, descriptor: ServiceDescriptor, service: object
) -> None:
    """Serve a service's methods: ``service`` has one per RPC, of the same name."""
    handlers = {
        method.name: _handler(front, descriptor, method, getattr(service, method.name))
        for method in descriptor.methods
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(descriptor.full_name, handlers),)
    )


def _handler(
    front: Front,
    service: ServiceDescriptor,
    method: MethodDescriptor,
    function: Callable[[Any, Call], Any],
) -> grpc.RpcMethodHandler[Any, Any]:
    request_class = GetMessageClass(method.input_type)
    name = f"{service.name}/{method.name}"
    limit = BULK_BYTES if method.name in BULK_METHODS else SMALL_BYTES
    core = front.engine.core

    def read(data: bytes, context: grpc.ServicerContext) -> bytes:
        with _Answering(front, name, context) as answering:
            call = answering.call()
            request = _parse(request_class, data, limit)
            admit(core, call.caller, name, request)
            reply: Message = function(request, call)
            return reply.SerializeToString()
        raise AssertionError("unreachable: aborting raises")

    def change(data: bytes, context: grpc.ServicerContext) -> bytes:
        with _Answering(front, name, context) as answering:
            call = answering.call()
            # before it is asked what the caller may: the first call may have ended its object
            turn = answering.turn(call.caller, data)
            if isinstance(turn, bytes):
                return turn
            request = _parse(request_class, data, limit)
            if turn is None:
                admit(core, call.caller, name, request)
                unnamed: Message = function(request, call)
                return unnamed.SerializeToString()
            call.key = turn.key
            with core.calls.of(turn.key):
                # what a daemon before this one has carried out, it has admitted
                if not core.calls.is_repeat():
                    admit(core, call.caller, name, request)
                reply: Message = function(request, call)
            return turn.replied(reply.SerializeToString())
        raise AssertionError("unreachable: aborting raises")

    def stream(data: bytes, context: grpc.ServicerContext) -> Iterator[Message]:
        with _Answering(front, name, context) as answering:
            call = answering.call()
            # a revision means nothing to another daemon than the one that told it
            context.send_initial_metadata(((DAEMON, front.life),))
            request = _parse(request_class, data, limit)
            admit(core, call.caller, name, request)
            with _streams.of(call.caller.tenant, core.quotas):
                yield from function(request, call)

    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(
            stream, None, GetMessageClass(method.output_type).SerializeToString
        )
    unary = change if mutates(method.name) else read
    return grpc.unary_unary_rpc_method_handler(unary, None, None)


def _parse(request_class: type[Message], data: bytes, limit: int) -> Message:
    if len(data) > limit:
        raise MESSAGE_TOO_BIG(f"{len(data)} bytes; this call takes {limit}", field="request")
    try:
        return request_class.FromString(data)
    except DecodeError as error:
        raise BAD_REQUEST("the bytes are no such message", field="request") from error


class _Streams:
    """How many streams are open: fewer than there are workers, so that calls always get one."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, tenant: str | None) -> int:
        """Return how many a tenant has open, or all (None)."""
        return self._open.total() if tenant is None else self._open[tenant]

    def counts(self) -> dict[str, int]:
        """Return how many each tenant has open."""
        with self._lock:
            return dict(self._open)

    @contextmanager
    def of(self, tenant: str, quotas: Quotas) -> Iterator[None]:
        """Have one open."""
        with self._lock:
            if self._open.total() >= STREAMS_MAX:
                raise TOO_MANY(f"{STREAMS_MAX} watches are open")
            limit = quotas.of(tenant).watches
            if limit != UNLIMITED and self._open[tenant] >= limit:
                raise over("watches", tenant, self._open[tenant], 1, limit)
            self._open[tenant] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[tenant] -= 1


_streams = _Streams()


def few_watches(core: Core) -> Iterator[str]:
    """I18: a tenant's open watches are within the highest limit it ever had."""
    for tenant, count in _streams.counts().items():
        most = core.quotas.most(tenant).watches
        if most != UNLIMITED and count > most:
            yield f"I18: {tenant} has {count} watches of {most}"


def open_streams(tenant: str | None = None) -> int:
    """Return how many streams a tenant has open, of every server in this process; None: all."""
    return _streams.count(tenant)


class _Answering:
    """Turn what a method raises into a status, and log the call once."""

    __slots__ = ("_begun", "_context", "_correlation", "_front", "_name", "_tenant", "_turn")

    def __init__(self, front: Front, name: str, context: grpc.ServicerContext) -> None:
        self._front, self._name, self._context = front, name, context
        self._tenant = ""
        self._turn: Turn | None = None
        self._begun = time.perf_counter()
        self._correlation = f"{front.process}-{next(_numbers)}"

    def __enter__(self) -> _Answering:
        self._front.answered.revision = 0
        # What is logged meanwhile (a hook's traceback) carries the call's id. It need not be taken
        # back: gRPC runs each call in a context of its own.
        _correlated.set(self._correlation)
        return self

    def call(self) -> Call:
        """Have the call begin, if it means this daemon, and ask the door who calls."""
        front, context = self._front, self._context
        sent = sent_to_us(context)
        if sent:
            self._meet(sent)
        front.lifecycle.begin(context.add_callback)
        caller = front.door.caller(context, sent)
        self._tenant = caller.tenant
        return Call(context, caller)

    def _meet(self, sent: Sent) -> None:
        """Refuse who means another daemon; tell who does not know this one yet, or asks."""
        life = self._front.life
        known = [value for key, value in sent if key == DAEMON]
        if not any(known):
            self._context.set_trailing_metadata(((DAEMON, life),))
        elif known != [life]:
            raise MEMORY_LOST(
                "this is not the daemon that the caller knew: that one has ended", field=DAEMON
            )

    def turn(self, caller: Caller, data: bytes) -> Turn | bytes | None:
        """Return the bytes that the same call was answered before, or the turn to carry it out."""
        replies, context = self._front.replies, self._context
        turn = replies.turn(caller.tenant, caller.session, self._name, data, context)
        self._turn = turn if isinstance(turn, Turn) else None
        return turn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        took = time.perf_counter() - self._begun
        if error is not None and not isinstance(error, GeneratorExit):
            self._refuse(self._front.lifecycle.seen_by_caller(error), took)
            return
        self._front.log.debug("call", method=self._name, ms=int(took * 1e6) / 1e3)
        self._tell(took, "OK" if error is None else "CANCELLED")

    def _refuse(self, error: BaseException, took: float) -> None:
        ms, correlation = round(took * 1e3, 3), self._correlation
        if isinstance(error, Refused):
            log.info("refused again", method=self._name, ms=ms, correlation=correlation)
            self._tell(took, error.status.code.name)
            self._context.abort_with_status(error.status)
        refusal = name_error(error, correlation)
        log.info(
            "refused", method=self._name, ms=ms, reason=refusal.reason.name,
            message=shorten(refusal.message), correlation=correlation, tenant=self._tenant,
            why=refusal.details.for_log,
        )  # fmt: skip
        self._tell(took, refusal.reason.kind.code, refusal.reason.name)
        status = None
        try:
            status = to_status(refusal, self._front.engine.answered, correlation)
        finally:
            if self._turn is not None:
                self._turn.refused(status)
        self._context.abort_with_status(status)

    def _tell(self, took: float, code: str, reason: str = "") -> None:
        if self._front.observers:
            metadata = self._context.invocation_metadata
            done = Called(self._name, code, reason, took, self._correlation, metadata)
            tell(self._front.observers, done)


def name_error(error: BaseException, correlation: str) -> RmemError:
    """Return the refusal that an exception is told as; the log keeps what the reply must not."""
    if isinstance(error, RmemError):
        return error
    if isinstance(error, (OSError, MemoryError)):
        log.error("system", correlation=correlation, exc_info=error)
        return SYSTEM_MEMORY("the system refused memory")
    log.error("unexpected", correlation=correlation, exc_info=error)
    return INTERNAL(f"unexpected; see the daemon's log under {correlation}")
