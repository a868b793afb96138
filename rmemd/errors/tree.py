"""The exception tree of refusals, and what one says.

Owns ``Reason`` (what went wrong, as a constant that knows its errno, cause and remedy), the
exceptions that carry one, one class a ``Kind``, and their ``Details``. Use them from
``rmemd.errors``.
"""

from __future__ import annotations

import errno as errno_names
from enum import Enum
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

# numbers that Python's errno module lacks or spells by an alias
NUMBERS = {"EHWPOISON": 133}
_NAMES = {133: "EHWPOISON", 95: "EOPNOTSUPP"}


def errno_name(number: int) -> str:
    """Return an errno's spelling as the kernel's, "" for 0."""
    return _NAMES.get(number) or errno_names.errorcode.get(number, "")


class Kind(Enum):
    """What sort of refusal a reason is; the value is the google.rpc.Code name it maps to."""

    INVALID = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    EXISTS = "ALREADY_EXISTS"
    DENIED = "PERMISSION_DENIED"
    EXHAUSTED = "RESOURCE_EXHAUSTED"
    REFUSED = "FAILED_PRECONDITION"
    UNSUPPORTED = "FAILED_PRECONDITION "
    BUSY = "ABORTED"
    ABORTED = "ABORTED "
    RANGE = "OUT_OF_RANGE"
    POISON = "DATA_LOSS"
    PLUGIN = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    UNKNOWN_CALLER = "UNAUTHENTICATED"
    CANCELLED = "CANCELLED"

    @property
    def code(self) -> str:
        """Return the google.rpc.Code name, which some kinds share."""
        return self.value.strip()


class Holder(Struct, frozen=True):
    """Somebody who holds references: ``name`` ("vm/3"), ``purpose`` ("secure EPT"), how many.

    ``longterm`` says that they are long-term pins, each of which counts as 1024 references.
    """

    name: str
    purpose: str
    count: int
    longterm: bool = False

    def __str__(self) -> str:
        what = "pins" if self.longterm else "references"
        return f"{self.name} ({self.purpose}, {what}: {self.count})"


class Details(Struct, frozen=True):
    """What a refusal names besides its reason; empty strings and ``None`` mean "does not apply".

    Attributes:
        field: the request field at fault (INVALID_ARGUMENT only).
        page: the page, with its kind: "gfn 0x42", "pgoff 7", "pfn 0x1000".
        state: the state that the page, VM or frame was found in.
        rule: the rule that was applied, with its reference section.
        holders: who keeps the page, when that is why.
        vendor_status: the vendor's own status, spelt as the vendor spells it.
        vendor_value: the same as a number (a 64-bit SEAMCALL status, a firmware code, an errno).
        progress_pages: pages done before the refusal, for operations that keep a prefix.
        error_offset: byte offset in the file that the refusal is about (in-place conversion).
        where: the plugin and hook that refused or failed, "tdx(vm/3).map".
        for_log: what only the daemon's log is told, and never the caller.
    """

    field: str = ""
    page: str = ""
    state: str = ""
    rule: str = ""
    holders: tuple[Holder, ...] = ()
    vendor_status: str = ""
    vendor_value: int | None = None
    progress_pages: int | None = None
    error_offset: int | None = None
    where: str = ""
    for_log: str = ""


class Reason(Struct, frozen=True):
    """A named reason for refusing: constant, documented, with the kernel's errno where it has one.

    Attributes:
        name: UPPER_SNAKE, unique in the catalogue.
        kind: which sort of refusal.
        errno: the kernel's positive errno number, 0 where it has none.
        cause: one sentence: when this is said.
        remedy: one sentence: what to try.
        source: where the real thing says it.
    """

    name: str
    kind: Kind
    errno: int
    cause: str
    remedy: str
    source: str = ""

    def __post_init__(self) -> None:
        known = REASONS.setdefault(self.name, self)
        if known != self:
            raise ValueError(f"reason {self.name} is declared twice with different meanings")

    @property
    def errno_name(self) -> str:
        """Return the errno's spelling, "" where there is none."""
        return errno_name(self.errno)

    def __call__(self, message: str, *, errno: int | None = None, **details: Any) -> RmemError:
        """Build the exception: ``message`` says what and where, ``details`` as in Details."""
        return _CLASSES[self.kind](
            self,
            message,
            Details(**details),
            self.errno if errno is None else errno,
        )


REASONS: dict[str, Reason] = {}


class RmemError(Exception):
    """Root of every refusal. Nothing has changed when one is raised, save a named prefix."""

    def __init__(
        self, reason: Reason, message: str, details: Details | None = None, errno: int = 0
    ) -> None:
        super().__init__(reason, message, details, errno)
        self.reason = reason
        self.message = message
        self.details = details or Details()
        self.errno = errno

    def __str__(self) -> str:
        text = f"{self.reason.name}: {self.message}"
        if self.details.holders:
            text += "; held by " + ", ".join(map(str, self.details.holders))
        return text

    @property
    def errno_name(self) -> str:
        """Return the errno's spelling, "" where there is none."""
        return errno_name(self.errno)

    def with_details(self, **changes: Any) -> RmemError:
        """Return the same refusal with some details added or replaced."""
        details = replace(self.details, **changes)
        return type(self)(self.reason, self.message, details, self.errno)


class InvalidArgument(RmemError):
    """The request itself is wrong; ``details.field`` names the field."""


class NotFound(RmemError):
    """No such object, or not yours: the two look the same."""


class AlreadyExists(RmemError):
    """The name or the range is taken."""


class Denied(RmemError):
    """The caller's role does not allow it."""


class Exhausted(RmemError):
    """No frames, quota or table space left."""


class Refused(RmemError):
    """Asked and declined: the state does not allow it."""


class Unsupported(RmemError):
    """The consumer has a NULL op there."""


class Busy(RmemError):
    """Held by somebody who will let go: try again."""


class OutOfRange(RmemError):
    """The position asked for is gone or not there yet."""


class Poisoned(RmemError):
    """The frame's content is lost."""


class Aborted(RmemError):
    """Ended half-way by the daemon's own end; what was done before stays."""


class PluginFault(RmemError):
    """A plugin raised or answered nonsense; the transaction was undone."""


class Unavailable(RmemError):
    """The daemon cannot serve this now."""


class Unauthenticated(RmemError):
    """Nobody knows who calls: no token, or one that is not good here."""


class Cancelled(RmemError):
    """Stopped because somebody asked for it; what was done before stays."""


_CLASSES: dict[Kind, type[RmemError]] = {
    Kind.INVALID: InvalidArgument, Kind.NOT_FOUND: NotFound, Kind.EXISTS: AlreadyExists,
    Kind.DENIED: Denied, Kind.EXHAUSTED: Exhausted, Kind.REFUSED: Refused,
    Kind.UNSUPPORTED: Unsupported, Kind.BUSY: Busy, Kind.RANGE: OutOfRange,
    Kind.POISON: Poisoned, Kind.PLUGIN: PluginFault, Kind.UNAVAILABLE: Unavailable,
    Kind.UNKNOWN_CALLER: Unauthenticated, Kind.CANCELLED: Cancelled,
    Kind.ABORTED: Aborted,
}  # fmt: skip
