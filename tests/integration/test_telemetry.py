"""Spans of a real daemon at a real collector, which this test is."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemons import PATIENCE_SECONDS, Daemon
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
EX_CONFIG = 78


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent."""

    def __init__(self) -> None:
        self.spans: queue.Queue[Any] = queue.Queue()
        self.services: set[str] = set()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        for resource in request.resource_spans:
            self.services |= {
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            }
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put(span)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    made = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made, f"http://127.0.0.1:{port}"
    server.stop(0).wait()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_each_call_is_a_span(
    daemons: Callable[..., Daemon], collector: tuple[Collector, str]
) -> None:
    kept, endpoint = collector
    daemon = daemons("--set", f"telemetry.otlp_endpoint={endpoint}")
    rpc = daemon.rpc()
    traced = [("traceparent", f"00-{TRACE}-{PARENT}-01")]
    assert rpc.call("GetHost", metadata=traced).ok
    refused = rpc.call("GetVm", metadata=traced)
    assert rpc.call("ListVms").ok
    # the end sends what is left
    daemon.stop()
    spans = {}
    for _ in range(3):
        span = kept.spans.get(timeout=PATIENCE_SECONDS)
        spans[span.name] = span
    assert spans.keys() == {"HostService/GetHost", "VmService/GetVm", "VmService/ListVms"}
    assert kept.spans.empty()
    assert kept.services == {"rmemd"}
    for name in ("HostService/GetHost", "VmService/GetVm"):
        assert spans[name].trace_id.hex() == TRACE
        assert spans[name].parent_span_id.hex() == PARENT
    assert spans["VmService/ListVms"].parent_span_id == b""
    told = attributes(spans["VmService/GetVm"])
    assert told["rpc.grpc.status_code"] == refused.code.value[0]
    assert told["rmemd.reason"] == refused.reason
    assert refused.info is not None
    assert told["rmemd.correlation_id"] == refused.info.metadata["correlation_id"]


def test_a_collector_that_is_away_costs_spans_only(daemons: Callable[..., Daemon]) -> None:
    daemon = daemons("--set", "telemetry.otlp_endpoint=http://127.0.0.1:1")
    rpc = daemon.rpc()
    for _ in range(20):
        assert rpc.call("GetHost").ok
    # within the patience of stop, and with exit code 0
    daemon.stop()
    (draining, stopped) = (
        datetime.fromisoformat(line["timestamp"])
        for line in daemon.log_lines
        if line["event"] in ("draining", "stopped")
    )
    assert (stopped - draining).total_seconds() < 10
    assert {"opentelemetry"} <= {line["event"] for line in daemon.log_lines}


def test_without_the_extra_it_does_not_start_and_says_why(tmp_path: Path) -> None:
    hidden = tmp_path / "path" / "opentelemetry"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden', name='opentelemetry')\n")
    daemon = Daemon(
        tmp_path / "daemon", "--host-memory", "64M", "--set",
        "telemetry.otlp_endpoint=http://127.0.0.1:1", env={"PYTHONPATH": str(hidden.parent)},
    )  # fmt: skip
    os.close(daemon.spawn())
    assert daemon.wait() == EX_CONFIG
    assert "pip install 'rmemd[otel]'" in daemon.log
    assert "Traceback" not in daemon.log
