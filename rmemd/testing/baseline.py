"""The host's baseline: what is left when every VM is gone, and how many there can be at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.errors import RmemError
from rmemd.model.host import Use

# VMs that are made at most to see how many keys the vendor has
CAPACITY_MAX = 24


def made_at_once(engine: Engine, variant: str, config: Mapping[str, str]) -> list[int]:
    """Make as many VMs as there can be, up to CAPACITY_MAX; return them."""
    made: list[int] = []
    try:
        while len(made) < CAPACITY_MAX:
            made.append(engine.create_vm(variant, None, config).info.vm)
    except RmemError:
        pass
    return made


def left(core: Core, poisoned: set[int], may_leak: bool) -> Iterator[str]:
    """Say what is left on a host that should be empty.

    Args:
        core: the engine's.
        poisoned: frames that stay out of use.
        may_leak: whether others may, too.
    """
    host = core.host
    kept = np.ones(host.nframes, dtype=np.bool_)
    kept[list(poisoned)] = False
    gone = (Use.FREE, Use.LEAKED) if may_leak else (Use.FREE,)
    pfns = np.flatnonzero(kept & ~np.isin(host.use.view, gone))
    if pfns.size:
        uses = sorted({Use(int(u)).name for u in host.use.view[pfns]})
        yield f"{pfns.size} frames are left {uses}, first pfn {pfns[0]:#x}"
    counted = any(core.ledger.count(entry) for entry in core.ledger.entries())
    if counted or core.sessions.pins():
        yield "references or pins are left in the ledger"
    tables = [name for name in core.space.tables if name.startswith(("vm/", "file/"))]
    if tables or len(host.vm_keys):
        yield f"tables or keys of VMs are left: {tables}"
