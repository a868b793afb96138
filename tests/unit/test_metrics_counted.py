"""Calls are counted as prometheus_client's own counters and histogram would count them."""

from __future__ import annotations

from threading import Thread

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric

from rmemd.daemon.metrics import BUCKETS_SECONDS, Calls, Metrics
from rmemd.engine.engine import Engine
from rmemd.rpc.observe import Called

NAMES = ("rmemd_calls", "rmemd_call_seconds", "rmemd_refusals")
CALLS = st.lists(
    st.builds(
        Called,
        method=st.sampled_from(["VmService/GetVm", "HostService/GetPage", "Session/GET"]),
        code=st.sampled_from(["OK", "NOT_FOUND", "CANCELLED"]),
        reason=st.sampled_from(["", "NO_SUCH_VM", "FOLIO_BUSY"]),
        # the buckets' own bounds, what lies between them, and beyond
        seconds=st.sampled_from(BUCKETS_SECONDS) | st.floats(0, 20),
        correlation=st.just("a-1"),
    )
)


class Plain:
    """The plain way."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "rmemd_calls", "Calls that ended, by gRPC status.", ["method", "code"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "rmemd_call_seconds", "How long calls took; of a stream, how long it was open.",
            ["method"], buckets=BUCKETS_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._refusals = Counter(
            "rmemd_refusals", "Calls that were refused, by reason.", ["reason"],
            registry=self.registry,
        )  # fmt: skip

    def call(self, done: Called) -> None:
        """Count a call."""
        self._calls.labels(done.method, done.code).inc()
        self._seconds.labels(done.method).observe(done.seconds)
        if done.reason:
            self._refusals.labels(done.reason).inc()


def of_calls(registry: CollectorRegistry) -> dict[str, Metric]:
    """Return the metrics of calls, all of them made at once."""
    found = {metric.name: metric for metric in registry.collect() if metric.name in NAMES}
    for metric in found.values():
        metric.samples = [
            sample._replace(value=0.0) if sample.name.endswith("_created") else sample
            for sample in metric.samples
        ]
        metric.samples.sort(key=lambda sample: (sorted(sample.labels.items()), sample.name))
    return found


@given(calls=CALLS)
def test_they_count_as_prometheus_does(calls: list[Called]) -> None:
    ours, plain = Calls(), Plain()
    for done in calls:
        ours.count(done)
        plain.call(done)
    registry = CollectorRegistry()
    registry.register(ours)
    assert of_calls(registry) == of_calls(plain.registry)


def test_no_call_is_lost_between_threads(engine: Engine) -> None:
    metrics = Metrics(engine)
    done = Called("VmService/GetVm", "OK", "", 0.1, "a-1")

    def count() -> None:
        for _ in range(2000):
            metrics.call(done)

    threads = [Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    page = generate_latest(metrics.registry).decode()
    assert 'rmemd_calls_total{code="OK",method="VmService/GetVm"} 16000.0' in page
    assert 'rmemd_call_seconds_count{method="VmService/GetVm"} 16000.0' in page
