"""AES-XTS over many 4 KiB pages in one call, without a Python loop over pages.

Owns the page cipher: one IEEE 1619 data unit per page, numbered by the page's pfn. An XTS context
of ``cryptography`` takes one tweak, and making one per page costs far more than the AES itself. So
one context is given a batch of pages as if they were one long data unit, and what its tweaks U lack
of the pages' own T is xored in before and after: with the masks M = T ^ U,
E(P ^ M ^ U) ^ U ^ M is E(P ^ T) ^ T. Multiplying by x is linear, so the masks of a page are powers
of x from a beginning, as its tweaks are, and numpy makes them for all pages at once.

The compiled helper, where it is installed, does the same page by page in C.

Sources: IEEE Std 1619-2018, clause 5 (XTS-AES transform); NIST SP 800-38E (its approval);
FIPS 140-3 IG C.I (the two key halves must differ).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB, XTS

from rmemd.store.helper import Helper, helper
from rmemd.units import I64, PAGE_SIZE, U8, U64

_KEY_SIZES = (32, 64)
_BLOCK = 16
_BLOCKS = PAGE_SIZE // _BLOCK
# update_into insists on room for one more block than it writes
_SLACK = _BLOCK
# Measured: 128 pages are 11 % slower per page (the fixed price of some fifty numpy calls), and 512
# no faster; the scratch takes 2.8 MiB a thread.
_BATCH = 256

_LE64 = np.dtype("<u8")
_WHOLE_BLOCK = np.dtype((np.void, _BLOCK))
_1, _5, _57 = (np.uint64(count) for count in (1, 5, 57))
# Times x^8 moves bits by a byte. So blocks j, j + 8, j + 16... of a page are windows, a byte apart,
# into one stream of bytes, but for each window's first byte; eight streams hold a page's masks.
_STREAMS = 8
_STREAM_WORDS = 6
_STREAM_BYTES = 8 * _STREAM_WORDS
_WINDOWS = _BLOCKS // _STREAMS
_FIRST_WINDOW = 32
# x^128 = x^7 + x^2 + x + 1, hence M[j + 128] = M[j] ^ M[j + 1] ^ M[j + 2] ^ M[j + 7]
_RECURRENCE = (1, 2, 7)
_LEFT = np.arange(_STREAMS + 2 * _RECURRENCE[-1], dtype=np.uint64).reshape(-1, 1)
_RIGHT = np.uint64(64) - _LEFT


@cache
def _page_starts() -> U64:
    """Return x^0, x^256, x^512...: tweaks that pages of the long unit begin with, (batch, 2)."""
    tweak, starts = 1, bytearray()
    for _ in range(_BATCH):
        starts += tweak.to_bytes(_BLOCK, "little")
        # x^256 is the square of x^128: x^14 + x^4 + x^2 + 1
        tweak ^= tweak << 2 ^ tweak << 4 ^ tweak << 14
        over = tweak >> 128
        tweak ^= over << 128 ^ over << 7 ^ over << 2 ^ over << 1 ^ over
    return np.frombuffer(starts, dtype=_LE64).reshape(_BATCH, 2)


class _Scratch(threading.local):
    """One thread's buffers for one batch, shared by all ciphers that the thread uses."""

    def __init__(self) -> None:
        self.first: U8 = np.empty(_BLOCK * _BATCH + _SLACK, dtype=np.uint8)
        self.planes: U64 = np.empty((_STREAM_WORDS, _LEFT.size, _BATCH), dtype=np.uint64)
        self.carry: U64 = np.empty((_LEFT.size, _BATCH), dtype=np.uint64)
        self.streams: U64 = np.empty((_BATCH, _STREAMS, _STREAM_WORDS), dtype=_LE64)
        self.fold: U8 = np.empty(self.streams.nbytes, dtype=np.uint8)
        self.lowest: U8 = np.empty(self.streams.nbytes, dtype=np.uint8)
        self.masks: U8 = np.empty((_BATCH, PAGE_SIZE), dtype=np.uint8)
        self.inner: U8 = np.empty((_BATCH, PAGE_SIZE), dtype=np.uint8)


