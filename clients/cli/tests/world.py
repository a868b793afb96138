"""Canned answers of a small host with three VMs, for looking at the command line's output."""

from __future__ import annotations

from typing import Any

from google.longrunning import operations_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from rmem.v1 import (
    consumer_pb2,
    file_pb2,
    host_pb2,
    job_pb2,
    session_pb2,
    types_pb2,
    vm_pb2,
    watch_pb2,
)

OPS = [
    "invalidate_start", "invalidate_end", "prepare", "map", "pin", "unpin", "migrate_folio",
    "convert", "populate", "finalize", "enter", "leave", "guest_access", "guest_call", "error",
    "export_state", "import_state", "resume",
]  # fmt: skip

CONSUMERS = {
    "tdx-today": "no pin, no hook: as Linux is",
    "tdx-2022": "a reference while mapped",
    "tdx-relocate": "TDH.MEM.PAGE.RELOCATE",
    "snp": "PSMASH and page moves",
    "pkvm-today": "long-term GUP pins",
    "pkvm-gmem": "guest_memfd, movable",
    "gup": "ordinary guest memory",
    "null": "only the mandatory pair",
}

UNMOVABLE = types_pb2.Refusal(
    reason="FOLIO_UNMOVABLE", remedy="Choose a variant that implements migrate_folio."
)
BUSY = types_pb2.Refusal(
    reason="FOLIO_BUSY",
    remedy="Have the holders that are named let go, then try again.",
    holders=[types_pb2.Holder(name="client 7", purpose="DMA", count=1, longterm=True)],
)


def implemented(consumer: str, op: str) -> bool:
    if op.startswith("invalidate"):
        return True
    if op in ("pin", "unpin"):
        return consumer in ("tdx-2022", "pkvm-today")
    if op == "migrate_folio":
        return consumer in ("tdx-relocate", "snp", "pkvm-gmem")
    return consumer not in ("null", "gup")


def consumers() -> consumer_pb2.ListConsumersResponse:
    return consumer_pb2.ListConsumersResponse(
        revision=40,
        hooks_version=1,
        consumers=[
            consumer_pb2.Consumer(
                name=name,
                platform=name.split("-")[0],
                summary=summary,
                private_memory=name not in ("gup", "null"),
                options={"drive": "kvm"} if name.startswith("tdx") else {},
                ops=[consumer_pb2.Op(name=op, implemented=implemented(name, op)) for op in OPS],
            )
            for name, summary in CONSUMERS.items()
        ],
        plugins=[
            consumer_pb2.Plugin(name="tdx", distribution="rmemd-tdx", version="0.1.0"),
            consumer_pb2.Plugin(
                name="cca", distribution="rmemd-cca", version="0.0.1", quarantined=True,
                error="unknown hook 'migrate_foliio' [did you mean migrate_folio?]",
            ),
        ],
    )  # fmt: skip


def vms() -> list[vm_pb2.Vm]:
    slots = [
        vm_pb2.Slot(slot=0, flags=4, gpa=0, size_bytes=2 << 30, file=1, file_open=True),
        vm_pb2.Slot(
            slot=1, flags=6, gpa=1 << 32, size_bytes=1 << 20, file=2, file_offset_bytes=4096
        ),
    ]
    return [
        vm_pb2.Vm(
            vm=1, consumer="tdx-today", personality=types_pb2.PERSONALITY_ATTRIBUTES, name="web",
            state="finalized", measurement=bytes(range(48)), slots=slots, vcpus=2,
            mapped_private_pages=499, mapped_shared_pages=512, locked_pages=0,
        ),
        vm_pb2.Vm(
            vm=3, consumer="pkvm-gmem", personality=types_pb2.PERSONALITY_IN_PLACE,
            state="building", vcpus=1,
        ),
        vm_pb2.Vm(vm=4, consumer="snp", name="db", state="dead", dead_reason="RMP fault"),
    ]  # fmt: skip


def host() -> host_pb2.GetHostResponse:
    uses = [(1, 60000), (2, 4400), (3, 1000), (4, 0), (5, 8), (7, 1)]
    return host_pb2.GetHostResponse(
        revision=41, mock=True, version="0.1.0", seed=1, nframes=65536, free_pages=60000,
        counts=[host_pb2.FrameCount(use=use, npages=n) for use, n in uses],
        nodes=[
            host_pb2.Node(
                node=node, first_pfn=node * 32768, npages=32768, free_pages=30000,
                free_blocks=[3, 1, 0, 0, 2, 0, 0, 1, 0, 17, 4], free_2m_blocks=25,
            )
            for node in (0, 1)
        ],
        vms=3, files=2, sessions=2, daemon_rss_bytes=80 << 20, daemon_fds=31,
    )  # fmt: skip


