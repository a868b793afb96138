"""Goal 1: a unary call with everything on, beside an empty method of a bare server.

Owns what such a call is. The goal is about what rmemd adds to a server, so it is taken with a plain
stub, as the floor is; the same call through the client library, and calls that change something and
whose reply is kept before it leaves, stand beside it. One process is a tenth faster than the next
of the same program, by where its memory lies: so there are several of each, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from rmem.v1 import host_pb2, host_pb2_grpc
from rmem_client import Client
from tests.bench.harness import Figure, LeftOut, bare_grpc, on_cpus, paired, rmemd
from tests.daemons import Daemon

PAGE = 4096
FILE_PAGES = 256
SERVERS = 5
# more and shorter rounds than elsewhere: what others do to the machine meanwhile spoils fewer
ROUNDS, CALLS = 25, 40
# with one core nobody is woken on another, and what the daemon adds to the work counts for more
BARS = {2: 1.10, 1: None}
Call = Callable[[], object]


@dataclass(frozen=True)
class _Ours:
    """The calls of one daemon that are measured."""

    get_page: Call
    through_client: Call
    prefault: Call
    convert: Call


def figures(folder: Path, quick: bool) -> Iterator[Figure | LeftOut]:
    """Yield goal 1 on two cores, and on one beside it."""
    rounds = 3 if quick else ROUNDS
    for cores, bar in BARS.items():
        try:
            with on_cpus(cores):
                yield from _on(folder / str(cores), cores, bar, rounds)
        except LeftOut as left:
            yield left


def _on(folder: Path, cores: int, bar: float | None, rounds: int) -> Iterator[Figure]:
    where = f"{cores} core{'s' * (cores > 1)}"
    with ExitStack() as stack:
        ours: list[_Ours] = []
        empties: list[Call] = []
        for number in range(SERVERS):
            own = folder / str(number)
            own.mkdir(parents=True)
            daemon = stack.enter_context(rmemd(own, "--set", "metrics.listen=127.0.0.1:0"))
            ours.append(_calls(daemon, stack))
            empties.append(_empty(stack.enter_context(bare_grpc(own))))
        measured: tuple[tuple[str, list[Call], float | None], ...] = (
            ("1 unary GetPage", [one.get_page for one in ours], bar),
            ("unary GetPage through the client", [one.through_client for one in ours], None),
            ("unary PreFault of a mapped page", [one.prefault for one in ours], None),
            ("unary ConvertFile of a page", [one.convert for one in ours], None),
        )
        for name, mine, most in measured:
            yield paired(
                f"{name} / Empty on a bare server, {where}",
                lambda mine=mine: _each(mine, CALLS),
                lambda: _each(empties, CALLS),
                per=SERVERS * CALLS, bar=most, rounds=rounds,
            )  # fmt: skip


def _each(calls: list[Call], times: int) -> None:
    for call in calls:
        for _ in range(times):
            call()


def _empty(channel: grpc.Channel) -> Call:
    empty = channel.unary_unary("/bare.Bare/Empty")
    return lambda: empty(b"")


def _calls(daemon: Daemon, stack: ExitStack) -> _Ours:
    client: Client = stack.enter_context(Client(daemon.socket_dir))
    nbytes = FILE_PAGES * PAGE
    vm = client.vms.create("sw-protected")
    file = client.files.create(vm, nbytes, flags=1)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=nbytes, file=file)
    client.vms.prefault(vm, 0, nbytes)
    channel = stack.enter_context(grpc.insecure_channel(f"unix:{client.socket}"))
    stub: Any = host_pb2_grpc.HostServiceStub(channel)
    guest = host_pb2.GuestPage(vm=vm, gfn=1)
    request = host_pb2.GetPageRequest(page=host_pb2.PageAddress(guest=guest))
    private = True

    def convert() -> None:
        nonlocal private
        private = not private
        client.files.convert(file, 2 * PAGE, PAGE, private=private)

    return _Ours(
        get_page=lambda: stub.GetPage(request),
        through_client=lambda: client.host.page(vm=vm, gfn=1),
        prefault=lambda: client.vms.prefault(vm, 0, PAGE),
        convert=convert,
    )
