"""TraceService: the one recording of a daemon. Decode, call the recorder, encode."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rmem.v1 import trace_pb2 as pb
from rmemd.engine.engine import Engine
from rmemd.errors import BAD_REQUEST, NO_TRACE, TRACE_RUNNING
from rmemd.rpc.dispatch import Call

if TYPE_CHECKING:
    from rmemd.trace.recorder import Recorder

LIMIT_BYTES_MAX = 1 << 30
# below what a client receives by default, with room for the message around it
CHUNK_BYTES = 1 << 20


class TraceService:
    """Recording."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._recorder: Recorder | None = None

    def StartTrace(self, request: pb.StartTraceRequest, call: Call) -> pb.StartTraceResponse:
        # most daemons record nothing
        from rmemd.trace.recorder import LIMIT_BYTES, Recorder

        for field, value, most in (
            ("limit_bytes", request.limit_bytes, LIMIT_BYTES_MAX),
            ("state_every", request.state_every, LIMIT_BYTES_MAX),
        ):
            if not 0 <= value <= most:
                raise BAD_REQUEST(f"{field} {value} is not in 0..{most}", field=field)
        limit = request.limit_bytes or LIMIT_BYTES
        with self._lock:
            before = self._recorder
            if before is not None and not before.sink.stopped:
                raise TRACE_RUNNING("a recording is going on", state="recording")
            made = Recorder(self._engine, limit, state_every=request.state_every)
            try:
                revision = made.start(call.cancelled)
            except BaseException:
                made.sink.close()
                raise
            self._recorder = made
        if before is not None:
            before.sink.close()
        return pb.StartTraceResponse(revision=revision, trace=_trace(made))

    def StopTrace(self, request: pb.StopTraceRequest, call: Call) -> pb.StopTraceResponse:
        recorder = self._recorded()
        recorder.stop()
        return pb.StopTraceResponse(revision=self._engine.answered, trace=_trace(recorder))

    def GetTrace(self, request: pb.GetTraceRequest, call: Call) -> pb.GetTraceResponse:
        return pb.GetTraceResponse(revision=self._engine.answered, trace=_trace(self._recorded()))

    def ExportTrace(
        self, request: pb.ExportTraceRequest, call: Call
    ) -> Iterator[pb.ExportTraceResponse]:
        sink = self._recorded().sink
        if request.offset_bytes < 0:
            raise BAD_REQUEST("offset_bytes is negative", field="offset_bytes")
        # as far as there is now: of one that goes on, more could always come
        at, end = request.offset_bytes, sink.size
        if at >= end:
            yield pb.ExportTraceResponse()
        while at < end and call.is_active():
            data = sink.read(at, min(CHUNK_BYTES, end - at))
            if not data:
                return
            at += len(data)
            yield pb.ExportTraceResponse(data=data)

    def _recorded(self) -> Recorder:
        recorder = self._recorder
        if recorder is None:
            raise NO_TRACE("nothing was recorded since the daemon began")
        return recorder


def _trace(recorder: Recorder) -> pb.Trace:
    sink = recorder.sink
    return pb.Trace(
        recording=not sink.stopped, stopped=sink.stopped, size_bytes=sink.size,
        limit_bytes=sink.limit_bytes, operations=recorder.operations,
    )  # fmt: skip
