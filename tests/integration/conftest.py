"""Daemons for tests: started as processes, ended by SIGTERM with exit code 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from daemons import Daemon
from keeping import Kept
from session_clients import Clients

MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[MakeDaemon]:
    """Start daemons; those that still run at the end are stopped, and must exit with 0."""
    made: list[Daemon] = []

    def make(
        *options: str, directory: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Daemon:
        if "--host-memory" not in options:
            options = ("--host-memory", "64M", *options)
        one = Daemon(directory or tmp_path / f"daemon{len(made)}", *options, env=env)
        made.append(one.start())
        return one

    yield make
    running = [one for one in made if one.process.poll() is None]
    try:
        while running:
            running.pop().stop()
    finally:
        for one in running:
            one.kill()


@pytest.fixture
def daemon(daemons: MakeDaemon) -> Daemon:
    """A daemon with 64 MiB of mock host memory."""
    return daemons()


@pytest.fixture
def kept() -> Iterator[Kept]:
    """What outlives an engine of this process."""
    made = Kept()
    yield made
    made.close()


@pytest.fixture(scope="session")
def clients() -> Iterator[Clients]:
    """Start client processes of the session socket."""
    made = Clients()
    yield made
    made.close()
