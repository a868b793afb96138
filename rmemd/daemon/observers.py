"""Who observes the calls of a daemon: metrics and telemetry, where they are on.

Owns their start and end. Either is imported only when it is asked for: together they would make up
a third of the time to readiness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from rmemd.daemon.config import Config
from rmemd.engine.engine import Engine
from rmemd.rpc.observe import Observer

if TYPE_CHECKING:
    from rmemd.daemon.metrics import Metrics
    from rmemd.daemon.telemetry import Telemetry

log = structlog.get_logger("rmemd")


class Observers:
    """The observers that a configuration asks for.

    Raises:
        ExtraMissing: telemetry is on and its packages are not installed (``telemetry``).
    """

    def __init__(self, config: Config, engine: Engine, version: str) -> None:
        self._listen = config.metrics.listen
        self._metrics: Metrics | None = None
        self._telemetry: Telemetry | None = None
        if self._listen:
            from rmemd.daemon.metrics import Metrics

            self._metrics = Metrics(engine)
        if config.telemetry.otlp_endpoint:
            from rmemd.daemon.telemetry import to_collector

            self._telemetry = to_collector(config.telemetry.otlp_endpoint, version)

    @property
    def all(self) -> tuple[Observer, ...]:
        """Return those to be told of calls."""
        return tuple(one for one in (self._metrics, self._telemetry) if one is not None)

    def start(self) -> None:
        """Serve the metrics.

        Raises:
            OSError: their address cannot be listened on.
        """
        if self._metrics is not None:
            log.info("metrics_served", address=self._metrics.serve(self._listen))

    def close(self) -> None:
        """Send the last spans and stop listening."""
        if self._telemetry is not None:
            self._telemetry.close()
        if self._metrics is not None:
            self._metrics.close()
