"""VMM processes that die around a restart of their daemon leave nothing behind.

`make deaths` kills more of them; ``test_session_death`` has those whose daemon lives on.
"""

from __future__ import annotations

from pathlib import Path

from .campaign import BOTH_DIE, Figure, run

DEATHS, SEED = 15, 1


def test_nothing_is_left_of_a_vmm_that_was_killed(tmp_path: Path) -> None:
    figure: Figure = run(tmp_path / "d", DEATHS, SEED)
    print(figure)
    assert figure.wrong == []
    assert figure.holds
    assert figure.below > DEATHS // 3
    assert sum(figure.deaths[when] for when in BOTH_DIE) == DEATHS // 3
