"""What it costs to encrypt pages in bulk, with the compiled helper and without.

The portable way is taken beside what a user of ``cryptography`` would write, one Cipher per page;
the compiled one beside a plain C loop over the same libcrypto, into a buffer that it keeps. All
give the same bytes, or there is no figure. Nothing here waits, so a thread's own processor time is
what counts, but for what two threads do at once.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS

from rmemd.store.helper import helper
from rmemd.store.xts import PageCipher
from rmemd.units import I64, PAGE_SIZE, U8
from tests.bench.harness import Figure, LeftOut, busy, in_turn, on_cpus, paired

KEY = bytes(range(64))
PAGES = 4096
PORTABLE_BAR = 1 / 3
COMPILED_BAR = 0.9
THREADS = 2
SOURCE = Path(__file__).with_name("cloop.c")


def figures(folder: Path, quick: bool) -> Iterator[Figure | LeftOut]:
    """Yield goal 10: the portable way, the compiled one, and what a second thread brings."""
    rng = np.random.default_rng(1)
    npages = PAGES // 4 if quick else PAGES
    pfns = rng.permutation(npages).astype(np.int64)
    rows = rng.integers(0, 256, (npages, PAGE_SIZE), dtype=np.uint8)
    expected = one_by_one(pfns, rows)
    ways = {"portable": PageCipher(KEY, compiled=lambda: None)}
    found = helper()
    if found is not None and found.libcrypto:
        ways["compiled"] = PageCipher(KEY)
    for cipher in ways.values():
        np.testing.assert_array_equal(cipher.encrypt(pfns, rows), expected)
    with on_cpus(1):
        for number, (way, cipher) in zip(("10 ", ""), ways.items(), strict=False):
            yield in_turn(
                f"{number}encryption, {way} / one Cipher per page",
                busy(lambda cipher=cipher: cipher.encrypt(pfns, rows)),
                busy(lambda: one_by_one(pfns, rows)), per=npages,
                bar=PORTABLE_BAR if way == "portable" else None,
            )  # fmt: skip
        yield _against_c(folder, ways.get("compiled"), pfns, rows, expected)
    yield from _threads(ways, pfns, rows)


def one_by_one(pfns: I64, rows: U8) -> U8:
    """Encrypt pages as the documentation of ``cryptography`` has it."""
    out = np.empty_like(rows)
    for at, pfn in enumerate(pfns.tolist()):
        context = Cipher(AES(KEY), XTS(pfn.to_bytes(16, "little"))).encryptor()
        page = context.update(rows[at].data) + context.finalize()
        out[at] = np.frombuffer(page, dtype=np.uint8)
    return out


def _against_c(
    folder: Path, cipher: PageCipher | None, pfns: I64, rows: U8, expected: U8
) -> Figure | LeftOut:
    goal = "10 encryption, compiled / a C loop over libcrypto"
    found, compiler = helper(), shutil.which(os.environ.get("CC", "cc"))
    if cipher is None or found is None:
        return LeftOut(goal, "the compiled helper is not installed")
    if compiler is None:
        return LeftOut(goal, "there is no C compiler")
    floor, kept = _c_loop(folder, compiler, found.libcrypto), np.empty_like(rows)
    floor(pfns, rows, kept)
    np.testing.assert_array_equal(kept, expected)
    return in_turn(
        goal, busy(lambda: cipher.encrypt(pfns, rows)), busy(lambda: floor(pfns, rows, kept)),
        per=pfns.size, bar=COMPILED_BAR, unit="pages/s",
    )  # fmt: skip


def _c_loop(folder: Path, compiler: str, libcrypto: str) -> Callable[[I64, U8, U8], None]:
    built = folder / "cloop.so"
    flags = ["-O2", "-shared", "-fPIC", "-o", str(built), str(SOURCE), f"-l:{libcrypto}"]
    subprocess.run([compiler, *flags], check=True)
    loop = ctypes.CDLL(str(built)).c_loop

    def call(pfns: I64, rows: U8, out: U8) -> None:
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (pfns, rows, out))
        first, *others = pointers
        loop(KEY, first, ctypes.c_size_t(pfns.size), *others)

    return call


def _threads(ways: dict[str, PageCipher], pfns: I64, rows: U8) -> Iterator[Figure | LeftOut]:
    """Yield what as many threads do together, against one that does all of it."""
    with on_cpus(THREADS), ThreadPoolExecutor(THREADS) as pool:
        for way, cipher in ways.items():
            halves = list(zip(np.split(pfns, THREADS), np.split(rows, THREADS), strict=True))
            yield paired(
                f"encryption, {way}, {THREADS} threads / 1",
                lambda cipher=cipher, halves=halves: list(
                    pool.map(lambda half: cipher.encrypt(*half), halves)
                ),
                lambda cipher=cipher: cipher.encrypt(pfns, rows),
                per=pfns.size, unit="pages/s",
            )  # fmt: skip
