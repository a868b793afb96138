"""The floors of a round trip: servers that do nothing but answer.

Owns gRPC servers whose methods answer nothing or what they got, and a Python SEQPACKET echo.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

LARGEST_DATAGRAM = 1 << 18


def serve_grpc(path: str, ready_fd: int) -> None:
    """Serve /bare.Bare/Empty, Echo and EchoStream on a Unix socket."""
    server = grpc.server(ThreadPoolExecutor(8))
    methods = {
        "Empty": grpc.unary_unary_rpc_method_handler(lambda request, context: b""),
        "Echo": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
        "EchoStream": grpc.stream_stream_rpc_method_handler(lambda requests, context: requests),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", methods),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    _say_ready(ready_fd)
    sys.stdin.read()
    server.stop(None).wait()


def serve_limits(path: str, ready_fd: int) -> None:
    """Serve Empty with the options and the workers that the daemon has on its Unix socket."""
    from rmemd.rpc.server import COMMON_OPTIONS, UNIX_OPTIONS, WORKERS

    server = grpc.server(
        ThreadPoolExecutor(WORKERS), options=(*COMMON_OPTIONS, *UNIX_OPTIONS),
        maximum_concurrent_rpcs=WORKERS,
    )  # fmt: skip
    empty = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bare.Bare", {"Empty": empty}),)
    )
    server.add_insecure_port(f"unix:{path}")
    server.start()
    _say_ready(ready_fd)
    sys.stdin.read()
    server.stop(None).wait()


def serve_aio(path: str, ready_fd: int) -> None:
    """Serve Empty by asyncio."""
    asyncio.run(_serve_aio(path, ready_fd))


async def _serve_aio(path: str, ready_fd: int) -> None:
    async def empty(request: bytes, context: object) -> bytes:
        return b""

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(empty)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bare.Bare", {"Empty": handler}),)
    )
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    _say_ready(ready_fd)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


def serve_echo(path: str, ready_fd: int) -> None:
    """Echo every datagram of every connection, a thread each."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    _say_ready(ready_fd)
    sys.stdin.read()


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    while datagram := connection.recv(LARGEST_DATAGRAM):
        connection.send(datagram)


def _say_ready(ready_fd: int) -> None:
    os.write(ready_fd, b"\n")
    os.close(ready_fd)


SERVERS = {
    "grpc": serve_grpc, "limits": serve_limits, "aio": serve_aio, "echo": serve_echo,
}  # fmt: skip

if __name__ == "__main__":
    SERVERS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
