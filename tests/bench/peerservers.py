"""The peers as processes: Plasma and vineyard in an environment of their own, QEMU's monitor.

Owns how each is had, started and told to run a round. What cannot be had here says why; what is
there and does not work is ``LeftOut``, unexcused.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.bench.harness import ROOT, LeftOut

ENVIRONMENT = ROOT / "build" / "peers"
PYTHON = ENVIRONMENT / "bin" / "python"
LOCK = Path(__file__).with_name("peers.lock")
CLIENT = Path(__file__).with_name("peerclients.py")
QEMU = "qemu-system-x86_64"
# for another Python than they were built for pip says so, and does not compile for an hour
BUILT = "numpy,pandas,pyarrow"
STORE_BYTES = 1 << 30
PATIENCE_SECONDS = 30.0


class Peer:
    """A peer whose server serves and whose client is connected."""

    def __init__(self, name: str, client: subprocess.Popen[str], log: Path) -> None:
        self._name, self._client, self._log = name, client, log
        self._answer()

    def round(self, size_bytes: int, cycles: int) -> float:
        """Create, use and release so many objects of a size; return the seconds it took.

        Raises:
            LeftOut: it failed, with what it said.
        """
        self._client.stdin.write(f"{size_bytes} {cycles}\n")
        self._client.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        line = self._client.stdout.readline()
        if not line:
            raise LeftOut(self._name, f"it failed:\n{self._log.read_text()}", excused=False)
        return line


@dataclass(frozen=True)
class Kind:
    """How a peer is had.

    Attributes:
        name: what it is called in figures.
        client: its name among ``peerclients.CLIENTS``.
        why_not: why it cannot be had here, "" if it can.
        python: the interpreter of its client.
        server: the command that serves at a socket.
    """

    name: str
    client: str
    why_not: Callable[[], str]
    python: Path
    server: Callable[[Path], Sequence[str]]


@cache
def _install() -> str:
    """Install the peers' environment unless it is there; return why that cannot be done."""
    installed = ENVIRONMENT / "installed.lock"
    if installed.exists() and installed.read_bytes() == LOCK.read_bytes():
        return ""
    venv.create(ENVIRONMENT, clear=True, with_pip=True)
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    done = subprocess.run(
        [*pip, "--only-binary", BUILT, "--require-hashes", "-r", LOCK],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return f"pip cannot install it: {' '.join(errors[-1:])}"
    installed.write_bytes(LOCK.read_bytes())
    return ""


def _packaged(name: str) -> str:
    (found,) = ENVIRONMENT.glob(f"lib/python*/site-packages/{name}")
    return str(found)


def _plasma(path: Path) -> Sequence[str]:
    return [_packaged("pyarrow/plasma-store-server"), "-m", str(STORE_BYTES), "-s", str(path)]


def _vineyard(path: Path) -> Sequence[str]:
    server = _packaged("vineyard/bdist/vineyardd")
    # its metadata in its own memory, as etcd would be one more process
    return [server, "--socket", str(path), "--meta", "local", "--size", "1Gi", "--norpc"]


def _qmp(path: Path) -> Sequence[str]:
    return [QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp",
            f"unix:{path},server=on,wait=off"]  # fmt: skip


def _no_qemu() -> str:
    return "" if shutil.which(QEMU) else f"{QEMU} is not installed"


PLASMA = Kind("Plasma", "plasma", _install, PYTHON, _plasma)
VINEYARD = Kind("vineyard", "vineyard", _install, PYTHON, _vineyard)
QMP = Kind("QMP", "qmp", _no_qemu, Path(sys.executable), _qmp)


@contextmanager
def serving(kind: Kind, folder: Path) -> Iterator[Peer]:
    """Start a peer's server and its client, on the CPUs of the caller."""
    path, log = folder / f"{kind.client}.sock", folder / f"{kind.client}.log"
    with log.open("ab") as said, _process(kind.server(path), stdout=said, stderr=said) as server:
        if not _listens(path, server):
            raise LeftOut(kind.name, f"it does not serve:\n{log.read_text()}", excused=False)
        with _process(
            [str(kind.python), str(CLIENT), kind.client, str(path)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=said, text=True,
        ) as client:  # fmt: skip
            yield Peer(kind.name, client, log)


def _listens(path: Path, server: subprocess.Popen[bytes]) -> bool:
    """Wait until somebody listens at a path; a peer has no other way to say that it is ready."""
    end = time.monotonic() + PATIENCE_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
            return True
        except OSError:
            time.sleep(0.02)
    return False


@contextmanager
def _process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()
