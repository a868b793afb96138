"""A session on the session socket: who one is, descriptors, and the hot operations.

Owns ``Session``, which lives as long as its process, and until it is closed: when either ends, the
daemon lets go of everything that the session holds. A daemon that is started again goes on with it,
and calls that it has not answered are sent again and done once. It needs no gRPC;
``Session.client`` makes gRPC calls in its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from . import sessioncalls as calls
from .pauses import DEFAULT_RECONNECT_S
from .sessioncalls import Call, Converted
from .sessionsocket import SessionSocket
from .sessionwire import Notice, Record, Result
from .shared import MappedFile, SharedMemory, Spares

if TYPE_CHECKING:
    from .client import Client

T = TypeVar("T")
# GUEST_MEMFD_FLAG_MMAP and GUEST_MEMFD_FLAG_INIT_SHARED
MAPPABLE = 3
DEADLINE_S = 30.0


class Session:
    """An open session; safe to use from many threads. Every refusal is an ``RmemError``.

    While the daemon is away calls wait for it, within their deadline. Memory that is mapped stays
    as it is meanwhile. ``MemoryLost`` says that what came back has none of it.

    Attributes:
        number: its handle; holders are named "session N".
        token: what gRPC calls carry to be made in its name.
        tenant: whose it is: "uid:1000".
        role: "host", "guest", "device" or "admin".
        vm: the VM of a guest session, 0 for the others.
        revision: the newest that any reply told.
    """

    def __init__(self, sock: SessionSocket, role: str, ticket: bytes) -> None:
        self._sock = sock
        self._spares = Spares()
        told = sock.open(role, ticket)
        self.number = told.session
        self.token = told.token
        self.tenant = told.tenant
        self.role = told.role
        self.vm = told.vm
        self.revision = told.revision

    @classmethod
    def open(
        cls,
        socket_dir: str | Path | None = None,
        *,
        role: str = "",
        ticket: bytes = b"",
        deadline_s: float = DEADLINE_S,
        reconnect_s: float = DEFAULT_RECONNECT_S,
    ) -> Session:
        """Open a session.

        Args:
            socket_dir: the directory of the daemon's sockets; default: ``default_socket_dir()``.
            role: "host" or "admin"; with a ticket what that is for. Default: "host", or the
                ticket's.
            ticket: from ``client.sessions.create_ticket``; good for one session.
            deadline_s: seconds that an answer may take.
            reconnect_s: seconds that it may take to get a lost daemon back; 0: the session ends
                with the connection.

        Raises:
            DaemonUnreachable: nobody answers.
            Denied: the role or ticket is not good.
            Exhausted: QUOTA, TOO_MANY.
        """
        sock = SessionSocket(socket_dir, deadline_s, reconnect_s)
        try:
            return cls(sock, role or ("" if ticket else "host"), ticket)
        except BaseException:
            sock.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session; the daemon lets go of everything that it holds."""
        self._sock.close()
        self._spares.close()

    def client(self, **options: Any) -> Client:
        """Return a new ``Client`` of the same daemon whose calls are this session's.

        Args:
            options: what else ``Client`` takes.
        """
        # gRPC is loaded where it is used: a device process may never need it
        from .client import Client

        return Client(self._sock.path.parent, token=self.token, **options)

    def fileno(self) -> int:
        """Return the socket's descriptor; it is readable when a notice waits."""
        return self._sock.fileno()

    def next_notice(self, timeout_s: float | None = None) -> Notice | None:
        """Wait for what the daemon tells unasked: "revoked", "fault", "removed", "closed".

        A session that leaves notices unread for seconds is ended. Around a restart of the daemon
        one may come twice.

        Args:
            timeout_s: seconds; ``None``: for ever.

        Raises:
            DaemonUnreachable: the session has ended.
            MemoryLost: so has the daemon, with all memory; there is another one.
        """
        return self._sock.next_notice(timeout_s)

    @contextmanager
    def batch(self, *, stop: bool = False) -> Iterator[Batch]:
        """Collect calls, and send them in one datagram at the end of the block.

        Each is carried out by itself, in order; its result is read, or raised, from what the
        batch's method returned.

        Args:
            stop: whether those after the first refused one are left out.
        """
        collected = Batch()
        yield collected
        if collected.records:
            found, _ = self._sock.call(collected.records, stop)
            for pending, result in zip(collected.pending, found, strict=True):
                self._note(result)
                pending.arrived(result)

    # --- files -------------------------------------------------------------------------------
    def create(
        self,
        vm: int,
        size_bytes: int,
        *,
        flags: int = MAPPABLE,
        keep: bool = True,
        zeroed: bool = True,
    ) -> MappedFile:
        """Make a file and map its shared half, in one round trip.

        ``with s.create(vm, size) as made: made.view[:] = ...``; the end of the block lets it go,
        without a round trip. Memory of a file of this size that was let go serves again.

        Args:
            vm: the VM that the file is for.
            size_bytes: size in bytes, page-aligned.
            flags: as ``client.files.create`` has them; the shared half must be mappable.
            keep: whether its memory is to serve again. If not, it goes back to the host.
            zeroed: whether memory that serves again is emptied first, in place. If not, it holds
                what this session left in it, which is for who will write all of it.

        Raises:
            NotFound: NO_SUCH_VM.
            Exhausted: QUOTA.
            Unsupported: NOT_MAPPABLE.
        """
        spare = self._spares.take(size_bytes)
        try:
            call = calls.create(vm, size_bytes, flags, spare[0] if spare else 0)
            found, fds = self._sock.call([call.record])
            file = self._take(found[0]).value
        except BaseException:
            if spare:
                self._spares.put(*spare)
            raise
        release = self._keep if keep else self._let_go
        try:
            made = MappedFile(file, size_bytes, fds, spare and spare[1], release)
        except OSError:
            self._sock.tell([calls.close(file, keep=False).record])
            raise
        if spare and zeroed:
            # even if a descriptor came: a daemon that was started again passes that of the spare
            made.empty()
        return made

    def _keep(self, made: MappedFile) -> None:
        self._sock.tell([calls.close(made.file, keep=True).record])
        self._spares.put(made.file, made.memory)

    def _let_go(self, made: MappedFile) -> None:
        self._sock.tell([calls.close(made.file, keep=False).record])

    def close_file(self, file: int) -> int:
        """Close a file; return how many pages were freed."""
        return self._do(calls.close(file, keep=False))

    # --- the shared half ---------------------------------------------------------------------
    def fd(self, file: int, *, read_only: bool = False) -> int:
        """Return a descriptor of a file's shared half, which the caller closes.

        Raises:
            Denied: NOT_GRANTED; a device needs a grant on the whole file.
            Exhausted: QUOTA.
            Unsupported: NOT_MAPPABLE.
        """
        found, fds = self._sock.call([calls.fd(file, read_only).record])
        self._take(found[0])
        (fd,) = fds
        return fd

    def shared_memory(
        self,
        file: int,
        offset_bytes: int = 0,
        length_bytes: int | None = None,
        *,
        read_only: bool = False,
    ) -> SharedMemory:
        """Return a file's shared half, to be mapped: ``with s.shared_memory(f) as m: m.view``.

        Args:
            file: the file.
            offset_bytes: where it begins, page-aligned.
            length_bytes: how long it is; default: to the end.
            read_only: whether it can be written.
        """
        return SharedMemory(
            self.fd(file, read_only=read_only), offset_bytes, length_bytes, read_only
        )

    def read_shared(self, file: int, offset_bytes: int, length_bytes: int) -> bytes:
        """Read shared bytes, at most 128 KiB."""
        return self._do(calls.read_shared(file, offset_bytes, length_bytes))

    def write_shared(self, file: int, offset_bytes: int, data: bytes) -> None:
        """Write shared bytes, at most 128 KiB."""
        self._do(calls.write_shared(file, offset_bytes, data))

    # --- pages held --------------------------------------------------------------------------
    def get(self, file: int, offset_bytes: int, length_bytes: int) -> list[int]:
        """Take a reference on each private page, which is allocated if it is a hole.

        Returns:
            The frames, one a page, for ``put``.
        """
        return self._do(calls.get(file, offset_bytes, length_bytes))

    def put(self, pfns: Iterable[int]) -> int:
        """Drop references that ``get`` took; return how many."""
        return self._do(calls.put(pfns))

    def pin(self, file: int, offset_bytes: int, length_bytes: int, purpose: str = "DMA") -> int:
        """Pin shared pages as DMA does; return the handle."""
        return self._do(calls.pin(file, offset_bytes, length_bytes, purpose))

    def unpin(self, handle: int) -> None:
        """Let a pin go."""
        self._do(calls.unpin(handle))

    # --- guest memory ------------------------------------------------------------------------
    def fault(self, vm: int, gpa: int, size_bytes: int) -> int:
        """Fault a guest range in; return how many pages."""
        return self._do(calls.fault(vm, gpa, size_bytes))

    def convert(self, vm: int, gpa: int, size_bytes: int, *, private: bool) -> bool:
        """Convert a guest range by attributes; return whether that changed anything."""
        return self._do(calls.convert(vm, gpa, size_bytes, private))

    def convert_file(
        self, file: int, offset_bytes: int, size_bytes: int, *, private: bool
    ) -> Converted:
        """Convert a file's range in place."""
        return self._do(calls.convert_file(file, offset_bytes, size_bytes, private))

    def read_guest(
        self, vm: int, vcpu: int, gpa: int, length_bytes: int, *, private: bool = True
    ) -> bytes:
        """Read as the guest, at most 64 KiB; for the guest role."""
        return self._do(calls.read_guest(vm, vcpu, gpa, length_bytes, private))

    def write_guest(
        self, vm: int, vcpu: int, gpa: int, data: bytes, *, private: bool = True
    ) -> None:
        """Write as the guest, at most 64 KiB; for the guest role."""
        self._do(calls.write_guest(vm, vcpu, gpa, data, private))

    # --- page faults -------------------------------------------------------------------------
    def register_faults(self, file: int, offset_bytes: int, length_bytes: int) -> int:
        """Have faults on holes of a range wait for this session; return the handle.

        They come as notices of kind "fault"; ``resolve_copy``, ``resolve_zero`` and
        ``resolve_continue`` let them go on.
        """
        return self._do(calls.register_faults(file, offset_bytes, length_bytes))

    def unregister_faults(self, userfault: int) -> None:
        """Let a range go; faults that wait in it go on as if it had never been."""
        self._do(calls.unregister_faults(userfault))

    def resolve_copy(self, file: int, offset_bytes: int, data: bytes) -> int:
        """Fill shared holes with bytes; return how many pages."""
        return self._do(calls.resolve_copy(file, offset_bytes, data))

    def resolve_zero(self, file: int, offset_bytes: int, length_bytes: int) -> int:
        """Fill shared holes with zeros; return how many pages."""
        return self._do(calls.resolve_zero(file, offset_bytes, length_bytes))

    def resolve_continue(
        self, file: int, offset_bytes: int, length_bytes: int, *, private: bool = False
    ) -> int:
        """Have faults go on, on the pages that they would have got; return how many pages."""
        return self._do(calls.resolve_continue(file, offset_bytes, length_bytes, private))

    def wake_faults(self, file: int, offset_bytes: int, length_bytes: int) -> None:
        """Have what waits in a range fault again, and be told again."""
        self._do(calls.wake_faults(file, offset_bytes, length_bytes))

    def _do(self, call: Call[T]) -> T:
        found, _ = self._sock.call([call.record])
        return call.convert(self._take(found[0]))

    def _take(self, result: Result) -> Result:
        self._note(result)
        if result.error is not None:
            raise result.error
        return result

    def _note(self, result: Result) -> None:
        if result.revision > self.revision:
            self.revision = result.revision


