"""What every test of the daemon's own may ask for: an engine in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# tests import their helpers by name (`from guests import ...`), whatever the import mode, and the
# benchmarks as `tests.bench`
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from helpers import Clock, MakeEngine, new_engine

from rmemd.engine.engine import Engine

# the same examples in every run; what is found at random elsewhere is added as a test of its own
settings.register_profile(
    "rmemd", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("rmemd")


@pytest.fixture
def clock() -> Clock:
    """The only clock that hooks are measured by; it stands still unless a test moves it."""
    return Clock()


@pytest.fixture
def make_engine(clock: Clock) -> Iterator[MakeEngine]:
    """Make engines with other options; they are closed at the end."""
    made: list[Engine] = []

    def make(**options: int | None) -> Engine:
        made.append(new_engine(clock, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    """A host of 64 MiB on two nodes."""
    return make_engine()
