"""Completions, asked for as the shells do: commands, and handles that the daemon knows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_daemon import FakeDaemon, Refuse

from rmem.v1 import types_pb2

Ctl = Callable[..., Any]
BIN = Path(sys.executable).parent

# what bash does for Tab: words, the index of the one under the cursor, and the function
PRESS_TAB = """
eval "$(rmemctl completion bash)"
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
"$(complete -p rmemctl | sed 's/.*-F \\([^ ]*\\).*/\\1/')" rmemctl
printf '%s\\n' "${COMPREPLY[@]}"
"""


def environment(daemon_dir: Path | str) -> dict[str, str]:
    return {
        **os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RMEMD_SOCKET_DIR": str(daemon_dir)
    }  # fmt: skip


def tab(socket_dir: Path | str, *words: str) -> list[str]:
    """Press Tab in bash after these words, the last of which may be empty."""
    done = subprocess.run(
        ["bash", "--norc", "-c", PRESS_TAB, "bash", "rmemctl", *words],
        capture_output=True, text=True, timeout=60, env=environment(socket_dir), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ho"], ["host"]),
        (["host", "o"], ["offline", "online"]),
        (["vm", "show", ""], ["vm/1", "vm/3", "vm/4"]),
        (["vm", "show", "vm/3"], ["vm/3"]),
        (["vm", "show", "3"], ["3"]),
        (["page", "who", "--vm", ""], ["vm/1", "vm/3", "vm/4"]),
        (["mem", "show", "file/"], ["file/1", "file/2"]),
        (["mem", "unpin", ""], ["pin/4", "pin/7"]),
        (["fault", "remove", ""], ["rule/1", "rule/2"]),
        (["job", "wait", ""], ["operations/1", "operations/2", "operations/3"]),
        (["vm", "create", "tdx-"], ["tdx-today", "tdx-2022", "tdx-relocate"]),
        (["vm", "create", "snp", "--personality", ""], ["attributes", "in-place"]),
        (["-o", "js"], ["json", "jsonl"]),
        (["mem", "create", "1", ""], []),
    ],
)
def test_bash_completes(daemon: FakeDaemon, words: list[str], expected: list[str]) -> None:
    assert tab(daemon.socket_dir, *words) == expected


def test_the_daemon_that_the_line_names_is_asked(daemon: FakeDaemon) -> None:
    words = ["--socket-dir", str(daemon.socket_dir), "vm", "show", ""]
    assert tab("/nowhere", *words) == ["vm/1", "vm/3", "vm/4"]


def test_without_a_daemon_it_is_quiet() -> None:
    assert tab("/nowhere", "vm", "show", "") == []
    assert tab("/nowhere", "vm", "sl") == ["slot"]


def test_a_daemon_that_refuses_is_quiet_too(daemon: FakeDaemon) -> None:
    refusal = types_pb2.Refusal(reason="ROLE_DENIED")
    daemon.answers["ListVms"] = Refuse(grpc.StatusCode.PERMISSION_DENIED, "no", refusal)
    assert tab(daemon.socket_dir, "vm", "show", "") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_ask_in_their_own_way(daemon: FakeDaemon, shell: str) -> None:
    script = subprocess.run(
        [BIN / "rmemctl", "completion", shell], capture_output=True, text=True, timeout=60,
        check=True,
    ).stdout  # fmt: skip
    assert f"_RMEMCTL_COMPLETE={shell}_complete" in script
    words = {"COMP_WORDS": "rmemctl vm show ", "COMP_CWORD": "3" if shell == "zsh" else ""}
    asked = subprocess.run(
        [BIN / "rmemctl"], capture_output=True, text=True, timeout=60, check=True,
        env={**environment(daemon.socket_dir), **words,
             "_RMEMCTL_COMPLETE": f"{shell}_complete"},
    )  # fmt: skip
    assert "vm/3" in asked.stdout
    # and what it is: the consumer
    assert "pkvm-gmem" in asked.stdout
    assert asked.stderr == ""


def test_the_script_as_json(rmemctl: Ctl) -> None:
    reply = rmemctl("completion", "fish", "-o", "json").json
    assert reply["shell"] == "fish"
    assert "complete --no-files --command rmemctl" in reply["script"]
    assert rmemctl("completion", "csh").code == 2
