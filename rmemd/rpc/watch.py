"""WatchService: events by revision, resumable, with what was lost said."""

from __future__ import annotations

from collections.abc import Iterator

from rmem.v1 import watch_pb2 as pb
from rmemd.access.callers import Caller
from rmemd.engine.engine import Engine
from rmemd.engine.journal import Event
from rmemd.errors import BAD_REQUEST, HANDING_OVER, RmemError
from rmemd.model.sessions import GUEST
from rmemd.rpc.dispatch import Call
from rmemd.rpc.lifecycle import Lifecycle

# how long a watch without news waits before it looks whether its client is still there
TICK_SECONDS = 0.5


class WatchService:
    """Streams of events."""

    def __init__(self, engine: Engine, lifecycle: Lifecycle | None = None) -> None:
        self._engine = engine
        self._lifecycle = lifecycle or Lifecycle()

    def Watch(self, request: pb.WatchRequest, call: Call) -> Iterator[pb.WatchResponse]:
        core = self._engine.core
        if request.start_revision < 0:
            raise BAD_REQUEST("start_revision is negative", field="start_revision")
        if request.start_revision > self._engine.revision:
            raise BAD_REQUEST(
                f"revision {request.start_revision} is yet to come; the present one is "
                f"{self._engine.revision}", field="start_revision",
            )  # fmt: skip
        at = request.start_revision or self._engine.revision
        # the first message says that the watch is in place: what happens from here on is seen
        self._events(at)
        yield pb.WatchResponse(progress_revision=at)
        while call.is_active() and not core.draining:
            now = core.wait_for_revision(at, TICK_SECONDS)
            if now == at:
                continue
            try:
                events = self._events(at)
            except RmemError:
                oldest = core.journal.oldest_revision()
                yield pb.WatchResponse(lost=oldest - at)
                at = oldest
                continue
            yield from (
                _encode(event)
                for event in events
                if _wanted(event, request) and _may_see(event, call.caller)
            )
            at = events[-1].revision if events else now
            yield pb.WatchResponse(progress_revision=at)
        if self._lifecycle.handing_over:
            raise HANDING_OVER(f"the watch goes on at revision {at}, with the daemon's successor")

    def _events(self, after: int) -> list[Event]:
        return self._engine.read(lambda core: core.journal.events_after(after))[1]


def _may_see(event: Event, caller: Caller) -> bool:
    """Events of a tenant are that tenant's; those of nobody are the operator's."""
    if caller.role == GUEST:
        return event.vm == caller.vm
    return caller.is_admin or event.fields.get("tenant") == caller.tenant


def _wanted(event: Event, request: pb.WatchRequest) -> bool:
    of_vm = request.vm in (0, event.vm)
    return of_vm and (not request.kinds or event.kind in request.kinds)


def _encode(event: Event) -> pb.WatchResponse:
    return pb.WatchResponse(
        event=pb.Event(
            revision=event.revision, kind=event.kind, vm=event.vm, operation=event.operation,
            fields=event.fields,
        )
    )  # fmt: skip
