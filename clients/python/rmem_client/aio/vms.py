"""Virtual machines: memslots, attributes, population, faults (``client.vms``).

Addresses (``gpa``) and sizes (``*_bytes``) count bytes; everything called ``*_pages`` counts
pages of 4096 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rmem.v1 import types_pb2, vm_pb2, vm_pb2_grpc

from ..constants import KVM_MEM_GUEST_MEMFD, PAGE_BYTES, attributes_of
from ..errors import RmemError
from ..packed import PIECE_BYTES, RANGE_BYTES, Range, pack_ranges, pieces
from .connection import Connection

# 512 KiB: PopulateRequest.source may have 256 pages, the whole message 1 MiB
POPULATE_PAGES = 128


class Vms:
    """The VM service; ``vm`` is a VM's handle throughout."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = vm_pb2_grpc.VmServiceStub(connection.channel)

    async def create(
        self,
        consumer: str,
        *,
        personality: types_pb2.Personality.ValueType = types_pb2.PERSONALITY_UNSPECIFIED,
        config: Mapping[str, str] | None = None,
        memlock_pages: int = 0,
        name: str = "",
        starts_private: bool | None = None,
    ) -> int:
        """Make a VM and return its handle.

        Args:
            consumer: the consumer's full name, "tdx-today".
            personality: how it converts; unspecified: as the consumer does by default.
            config: the consumer's options.
            memlock_pages: RLIMIT_MEMLOCK in pages; 0: no limit.
            name: a name for people.
            starts_private: whether guest memory starts private; None: as the kind of VM does.
        """
        request = vm_pb2.CreateVmRequest(
            consumer=consumer,
            personality=personality,
            config=config or {},
            memlock_pages=memlock_pages,
            name=name,
            starts_private=starts_private,
        )
        reply = await self._connection.call(self._stub.CreateVm, request)
        return reply.vm

    async def get(self, vm: int) -> vm_pb2.Vm:
        """Return a VM: its state, measurement, slots and page counts."""
        reply = await self._connection.call(self._stub.GetVm, vm_pb2.GetVmRequest(vm=vm))
        return reply.vm

    async def list(self) -> vm_pb2.ListVmsResponse:
        """List the VMs, with the revision that a watch goes on from."""
        return await self._connection.call(self._stub.ListVms, vm_pb2.ListVmsRequest())

    async def destroy(self, vm: int) -> vm_pb2.DestroyVmResponse:
        """Unmap everything and give the vendor's resources back; files live on."""
        return await self._connection.call(self._stub.DestroyVm, vm_pb2.DestroyVmRequest(vm=vm))

    async def swap_consumer(
        self, vm: int, consumer: str = "", *, config: Mapping[str, str] | None = None
    ) -> vm_pb2.SwapConsumerResponse:
        """Replace the VM's consumer while it runs; its pages keep their bytes.

        Args:
            vm: the VM.
            consumer: the new consumer's full name; "": its own, made anew.
            config: its options; None: those of the VM that it knows.
        """
        request = vm_pb2.SwapConsumerRequest(vm=vm, consumer=consumer, config=config or {})
        return await self._connection.call(self._stub.SwapConsumer, request)

    async def set_memory_region(
        self,
        vm: int,
        slot: int,
        *,
        gpa: int,
        size_bytes: int,
        file: int = 0,
        file_offset_bytes: int = 0,
        flags: int | None = None,
        userspace_addr: int = 0,
    ) -> vm_pb2.SetMemoryRegionResponse:
        """Add, change or (size 0) delete a memslot.

        Args:
            vm: the VM.
            slot: the slot's number.
            gpa: guest physical address in bytes.
            size_bytes: size in bytes.
            file: the restricted file to bind, 0 for none.
            file_offset_bytes: offset in that file in bytes.
            flags: KVM_MEM_*; default: KVM_MEM_GUEST_MEMFD exactly if a file is given.
            userspace_addr: has no meaning here, but must be aligned.
        """
        if flags is None:
            flags = KVM_MEM_GUEST_MEMFD if file else 0
        request = vm_pb2.SetMemoryRegionRequest(
            vm=vm,
            slot=slot,
            flags=flags,
            gpa=gpa,
            size_bytes=size_bytes,
            userspace_addr=userspace_addr,
            file=file,
            file_offset_bytes=file_offset_bytes,
        )
        return await self._connection.call(self._stub.SetMemoryRegion, request)

    async def delete_memory_region(self, vm: int, slot: int) -> vm_pb2.SetMemoryRegionResponse:
        """Delete a memslot."""
        return await self.set_memory_region(vm, slot, gpa=0, size_bytes=0)

    async def convert(
        self, vm: int, gpa: int, size_bytes: int, *, private: bool
    ) -> vm_pb2.SetMemoryAttributesResponse:
        """Make one range of guest memory (in bytes) private or shared."""
        ranges = [Range(gpa, size_bytes, attributes_of(private))]
        return await self.set_memory_attributes(vm, ranges)

    async def set_memory_attributes(
        self, vm: int, ranges: Iterable[Range | tuple[int, int, int]] | bytes, *, flags: int = 0
    ) -> vm_pb2.SetMemoryAttributesResponse:
        """Set the attributes of ranges (gpa, size in bytes, attributes), one after the other.

        The ranges travel packed, 512 KiB of them (21845) per call; who has them packed already
        (``pack_ranges``, or the bytes of an array of "<u8", three to a range) gives those. Each
        range is all or nothing; those before the one that is refused stay done, and the reply adds
        the calls up.
        """
        packed = ranges if isinstance(ranges, bytes) else pack_ranges(ranges)
        whole_records = PIECE_BYTES // RANGE_BYTES * RANGE_BYTES
        total = vm_pb2.SetMemoryAttributesResponse()
        for start, length in pieces(len(packed), whole_records):
            request = vm_pb2.SetMemoryAttributesRequest(
                vm=vm, packed=packed[start : start + length], flags=flags
            )
            reply = await self._connection.call(self._stub.SetMemoryAttributes, request)
            total.revision = reply.revision
            total.done_ranges += reply.done_ranges
            total.unchanged_ranges += reply.unchanged_ranges
        return total

    async def get_memory_attributes(
        self, vm: int, gpa: int, size_bytes: int
    ) -> vm_pb2.GetMemoryAttributesResponse:
        """Return the attributes of a range (in bytes) as ascending runs."""
        request = vm_pb2.GetMemoryAttributesRequest(vm=vm, gpa=gpa, size_bytes=size_bytes)
        return await self._connection.call(self._stub.GetMemoryAttributes, request)

    async def populate(
        self,
        vm: int,
        gpa: int,
        source: bytes,
        *,
        kind: vm_pb2.PageKind.ValueType = vm_pb2.PAGE_KIND_NORMAL,
        measure: bool = True,
    ) -> vm_pb2.PopulateResponse:
        """Take initial pages in, from ``gpa`` (bytes) on; call before ``finalize``.

        Sent 128 pages at a time. Pages before the one that is refused stay done: the error's
        ``progress_pages`` counts them over all calls, and so does the reply.

        Args:
            vm: the VM.
            gpa: guest physical address in bytes.
            source: the pages' bytes, a multiple of 4096.
            kind: what sort of pages.
            measure: whether their content is measured.
        """
        total = vm_pb2.PopulateResponse()
        for start, length in pieces(len(source), POPULATE_PAGES * PAGE_BYTES):
            request = vm_pb2.PopulateRequest(
                vm=vm,
                gpa=gpa + start,
                source=source[start : start + length],
                kind=kind,
                measure=measure,
            )
            try:
                reply = await self._connection.call(self._stub.Populate, request)
            except RmemError as error:
                error.add_progress(total.done_pages)
                raise
            total.revision = reply.revision
            total.done_pages += reply.done_pages
        return total

    async def finalize(self, vm: int) -> bytes:
        """Close the measurement and return it; empty where the vendor has none."""
        request = vm_pb2.FinalizeRequest(vm=vm)
        reply = await self._connection.call(self._stub.Finalize, request)
        return reply.measurement

    async def prefault(
        self, vm: int, gpa: int, size_bytes: int, *, trace: bool = False
    ) -> vm_pb2.PreFaultResponse:
        """Fault a guest range (in bytes) in.

        Args:
            vm: the VM.
            gpa: guest physical address in bytes.
            size_bytes: size in bytes.
            trace: return the first page's references at each step of its fault.
        """
        request = vm_pb2.PreFaultRequest(vm=vm, gpa=gpa, size_bytes=size_bytes, trace=trace)
        return await self._connection.call(self._stub.PreFault, request)
