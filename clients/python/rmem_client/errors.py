"""Refusals, decoded: one exception tree, by gRPC code, that carries all the daemon said.

Owns the way from ``grpc.RpcError`` to ``RmemError``. The daemon puts a google.rpc.ErrorInfo
(domain "rmemd") and an rmem.v1.Refusal into every error's google.rpc.Status; both are decoded
here and nowhere else. Every error explains itself: ``str(error)`` names page, state, rule and
holders, then the remedy, and ``error.facts()`` gives the same as labelled lines.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from rmem.v1 import session_pb2, types_pb2

from .paths import MAX_SOCKET_PATH_BYTES, path_bytes

if TYPE_CHECKING:
    from .address import Address

DOMAIN = "rmemd"
# of a call that was stopped for the daemon's successor, which is there in a moment
MAKES_WAY = "HANDING_OVER"

# By these the kernel says that an operation does not exist for an object: rmemd's "unsupported".
UNSUPPORTED_ERRNOS = frozenset({"EOPNOTSUPP", "ENOTTY", "ENODEV"})

_Detail = TypeVar("_Detail", bound=Message)


@dataclass(frozen=True)
class Holder:
    """Somebody who keeps references to a page.

    Attributes:
        name: who, "vm/3" or "client 7".
        purpose: why, "secure EPT" or "DMA".
        count: how many references.
        longterm: whether they are long-term pins.
    """

    name: str
    purpose: str
    count: int
    longterm: bool = False

    def __str__(self) -> str:
        what = "long-term pin" if self.longterm else "reference"
        plural = "" if self.count == 1 else "s"
        return f"{self.name} ({self.purpose}: {self.count} {what}{plural})"


class RmemError(Exception):
    """Root of everything the daemon refuses; nothing has changed, save a prefix that is named.

    Attributes:
        message: what was refused, in one sentence.
        code: the gRPC code.
        reason: the catalogue's name, which ``client.host.explain(reason)`` explains.
        errno: the kernel's positive errno, 0 where it has none; ``errno_name`` spells it.
        field: the request field at fault.
        page: the page with its kind, "gfn 0x42".
        state: the state that it was found in.
        rule: the rule that was applied, with its reference section.
        holders: who keeps the page.
        remedy: what to try.
        vendor_status: the vendor's status as the vendor spells it; ``vendor_value`` its number.
        progress_pages: pages done before the refusal; ``None`` where no prefix is kept.
        error_offset_bytes: offset in the file that the refusal is about, or ``None``.
        where: the plugin and hook that refused.
        revision: revision of the state that was judged, 0 if not told.
        correlation_id: what to look for in the daemon's log, "" if not told.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        refusal: types_pb2.Refusal | None = None,
        correlation_id: str = "",
    ) -> None:
        said = refusal if refusal is not None else types_pb2.Refusal()
        self.code = code
        self.reason = said.reason or reason or code.name
        self.message = message.removeprefix(f"{self.reason}: ")
        self.errno = said.errno
        self.errno_name = said.errno_name
        self.field = said.field
        self.page = said.page
        self.state = said.state
        self.rule = said.rule
        self.holders = [Holder(h.name, h.purpose, h.count, h.longterm) for h in said.holders]
        self.remedy = said.remedy
        self.vendor_status = said.vendor_status
        self.vendor_value = _unwrap(said.vendor_value)
        self.progress_pages = said.progress_pages if said.HasField("progress_pages") else None
        self.error_offset_bytes = (
            said.error_offset_bytes if said.HasField("error_offset_bytes") else None
        )
        self.where = said.where
        self.revision = said.revision
        self.correlation_id = correlation_id
        super().__init__(self.message)

    def __str__(self) -> str:
        errno_name = f" ({self.errno_name})" if self.errno_name else ""
        text = f"{self.reason}{errno_name}: {self.message.rstrip('.')}"
        named = [f"{label} {value}" for label, value in self.facts() if label != "held by"]
        if self.holders:
            named.append("held by " + " and ".join(map(str, self.holders)))
        if named:
            text += ": " + "; ".join(named)
        return f"{text}. {self.remedy}".rstrip()

    def facts(self) -> list[tuple[str, str]]:
        """Return what the daemon named, as (label, text), one pair per holder, the remedy not."""
        facts = [
            ("field", self.field),
            ("page", self.page),
            ("state", self.state),
            ("rule", self.rule),
            *(("held by", str(holder)) for holder in self.holders),
            ("vendor status", self._vendor_text()),
            ("said by", self.where),
            ("done before", _pages(self.progress_pages)),
            ("at offset", _hex(self.error_offset_bytes)),
            ("log id", self.correlation_id),
        ]
        return [(label, text) for label, text in facts if text]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; what does not apply is empty or None."""
        return {
            "reason": self.reason,
            "message": self.message,
            "code": self.code.name,
            "errno": self.errno,
            "errno_name": self.errno_name,
            "field": self.field,
            "page": self.page,
            "state": self.state,
            "rule": self.rule,
            "holders": [asdict(holder) for holder in self.holders],
            "remedy": self.remedy,
            "vendor_status": self.vendor_status,
            "vendor_value": self.vendor_value,
            "progress_pages": self.progress_pages,
            "error_offset_bytes": self.error_offset_bytes,
            "where": self.where,
            "revision": self.revision,
            "correlation_id": self.correlation_id,
        }

    def add_progress(self, npages: int) -> None:
        """Count pages that earlier calls of a split request have done."""
        if npages:
            self.progress_pages = (self.progress_pages or 0) + npages

    def add_remark(self, sentence: str) -> None:
        """Put what only this side knows before the remedy."""
        self.remedy = f"{sentence} {self.remedy}".rstrip()

    def _vendor_text(self) -> str:
        if not self.vendor_status:
            return _hex(self.vendor_value or None)
        return self.vendor_status + (f" ({_hex(self.vendor_value)})" if self.vendor_value else "")


class InvalidArgument(RmemError):
    """The request itself is wrong; ``field`` names the field."""


class NotFound(RmemError):
    """No such object, or not yours: the two look the same."""


class AlreadyExists(RmemError):
    """The name or the range is taken."""


class Denied(RmemError):
    """The caller's role does not allow it, or the caller is not known."""


