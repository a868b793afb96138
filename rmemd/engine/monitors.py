"""Those who watch the engine at work: every transaction, every hook and every movement of bytes.

Owns ``Monitors``, which tells the monitors of ``engine.transitions`` of each commit and keeps what
they found. It sees:

- each hook that agreed, with its arguments, its answer and the transaction that it was asked in;
- each movement of bytes that a transaction names, and whether the lock is held for it;
- each commit, with its writes and events; and the state before it, which is a second state that
  every committed write is applied to as well. The two must be equal (I19): a change that no record
  has, or a record that says something else, is seen at the next check.

What is refused is rolled back and not watched: that it left nothing behind, the second state shows.
Watching costs about as much again as the transactions themselves, so a daemon watches some of its
time, and tests and simulations all of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from rmemd.engine.commits import History, Hook, Transition, copies
from rmemd.engine.core import Core
from rmemd.engine.transitions import MONITORS, untold
from rmemd.hooks.tables import Dense, Space, Sparse, Table, Write
from rmemd.hooks.tx import Tx

# what is broken once is broken again: the first lines say it
KEPT_MAX = 256
# byte movements that cost; zeroing and scrubbing only write down what a frame holds
COPIES = ("copy_in", "relocate")


class Monitors:
    """Watches one engine, when it is told to; call everything under the engine's lock.

    Attributes:
        seen: transactions that were watched.
        violated: one line each, as "I8: ...", oldest first.
        canaries: bytes that no record and no event may have.
    """

    def __init__(self, core: Core) -> None:
        self.seen = 0
        self.violated: list[str] = []
        self.canaries: tuple[bytes, ...] = ()
        self._core = core
        self._until: int | None = 0
        self._half_seen: WeakSet[Tx] = WeakSet()
        self._hooks: WeakKeyDictionary[Tx, list[Hook]] = WeakKeyDictionary()
        self._history = History(0)
        self._space = Space()

    def begin(self, transactions: int | None = None) -> None:
        """Watch so many transactions from now on (None: all), beginning with a copy of the state.

        Of a transaction that is suspended now nobody saw all the hooks: only its writes count.
        """
        core = self._core
        self._half_seen = WeakSet(core.space.holders)
        self._until = None if transactions is None else self.seen + transactions
        self._hooks.clear()
        self._history = History(core.journal.revision)
        self._space = Space()
        for table in core.space.tables.values():
            for write in table.content():
                self._space.apply(write)
        core.watch = core.watched = self
        core.guard.watch = self.agreed

    def end(self) -> None:
        """Watch no more; what was found stays."""
        self._core.watch = None
        self._core.guard.watch = None
        self._space = Space()

    # --- what it is told -----------------------------------------------------------------------
    def agreed(self, tx: Tx, vm: int, op: str, args: tuple[Any, ...], answer: Any) -> None:
        """Take note of a hook that was asked in a transaction, and agreed.

        I25: hooks run inside of a step only, with the lock held and nothing suspended.
        """
        if tx in self._core.space.holders:
            self._found(f"I25: {op} of vm/{vm} ran while {tx.label} was suspended")
        if not self._core.is_locked():
            self._found(f"I25: {op} of vm/{vm} ran outside of a step")
        # one that nothing was mapped for is an invalidation, and no transaction
        self._history.invalidations[vm] += op == "invalidate_start"
        moved = () if op != "migrate_folio" else copies(self._core, tx, vm, *args[1:3])
        hooks = self._hooks.setdefault(tx, [])
        hooks.append(Hook(vm, op, args, answer, len(tx.redo), moved))

    def moving(self, tx: Tx) -> None:
        """Take note of bytes that are about to be moved.

        I25: more than a few pages are not moved under the lock.
        """
        npages = sum(op.pfns.size for op in tx.byte_ops if op.kind in COPIES)
        if npages > self._core.options.inline_pages and self._core.is_locked():
            self._found(f"I25: {npages} pages were moved under the lock ({tx.label})")

    def committed(self, tx: Tx) -> None:
        """Look at a transaction that was recorded; the lock is held and nobody is told yet."""
        hooks = tuple(self._hooks.pop(tx, ()))
        revision = self._core.journal.revision
        if tx not in self._half_seen:
            transition = Transition(self._core, self._space, tx, revision, hooks, self._history)
            for monitor in MONITORS:
                self._look(monitor, transition)
        for line in untold(tx, self.canaries):
            self._found(line)
        for write in tx.redo:
            self._space.apply(write)
        self._history.revision = revision
        self.seen += 1
        if self.seen == self._until:
            self.end()

    # --- what it found -------------------------------------------------------------------------
    def differing(self) -> Iterator[str]:
        """Say where the state is not what the transactions have made of it.

        I19: the state is what its records make of it, and nothing else.
        """
        if self._core.watch is self:
            live, made = self._core.space.tables, self._space.tables
            for name in sorted(live.keys() | made.keys()):
                one, other = live.get(name), made.get(name)
                if one is None or other is None or not _same(one, other):
                    yield f"I19: {name} is not what its records make it"

    def _look(self, monitor: Any, transition: Transition) -> None:
        try:
            for line in monitor(transition):
                self._found(f"{line} ({transition.tx.label}, revision {transition.revision})")
        except Exception as error:
            # tables that contradict each other so far that they cannot even be read
            number = (monitor.__doc__ or "").partition(":")[0]
            self._found(f"{number}: cannot be watched, for {type(error).__name__}: {error}")

    def _found(self, line: str) -> None:
        if line not in self.violated and len(self.violated) < KEPT_MAX:
            self.violated.append(line)


def _same(one: Table, other: Table) -> bool:
    """Return whether two tables hold the same; what is kept in the same way is compared as kept."""
    if isinstance(one, Dense) and isinstance(other, Dense):
        return bool(np.array_equal(one.view, other.view))
    if isinstance(one, Sparse) and isinstance(other, Sparse):
        pairs = zip_longest(one.content(), other.content())
        if all(a is not None and b is not None and _same_write(a, b) for a, b in pairs):
            return True
    return bool(one.snapshot() == other.snapshot())


def _same_write(one: Write, other: Write) -> bool:
    same = (one.table, one.op, len(one.args)) == (other.table, other.op, len(other.args))
    return same and all(map(np.array_equal, one.args, other.args))
