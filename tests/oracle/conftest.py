"""The oracle's figure: how many operations were made, and that nothing differed.

Told in the summary, or last of all where a number of operations was asked for (``make oracle``).
"""

from __future__ import annotations

import os

import pytest

FIGURE = pytest.StashKey[str]()
IS_ASKED_FOR = "RMEMD_ORACLE_STEPS" in os.environ


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say the figure, if there is one."""
    if FIGURE in config.stash and not IS_ASKED_FOR:
        terminalreporter.write_line(f"oracle: {config.stash[FIGURE]}")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Say the figure after everything else."""
    if FIGURE in config.stash and IS_ASKED_FOR:
        print(config.stash[FIGURE])
