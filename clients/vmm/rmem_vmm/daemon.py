"""A daemon of one's own: started, known to be ready, drained.

Owns the process. Readiness is what the daemon writes to ``--ready-fd``, its death before that is
the end of that pipe, and its end is a SIGTERM that it answers by draining: nothing sleeps.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

START_SECONDS = 30.0
DRAIN_SECONDS = 20.0
LOG_TAIL_LINES = 8
LOG_LINE_LENGTH = 400


class DaemonError(Exception):
    """The daemon did not start, died, or did not drain."""


class DaemonProcess:
    """``rmemd serve`` as a child, on a private temporary directory.

    Args:
        log: file that takes the daemon's log.
        host_memory: the mock host's memory, "512M".
        nodes: NUMA nodes.
        seed: seed of every key.
    """

    def __init__(self, log: Path, *, host_memory: str, nodes: int, seed: int) -> None:
        self.log = log
        self.socket_dir = Path(tempfile.mkdtemp(prefix="rmem-"))
        self._options = ["--host-memory", host_memory, "--nodes", str(nodes), "--seed", str(seed)]
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Return the daemon's process id."""
        return self._started().pid

    def start(self) -> None:
        """Start it and return when it says that it serves.

        Raises:
            DaemonError: it ended first, or said nothing in time; its log's tail is quoted.
        """
        ready, theirs = os.pipe()
        command = [*rmemd_command(), "serve", "--socket-dir", str(self.socket_dir)]
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                [*command, "--ready-fd", str(theirs), "--log-json", "--no-keeper", *self._options],
                pass_fds=[theirs], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        os.close(theirs)
        try:
            readable, _, _ = select.select([ready], [], [], START_SECONDS)
            said = os.read(ready, 4096) if readable else b""
        finally:
            os.close(ready)
        if not said:
            self.kill()
            raise DaemonError(f"rmemd did not become ready; {self.log_tail()}")

    def require_alive(self) -> None:
        """Raise DaemonError if the daemon has ended."""
        code = self._started().poll()
        if code is not None:
            raise DaemonError(f"rmemd ended with {code}; {self.log_tail()}")

    def drain(self) -> None:
        """Ask it to end (SIGTERM), wait for that, and require exit status 0."""
        child = self._started()
        self.require_alive()
        child.send_signal(signal.SIGTERM)
        try:
            code = child.wait(DRAIN_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DaemonError(f"rmemd did not drain in {DRAIN_SECONDS:g} s") from None
        self._forget_directory()
        if code:
            raise DaemonError(f"rmemd drained with exit status {code}; {self.log_tail()}")

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        self._forget_directory()

    def log_tail(self) -> str:
        """Return the end of its log, for an error message."""
        if not self.log.exists():
            return "it was not started"
        whole = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        lines = [x if len(x) <= LOG_LINE_LENGTH else x[:LOG_LINE_LENGTH] + "…" for x in whole]
        return "\n".join([f"the end of {self.log}:", *lines]) if lines else "it logged nothing"

    def _forget_directory(self) -> None:
        shutil.rmtree(self.socket_dir, ignore_errors=True)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            raise DaemonError("rmemd was not started")
        return self._child


def rmemd_command() -> list[str]:
    """Return how to start rmemd: the one installed beside this Python, else the one on PATH."""
    beside = Path(sys.executable).parent / "rmemd"
    if beside.exists():
        return [str(beside)]
    found = shutil.which("rmemd")
    if found is None:
        raise DaemonError(f"no rmemd beside {sys.executable} and none on PATH: run `make setup`")
    return [found]
