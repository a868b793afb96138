"""The template passes the conformance kit, installed as any plugin is; copy this test with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from rmemd.hooks import ENTRY_POINTS
from rmemd.testing.conformance import check_consumer

PLUGIN = Path(__file__).parents[1]
ROOT = PLUGIN.parents[1]
NULL = frozenset(
    ("pin", "unpin", "populate", "finalize", "enter", "leave", "guest_call", "resume")
)  # fmt: skip
LINES_MAX = 200


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the plugin for this process: its package and a dist-info on the path."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    points = project["entry-points"][ENTRY_POINTS]
    info = tmp_path / "rmemd_template-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = "\n".join(f"{name} = {value}" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{lines}\n")
    for directory in (tmp_path, PLUGIN):
        monkeypatch.syspath_prepend(directory)
    yield
    sys.modules.pop("rmemd_template", None)


@pytest.mark.usefixtures("installed")
def test_the_template_conforms() -> None:
    unreached = []
    for seed in range(3):
        report = check_consumer("template", null=NULL, seed=seed)
        report.require()
        unreached.append(report.unreached)
    assert frozenset.intersection(*unreached) == frozenset()


def test_it_is_not_installed_by_default() -> None:
    assert "template" not in {point.name for point in entry_points(group=ENTRY_POINTS)}
    assert "filter-out plugins/template" in (ROOT / "Makefile").read_text()


def test_it_is_short_enough_to_be_read() -> None:
    source = (PLUGIN / "rmemd_template" / "__init__.py").read_text().splitlines()
    assert len(source) <= LINES_MAX


def test_it_imports_what_a_plugin_may(tmp_path: Path) -> None:
    """The contract of the other plugins, which names installed packages only."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = next(c for c in linter["contracts"] if c["id"] == "plugins")
    config = tmp_path / "importlinter.ini"
    ignored = "\n    ".join(contract["ignore_imports"])
    config.write_text(
        "[importlinter]\nroot_packages =\n    rmemd\n    rmemd_template\n"
        "[importlinter:contract:plugins]\nname = plugins\ntype = forbidden\n"
        "source_modules = rmemd_template\nforbidden_modules = rmemd.*\n"
        f"allow_indirect_imports = true\nignore_imports =\n    {ignored}\n"
        "unmatched_ignore_imports_alerting = none\n"
    )
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--config", str(config)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(PLUGIN)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
