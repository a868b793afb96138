"""HostService: the host's memory and the jobs that move it. Decode, call the engine, encode."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import numpy as np

from rmem.v1 import host_pb2 as pb
from rmem.v1 import types_pb2
from rmemd.access.callers import Caller
from rmemd.engine import faultpoints, onepage, queries
from rmemd.engine.compact import frame_range
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.faultrules import Rule
from rmemd.engine.migrate import Moved, Outcome, Report
from rmemd.engine.physical import frame_of_gfn, frame_of_page
from rmemd.errors import BAD_RANGE, BAD_REQUEST, NO_SUCH_REASON, REASONS, Reason
from rmemd.hooks.types import Agent
from rmemd.model import buddy
from rmemd.model.host import NodeRange, Use
from rmemd.rpc.dispatch import Call
from rmemd.rpc.lifecycle import Lifecycle
from rmemd.rpc.status import holder_of, refusal_of
from rmemd.units import I64, MAX_GFN, PAGE_SIZE, run_breaks

MAP_RUNS_MAX = 4096
# keeps the largest report below the 4 MiB that clients receive by default
REPORT_RUNS_MAX = 1 << 15
MAP_FRAMES_MAX = 1 << 20
# some are of each VM and file, of which there may be any number
VIOLATIONS_MAX = 4096
AGENTS: dict[int, Agent] = {
    types_pb2.AGENT_HOST_USER: Agent.HOST_USER,
    types_pb2.AGENT_HOST_KERNEL: Agent.HOST_KERNEL,
    types_pb2.AGENT_DEVICE: Agent.DEVICE,
}
# by the number of a use
FRAME_USES = tuple(cast("pb.FrameUse.ValueType", int(use) + 1) for use in Use)


class HostService:
    """The host."""

    def __init__(self, engine: Engine, version: str, lifecycle: Lifecycle | None = None) -> None:
        self._engine = engine
        self._version = version
        self._lifecycle = lifecycle or Lifecycle()

    def GetHost(self, request: pb.GetHostRequest, call: Call) -> pb.GetHostResponse:
        revision, reply = self._engine.read(lambda core: _host(core, call.caller))
        reply.revision, reply.version = revision, self._version
        kept_by = self._lifecycle.kept_by()
        reply.daemon_pid, reply.kept_by, reply.keeper_pid = os.getpid(), kept_by.name, kept_by.pid
        reply.starts_in_a_row = self._lifecycle.starts_in_a_row
        return reply

    def Upgrade(self, request: pb.UpgradeRequest, call: Call) -> pb.UpgradeResponse:
        self._lifecycle.upgrade()
        return pb.UpgradeResponse(
            revision=self._engine.answered, version=self._version, daemon_pid=os.getpid()
        )

    def GetPageMap(self, request: pb.GetPageMapRequest, call: Call) -> pb.GetPageMapResponse:
        revision, reply = self._engine.read(lambda core: _page_map(core, request))
        reply.revision = revision
        return reply

    def GetPage(self, request: pb.GetPageRequest, call: Call) -> pb.GetPageResponse:
        revision, page = self._engine.read(
            lambda core: onepage.page(core, _resolve(core, request.page))
        )
        reply = pb.GetPageResponse(
            revision=revision, pfn=page.pfn, node=page.node, use=FRAME_USES[page.use],
            file=page.file, pgoff=page.pgoff, vm=page.vm, gfn=page.gfn, is_private=page.is_private,
            mapped=page.mapped, vendor_state=page.vendor_state, content=page.content,
            references=page.references, pins=page.pins, expected_references=page.expected,
            poisoned=page.poisoned, movable=page.file != 0 and not page.unmovable,
            unmovable_reason=page.unmovable,
        )  # fmt: skip
        if page.holders:
            reply.holders.extend(map(holder_of, page.holders))
        return reply

    def ReadPhysical(self, request: pb.ReadPhysicalRequest, call: Call) -> pb.ReadPhysicalResponse:
        agent, bus = _agent(request.agent, request.level)
        data = self._engine.read_physical(request.pfn, request.npages, agent, bus)
        return pb.ReadPhysicalResponse(revision=self._engine.answered, data=data)

    def WritePhysical(
        self, request: pb.WritePhysicalRequest, call: Call
    ) -> pb.WritePhysicalResponse:
        agent, bus = _agent(request.agent, request.level)
        self._engine.write_physical(request.pfn, request.data, agent, bus)
        return pb.WritePhysicalResponse(revision=self._engine.answered)

    def CopyPhysical(self, request: pb.CopyPhysicalRequest, call: Call) -> pb.CopyPhysicalResponse:
        agent, bus = _agent(request.agent, request.level)
        self._engine.copy_physical(request.src_pfn, request.dst_pfn, request.npages, agent, bus)
        return pb.CopyPhysicalResponse(revision=self._engine.answered)

    def Migrate(self, request: pb.MigrateRequest, call: Call) -> pb.MigrateResponse:
        return migrate(self._engine, request)

    def Compact(self, request: pb.CompactRequest, call: Call) -> pb.CompactResponse:
        return compact(self._engine, request)

    def Offline(self, request: pb.OfflineRequest, call: Call) -> pb.OfflineResponse:
        return offline(self._engine, request)

    def Online(self, request: pb.OnlineRequest, call: Call) -> pb.OnlineResponse:
        online = self._engine.online(request.pfns.start, request.pfns.npages)
        return pb.OnlineResponse(revision=self._engine.answered, online=online)

    def Poison(self, request: pb.PoisonRequest, call: Call) -> pb.PoisonResponse:
        done = self._engine.poison(lambda core: _resolve(core, request.page))
        return pb.PoisonResponse(
            revision=self._engine.answered, pfn=done.pfn, vm=done.vm, vm_lost=done.vm_lost,
            text=done.text,
        )  # fmt: skip

    def GetAccounting(
        self, request: pb.GetAccountingRequest, call: Call
    ) -> pb.GetAccountingResponse:
        revision, reply = self._engine.read(lambda core: _accounts(core, request.vm, call.caller))
        reply.revision = revision
        return reply

    def CheckHost(self, request: pb.CheckHostRequest, call: Call) -> pb.CheckHostResponse:
        done = self._engine.check()
        reply = pb.CheckHostResponse(
            revision=done.revision, held_seconds=done.seconds, watched_transactions=done.watched
        )
        for one in self._engine.listed(done):
            status = pb.InvariantStatus.Value(f"INVARIANT_STATUS_{one.status.name}")
            reply.checked.add(invariant=one.number, meaning=one.meaning, status=status)
        for violated in done.violated[:VIOLATIONS_MAX]:
            number, _, text = violated.partition(": ")
            reply.violations.add(invariant=number, text=text)
        return reply

    def AddFaultRule(self, request: pb.AddFaultRuleRequest, call: Call) -> pb.AddFaultRuleResponse:
        rule = request.rule
        made = self._engine.add_fault_rule(
            rule.vm, rule.point, rule.error, rule.nth or 1, rule.times or 1,
            rule.probability or 1.0, rule.delay_ms,
        )  # fmt: skip
        return pb.AddFaultRuleResponse(revision=self._engine.answered, rule=made.rule)

    def ListFaultRules(
        self, request: pb.ListFaultRulesRequest, call: Call
    ) -> pb.ListFaultRulesResponse:
        revision, rules = self._engine.read(lambda core: core.rules.all())
        return pb.ListFaultRulesResponse(revision=revision, rules=map(_rule, rules))

    def ListFaultPoints(
        self, request: pb.ListFaultPointsRequest, call: Call
    ) -> pb.ListFaultPointsResponse:
        revision, points = self._engine.read(faultpoints.every)
        return pb.ListFaultPointsResponse(revision=revision, points=map(_point, points))

    def RemoveFaultRule(
        self, request: pb.RemoveFaultRuleRequest, call: Call
    ) -> pb.RemoveFaultRuleResponse:
        self._engine.remove_fault_rule(request.rule)
        return pb.RemoveFaultRuleResponse(revision=self._engine.answered)

    def ExplainReason(
        self, request: pb.ExplainReasonRequest, call: Call
    ) -> pb.ExplainReasonResponse:
        # a plugin may come or go meanwhile, and its reasons with it
        known = dict(REASONS)
        wanted = sorted(known) if not request.reason else [request.reason.upper()]
        if wanted[0] not in known:
            raise NO_SUCH_REASON(f"no reason {request.reason!r}", field="reason")
        return pb.ExplainReasonResponse(
            revision=self._engine.answered, reasons=[_reason(known[name]) for name in wanted]
        )

    def GetWaitGraph(self, request: pb.GetWaitGraphRequest, call: Call) -> pb.GetWaitGraphResponse:
        revision, graph = self._engine.read(lambda core: core.waits.graph(core.ledger))
        reply = pb.GetWaitGraphResponse(revision=revision, deadlock=graph.deadlock)
        for edge in graph.edges:
            reply.edges.add(
                waiter=edge.waiter, holder=edge.holder, why=edge.why, pages=edge.pages,
                waiting=edge.waiting, revision=edge.revision,
            )  # fmt: skip
        return reply


# --- the jobs that move pages, of a call or of a long job -----------------------------------------
def migrate(
    engine: Engine, request: pb.MigrateRequest, report: Report | None = None, who: str = ""
) -> pb.MigrateResponse:
    """Move pages, telling ``report`` on the way; return the reply."""
    _, pfns = engine.read(lambda core: to_move(core, request))
    node = request.node if request.HasField("node") else None
    done = engine.migrate(pfns, node, report, who)
    return pb.MigrateResponse(revision=engine.answered, report=_report(done))


def compact(
    engine: Engine, request: pb.CompactRequest, report: Report | None = None, who: str = ""
) -> pb.CompactResponse:
    """Compact a node, telling ``report`` on the way; return the reply."""
    done = engine.compact(request.node, report, who)
    return pb.CompactResponse(
        revision=engine.answered, report=_report(done.report), free_2m_before=done.free_2m_before,
        free_2m_after=done.free_2m_after, blocked_2m=done.blocked_2m,
    )  # fmt: skip


def offline(
    engine: Engine, request: pb.OfflineRequest, report: Report | None = None, who: str = ""
) -> pb.OfflineResponse:
    """Empty frames, telling ``report`` on the way; return the reply."""
    done = engine.offline(request.pfns.start, request.pfns.npages, report, who)
    return pb.OfflineResponse(
        revision=engine.answered, report=_report(done.report), offline=done.offline
    )


# --- decoding --------------------------------------------------------------------------------
def _agent(agent: int, level: int) -> tuple[Agent, bool]:
    if agent not in AGENTS:
        raise BAD_REQUEST(f"no agent {agent}", field="agent")
    if level not in types_pb2.AccessLevel.values():
        raise BAD_REQUEST(f"no level {level}", field="level")
    return AGENTS[agent], level == types_pb2.ACCESS_LEVEL_BUS


def _resolve(core: Core, address: pb.PageAddress) -> int:
    match address.WhichOneof("address"):
        case "guest":
            guest = address.guest
            return frame_of_gfn(core, guest.vm, guest.gfn)
        case "file_page":
            page = address.file_page
            return frame_of_page(core, page.file, page.pgoff)
        case "pfn":
            return int(frame_range(core, address.pfn, 1, "page.pfn")[0])
    raise BAD_REQUEST("no page is named", field="page")


def to_move(core: Core, request: pb.MigrateRequest) -> I64:
    """Return the frames that a request names, int64.

    Raises:
        InvalidArgument: BAD_REQUEST, BAD_RANGE.
        NotFound: NO_SUCH_VM.
    """
    named = sum(wanted.npages for wanted in (*request.pfns, *request.gfns))
    if named > core.host.nframes:
        raise BAD_RANGE(
            f"{named} pages are named, more than the host's {core.host.nframes} frames",
            field="pfns" if request.pfns else "gfns",
        )
    found = []
    for wanted in request.pfns:
        found.append(frame_range(core, wanted.start, wanted.npages, "pfns"))
    if request.gfns:
        vm = core.vms.get(request.vm)
        for wanted in request.gfns:
            if not (0 <= wanted.start < MAX_GFN and 0 < wanted.npages <= core.host.nframes):
                raise BAD_RANGE(f"gfn {wanted.start:#x}+{wanted.npages:#x}", field="gfns")
            found.append(queries.guest_frames(core, vm, wanted.start, wanted.npages))
    if not found:
        raise BAD_REQUEST("no page is named", field="pfns")
    return np.concatenate(found)


# --- encoding --------------------------------------------------------------------------------
def _host(core: Core, caller: Caller) -> pb.GetHostResponse:
    counts = core.host.counts()
    reply = pb.GetHostResponse(
        mock=True, seed=core.options.seed, nframes=core.host.nframes,
        free_pages=sum(buddy.free_pages(core.host, node) for node in core.host.nodes),
        vms=sum(caller.sees(vm.info.owner) for vm in core.vms.all()),
        files=sum(caller.sees(file.info.owner) for file in core.files.all()),
        sessions=sum(caller.sees(info.owner) for info in core.sessions.all()),
        daemon_rss_bytes=_rss(), daemon_fds=_fds(),
        nodes=[_node(core, node) for node in core.host.nodes],
        read_only=core.read_only, life=core.life,
    )  # fmt: skip
    for use, npages in counts.items():
        reply.counts.add(use=int(use) + 1, npages=npages)
    return reply


def _fds() -> int:
    # the listing has a descriptor of its own
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


def _node(core: Core, node: NodeRange) -> pb.Node:
    return pb.Node(
        node=node.node, first_pfn=node.first, npages=node.npages,
        free_pages=buddy.free_pages(core.host, node),
        free_blocks=buddy.free_blocks(core.host, node),
        free_2m_blocks=buddy.free_2m_blocks(core.host, node),
    )  # fmt: skip


def _page_map(core: Core, request: pb.GetPageMapRequest) -> pb.GetPageMapResponse:
    nframes = core.host.nframes
    first = request.first_pfn
    npages = request.npages or nframes - first
    frame_range(core, first, max(npages, 1), "first_pfn")
    if request.max_runs < 0:
        raise BAD_REQUEST("max_runs is negative", field="max_runs")
    limit = min(request.max_runs or MAP_RUNS_MAX, MAP_RUNS_MAX)
    npages = min(npages, MAP_FRAMES_MAX)
    m = queries.frame_map(core, first, npages)
    breaks = m.breaks()
    edges = np.append(breaks, npages)[: limit + 1]
    reply = pb.GetPageMapResponse()
    starts, counts = edges[:-1], np.diff(edges)
    for at, count in zip(starts.tolist(), counts.tolist(), strict=True):
        owned = bool(m.file[at])
        reply.runs.add(
            pfn=int(m.pfns[at]), npages=count, use=int(m.use[at]) + 1, file=int(m.file[at]),
            pgoff=int(m.pgoff[at]) if owned else 0, vm=int(m.vm[at]), gfn=int(m.gfn[at]),
            mapped=bool(m.mapped[at]), vendor_state=m.state_names[int(m.state[at])],
            poisoned=bool(m.poisoned[at]),
        )  # fmt: skip
    columns = (m.pfns[starts], counts, m.use[starts] + 1, m.vm[starts], m.gfn[starts])
    reply.packed = np.stack(columns, axis=1).astype("<i8").tobytes()
    end = first + int(edges[-1])
    reply.next_pfn = (
        end if end < nframes and (request.npages == 0 or end < first + request.npages) else 0
    )
    return reply


def _report(report: Report) -> pb.MoveReport:
    reply = pb.MoveReport(
        moved=report.count(Outcome.MOVED), unmovable=report.count(Outcome.UNMOVABLE),
        busy=report.count(Outcome.BUSY), failed=report.count(Outcome.FAILED),
    )  # fmt: skip
    # first what was moved or may be later: of what cannot move, the count is what matters
    for move in sorted(report.moves, key=lambda move: move.outcome is Outcome.UNMOVABLE):
        _add_runs(reply, move)
    return reply


def _add_runs(reply: pb.MoveReport, move: Moved) -> None:
    moved = move.outcome is Outcome.MOVED
    breaks = run_breaks(move.src, move.dst) if moved else run_breaks(move.src)
    ends = np.append(breaks[1:], move.src.size)
    room = max(REPORT_RUNS_MAX - len(reply.runs), 0)
    reply.left_off_runs += max(breaks.size - room, 0)
    for at, end in zip(breaks[:room].tolist(), ends[:room].tolist(), strict=True):
        run = reply.runs.add(
            src_pfn=int(move.src[at]), dst_pfn=int(move.dst[at]), npages=end - at,
            outcome=int(move.outcome), vm=move.vm, gfn=int(move.gfns[at]),
        )  # fmt: skip
        if move.refusal is not None and at == 0:
            run.refusal.CopyFrom(refusal_of(move.refusal))
        elif move.refusal is not None:
            # the whole story once; its neighbours name the reason and the holders
            run.refusal.reason = move.refusal.reason.name
            run.refusal.holders.extend(map(holder_of, move.refusal.details.holders))


def _accounts(core: Core, vm: int, caller: Caller) -> pb.GetAccountingResponse:
    if vm:
        core.vms.get(vm)
    reply = pb.GetAccountingResponse()
    for file in core.files.all():
        if vm in (0, file.info.vm) and caller.sees(file.info.owner):
            a = queries.account(core, file)
            reply.files.add(
                file=a.file, vm=a.vm, size_pages=a.size, private_pages=a.private,
                shared_pages=a.shared, found_pages=a.found, double_pages=a.double,
                held_pages=a.held,
            )  # fmt: skip
    counts = core.host.counts()
    reply.leaked_pages = next(n for use, n in counts.items() if use.name == "LEAKED")
    return reply


def _rule(rule: Rule) -> pb.FaultRule:
    return pb.FaultRule(
        rule=rule.rule, vm=rule.vm, point=rule.point, error=rule.error, nth=rule.nth,
        times=rule.times, probability=rule.probability, delay_ms=rule.delay_ms,
        passages=rule.passages, hits=rule.hits,
    )  # fmt: skip


def _point(point: faultpoints.Point) -> pb.FaultPoint:
    return pb.FaultPoint(
        point=point.name, kind=cast("pb.FaultPointKind.ValueType", point.sort.value),
        plugin=point.plugin, meaning=point.means, passages=point.passages,
    )  # fmt: skip


def _reason(reason: Reason) -> pb.ReasonInfo:
    return pb.ReasonInfo(
        reason=reason.name, code=reason.kind.code, errno_name=reason.errno_name,
        cause=reason.cause, remedy=reason.remedy, source=reason.source,
    )  # fmt: skip
