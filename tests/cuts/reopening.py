"""Engines had back from a journal that was cut: the state at its last whole record, and sound.

Owns ``Reopenings``, which looks on while a run is made, since guests' memory has to be that of the
moment: what a daemon leaves that is killed there. At every so many frames an engine is had back
from all of the log; and of some short frames, from the log with every part of that frame.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from keeping import Kept, kept_engine

from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.hooks.tables import same_state
from rmemd.model.host import Use
from rmemd.store.keeping import JOURNALS
from rmemd.store.log import _HEAD, Log

# a frame that is cut at each of its bytes
SHORT_BYTES = 120


@dataclass
class Reopenings:
    """Engines that were had back, and what was wrong with them.

    Attributes:
        every: at the end of how many frames one is had back.
        within: how many frames are cut at each of their bytes: short ones, far from each other.
        cuts: how many were had back.
        wrong: a line for each thing wrong.
    """

    every: int
    within: int = 0
    cuts: int = 0
    frames: int = 0
    wrong: list[str] = field(default_factory=list)

    def look(self, engine: Engine, kept: Kept) -> None:
        """Look on from now, whatever an engine writes to its log."""
        log = engine.core.journal._log
        assert log is not None
        self._engine, self._kept, self._log = engine, kept, log
        self._is_wanted = False
        self._before = engine.core.space.snapshot(), engine.revision
        self._append = log.append
        log.append = self._appends  # type: ignore[method-assign]

    def _appends(self, payload: bytes) -> None:
        number = self.frames
        self.frames += 1
        if number % self.every == self.every // 2:
            self._is_wanted = self.within > 0
        if self._is_wanted and len(payload) < SHORT_BYTES:
            self._is_wanted = False
            self.within -= 1
            self._with_every_part(number, payload)
        self._append(payload)
        is_sampled = number % self.every == 0
        if is_sampled or self.within:
            self._before = self._engine.core.space.snapshot(), self._engine.revision
        if is_sampled:
            self._have_back(f"frame {number}", self._kept.copied())

    def _with_every_part(self, number: int, payload: bytes) -> None:
        frame = _frame(self._log, payload)
        for length in range(len(frame)):
            fds = self._kept.copied()
            fd = fds[JOURNALS[self._log.generation % 2]]
            os.pwrite(fd, frame[:length], self._log.size_bytes)
            self._have_back(f"{length} bytes of frame {number}", fds)

    def _have_back(self, what: str, fds: dict[str, int]) -> None:
        self.cuts += 1
        kept = Kept(fds)
        after = kept_engine(kept, nnodes=2)
        try:
            self.wrong += [f"{what}: {line}" for line in self._wrong_with(after)]
        finally:
            after.close()
            kept.close()

    def _wrong_with(self, after: Engine) -> list[str]:
        core = after.core
        expected, revision = self._before
        found = after.recovered
        if found is None:
            return ["nothing was had back"]
        wrong = [*check(core), *found.lost]
        strays, missing = core.controller.strays()
        wrong += [f"pfn {pfn} and the arena disagree" for pfn in (*strays, *missing)]
        if (core.host.use.view == int(Use.SCRUBBING)).any():
            wrong.append("frames wait to be scrubbed")
        # what agreed with memory at once is what was recorded, to the last entry
        state: Any = core.space.snapshot()
        if after.revision == revision:
            wrong += [f"{name} differs" for name in same_state(state, expected)]
        elif after.revision < revision:
            wrong.append(f"revision {after.revision} after {revision}")
        return wrong


def _frame(log: Log, payload: bytes) -> bytes:
    """Return the bytes that a payload becomes at the end of a log, its checksum excepted.

    A frame that is cut off is never summed up.
    """
    return _HEAD.pack(1 + len(payload), 0) + b"A" + payload
