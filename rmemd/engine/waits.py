"""Who waits for whom, and why: the engine's wait graph.

Owns the names of the operations that run, what each of them waits for at this moment, and the last
refusals that named holders. Everything here is read and written under the engine's lock. A name is
made when somebody asks for it, so that an operation which never waits pays for one small object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec import Struct

from rmemd.engine.journal import Journal
from rmemd.errors import Holder, RmemError
from rmemd.hooks.tables import Write
from rmemd.hooks.tx import Held, Tx
from rmemd.model.ledger import Ledger

if TYPE_CHECKING:
    from rmemd.engine.calls import Run

# refusals that are remembered: enough to see a pattern, few enough to read
REFUSALS_MAX = 64
RANGE, BYTES = "range in progress", "bytes in flight"
PINS, REFERENCES = "pins", "references"


class Operation:
    """A call of the engine that runs: what waits, and what is waited for.

    Attributes:
        run: its name as a part of somebody's call (``engine.calls``), None if it is of none.
        ended_at: the revision at which it ended, 0 before; what it freed may be scrubbed later.
    """

    __slots__ = ("_made_by", "_who", "ended_at", "number", "run")

    def __init__(self, number: int, who: str, made_by: object) -> None:
        self.number = number
        self.run: Run | None = None
        self.ended_at = 0
        self._who = who
        self._made_by = made_by

    @property
    def label(self) -> str:
        """Return its name: who was named for it, else "call 17 migrate"."""
        return self._who or f"call {self.number} {self.kind}".rstrip()

    @property
    def kind(self) -> str:
        """Return who was named for it, else the engine's method that it is a call of."""
        return self._who or _method(self._made_by)


class WaitFor(Struct, frozen=True):
    """What an operation that waits in a step waits for.

    Attributes:
        holder: who is in the way: an operation, or a name ("session 7").
        why: in which way ("range in progress", "page fault handler").
        pages: over which pages ("file/2 pgoff 0x10+0x4"), "" if over none.
    """

    holder: Operation | str
    why: str
    pages: str = ""


class Retry(Exception):
    """The range is in progress elsewhere: undo, wait until something changed, begin again."""

    def __init__(self, on: WaitFor | None = None) -> None:
        super().__init__("" if on is None else on.why)
        self.on = on


class GaveUp(Exception):
    """The operation was told to stop while it waited; nothing of its transaction has happened."""


class Edge(Struct, frozen=True):
    """One who waits, or was refused, and whom for; see WaitEdge in host.proto."""

    waiter: str
    holder: str
    why: str
    pages: str
    waiting: bool
    revision: int


class Graph(Struct, frozen=True):
    """The edges, oldest first, and those among whom each waits for the next."""

    edges: list[Edge]
    deadlock: list[str]


