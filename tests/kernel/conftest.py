"""Says at the end how much of the kernel's own tests was run."""

from __future__ import annotations

import pytest
from kernel.catalogue import LEFT_OUT, read_left_out

RAN = pytest.StashKey[set[str]]()


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    config.stash[RAN] = set()


@pytest.fixture
def count_case(request: pytest.FixtureRequest) -> None:
    """Count a kernel case as run."""
    request.config.stash[RAN].add(request.node.nodeid)


@pytest.hookimpl
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    ran = len(config.stash[RAN])
    if ran:
        where = LEFT_OUT.relative_to(config.rootpath)
        terminalreporter.write_line(
            f"kernel cases: {ran} run, {len(read_left_out())} left out ({where})"
        )
