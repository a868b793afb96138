"""Goal 3: round trips on the session socket, beside a bare echo and beside gRPC.

Owns what a round trip is here: one record there and its result back, with the journal, the ledger
and metrics on, as a daemon is run. The echo sends a datagram of the request's size to a Python
process and back; beside gRPC it says what of the bar there a socket alone takes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from rmem_client.session import Session
from rmem_client.sessionwire import FRAME, RECORD
from tests.bench.harness import (
    ROUNDS,
    Figure,
    LeftOut,
    bare_echo,
    bare_grpc,
    on_cpus,
    paired,
    rmemd,
)

PAGE = 4096
# of gRPC's Empty: one core does nothing but the work, two also wake each other
BARS = {1: 1 / 20, 2: 1 / 6}
ECHO_BAR = 2.0
# records that one datagram carries, and how often in a round
MANY = 64
ROUND_TRIPS, FEW = 400, 60


def figures(folder: Path, quick: bool) -> Iterator[Figure | LeftOut]:
    """Yield goal 3, with both ends on one core and on two."""
    rounds = 3 if quick else ROUNDS
    for cores in BARS:
        try:
            with on_cpus(cores):
                yield from _on(folder / str(cores), cores, rounds)
        except LeftOut as left:
            yield left


def _on(folder: Path, cores: int, rounds: int) -> Iterator[Figure]:
    folder.mkdir()
    with ExitStack() as stack:
        daemon = stack.enter_context(rmemd(folder, "--set", "metrics.listen=127.0.0.1:0"))
        ours = stack.enter_context(Session.open(daemon.socket_dir))
        echo = stack.enter_context(bare_echo(folder))
        empty = stack.enter_context(bare_grpc(folder)).unary_unary("/bare.Bare/Empty")
        with ours.client() as client:
            vm = client.vms.create("sw-protected")
        made = stack.enter_context(ours.create(vm, MANY * PAGE))
        # every page is there
        ours.unpin(ours.pin(made.file, 0, MANY * PAGE))
        where = f"{cores} core{'s' * (cores > 1)}"
        for name, per, work in _round_trips(ours, made.file):
            yield paired(
                f"3 {name} / SEQPACKET echo, {where}",
                lambda work=work: _repeat(work, ROUND_TRIPS),
                lambda per=per: _echo(echo, per * ROUND_TRIPS),
                per=per * ROUND_TRIPS, bar=ECHO_BAR, rounds=rounds,
            )  # fmt: skip
        for name, per, work in _round_trips(ours, made.file):
            yield paired(
                f"3 {name} / unary Empty, {where}",
                lambda work=work, per=per: _repeat(work, FEW // per),
                lambda: _repeat(lambda: empty(b""), FEW),
                per=FEW, bar=BARS[cores], rounds=rounds,
            )  # fmt: skip
        yield paired(
            f"3 SEQPACKET echo / unary Empty, {where}",
            lambda: _echo(echo, ROUND_TRIPS),
            lambda: _repeat(lambda: empty(b""), ROUND_TRIPS),
            per=ROUND_TRIPS, rounds=rounds,
        )  # fmt: skip
        yield paired(
            f"3 {MANY} pins and releases in two datagrams / as many echoes, {where}",
            lambda: _repeat(lambda: _many(ours, made.file), 8),
            lambda: _echo(echo, 2 * MANY * 8),
            per=2 * MANY * 8, rounds=rounds,
        )  # fmt: skip


def _round_trips(ours: Session, file: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Yield names of what is measured, its round trips, and what makes them."""
    yield "pin, release", 2, lambda: ours.unpin(ours.pin(file, 0, PAGE))
    yield "get, put", 2, lambda: ours.put(ours.get(file, 0, PAGE))
    yield "read", 1, lambda: ours.read_shared(file, 0, 8)


def _many(ours: Session, file: int) -> None:
    with ours.batch() as batch:
        pins = [batch.pin(file, page * PAGE, PAGE) for page in range(MANY)]
    with ours.batch() as batch:
        for pin in pins:
            batch.unpin(pin.result())


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def _echo(echo: socket.socket, times: int) -> None:
    datagram = bytes(FRAME.size + RECORD.size)
    for _ in range(times):
        echo.send(datagram)
        echo.recv(1 << 18)
