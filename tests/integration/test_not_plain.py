"""A hook that writes what no journal can hold: a fault of the plugin, undone, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from guests import Guest
from keeping import Kept, kept_engine, reopened

from rmemd.consumers.guard import Consumer
from rmemd.engine.engine import Engine
from rmemd.errors import PluginFault
from rmemd.hooks import ENTRY_POINTS
from rmemd.hooks.hooktx import HookTx
from rmemd.hooks.tables import same_state

TEMPLATE = Path(__file__).parents[2] / "plugins" / "template"
NPAGES = 8


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Engines that have the broken plugins beside the installed ones."""
    monkeypatch.syspath_prepend(TEMPLATE)
    point = EntryPoint("mutant", "mutants:PutsWhatIsNotPlain", ENTRY_POINTS)
    yield {"plugins": (point,)}
    for name in ("mutants", "rmemd_template"):
        sys.modules.pop(name, None)


@pytest.fixture
def engine(kept: Kept, options: dict[str, Any]) -> Iterator[Engine]:
    made = kept_engine(kept, **options)
    yield made
    made.close()


def test_it_names_plugin_hook_table_and_type_and_is_undone(
    engine: Engine, kept: Kept, options: dict[str, Any]
) -> None:
    guest, other = Guest(engine, "mutant", NPAGES), Guest(engine, "null", NPAGES)
    before, revision = engine.core.space.snapshot(), engine.revision
    with pytest.raises(PluginFault) as raised:
        guest.fault(0, 2)
    fault = raised.value
    assert fault.reason.name == "PLUGIN_NONSENSE"
    assert fault.details.where == f"mutant(vm/{guest.vm}).map"
    assert f"vm/{guest.vm}/mutant/facts under 'last'" in fault.message
    assert fault.message.endswith("not mutants.Memory")
    assert same_state(before, engine.core.space.snapshot()) == []
    assert engine.revision == revision
    # nothing of it is in the log, and the engine goes on
    other.fault(0, 2)
    after = reopened(kept, **options)
    assert same_state(engine.core.space.snapshot(), after.core.space.snapshot()) == []
    after.close()


def test_what_the_engine_itself_writes_is_not_blamed_on_a_plugin(engine: Engine) -> None:
    with pytest.raises(TypeError), engine.core.locked(), engine.core.tx("wrong") as tx:
        tx.set(engine.core.host.counters, "wrong", object())


def test_a_hook_is_known_by_what_was_written_before_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks of a fault are prepare and map: the one that wrote is named, not the last one."""
    guest = Guest(engine, "null", NPAGES)
    call = Consumer.call

    def writing(self: Consumer, tx: Any, op: str, *args: Any) -> Any:
        answer = call(self, tx, op, *args)
        if op == "invalidate_start":
            tx.set(engine.core.host.counters, "wrong", {1, 2})
        return answer

    guest.fault(0, 1)
    monkeypatch.setattr(Consumer, "call", writing)
    with pytest.raises(PluginFault) as raised:
        guest.punch(0, 1)
    assert raised.value.details.where == f"null(vm/{guest.vm}).invalidate_start"


def test_an_event_of_a_hook_names_handles_by_numbers(engine: Engine) -> None:
    with engine.core.locked(), pytest.raises(TypeError), engine.core.tx("told") as tx:
        HookTx(tx, (), 1, engine.core).emit("told", vm="one")