def page_map() -> host_pb2.GetPageMapResponse:
    run = host_pb2.FrameRun
    return host_pb2.GetPageMapResponse(
        revision=42,
        runs=[
            run(pfn=0, npages=2048, use=2, file=1, pgoff=0, vm=1, gfn=0, mapped=True,
                vendor_state="MAPPED"),
            run(pfn=2048, npages=512, use=2, file=1, pgoff=2048, vm=1, gfn=2048,
                vendor_state="PENDING"),
            run(pfn=2560, npages=1000, use=3, file=1, pgoff=4096, vm=1, gfn=4096, mapped=True),
            run(pfn=3560, npages=1, use=7, gfn=-1, poisoned=True),
            run(pfn=3561, npages=1840, use=2, file=2, pgoff=0, vm=3, gfn=0, mapped=True,
                vendor_state="OWNED"),
            run(pfn=5401, npages=8, use=5, gfn=-1),
            run(pfn=5409, npages=60127, use=1, gfn=-1),
        ],
    )  # fmt: skip


def move_report() -> host_pb2.MoveReport:
    run = host_pb2.MoveRun
    return host_pb2.MoveReport(
        moved=12, unmovable=3, busy=1, failed=0,
        runs=[
            run(src_pfn=0x10, dst_pfn=0x9000, npages=12, outcome=1, vm=3, gfn=0x40),
            run(src_pfn=0x1c, dst_pfn=-1, npages=3, outcome=2, vm=1, gfn=0x4c, refusal=UNMOVABLE),
            run(src_pfn=0x1f, dst_pfn=-1, npages=1, outcome=3, vm=3, gfn=0x4f, refusal=BUSY),
        ],
    )  # fmt: skip


def page() -> host_pb2.GetPageResponse:
    return host_pb2.GetPageResponse(
        revision=42, pfn=0x1f, node=0, use=2, file=1, pgoff=0x4F, vm=3, gfn=0x4F, is_private=True,
        mapped=True, vendor_state="MAPPED", content="bytes", references=3, pins=1,
        expected_references=2, movable=False, unmovable_reason="FOLIO_BUSY",
        holders=[
            types_pb2.Holder(name="page cache", purpose="file/1", count=1),
            types_pb2.Holder(name="vm/3", purpose="secure EPT", count=1),
            types_pb2.Holder(name="client 7", purpose="DMA", count=1, longterm=True),
        ],
    )  # fmt: skip


def reasons(request: Any) -> host_pb2.ExplainReasonResponse:
    known = [
        host_pb2.ReasonInfo(
            reason="FOLIO_BUSY", code="ABORTED", errno_name="EAGAIN",
            cause="Somebody holds a reference beyond the expected ones.",
            remedy="Have the holders that are named let go, then try again.",
            source="restrictedmem.md §2",
        ),
        host_pb2.ReasonInfo(
            reason="FOLIO_UNMOVABLE", code="FAILED_PRECONDITION", errno_name="EOPNOTSUPP",
            cause="The consumer's migrate_folio is NULL: the store must not move its private "
            "folios, and the consumer is not asked.",
            remedy="Choose a variant that implements migrate_folio.",
        ),
        host_pb2.ReasonInfo(
            reason="REVISION_COMPACTED", code="OUT_OF_RANGE",
            cause="The events after this revision are no longer kept.",
            remedy="List the objects again and watch from the revision of that reply.",
        ),
    ]  # fmt: skip
    wanted = [info for info in known if request.reason in ("", info.reason)]
    return host_pb2.ExplainReasonResponse(revision=42, reasons=wanted)


def account(file: int, vm: int, double: int) -> host_pb2.FileAccount:
    return host_pb2.FileAccount(
        file=file, vm=vm, size_pages=524288, private_pages=2560, shared_pages=1000,
        found_pages=24, double_pages=double, held_pages=1,
    )  # fmt: skip


def watch() -> list[watch_pb2.WatchResponse]:
    event = watch_pb2.Event(
        revision=43, kind="folio_migrated", vm=3, operation="migrate",
        fields={"src_pfn": "0x10", "dst_pfn": "0x9000", "npages": "12"},
    )  # fmt: skip
    return [
        watch_pb2.WatchResponse(progress_revision=42),
        watch_pb2.WatchResponse(event=event),
        watch_pb2.WatchResponse(lost=2),
        watch_pb2.WatchResponse(event=watch_pb2.Event(revision=50, kind="vm_died", vm=1)),
    ]


JOBS = {
    "operations/1": ("compact", "CompactResponse"),
    "operations/2": ("migrate", "MigrateResponse"),
    "operations/3": ("offline", "OfflineResponse"),
}


