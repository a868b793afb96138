"""Which of gRPC's own switches the daemon runs with: as measured, unless it is told.

Owns the choice (docs/performance.md has the figures). gRPC reads it from the environment when it is
first imported.
"""

from __future__ import annotations

from collections.abc import MutableMapping

VARIABLE = "GRPC_EXPERIMENTS"
# By these the thread that serves waits for the sockets itself, as gRPC did up to 1.78, instead of
# being woken by one that does. Connections that the daemon makes are left as gRPC has them.
MEASURED = "-event_engine_listener,-event_engine_for_all_other_endpoints"


def set_switches(environment: MutableMapping[str, str]) -> None:
    """Set the switches where the user has not; call it before gRPC is imported."""
    environment.setdefault(VARIABLE, MEASURED)