class Waits:
    """The operations under way and what keeps them.

    Attributes:
        current: the operation whose steps run now.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._count = 0
        self.current = Operation(0, "start", None)
        self._waiting: dict[Operation, tuple[WaitFor, int]] = {}
        # what an operation waited for last, and since when: it looks again at every change
        self._before: dict[Operation, tuple[WaitFor, int]] = {}
        self._suspended: dict[Tx, Operation] = {}
        self._refused: dict[tuple[str, str, str, str], tuple[Edge, Holder, int]] = {}

    # --- operations --------------------------------------------------------------------------
    def begin(self, who: str, made_by: object) -> Operation:
        """Count an operation that begins, and have it be the current one."""
        self._count += 1
        self.current = Operation(self._count, who, made_by)
        return self.current

    def end(self, operation: Operation, before: Operation) -> None:
        """Forget an operation; ``before`` is the one that it ran inside, if any."""
        self._before.pop(operation, None)
        self.current = before

    @contextmanager
    def holding(self, tx: Tx) -> Iterator[None]:
        """Know whose a suspended transaction is while it holds what it touches."""
        self._suspended[tx] = self.current
        try:
            yield
        finally:
            del self._suspended[tx]

    @contextmanager
    def waiting(self, operation: Operation, on: WaitFor) -> Iterator[None]:
        """Know what an operation waits for while it waits."""
        last = self._before.get(operation)
        since = last[1] if last is not None and last[0] == on else self._journal.revision
        self._waiting[operation] = self._before[operation] = (on, since)
        try:
            yield
        finally:
            del self._waiting[operation]

    def obstacle(self, met: Held | Retry) -> WaitFor | None:
        """Return what an operation met that must begin again, ``None`` if nobody said."""
        if isinstance(met, Retry):
            return met.on
        if met.holder is None:
            return None
        holder = self._suspended.get(met.holder, met.holder.label)
        return WaitFor(holder, BYTES, _pages_of(met.write))

    # --- refusals ----------------------------------------------------------------------------
    def refused(self, refusal: RmemError, pfn: int) -> RmemError:
        """Remember who kept a frame from the current operation; return the refusal, to raise it.

        An operation that tries again and again is remembered once, with its last refusal.
        """
        page, revision = refusal.details.page, self._journal.revision
        for holder in refusal.details.holders:
            why = PINS if holder.longterm else REFERENCES
            edge = Edge(self.current.label, holder.name, why, page, False, revision)
            key = (self.current.kind, holder.name, holder.purpose, page)
            self._refused.pop(key, None)
            self._refused[key] = (edge, holder, pfn)
        while len(self._refused) > REFUSALS_MAX:
            del self._refused[next(iter(self._refused))]
        return refusal

    # --- questions ---------------------------------------------------------------------------
    def graph(self, ledger: Ledger) -> Graph:
        """Return who waits for whom; refusals whose holder has let go since are forgotten."""
        self._refused = {
            key: one for key, one in self._refused.items() if _still_holds(ledger, one[1], one[2])
        }
        edges = [
            Edge(op.label, _name(on.holder), on.why, on.pages, True, since)
            for op, (on, since) in self._waiting.items()
        ]
        edges += [edge for edge, _, _ in self._refused.values()]
        # Python's sort is stable: within a revision, in the order in which they came
        return Graph(sorted(edges, key=lambda edge: edge.revision), deadlock(edges))


def deadlock(edges: Iterable[Edge]) -> list[str]:
    """Return the names on the first cycle of waits, each waiting for the next; none: empty.

    A call waits for one thing at a time, so a cycle is one that nobody leaves. "First" is by the
    order of the edges, so that equal states give equal answers.
    """
    waits_for: dict[str, list[str]] = {}
    for edge in edges:
        if edge.waiting:
            waits_for.setdefault(edge.waiter, []).append(edge.holder)
    finished: set[str] = set()
    for start in waits_for:
        found = _cycle_from(start, waits_for, finished)
        if found:
            return found
    return []


def _cycle_from(start: str, waits_for: dict[str, list[str]], finished: set[str]) -> list[str]:
    """Follow the edges depth first; ``finished`` are names from which no cycle is reached."""
    if start in finished:
        return []
    path, left = [start], [iter(waits_for[start])]
    while path:
        onto = next(left[-1], None)
        if onto is None:
            finished.add(path.pop())
            left.pop()
        elif onto in path:
            return path[path.index(onto) :]
        elif onto not in finished:
            path.append(onto)
            left.append(iter(waits_for.get(onto, ())))
    return []


def _name(holder: Operation | str) -> str:
    return holder if isinstance(holder, str) else holder.label


def _method(function: object) -> str:
    """Return which of the engine's methods made an operation, in words."""
    name = getattr(function, "__qualname__", "").split(".<locals>")[0].rpartition(".")[2]
    return name.replace("_", " ")


def _still_holds(ledger: Ledger, holder: Holder, pfn: int) -> bool:
    return any(
        (one.name, one.purpose) == (holder.name, holder.purpose) for one in ledger.holders(pfn)
    )


def _pages_of(write: Write | None) -> str:
    """Return the pages of a write as the graph names them; a record is no page."""
    if write is None or write.op not in ("put", "fill"):
        return ""
    if write.op == "fill":
        start, npages = write.args[:2]
    else:
        start = int(write.args[0].min())
        npages = int(write.args[0].max()) + 1 - start
    kind, _, rest = write.table.partition("/")
    number = rest.partition("/")[0]
    return pages_text(kind, number, start, npages)


def pages_text(kind: str, number: int | str, start: int, npages: int) -> str:
    """Return pages of a "file" or "vm" as the graph names them; of any other kind, frames."""
    index = {"file": f"file/{number} pgoff", "vm": f"vm/{number} gfn"}.get(kind, "pfn")
    return f"{index} {start:#x}+{npages:#x}"
