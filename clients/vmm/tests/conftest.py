from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmem_client import Client
from rmem_vmm.daemon import DaemonProcess


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    log = tmp_path_factory.mktemp("daemon") / "rmemd.log"
    process = DaemonProcess(log, host_memory="256M", nodes=2, seed=5)
    process.start()
    yield process
    process.drain()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with Client(daemon.socket_dir) as made:
        yield made


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A firmware image of two and a half pages."""
    path = tmp_path / "small.fd"
    path.write_bytes(bytes(range(256)) * 40)
    return path


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory whose path is short enough for sockets, and which other users may enter."""
    with tempfile.TemporaryDirectory(prefix="rmem-") as made:
        Path(made).chmod(0o711)
        yield Path(made)