class Pending(Generic[T]):
    """A call of a batch. Its result is there when the batch's block has ended."""

    def __init__(self, call: Call[T]) -> None:
        self._call = call
        self._result: Result | None = None

    def arrived(self, result: Result) -> None:
        """Take the result."""
        self._result = result

    @property
    def error(self) -> Exception | None:
        """Return the refusal, ``None`` if it was carried out."""
        return self._arrived.error

    def result(self) -> T:
        """Return the result, or raise the refusal."""
        if self._arrived.error is not None:
            raise self._arrived.error
        return self._call.convert(self._arrived)

    @property
    def _arrived(self) -> Result:
        if self._result is None:
            raise RuntimeError("the batch was not sent")
        return self._result


class Batch:
    """Calls that go in one datagram: at most 1024, with 128 KiB to carry along."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.pending: list[Pending[Any]] = []

    def add(self, call: Call[T]) -> Pending[T]:
        """Add a call of ``sessioncalls``."""
        pending = Pending(call)
        self.records.append(call.record)
        self.pending.append(pending)
        return pending

    def get(self, file: int, offset_bytes: int, length_bytes: int) -> Pending[list[int]]:
        """Take a reference on each page."""
        return self.add(calls.get(file, offset_bytes, length_bytes))

    def put(self, pfns: Iterable[int]) -> Pending[int]:
        """Drop references."""
        return self.add(calls.put(pfns))

    def pin(
        self, file: int, offset_bytes: int, length_bytes: int, purpose: str = "DMA"
    ) -> Pending[int]:
        """Pin shared pages."""
        return self.add(calls.pin(file, offset_bytes, length_bytes, purpose))

    def unpin(self, handle: int) -> Pending[None]:
        """Let a pin go."""
        return self.add(calls.unpin(handle))

    def fault(self, vm: int, gpa: int, size_bytes: int) -> Pending[int]:
        """Fault a guest range in."""
        return self.add(calls.fault(vm, gpa, size_bytes))

    def convert(self, vm: int, gpa: int, size_bytes: int, *, private: bool) -> Pending[bool]:
        """Convert a guest range by attributes."""
        return self.add(calls.convert(vm, gpa, size_bytes, private))

    def convert_file(
        self, file: int, offset_bytes: int, size_bytes: int, *, private: bool
    ) -> Pending[Converted]:
        """Convert a file's range in place."""
        return self.add(calls.convert_file(file, offset_bytes, size_bytes, private))

    def read_shared(self, file: int, offset_bytes: int, length_bytes: int) -> Pending[bytes]:
        """Read shared bytes."""
        return self.add(calls.read_shared(file, offset_bytes, length_bytes))

    def write_shared(self, file: int, offset_bytes: int, data: bytes) -> Pending[None]:
        """Write shared bytes."""
        return self.add(calls.write_shared(file, offset_bytes, data))

    def read_guest(
        self, vm: int, vcpu: int, gpa: int, length_bytes: int, *, private: bool = True
    ) -> Pending[bytes]:
        """Read as the guest."""
        return self.add(calls.read_guest(vm, vcpu, gpa, length_bytes, private))

    def write_guest(
        self, vm: int, vcpu: int, gpa: int, data: bytes, *, private: bool = True
    ) -> Pending[None]:
        """Write as the guest."""
        return self.add(calls.write_guest(vm, vcpu, gpa, data, private))

    def resolve_copy(self, file: int, offset_bytes: int, data: bytes) -> Pending[int]:
        """Fill shared holes with bytes."""
        return self.add(calls.resolve_copy(file, offset_bytes, data))

    def resolve_zero(self, file: int, offset_bytes: int, length_bytes: int) -> Pending[int]:
        """Fill shared holes with zeros."""
        return self.add(calls.resolve_zero(file, offset_bytes, length_bytes))

    def resolve_continue(
        self, file: int, offset_bytes: int, length_bytes: int, *, private: bool = False
    ) -> Pending[int]:
        """Have faults go on."""
        return self.add(calls.resolve_continue(file, offset_bytes, length_bytes, private))
