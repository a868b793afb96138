"""A long job, as its operation tells it (``client.jobs``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from google.longrunning import operations_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from rmem.v1 import host_pb2, job_pb2

from .errors import RmemError, decode_status

Response: TypeAlias = host_pb2.MigrateResponse | host_pb2.CompactResponse | host_pb2.OfflineResponse

_RESPONSES: tuple[type[Response], ...] = (
    host_pb2.MigrateResponse,
    host_pb2.CompactResponse,
    host_pb2.OfflineResponse,
)

_Known = TypeVar("_Known", bound=Message)


@dataclass(frozen=True)
class Job:
    """A long job's state, as it was when it was asked for.

    Attributes:
        name: its operation, "operations/3".
        progress: how far it has come: kind, pages done of those in all, moved and refused.
        done: whether it is over.
        response: what it did, once it is over; of one that was cancelled, what it did before.
        error: why it ended before its end: ``Cancelled``, or as the call of the same kind refuses.
    """

    name: str
    progress: job_pb2.JobProgress
    done: bool = False
    response: Response | None = None
    error: RmemError | None = None

    @property
    def kind(self) -> str:
        """What it does: "migrate", "compact", "offline"."""
        return self.progress.kind

    def result(self) -> Response:
        """Return what it did; raise what it ended with if that was no success.

        Raises:
            RmemError: it was refused or cancelled.
            RuntimeError: it still runs.
        """
        if self.error is not None:
            raise self.error
        if self.response is None:
            raise RuntimeError(f"{self.name} still runs; wait for it")
        return self.response


def job_of(operation: operations_pb2.Operation) -> Job:
    """Read an operation."""
    progress = job_pb2.JobProgress()
    operation.metadata.Unpack(progress)
    error, told = None, [operation.response]
    if operation.HasField("error"):
        error, told = decode_status(operation.error), list(operation.error.details)
    response = next((found for packed in told if (found := _response(packed))), None)
    return Job(operation.name, progress, operation.done, response, error)


def _response(packed: AnyMessage) -> Response | None:
    return next((message for kind in _RESPONSES if (message := _unpacked(packed, kind()))), None)


def _unpacked(packed: AnyMessage, empty: _Known) -> _Known | None:
    return empty if packed.Unpack(empty) else None
