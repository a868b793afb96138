"""Spans: one a call, with what the call was, below the client's span; none to nobody."""

from __future__ import annotations

import sys
import time

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from rmemd.daemon import telemetry
from rmemd.daemon.telemetry import ExtraMissing, Telemetry
from rmemd.rpc.observe import Called

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Telemetry:
    return Telemetry(SimpleSpanProcessor(exporter), exporter, "1.2.3")


def called(code: str = "OK", reason: str = "", **metadata: str) -> Called:
    return Called("VmService/CreateVm", code, reason, 0.25, "a-1", lambda: metadata.items())


def test_a_span_says_what_the_call_was(spans: Telemetry, exporter: InMemorySpanExporter) -> None:
    before = time.time_ns()
    spans.call(called())
    (span,) = exporter.get_finished_spans()
    assert span.name == "VmService/CreateVm"
    assert span.kind is SpanKind.SERVER
    assert dict(span.attributes or {}) == {
        "rpc.system": "grpc", "rpc.service": "VmService", "rpc.method": "CreateVm",
        "rpc.grpc.status_code": 0, "rmemd.correlation_id": "a-1",
    }  # fmt: skip
    assert span.parent is None
    assert span.status.status_code is StatusCode.UNSET
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time - span.start_time == 250_000_000
    assert before <= span.end_time <= time.time_ns()
    assert span.resource.attributes["service.name"] == "rmemd"
    assert span.resource.attributes["service.version"] == "1.2.3"


@pytest.mark.parametrize(
    ("code", "number", "status"),
    [("FAILED_PRECONDITION", 9, StatusCode.UNSET), ("INTERNAL", 13, StatusCode.ERROR)],
)
def test_only_our_own_faults_are_errors(
    spans: Telemetry, exporter: InMemorySpanExporter, code: str, number: int, status: StatusCode
) -> None:
    spans.call(called(code, "SOME_REASON"))
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["rpc.grpc.status_code"] == number
    assert span.attributes["rmemd.reason"] == "SOME_REASON"
    assert span.status.status_code is status


def test_it_is_below_the_client_s_span(spans: Telemetry, exporter: InMemorySpanExporter) -> None:
    spans.call(called(traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="a=b", other="x"))
    (span,) = exporter.get_finished_spans()
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.context.trace_state.get("a") == "b"


def test_the_client_says_whether_it_is_sampled(
    spans: Telemetry, exporter: InMemorySpanExporter
) -> None:
    spans.call(called(traceparent=f"00-{TRACE}-{PARENT}-00"))
    assert not exporter.get_finished_spans()


@pytest.mark.parametrize("value", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", "00-" + "x" * 99])
def test_a_traceparent_that_is_none_begins_a_trace(
    spans: Telemetry, exporter: InMemorySpanExporter, value: str
) -> None:
    spans.call(called(traceparent=value))
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_without_the_extra_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ExtraMissing, match=r"not installed: pip install 'rmemd\[otel\]'"):
        telemetry.to_collector("http://127.0.0.1:1", "1")
