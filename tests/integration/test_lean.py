"""What a start leaves out: it stays out while the daemon serves, and is there for who asks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rmemd.daemon.lean import HIDDEN, PUT_OFF
from tests.bench.barestart import PACKAGES

# as `rmemd serve` imports it
START = """
import sys
from rmemd.daemon.lean import lean
from rmemd.daemon import cli, logs
logs.configure("info")
with lean():
    import rmemd.daemon.app
"""

THEIR_OWN = {"grpc_tools", "typing_extensions"}


def ran(text: str) -> str:
    """Return what a program that starts as the daemon does prints."""
    done = subprocess.run(
        [sys.executable, "-c", START + text], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_nothing_that_is_put_off_is_imported() -> None:
    assert ran(f"print([name for name in {(*PUT_OFF, HIDDEN)} if name in sys.modules])") == "[]\n"


@pytest.mark.parametrize("name", PUT_OFF)
def test_what_was_put_off_is_imported_as_ever(name: str) -> None:
    said = ran(f"import importlib; m = importlib.import_module({name!r}); print(m.__spec__.name)")
    assert said == f"{name}\n"


def test_who_got_a_stand_in_gets_the_module_s_names() -> None:
    said = ran("import structlog, grpc; print(structlog.stdlib.asyncio.Lock, grpc.aio.server)")
    assert said.startswith("<class 'asyncio.locks.Lock'> <function server at")


def test_what_was_taken_by_name_imports_its_module_when_it_is_called() -> None:
    said = ran(
        "import numpy, structlog\n"
        "print(numpy.roots([1, 0, -4]).round(6).tolist())\n"
        "print((numpy.matrix([[1, 1], [0, 1]]) ** 3).tolist())\n"
        "raised = structlog._output.PicklingError('no')\n"
        "import pickle; print(type(raised) is pickle.PicklingError, *raised.args)\n"
    )
    assert said == "[-2.0, 2.0]\n[[1, 3], [0, 1]]\nTrue no\n"


def test_versions_of_distributions_are_read_as_ever() -> None:
    said = ran(
        "from importlib.metadata import distributions, version\n"
        "from rmemd.consumers.discovery import release_of, version_of\n"
        "print(all(release_of(d) == (d.name, d.version) for d in distributions()))\n"
        "print(version_of('numpy') == version('numpy'))"
    )
    assert said == "True\nTrue\n"


def test_plugins_are_found_as_entry_points_are() -> None:
    said = ran(
        "from importlib.metadata import entry_points\n"
        "from rmemd.consumers.discovery import ENTRY_POINTS, installed\n"
        "found = installed(); print('zipfile' in sys.modules)\n"
        "print(found == sorted(entry_points(group=ENTRY_POINTS), key=lambda one: one.name))"
    )
    assert said == "False\nTrue\n"


def test_the_bench_s_floor_imports_the_packages_that_the_daemon_does() -> None:
    ours = ran(
        "from importlib.metadata import packages_distributions\n"
        "theirs = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(*sorted(theirs & packages_distributions().keys()))"
    )
    tops = {name.partition(".")[0] for name in PACKAGES} - {"rmem"}
    # what those import, wherever they do
    assert {name for name in ours.split() if not name.startswith("_")} - THEIR_OWN == tops
