"""rmemctl as a process of its own, and the terminals that it can be given."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

PATIENCE = 30.0
RMEMCTL = [sys.executable, "-c", "from rmemctl.main import main; main()"]


def start(
    socket_dir: Path, *args: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start rmemctl on a daemon's socket; on a terminal it may use it, but no colours."""
    return subprocess.Popen(
        [*RMEMCTL, "--socket-dir", str(socket_dir), *args],
        stdout=stdout, stderr=stderr, text=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": "1"},
    )  # fmt: skip


def read_some(terminal: int) -> str:
    """Read what comes next from a terminal."""
    assert select.select([terminal], [], [], PATIENCE)[0], "nothing to read"
    return os.read(terminal, 4096).decode()


def read_all(terminal: int) -> str:
    """Read a terminal to its end, which is an error for Linux."""
    text = b""
    try:
        while piece := os.read(terminal, 4096):
            text += piece
    except OSError:
        pass
    os.close(terminal)
    return text.decode()
