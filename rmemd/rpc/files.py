"""FileService: restricted files. Decode, call the engine, encode; nothing else."""

from __future__ import annotations

from rmem.v1 import file_pb2 as pb
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.queries import account
from rmemd.errors import MESSAGE_TOO_BIG
from rmemd.model.files import RestrictedFile
from rmemd.model.sessions import DEVICE
from rmemd.rpc.dispatch import Call
from rmemd.units import PAGE_SIZE

READ_BYTES_MAX = 1 << 20


class FileService:
    """Files by handle."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def CreateFile(self, request: pb.CreateFileRequest, call: Call) -> pb.CreateFileResponse:
        file = self._engine.create_file(request.vm, request.size_bytes, request.flags)
        return pb.CreateFileResponse(revision=self._engine.answered, file=file.info.file)

    def GetFile(self, request: pb.GetFileRequest, call: Call) -> pb.GetFileResponse:
        revision, file = self._engine.read(
            lambda core: describe(core, core.files.get(request.file))
        )
        return pb.GetFileResponse(revision=revision, file=file)

    def ListFiles(self, request: pb.ListFilesRequest, call: Call) -> pb.ListFilesResponse:
        revision, files = self._engine.read(
            lambda core: [
                describe(core, file)
                for file in core.files.all()
                if call.caller.sees(file.info.owner)
            ]
        )
        return pb.ListFilesResponse(revision=revision, files=files)

    def CloseFile(self, request: pb.CloseFileRequest, call: Call) -> pb.CloseFileResponse:
        freed = self._engine.close_file(request.file)
        return pb.CloseFileResponse(revision=self._engine.answered, freed_pages=freed)

    def Fallocate(self, request: pb.FallocateRequest, call: Call) -> pb.FallocateResponse:
        pages = self._engine.fallocate(
            request.file, request.mode, request.offset_bytes, request.length_bytes
        )
        return pb.FallocateResponse(revision=self._engine.answered, pages=pages)

    def ConvertFile(self, request: pb.ConvertFileRequest, call: Call) -> pb.ConvertFileResponse:
        done = self._engine.convert_file(
            request.file,
            request.offset_bytes,
            request.size_bytes,
            request.attributes,
            request.flags,
        )
        return pb.ConvertFileResponse(
            revision=self._engine.answered, changed_pages=done.changed_pages, content=done.content
        )

    def ReadShared(self, request: pb.ReadSharedRequest, call: Call) -> pb.ReadSharedResponse:
        if request.length_bytes > READ_BYTES_MAX:
            raise MESSAGE_TOO_BIG(
                f"{request.length_bytes} bytes; one call reads {READ_BYTES_MAX}",
                field="length_bytes",
            )
        data = self._engine.read_shared(
            request.file,
            request.offset_bytes,
            request.length_bytes,
            call.caller.session,
            call.cancelled,
        )
        return pb.ReadSharedResponse(revision=self._engine.answered, data=data)

    def WriteShared(self, request: pb.WriteSharedRequest, call: Call) -> pb.WriteSharedResponse:
        self._engine.write_shared(
            request.file, request.offset_bytes, request.data, call.caller.session, call.cancelled
        )
        return pb.WriteSharedResponse(revision=self._engine.answered)

    def SetPolicy(self, request: pb.SetPolicyRequest, call: Call) -> pb.SetPolicyResponse:
        self._engine.set_policy(
            request.file, request.offset_bytes, request.length_bytes, request.policy,
            tuple(request.nodes),
        )  # fmt: skip
        return pb.SetPolicyResponse(revision=self._engine.answered)

    def GetPolicy(self, request: pb.GetPolicyRequest, call: Call) -> pb.GetPolicyResponse:
        policy = self._engine.get_policy(request.file, request.offset_bytes)
        return pb.GetPolicyResponse(
            revision=self._engine.answered, policy=policy.policy, nodes=policy.nodes
        )

    def PinPages(self, request: pb.PinPagesRequest, call: Call) -> pb.PinPagesResponse:
        pin = self._engine.pin(
            request.file,
            request.offset_bytes,
            request.length_bytes,
            request.purpose,
            request.holder or "client",
            call.caller.owner,
            call.cancelled,
        )
        return pb.PinPagesResponse(revision=self._engine.answered, pin=pin)

    def UnpinPages(self, request: pb.UnpinPagesRequest, call: Call) -> pb.UnpinPagesResponse:
        self._engine.unpin(request.pin)
        return pb.UnpinPagesResponse(revision=self._engine.answered)

    def ListPins(self, request: pb.ListPinsRequest, call: Call) -> pb.ListPinsResponse:
        caller = call.caller
        revision, pins = self._engine.read(
            lambda core: [
                pin
                for pin in core.sessions.pins()
                if request.file in (0, pin.file) and caller.sees(pin.owner)
                and (caller.role != DEVICE or pin.owner.session == caller.session)
            ]
        )  # fmt: skip
        return pb.ListPinsResponse(
            revision=revision,
            pins=[
                pb.PagePin(
                    pin=pin.pin, file=pin.file, offset_bytes=pin.pgoff * PAGE_SIZE,
                    length_bytes=pin.npages * PAGE_SIZE, purpose=pin.purpose, holder=pin.holder,
                    tenant=pin.owner.tenant, session=pin.owner.session,
                )
                for pin in pins
            ],
        )  # fmt: skip


def describe(core: Core, file: RestrictedFile) -> pb.File:
    """Return a file as a message."""
    used = account(core, file)
    message = pb.File(
        file=file.info.file, vm=file.info.vm, size_bytes=file.info.size_pages * PAGE_SIZE,
        flags=file.info.flags, blksize_bytes=PAGE_SIZE, private_pages=used.private,
        shared_pages=used.shared + used.found, tenant=file.info.owner.tenant,
        session=file.info.owner.session,
    )  # fmt: skip
    for _, b in file.bindings.items():
        message.bindings.add(pgoff=b.pgoff, npages=b.npages, vm=b.vm, slot=b.slot, gfn=b.gfn)
    return message
