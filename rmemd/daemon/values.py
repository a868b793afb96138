"""Values that TOML has no type for: sizes, paths, addresses, tenants.

Owns how each is read; every reader raises ValueError of what it does not take. Cheap to import.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

# everybody who comes over TCP without TLS (rpc.doors, without importing gRPC for it)
LOOPBACK_TENANT = "insecure:loopback"
DOMAIN = r"[a-z0-9._-]{1,255}"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UID_MAX = (1 << 32) - 2
_SEGMENT = r"(?!\.{1,2}(?:/|$))[A-Za-z0-9._-]+"
_SPIFFE = re.compile(rf"spiffe://({DOMAIN})((?:/{_SEGMENT})+)")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})", re.ASCII)


def size_of(value: object) -> int:
    """Return the bytes that ``value`` says: a number, or "16G" (K, M, G, T: powers of 1024).

    Raises:
        ValueError: it says none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = isinstance(value, str) and re.fullmatch(
        r"(\d{1,20})([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE | re.ASCII
    )
    if not match:
        raise ValueError(value)
    return int(match[1]) * _UNITS[match[2].upper()]


def size_text(size_bytes: int) -> str:
    """Return a size as ``size_of`` reads it, in the largest unit that is exact."""
    for unit in "TGMK":
        if size_bytes and size_bytes % _UNITS[unit] == 0:
            return f"{size_bytes // _UNITS[unit]}{unit}"
    return str(size_bytes)


def is_tenant(text: str) -> bool:
    """Return whether a text names a tenant: "uid:N", a SPIFFE id, or LOOPBACK_TENANT."""
    if text == LOOPBACK_TENANT:
        return True
    uid = re.fullmatch(r"uid:(0|[1-9][0-9]{0,9})", text, re.ASCII)
    if uid:
        return int(uid[1]) <= _UID_MAX
    return len(text) <= 2048 and _SPIFFE.fullmatch(text) is not None


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of "host:port"; an IPv6 host stands in brackets, and comes without.

    Raises:
        ValueError: it is no such address.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match[2]) > 0xFFFF:
        raise ValueError(text)
    return match[1].strip("[]"), int(match[2])


def is_loopback(text: str) -> bool:
    """Return whether an address reaches this machine only; a name other than localhost may not."""
    import ipaddress  # only those who listen pay for it

    host = split_address(text)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def path_of(value: object) -> Path | None:
    """Return a path, None for ""; nothing in it that a message could not show."""
    if not isinstance(value, str) or "\0" in value or not value.isprintable():
        raise ValueError(value)
    return Path(value) if value else None


def required_path_of(value: object) -> Path:
    """Return a path."""
    path = path_of(value)
    if path is None:
        raise ValueError(value)
    return path


def text_if(rule: Callable[[str], object]) -> Callable[[object], str]:
    """Return a reader of texts that are empty or that ``rule`` takes."""

    def read(value: object) -> str:
        if not isinstance(value, str) or (value and not rule(value)):
            raise ValueError(value)
        return value

    return read


def tenants_of(value: object) -> tuple[str, ...]:
    """Return a list of tenants."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(value)
    if not all(isinstance(one, str) and is_tenant(one) for one in value):
        raise ValueError(value)
    return tuple(value)


def is_endpoint(text: str) -> bool:
    """Return whether a text is http:// or https:// with host and port."""
    scheme, _, rest = text.partition("://")
    return scheme in ("http", "https") and bool(split_address(rest.rstrip("/")))
