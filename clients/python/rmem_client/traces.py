# Generated from aio/traces.py by ../unasync.py: edit that one, then `make client`.
"""Recordings of what the daemon is asked, and what came of it (``client.traces``).

There is one at a time; the last is kept until the next begins::

    client.traces.start()
    ...
    client.traces.stop()
    for data in client.traces.export():
        file.write(data)
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from rmem.v1 import trace_pb2, trace_pb2_grpc

from .calls import identity
from .connection import Connection


class Traces:
    """The trace service; for the admin role."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = trace_pb2_grpc.TraceServiceStub(connection.channel)

    def start(self, *, limit_bytes: int = 0, state_every: int = 0) -> trace_pb2.StartTraceResponse:
        """Begin a recording, as soon as no bytes are under way.

        Args:
            limit_bytes: at what length it ends; 0: 64 MiB.
            state_every: operations between two digests of the whole state; 0: at both ends only.
        """
        request = trace_pb2.StartTraceRequest(limit_bytes=limit_bytes, state_every=state_every)
        return self._connection.call(self._stub.StartTrace, request)

    def stop(self) -> trace_pb2.Trace:
        """End the recording; one that has ended stays as it is."""
        reply = self._connection.call(self._stub.StopTrace, trace_pb2.StopTraceRequest())
        return reply.trace

    def get(self) -> trace_pb2.GetTraceResponse:
        """Return how far the recording is."""
        return self._connection.call(self._stub.GetTrace, trace_pb2.GetTraceRequest())

    def export(self, offset_bytes: int = 0) -> Iterator[bytes]:
        """Yield the file from a byte on, as far as it is recorded by now.

        A connection that is lost on the way is an error: go on from as many bytes as there came.
        """
        request = trace_pb2.ExportTraceRequest(offset_bytes=offset_bytes)
        # no deadline: it is as long as the file
        stream = self._stub.ExportTrace(request, metadata=identity(self._connection.token))
        try:
            for part in stream:
                yield part.data
        except grpc.RpcError as error:
            raise self._connection.error(error) from None
