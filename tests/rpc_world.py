"""A small world behind the API: one valid request per RPC, and all state that a refusal must leave.

``World`` makes guests of both personalities in a running daemon; ``valid`` has a request for every
method that the daemon would take, from which tests make bad ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from daemons import Answer, Rpc
from google.longrunning import operations_pb2
from google.protobuf.message import Message

from rmem.v1 import (
    consumer_pb2,
    file_pb2,
    host_pb2,
    session_pb2,
    trace_pb2,
    types_pb2,
    vcpu_pb2,
    vm_pb2,
    watch_pb2,
)

PAGE = 4096
PRIVATE = 8
GUEST_MEMFD = 4
# what a daemon of 64 MiB has
FRAMES = 16384


@dataclass(frozen=True)
class Guest:
    """A VM with a file of ``npages`` in slot 0 at address 0, and vCPU 0."""

    vm: int
    file: int
    npages: int


class World:
    """Guests in a daemon: ``tdx`` and ``snp`` convert by attributes, ``sw`` in place."""

    def __init__(self, rpc: Rpc) -> None:
        self.rpc = rpc
        self.build()

    def must(self, name: str, request: Message | None = None) -> Any:
        """Make a call that must succeed, and return its reply."""
        answer = self.rpc.call(name, request)
        assert answer.ok, f"{name}: {answer.code.name} {answer.message}"
        return answer.reply

    def build(self) -> None:
        """Make everything."""
        self.tdx = self.guest("tdx-relocate")
        self.sw = self.guest("sw-protected")
        self.gup = self.must("CreateVm", vm_pb2.CreateVmRequest(consumer="gup")).vm
        region = vm_pb2.SetMemoryRegionRequest(vm=self.gup, gpa=0, size_bytes=8 * PAGE)
        self.must("SetMemoryRegion", region)
        self.must("CreateVcpu", vcpu_pb2.CreateVcpuRequest(vm=self.gup))
        # of the in-place file, pages 0..4 are shared, one of them written and one pinned
        self.must(
            "ConvertFile",
            file_pb2.ConvertFileRequest(file=self.sw.file, size_bytes=4 * PAGE, attributes=0),
        )
        self.must(
            "WriteShared", file_pb2.WriteSharedRequest(file=self.sw.file, data=b"shared bytes")
        )
        pin = file_pb2.PinPagesRequest(
            file=self.sw.file, offset_bytes=PAGE, length_bytes=PAGE, purpose="DMA", holder="device"
        )
        self.pin = self.must("PinPages", pin).pin
        rule = host_pb2.FaultRule(point="nowhere", error="nothing", nth=5)
        self.rule = self.must("AddFaultRule", host_pb2.AddFaultRuleRequest(rule=rule)).rule
        source = b"\xa5" * (2 * PAGE)
        self.must("Populate", vm_pb2.PopulateRequest(vm=self.tdx.vm, source=source))
        allocate = file_pb2.FallocateRequest(
            file=self.tdx.file, mode=1, offset_bytes=8 * PAGE, length_bytes=4 * PAGE
        )
        self.must("Fallocate", allocate)
        # one that is over can be told of, exported, and followed by another
        self.rpc.call("StopTrace")
        self.must("StartTrace")
        self.must("StopTrace")
        self.open_sessions()

    def open_sessions(self) -> None:
        """Open a session with a lease, one of a guest, and one of a device below the first."""
        opened = self.rpc.call("OpenSession", lease_seconds=3600).reply
        self.session, self.token = opened.session.session, opened.token
        self.guest_token = self._redeemed(role=session_pb2.ROLE_GUEST, vm=self.sw.vm)
        grant = session_pb2.Grant(file=self.sw.file, offset_bytes=0, length_bytes=PAGE)
        self._redeemed(role=session_pb2.ROLE_DEVICE, grants=[grant])

    def _redeemed(self, **fields: Any) -> str:
        mine = [("rmem-token", self.token)]
        ticket = self.rpc.call("CreateTicket", metadata=mine, **fields).reply.ticket
        return str(self.rpc.call("OpenSession", lease_seconds=3600, ticket=ticket).reply.token)

    def sent_with(self, name: str) -> list[tuple[str, str]]:
        """Return the metadata that a valid call needs: the token of a session whose call it is."""
        token = {
            "RenewSession": self.token, "ReadGuest": self.guest_token,
            "WriteGuest": self.guest_token,
        }.get(name)  # fmt: skip
        return [("rmem-token", token)] if token else []

    def operation(self) -> str:
        """Start a job and return its operation's name."""
        return str(self.must("StartCompact").name)

    def guest(self, consumer: str, npages: int = 32, flags: int | None = None) -> Guest:
        """Make a VM with a file, a slot and a vCPU."""
        vm = self.must("CreateVm", vm_pb2.CreateVmRequest(consumer=consumer)).vm
        if flags is None:
            flags = int(consumer == "sw-protected")
        create = file_pb2.CreateFileRequest(vm=vm, size_bytes=npages * PAGE, flags=flags)
        file = self.must("CreateFile", create).file
        self.must("SetMemoryRegion", self.slot(vm, file, npages))
        self.must("CreateVcpu", vcpu_pb2.CreateVcpuRequest(vm=vm))
        return Guest(vm, file, npages)

    @staticmethod
    def slot(vm: int, file: int, npages: int, **fields: int) -> vm_pb2.SetMemoryRegionRequest:
        """Return the request that binds a file at address 0 as slot 0."""
        whole = {
            "vm": vm, "file": file, "flags": GUEST_MEMFD, "size_bytes": npages * PAGE, **fields
        }  # fmt: skip
        return vm_pb2.SetMemoryRegionRequest(**whole)

    @property
    def intact(self) -> bool:
        """Return whether what the valid requests name is still there."""
        vms = {vm.vm for vm in self.must("ListVms").vms}
        files = {file.file for file in self.must("ListFiles").files}
        return vms >= {self.tdx.vm, self.sw.vm, self.gup} and files >= {
            self.tdx.file, self.sw.file
        }  # fmt: skip

    def handles(self, field: str) -> list[int]:
        """Return the handles that a field of this name may carry."""
        return {
            "vm": [self.tdx.vm, self.sw.vm, self.gup],
            "file": [self.tdx.file, self.sw.file],
            "pin": [self.pin],
            "rule": [self.rule],
            "vcpu": [0],
            "session": [self.session],
        }[field]

    def valid(self, name: str) -> Message:
        """Return a request that the daemon takes."""
        tdx, sw = self.tdx, self.sw
        private = host_pb2.PageAddress(guest=host_pb2.GuestPage(vm=tdx.vm, gfn=0))
        kernel, free = types_pb2.AGENT_HOST_KERNEL, FRAMES - 64
        bus = types_pb2.ACCESS_LEVEL_BUS
        some = types_pb2.PageRange(start=free, npages=2)
        touch = vcpu_pb2.Instruction(opcode=vcpu_pb2.OPCODE_TOUCH, gpa=0, length_bytes=PAGE)
        make = {
            "ListConsumers": lambda: consumer_pb2.ListConsumersRequest(),
            "GetOps": lambda: consumer_pb2.GetOpsRequest(vm=tdx.vm),
            "CreateFile": lambda: file_pb2.CreateFileRequest(vm=tdx.vm, size_bytes=4 * PAGE),
            "GetFile": lambda: file_pb2.GetFileRequest(file=tdx.file),
            "ListFiles": lambda: file_pb2.ListFilesRequest(),
            "CloseFile": lambda: file_pb2.CloseFileRequest(file=tdx.file),
            "Fallocate": lambda: file_pb2.FallocateRequest(
                file=tdx.file, mode=3, offset_bytes=8 * PAGE, length_bytes=PAGE
            ),
            "ConvertFile": lambda: file_pb2.ConvertFileRequest(
                file=sw.file, offset_bytes=8 * PAGE, size_bytes=PAGE, attributes=0
            ),
            "ReadShared": lambda: file_pb2.ReadSharedRequest(file=sw.file, length_bytes=PAGE),
            "WriteShared": lambda: file_pb2.WriteSharedRequest(file=sw.file, data=b"x" * PAGE),
            "SetPolicy": lambda: file_pb2.SetPolicyRequest(
                file=tdx.file, length_bytes=PAGE, policy=2, nodes=[0]
            ),
            "GetPolicy": lambda: file_pb2.GetPolicyRequest(file=tdx.file),
            "PinPages": lambda: file_pb2.PinPagesRequest(
                file=sw.file, length_bytes=PAGE, purpose="DMA", holder="device"
            ),
            "UnpinPages": lambda: file_pb2.UnpinPagesRequest(pin=self.pin),
            "GetHost": lambda: host_pb2.GetHostRequest(),
            "GetPageMap": lambda: host_pb2.GetPageMapRequest(first_pfn=1, npages=8, max_runs=4),
            "GetPage": lambda: host_pb2.GetPageRequest(page=private),
            "ReadPhysical": lambda: host_pb2.ReadPhysicalRequest(
                pfn=free, npages=1, agent=kernel, level=bus
            ),
            "WritePhysical": lambda: host_pb2.WritePhysicalRequest(
                pfn=free, data=b"x" * PAGE, agent=kernel, level=bus
            ),
            "CopyPhysical": lambda: host_pb2.CopyPhysicalRequest(
                src_pfn=free, dst_pfn=free + 1, npages=1, agent=kernel, level=bus
            ),
            "Migrate": lambda: host_pb2.MigrateRequest(
                vm=tdx.vm, gfns=[types_pb2.PageRange(start=0, npages=1)], node=0
            ),
            "Compact": lambda: host_pb2.CompactRequest(node=0),
            "Offline": lambda: host_pb2.OfflineRequest(pfns=some),
            "Online": lambda: host_pb2.OnlineRequest(pfns=some),
            "Poison": lambda: host_pb2.PoisonRequest(page=private),
            "GetAccounting": lambda: host_pb2.GetAccountingRequest(vm=tdx.vm),
            "AddFaultRule": lambda: host_pb2.AddFaultRuleRequest(
                rule=host_pb2.FaultRule(vm=tdx.vm, point="nowhere", error="x", nth=3, times=2)
            ),
            "ListFaultRules": lambda: host_pb2.ListFaultRulesRequest(),
            "RemoveFaultRule": lambda: host_pb2.RemoveFaultRuleRequest(rule=self.rule),
            "ExplainReason": lambda: host_pb2.ExplainReasonRequest(reason="FOLIO_BUSY"),
            "CreateVcpu": lambda: vcpu_pb2.CreateVcpuRequest(vm=sw.vm, vcpu=1),
            "SetProgramme": lambda: vcpu_pb2.SetProgrammeRequest(vm=sw.vm, programme=[touch]),
            "RunVcpu": lambda: vcpu_pb2.RunVcpuRequest(vm=sw.vm, max_instructions=1),
            "CreateVm": lambda: vm_pb2.CreateVmRequest(
                consumer="tdx-today", config={"debug": "1"}, memlock_pages=8, name="a guest"
            ),
            "GetVm": lambda: vm_pb2.GetVmRequest(vm=tdx.vm),
            "ListVms": lambda: vm_pb2.ListVmsRequest(),
            "DestroyVm": lambda: vm_pb2.DestroyVmRequest(vm=tdx.vm),
            "SetMemoryRegion": lambda: self.slot(tdx.vm, 0, 4, slot=1, flags=0, gpa=1 << 30),
            "SetMemoryAttributes": lambda: vm_pb2.SetMemoryAttributesRequest(
                vm=tdx.vm,
                ranges=[vm_pb2.AttributeRange(gpa=16 * PAGE, size_bytes=PAGE, attributes=0)],
            ),
            "GetMemoryAttributes": lambda: vm_pb2.GetMemoryAttributesRequest(
                vm=tdx.vm, size_bytes=16 * PAGE
            ),
            "Populate": lambda: vm_pb2.PopulateRequest(
                vm=tdx.vm, gpa=4 * PAGE, source=b"\x5a" * PAGE, measure=True
            ),
            "Finalize": lambda: vm_pb2.FinalizeRequest(vm=tdx.vm),
            "PreFault": lambda: vm_pb2.PreFaultRequest(vm=sw.vm, size_bytes=2 * PAGE, trace=True),
            "Watch": lambda: watch_pb2.WatchRequest(kinds=["vm_created"]),
            "SwapConsumer": lambda: vm_pb2.SwapConsumerRequest(vm=tdx.vm, consumer="tdx-today"),
            "LoadPlugins": lambda: consumer_pb2.LoadPluginsRequest(),
            "UnloadPlugin": lambda: consumer_pb2.UnloadPluginRequest(name="null"),
            "ReloadPlugin": lambda: consumer_pb2.ReloadPluginRequest(name="null"),
            "ListPins": lambda: file_pb2.ListPinsRequest(file=sw.file),
            "GetWaitGraph": lambda: host_pb2.GetWaitGraphRequest(),
            "CheckHost": lambda: host_pb2.CheckHostRequest(),
            "Upgrade": lambda: host_pb2.UpgradeRequest(),
            "ListFaultPoints": lambda: host_pb2.ListFaultPointsRequest(),
            "ReadGuest": lambda: vcpu_pb2.ReadGuestRequest(
                vm=sw.vm, gpa=0, length_bytes=16, private=False
            ),
            "WriteGuest": lambda: vcpu_pb2.WriteGuestRequest(
                vm=sw.vm, gpa=0, data=b"0123456789abcdef", private=False
            ),
            "WhoAmI": lambda: session_pb2.WhoAmIRequest(),
            "OpenSession": lambda: session_pb2.OpenSessionRequest(lease_seconds=60),
            "RenewSession": lambda: session_pb2.RenewSessionRequest(),
            "CloseSession": lambda: session_pb2.CloseSessionRequest(session=self.session),
            "ListSessions": lambda: session_pb2.ListSessionsRequest(),
            "CreateTicket": lambda: session_pb2.CreateTicketRequest(
                role=session_pb2.ROLE_GUEST, vm=sw.vm
            ),
            "RevokeGrants": lambda: session_pb2.RevokeGrantsRequest(
                file=sw.file, length_bytes=PAGE
            ),
            "StartTrace": lambda: trace_pb2.StartTraceRequest(limit_bytes=1 << 20),
            "StopTrace": lambda: trace_pb2.StopTraceRequest(),
            "GetTrace": lambda: trace_pb2.GetTraceRequest(),
            "ExportTrace": lambda: trace_pb2.ExportTraceRequest(),
            "StartMigrate": lambda: self.valid("Migrate"),
            "StartCompact": lambda: host_pb2.CompactRequest(node=0),
            "StartOffline": lambda: host_pb2.OfflineRequest(pfns=some),
            "ListOperations": lambda: operations_pb2.ListOperationsRequest(name="operations"),
            "GetOperation": lambda: operations_pb2.GetOperationRequest(name=self.operation()),
            "WaitOperation": lambda: operations_pb2.WaitOperationRequest(name=self.operation()),
            "CancelOperation": lambda: operations_pb2.CancelOperationRequest(name=self.operation()),
            "DeleteOperation": lambda: operations_pb2.DeleteOperationRequest(name=self.operation()),
        }[name]
        request: Message = make()
        return request


def whole_state(rpc: Rpc) -> dict[str, Any]:
    """Return what the API tells of the whole state, revisions and the daemon's own size left out.

    The page map is of every frame, vendor states included.
    """
    state: dict[str, Any] = {}
    for name in (
        "GetHost", "ListVms", "ListFiles", "ListFaultRules", "GetAccounting", "ListSessions",
        "ListPins", "ListConsumers",
    ):  # fmt: skip
        answer = rpc.call(name)
        assert answer.ok, f"{name}: {answer.message}"
        answer.reply.ClearField("revision")
        if name == "GetHost":
            answer.reply.daemon_rss_bytes = answer.reply.daemon_fds = 0
        state[name] = answer.reply
    pfn, runs = 0, []
    while True:
        reply = _page_map(rpc, pfn).reply
        runs += [run.SerializeToString(deterministic=True) for run in reply.runs]
        pfn = reply.next_pfn
        if not pfn:
            state["page map"] = runs
            return state


def _page_map(rpc: Rpc, pfn: int) -> Answer:
    answer = rpc.call("GetPageMap", host_pb2.GetPageMapRequest(first_pfn=pfn))
    assert answer.ok, answer.message
    return answer
