from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# importlib mode gives test helpers no path; the fake daemon is the client library's
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "python" / "tests")]

import world  # noqa: E402
from fake_daemon import SERVING, FakeDaemon  # noqa: E402

from rmemctl.main import run  # noqa: E402


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with tempfile.TemporaryDirectory(prefix="rmem-") as directory:
        fake = FakeDaemon(Path(directory))
        fake.answers = world.answers()
        fake.health.set("", SERVING)
        fake.start()
        yield fake
        fake.stop()


@pytest.fixture
def rmemctl(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    monkeypatch.setenv("RMEMD_SOCKET_DIR", str(daemon.socket_dir))
    monkeypatch.setenv("COLUMNS", "100")
    # it sets this by itself, for its own process
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")

    def call(*args: str) -> Result:
        code = run(args)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call
