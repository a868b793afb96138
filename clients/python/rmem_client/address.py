"""Where the daemon is and how one gets there: a Unix socket, or TCP with mutual TLS.

Owns addresses, the environment variables that name them, and the channel's options. Both halves
of this library (``connection.py`` here and under ``aio``) build their channels from ``Address``.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc

from rmem.v1 import types_pb2

from .errors import InvalidArgument
from .paths import SOCKET_NAME, default_socket_dir, grpc_target, why_unreachable

Token: TypeAlias = str | Callable[[], str]

_OPTIONS = (
    # a daemon that has just been started is found at once, not after gRPC's second
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # two clients in one process share neither connection nor backoff
    ("grpc.use_local_subchannel_pool", 1),
)
# A peer that was frozen or cut off says nothing: without pings TCP finds out after a minute.
# Shorter times would take a machine under load for a dead one.
_TCP_OPTIONS = (
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.http2.ping_timeout_ms", 10000),
    ("grpc.keepalive_permit_without_calls", 1),
    # a watch may have no news for hours
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True)
class Tls:
    """What mutual TLS needs: paths of PEM files.

    Attributes:
        ca: certificates that the daemon's is checked against.
        certificate: this client's certificate, which names its tenant by a SPIFFE id.
        key: the certificate's private key.
        server_name: name to expect in the daemon's certificate, if not the address's.
    """

    ca: str | Path
    certificate: str | Path
    key: str | Path
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials; raises InvalidArgument for a file that cannot be read."""
        try:
            ca, key, certificate = (
                Path(path).read_bytes() for path in (self.ca, self.key, self.certificate)
            )
        except OSError as error:
            raise _wrong("tls", f"{error.filename}: {error.strerror}") from None
        return grpc.ssl_channel_credentials(ca, key, certificate)


@dataclass(frozen=True)
class Address:
    """One daemon's address.

    Attributes:
        target: as gRPC wants it.
        text: as a person wrote it: a path, or "host:port".
        socket: path of the Unix socket, ``None`` over TCP.
        tls: keys, ``None`` without TLS.
    """

    target: str
    text: str
    socket: Path | None = None
    tls: Tls | None = None

    def options(self) -> list[tuple[str, int | str]]:
        """Return the channel's options."""
        options: list[tuple[str, int | str]] = [*_OPTIONS]
        if self.socket is None:
            options += _TCP_OPTIONS
        if self.tls is not None and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def why_unreachable(self) -> tuple[str, str]:
        """Return what is wrong if nobody answers here, and what to try."""
        if self.socket is not None:
            return why_unreachable(self.socket)
        if self.tls is None:
            return (
                "nobody answers there",
                "Start rmemd with this --tcp address; if it wants TLS, give tls and not insecure.",
            )
        return (
            "nobody answers there, or one side's certificate was refused",
            "Start rmemd with this --tcp address; its log says whose certificate it refused.",
        )


def find_address(
    socket_dir: str | Path | None,
    address: str | None,
    tls: Tls | None,
    insecure: bool,
) -> Address:
    """Return the address that the arguments name, or the environment if they name none.

    ``Client`` documents the arguments.

    Raises:
        InvalidArgument: they contradict each other, or name plain TCP without leave.
    """
    if socket_dir is not None and address is not None:
        raise _wrong("address", "give either socket_dir or address")
    if socket_dir is not None:
        return _unix(Path(socket_dir) / SOCKET_NAME)
    if address is None and not (address := os.environ.get("RMEMD_ADDRESS")):
        return _unix(default_socket_dir() / SOCKET_NAME)
    if address.startswith("unix:"):
        return _unix(Path(address.removeprefix("unix:")))
    return _tcp(address, tls, insecure)


def find_token(token: Token | None) -> Token:
    """Return the token given, or the environment's, or "" for none."""
    return os.environ.get("RMEMD_TOKEN", "") if token is None else token


def _unix(socket: Path) -> Address:
    socket = socket.absolute()
    return Address(grpc_target(socket), str(socket), socket)


def _tcp(address: str, tls: Tls | None, insecure: bool) -> Address:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdecimal()):
        raise _wrong("address", f"{address!r} is neither unix:/path nor host:port")
    if tls is None and not insecure:
        tls = _tls_of_environment()
        insecure = tls is None and os.environ.get("RMEMD_INSECURE") == "1"
    if tls is None and not insecure:
        raise _wrong(
            "tls",
            f"TCP to {address} needs tls (or RMEMD_CA, RMEMD_CERTIFICATE and RMEMD_KEY); "
            "insecure (or RMEMD_INSECURE=1) does without, on loopback only",
        )
    if insecure and tls is not None:
        raise _wrong("insecure", "give either tls or insecure")
    if insecure and not _is_loopback(host.strip("[]")):
        raise _wrong("insecure", f"{address} is not loopback: others could read along")
    return Address(f"dns:///{address}", address, tls=tls)


def _tls_of_environment() -> Tls | None:
    named = [os.environ.get(name) for name in ("RMEMD_CA", "RMEMD_CERTIFICATE", "RMEMD_KEY")]
    if not any(named):
        return None
    ca, certificate, key = named
    if not (ca and certificate and key):
        raise _wrong("tls", "RMEMD_CA, RMEMD_CERTIFICATE and RMEMD_KEY go together")
    return Tls(ca, certificate, key)


def _wrong(field: str, message: str) -> InvalidArgument:
    return InvalidArgument(
        message,
        code=grpc.StatusCode.INVALID_ARGUMENT,
        reason="BAD_ADDRESS",
        refusal=types_pb2.Refusal(
            field=field, remedy="Correct the argument, or the RMEMD_* variable of that name."
        ),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
