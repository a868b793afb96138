"""Small scopes, explored to their fixpoints; ``make explore`` has larger ones."""

from __future__ import annotations

import pytest

from rmemd.engine import migrate
from rmemd.hooks.tables import same_state
from rmemd.units import PAGE_SIZE
from simulation.explore import GFN, PUNCH, SMALL, Explorer, Scope, StateError, run


@pytest.mark.parametrize("scope", SMALL, ids=lambda scope: scope.consumer)
def test_every_state_of_a_small_scope_is_sound(scope: Scope) -> None:
    found = run(scope)
    assert found.states > 30
    assert found.transitions > found.states
    assert 0 < found.refused < found.transitions


def test_what_is_undone_is_as_it_was_and_what_is_done_again_too() -> None:
    explorer = Explorer(SMALL[0])
    core = explorer.core
    here = explorer.root
    for name, call in list(explorer.operations()):
        before = core.space.snapshot()
        found = explorer._try(here, name, call)
        after = core.space.snapshot()
        explorer._go(found, here)
        assert same_state(before, core.space.snapshot()) == []
        explorer._go(here, found)
        assert same_state(after, core.space.snapshot()) == []
        explorer._go(found, here)
    explorer.close()


def test_a_state_that_must_not_be_is_told_with_the_shortest_way_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A page that was moved leaves its old frame in use."""
    monkeypatch.setattr(migrate, "_retire", lambda *_: [])
    with pytest.raises(StateError, match=r"after \['fault vm 0 page 0', 'migrate vm 0 page 0'\]"):
        run(SMALL[3])


def test_frames_and_vms_have_no_names() -> None:
    forms = set()
    for order in ((0, 1), (1, 0)):
        explorer = Explorer(SMALL[1])
        (vm, file), (other, _) = (explorer.vms[n] for n in order)
        explorer.engine.pre_fault(vm, GFN * PAGE_SIZE, PAGE_SIZE)
        explorer.engine.pre_fault(other, GFN * PAGE_SIZE, PAGE_SIZE)
        explorer.engine.fallocate(file, PUNCH, 0, PAGE_SIZE)
        forms.add(explorer._canonical())
        explorer.close()
    assert len(forms) == 1