def job_response(kind: str) -> Message:
    """What a job of a kind did."""
    if kind == "compact":
        return host_pb2.CompactResponse(
            revision=47, report=move_report(), free_2m_before=3, free_2m_after=25, blocked_2m=1
        )
    if kind == "offline":
        return host_pb2.OfflineResponse(revision=47, report=move_report(), offline=12)
    return host_pb2.MigrateResponse(revision=47, report=move_report())


def operation(
    name: str, done: bool = True, done_pages: int = 16, cancelling: bool = False
) -> operations_pb2.Operation:
    """A job's operation: as it runs, done, or cancelled."""
    kind = JOBS[name][0]
    made = operations_pb2.Operation(name=name, done=done)
    made.metadata.Pack(
        job_pb2.JobProgress(
            kind=kind, done_pages=done_pages, total_pages=16, moved=done_pages * 3 // 4,
            refused=done_pages // 4, cancelling=cancelling, tenant="uid:1000",
        )
    )  # fmt: skip
    if done and cancelling:
        made.error.CopyFrom(cancelled(kind))
    elif done:
        made.response.Pack(job_response(kind))
    return made


def cancelled(kind: str) -> status_pb2.Status:
    """The status of a job that was cancelled, with what it did before."""
    status = status_pb2.Status(code=code_pb2.CANCELLED, message="JOB_CANCELLED: was cancelled")
    info = error_details_pb2.ErrorInfo(reason="JOB_CANCELLED", domain="rmemd")
    for detail in (info, types_pb2.Refusal(reason="JOB_CANCELLED"), job_response(kind)):
        status.details.add().Pack(detail)
    return status


def wait_graph() -> host_pb2.GetWaitGraphResponse:
    edge = host_pb2.WaitEdge
    return host_pb2.GetWaitGraphResponse(
        revision=42, deadlock=["vm/1 vcpu 0", "session 9"],
        edges=[
            edge(waiter="call 17 migrate", holder="session 7 pin 4", why="pins", pages="pfn 0x42",
                 revision=30),
            edge(waiter="vm/1 vcpu 0", holder="session 9", why="page fault handler",
                 pages="file/1 pgoff 0x10+0x4", waiting=True, revision=41),
            edge(waiter="session 9", holder="vm/1 vcpu 0", why="range in progress",
                 pages="vm/1 gfn 0x10+0x4", waiting=True, revision=42),
        ],
    )  # fmt: skip


def sessions() -> list[session_pb2.Session]:
    return [
        session_pb2.Session(
            session=7, tenant="uid:1000", role=session_pb2.ROLE_HOST, door="socket", pid=4711,
            held_pages=512, vms=2,
        ),
        session_pb2.Session(
            session=9, tenant="spiffe://lab/vmm", role=session_pb2.ROLE_DEVICE, door="lease",
            parent=7, vm=1, lease_seconds=30,
            grants=[session_pb2.Grant(file=1, offset_bytes=4096, length_bytes=1 << 20,
                                      read_only=True)],
        ),
    ]  # fmt: skip


CHECKED = [
    host_pb2.Invariant(
        invariant="I1", status=1, meaning="a frame names its page, and the page the frame"
    ),
    host_pb2.Invariant(invariant="I3", status=1, meaning="a free frame is nobody's"),
    host_pb2.Invariant(invariant="I8", status=4, meaning="each start has its end"),
    host_pb2.Invariant(invariant="I24", status=3, meaning="private bytes are told to nobody"),
]