class _TweakContext(threading.local):
    """One thread's context of one tweak key: two threads must not use one at once."""

    def __init__(self, key: bytes) -> None:
        self.encrypt = Cipher(AES(key), ECB()).encryptor()


_scratch = _Scratch()


class PageCipher:
    """AES-XTS for whole pages under one key; any number of threads may share one object.

    Source: IEEE Std 1619-2018, clause 5; NIST SP 800-38E.
    """

    def __init__(self, key: bytes, compiled: Callable[[], Helper | None] = helper) -> None:
        """Take the data key followed by the tweak key.

        Args:
            key: 32 bytes for AES-128-XTS, 64 bytes for AES-256-XTS.
            compiled: gives the compiled helper once it is needed; used if it has a libcrypto.

        Raises:
            ValueError: The key has another length, or its two halves are equal.
        """
        if len(key) not in _KEY_SIZES:
            raise ValueError(f"key: 32 or 64 bytes expected, got {len(key)}")
        half = len(key) // 2
        if key[:half] == key[half:]:
            raise ValueError("key: the data key and the tweak key must differ")
        self._compiled = compiled
        self._key = key
        self._tweaks = _TweakContext(key[half:])
        # the long unit's number is what encrypts to the tweak 1, so that its tweaks are constants
        number = Cipher(AES(key[half:]), ECB()).decryptor().update((1).to_bytes(_BLOCK, "little"))
        self._unit = Cipher(AES(key), XTS(number))

    def encrypt(self, pfns: I64, data: U8) -> U8:
        """Encrypt pages.

        Args:
            pfns: Page frame numbers (data unit numbers, not bytes), int64, shape (n,), >= 0.
            data: Plaintext bytes, uint8, shape (n, 4096), of any strides; left as it is.

        Returns:
            The ciphertext: a new C-contiguous uint8 array, shape (n, 4096).

        Raises:
            ValueError: An argument has another shape or dtype, or a pfn is negative.
        """
        return self._apply(True, pfns, data)

    def decrypt(self, pfns: I64, data: U8) -> U8:
        """Decrypt pages; the inverse of ``encrypt`` for the same pfns.

        Args:
            pfns: Page frame numbers (data unit numbers, not bytes), int64, shape (n,), >= 0.
            data: Ciphertext bytes, uint8, shape (n, 4096), of any strides; left as it is.

        Returns:
            The plaintext: a new C-contiguous uint8 array, shape (n, 4096). XTS does not
            authenticate: a wrong key or pfn gives noise, not an error.

        Raises:
            ValueError: An argument has another shape or dtype, or a pfn is negative.
        """
        return self._apply(False, pfns, data)

    def _apply(self, encrypt: bool, pfns: I64, data: U8) -> U8:
        _check(pfns, data)
        compiled = self._compiled()
        if compiled is not None and compiled.libcrypto:
            return compiled.xts(self._key, encrypt, pfns, data)
        unit = self._unit.encryptor if encrypt else self._unit.decryptor
        out = np.empty(data.size + _SLACK, dtype=np.uint8)
        pages = out[: data.size].reshape(data.shape)
        for start in range(0, pfns.size, _BATCH):
            batch = pages[start : start + _BATCH]
            masks = _masks(self._tweaks.encrypt, pfns[start : start + _BATCH])
            inner = _scratch.inner[: len(batch)]
            np.bitwise_xor(data[start : start + _BATCH], masks, inner)
            unit().update_into(inner.reshape(-1).data, out[start * PAGE_SIZE :].data)
            np.bitwise_xor(batch, masks, batch)
        return pages


