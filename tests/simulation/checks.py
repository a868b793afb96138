"""The check after each step, done again only where something it looked at has changed since.

Owns ``Checks``. While it watches, tables are made that tell what is read of them and what is
written. A part of the invariants that was true is true for as long as no table that it then read
is written; one that looked at anything else than tables is done every time. So nothing is left
out, and nothing is listed by hand but the core's views of tables (``VIEWS``). In case that is
wrong, every so many checks are of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from rmemd.consumers import discovery
from rmemd.engine import journal
from rmemd.engine.core import Core
from rmemd.engine.invariants import PARTS, Part, check
from rmemd.hooks import tables
from rmemd.hooks.tables import Sparse, TableSpec
from rmemd.units import I64

# every so many checks are of everything: also I24's sample of bytes and, where transactions are
# watched, I19's second state
SAMPLED = 16
# of a log, from one checkpoint to the next
GENERATION_BYTES = 64 << 10
# of the core's attributes, those that are views of tables
VIEWS = frozenset(("space", "host", "ledger", "files", "vms", "sessions", "userfaults"))
CONSUMERS = "consumers"
# what reads a table without telling what it reads: by Tx and by the journal only
_UNTOLD = frozenset(("apply", "content", "snapshot"))
_TOLD = ("__getitem__", "__contains__", "__len__")


@dataclass
class Accesses:
    """The names of tables that were read, and of those that were written."""

    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)


@contextmanager
def watching(accesses: Accesses) -> Iterator[None]:
    """Have every table that is made meanwhile tell who reads and writes it.

    What is installed does not change while a run goes on, and is looked for once; and the log is
    begun anew every so often, as it is in the long life of a daemon.
    """
    kinds, looked, worth = dict(tables._KINDS), discovery.installed, journal.CHECKPOINT_BYTES
    found = looked()
    tables._KINDS.update({kind: _telling(made, accesses) for kind, made in kinds.items()})
    discovery.installed = lambda: found
    journal.CHECKPOINT_BYTES = GENERATION_BYTES
    try:
        yield
    finally:
        tables._KINDS.update(kinds)
        discovery.installed = looked
        journal.CHECKPOINT_BYTES = worth


def _telling(kind: type[Any], accesses: Accesses) -> type[Any]:
    """Return a kind of table whose methods tell."""
    public = [name for name in vars(kind) if not name.startswith("_") and name not in _UNTOLD]
    body: dict[str, Any] = {
        name: _reader(vars(kind)[name], accesses)
        for name in (*public, *_TOLD)
        if name in vars(kind)
    }

    def begin(table: Any, spec: TableSpec) -> None:
        kind.__init__(table, spec)
        table.found = {}
        accesses.written.add(spec.name)

    def apply(table: Any, op: str, args: tuple[Any, ...]) -> Any:
        accesses.written.add(table.name)
        table.found.clear()
        return kind.apply(table, op, args)

    if kind is Sparse:
        body["touched"] = _reader(_remembered(Sparse.touched), accesses)
    return type(kind.__name__, (kind,), {**body, "__init__": begin, "apply": apply})


def _reader(read: Any, accesses: Accesses) -> Any:
    """Return a method or a property that tells that its table is read."""
    if isinstance(read, property):
        return property(_reader(read.fget, accesses))

    def told(table: Any, *args: Any) -> Any:
        accesses.read.add(table.name)
        return read(table, *args)

    return told


def _remembered(touched: Callable[..., I64]) -> Callable[..., I64]:
    """Find which entries are in use once, until the table is written again."""

    def remembered(table: Any, start: int, n: int) -> I64:
        found: I64 | None = table.found.get((start, n))
        if found is None:
            found = table.found[start, n] = touched(table, start, n)
        return found.copy()

    return remembered


class _Views:
    """The core as a part of the invariants sees it; ``others`` is what is no table."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.others: set[str] = set()
        for name in VIEWS:
            setattr(self, name, getattr(core, name))

    def __getattr__(self, name: str) -> Any:
        self.others.add(name)
        return getattr(self._core, name)


class Checks:
    """Checks one core, whose tables were made while ``accesses`` was told of them."""

    def __init__(self, core: Core, accesses: Accesses) -> None:
        self._core, self._accesses = core, accesses
        self._views = _Views(core)
        self._read: dict[Part, frozenset[str]] = {}
        self._consumers: dict[int, object] = {}
        self._done = 0

    def broken(self) -> list[str]:
        """Return what is violated, one line each."""
        self._done += 1
        if self._done % SAMPLED == 0:
            self._read.clear()
            return check(self._core)
        written = self._accesses.written
        if self._consumers != self._core.consumers:
            self._consumers = dict(self._core.consumers)
            written.add(CONSUMERS)
        due = [part for part in PARTS if self._is_due(part, written)]
        written.clear()
        return [line for part in due for line in self._found(part)]

    def _is_due(self, part: Part, written: set[str]) -> bool:
        read = self._read.get(part)
        return read is None or not read.isdisjoint(written)

    def _found(self, part: Part) -> list[str]:
        read, others = self._accesses.read, self._views.others
        read.clear()
        others.clear()
        lines = list(part(cast("Core", self._views)))
        if lines or others - {CONSUMERS}:
            self._read.pop(part, None)
        else:
            self._read[part] = frozenset(read | others)
        return lines
