"""What the README tells people to type works, in the order in which it is printed there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import BIN, Daemon

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONSOLES = re.findall(r"```console\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path, "--host-memory", "1G", "--nodes", "2").start()
    yield made
    made.stop()


def test_its_first_two_commands_are_the_makefiles() -> None:
    commands = re.findall(r"^\$ (.*?)(?:\s+#.*)?$", CONSOLES[0], re.MULTILINE)
    assert commands == ["make demo", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "setup", "check", "bench", "protos"} <= set(targets)


def test_ci_calls_the_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_console_session_works(daemon: Daemon) -> None:
    lines = re.findall(r"^\$ (.*)$", CONSOLES[1], re.MULTILINE)
    session = [line for line in lines if "rmemd serve" not in line and "export" not in line]
    assert len(session) < len(lines)
    script = "\n".join(line.replace(".venv/bin/", f"{BIN}/") for line in session)
    done = subprocess.run(
        ["bash", "-euxc", script], text=True, capture_output=True, check=False,
        env={**os.environ, "RMEMD_SOCKET_DIR": str(daemon.socket_dir)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "16 moved" in done.stdout


def test_the_scenarios_that_it_names_are_there() -> None:
    lines = re.findall(r"^\$ (.*?)(?:\s+#.*)?$", CONSOLES[2], re.MULTILINE)
    listed = subprocess.run(
        [BIN / "rmem-vmm", "scenario"], text=True, capture_output=True, check=True
    ).stdout
    named = [line.partition("scenario ")[2] for line in lines]
    assert [name for name in named if name not in listed] == []
    assert len(list(filter(None, named))) == 2


def test_the_clients_session_example_works(daemon: Daemon) -> None:
    page = (ROOT / "clients" / "python" / "README.md").read_text()
    (example,) = [
        block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "Session.open" in block
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", example.replace("/tmp/rm", str(daemon.socket_dir))],
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["b'hello' 1", "b'hello'"]


def test_the_python_example_works(daemon: Daemon) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    example = example.replace("/tmp/rm", str(daemon.socket_dir))
    done = subprocess.run(
        [sys.executable, "-c", example], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "checked_pages: 256" in done.stdout
    assert "mismatched" not in done.stdout
