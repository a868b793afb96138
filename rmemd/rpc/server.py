"""The gRPC server: its limits, its services, health and reflection.

Owns the settings; each has its reason in reliability.md §6. Ports are added before start, and
health says SERVING only after.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rmem.v1 import consumer_pb2, file_pb2, host_pb2, vcpu_pb2, vm_pb2, watch_pb2
from rmemd.engine.engine import Engine
from rmemd.rpc.consumers import ConsumerService
from rmemd.rpc.dispatch import BULK_BYTES, add_service
from rmemd.rpc.files import FileService
from rmemd.rpc.host import HostService
from rmemd.rpc.vcpus import VcpuService
from rmemd.rpc.vms import VmService
from rmemd.rpc.watch import WatchService

# a vCPU that runs occupies a worker, as KVM_RUN occupies a thread
WORKERS = 64
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_concurrent_streams", 64),
    ("grpc.max_receive_message_length", BULK_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 16384),
    # A dead peer's Unix socket ends at once, so pings are for frozen peers only; with timeouts of
    # a second a machine under load loses live clients (measured at load 9).
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.ping_timeout_ms", 10000),
    ("grpc.server_handshake_timeout_ms", 3000),
    ("grpc.max_connection_idle_ms", 300000),
    ("grpc.max_allowed_incoming_connections", 256),
    ("grpc.so_reuseport", 0),
)


class RpcServer:
    """The services of one engine on one address."""

    def __init__(self, engine: Engine, version: str) -> None:
        self._engine = engine
        self._server = grpc.server(
            ThreadPoolExecutor(WORKERS, thread_name_prefix="rpc"),
            options=OPTIONS, maximum_concurrent_rpcs=WORKERS,
        )  # fmt: skip
        self._health = health.HealthServicer()
        self._names = self._add_services(version)

    def bind(self, address: str) -> None:
        """Bind an address ("unix:/path").

        Raises:
            RuntimeError: it cannot be bound.
        """
        self._server.add_insecure_port(address)

    def start(self) -> None:
        """Serve, then say so."""
        self._server.start()
        for name in ("", *self._names):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def drain(self, grace_seconds: float) -> None:
        """Say NOT_SERVING, have running vCPUs exit, wait for calls in flight, stop."""
        self._health.enter_graceful_shutdown()
        self._engine.drain()
        self._server.stop(grace_seconds).wait()

    def _add_services(self, version: str) -> list[str]:
        engine = self._engine
        services = (
            (host_pb2, "HostService", HostService(engine, version)),
            (file_pb2, "FileService", FileService(engine)),
            (vm_pb2, "VmService", VmService(engine)),
            (vcpu_pb2, "VcpuService", VcpuService(engine)),
            (consumer_pb2, "ConsumerService", ConsumerService(engine)),
            (watch_pb2, "WatchService", WatchService(engine)),
        )
        names = []
        for module, name, service in services:
            descriptor = module.DESCRIPTOR.services_by_name[name]
            add_service(self._server, engine, descriptor, service)
            names.append(descriptor.full_name)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        return names
