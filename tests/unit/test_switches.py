"""gRPC's switches: set before it is imported, never over a user's own, never by the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmemd.daemon.switches import MEASURED, VARIABLE, set_switches

# a stand-in for the module that imports gRPC: it tells what it finds when it is asked for
SERVE = """
import os, sys, types
def asked(name):
    print(os.environ.get("GRPC_EXPERIMENTS"), "grpc" in sys.modules)
    raise SystemExit
app = types.ModuleType("rmemd.daemon.app")
app.__getattr__ = asked
sys.modules[app.__name__] = app
from rmemd.daemon.cli import main
main(["serve", "--no-keeper", "--socket-dir", sys.argv[1]])
"""
LIBRARY = """
import os
before = dict(os.environ)
import rmem_client
print(dict(os.environ) == before)
"""


def run(code: str, *args: str, **environment: str) -> str:
    """Run Python code; return what it prints."""
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", code, *args], env={**clean, **environment}, check=True,
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


@pytest.mark.parametrize("own", ["", "event_engine_listener"])
def test_a_users_own_stay(own: str) -> None:
    environment = {VARIABLE: own}
    set_switches(environment)
    assert environment == {VARIABLE: own}


def test_they_are_set_before_grpc_is_imported(tmp_path: Path) -> None:
    assert run(SERVE, str(tmp_path / "rmemd")) == f"{MEASURED} False"


def test_a_users_own_reach_the_daemon(tmp_path: Path) -> None:
    assert run(SERVE, str(tmp_path / "rmemd"), **{VARIABLE: "a_switch"}) == "a_switch False"


def test_the_client_library_leaves_the_environment_alone() -> None:
    assert run(LIBRARY) == "True"
