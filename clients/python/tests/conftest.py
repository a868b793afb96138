from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode gives test helpers no path

from fake_daemon import FakeDaemon
from relay import Relay

from rmem_client import Client


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    # pytest's own tmp_path can be longer than a socket's path may be
    with tempfile.TemporaryDirectory(prefix="rmem-") as directory:
        yield Path(directory)


@pytest.fixture
def daemon(socket_dir: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(socket_dir)
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.socket_dir, deadline_s=10) as made:
        yield made


@pytest.fixture
def relay(daemon: FakeDaemon, socket_dir: Path) -> Iterator[Relay]:
    """A relay to the fake daemon, in ``socket_dir/relay``."""
    (socket_dir / "relay").mkdir()
    made = Relay(socket_dir / "relay" / "rmemd.sock", socket_dir / "rmemd.sock")
    yield made
    made.close()
