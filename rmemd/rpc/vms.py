"""VmService: virtual machines. Decode, call the engine, encode; nothing else."""

from __future__ import annotations

import numpy as np

from rmem.v1 import types_pb2
from rmem.v1 import vm_pb2 as pb
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.fault import locked_pages
from rmemd.engine.queries import mapped_counts
from rmemd.errors import BAD_RANGE, BAD_REQUEST, NOT_PAGE_ALIGNED
from rmemd.model.sessions import Owner
from rmemd.model.vms import ATTRIBUTE_PRIVATE, Vm
from rmemd.rpc.consumers import personality, swap_message
from rmemd.rpc.dispatch import Call
from rmemd.units import MAX_GFN, PAGE_SHIFT, PAGE_SIZE, U64, is_page_aligned

NAME_MAX = 64


class VmService:
    """VMs by handle."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def CreateVm(self, request: pb.CreateVmRequest, call: Call) -> pb.CreateVmResponse:
        if len(request.name) > NAME_MAX or not (request.name.isprintable()):
            raise BAD_REQUEST(f"a name is printable and at most {NAME_MAX} long", field="name")
        vm = self._engine.create_vm(
            request.consumer, _in_place(request.personality), dict(request.config),
            request.memlock_pages, request.name,
            request.starts_private if request.HasField("starts_private") else None,
            Owner(call.caller.tenant) if request.detached else call.caller.owner,
        )  # fmt: skip
        return pb.CreateVmResponse(revision=self._engine.answered, vm=vm.info.vm)

    def GetVm(self, request: pb.GetVmRequest, call: Call) -> pb.GetVmResponse:
        revision, vm = self._engine.read(lambda core: describe(core, core.vms.get(request.vm)))
        return pb.GetVmResponse(revision=revision, vm=vm)

    def ListVms(self, request: pb.ListVmsRequest, call: Call) -> pb.ListVmsResponse:
        revision, vms = self._engine.read(
            lambda core: [
                describe(core, vm) for vm in core.vms.all() if call.caller.sees(vm.info.owner)
            ]
        )
        return pb.ListVmsResponse(revision=revision, vms=vms)

    def DestroyVm(self, request: pb.DestroyVmRequest, call: Call) -> pb.DestroyVmResponse:
        self._engine.destroy_vm(request.vm)
        return pb.DestroyVmResponse(revision=self._engine.answered)

    def SetMemoryRegion(
        self, request: pb.SetMemoryRegionRequest, call: Call
    ) -> pb.SetMemoryRegionResponse:
        self._engine.set_memory_region(
            request.vm, request.slot, request.flags, request.gpa, request.size_bytes,
            request.file, request.file_offset_bytes, request.userspace_addr,
        )  # fmt: skip
        return pb.SetMemoryRegionResponse(revision=self._engine.answered)

    def SetMemoryAttributes(
        self, request: pb.SetMemoryAttributesRequest, call: Call
    ) -> pb.SetMemoryAttributesResponse:
        ranges = _unpack(request.packed)
        if request.ranges:
            listed = [(r.gpa, r.size_bytes, r.attributes) for r in request.ranges]
            ranges = np.concatenate((np.array(listed, dtype=np.uint64), ranges))
        if not ranges.size:
            raise BAD_REQUEST("no range is given", field="ranges")
        unchanged = self._engine.set_attributes(request.vm, ranges, request.flags)
        return pb.SetMemoryAttributesResponse(
            revision=self._engine.answered, done_ranges=len(ranges), unchanged_ranges=unchanged
        )

    def GetMemoryAttributes(
        self, request: pb.GetMemoryAttributesRequest, call: Call
    ) -> pb.GetMemoryAttributesResponse:
        revision, runs = self._engine.read(
            lambda core: _attribute_runs(core, request.vm, request.gpa, request.size_bytes)
        )
        return pb.GetMemoryAttributesResponse(revision=revision, runs=runs)

    def Populate(self, request: pb.PopulateRequest, call: Call) -> pb.PopulateResponse:
        kind = request.kind or pb.PAGE_KIND_NORMAL
        done = self._engine.populate(request.vm, request.gpa, request.source, kind, request.measure)
        return pb.PopulateResponse(revision=self._engine.answered, done_pages=done)

    def Finalize(self, request: pb.FinalizeRequest, call: Call) -> pb.FinalizeResponse:
        measurement = self._engine.finalize(request.vm)
        return pb.FinalizeResponse(revision=self._engine.answered, measurement=measurement)

    def PreFault(self, request: pb.PreFaultRequest, call: Call) -> pb.PreFaultResponse:
        done = self._engine.pre_fault(
            request.vm, request.gpa, request.size_bytes, request.trace, call.cancelled
        )
        reply = pb.PreFaultResponse(
            revision=self._engine.answered, done_pages=done.done_pages,
            left_bytes=done.left_bytes, retries=done.retries,
        )  # fmt: skip
        for step, references, pins in done.trace.steps:
            reply.steps.add(step=step, references=references, pins=pins)
        return reply

    def SwapConsumer(self, request: pb.SwapConsumerRequest, call: Call) -> pb.SwapConsumerResponse:
        swapped = self._engine.swap_consumer(request.vm, request.consumer, dict(request.config))
        return swap_message(swapped, self._engine.answered)


def _in_place(wanted: types_pb2.Personality.ValueType) -> bool | None:
    if wanted not in types_pb2.Personality.values():
        raise BAD_REQUEST(f"no personality {wanted}", field="personality")
    if wanted == types_pb2.PERSONALITY_UNSPECIFIED:
        return None
    return wanted == types_pb2.PERSONALITY_IN_PLACE


def _unpack(packed: bytes) -> U64:
    if len(packed) % 24:
        raise BAD_REQUEST("packed is not whole records of 24 bytes", field="packed")
    return np.frombuffer(packed, dtype="<u8").reshape(-1, 3)


def _attribute_runs(core: Core, number: int, gpa: int, size: int) -> list[pb.AttributeRange]:
    vm = core.vms.get(number)
    if not is_page_aligned(gpa) or not is_page_aligned(size):
        raise NOT_PAGE_ALIGNED(f"{gpa:#x}+{size:#x}", field="gpa")
    if size == 0 or gpa + size > MAX_GFN * PAGE_SIZE:
        raise BAD_RANGE(f"{gpa:#x}+{size:#x} is empty or wraps", field="size_bytes")
    start, npages = gpa >> PAGE_SHIFT, size >> PAGE_SHIFT
    if not vm.info.in_place:
        return _ranges(*vm.attributes.runs(start, npages), 0)
    found: list[pb.AttributeRange] = []
    for _, slot in sorted(vm.slots.items(), key=lambda item: item[1].gfn):
        lo, hi = max(slot.gfn, start), min(slot.gfn + slot.npages, start + npages)
        if lo < hi and core.files.exists(slot.file):
            file = core.files.get(slot.file)
            shift = slot.gfn - slot.pgoff
            found += _ranges(*file.attributes.runs(lo - shift, hi - lo), shift)
    return found


def _ranges(
    starts: np.ndarray, counts: np.ndarray, values: np.ndarray, shift: int
) -> list[pb.AttributeRange]:
    return [
        pb.AttributeRange(
            gpa=(start + shift) << PAGE_SHIFT, size_bytes=count << PAGE_SHIFT,
            attributes=ATTRIBUTE_PRIVATE if value else 0,
        )
        for start, count, value in zip(
            starts.tolist(), counts.tolist(), values.tolist(), strict=True
        )
    ]  # fmt: skip


def describe(core: Core, vm: Vm) -> pb.Vm:
    """Return a VM as a message."""
    private, shared = mapped_counts(core, vm)
    info = vm.info
    message = pb.Vm(
        vm=info.vm, consumer=info.consumer, personality=personality(info.in_place), name=info.name,
        state=info.state, dead_reason=info.dead_reason, measurement=info.measurement,
        vcpus=len(vm.vcpus), mapped_private_pages=private, mapped_shared_pages=shared,
        locked_pages=locked_pages(core, vm), tenant=info.owner.tenant, session=info.owner.session,
        config=dict(info.config),
    )  # fmt: skip
    for _, slot in sorted(vm.slots.items()):
        message.slots.add(
            slot=slot.slot, flags=slot.flags, gpa=slot.gfn << PAGE_SHIFT,
            size_bytes=slot.npages << PAGE_SHIFT, file=slot.file,
            file_offset_bytes=slot.pgoff << PAGE_SHIFT, file_open=core.files.exists(slot.file),
        )  # fmt: skip
    return message
