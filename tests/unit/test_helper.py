"""The compiled helper: found, checked, done without; and lists of ranges with it and without."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmemd.store import helper as found
from rmemd.store import system
from rmemd.store.helper import Helper, helper, told
from rmemd.store.memfd import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, Memfd
from rmemd.store.system import System, WholeLists
from rmemd.store.xts import PageCipher
from rmemd.units import I64, PAGE_SIZE

PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
NPAGES = 24
KEY = bytes(range(64))


@pytest.fixture
def module() -> Any:
    if helper() is None:
        pytest.skip("the compiled helper is not installed")
    return import_module(found.MODULE)


@pytest.fixture
def anew() -> Iterator[None]:
    """The helper is looked for anew in the test, and after it."""
    helper.cache_clear()
    yield
    helper.cache_clear()


# --- found, or done without ----------------------------------------------------------------------
@pytest.mark.usefixtures("anew")
def test_it_is_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(found.VARIABLE, "off")
    assert helper() is None
    assert told() == "not used"


@pytest.mark.usefixtures("anew")
def test_where_it_is_not_installed_all_is_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "MODULE", "rmemd_helper_that_is_not_there")
    assert helper() is None
    assert told() == "not used"


@pytest.mark.parametrize("name", ["libcrypto.so.that-is-not-there", "libc.so.6"])
def test_without_a_libcrypto_pages_are_encrypted_in_the_portable_way(
    module: Any, name: str
) -> None:
    one = Helper(module, (name,))
    assert one.libcrypto == ""
    assert _sealed(PageCipher(KEY, lambda: one)) == _sealed(PageCipher(KEY, lambda: None))


def test_a_libcrypto_that_encrypts_otherwise_is_not_used(module: Any) -> None:
    """Nothing but equal bytes counts: here each page is encrypted as if it were page 0."""

    def wrong(encrypt: int, key: bytes, size: int, pfns: Any, n: int, *pages: Any) -> int:
        zeros = np.zeros(n, dtype=np.int64)
        numbers = module.ffi.from_buffer("int64_t[]", zeros)
        return int(module.lib.helper_xts(encrypt, key, size, numbers, n, *pages))

    lib = SimpleNamespace(helper_open=module.lib.helper_open, helper_xts=wrong)
    assert Helper(SimpleNamespace(ffi=module.ffi, lib=lib)).libcrypto == ""


def test_the_log_names_its_libcrypto(module: Any) -> None:
    libcrypto = Helper(module).libcrypto
    assert told() == (f"with {libcrypto}" if libcrypto else "without libcrypto")


def _sealed(cipher: PageCipher) -> bytes:
    rows = np.arange(3 * PAGE_SIZE).astype(np.uint8).reshape(3, PAGE_SIZE)
    return cipher.encrypt(np.array([7, 0, 1 << 40], dtype=np.int64), rows).tobytes()


# --- lists of ranges -----------------------------------------------------------------------------
def pages(*numbers: int) -> I64:
    return np.array(numbers, dtype=np.int64) * PAGE_SIZE


ranges = st.lists(st.tuples(st.integers(0, NPAGES - 1), st.integers(0, 4)), max_size=8)


@settings(deadline=None, max_examples=60)
@given(calls=st.lists(st.tuples(st.sampled_from([PUNCH, FALLOC_FL_KEEP_SIZE]), ranges), max_size=4))
def test_a_list_does_what_its_calls_do(calls: list[tuple[int, list[tuple[int, int]]]]) -> None:
    """A length of 0 is EINVAL: what is before it is done, what is behind it is not."""
    outcomes = []
    for kind in (System(), WholeLists()):
        with closing(_half_full()) as memfd:
            refused = [_fallocate(kind, memfd.fd, mode, some) for mode, some in calls]
            blocks = os.fstat(memfd.fd).st_blocks
            outcomes.append((refused, blocks, memfd.present(0, NPAGES).tolist()))
    assert outcomes[0] == outcomes[1]


def _half_full() -> Memfd:
    memfd = Memfd("rmemd-test", NPAGES)
    even = np.arange(0, NPAGES, 2, dtype=np.int64)
    memfd.write(even, np.ones((even.size, PAGE_SIZE), dtype=np.uint8))
    return memfd


def _fallocate(kind: System, fd: int, mode: int, some: list[tuple[int, int]]) -> int:
    starts, counts = (pages(*column) for column in zip(*some, strict=True)) if some else ([], [])
    try:
        kind.fallocate_each(fd, mode, np.asarray(starts, np.int64), np.asarray(counts, np.int64))
    except OSError as error:
        return error.errno or -1
    return 0


def test_the_helper_says_how_far_it_came_and_why_no_further(module: Any) -> None:
    with closing(_half_full()) as memfd:
        starts, counts = pages(0, 4, 8, 12), pages(2, 3, 0, 2)
        one = Helper(module)
        assert one.fallocate(memfd.fd, PUNCH, starts, counts) == (2, errno.EINVAL)
        assert memfd.present(0, NPAGES).tolist() == [2, *range(8, NPAGES, 2)]
        assert one.fallocate(-1, PUNCH, starts, counts) == (0, errno.EBADF)


class Interrupted(System):
    """Every second call is interrupted by a signal."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self._turn = 0

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        self._turn += 1
        if self._turn % 2:
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        self.calls.append(offset // PAGE_SIZE)


def test_a_signal_begins_the_range_again_and_no_other() -> None:
    one = Interrupted()
    one.fallocate_each(-1, PUNCH, pages(5, 1, 9), pages(1, 1, 1))
    assert one.calls == [5, 1, 9]


def test_a_signal_in_the_helper_begins_the_range_again_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[int]] = []

    def two_at_most(fd: int, mode: int, offsets: I64, lengths: I64) -> tuple[int, int]:
        asked.append((offsets // PAGE_SIZE).tolist())
        return (2, errno.EINTR) if offsets.size > 2 else (offsets.size, 0)

    monkeypatch.setattr(system, "helper", lambda: SimpleNamespace(fallocate=two_at_most))
    WholeLists().fallocate_each(-1, PUNCH, pages(5, 1, 9), pages(1, 1, 1))
    assert asked == [[5, 1, 9], [9]]
