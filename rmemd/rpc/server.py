"""The gRPC servers: their limits, their services, health and reflection.

Owns the settings; each has its reason in reliability.md §6. One server has one door (the Unix
socket, or TCP); the services behind them are the same objects. Ports are added before start, and
health says SERVING only after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.longrunning import operations_pb2
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from rmem.v1 import (
    consumer_pb2,
    file_pb2,
    host_pb2,
    job_pb2,
    session_pb2,
    trace_pb2,
    vcpu_pb2,
    vm_pb2,
    watch_pb2,
)
from rmemd.access.callers import Access
from rmemd.engine.engine import Engine
from rmemd.rpc.consumers import ConsumerService
from rmemd.rpc.dispatch import BULK_BYTES, Front, add_service, few_watches
from rmemd.rpc.files import FileService
from rmemd.rpc.health import HealthServicer
from rmemd.rpc.host import HostService
from rmemd.rpc.jobs import Jobs
from rmemd.rpc.lifecycle import Lifecycle
from rmemd.rpc.operations import JobService, Operations
from rmemd.rpc.sessions import SessionService
from rmemd.rpc.traces import TraceService
from rmemd.rpc.vcpus import VcpuService
from rmemd.rpc.vms import VmService
from rmemd.rpc.watch import WatchService

# a vCPU that runs occupies a worker, as KVM_RUN occupies a thread
WORKERS = 64
COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", BULK_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 16384),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", 3000),
    ("grpc.max_connection_idle_ms", 300000),
    ("grpc.max_allowed_incoming_connections", 256),
    ("grpc.so_reuseport", 0),
)
UNIX_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_concurrent_streams", 64),
    # A dead peer's Unix socket ends at once, so pings are for frozen peers only; with timeouts of
    # a second a machine under load loses live clients (measured at load 9).
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.http2.ping_timeout_ms", 10000),
)
TCP_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_concurrent_streams", 100),
    # nothing but a ping tells that a remote machine is gone
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.ping_timeout_ms", 5000),
    # clients ping every ten seconds, for the same reason; by default that gets them thrown out
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
)
Service = tuple[ServiceDescriptor, object]


def make_services(
    engine: Engine,
    access: Access,
    version: str,
    fds_passed: Callable[[str], int],
    jobs: Jobs,
    lifecycle: Lifecycle | None = None,
) -> list[Service]:
    """Make the services of one engine, for any number of servers."""
    engine.core.parts.append(few_watches)
    made = (
        (host_pb2, HostService(engine, version, lifecycle)),
        (file_pb2, FileService(engine)),
        (vm_pb2, VmService(engine)),
        (vcpu_pb2, VcpuService(engine)),
        (consumer_pb2, ConsumerService(engine)),
        (watch_pb2, WatchService(engine, lifecycle)),
        (trace_pb2, TraceService(engine)),
        (session_pb2, SessionService(engine, access, fds_passed)),
        (job_pb2, JobService(engine, jobs)),
        (operations_pb2, Operations(jobs)),
    )
    return [
        (module.DESCRIPTOR.services_by_name[type(service).__name__], service)
        for module, service in made
    ]


class RpcServer:
    """Services behind one door.

    Args:
        front: what every call passes through.
        services: from ``make_services``.
        options: UNIX_OPTIONS or TCP_OPTIONS.
        reflect: whether it tells strangers what it serves.
    """

    def __init__(
        self,
        front: Front,
        services: Sequence[Service],
        options: tuple[tuple[str, int], ...],
        reflect: bool,
    ) -> None:
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="rpc")
        self._server = grpc.server(
            self._workers, options=(*COMMON_OPTIONS, *options), maximum_concurrent_rpcs=WORKERS
        )
        self._health = HealthServicer()
        self._names = [descriptor.full_name for descriptor, _ in services]
        for descriptor, service in services:
            add_service(self._server, front, descriptor, service)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflect:
            names = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
            # not enable_server_reflection, which looks whether the server is an asyncio one
            servicer = reflection.ReflectionServicer(names)
            add_reflection = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
            add_reflection(servicer, self._server)  # type: ignore[no-untyped-call]

    def bind(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Bind an address ("unix:/path", "127.0.0.1:0") and return its port.

        Raises:
            RuntimeError: it cannot be bound.
        """
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    def start(self, is_healthy: bool = True) -> None:
        """Serve, then say so; one that is not healthy says NOT_SERVING."""
        self._server.start()
        said = health_pb2.HealthCheckResponse
        for name in ("", *self._names):
            self._health.set(name, said.SERVING if is_healthy else said.NOT_SERVING)

    def announce_end(self) -> None:
        """Say NOT_SERVING."""
        self._health.enter_graceful_shutdown()

    def stop(self, grace_seconds: float) -> None:
        """Wait for calls in flight, stop; idle workers are told to end."""
        self._server.stop(grace_seconds).wait()
        self._workers.shutdown(wait=False)
