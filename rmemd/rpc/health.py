"""The health service, whose watchers come and go without ever stopping the server.

Owns one repair of gRPC's own. That one keeps a lock while a new watcher is sent its first answer,
which needs gRPC's serving thread; and on that very thread an ended watcher waits for the lock. The
two together end the server: connections are accepted, and no call is ever answered again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from grpc_health.v1 import health


class HealthServicer(health.HealthServicer):
    """``grpc_health``'s servicer; a watcher's end is taken note of on a thread of its own."""

    def _on_close_callback(
        self, send_response_callback: Callable[[Any], None], service: str
    ) -> Callable[[], None]:
        # its published types lack this
        forget = super()._on_close_callback(send_response_callback, service)  # type: ignore[misc]

        def ended() -> None:
            threading.Thread(target=forget, name="health", daemon=True).start()

        return ended