class Exhausted(RmemError):
    """No frames, quota or table space left, or a message too big."""


class FailedPrecondition(RmemError):
    """Not in this state, or not with this consumer: one of the two classes below."""


class Refused(FailedPrecondition):
    """Asked and declined: the state does not allow it."""


class Unsupported(FailedPrecondition):
    """The consumer has a NULL op there, or the object lacks the operation."""


class Busy(RmemError):
    """Held by somebody who will let go, whom ``holders`` names: try again."""


class OutOfRange(RmemError):
    """The position asked for is gone or not there yet."""


class Poisoned(RmemError):
    """The frame's content is lost."""


class MemoryLost(RmemError):
    """The daemon that this client knew has ended with all memory; who answers is another one."""


class Restarted(RmemError):
    """The daemon was started again while a long job ran; what that had done stands."""


class PluginFault(RmemError):
    """A plugin, or the daemon, raised or answered nonsense; the transaction was undone."""


class Unavailable(RmemError):
    """The daemon answers, but cannot serve this now."""


class DeadlineExceeded(RmemError):
    """No answer in time; the daemon may or may not have done it."""


class Cancelled(RmemError):
    """The call was cancelled, by this side or by a daemon that shuts down."""


class NotServed(RmemError):
    """The daemon is older than this client and lacks the call."""


class DaemonUnreachable(RmemError):
    """Nobody answers there, or the connection was lost during the call and did not come back.

    Attributes:
        socket: the path that was tried; over TCP, "host:port".
    """

    def __init__(self, address: Address, what: str = "") -> None:
        problem, remedy = address.why_unreachable()
        super().__init__(
            f"cannot reach rmemd at {address.text}: {what or problem}",
            code=grpc.StatusCode.UNAVAILABLE,
            reason="DAEMON_UNREACHABLE",
            refusal=types_pb2.Refusal(remedy=remedy),
        )
        self.socket = Path(address.text)


