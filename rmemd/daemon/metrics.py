"""Prometheus metrics: what is counted, and the page they are read from.

Owns names, labels and the HTTP listener; docs/metrics.md lists them and a test compares. Calls are
counted as they end; all else is asked of the engine when somebody reads, in one look under its
lock, so that the figures of a page agree. No label names a VM, a page or a tenant: their number has
no bound. Imported only where metrics are on.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Info, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
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
        calls = Calls()
        self.registry.register(calls)
        #: count a call
        self.call = calls.count
        info = Info("rmemd", "The daemon.", registry=self.registry)
        info.info({"version": version("rmemd")})
        self.registry.register(_State(engine))
        ProcessCollector(registry=self.registry)
        self._server: Any = None

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


class _Took:
    """How long the calls of one method took: how many within each bucket and above, and the sum."""

    __slots__ = ("counts", "created", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_SECONDS) + 1)
        self.total = 0.0
        self.created = time.time()


class _Counted:
    """How often something happened, and since when it is counted."""

    __slots__ = ("created", "times")

    def __init__(self) -> None:
        self.times = 0
        self.created = time.time()


class Calls(Collector):
    """Calls that ended: by status, by duration, by reason.

    ``prometheus_client``'s own counters take a lock and look a child up for each label and each
    bucket, which is a tenth of a small call; here it is one lock for all that a call counts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended: dict[tuple[str, str], _Counted] = {}
        self._took: dict[str, _Took] = {}
        self._refused: dict[tuple[str], _Counted] = {}

    def count(self, done: Called) -> None:
        """Count a call."""
        method, code, reason, seconds = done[:4]
        with self._lock:
            try:
                self._ended[method, code].times += 1
                took = self._took[method]
            except KeyError:
                self._ended.setdefault((method, code), _Counted()).times += 1
                took = self._took.setdefault(method, _Took())
            # a bucket has what is equal to its bound
            took.counts[bisect_left(BUCKETS_SECONDS, seconds)] += 1
            took.total += seconds
            if reason:
                self._refused.setdefault((reason,), _Counted()).times += 1

    def describe(self) -> list[Metric]:
        """Return names without samples, for the registry."""
        return list(Calls().collect())

    def collect(self) -> Iterator[Metric]:
        """Yield what was counted until now."""
        with self._lock:
            ended = _counter(
                "rmemd_calls", "Calls that ended, by gRPC status.", ["method", "code"],
                self._ended.items(),
            )  # fmt: skip
            took = _histogram(self._took)
            refused = _counter(
                "rmemd_refusals", "Calls that were refused, by reason.", ["reason"],
                self._refused.items(),
            )  # fmt: skip
        yield from (ended, took, refused)


def _counter(
    name: str, says: str, labels: list[str], counted: Iterable[tuple[tuple[str, ...], _Counted]]
) -> Metric:
    family = CounterMetricFamily(name, says, labels=labels)
    for values, one in counted:
        family.add_metric(values, one.times, one.created)
    return family


def _histogram(methods: dict[str, _Took]) -> Metric:
    name = "rmemd_call_seconds"
    family = HistogramMetricFamily(
        name, "How long calls took; of a stream, how long it was open.", labels=["method"]
    )
    bounds = [*map(str, BUCKETS_SECONDS), "+Inf"]
    for method, took in methods.items():
        buckets = zip(bounds, accumulate(map(float, took.counts)), strict=True)
        family.add_metric([method], list(buckets), took.total)
        family.add_sample(f"{name}_created", {"method": method}, took.created)
    return family


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
