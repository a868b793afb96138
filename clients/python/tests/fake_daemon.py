"""A daemon that answers what it is told to: a real gRPC server on a real Unix socket.

Every method of every service, the long jobs' included, is served from its descriptor. ``answers``
maps a method's name to a reply, a list of replies (streams), a ``Refusal`` to refuse with, or a
function of the request; ``requests`` keeps what came in, and ``metadata`` what came with it. A
method without an answer says its empty reply.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from rmem.v1 import (
    consumer_pb2,
    file_pb2,
    host_pb2,
    job_pb2,
    session_pb2,
    trace_pb2,
    types_pb2,
    vcpu_pb2,
    vm_pb2,
    watch_pb2,
)

FILES = [
    consumer_pb2, file_pb2, host_pb2, job_pb2, operations_pb2, session_pb2, trace_pb2, vcpu_pb2,
    vm_pb2, watch_pb2,
]  # fmt: skip
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Refuse:
    """A refusal as the daemon sends it: a google.rpc.Status with ErrorInfo and Refusal."""

    code: grpc.StatusCode
    message: str
    refusal: types_pb2.Refusal = field(default_factory=types_pb2.Refusal)
    correlation_id: str = ""

    def abort(self, context: grpc.ServicerContext) -> None:
        info = error_details_pb2.ErrorInfo(reason=self.refusal.reason, domain="rmemd")
        if self.correlation_id:
            info.metadata["correlation_id"] = self.correlation_id
        details = [any_pb2.Any(), any_pb2.Any()]
        details[0].Pack(info)
        details[1].Pack(self.refusal)
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=details)
        context.abort_with_status(rpc_status.to_status(status))


class FakeDaemon:
    """The server; ``start`` binds, ``stop`` ends it, and both can be done again."""

    def __init__(self, socket_dir: Path) -> None:
        self.socket_dir = socket_dir
        self.answers: dict[str, Any] = {}
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.health = health.HealthServicer()
        self._server: grpc.Server | None = None
        self._pool: ThreadPoolExecutor | None = None

    def start(self) -> None:
        self._pool = ThreadPoolExecutor(8)
        # the real one's limit for bulk calls
        self._server = grpc.server(
            self._pool, options=[("grpc.max_receive_message_length", 1 << 20)]
        )
        for module in FILES:
            for service in module.DESCRIPTOR.services_by_name.values():
                handlers = {method.name: self._handler(method) for method in service.methods}
                self._server.add_generic_rpc_handlers(
                    (grpc.method_handlers_generic_handler(service.full_name, handlers),)
                )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self._server.add_insecure_port(f"unix:{self.socket_dir}/rmemd.sock")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None and self._pool is not None:
            self._server.stop(grace=None).wait()
            self._pool.shutdown()

    def _handler(self, method: Any) -> Any:
        request_class = message_factory.GetMessageClass(method.input_type)
        reply_class = message_factory.GetMessageClass(method.output_type)

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            return self._answer(method.name, request, context, reply_class())

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield from self._answer(method.name, request, context, [])

        make = (
            grpc.unary_stream_rpc_method_handler
            if method.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(
            stream if method.server_streaming else unary,
            request_deserializer=request_class.FromString,
            response_serializer=reply_class.SerializeToString,
        )

    def _answer(self, name: str, request: Any, context: Any, default: Any) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        answer = self.answers.get(name, default)
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Refuse):
            answer.abort(context)
        return answer


BUSY = Refuse(
    grpc.StatusCode.ABORTED,
    "gfn 0x42 is referenced",
    types_pb2.Refusal(
        reason="FOLIO_BUSY",
        errno=11,
        errno_name="EAGAIN",
        field="gfns",
        page="gfn 0x42",
        state="MAPPED",
        rule="references must be the expected ones (restrictedmem.md §2)",
        holders=[
            types_pb2.Holder(name="vm/3", purpose="secure EPT", count=1),
            types_pb2.Holder(name="client 7", purpose="DMA", count=2, longterm=True),
        ],
        remedy="Have the holders that are named let go, then try again.",
        vendor_status="TDX_OPERAND_BUSY",
        vendor_value=0x8000020000000000 - (1 << 64),
        progress_pages=3,
        error_offset_bytes=0x42000,
        where="tdx(vm/3).migrate_folio",
        revision=17,
    ),
    correlation_id="c-1f2e",
)

UNMOVABLE = Refuse(
    grpc.StatusCode.FAILED_PRECONDITION,
    "vm/3 (tdx-today) cannot move private pages",
    types_pb2.Refusal(
        reason="FOLIO_UNMOVABLE",
        errno=95,
        errno_name="EOPNOTSUPP",
        page="gfn 0x42",
        rule="migrate_folio is NULL",
        remedy="Choose a variant that implements migrate_folio.",
    ),
)
