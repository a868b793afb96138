"""AES-XTS over many pages: equal to the library's own XTS, one context per page.

Each claim is of the portable way and, where it is installed, of the compiled helper.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS
from hypothesis import given, settings
from hypothesis import strategies as st

from rmemd.store import xts
from rmemd.store.helper import helper
from rmemd.store.xts import PageCipher
from rmemd.units import I64, PAGE_SIZE, U8

KEY = bytes(range(64))
MAX_PFN = (1 << 63) - 1
BATCH = xts._BATCH
Make = Callable[[bytes], PageCipher]


@pytest.fixture(scope="module", params=["portable", "compiled"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes ciphers that go one of the two ways."""
    if request.param == "portable":
        return lambda key: PageCipher(key, compiled=lambda: None)
    found = helper()
    if found is None or not found.libcrypto:
        pytest.skip("the compiled helper is not installed, or finds no libcrypto")
    return PageCipher


def library(key: bytes, pfns: I64, data: U8) -> U8:
    out = np.empty(data.shape, dtype=np.uint8)
    for row, pfn in enumerate(pfns.tolist()):
        context = Cipher(AES(key), XTS(pfn.to_bytes(16, "little"))).encryptor()
        page = context.update(data[row].tobytes()) + context.finalize()
        out[row] = np.frombuffer(page, dtype=np.uint8)
    return out


def random_pages(npages: int, seed: int = 1) -> tuple[I64, U8]:
    rng = np.random.default_rng(seed)
    pfns = rng.integers(0, MAX_PFN, npages, dtype=np.int64, endpoint=True)
    return pfns, rng.integers(0, 256, (npages, PAGE_SIZE), dtype=np.uint8)


@pytest.mark.parametrize("key", [KEY[:32], KEY], ids=["aes-128", "aes-256"])
@pytest.mark.parametrize("npages", [1, 7, 8, 9, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH + 1])
def test_equals_the_library_at_batch_borders(make: Make, key: bytes, npages: int) -> None:
    pfns, data = random_pages(npages)
    cipher = make(key)
    sealed = cipher.encrypt(pfns, data)
    np.testing.assert_array_equal(sealed, library(key, pfns, data))
    np.testing.assert_array_equal(cipher.decrypt(pfns, sealed), data)


@settings(deadline=None, max_examples=60)
@given(
    key=st.sampled_from([32, 64])
    .flatmap(lambda size: st.binary(min_size=size, max_size=size))
    .filter(lambda key: key[: len(key) // 2] != key[len(key) // 2 :]),
    numbers=st.lists(st.integers(0, MAX_PFN), min_size=1, max_size=20),
    seed=st.integers(0, 2**32),
)
def test_equals_the_library(make: Make, key: bytes, numbers: list[int], seed: int) -> None:
    pfns = np.array(numbers, dtype=np.int64)
    data = random_pages(len(numbers), seed)[1]
    cipher = make(key)
    sealed = cipher.encrypt(pfns, data)
    np.testing.assert_array_equal(sealed, library(key, pfns, data))
    np.testing.assert_array_equal(cipher.decrypt(pfns, sealed), data)


E128 = "27182818284590452353602874713526"
PI128 = "31415926535897932384626433832795"
E256 = "2718281828459045235360287471352662497757247093699959574966967627"
PI256 = "3141592653589793238462643383279502884197169399375105820974944592"
COUNTING = bytes(range(256)).hex()


@pytest.mark.parametrize(
    ("key", "unit", "plain", "sealed"),
    [
        pytest.param(
            "11" * 16 + "22" * 16,
            0x3333333333,
            "44" * 32,
            "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0",
            id="vector-2",
        ),
        pytest.param(
            bytes(range(0xFF, 0xEF, -1)).hex() + "22" * 16,
            0x3333333333,
            "44" * 32,
            "af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89",
            id="vector-3",
        ),
        pytest.param(E128 + PI128, 0, COUNTING, "27a7479befa1d476489f308cd4cfa6e2", id="vector-4"),
        pytest.param(
            E256 + PI256, 0xFF, COUNTING, "1c3b3a102f770386e4836c99e370cf9b", id="vector-10"
        ),
    ],
)
def test_published_vectors(make: Make, key: str, unit: int, plain: str, sealed: str) -> None:
    """IEEE 1619 annex B: whole blocks of a shorter unit are the first blocks of a page."""
    data = np.zeros((1, PAGE_SIZE), dtype=np.uint8)
    prefix = np.frombuffer(bytes.fromhex(plain), dtype=np.uint8)
    data[0, : prefix.size] = prefix
    got = make(bytes.fromhex(key)).encrypt(np.array([unit], dtype=np.int64), data)
    assert got[0].tobytes().hex().startswith(sealed)


def test_same_plaintext_on_two_pfns_differs_in_every_block(make: Make) -> None:
    data = np.zeros((2, PAGE_SIZE), dtype=np.uint8)
    sealed = make(KEY).encrypt(np.array([5, 6], dtype=np.int64), data)
    blocks = sealed.reshape(-1, 16)
    assert np.unique(blocks, axis=0).shape == blocks.shape


def test_ciphertext_moved_to_another_pfn_decrypts_to_noise(make: Make) -> None:
    pfns, data = random_pages(4)
    cipher = make(KEY)
    moved = cipher.decrypt(pfns + 1, cipher.encrypt(pfns, data))
    flipped = np.unpackbits(moved ^ data).mean()
    assert 0.48 < flipped < 0.52


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda pages: pages[::-1], id="reversed-pages"),
        pytest.param(lambda pages: pages[:, ::-1], id="reversed-bytes"),
        pytest.param(lambda pages: np.asfortranarray(pages), id="fortran"),
        pytest.param(lambda pages: np.broadcast_to(pages[0], pages.shape), id="broadcast"),
        pytest.param(lambda pages: np.tile(pages, 2)[::3, 1 : 1 + PAGE_SIZE], id="unaligned"),
    ],
)
def test_any_strides_are_read_and_left_alone(make: Make, view: Callable[[U8], U8]) -> None:
    pfns, pages = random_pages(9)
    data = view(pages)
    numbers = pfns[::-1][: len(data)]
    data.flags.writeable = numbers.flags.writeable = False
    before = data.copy()
    sealed = make(KEY).encrypt(numbers, data)
    np.testing.assert_array_equal(sealed, library(KEY, numbers, before))
    np.testing.assert_array_equal(data, before)
    assert sealed.flags.c_contiguous
    assert sealed.flags.writeable


