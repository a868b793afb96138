"""The health service's watchers do not stop the server that they watch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from grpc_health.v1 import health_pb2

from rmemd.rpc.health import HealthServicer

PATIENCE_SECONDS = 5.0


class Context:
    """A call's context, which remembers what is to be done at its end."""

    def __init__(self) -> None:
        self.ends: list[Callable[[], None]] = []

    def add_callback(self, end: Callable[[], None]) -> bool:
        self.ends.append(end)
        return True


def test_a_watcher_can_end_while_another_is_told_its_first_answer() -> None:
    """gRPC's serving thread runs the one's end, and is needed for the other's answer."""
    servicer = HealthServicer()
    request = health_pb2.HealthCheckRequest()
    forgotten = threading.Event()
    context = Context()
    servicer.Watch(request, context, lambda answer: answer is None and forgotten.set())
    (end,) = context.ends
    serving = threading.Thread(target=end)
    answers: list[Any] = []

    def send(answer: Any) -> None:
        if not answers:
            serving.start()
            serving.join(PATIENCE_SECONDS)
            assert not serving.is_alive(), "the serving thread waits for a watcher's answer"
        answers.append(answer.status)

    servicer.Watch(request, Context(), send)
    assert forgotten.wait(PATIENCE_SECONDS)
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    said = health_pb2.HealthCheckResponse
    assert answers == [said.SERVING, said.NOT_SERVING]
