"""The floor of a start: a gRPC server that imports the packages that rmemd imports, and no more.

Owns their list, which a test compares with what a daemon that serves has imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor

PACKAGES = (
    "click", "msgspec", "structlog", "pluggy", "numpy", "cryptography.hazmat.primitives.ciphers",
    "grpc", "grpc_health.v1.health", "grpc_reflection.v1alpha.reflection", "grpc_status.rpc_status",
    "google.longrunning.operations_pb2", "google.rpc.error_details_pb2",
    *(f"rmem.v1.{name}_pb2" for name in (
        "consumer", "file", "host", "job", "session", "trace", "vcpu", "vm", "watch",
    )),
)  # fmt: skip
# structlog imports it where a client has brought it along, as none has where the daemon is alone
NOT_THERE = "rich"


def main(path: str, ready_fd: int) -> None:
    """Serve /bare.Bare/Empty on a Unix socket until the standard input ends."""
    sys.modules[NOT_THERE] = None  # type: ignore[assignment]
    for name in PACKAGES:
        importlib.import_module(name)
    import grpc

    server = grpc.server(ThreadPoolExecutor(8))
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Empty": grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", methods),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    os.write(ready_fd, b"\n")
    os.close(ready_fd)
    sys.stdin.read()
    server.stop(None).wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
