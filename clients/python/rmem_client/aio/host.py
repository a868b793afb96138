"""The host's memory: frames, nodes, physical access, jobs that move pages (``client.host``).

Everything counts pages of 4096 bytes here; a ``pfn`` is a host frame's number.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable

from rmem.v1 import host_pb2, host_pb2_grpc, types_pb2

from ..pages import page_address, page_range, page_ranges
from ..pauses import pauses
from ..upgraded import Upgraded
from .connection import Connection


class Host:
    """The host service."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = host_pb2_grpc.HostServiceStub(connection.channel)

    async def get(self) -> host_pb2.GetHostResponse:
        """Return totals, nodes and what the daemon is."""
        return await self._connection.call(self._stub.GetHost, host_pb2.GetHostRequest())

    async def page_map(
        self, first_pfn: int = 0, npages: int = 0, *, max_runs: int = 0
    ) -> host_pb2.GetPageMapResponse:
        """Return frames as runs of equal use; ``next_pfn`` is where to go on, 0 at the end.

        Args:
            first_pfn: first frame.
            npages: how many frames; 0: to the end.
            max_runs: at most so many runs; 0: 4096.
        """
        request = host_pb2.GetPageMapRequest(first_pfn=first_pfn, npages=npages, max_runs=max_runs)
        return await self._connection.call(self._stub.GetPageMap, request)

    async def frame_runs(
        self, first_pfn: int = 0, npages: int = 0
    ) -> AsyncIterator[host_pb2.FrameRun]:
        """Yield all runs from ``first_pfn`` on, in as many calls as that takes.

        Each call sees the state of its own revision, so a run that changes in between may be
        told in its old or its new form.
        """
        end = first_pfn + npages if npages else None
        pfn = first_pfn
        while True:
            reply = await self.page_map(pfn, 0 if end is None else end - pfn)
            for run in reply.runs:
                yield run
            pfn = reply.next_pfn
            if not pfn or (end is not None and pfn >= end):
                return

    async def page(
        self,
        *,
        pfn: int | None = None,
        vm: int | None = None,
        gfn: int | None = None,
        file: int | None = None,
        pgoff: int | None = None,
    ) -> host_pb2.GetPageResponse:
        """Tell one page's whole story; name it by pfn, by vm and gfn, or by file and pgoff."""
        address = page_address(pfn=pfn, vm=vm, gfn=gfn, file=file, pgoff=pgoff)
        return await self._connection.call(
            self._stub.GetPage, host_pb2.GetPageRequest(page=address)
        )

    async def read_physical(
        self,
        pfn: int,
        npages: int = 1,
        *,
        agent: types_pb2.Agent.ValueType = types_pb2.AGENT_HOST_KERNEL,
        level: types_pb2.AccessLevel.ValueType = types_pb2.ACCESS_LEVEL_SOFTWARE,
    ) -> bytes:
        """Read frames (at most 256) as the host would; private plaintext never comes back."""
        request = host_pb2.ReadPhysicalRequest(pfn=pfn, npages=npages, agent=agent, level=level)
        reply = await self._connection.call(self._stub.ReadPhysical, request)
        return reply.data

    async def write_physical(
        self,
        pfn: int,
        data: bytes,
        *,
        agent: types_pb2.Agent.ValueType = types_pb2.AGENT_HOST_KERNEL,
        level: types_pb2.AccessLevel.ValueType = types_pb2.ACCESS_LEVEL_SOFTWARE,
    ) -> host_pb2.WritePhysicalResponse:
        """Write whole frames (a multiple of 4096 bytes) as the host would."""
        request = host_pb2.WritePhysicalRequest(pfn=pfn, data=data, agent=agent, level=level)
        return await self._connection.call(self._stub.WritePhysical, request)

    async def copy_physical(
        self,
        src_pfn: int,
        dst_pfn: int,
        npages: int = 1,
        *,
        agent: types_pb2.Agent.ValueType = types_pb2.AGENT_HOST_KERNEL,
        level: types_pb2.AccessLevel.ValueType = types_pb2.ACCESS_LEVEL_SOFTWARE,
    ) -> host_pb2.CopyPhysicalResponse:
        """Copy raw bytes from frames to frames, which loses encrypted private data."""
        request = host_pb2.CopyPhysicalRequest(
            src_pfn=src_pfn, dst_pfn=dst_pfn, npages=npages, agent=agent, level=level
        )
        return await self._connection.call(self._stub.CopyPhysical, request)

    async def migrate(
        self,
        *,
        pfns: Iterable[tuple[int, int]] = (),
        vm: int = 0,
        gfns: Iterable[tuple[int, int]] = (),
        node: int | None = None,
    ) -> host_pb2.MigrateResponse:
        """Move pages to other frames; the report says of each page what became of it.

        Args:
            pfns: (first, npages) of the pages' present frames.
            vm: or the VM whose pages ``gfns`` names.
            gfns: (first, npages) of guest frames.
            node: node to move to; ``None``: any.
        """
        request = host_pb2.MigrateRequest(
            pfns=page_ranges(pfns), vm=vm, gfns=page_ranges(gfns), node=node
        )
        return await self._connection.call(self._stub.Migrate, request)

    async def compact(self, node: int = 0) -> host_pb2.CompactResponse:
        """Move pages of a node together, to regain free 2 MiB blocks."""
        return await self._connection.call(self._stub.Compact, host_pb2.CompactRequest(node=node))

    async def offline(self, pfn: int, npages: int = 1) -> host_pb2.OfflineResponse:
        """Empty frames and take them out of use."""
        request = host_pb2.OfflineRequest(pfns=page_range(pfn, npages))
        return await self._connection.call(self._stub.Offline, request)

    async def online(self, pfn: int, npages: int = 1) -> int:
        """Give offlined frames back to the allocator; return how many came back."""
        request = host_pb2.OnlineRequest(pfns=page_range(pfn, npages))
        reply = await self._connection.call(self._stub.Online, request)
        return reply.online

    async def poison(
        self,
        *,
        pfn: int | None = None,
        vm: int | None = None,
        gfn: int | None = None,
        file: int | None = None,
        pgoff: int | None = None,
    ) -> host_pb2.PoisonResponse:
        """Mark a frame as failed, as a machine check would; named as ``page`` names it."""
        address = page_address(pfn=pfn, vm=vm, gfn=gfn, file=file, pgoff=pgoff)
        return await self._connection.call(self._stub.Poison, host_pb2.PoisonRequest(page=address))

    async def accounting(self, vm: int = 0) -> host_pb2.GetAccountingResponse:
        """Say who uses what, in pages, double allocation included; ``vm`` 0: all files."""
        request = host_pb2.GetAccountingRequest(vm=vm)
        return await self._connection.call(self._stub.GetAccounting, request)

    async def check(self) -> host_pb2.CheckHostResponse:
        """Check the invariants over the whole state; ``violations`` is empty if all is well."""
        return await self._connection.call(self._stub.CheckHost, host_pb2.CheckHostRequest())

    async def add_fault(
        self,
        point: str,
        error: str | None = None,
        *,
        vm: int = 0,
        nth: int = 1,
        times: int = 1,
        probability: float = 1.0,
        delay_ms: int = 0,
    ) -> int:
        """Make a named point go wrong, or a step take its time; return the rule's handle.

        Args:
            point: an op ("map"), the engine's "lost_race", a vendor's leaf, or a step
                ("step/guest").
            error: what goes wrong there; a vendor's leaf takes its own error's name. By default
                "injected", and nothing where ``delay_ms`` is given.
            vm: only for this VM; 0: for any.
            nth: at which passage from now it begins, from 1.
            times: how many passages it hits.
            probability: of each passage from the nth on to be hit, above 0 and up to 1; which ones
                are depends on the daemon's seed.
            delay_ms: milliseconds that a passage takes longer; for steps only, which take no error.
        """
        if error is None:
            error = "" if delay_ms else "injected"
        rule = host_pb2.FaultRule(
            vm=vm,
            point=point,
            error=error,
            nth=nth,
            times=times,
            probability=probability,
            delay_ms=delay_ms,
        )
        request = host_pb2.AddFaultRuleRequest(rule=rule)
        reply = await self._connection.call(self._stub.AddFaultRule, request)
        return reply.rule

    async def list_faults(self) -> host_pb2.ListFaultRulesResponse:
        """List the fault rules that still wait."""
        return await self._connection.call(
            self._stub.ListFaultRules, host_pb2.ListFaultRulesRequest()
        )

    async def fault_points(self) -> host_pb2.ListFaultPointsResponse:
        """List the points at which fault rules can strike, and how often each was passed."""
        return await self._connection.call(
            self._stub.ListFaultPoints, host_pb2.ListFaultPointsRequest()
        )

    async def remove_fault(self, rule: int) -> host_pb2.RemoveFaultRuleResponse:
        """Remove a fault rule."""
        request = host_pb2.RemoveFaultRuleRequest(rule=rule)
        return await self._connection.call(self._stub.RemoveFaultRule, request)

    async def upgrade(self) -> Upgraded:
        """Have the daemon make way for a successor, new code included, and wait until that serves.

        Nothing is lost by it, and no call of this library fails: those that find nobody are sent
        again.

        Raises:
            Refused: nobody keeps the daemon's memory.
            DaemonUnreachable: there was no successor in time.
        """
        connection = self._connection
        before = await connection.call(self._stub.Upgrade, host_pb2.UpgradeRequest())
        begun = time.monotonic()
        for pause_s in pauses():
            after = await self.get()
            if after.daemon_pid != before.daemon_pid:
                return Upgraded(before, after, time.monotonic() - begun)
            # it still had time to answer that
            await connection.come_back(pause_s, begun + connection.reconnect_s)
        raise AssertionError("unreachable: there is always another pause")

    async def wait_graph(self) -> host_pb2.GetWaitGraphResponse:
        """Say who waits for whom, who was refused over whom, and who waits in a circle."""
        return await self._connection.call(self._stub.GetWaitGraph, host_pb2.GetWaitGraphRequest())

    async def explain(self, reason: str = "") -> host_pb2.ExplainReasonResponse:
        """Tell what a refusal's reason means and what to try; "" lists them all."""
        request = host_pb2.ExplainReasonRequest(reason=reason)
        return await self._connection.call(self._stub.ExplainReason, request)
