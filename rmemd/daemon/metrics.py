"""Prometheus metrics: what is counted, and the page they are read from.

Owns names, labels and the HTTP listener; docs/metrics.md lists them and a test compares. Calls are
counted as they end; all else is asked of the engine when somebody reads, in one look under its
lock, so that the figures of a page agree. No label names a VM, a page or a tenant: their number has
no bound. Imported only where metrics are on.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, Info, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from rmemd.daemon.values import split_address
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.rpc.dispatch import open_streams
from rmemd.rpc.observe import Called

VM_STATES = ("building", "finalized", "frozen", "dead")
# from a small unary call (0.5 ms) to the longest job
BUCKETS_SECONDS = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip

log = structlog.get_logger("rmemd")


class Metrics:
    """The metrics of one daemon; an ``Observer`` of its calls."""

    def __init__(self, engine: Engine) -> None:
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
        info = Info("rmemd", "The daemon.", registry=self.registry)
        info.info({"version": version("rmemd")})
        self.registry.register(_State(engine))
        ProcessCollector(registry=self.registry)
        self._server: Any = None

    def call(self, done: Called) -> None:
        """Count a call."""
        self._calls.labels(done.method, done.code).inc()
        self._seconds.labels(done.method).observe(done.seconds)
        if done.reason:
            self._refusals.labels(done.reason).inc()

    def serve(self, listen: str) -> str:
        """Listen on "host:port" and return the address in use.

        Raises:
            OSError: it cannot be listened on.
        """
        host, port = split_address(listen)
        self._server, self._thread = start_http_server(port, host, self.registry)
        shown = f"[{host}]" if ":" in host else host
        return f"{shown}:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


class _State(Collector):
    """What the engine says of itself when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Return names without asking the engine, for the registry."""
        return list(_families(_Figures()))

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of one moment."""
        revision, figures = self._engine.read(_look)
        figures.revision = revision
        figures.checks, last = self._engine.checks, self._engine.last_check
        if last is not None:
            figures.violations, figures.check_seconds = len(last.violated), last.seconds
        yield from _families(figures)


class _Figures:
    """What one look found."""

    def __init__(self) -> None:
        self.frames: dict[str, int] = {}
        self.vms: Tally[str] = Tally()
        self.revision = self.files = self.sessions = self.pins = self.pinned_pages = 0
        self.hook_calls = self.hook_overdue = self.scrubbed = 0
        self.checks = self.violations = 0
        self.check_seconds = 0.0


def _look(core: Core) -> _Figures:
    found = _Figures()
    found.frames = {use.name.lower(): npages for use, npages in core.host.counts().items()}
    found.vms = Tally(vm.info.state for vm in core.vms.all())
    found.files = len(core.files.all())
    found.sessions = len(core.sessions.all())
    pins = core.sessions.pins()
    found.pins = len(pins)
    found.pinned_pages = sum(pin.npages for pin in pins)
    found.hook_calls, found.hook_overdue = core.guard.calls, core.guard.overdue_calls
    found.scrubbed = core.scrubbed_frames
    return found


def _families(found: _Figures) -> Iterator[Metric]:
    frames = GaugeMetricFamily("rmemd_frames", "Frames of 4 KiB by use.", labels=["use"])
    for use, npages in found.frames.items():
        frames.add_metric([use], npages)
    yield frames
    vms = GaugeMetricFamily("rmemd_vms", "Virtual machines by state.", labels=["state"])
    for state in VM_STATES:
        vms.add_metric([state], found.vms[state])
    yield vms
    for name, says, value in (
        ("rmemd_files", "Restricted files.", found.files),
        ("rmemd_sessions", "Sessions that are open.", found.sessions),
        ("rmemd_pins", "Pins that clients hold.", found.pins),
        ("rmemd_pinned_pages", "Pages in those pins.", found.pinned_pages),
        ("rmemd_watches", "Watches that are open.", open_streams()),
        ("rmemd_revision", "Revision of the last committed transaction.", found.revision),
        ("rmemd_invariant_violations", "What the last check found violated.", found.violations),
        ("rmemd_check_seconds", "How long the last check held the lock.", found.check_seconds),
    ):
        yield GaugeMetricFamily(name, says, value)
    for name, says, value in (
        ("rmemd_hook_calls", "Hooks of plugins that were called.", found.hook_calls),
        ("rmemd_hook_overdue", "Hooks that took longer than the deadline.", found.hook_overdue),
        ("rmemd_scrubbed_frames", "Frames whose bytes were destroyed.", found.scrubbed),
        ("rmemd_checks", "Checks of the invariants.", found.checks),
    ):
        yield CounterMetricFamily(name, says, value)
