"""From bytes on the wire to a service's method and back.

Owns parsing, the size of messages, the deadline, the log line and the last resort. Requests are
parsed here and not by grpc, so that malformed bytes are INVALID_ARGUMENT; whatever a method raises
leaves as a typed status, and an exception without a name leaves as a correlation id only.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from rmemd.engine.engine import Engine
from rmemd.errors import BAD_REQUEST, INTERNAL, MESSAGE_TOO_BIG, SYSTEM_MEMORY, TOO_MANY, RmemError
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


class Call:
    """One call, as a service's method sees it."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context

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


def add_service(
    server: grpc.Server, engine: Engine, descriptor: ServiceDescriptor, service: object
) -> None:
    """Serve a service's methods: ``service`` has one per RPC, of the same name."""
    handlers = {
        method.name: _handler(engine, descriptor, method, getattr(service, method.name))
        for method in descriptor.methods
        if hasattr(service, method.name)
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(descriptor.full_name, handlers),)
    )


def _handler(
    engine: Engine,
    service: ServiceDescriptor,
    method: MethodDescriptor,
    function: Callable[[Any, Call], Any],
) -> grpc.RpcMethodHandler[Any, Any]:
    request_class = GetMessageClass(method.input_type)
    name = f"{service.name}/{method.name}"
    limit = BULK_BYTES if method.name in BULK_METHODS else SMALL_BYTES

    def unary(data: bytes, context: grpc.ServicerContext) -> Message:
        with _Answering(engine, name, context) as answering, answering.named_in_logs():
            reply: Message = function(_parse(request_class, data, limit), Call(context))
            return reply
        raise AssertionError("unreachable: aborting raises")

    def stream(data: bytes, context: grpc.ServicerContext) -> Iterator[Message]:
        with _Answering(engine, name, context), _streams:
            yield from function(_parse(request_class, data, limit), Call(context))

    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, None, _serialize)
    return grpc.unary_unary_rpc_method_handler(unary, None, _serialize)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


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
        self._open = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._open >= STREAMS_MAX:
                raise TOO_MANY(f"{STREAMS_MAX} watches are open")
            self._open += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open -= 1


_streams = _Streams()


class _Answering:
    """Turn what a method raises into a status, and log the call once."""

    def __init__(self, engine: Engine, name: str, context: grpc.ServicerContext) -> None:
        self._engine, self._name, self._context = engine, name, context

    def __enter__(self) -> _Answering:
        self._begun = time.perf_counter()
        self._correlation = f"{os.getpid():x}-{next(_numbers):x}"
        return self

    def named_in_logs(self) -> AbstractContextManager[None]:
        """Have what this thread logs meanwhile (a hook's traceback) carry the call's id."""
        return structlog.contextvars.bound_contextvars(correlation=self._correlation)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        took = round((time.perf_counter() - self._begun) * 1e3, 3)
        if error is None or isinstance(error, GeneratorExit):
            log.debug("call", method=self._name, ms=took)
            return
        correlation = self._correlation
        refusal = self._name_it(error)
        log.info(
            "refused", method=self._name, ms=took, reason=refusal.reason.name,
            message=shorten(refusal.message), correlation=correlation,
        )  # fmt: skip
        self._context.abort_with_status(to_status(refusal, self._engine.revision, correlation))

    def _name_it(self, error: BaseException) -> RmemError:
        correlation = self._correlation
        if isinstance(error, RmemError):
            return error
        if isinstance(error, (OSError, MemoryError)):
            log.error("system", correlation=correlation, exc_info=error)
            return SYSTEM_MEMORY("the system refused memory")
        log.error("unexpected", correlation=correlation, exc_info=error)
        return INTERNAL(f"unexpected; see the daemon's log under {correlation}")