def answers() -> dict[str, Any]:
    known = {vm.vm: vm for vm in vms()}
    point = host_pb2.FaultPoint
    files = [
        file_pb2.File(
            file=1, vm=1, size_bytes=2 << 30, flags=3, blksize_bytes=4096, private_pages=2560,
            shared_pages=1000,
            bindings=[file_pb2.Binding(pgoff=0, npages=524288, vm=1, slot=0, gfn=0)],
        ),
        file_pb2.File(file=2, vm=3, size_bytes=1 << 20, private_pages=0),
    ]  # fmt: skip
    attributes = [
        vm_pb2.AttributeRange(gpa=0, size_bytes=2 << 20, attributes=8),
        vm_pb2.AttributeRange(gpa=2 << 20, size_bytes=4096),
    ]
    return {
        "ListConsumers": consumers(),
        "GetOps": consumer_pb2.GetOpsResponse(
            revision=40, consumer="tdx-today", ops=consumers().consumers[0].ops
        ),
        "ListVms": vm_pb2.ListVmsResponse(revision=42, vms=vms()),
        "GetVm": lambda request: vm_pb2.GetVmResponse(revision=42, vm=known[request.vm]),
        "CreateVm": vm_pb2.CreateVmResponse(revision=43, vm=5),
        "GetMemoryAttributes": vm_pb2.GetMemoryAttributesResponse(revision=42, runs=attributes),
        "Populate": lambda request: vm_pb2.PopulateResponse(
            revision=44, done_pages=len(request.source) // 4096
        ),
        "Finalize": vm_pb2.FinalizeResponse(revision=45, measurement=bytes(range(48))),
        "PreFault": vm_pb2.PreFaultResponse(
            revision=46, done_pages=2, retries=1,
            steps=[
                vm_pb2.FaultStep(step="lookup", references=2),
                vm_pb2.FaultStep(step="installed", references=1),
            ],
        ),
        "ListFiles": file_pb2.ListFilesResponse(revision=42, files=files),
        "GetFile": file_pb2.GetFileResponse(revision=42, file=files[0]),
        "CreateFile": file_pb2.CreateFileResponse(revision=43, file=6),
        "CloseFile": file_pb2.CloseFileResponse(revision=44, freed_pages=1),
        "Fallocate": file_pb2.FallocateResponse(revision=43, pages=16),
        "ConvertFile": file_pb2.ConvertFileResponse(
            revision=43, changed_pages=16, content="zero"
        ),
        "ReadShared": lambda request: file_pb2.ReadSharedResponse(
            revision=42, data=b"hello, guest".ljust(request.length_bytes, b"\0")
        ),
        "PinPages": file_pb2.PinPagesResponse(revision=43, pin=9),
        "GetHost": host(),
        "GetPageMap": page_map(),
        "GetPage": page(),
        "GetAccounting": host_pb2.GetAccountingResponse(
            revision=42, files=[account(1, 1, 512), account(2, 3, 0)], leaked_pages=8
        ),
        "StartCompact": operation("operations/1", done=False, done_pages=0),
        "StartMigrate": operation("operations/2", done=False, done_pages=0),
        "StartOffline": operation("operations/3", done=False, done_pages=0),
        "GetOperation": lambda request: operation(request.name, done=False, done_pages=8),
        "WaitOperation": lambda request: operation(request.name),
        "ListOperations": operations_pb2.ListOperationsResponse(
            operations=[
                operation("operations/1"),
                operation("operations/2", done_pages=4, cancelling=True),
                operation("operations/3", done=False, done_pages=8),
            ]
        ),
        "GetWaitGraph": wait_graph(),
        "ListPins": file_pb2.ListPinsResponse(
            revision=42,
            pins=[
                file_pb2.PagePin(
                    pin=4, file=1, offset_bytes=4096, length_bytes=8192, purpose="DMA",
                    holder="session 7", tenant="uid:1000", session=7,
                ),
                file_pb2.PagePin(
                    pin=7, file=2, length_bytes=4096, purpose="RDMA", holder="client 7",
                ),
            ],
        ),
        "ListSessions": session_pb2.ListSessionsResponse(revision=42, sessions=sessions()),
        "WhoAmI": session_pb2.WhoAmIResponse(
            revision=42, tenant="uid:1000", role=session_pb2.ROLE_ADMIN,
            limits=[
                session_pb2.Limit(what="frames", limit=65536, used=4400),
                session_pb2.Limit(what="watches", limit=-1, used=1),
            ],
        ),
        "Online": host_pb2.OnlineResponse(revision=48, online=12),
        "Poison": host_pb2.PoisonResponse(
            revision=49, pfn=0x1F, vm=3, vm_lost=True, text="machine check in the guest's page"
        ),
        "AddFaultRule": host_pb2.AddFaultRuleResponse(revision=43, rule=2),
        "ListFaultRules": host_pb2.ListFaultRulesResponse(
            revision=43,
            rules=[
                host_pb2.FaultRule(
                    rule=1, point="map", error="TDX_OPERAND_BUSY", nth=3, times=2, probability=0.25,
                    passages=7, hits=1,
                ),
                host_pb2.FaultRule(
                    rule=2, point="step/guest", vm=3, nth=1, times=1, probability=1, delay_ms=250
                ),
            ],
        ),
        "ListFaultPoints": host_pb2.ListFaultPointsResponse(
            revision=43,
            points=[
                point(point="map", kind=1, meaning="Install private pages.", passages=7),
                point(point="lost_race", kind=2, meaning="an invalidation comes between"),
                point(point="step/guest", kind=3, meaning="between two steps", passages=12),
                point(point="TDH_MEM_TRACK", kind=4, plugin="tdx"),
            ],
        ),
        "CheckHost": host_pb2.CheckHostResponse(
            revision=43, held_seconds=0.0042, checked=CHECKED, watched_transactions=7,
        ),
        "ExplainReason": reasons,
        "Watch": watch(),
    }  # fmt: skip
