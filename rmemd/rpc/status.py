"""From a refusal to google.rpc.Status: the one place where errors meet the wire.

Owns the mapping. Every status carries ErrorInfo (domain "rmemd") and our own Refusal; by its kind
also BadRequest, PreconditionFailure, RetryInfo or QuotaFailure, so that generic clients understand.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from msgspec.structs import replace

from rmem.v1 import types_pb2
from rmemd.errors import Holder, Kind, RmemError

DOMAIN = "rmemd"
# A status travels in trailing metadata, of which clients take 8 KiB by default; what a client sent
# and a message quotes must not keep the refusal from arriving. Bytes of UTF-8, and entries.
MESSAGE_MAX = 512
TEXT_MAX = 192
HOLDERS_MAX = 8
# how long a client does well to wait before it tries a busy page again
RETRY_NANOS = 10_000_000


def to_status(refusal: RmemError, revision: int, correlation: str) -> grpc.Status:
    """Return what a handler aborts with."""
    return rpc_status.to_status(status_of(refusal, revision, correlation))


def status_of(refusal: RmemError, revision: int, correlation: str) -> Status:
    """Return a refusal as google.rpc.Status, as a long job's operation carries it too."""
    refusal = _bounded(refusal)
    status = Status(code=code_of(refusal), message=f"{refusal.reason.name}: {refusal.message}")
    for detail in (info(refusal, correlation), refusal_of(refusal, revision), *_by_kind(refusal)):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def code_of(refusal: RmemError) -> int:
    """Return a refusal's google.rpc.Code, which numbers them as gRPC does."""
    number: int = grpc.StatusCode[refusal.reason.kind.code].value[0]
    return number


def refusal_of(refusal: RmemError, revision: int = 0) -> types_pb2.Refusal:
    """Return a refusal as our own message."""
    refusal = _bounded(refusal)
    d = refusal.details
    message = types_pb2.Refusal(
        reason=refusal.reason.name,
        errno=refusal.errno,
        errno_name=refusal.errno_name,
        field=d.field,
        page=d.page,
        state=d.state,
        rule=d.rule,
        remedy=refusal.reason.remedy,
        vendor_status=d.vendor_status,
        # 64-bit statuses have their top bit set: the field carries the same bits, signed
        vendor_value=_signed(d.vendor_value or 0),
        where=d.where,
        revision=revision,
    )
    if d.progress_pages is not None:
        message.progress_pages = d.progress_pages
    if d.error_offset is not None:
        message.error_offset_bytes = d.error_offset
    message.holders.extend(map(holder_of, d.holders))
    return message


def holder_of(holder: Holder) -> types_pb2.Holder:
    """Return a holder as a message."""
    return types_pb2.Holder(
        name=holder.name, purpose=holder.purpose, count=holder.count, longterm=holder.longterm
    )


def info(refusal: RmemError, correlation: str) -> error_details_pb2.ErrorInfo:
    """Return a refusal as ErrorInfo, with what applies as metadata."""
    d = refusal.details
    named = {
        "errno": refusal.errno_name,
        "page": d.page,
        "state": d.state,
        "rule": d.rule,
        "holders": ", ".join(map(str, d.holders)),
        "remedy": refusal.reason.remedy,
        "vendor_status": d.vendor_status,
        "where": d.where,
        "field": d.field,
        "correlation_id": correlation,
    }
    return error_details_pb2.ErrorInfo(
        reason=refusal.reason.name,
        domain=DOMAIN,
        metadata={key: value for key, value in named.items() if value},
    )


def _by_kind(refusal: RmemError) -> list[Message]:
    kind, d = refusal.reason.kind, refusal.details
    if kind is Kind.INVALID:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=d.field, description=refusal.message
        )
        return [error_details_pb2.BadRequest(field_violations=[violation])]
    if kind in (Kind.REFUSED, Kind.UNSUPPORTED):
        failure = error_details_pb2.PreconditionFailure.Violation(
            type=refusal.reason.name, subject=d.page or d.where, description=refusal.message
        )
        return [error_details_pb2.PreconditionFailure(violations=[failure])]
    if kind in (Kind.BUSY, Kind.UNAVAILABLE):
        return [error_details_pb2.RetryInfo(retry_delay=Duration(nanos=RETRY_NANOS))]
    if kind is Kind.EXHAUSTED:
        quota = error_details_pb2.QuotaFailure.Violation(
            subject=d.where or "host", description=refusal.message
        )
        return [error_details_pb2.QuotaFailure(violations=[quota])]
    return []


def shorten(text: str, limit: int = MESSAGE_MAX) -> str:
    """Return a text, cut where it is longer than ``limit`` bytes."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return text
    return data[: limit - 3].decode(errors="ignore") + "…"


def _bounded(refusal: RmemError) -> RmemError:
    """Return the refusal with every text short enough to travel."""
    d = refusal.details
    texts: dict[str, Any] = {
        name: shorten(getattr(d, name), TEXT_MAX)
        for name in ("field", "page", "state", "rule", "vendor_status", "where")
    }
    holders = tuple(
        replace(h, name=shorten(h.name, TEXT_MAX // 2), purpose=shorten(h.purpose, TEXT_MAX // 2))
        for h in d.holders[:HOLDERS_MAX]
    )
    message = shorten(refusal.message)
    return type(refusal)(
        refusal.reason, message, replace(d, holders=holders, **texts), refusal.errno
    )


def _signed(value: int) -> int:
    value &= 0xFFFF_FFFF_FFFF_FFFF
    return value - (1 << 64) if value >> 63 else value
