"""A peer's client: a process of its own, run by the interpreter that has the peer's packages.

Imports nothing of ours. It is told "SIZE CYCLES" a line, and answers with the seconds that so many
cycles took: create, write every byte, seal, get, read, release, delete. What is written is made
beforehand.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable

Cycle = Callable[[bytes], None]


def plasma(path: str) -> Cycle:
    """Plasma, of pyarrow 11."""
    warnings.simplefilter("ignore")  # that it is deprecated is why it is the last one
    from pyarrow.plasma import ObjectID, connect

    client = connect(path)

    def cycle(data: bytes) -> None:
        name = ObjectID(os.urandom(20))
        made = client.create(name, len(data))
        memoryview(made).cast("B")[:] = data
        client.seal(name)
        (got,) = client.get_buffers([name])
        assert memoryview(got).cast("B")[0] == data[0]
        del made, got  # the last buffer to go tells the store
        client.delete([name])

    return cycle


def vineyard(path: str) -> Cycle:
    """Vineyard's blobs."""
    from vineyard import connect

    client = connect(path)

    def cycle(data: bytes) -> None:
        writer = client.create_blob(len(data))
        memoryview(writer).cast("B")[:] = data
        name = writer.seal(client).id
        got = client.get_blob(name)
        assert memoryview(got).cast("B")[0] == data[0]
        del writer, got
        client.delete(name)

    return cycle


def qmp(path: str) -> Cycle:
    """QEMU's object-add and object-del of a memfd; "prealloc" stands for the writing of bytes."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    lines = connection.makefile("rb")
    lines.readline()  # the greeting

    def execute(command: str, **arguments: object) -> None:
        told = {"execute": command, "arguments": arguments}
        connection.sendall(json.dumps(told).encode() + b"\n")
        answer = json.loads(lines.readline())
        if "return" not in answer:
            raise RuntimeError(answer)

    def cycle(data: bytes) -> None:
        execute(
            "object-add", id="bench", size=len(data), share=True, prealloc=True,
            **{"qom-type": "memory-backend-memfd"},
        )  # fmt: skip
        execute("object-del", id="bench")

    execute("qmp_capabilities")
    return cycle


CLIENTS = {"plasma": plasma, "vineyard": vineyard, "qmp": qmp}


def main(peer: str, path: str) -> None:
    """Connect, say so, and do rounds until the input ends."""
    cycle = CLIENTS[peer](path)
    print("ready", flush=True)
    data = b""
    for line in sys.stdin:
        size, cycles = map(int, line.split())
        if len(data) != size:
            data = os.urandom(4096) * (size // 4096)
        begun = time.perf_counter()
        for _ in range(cycles):
            cycle(data)
        print(time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
