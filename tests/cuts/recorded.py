"""A long run, and its journal as it was written: every generation of the log, frame by frame.

Owns ``record``. Where frames end is taken from the pen as it writes them, so that what a reader
finds is compared with what was written and not with what another reader finds.
"""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

from acts import INSTALLED, PAGES, act
from guests import Guest
from keeping import Kept, kept_engine

from rmemd.engine.engine import Engine
from rmemd.errors import RmemError
from rmemd.store.log import Checkpoint, Log

# a frame's length and crc, and the byte that says what it is
HEAD = 9
# more have no room beside each other: a vendor's keys are few
GUESTS_MAX = 40
# a checkpoint as soon as the log is longer than this, or never
OFTEN, NEVER = 512 << 10, 1 << 62


@dataclass(frozen=True)
class Generation:
    """One generation of a log, as it was when the next one began.

    Attributes:
        number: its number, from 1.
        content: its memfd's bytes.
        ends: where its frames end, header and closing frame included.
        closed_at: where its closing frame ends.
    """

    number: int
    content: bytes
    ends: tuple[int, ...]
    closed_at: int

    def whole(self, cut: int) -> int:
        """Return how many frames are whole in the first ``cut`` bytes."""
        return bisect_right(self.ends, cut)

    def begin(self, frame: int) -> int:
        """Return where a frame begins."""
        return self.ends[frame - 1] if frame else 0

    def crc_before(self, frame: int) -> int:
        """Return the crc that a frame's goes on from: that of the frame before."""
        if not frame:
            return 0
        return int.from_bytes(self.content[(at := self.begin(frame - 1)) + 4 : at + 8], "little")

    def payload(self, frame: int) -> bytes:
        """Return what the caller of the log gave for a frame."""
        return self.content[self.begin(frame) + HEAD : self.ends[frame]]

    def payloads(self, cut: int) -> list[bytes]:
        """Return the caller's payloads in the first ``cut`` bytes: no header, no closing frame."""
        closing = self.whole(self.closed_at) - 1
        return [self.payload(n) for n in range(1, self.whole(cut)) if n != closing]


@dataclass(frozen=True)
class Recorded:
    """A run's journal.

    Attributes:
        operations: how many were done.
        generations: all of the log, oldest first.
        header: what each of them begins with, as it is read.
    """

    operations: int
    generations: tuple[Generation, ...]
    header: object

    @property
    def nbytes(self) -> int:
        """Return the bytes of all generations."""
        return sum(len(one.content) for one in self.generations)

    @property
    def frames(self) -> int:
        """Return how many frames they have."""
        return sum(len(one.ends) for one in self.generations)


class _Tape:
    """Listens to the log of an engine that has just been made."""

    def __init__(self, log: Log) -> None:
        self.done: list[Generation] = []
        self._log = log
        self._begin = log.begin_checkpoint
        # a header and a closing frame without a payload, and what the engine wrote at its start
        self._ends = [log._closed_at - HEAD, log._closed_at, log.size_bytes]
        self._follow(log._pen)
        log.begin_checkpoint = self._begins  # type: ignore[method-assign]

    def take(self) -> None:
        """Have the present generation."""
        log = self._log
        content = os.pread(log.fds[log.generation % 2], log.size_bytes, 0)
        ends = tuple(end for end in self._ends if end <= log.size_bytes)
        self.done.append(Generation(log.generation, content, ends, log._closed_at))

    def _begins(self, header: dict[str, object]) -> Checkpoint:
        self.take()
        made = self._begin(header)
        self._ends = [made._pen.end]
        self._follow(made._pen)
        return made

    def _follow(self, pen: object) -> None:
        ends, write = self._ends, pen.write  # type: ignore[attr-defined]

        def noted(kind: bytes, payload: bytes) -> None:
            write(kind, payload)
            ends.append(pen.end)  # type: ignore[attr-defined]

        pen.write = noted  # type: ignore[attr-defined]


@contextmanager
def checkpointing(after_bytes: int) -> Iterator[None]:
    """Have logs begun anew after so many bytes."""
    journal = "rmemd.engine.journal"
    with patch(f"{journal}.CHECKPOINT_BYTES", after_bytes), patch(f"{journal}.CHECKPOINT_RATIO", 0):
        yield


def _end(engine: Engine, guest: Guest) -> None:
    """End a guest, unless the run has done so."""
    for end in (partial(engine.destroy_vm, guest.vm), partial(engine.close_file, guest.file)):
        with suppress(RmemError):
            end()


def record(
    operations: int,
    seed: int,
    checkpoint_bytes: int = NEVER,
    look: Callable[[Engine, Kept], object] = lambda engine, kept: None,
) -> Recorded:
    """Do a run of so many operations, of guests of every consumer; return its journal.

    Args:
        operations: how many.
        seed: of the run.
        checkpoint_bytes: after how many bytes the log begins anew.
        look: is given the engine and its keeper before the run.
    """
    kept = Kept()
    engine = kept_engine(kept, nnodes=2)
    try:
        tape = _Tape(engine.core.journal._log)  # type: ignore[arg-type]
        look(engine, kept)
        rng = random.Random(seed)
        with checkpointing(checkpoint_bytes):
            guests = [Guest(engine, name, PAGES) for name in INSTALLED]
            for _ in range(operations):
                if len(guests) > GUESTS_MAX:
                    _end(engine, guests.pop(0))
                act(engine, guests, rng)
        tape.take()
        found = Log.read(engine.core.journal._log.fds)  # type: ignore[union-attr]
        assert found is not None
        return Recorded(operations, tuple(tape.done), found.header)
    finally:
        engine.close()
        kept.close()
