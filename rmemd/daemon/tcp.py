"""The door for remote clients: gRPC over TCP, with mutual TLS or, on the loopback, without.

Owns the credentials. Certificate files are read anew when they change, at the next handshake, so
that they can be rotated while the daemon runs; a new set that cannot be read leaves the old one in
force and is logged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import grpc
import structlog

from rmemd.access.callers import Access
from rmemd.daemon.config import TcpSection
from rmemd.daemon.corelog import CoreLog
from rmemd.rpc.dispatch import Front
from rmemd.rpc.doors import LoopbackDoor, TlsDoor
from rmemd.rpc.server import TCP_OPTIONS, RpcServer, Service

log = structlog.get_logger("rmemd.tcp")
_Stamp = tuple[tuple[int, int, int], ...]


class TcpServer:
    """gRPC on a TCP address, until it is stopped.

    Raises:
        OSError: a certificate file cannot be read.
    """

    def __init__(
        self,
        settings: TcpSection,
        access: Access,
        front: Front,
        services: Sequence[Service],
    ) -> None:
        self._settings = settings
        self._credentials = None if settings.insecure else _Certificates(settings).credentials()
        door = LoopbackDoor(access) if settings.insecure else TlsDoor(access, settings.trust_domain)
        self.rpc = RpcServer(front.behind(door), services, TCP_OPTIONS, reflect=False)
        self._core_log = CoreLog()

    def start(self) -> str:
        """Bind and serve; return the address, with its port.

        Raises:
            RuntimeError: it cannot be bound, or the certificates are none.
        """
        port = self.rpc.bind(self._settings.listen, self._credentials)
        # from here on handshakes are refused, and the core says why
        self._core_log.start()
        self.rpc.start()
        return f"{self._settings.listen.rpartition(':')[0]}:{port}"

    def stop(self, grace_seconds: float) -> None:
        """Wait for calls in flight, stop."""
        self.rpc.stop(grace_seconds)
        self._core_log.close()


class _Certificates:
    """Key, chain and client CA, as they lie in their files."""

    def __init__(self, settings: TcpSection) -> None:
        named = (settings.key, settings.certificate, settings.client_ca)
        self._files = [path for path in named if path is not None]
        self._stamp = _stamp(self._files)
        self._read = _configuration(self._files)

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files; clients must have a certificate too."""
        # None says that nothing changed, which the stubs do not know
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._newest)
        return grpc.dynamic_ssl_server_credentials(
            self._read, fetch, require_client_authentication=True
        )

    def _newest(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the configuration if the files changed since they were read; for gRPC."""
        try:
            stamp = _stamp(self._files)
            if stamp == self._stamp:
                return None
            read = _configuration(self._files)
        except OSError as error:
            log.error("certificates_unreadable", error=str(error))
            return None
        self._stamp = stamp
        log.info("certificates_read", files=[str(path) for path in self._files])
        return read


def _configuration(files: Sequence[Path]) -> grpc.ServerCertificateConfiguration:
    key, chain, ca = (path.read_bytes() for path in files)
    return grpc.ssl_server_certificate_configuration([(key, chain)], ca)


def _stamp(files: Sequence[Path]) -> _Stamp:
    stats = [path.stat() for path in files]
    return tuple((found.st_mtime_ns, found.st_size, found.st_ino) for found in stats)
