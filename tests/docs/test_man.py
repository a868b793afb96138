"""Every command has a man page, every option is on it, and groff takes it without a word."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click
import pytest

from rmemctl.main import cli
from rmemd.daemon.cli import main as rmemd

MAN = Path(__file__).parents[2] / "docs" / "man.py"


def load() -> Any:
    spec = spec_from_file_location("rmemd_docs_man", MAN)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


man = load()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    man.write(directory)
    return directory


def commands(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    yield "-".join(words), command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, (*words, name))


COMMANDS = dict([*commands(cli, ("rmemctl",)), *commands(rmemd, ("rmemd",))])


def test_every_command_has_a_page_and_every_page_a_command(written: Path) -> None:
    assert {path.stem for path in written.iterdir()} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_on_the_page(written: Path, name: str) -> None:
    page = (written / f"{name}.1").read_text()
    shown = [one for one in COMMANDS[name].params if isinstance(one, click.Option)]
    for option in shown:
        if option.hidden:
            continue
        for spelt in (*option.opts, *option.secondary_opts):
            assert spelt.replace("-", "\\-") in page, spelt
        # the first words of its help, before what click adds
        words = (option.help or "").partition("[")[0].split()[:3]
        assert man.quote(" ".join(words)) in page
    assert "\\-\\-help" in page


def test_the_page_of_a_group_names_what_is_below_it(written: Path) -> None:
    page = (written / "rmemctl-host.1").read_text()
    for name in COMMANDS["rmemctl-host"].commands:  # type: ignore[attr-defined]
        assert f".BR rmemctl\\-host\\-{name} (1)" in page


def test_examples_keep_their_lines(written: Path) -> None:
    page = (written / "rmemctl-completion.1").read_text()
    assert ".nf\nbash:  eval \\(dq$(rmemctl completion bash)\\(dq" in page
    assert "\b" not in page


@pytest.mark.parametrize(
    ("text", "roff"),
    [
        (".TH x", "\\&.TH x"),
        ("'a", "\\&'a"),
        ("a\\b", "a\\eb"),
        ('"a"', "\\(dqa\\(dq"),
        ("-x", "\\-x"),
    ],
)
def test_text_is_no_roff(text: str, roff: str) -> None:
    assert man.quote(text) == roff


def test_equal_commands_make_equal_pages(written: Path, tmp_path: Path) -> None:
    for path in man.write(tmp_path):
        assert path.read_bytes() == (written / path.name).read_bytes()


def test_groff_has_nothing_to_say(written: Path) -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed")
    for path in sorted(written.iterdir()):
        done = subprocess.run(
            [groff, "-man", "-Tutf8", "-ww", "-rCHECKSTYLE=1", str(path)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), path.name