def test_no_pages(make: Make) -> None:
    pfns, data = random_pages(0)
    sealed = make(KEY).encrypt(pfns, data)
    assert sealed.shape == (0, PAGE_SIZE)
    assert sealed.dtype == np.uint8


def test_results_do_not_share_memory_with_later_calls(make: Make) -> None:
    pfns, data = random_pages(3)
    cipher = make(KEY)
    sealed = cipher.encrypt(pfns, data)
    kept = sealed.copy()
    cipher.decrypt(pfns, data)
    np.testing.assert_array_equal(sealed, kept)


@pytest.mark.parametrize("size", [0, 16, 24, 31, 33, 48, 63, 65, 128])
def test_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="key"):
        PageCipher(bytes(range(size)))


@pytest.mark.parametrize("size", [16, 32])
def test_equal_key_halves_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="key"):
        PageCipher(KEY[:size] * 2)


GOOD_PFNS = np.arange(2, dtype=np.int64)
GOOD_DATA = np.zeros((2, PAGE_SIZE), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "pfns", "data"),
    [
        ("pfns", GOOD_PFNS.astype(np.uint64), GOOD_DATA),
        ("pfns", GOOD_PFNS.astype(np.int32), GOOD_DATA),
        ("pfns", GOOD_PFNS.reshape(2, 1), GOOD_DATA),
        ("pfns", np.array(1, dtype=np.int64), GOOD_DATA),
        ("pfns", np.array([3, -1], dtype=np.int64), GOOD_DATA),
        ("data", GOOD_PFNS, GOOD_DATA.astype(np.int8)),
        ("data", GOOD_PFNS, GOOD_DATA.view(np.uint64)),
        ("data", GOOD_PFNS, GOOD_DATA[:1]),
        ("data", GOOD_PFNS, GOOD_DATA[:, :-1]),
        ("data", GOOD_PFNS, GOOD_DATA.reshape(-1)),
        ("data", GOOD_PFNS[:0], GOOD_DATA),
    ],
)
def test_wrong_arguments_are_named(make: Make, name: str, pfns: I64, data: U8) -> None:
    cipher = make(KEY)
    for call in (cipher.encrypt, cipher.decrypt):
        with pytest.raises(ValueError, match=f"^{name}:"):
            call(pfns, data)


def test_threads_share_one_cipher(make: Make) -> None:
    workers, rounds = 6, 10
    cipher = make(KEY)
    start = threading.Barrier(workers, timeout=30)

    def work(worker: int) -> None:
        pfns, data = random_pages(BATCH // 3 * (worker + 1) + worker, seed=worker)
        expected = library(KEY, pfns, data)
        start.wait()
        for _ in range(rounds):
            np.testing.assert_array_equal(cipher.encrypt(pfns, data), expected)
            np.testing.assert_array_equal(cipher.decrypt(pfns, expected), data)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
