"""ARCHITECTURE.md walks real code: every name it links is defined in the file it links to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[`(?P<name>[^`\]]+)`(?:s)?\]\((?P<path>[^)#]+)\)")
LINKS = sorted(
    {(m["name"], m["path"]) for m in LINK.finditer((ROOT / "ARCHITECTURE.md").read_text())}
)


@pytest.mark.parametrize(("name", "path"), LINKS)
def test_linked_name_is_defined(name: str, path: str) -> None:
    text = (ROOT / path).read_text()
    last = name.rpartition(".")[2]
    defined = re.search(rf"^\s*(?:def|class) {re.escape(last)}\b", text, re.MULTILINE)
    assert defined or name in (Path(path).stem, "import-linter"), f"{path} defines no {last}"


def test_the_fault_walk_is_there() -> None:
    paths = {path for _, path in LINKS}
    for part in (
        "clients/python",
        "rmemd/rpc",
        "rmemd/engine",
        "rmemd/model",
        "rmemd/consumers",
        "plugins/tdx",
    ):
        assert any(path.startswith(part) for path in paths), part


def test_two_pages() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 140
