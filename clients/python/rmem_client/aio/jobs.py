"""Long jobs that move pages, on the daemon's own threads (``client.jobs``).

Each starts what the call of the same name in ``client.host`` does, and returns at once::

    job = await client.jobs.compact()
    job = await client.jobs.wait(job.name)
    print(job.result().free_2m_after)
"""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterable
from typing import Any

from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration

from rmem.v1 import host_pb2, job_pb2_grpc, types_pb2

from ..operation import Job, job_of
from .connection import Connection

# one call waits so long; a longer wait is several
WAIT_S = 60.0
# what a call may take beyond the wait that it asks for
MARGIN_S = 10.0


class Jobs:
    """The job service and the standard google.longrunning.Operations."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._starts = job_pb2_grpc.JobServiceStub(connection.channel)
        # its published code has no types
        self._stub: Any = operations_pb2_grpc.OperationsStub(connection.channel)  # type: ignore[no-untyped-call]

    async def migrate(
        self,
        *,
        pfns: Iterable[tuple[int, int]] = (),
        vm: int = 0,
        gfns: Iterable[tuple[int, int]] = (),
        node: int | None = None,
    ) -> Job:
        """Start moving pages; the arguments are those of ``client.host.migrate``."""
        request = host_pb2.MigrateRequest(
            pfns=[types_pb2.PageRange(start=start, npages=n) for start, n in pfns],
            vm=vm,
            gfns=[types_pb2.PageRange(start=start, npages=n) for start, n in gfns],
            node=node,
        )
        return job_of(await self._connection.call(self._starts.StartMigrate, request))

    async def compact(self, node: int = 0) -> Job:
        """Start compacting a node."""
        request = host_pb2.CompactRequest(node=node)
        return job_of(await self._connection.call(self._starts.StartCompact, request))

    async def offline(self, pfn: int, npages: int = 1) -> Job:
        """Start emptying frames and taking them out of use."""
        request = host_pb2.OfflineRequest(pfns=types_pb2.PageRange(start=pfn, npages=npages))
        return job_of(await self._connection.call(self._starts.StartOffline, request))

    async def get(self, name: str) -> Job:
        """Return a job as it is now."""
        request = operations_pb2.GetOperationRequest(name=name)
        return job_of(await self._connection.call(self._stub.GetOperation, request))

    async def list(self, done: bool | None = None) -> builtins.list[Job]:
        """List the jobs that are known, oldest first.

        Args:
            done: only those that are over, or only those that are not; ``None``: all.
        """
        wanted = "" if done is None else f"done={str(done).lower()}"
        found: builtins.list[Job] = []
        token = ""
        while True:
            request = operations_pb2.ListOperationsRequest(
                name="operations", filter=wanted, page_token=token
            )
            reply = await self._connection.call(self._stub.ListOperations, request)
            found += map(job_of, reply.operations)
            token = reply.next_page_token
            if not token:
                return found

    async def wait(self, name: str, timeout_s: float | None = None) -> Job:
        """Wait until a job is over, and return it; the daemon tells, nobody asks again and again.

        Args:
            name: its operation.
            timeout_s: return what it has come to after so many seconds; ``None``: wait on.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = WAIT_S if end is None else max(0.0, min(WAIT_S, end - time.monotonic()))
            timeout = Duration()
            timeout.FromNanoseconds(round(left * 1e9))
            request = operations_pb2.WaitOperationRequest(name=name, timeout=timeout)
            job = job_of(
                await self._connection.call(self._stub.WaitOperation, request, left + MARGIN_S)
            )
            if job.done or (end is not None and time.monotonic() >= end):
                return job

    async def cancel(self, name: str) -> None:
        """Ask a job to stop between two steps; what it has done stays."""
        request = operations_pb2.CancelOperationRequest(name=name)
        await self._connection.call(self._stub.CancelOperation, request)

    async def delete(self, name: str) -> None:
        """Forget a job and its result; one that runs goes on."""
        request = operations_pb2.DeleteOperationRequest(name=name)
        await self._connection.call(self._stub.DeleteOperation, request)
