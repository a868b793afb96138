"""JobService and google.longrunning.Operations: long jobs, started, waited for and cancelled.

Decode, ask ``Jobs``, encode. An operation belongs to the tenant that started it; to others it does
not exist.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from google.longrunning import operations_pb2 as lro
from google.protobuf.empty_pb2 import Empty

from rmem.v1 import host_pb2
from rmemd.engine.engine import Engine
from rmemd.errors import BAD_REQUEST
from rmemd.rpc import host
from rmemd.rpc.dispatch import Call
from rmemd.rpc.jobs import Job, Jobs

COLLECTION = "operations"
PAGE_DEFAULT, PAGE_MAX = 50, 256
# a page of results stays far below the 4 MiB that clients receive by default; one that is larger by
# itself goes alone
PAGE_BYTES_MAX = 1 << 20
FILTERS = {"": None, "done=true": True, "done=false": False}


class JobService:
    """Starts jobs; each is the call of the same name in HostService."""

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self._engine = engine
        self._jobs = jobs

    def StartMigrate(self, request: host_pb2.MigrateRequest, call: Call) -> lro.Operation:
        # what names nothing is refused now, not in the operation
        self._engine.read(lambda core: host.to_move(core, request))
        return self._jobs.start(
            "migrate", tenant_of(call),
            lambda report, who: host.migrate(self._engine, request, report, who), call.key,
        ).operation()  # fmt: skip

    def StartCompact(self, request: host_pb2.CompactRequest, call: Call) -> lro.Operation:
        return self._jobs.start(
            "compact", tenant_of(call),
            lambda report, who: host.compact(self._engine, request, report, who), call.key,
        ).operation()  # fmt: skip

    def StartOffline(self, request: host_pb2.OfflineRequest, call: Call) -> lro.Operation:
        return self._jobs.start(
            "offline", tenant_of(call),
            lambda report, who: host.offline(self._engine, request, report, who), call.key,
        ).operation()  # fmt: skip


class Operations:
    """The standard service over them."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def GetOperation(self, request: lro.GetOperationRequest, call: Call) -> lro.Operation:
        return self._find(request.name, call).operation()

    def ListOperations(
        self, request: lro.ListOperationsRequest, call: Call
    ) -> lro.ListOperationsResponse:
        wanted = _filter(request)
        after = _after(request.page_token)
        limit = min(request.page_size or PAGE_DEFAULT, PAGE_MAX)
        reply, size = lro.ListOperationsResponse(), 0
        for job in self._jobs.all(may_see(call)):
            operation = job.operation()
            if job.number <= after or wanted not in (None, operation.done):
                continue
            size += operation.ByteSize()
            if reply.operations and (len(reply.operations) == limit or size > PAGE_BYTES_MAX):
                reply.next_page_token = reply.operations[-1].name.rpartition("/")[2]
                break
            reply.operations.append(operation)
        return reply

    def CancelOperation(self, request: lro.CancelOperationRequest, call: Call) -> Empty:
        self._jobs.cancel(self._find(request.name, call))
        return Empty()

    def DeleteOperation(self, request: lro.DeleteOperationRequest, call: Call) -> Empty:
        self._jobs.delete(request.name, may_see(call))
        return Empty()

    def WaitOperation(self, request: lro.WaitOperationRequest, call: Call) -> lro.Operation:
        job = self._find(request.name, call)
        seconds = min(call.remaining_seconds(), threading.TIMEOUT_MAX)
        if request.HasField("timeout"):
            seconds = min(seconds, request.timeout.seconds + request.timeout.nanos / 1e9)
        if seconds > 0:
            call.when_over(self._jobs.look_again)
            self._jobs.wait(job, seconds, lambda: not call.is_active())
        return job.operation()

    def _find(self, name: str, call: Call) -> Job:
        return self._jobs.find(name, may_see(call))


def tenant_of(call: Call) -> str:
    """Return whose a job is that this call starts."""
    return call.caller.tenant


def may_see(call: Call) -> Callable[[str], bool]:
    """Return whether the caller sees a tenant's jobs: its own, and an admin everybody's."""
    caller = call.caller
    return lambda tenant: caller.is_admin or tenant == caller.tenant


def _filter(request: lro.ListOperationsRequest) -> bool | None:
    if request.name not in ("", COLLECTION):
        raise BAD_REQUEST(f"the collection is {COLLECTION!r}", field="name")
    if request.page_size < 0:
        raise BAD_REQUEST("page_size is negative", field="page_size")
    wanted = request.filter.replace(" ", "")
    if wanted not in FILTERS:
        raise BAD_REQUEST("a filter is done=true or done=false", field="filter")
    return FILTERS[wanted]


def _after(token: str) -> int:
    if not token:
        return 0
    if not token.isdecimal() or len(token) > 18:
        raise BAD_REQUEST("no such page token", field="page_token")
    return int(token)
