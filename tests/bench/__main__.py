"""Run the figures, print them as a table, write build/bench.jsonl.

Each is taken beside its floor in the same run. Bars are those of the project's goals; a figure
without one is there to be watched.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS
from rich.console import Console
from rich.table import Table

from rmem_client import Client
from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.store.xts import PageCipher
from rmemd.units import PAGE_SIZE
from tests.bench.harness import Figure, paired, write

ROOT = Path(__file__).parents[2]
CALLS = 300
PAGES = 4096


def main() -> int:
    """Take every figure; exit 1 where a bar does not hold."""
    with tempfile.TemporaryDirectory(prefix="rmemd-bench-") as folder:
        figures = [unary_get_page(Path(folder)), encryption(), *vendors()]
    _show(figures)
    write(figures, ROOT / "build" / "bench.jsonl")
    return int(any(figure.holds is False for figure in figures))


def unary_get_page(folder: Path) -> Figure:
    """GetPage with everything on, against an empty method of a bare server, on one CPU mask."""
    with _served(folder) as client, _bare(folder) as empty:
        vm = client.vms.create("sw-protected")
        file = client.files.create(vm, 1 << 20, flags=1)
        client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=1 << 20, file=file)
        client.vms.prefault(vm, 0, 1 << 20)
        return paired(
            "unary GetPage / Empty on a bare server",
            lambda: [client.host.page(vm=vm, gfn=1) for _ in range(CALLS)],
            lambda: [empty(b"") for _ in range(CALLS)],
            per=CALLS,
        )


def encryption() -> Figure:
    """Pages encrypted in bulk, against one Cipher per page."""
    key = bytes(range(64))
    pfns = np.arange(PAGES, dtype=np.int64)
    rows = np.random.default_rng(1).integers(0, 256, (PAGES, PAGE_SIZE), dtype=np.uint8)
    cipher = PageCipher(key)

    def one_by_one() -> None:
        for pfn in range(PAGES):
            xts = Cipher(AES(key), XTS(pfn.to_bytes(16, "little"))).encryptor()
            xts.update(rows[pfn].tobytes())

    return paired(
        "AES-XTS in bulk / one Cipher per page",
        lambda: cipher.encrypt(pfns, rows), one_by_one, per=PAGES, bar=1 / 3,
    )  # fmt: skip


def vendors() -> Iterator[Figure]:
    """Faults of 16 MiB in one call, against page by page, for every consumer."""
    nbytes = PAGES * PAGE_SIZE
    engine = Engine(Options(nframes=4 * PAGES, seed=1), Guard(time.perf_counter))
    for name in sorted(engine.core.registry.offers):
        vm = engine.create_vm(name).info.vm
        in_place = engine.core.vms.get(vm).info.in_place
        file = engine.create_file(vm, nbytes, int(in_place)).info.file
        engine.set_memory_region(vm, 0, 4, 0, nbytes, file)
        engine.create_vcpu(vm, 0)
        if engine.core.consumers[vm].ops.finalize is not None:
            engine.finalize(vm)
        yield _faults(engine, name, vm)
        engine.destroy_vm(vm)
        engine.close_file(file)
    engine.close()


def _faults(engine: Engine, name: str, vm: int) -> Figure:
    step, few = PAGE_SIZE, 64
    at = iter(range(0, PAGES, few))

    def in_one_call() -> None:
        engine.pre_fault(vm, next(at) * step, few * step)

    def page_by_page() -> None:
        first = next(at)
        for page in range(first, first + few):
            engine.pre_fault(vm, page * step, step)

    return paired(
        f"{name}: {few} faults in one call / one by one", in_one_call, page_by_page, per=few
    )


@contextmanager
def _served(folder: Path) -> Iterator[Client]:
    path = folder / "rmemd"
    command = [sys.executable, "-c", "from rmemd.daemon.cli import main; main()", "serve"]
    command += ["--socket-dir", str(path), "--host-memory", "256M", "--ready-fd"]
    with _process(command, to_stdin=False):
        client = Client(path)
        try:
            yield client
        finally:
            client.close()


@contextmanager
def _bare(folder: Path) -> Iterator[grpc.UnaryUnaryMultiCallable[bytes, bytes]]:
    path = folder / "bare.sock"
    with (
        _process([sys.executable, "-m", "tests.bench.bare", str(path)], to_stdin=True),
        grpc.insecure_channel(f"unix:{path}") as channel,
    ):
        yield channel.unary_unary("/bare.Bare/Empty")


@contextmanager
def _process(command: list[str], *, to_stdin: bool) -> Iterator[None]:
    """Start a server; its last argument is the descriptor that it says ready on."""
    ready, told = os.pipe()
    process = subprocess.Popen(
        [*command, str(told)], pass_fds=(told,), cwd=ROOT, stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(told)
    try:
        if not os.read(ready, 4096):
            raise RuntimeError(f"{command} did not get ready")
        yield
    finally:
        os.close(ready)
        if to_stdin:
            process.communicate()
        else:
            process.terminate()
            process.wait()


def _show(figures: list[Figure]) -> None:
    table = Table(title="ours / floor, paired rounds: smaller is better")
    for column in (
        "goal",
        "ours",
        "floor",
        "unit",
        "ratio",
        "min",
        "max",
        "rounds",
        "bar",
        "holds",
    ):
        table.add_column(column, justify="left" if column in ("goal", "unit") else "right")
    for f in figures:
        table.add_row(
            f.goal, f"{f.ours:.2f}", f"{f.floor:.2f}", f.unit, f"{f.ratio_median:.3f}",
            f"{f.ratio_min:.3f}", f"{f.ratio_max:.3f}", str(f.rounds),
            "" if f.bar is None else f"{f.bar:.3f}", {None: "", True: "yes", False: "NO"}[f.holds],
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 130).print(table)


if __name__ == "__main__":
    sys.exit(main())
