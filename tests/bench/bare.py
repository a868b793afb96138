"""The floor of a unary call: a gRPC server whose only method answers nothing."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc


def main(path: str, ready_fd: int) -> None:
    """Serve /bare.Bare/Empty on a Unix socket until the parent goes away."""
    server = grpc.server(ThreadPoolExecutor(8))
    empty = grpc.unary_unary_rpc_method_handler(lambda request, context: b"", None, None)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bare.Bare", {"Empty": empty}),)
    )
    server.add_insecure_port(f"unix:{path}")
    server.start()
    os.write(ready_fd, b"\n")
    os.close(ready_fd)
    sys.stdin.read()
    server.stop(None).wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
