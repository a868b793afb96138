"""Restarts: an engine that is reopened, as after a kill -9, goes on as the one that was not.

Owns ``Twin``, the engine that is made of a copy of what is kept of another one, and ``Both``, by
which the two are asked the same. The conformance kit makes one every so many steps: the state, the
bytes, what the consumers say of their pages, and what the next operations come to must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from rmemd.engine.calls import named as journalled
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.errors import RmemError
from rmemd.hooks.tables import same_state
from rmemd.model.host import ARENA, Stored
from rmemd.model.vms import Vm, unpack
from rmemd.store.codec import encode_value
from rmemd.testing.attributes import changed, plain
from rmemd.testing.keeping import Kept, reopened
from rmemd.units import I64, MAX_GFN

# of an answer, in a finding
SHOWN = 120


class Twin:
    """An engine beside another: what would be there if that one were killed now.

    Raises:
        Exception: it cannot be made; what a plugin raises, or what is wrong with the state.
    """

    def __init__(self, engine: Engine, kept: Kept) -> None:
        self._one = engine.core
        self.engine = reopened(kept, replace(engine.core.options, kept_records=0))
        self._other = self.engine.core
        with self._one.locked():
            # the next twin reads what comes from here on, and a checkpoint
            self._one.journal.begin_generation()

    def close(self) -> None:
        """Let go of it."""
        self.engine.close()
        kept = self._other.keeping
        if isinstance(kept, Kept):
            kept.close()

    def different(self) -> Iterator[str]:
        """Say in which way it is not what the other is, right after it was made."""
        recovered = self.engine.recovered
        if recovered is not None:
            yield from (f"lost in a kill: {what}" for what in recovered.lost)
        yield from check(self._other)
        yield from self.strayed()
        for vm in self._one.vms.all():
            yield from self._objects(vm)
            yield from self._states(vm)

    def strayed(self) -> Iterator[str]:
        """Say in which way state and bytes are not those of the other."""
        names = same_state(self._one.space.snapshot(), self._other.space.snapshot())
        if names:
            yield f"these tables are not what they were: {names}"
            return
        pfns = np.flatnonzero(self._one.host.flags.view & ARENA).astype(np.int64)
        pfns = pfns[self._one.host.stored.get(pfns) != Stored.TAINTED]
        differ = (self._one.controller.raw(pfns) != self._other.controller.raw(pfns)).any(axis=1)
        if differ.any():
            yield f"{int(differ.sum())} frames hold other bytes, first pfn {pfns[differ][0]:#x}"
        for file in self._one.files.all():
            if _shared(self._one, file.info.file) != _shared(self._other, file.info.file):
                yield f"the shared bytes of file/{file.info.file} are not what they were"

    def _objects(self, vm: Vm) -> Iterator[str]:
        number = vm.info.vm
        one, other = self._one.consumers[number], self._other.consumers[number]
        names = changed(plain(one.made), plain(other.made))
        if names and other.ops.resume is None:
            yield f"vm/{number}: {names} are kept outside of tables, and there is no resume"
        elif names:
            yield f"vm/{number}: {names} are kept outside of tables, and resume made others"

    def _states(self, vm: Vm) -> Iterator[str]:
        """Say where the vendor has another word for the state of a page."""
        gfns = vm.mirror.touched(0, MAX_GFN)
        pfns, _ = unpack(vm.mirror.get(gfns))
        one, other = (_names(core, vm.info.vm, gfns, pfns) for core in (self._one, self._other))
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if at is not None:
            was = f"was {one[at]!r} and is {other[at]!r}"
            yield f"vm/{vm.info.vm}: page_state of gfn {int(gfns[at]):#x} {was}"


def _names(core: Core, vm: int, gfns: I64, pfns: I64) -> list[str]:
    try:
        states = core.consumers[vm].page_state(gfns, pfns)
    except RmemError as refusal:
        return [str(refusal)] * gfns.size
    if states is None:
        return [""] * gfns.size
    return [states.names[code] for code in states.codes.tolist()]


def _shared(core: Core, number: int) -> bytes:
    """Return what a file's shared memfd holds: which pages, and their bytes."""
    file = core.files.get(number)
    if not core.has_shared_memory(file):
        return b""
    memory = core.shared_memory(file)
    there = memory.present(0, file.info.size_pages)
    return there.tobytes() + memory.read(there).tobytes()


# --- the same, asked of both ---------------------------------------------------------------------
class Outcome(Struct, frozen=True):
    """What a call came to: a result, or what it raised; ``said`` is equal if they are."""

    said: bytes
    result: Any = None
    error: Exception | None = None

    def value(self) -> Any:
        """Return the result, or raise."""
        if self.error is not None:
            raise self.error
        return self.result

    def __str__(self) -> str:
        """Return it in a few words."""
        text = repr(self.result) if self.error is None else str(self.error)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class Both:
    """An engine's methods, each carried out by its twin too.

    Args:
        engine: whose results are returned.
        twin: what it is compared with.
        differ: told of each call that came to something else there.
    """

    def __init__(self, engine: Engine, twin: Twin, differ: Callable[[str], None]) -> None:
        self.core = engine.core
        self._engine, self._twin, self._differ = engine, twin, differ

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._ask, name)

    def _ask(self, name: str, *args: Any, **named: Any) -> Any:
        one = outcome(partial(getattr(self._engine, name), *args, **named))
        other = outcome(partial(getattr(self._twin.engine, name), *args, **named))
        if one.said != other.said:
            self._differ(f"{name} comes to {one}; after a kill to {other}")
        return one.value()


def outcome(call: Callable[[], Any]) -> Outcome:
    """Return what a call comes to."""
    try:
        result = call()
    except RmemError as refusal:
        return Outcome(f"{refusal.reason.name}: {refusal.message}".encode(), error=refusal)
    try:
        return Outcome(encode_value(journalled(result)), result)
    except TypeError:
        # a report with objects of the model: the state tells the same
        return Outcome(type(result).__name__.encode(), result)