_CLASSES: dict[grpc.StatusCode, type[RmemError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: Denied,
    grpc.StatusCode.UNAUTHENTICATED: Denied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.FAILED_PRECONDITION: Refused,
    grpc.StatusCode.ABORTED: Busy,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.DATA_LOSS: Poisoned,
    grpc.StatusCode.INTERNAL: PluginFault,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNIMPLEMENTED: NotServed,
}


_BY_REASON: dict[str, type[RmemError]] = {
    "MEMORY_LOST": MemoryLost,
    "DAEMON_RESTARTED": Restarted,
}


def decode(error: grpc.RpcError, address: Address) -> RmemError:
    """Return the typed error for a call to ``address`` that gRPC says has failed."""
    code: grpc.StatusCode = error.code()
    status = _status(error)
    info = _detail(status, error_details_pb2.ErrorInfo())
    refusal = _detail(status, types_pb2.Refusal())
    if info is None and refusal is None and _never_arrived(code, address):
        return DaemonUnreachable(address)
    return _typed(code, error.details() or "", info, refusal)


def decode_status(status: status_pb2.Status) -> RmemError:
    """Return the typed error for a status that a message carries, as a long job's does."""
    info = _detail(status, error_details_pb2.ErrorInfo())
    return _typed(_code(status.code), status.message, info, _detail(status, types_pb2.Refusal()))


def decode_session_refusal(message: session_pb2.SessionRefusal) -> RmemError:
    """Return the typed error for a record that the session socket refused."""
    return _typed(_code(message.code), message.message, None, message.refusal)


def _code(number: int) -> grpc.StatusCode:
    return next((c for c in grpc.StatusCode if c.value[0] == number), grpc.StatusCode.UNKNOWN)


def _typed(
    code: grpc.StatusCode,
    message: str,
    info: error_details_pb2.ErrorInfo | None,
    refusal: types_pb2.Refusal | None,
) -> RmemError:
    said = info if info is not None and info.domain == DOMAIN else error_details_pb2.ErrorInfo()
    return _class(code, refusal)(
        message or code.name.lower().replace("_", " "),
        code=code,
        reason=said.reason,
        refusal=refusal,
        correlation_id=said.metadata.get("correlation_id", ""),
    )


def is_lost(error: grpc.RpcError) -> bool:
    """Say whether nobody is there: gRPC itself says so, or a daemon that makes way for another."""
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    return _status(error) is None or makes_way(error)


def makes_way(error: grpc.RpcError) -> bool:
    """Say whether a daemon was there, and says that it makes way for another."""
    info = _detail(_status(error), error_details_pb2.ErrorInfo())
    return info is not None and info.reason == MAKES_WAY


def sent_again(error: RmemError) -> RmemError:
    """Have an error say that its call was sent again, after the connection was lost."""
    if isinstance(error, DaemonUnreachable):
        error.add_remark("The connection was lost; whether the call was carried out is not known.")
    else:
        error.add_remark(
            "The connection was lost, and the call was sent again: "
            "a daemon that was started anew in between has none of the old objects."
        )
    return error


def _never_arrived(code: grpc.StatusCode, address: Address) -> bool:
    """Say whether gRPC itself, and no daemon, gave this code."""
    if code is grpc.StatusCode.UNAVAILABLE:
        return True
    # for a path that is too long, gRPC makes a channel on which every call is UNKNOWN
    return address.socket is not None and path_bytes(address.socket) > MAX_SOCKET_PATH_BYTES


def _class(code: grpc.StatusCode, refusal: types_pb2.Refusal | None) -> type[RmemError]:
    found = _BY_REASON.get(refusal.reason if refusal is not None else "")
    found = found or _CLASSES.get(code, RmemError)
    if found is Refused and refusal is not None and refusal.errno_name in UNSUPPORTED_ERRNOS:
        return Unsupported
    return found


def _status(error: grpc.RpcError) -> status_pb2.Status | None:
    try:
        found: status_pb2.Status | None = rpc_status.from_call(error)  # type: ignore[arg-type]
        return found
    except (ValueError, DecodeError):  # details that contradict the status are no details
        return None


def _detail(status: status_pb2.Status | None, empty: _Detail) -> _Detail | None:
    """Return the status's detail of ``empty``'s type, ``None`` without one."""
    for packed in status.details if status is not None else ():
        if packed.Unpack(empty):
            return empty
    return None


def _unwrap(value: int) -> int:
    """Undo int64's wrapping of a 64-bit status; errnos stay negative, as in IS_ERR_VALUE()."""
    return value & (1 << 64) - 1 if value < -4095 else value


def _hex(value: int | None) -> str:
    return "" if value is None else f"{value:#x}" if value >= 0 else str(value)


def _pages(npages: int | None) -> str:
    return "" if npages is None else f"{npages} page{'' if npages == 1 else 's'}"
