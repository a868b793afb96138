"""A keeper in the process of a test: what is kept, and what an engine finds after a crash."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np

from rmemd.engine import frames
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.model.host import Stored, Use
from rmemd.testing import keeping
from rmemd.testing.keeping import Kept
from rmemd.units import pages

__all__ = ["Kept", "Page", "held_pages", "kept_engine", "reopened", "unsettled"]


def kept_engine(kept: Kept, **options: Any) -> Engine:
    """Make an engine whose memory outlives it; with the same ``kept`` again, it is reopened."""
    return keeping.kept_engine(kept, _options(options))


def reopened(kept: Kept, **options: Any) -> Engine:
    """Return the engine that comes after a crash at this moment; the present one is not touched."""
    return keeping.reopened(kept, _options(options))


def _options(options: dict[str, Any]) -> Options:
    return Options(**{"nframes": 4096, "nnodes": 1, "seed": 1, "life": "one", **options})


# the private and the shared half of a page: a digest of the bytes, or what else is there
Page = tuple[str, str]


def held_pages(engine: Engine, file: int, vm: int, npages: int) -> list[Page]:
    """Return what a file's pages hold, without touching one."""
    core = engine.core
    if not core.files.exists(file):
        return [("gone", "gone")] * npages
    view = core.files.get(file)
    frames = view.frames.get(pages(0, npages)).astype(np.int64) - 1
    key: Any = core.host.vm_keys.get(vm, 0)
    private = ["hole"] * npages
    at = np.flatnonzero((frames >= 0) & (core.host.stored.get(frames) != Stored.SHARED))
    rows, failed = core.controller.read(frames[at], key)
    for page, row, bad in zip(at.tolist(), rows, failed, strict=True):
        private[page] = "poison" if bad else blake2b(row.tobytes(), digest_size=4).hexdigest()
    shared = ["hole"] * npages
    if core.has_shared_memory(view):
        memfd = core.shared_memory(view)
        for page in memfd.present(0, npages).tolist():
            row = memfd.read(pages(page, 1))
            shared[page] = blake2b(row.tobytes(), digest_size=4).hexdigest()
    return list(zip(private, shared, strict=True))


def unsettled(engine: Engine) -> list[str]:
    """Say where memory is not what the state says, of an engine whose clients fill in nothing."""
    core = engine.core
    strays, missing = core.controller.strays()
    found = [f"arena: pfn {pfn}" for pfn in (*strays, *missing)]
    scrubbing = np.flatnonzero(core.host.use.view == int(Use.SCRUBBING))
    found += [f"pfn {pfn} waits to be scrubbed" for pfn in scrubbing]
    there = core.controller._arena.present(0, core.host.nframes)
    twice = there[core.host.stored.get(there) == Stored.SHARED]
    found += [f"pfn {pfn} is in the arena and in a shared memfd" for pfn in twice]
    # with attributes the host's bytes come before their record, and are found as a client's are
    for file in [file for file in core.files.all() if file.info.in_place]:
        of_nobody = frames.uncharged(core, file, 0, file.info.size_pages)
        found += [f"file/{file.info.file}: page {page} is of nobody" for page in of_nobody]
    return found
