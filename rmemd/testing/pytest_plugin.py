"""The fixture ``rmemd_engine``: an engine in the test's own process, a fresh one for each test.

Loaded by pytest in every run, so nothing of rmemd is imported before a fixture is used.
``rmemd_in_process``, the daemon around such an engine, is in ``rmemd.daemon.pytest_plugin``: this
package may import anything but the composition root, which imports everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rmemd.engine.core import Options
    from rmemd.engine.engine import Engine


@pytest.fixture
def rmemd_options() -> Options:
    """What both fixtures make their engine with: 64 MiB, one node. Override it as you like."""
    from rmemd.engine.core import Options

    return Options(nframes=16384)


@pytest.fixture
def rmemd_engine(rmemd_options: Options) -> Iterator[Engine]:
    """An engine with every installed plugin: same seed and calls, same frames, keys, revisions."""
    import time

    from rmemd.consumers.guard import Guard
    from rmemd.engine.engine import Engine

    engine = Engine(rmemd_options, Guard(time.perf_counter))
    engine.watch()
    yield engine
    engine.close()
