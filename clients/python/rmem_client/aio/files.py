"""Restricted files: guest_memfd's inode and file (``client.files``).

Offsets, lengths and sizes count bytes, as the kernel's calls do; ``*_pages`` counts pages of
4096 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from rmem.v1 import file_pb2, file_pb2_grpc

from ..constants import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_BYTES, attributes_of
from ..errors import RmemError
from ..packed import PIECE_BYTES, pieces
from .connection import Connection


class Files:
    """The file service; ``file`` is a file's handle throughout."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = file_pb2_grpc.FileServiceStub(connection.channel)

    async def create(self, vm: int, size_bytes: int, *, flags: int = 0) -> int:
        """Make a file of a fixed size for one VM and return its handle.

        Args:
            vm: the VM that the file is for.
            size_bytes: size in bytes, page-aligned.
            flags: GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED.
        """
        request = file_pb2.CreateFileRequest(vm=vm, size_bytes=size_bytes, flags=flags)
        reply = await self._connection.call(self._stub.CreateFile, request)
        return reply.file

    async def get(self, file: int) -> file_pb2.File:
        """Return a file's size, flags, page counts and bindings."""
        reply = await self._connection.call(self._stub.GetFile, file_pb2.GetFileRequest(file=file))
        return reply.file

    async def list(self) -> file_pb2.ListFilesResponse:
        """List the files, with the revision that a watch goes on from."""
        return await self._connection.call(self._stub.ListFiles, file_pb2.ListFilesRequest())

    async def close(self, file: int) -> int:
        """Drop the last reference: bindings are cut, every page is freed; return how many pages."""
        request = file_pb2.CloseFileRequest(file=file)
        reply = await self._connection.call(self._stub.CloseFile, request)
        return reply.freed_pages

    async def fallocate(self, file: int, mode: int, offset_bytes: int, length_bytes: int) -> int:
        """Allocate or punch, as ``mode`` (FALLOC_FL_*) says, and return how many pages."""
        request = file_pb2.FallocateRequest(
            file=file, mode=mode, offset_bytes=offset_bytes, length_bytes=length_bytes
        )
        reply = await self._connection.call(self._stub.Fallocate, request)
        return reply.pages

    async def allocate(self, file: int, offset_bytes: int, length_bytes: int) -> int:
        """Allocate a range and return how many pages were; a prefix stays when refused."""
        return await self.fallocate(file, FALLOC_FL_KEEP_SIZE, offset_bytes, length_bytes)

    async def punch(self, file: int, offset_bytes: int, length_bytes: int) -> int:
        """Punch a hole, all or nothing, and return how many pages were freed."""
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        return await self.fallocate(file, mode, offset_bytes, length_bytes)

    async def convert(
        self, file: int, offset_bytes: int, size_bytes: int, *, private: bool
    ) -> file_pb2.ConvertFileResponse:
        """Convert a range in place, all or nothing; for VMs with the in-place personality."""
        request = file_pb2.ConvertFileRequest(
            file=file,
            offset_bytes=offset_bytes,
            size_bytes=size_bytes,
            attributes=attributes_of(private),
        )
        return await self._connection.call(self._stub.ConvertFile, request)

    async def read_shared(self, file: int, offset_bytes: int, length_bytes: int) -> bytes:
        """Read shared pages as a host mapping would, 512 KiB per call."""
        data = bytearray()
        for start, length in pieces(length_bytes, PIECE_BYTES):
            request = file_pb2.ReadSharedRequest(
                file=file, offset_bytes=offset_bytes + start, length_bytes=length
            )
            reply = await self._connection.call(self._stub.ReadShared, request)
            data += reply.data
        return bytes(data)

    async def write_shared(self, file: int, offset_bytes: int, data: bytes) -> int:
        """Write shared pages as a host mapping would; return the revision of the last write.

        Sent 512 KiB per call; what was written before a refusal stays, and the error's
        ``progress_pages`` counts its whole pages.
        """
        revision = 0
        for start, length in pieces(len(data), PIECE_BYTES):
            request = file_pb2.WriteSharedRequest(
                file=file, offset_bytes=offset_bytes + start, data=data[start : start + length]
            )
            try:
                reply = await self._connection.call(self._stub.WriteShared, request)
            except RmemError as error:
                error.add_progress(start // PAGE_BYTES)
                raise
            revision = reply.revision
        return revision

    async def set_policy(
        self,
        file: int,
        offset_bytes: int,
        length_bytes: int,
        *,
        policy: int,
        nodes: Iterable[int] = (),
    ) -> file_pb2.SetPolicyResponse:
        """Store a NUMA policy (MPOL_*) for a range; it affects later allocations."""
        request = file_pb2.SetPolicyRequest(
            file=file,
            offset_bytes=offset_bytes,
            length_bytes=length_bytes,
            policy=policy,
            nodes=nodes,
        )
        return await self._connection.call(self._stub.SetPolicy, request)

    async def get_policy(self, file: int, offset_bytes: int) -> file_pb2.GetPolicyResponse:
        """Read the NUMA policy at an offset back."""
        request = file_pb2.GetPolicyRequest(file=file, offset_bytes=offset_bytes)
        return await self._connection.call(self._stub.GetPolicy, request)

    async def pin(
        self, file: int, offset_bytes: int, length_bytes: int, *, purpose: str, holder: str = ""
    ) -> int:
        """Hold present pages in place, as DMA does, and return the pin's handle.

        Args:
            file: the file.
            offset_bytes: offset in bytes.
            length_bytes: length in bytes.
            purpose: why, which refusals will say.
            holder: who, which refusals will say.
        """
        request = file_pb2.PinPagesRequest(
            file=file,
            offset_bytes=offset_bytes,
            length_bytes=length_bytes,
            purpose=purpose,
            holder=holder,
        )
        reply = await self._connection.call(self._stub.PinPages, request)
        return reply.pin

    async def unpin(self, pin: int) -> file_pb2.UnpinPagesResponse:
        """Let a pin go."""
        request = file_pb2.UnpinPagesRequest(pin=pin)
        return await self._connection.call(self._stub.UnpinPages, request)

    async def pins(self, file: int = 0) -> file_pb2.ListPinsResponse:
        """List the pins, each with its range, purpose and holder; ``file`` 0: of all files."""
        return await self._connection.call(self._stub.ListPins, file_pb2.ListPinsRequest(file=file))
