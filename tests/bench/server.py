"""How the gRPC server is set up: the choices side by side, as bare servers that answer nothing.

Owns what was chosen among: threads or asyncio, gRPC's own event engine or the switches that
``rmemd.daemon.switches`` sets, the daemon's limits and workers or none. docs/performance.md says
what was decided by them. Nothing here has a bar: a choice that has become the worse one is news
about gRPC, not a fault of the daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc

from rmemd.daemon.switches import MEASURED
from tests.bench.harness import ROUNDS, Figure, bare_grpc, on_cpus, paired

# a server's kind (tests.bench.bare), and its switches: "" leaves gRPC its own
Setup = tuple[str, str]
# threads, with the daemon's limits and workers
THREADS: Setup = ("limits", "")
CHOICES: tuple[tuple[str, Setup, Setup], ...] = (
    ("asyncio / threads", ("aio", ""), THREADS),
    ("asyncio / threads, with the switches", ("aio", MEASURED), ("limits", MEASURED)),
    ("the daemon's switches / gRPC's own", ("limits", MEASURED), THREADS),
    ("the daemon's limits and workers / none, and 8 workers", THREADS, ("grpc", "")),
)
# How many calls are under way at a time, and how many there are in a round. From 48 on, gRPC's own
# protection of a connection against floods sends some away, asyncio or threads.
CALLERS = {1: 240, 32: 1152}
# one process is a tenth faster than the next, by where its memory lies
SERVERS = 3


def figures(folder: Path, quick: bool) -> Iterator[Figure]:
    """Yield each choice, with one caller and with many."""
    rounds, share = (3, 4) if quick else (ROUNDS, 1)
    with on_cpus(2), ExitStack() as stack:
        servers: dict[Setup, list[grpc.Channel]] = {}
        for _, *setups in CHOICES:
            for setup in setups:
                if setup not in servers:
                    servers[setup] = [
                        _server(stack, folder / f"{len(servers)}.{number}", setup)
                        for number in range(SERVERS)
                    ]
        for callers, calls in CALLERS.items():
            for name, one, other in CHOICES:
                yield paired(
                    f"gRPC server: {name}, {callers} at a time",
                    _calling(servers[one], callers, calls // share),
                    _calling(servers[other], callers, calls // share),
                    per=calls // share, rounds=rounds,
                )  # fmt: skip


def _server(stack: ExitStack, folder: Path, setup: Setup) -> grpc.Channel:
    kind, switches = setup
    folder.mkdir()
    return stack.enter_context(bare_grpc(folder, kind, switches))


def _calling(channels: list[grpc.Channel], callers: int, calls: int) -> Callable[[], None]:
    """Return what makes so many calls, so many at a time, to the servers in turn."""
    methods = [channel.unary_unary("/bare.Bare/Empty") for channel in channels]

    def call() -> None:
        for method in methods:
            for _ in range(calls // callers // len(methods)):
                under_way = [method.future(b"") for _ in range(callers - 1)]
                method(b"")
                for one in under_way:
                    one.result()

    return call