def _check(pfns: I64, data: U8) -> None:
    if pfns.dtype != np.int64 or pfns.ndim != 1:
        raise ValueError(f"pfns: int64 of shape (n,) expected, got {pfns.dtype} {pfns.shape}")
    if data.dtype != np.uint8 or data.shape != (pfns.size, PAGE_SIZE):
        raise ValueError(
            f"data: uint8 of shape ({pfns.size}, {PAGE_SIZE}) expected, "
            f"got {data.dtype} {data.shape}"
        )
    if pfns.size and pfns.min() < 0:
        raise ValueError(f"pfns: page numbers >= 0 expected, got {pfns.min()}")


def _masks(tweaks: CipherContext, pfns: I64) -> U8:
    """Return the masks M[j] = (E_k2(pfn) ^ U) * x^j of a batch, shape (n, 4096).

    U is the long unit's tweak where the page begins. The result lives in the thread's scratch.
    """
    npages = pfns.size
    units = np.zeros((npages, 2), dtype=_LE64)
    units[:, 0] = pfns
    tweaks.update_into(units.view(np.uint8).reshape(-1).data, _scratch.first.data)
    first = _scratch.first[: _BLOCK * npages].view(_LE64).reshape(npages, 2)
    streams = _streams(*(first ^ _page_starts()[:npages]).T)
    layout = (npages, _WINDOWS, _STREAMS)
    strides = (_STREAMS * _STREAM_BYTES, -1, _STREAM_BYTES)
    windows = np.ndarray(layout, _WHOLE_BLOCK, streams, _FIRST_WINDOW, strides)
    lowest = np.ndarray(layout, np.uint8, _lowest(streams), _FIRST_WINDOW, strides)
    masks = _scratch.masks[:npages]
    np.copyto(masks.view(_WHOLE_BLOCK).reshape(layout), windows)
    np.copyto(masks[:, ::_BLOCK].reshape(layout), lowest)
    return masks


def _streams(low: U64, high: U64) -> U64:
    """Return the streams of masks that begin with the words low and high, shape (n, 8, 6).

    Word w of stream j is the high word of M[j + 64 * (5 - w)]. They are computed as planes
    (word, stream, page), where every operation runs over contiguous memory.
    """
    npages = low.size
    planes = _scratch.planes[:, :, :npages]
    carry = _scratch.carry[:, :npages]
    for plane, (below, word) in zip(planes, ((low, high), _times_x64(low, high)), strict=False):
        np.left_shift(word, _LEFT, plane)
        np.right_shift(below, _RIGHT, carry)
        plane |= carry
    for done, rows in ((2, _STREAMS + _RECURRENCE[-1]), (4, _STREAMS)):
        before, target = planes[done - 2 : done], planes[done : done + 2, :rows]
        summed = before[:, :rows]
        for step in _RECURRENCE:
            np.bitwise_xor(summed, before[:, step : step + rows], target)
            summed = target
    streams = _scratch.streams[:npages]
    np.copyto(streams, planes[::-1, :_STREAMS].transpose(2, 1, 0))
    return streams


def _times_x64(low: U64, high: U64) -> tuple[U64, U64]:
    """Return the words low and high of blocks times x^64."""
    carry = high >> _57
    high_to = low ^ carry
    for step in (_5, _1):
        carry >>= step
        high_to ^= carry
    carry = high << _1
    low_to = high ^ carry
    for step in (_1, _5):
        carry <<= step
        low_to ^= carry
    return low_to, high_to


def _lowest(streams: U64) -> U8:
    """Return at every window's place in the streams what its first byte has to be.

    A step by x^8 folds the byte that leaves a block into its two lowest: as b, 2b, 4b and 128b. The
    streams have the upper half of that, which comes from the byte at the window's end, in the
    first byte as well as in the second; here it is taken out of the first.
    """
    data = streams.reshape(-1).view(np.uint8)
    fold, lowest = _scratch.fold[: data.size], _scratch.lowest[: data.size]
    np.right_shift(data, 1, fold)
    np.right_shift(data, 6, lowest)
    fold ^= lowest
    lowest >>= 1
    fold ^= lowest
    np.bitwise_xor(data[: 1 - _BLOCK], fold[_BLOCK - 1 :], lowest[: 1 - _BLOCK])
    return lowest
