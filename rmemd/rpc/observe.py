"""Who wants to know how calls went: the one seam for metrics and traces.

Owns ``Observer`` and the promise that an observer cannot harm the call it is told of. The
dispatcher tells every observer of every call once, when its answer is decided and not yet sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import structlog

log = structlog.get_logger("rmemd.rpc")


class Called(NamedTuple):
    """How one call went.

    Attributes:
        method: "VmService/CreateVm".
        code: the gRPC status as its name: "OK", "FAILED_PRECONDITION"; CANCELLED for a stream that
            its client left.
        reason: the refusal's reason, "" of a call that was not refused.
        seconds: from the parsed metadata to the answer; of a stream, to its end.
        correlation: the id that the log and the refusal name.
        metadata: gives what the client sent beside the request; asked only by who needs it.
    """

    method: str
    code: str
    reason: str
    seconds: float
    correlation: str
    metadata: Callable[[], Iterable[tuple[str, Any]]] = tuple


class Observer(Protocol):
    """Somebody who is told of every call, from many threads at once."""

    def call(self, done: Called) -> None:
        """Take note; the caller waits, so do not block."""


def tell(observers: Iterable[Observer], done: Called) -> None:
    """Tell every observer; one that raises is logged and the call goes on."""
    for observer in observers:
        try:
            observer.call(done)
        except Exception as error:
            log.error("observer_raised", observer=type(observer).__name__, exc_info=error)
