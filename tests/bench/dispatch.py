"""What it costs that a consumer is called at all, against pluggy's own call.

Either calls a hook that does nothing. Ours is as in a running daemon: fault rules, the mark of who
writes, the deadline, the answer's check. Pluggy's reaches three registered implementations and
collects their answers, as it would if the vendors were plugins of one hook. All is in this process,
and told in its CPU time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pluggy
from msgspec.structs import replace

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Runs
from tests.bench.harness import ROUNDS, Figure, in_turn, on_cpus

BAR = 0.25
VENDORS = 3
# a conversion asks invalidate_start, unpin, convert and invalidate_end
HOOKS_A_TX = 4
# transactions that are opened before the clock runs: an operation has one or two at a time
TXS, NTX = 20, 10_000
QUICK_ROUNDS = 3
spec, impl = pluggy.HookspecMarker("bench"), pluggy.HookimplMarker("bench")


class Spec:
    """The hook as pluggy is told of it."""

    @spec
    def map(self, tx: object, runs: object) -> object:
        """Do nothing."""


class Vendor:
    """A plugin that answers at once."""

    @impl
    def map(self, tx: object, runs: object) -> object:
        """Have something to collect."""
        return runs


def idle(tx: object, runs: object) -> None:
    """Do nothing: the op of the consumer that is called."""


def figures(folder: Path, quick: bool) -> Iterator[Figure]:
    """Yield goal 12: one hook against pluggy's one call, and the same for as many consumers."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    hook = _pluggy()
    engine = Engine(Options(nframes=4096, seed=1), Guard(time.perf_counter))
    consumers = [_consumer(engine) for _ in range(VENDORS)]
    page = np.ones(1, dtype=np.int64)
    runs = Runs(page, page, page)

    def ours(asked: list[Any]) -> float:
        return sum(few(asked) for _ in range(NTX // TXS))

    def few(asked: list[Any]) -> float:
        opened = [Tx(engine.core.space, "bench") for _ in range(TXS)]
        calls = [consumer.call for consumer in asked] * HOOKS_A_TX
        begun = time.process_time()
        for tx in opened:
            for call in calls:
                call(tx, "map", runs)
            tx.views.clear()
        return time.process_time() - begun

    def unguarded() -> float:
        table = [consumer.ops.map for consumer in consumers]
        begun = time.process_time()
        for _ in range(NTX * HOOKS_A_TX):
            [op(None, runs) for op in table]
        return time.process_time() - begun

    def floor() -> float:
        tx = object()
        begun = time.process_time()
        for _ in range(NTX * HOOKS_A_TX):
            hook(tx=tx, runs=runs)
        return time.process_time() - begun

    others = f"pluggy's call of {VENDORS}"
    with on_cpus(1):
        for goal, work, bar in (
            (f"12 a consumer's hook / {others}", lambda: ours(consumers[:1]), BAR),
            (f"hooks of {VENDORS} consumers / {others}", lambda: ours(consumers), None),
            (f"{VENDORS} consumers' ops from their tables, unguarded / {others}", unguarded, None),
        ):
            yield in_turn(goal, work, floor, per=NTX * HOOKS_A_TX, bar=bar, rounds=rounds)
    engine.close()


def _consumer(engine: Engine) -> Any:
    consumer = engine.core.consumers[engine.create_vm("null").info.vm]
    consumer.ops = replace(consumer.ops, map=idle)
    return consumer


def _pluggy() -> Any:
    manager = pluggy.PluginManager("bench")
    manager.add_hookspecs(Spec)
    for _ in range(VENDORS):
        manager.register(Vendor())
    return manager.hook.map
