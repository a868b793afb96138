"""One committed transaction as monitors see it, and what they remember of those before.

Owns ``Transition``: a commit with the state before it and the hooks that agreed to it, and the
questions that monitors ask of it. ``engine.monitors`` makes them, ``engine.transitions`` judges.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from msgspec import Struct, field

from rmemd.engine.core import Core
from rmemd.engine.waits import Operation
from rmemd.hooks.tables import Records, Space, Write
from rmemd.hooks.tx import Tx
from rmemd.store.controller import page_sums
from rmemd.units import I64, U64, distinct, pages

NOWHERE = np.empty(0, dtype=np.int64)
# pages of one move whose bytes are compared
MOVED_MAX = 64
FILE_HALF = re.compile(r"file/(\d+)/(?:frames|shared)")


class Copied(Struct, frozen=True):
    """Frames that move, and ``sums`` of what the sources held for the owner of the key."""

    src: I64
    dst: I64
    key: int
    sums: U64

    @classmethod
    def of(cls, core: Core, src: I64, dst: I64, key: int) -> Copied:
        """Return the first of them, as they are now."""
        src, dst = src[:MOVED_MAX], dst[:MOVED_MAX]
        return cls(src, dst, key, plain_sums(core, src, key))


class Hook(Struct, frozen=True):
    """A hook that agreed; ``after`` is how many writes of its transaction came before its answer.

    ``copies`` are the pages that it moves.
    """

    vm: int
    op: str
    args: tuple[Any, ...]
    answer: Any
    after: int
    copies: tuple[Copied, ...] = ()


class History(Struct):
    """What is remembered from commit to commit.

    Attributes:
        revision: of the last one.
        invalidations: by VM, how many were started.
        sequences: by VM, the engine's invalidate sequence at the last commit that started one.
        lookups: by operation, the VM and its invalidations when a fault looked its pages up.
    """

    revision: int
    invalidations: Counter[int] = field(default_factory=Counter)
    sequences: dict[int, int] = field(default_factory=dict)
    lookups: dict[Operation, Counter[int]] = field(default_factory=dict)


class Transition(Struct, frozen=True, dict=True):
    """One committed transaction: ``before`` is the state that it was committed on."""

    core: Core
    before: Space
    tx: Tx
    revision: int
    hooks: tuple[Hook, ...]
    history: History

    @cached_property
    def written(self) -> dict[str, list[tuple[int, Write]]]:
        """Return the writes by table, each with its place in the transaction."""
        found: dict[str, list[tuple[int, Write]]] = {}
        for at, write in enumerate(self.tx.redo):
            found.setdefault(write.table, []).append((at, write))
        return found

    def touched(self, name: str) -> I64:
        """Return the entries of an array that were written, ascending."""
        parts = [_indices(write) for _, write in self.written.get(name, ())]
        return distinct(np.concatenate(parts)) if parts else NOWHERE

    def changed(self, name: str) -> tuple[I64, I64, I64]:
        """Return the entries of an array that differ from before: which, old and new values."""
        at = self.touched(name)
        old, new = self.old(name, at), _values(self.core.space, name, at)
        differ = old != new
        return at[differ], old[differ], new[differ]

    def old(self, name: str, at: I64) -> I64:
        """Return what an array held before; zeros if there was none of the name."""
        return _values(self.before, name, at)

    def first_written(self, name: str, at: I64) -> I64:
        """Return where in the transaction each entry was written first; past its end for never."""
        places = np.full(at.size, len(self.tx.redo) + 1, dtype=np.int64)
        for place, write in reversed(self.written.get(name, ())):
            places[np.isin(at, _indices(write))] = place
        return places

    def of(self, op: str) -> Iterator[Hook]:
        """Yield the calls of one hook, in order."""
        return (hook for hook in self.hooks if hook.op == op)

    @cached_property
    def moves(self) -> list[tuple[int, I64, I64, I64]]:
        """Return pages that have another frame than before: (file, pgoffs, old, new frames)."""
        found = []
        for name in self.written:
            match = FILE_HALF.fullmatch(name)
            if match and name in self.core.space.tables:
                at, old, new = self.changed(name)
                both = (old != 0) & (new != 0)
                if both.any():
                    found.append((int(match[1]), at[both], old[both] - 1, new[both] - 1))
        return found


def _indices(write: Write) -> I64:
    if write.op == "put":
        indices: I64 = np.asarray(write.args[0], dtype=np.int64)
        return indices
    start = write.args[0]
    return pages(start, write.args[1] if write.op == "fill" else len(write.args[1]))


def _values(space: Space, name: str, at: I64) -> I64:
    table = space.tables.get(name)
    if table is None:
        return np.zeros(at.size, dtype=np.int64)
    assert not isinstance(table, Records)
    return np.asarray(table.get(at), dtype=np.int64)


def copies(core: Core, tx: Tx, vm: int, src: I64, dst: I64) -> tuple[Copied, ...]:
    """Return what a hook that moves pages has named, and as it is what it has not."""
    found = [
        Copied.of(core, op.src, op.pfns, op.key_id)
        for op in tx.byte_ops
        if op.kind == "relocate" and op.src is not None
    ]
    left = ~np.isin(dst, np.concatenate([NOWHERE, *(op.pfns for op in tx.byte_ops)]))
    key = core.host.vm_keys.get(vm, 0)
    return (*found, Copied.of(core, src[left], dst[left], key))


def plain_sums(core: Core, pfns: I64, key: int) -> U64:
    """Return sums of what the owner of a key reads from frames."""
    rows, _ = core.controller.read(pfns, key)
    return page_sums(rows)
