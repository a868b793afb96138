"""Ops tables wrapped: what was called, which brackets were committed, and an op made to raise.

Owns ``Recorder``. The conformance kit puts it between the engine and a plugin's tables: it hears
each call and each commit, and changes nothing but for the one op that it was asked to trip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from rmemd.consumers.guard import Consumer, Platform
from rmemd.engine.core import Core
from rmemd.hooks.hooktx import HookTx
from rmemd.hooks.ops import NotifierOps, PlatformOps
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Content, Runs, Why
from rmemd.units import I64

Ops = TypeVar("Ops", NotifierOps, PlatformOps)
# asked at load only, outside every transaction that could be undone
AT_LOAD = ("variants", "start")


class Tripped(Exception):
    """What a hook raises when the kit breaks it; the engine makes a PluginFault of it."""


class Bracket(Struct, frozen=True):
    """One invalidate_start or invalidate_end."""

    vm: int
    runs: Runs
    why: Why
    ok: bool | None = None

    def pages(self) -> list[tuple[int, int]]:
        """Return (gfn, pfn) of each page, sorted."""
        return sorted(zip(self.runs.gfns().tolist(), self.runs.pfns().tolist(), strict=True))


class Recorder:
    """What an engine asks of its plugins.

    Attributes:
        calls: how often each op was called.
        undone: ops that raised, before and after they ran, and whose transaction was undone.
        contents: (vm, gfn) -> what ``convert`` said of the page, since ``begin``.
        starts: the brackets that were begun and committed since ``begin``.
        tripped: whether the op that was to raise was called since ``begin``.
        tables: VM -> its consumer's table as the plugin made it.
    """

    def __init__(self, core: Core) -> None:
        self.calls: Counter[str] = Counter()
        self.undone: Counter[str] = Counter()
        self.contents: dict[tuple[int, int], Content] = {}
        self.starts: list[Bracket] = []
        self.tripped = False
        self.tables: dict[int, NotifierOps] = {}
        self._core = core
        self._trip = ("", "")
        self._trip_tx: Tx | None = None
        self._brackets: list[tuple[Tx, Bracket]] = []
        self._committed: list[Tx] = []
        append = core.journal.append

        def appended(tx: Tx) -> int:
            self._committed.append(tx)
            return append(tx)

        core.journal.append = appended  # type: ignore[method-assign]

    def watch(self, watched: Consumer | Platform) -> None:
        """Put the recorder between the engine and a consumer, or a platform."""
        if isinstance(watched, Consumer):
            self.tables[watched.vm] = watched.ops
            watched.ops = self._wrapped(watched.ops, watched.vm)
        else:
            watched.ops = self._wrapped(watched.ops, 0)

    def begin(self, trip: str = "", how: str = "before") -> None:
        """Begin a step; the op ``trip`` raises once in it, "before" it ran or "after"."""
        self.contents.clear()
        self.starts.clear()
        self._brackets.clear()
        self._committed.clear()
        self.tripped, self._trip, self._trip_tx = False, (trip, how), None

    def end(self) -> Iterator[tuple[str, str]]:
        """End a step; yield (rule, what is wrong) of its brackets and of the op that raised."""
        if self.tripped:
            self.undone[self._trip[0]] += 1
            if any(tx is self._trip_tx for tx in self._committed):
                yield "undo", f"{self._trip[0]} raised, and its transaction was committed"
        self._trip = ("", "")
        for tx in self._committed:
            yield from self._unbalanced([b for by, b in self._brackets if by is tx])
        kept = {id(tx) for tx in self._committed}
        self.starts += [b for tx, b in self._brackets if id(tx) in kept and b.ok is None]

    def _unbalanced(self, brackets: list[Bracket]) -> Iterator[tuple[str, str]]:
        """Each start has its ends: the same pages, for a move by gfn, because frames change."""
        for vm, why in {(b.vm, b.why) for b in brackets}:
            mine = [b for b in brackets if (b.vm, b.why) == (vm, why)]
            begun = sorted(p for b in mine if b.ok is None for p in b.pages())
            ended = sorted(p for b in mine if b.ok is not None for p in b.pages())
            if why is Why.MIGRATE:
                begun, ended = [(g, 0) for g, _ in begun], [(g, 0) for g, _ in ended]
            if begun != ended or mine[-1].ok is None or mine[0].ok is not None:
                yield "brackets", f"vm/{vm} {why.value}: {begun} was started, {ended} was ended"

    def _wrapped(self, ops: Ops, vm: int) -> Ops:
        there = [name for name in ops.__struct_fields__ if getattr(ops, name) is not None]
        wrapped: dict[str, Any] = {
            name: self._wrapper(name, getattr(ops, name), vm)
            for name in there
            if name not in AT_LOAD
        }
        return replace(ops, **wrapped)

    def _wrapper(self, name: str, op: Callable[..., Any], vm: int) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            self.calls[name] += 1
            tx = next((a._tx for a in args if isinstance(a, HookTx)), None)
            if name in ("invalidate_start", "invalidate_end") and tx is not None:
                self._brackets.append((tx, Bracket(vm, *args[1:])))
            raising = self._trip[0] == name and not self.tripped
            if raising:
                self.tripped, self._trip_tx = True, tx
            if not raising or self._trip[1] == "after":
                answer = op(*args)
            if raising:
                raise Tripped(f"{name} was made to raise")
            if name == "convert" and isinstance(answer, Content):
                self.contents |= {(vm, gfn): answer for gfn in args[1].gfns().tolist()}
            return answer

        return called


def reachable(core: Core, consumer: Consumer, op: Callable[..., Any], runs: Runs) -> I64:
    """Return the gfns that a consumer's ``guest_access`` (``op``) allows, asked out of turn.

    Whatever the hook writes is undone; a hook that refuses allows nothing.
    """
    platform = consumer.platform.name
    tx = Tx(core.space, "probe")
    prefixes = (f"vm/{consumer.vm}/{platform}/", f"platform/{platform}/")
    try:
        answer = op(HookTx(tx, prefixes, consumer.vm, core), 0, runs, False)
        allowed: I64 = runs.gfns()[np.asarray(answer.codes) == 0]
        return allowed
    except Exception:
        return np.empty(0, dtype=np.int64)
    finally:
        tx.rollback()
