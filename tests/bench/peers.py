"""Goals 5 to 7: objects that are made, written, read and let go, beside what else there is.

Each peer is driven by its own Python client, in a process of its own, on the same cores as ours and
in turn with it. The same bytes are written, and the memory is given back, by everybody.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rmem_client.constants import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from rmem_client.session import Session
from tests.bench.harness import ROUNDS, Figure, LeftOut, in_turn, on_cpus, paired, rmemd, timed
from tests.bench.peerservers import PLASMA, QMP, VINEYARD, Kind, serving

SMALL, LARGE = 4096, 256 << 20
MAPPABLE = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED


@dataclass(frozen=True)
class Case:
    """What is done beside peers.

    Attributes:
        goal: its goal's number and name.
        cores: on how many it runs, both ends together.
        size: of an object, in bytes.
        cycles: objects a round.
        bars: the most of each peer's time that ours may take; ``None``: it is shown.
        memory: of which memory ours are: what ``Session.create`` is told.
    """

    goal: str
    cores: int
    size: int
    cycles: int
    bars: Mapping[Kind, float | None]
    memory: Mapping[str, bool]

    @property
    def unit(self) -> str:
        """Return what it is shown in."""
        return "us/op" if self.size == SMALL else "ms/op"


# who writes all of an object need not have it emptied, which no peer does
RECYCLED, EMPTIED, FRESH = {"zeroed": False}, {"zeroed": True}, {"keep": False}
SHOWN = {PLASMA: None, VINEYARD: None}
CASES = (
    Case("5 4 KiB create, use, release, one core", 1, SMALL, 200,
         {PLASMA: 0.35, VINEYARD: 0.25, QMP: 0.1}, RECYCLED),
    Case("5 4 KiB create, use, release, two cores", 2, SMALL, 200, {PLASMA: 0.7}, RECYCLED),
    Case("6 256 MiB create, write, get, release, recycled", 1, LARGE, 1,
         {PLASMA: 0.65, VINEYARD: 1.15}, RECYCLED),
    Case("6 256 MiB create, write, get, release, recycled and emptied", 1, LARGE, 1,
         SHOWN, EMPTIED),
    Case("6 256 MiB create, write, get, release, fresh", 1, LARGE, 1,
         SHOWN, FRESH),
)  # fmt: skip


def figures(folder: Path, quick: bool) -> Iterator[Figure | LeftOut]:
    """Yield goals 5, 6 and 7."""
    there = []
    for kind in (PLASMA, VINEYARD, QMP):
        if why := kind.why_not():
            yield LeftOut(kind.name, why)
        else:
            there.append(kind)
    for case in CASES:
        try:
            with (
                on_cpus(case.cores),
                session(folder) as ours,
                objects(ours, case.size, case.memory) as cycle,
            ):
                for kind in (kind for kind in there if kind in case.bars):
                    yield beside(kind, folder, cycle, case, 3 if quick else ROUNDS)
        except LeftOut as left:
            yield left
    with on_cpus(1):
        yield from bytes_through_a_descriptor(folder, LARGE)


def beside(
    kind: Kind, folder: Path, cycle: Callable[[bytes], None], case: Case, rounds: int
) -> Figure | LeftOut:
    """Return the figure of our objects and a peer's."""
    data = os.urandom(4096) * (case.size // 4096)
    try:
        with serving(kind, folder) as peer:
            return in_turn(
                f"{case.goal} / {kind.name}",
                timed(lambda: [cycle(data) for _ in range(case.cycles)]),
                partial(peer.round, case.size, case.cycles),
                per=case.cycles, bar=case.bars[kind], rounds=rounds, unit=case.unit,
            )  # fmt: skip
    except LeftOut as left:
        return left


@contextmanager
def objects(
    ours: Session, size: int, memory: Mapping[str, bool]
) -> Iterator[Callable[[bytes], None]]:
    """Yield what makes an object of some memory, writes and reads it, and lets it go."""
    with ours.client() as client:
        vm = client.vms.create("sw-protected")

        def cycle(data: bytes) -> None:
            with ours.create(vm, size, **memory) as made:
                made.view[:] = data
                assert made.view[0] == data[0]

        yield cycle


def bytes_through_a_descriptor(folder: Path, size: int) -> Iterator[Figure]:
    """Goal 7: the mapping of a passed descriptor, against one of our own, of pages as large."""
    source = os.urandom(4096) * (size // 4096)
    own = memoryview(mmap.mmap(-1, size))

    def copy(to: memoryview) -> None:
        for _ in range(4):
            to[:] = source

    with session(folder) as ours, ours.client() as client:
        file = client.files.create(client.vms.create("sw-protected"), size, flags=MAPPABLE)
        with ours.shared_memory(file) as memory:
            yield paired(
                "7 bytes written through a passed fd / memcpy",
                partial(copy, memory.view),
                partial(copy, own),
                per=4 * size,
                bar=0.97,
                rounds=2 * ROUNDS,  # the bar is close to 1
                unit="GB/s",
            )


@contextmanager
def session(folder: Path) -> Iterator[Session]:
    """Open a session with a daemon of its own."""
    with rmemd(folder) as daemon, Session.open(daemon.socket_dir) as ours:
        yield ours
