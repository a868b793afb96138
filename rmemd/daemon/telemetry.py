"""OpenTelemetry: one span a call, sent to a collector by OTLP over gRPC.

Owns spans and their export. An ``Observer``, not an interceptor: a span is made when its call has
ended, with the times that the call had, below the client's span if its metadata has ``traceparent``
(which also says whether it is sampled). Spans leave in batches, on a thread of the SDK's; a
collector that is away costs spans, never calls. Needs the extra ``rmemd[otel]``.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from rmemd.rpc.observe import Called

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExporter

# how long one batch may take, and how long the last spans may take at the end
EXPORT_SECONDS = 5.0
FLUSH_SECONDS = 2.0
# the statuses that are the server's fault, by the semantic conventions for gRPC servers
_FAULTS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)

log = structlog.get_logger("rmemd")


class ExtraMissing(Exception):
    """Telemetry is asked for and its packages are not installed."""


class Telemetry:
    """Spans of one daemon's calls. ``processor`` gets them; ``exporter`` is what it exports to.

    Raises:
        ExtraMissing: OpenTelemetry is not installed.
    """

    def __init__(self, processor: SpanProcessor, exporter: SpanExporter, version: str) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.trace import SpanKind, Status, StatusCode
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ExtraMissing(_missing(error)) from error
        resource = Resource.create({"service.name": "rmemd", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("rmemd.rpc", version)
        self._exporter = exporter
        self._context = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER
        self._fault = Status(StatusCode.ERROR)

    def call(self, done: Called) -> None:
        """Make the span of a call that ended just now."""
        end = time.time_ns()
        service, _, method = done.method.partition("/")
        carrier = {k: v for k, v in done.metadata() if k in ("traceparent", "tracestate")}
        attributes: dict[str, str | int] = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
            "rpc.grpc.status_code": int(grpc.StatusCode[done.code].value[0]),
            "rmemd.correlation_id": done.correlation,
        }
        if done.reason:
            attributes["rmemd.reason"] = done.reason
        span = self._tracer.start_span(
            done.method, self._context.extract(carrier), self._kind, attributes,
            start_time=end - int(done.seconds * 1e9),
        )  # fmt: skip
        if done.code in _FAULTS:
            span.set_status(self._fault)
        span.end(end)

    def close(self) -> None:
        """Send what is left, for a moment at most."""
        flush = threading.Thread(target=self._provider.force_flush, daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)
        # first, since the provider would wait half a minute for an exporter that tries again
        self._exporter.shutdown()
        self._provider.shutdown()


def to_collector(endpoint: str, version: str) -> Telemetry:
    """Send spans to "http://host:port", or with TLS to "https://host:port".

    Raises:
        ExtraMissing: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ExtraMissing(_missing(error)) from error
    _log_through_ours()
    insecure = endpoint.startswith("http://")
    exporter = OTLPSpanExporter(endpoint, insecure, timeout=EXPORT_SECONDS)
    return Telemetry(BatchSpanProcessor(exporter), exporter, version)


def _missing(error: ImportError) -> str:
    return (
        f"telemetry.otlp_endpoint is set and {error.name or 'OpenTelemetry'} is not installed: "
        "pip install 'rmemd[otel]'"
    )


class _Forward(logging.Handler):
    """Hands the SDK's messages on to our log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log one."""
        level = "error" if record.levelno >= logging.ERROR else "warning"
        getattr(log, level)("opentelemetry", text=record.getMessage())


def _log_through_ours() -> None:
    sdk: Any = logging.getLogger("opentelemetry")
    if not any(isinstance(handler, _Forward) for handler in sdk.handlers):
        sdk.addHandler(_Forward(logging.WARNING))
        sdk.propagate = False
