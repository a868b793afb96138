"""A daemon of one's own, as a child process: found, started, its log kept, ended by SIGTERM.

Owns the process, its private directory and its log; what ``pytest_plugin`` builds on. Imports
neither gRPC nor the API, so that a test run that uses no fixture pays for neither.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .paths import MAX_SOCKET_PATH_BYTES, SOCKET_NAME, path_bytes

PATIENCE_S = 30.0
LOG_TAIL_BYTES = 64 * 1024

NOT_INSTALLED = (
    "no rmemd to run: there is no command `rmemd` beside {python}, nor on PATH.\n"
    "Install the package `rmemd` and the plugins that your tests use (rmemd-tdx, rmemd-snp, "
    "rmemd-pkvm, rmemd-gup, rmemd-null) into the environment that runs pytest; "
    "in a checkout of rmemd, `make setup` does it, and .venv/bin/python -m pytest has them."
)


class NotInstalled(Exception):
    """There is no daemon to run; the message says what to do."""


class DaemonFailed(Exception):
    """The daemon did not start, or did not end as it should; the message has its log."""


def find_command() -> str:
    """Return the path of ``rmemd``: that of this Python's environment, else the one on PATH.

    Raises:
        NotInstalled: there is none.
    """
    beside = Path(sys.executable).parent
    found = shutil.which("rmemd", path=str(beside)) or shutil.which("rmemd")
    if found is None:
        raise NotInstalled(NOT_INSTALLED.format(python=sys.executable))
    return found


class DaemonProcess:
    """``rmemd serve`` in a directory of its own under the temporary directory.

    Args:
        options: further options of ``rmemd serve``.

    Attributes:
        socket_dir: what a ``Client`` takes.
        process: the process; ``process.pid`` is what a signal needs.
        start_seconds: how long the last start took until the daemon said that it serves.
        starts: how often it was started, 1 with the first.
    """

    process: subprocess.Popen[bytes]
    start_seconds: float

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._command = find_command()
        self._options = list(options)
        self.socket_dir = _short_directory()
        self._log = self.socket_dir / "log"
        self.starts = 0

    def start(self) -> None:
        """Start it and wait until it says that it serves.

        Raises:
            DaemonFailed: it does not.
        """
        ready, ready_of_daemon = os.pipe()
        env = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
        command = [
            # whatever this machine's own daemon is configured as
            self._command, "serve", "--config", os.devnull,
            # one that is killed is to be gone
            "--socket-dir", str(self.socket_dir), "--log-json", "--no-keeper",
            "--ready-fd", str(ready_of_daemon), *self._options,
        ]  # fmt: skip
        begun = time.monotonic()
        try:
            with self._log.open("wb") as log:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    pass_fds=[ready_of_daemon], env=env,
                )  # fmt: skip
        finally:
            os.close(ready_of_daemon)
        try:
            # one line when it serves, or the end of the pipe when it ends
            answered, _, _ = select.select([ready], [], [], PATIENCE_S)
            if not answered or not os.read(ready, 4096):
                self.kill()
                raise DaemonFailed(f"rmemd did not start: {' '.join(command)}\n{self.log()}")
        finally:
            os.close(ready)
        self.start_seconds = time.monotonic() - begun
        self.starts += 1

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    def log_size(self) -> int:
        """Return how many bytes the daemon has logged since it was started."""
        return self._log.stat().st_size if self._log.exists() else 0

    def log(self, start: int = 0) -> str:
        """Return what it has logged from an offset on, the last 64 KiB at most."""
        size = self.log_size()
        if size <= start:
            return ""
        with self._log.open("rb") as log:
            log.seek(max(start, size - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")

    def restart(self) -> None:
        """Put a fresh daemon in its place, at the same address."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End it by SIGTERM and remove its directory.

        Raises:
            DaemonFailed: it had ended before, or did not end well.
        """
        if self.running:
            self.process.send_signal(signal.SIGTERM)
        try:
            code: int | str = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = f"none within {PATIENCE_S:g} s of SIGTERM"
        log = self.log()
        self.remove()
        if code != 0:
            raise DaemonFailed(f"rmemd ended with exit code {code}\n{log}")

    def kill(self) -> None:
        """End it by SIGKILL, whatever it does."""
        self.process.kill()
        self.process.wait()

    def remove(self) -> None:
        """Remove its directory."""
        shutil.rmtree(self.socket_dir, ignore_errors=True)


def _short_directory() -> Path:
    """Make a private directory whose socket's path is short enough to be one."""
    made = Path(tempfile.mkdtemp(prefix="rmemd-"))
    if path_bytes(made / SOCKET_NAME) > MAX_SOCKET_PATH_BYTES:
        made.rmdir()
        made = Path(tempfile.mkdtemp(prefix="rmemd-", dir="/tmp"))
    return made
