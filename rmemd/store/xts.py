"""AES-XTS over many 4 KiB pages in one call, without a Python loop over pages.

Owns the page cipher: one IEEE 1619 data unit per page, numbered by the page's pfn. An XTS context
of ``cryptography`` takes one tweak, and making one per page costs far more than the AES itself, so
XTS is composed here: ECB of ``cryptography`` does all the AES, numpy does all the tweaks.

Sources: IEEE Std 1619-2018, clause 5 (XTS-AES transform); NIST SP 800-38E (its approval);
FIPS 140-3 IG C.I (the two key halves must differ).
"""

from __future__ import annotations

import threading

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from rmemd.units import I64, PAGE_SIZE, U8, U64

_KEY_SIZES = (32, 64)
_BLOCK = 16
_BLOCKS = PAGE_SIZE // _BLOCK
_WORDS = PAGE_SIZE // 8
# update_into insists on room for one more block than it writes
_SLACK = _BLOCK
_LINE = 64
# Measured: 128 pages are 20 % slower per page (the fixed price of some seventy numpy calls), 256
# are 3 % slower; the gain ends here, where the scratch takes 4.5 MiB a thread.
_BATCH = 512
# While two rows of an operation fit numpy's ufunc buffer (8192 words unless told), numpy copies
# broadcast operands, here the shift counts, into it: the shifts become three times slower.
_UFUNC_BUFFER = 512

_LE64 = np.dtype("<u8")
_1, _5, _57, _64 = (np.uint64(count) for count in (1, 5, 57, 64))
# x^128 = x^7 + x^2 + x + 1, hence T[j+128] = T[j] ^ T[j+1] ^ T[j+2] ^ T[j+7]: the upper half of a
# page costs three xors. Two rounds, as the last seven blocks need blocks of the first round.
_RECURRENCE = ((128, 249), (249, 256))


def _width(npages: int) -> int:
    """Return the row length of the planes: an odd number of cache lines, at least npages words.

    With a power of two, a whole column, which the interleaving reads, would fall into a few cache
    sets. The words past npages are computed along with the others and never read.
    """
    return (-(-npages // 8) | 1) * 8


def _aligned(size: int) -> U8:
    """Return size uninitialised bytes on a cache line: numpy's 16-byte alignment costs 5 %."""
    raw = np.empty(size + _LINE, dtype=np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + size]


class _Scratch(threading.local):
    """One thread's buffers for one batch, shared by all ciphers that the thread uses."""

    def __init__(self) -> None:
        row = 8 * _width(_BATCH)
        self.planes: U64 = _aligned(_WORDS * row + _SLACK).view(np.uint64)
        self.carry: U64 = _aligned(_BLOCKS // 4 * row).view(np.uint64)
        self.tweaks: U64 = _aligned(PAGE_SIZE * _BATCH).view(_LE64)
        self.first: U8 = _aligned(_BLOCK * _BATCH + _SLACK)


class _Contexts(threading.local):
    """One thread's ECB contexts for one key: a context must not be used by two threads at once."""

    def __init__(self, data_key: bytes, tweak_key: bytes) -> None:
        self.encrypt = Cipher(AES(data_key), ECB()).encryptor()
        self.decrypt = Cipher(AES(data_key), ECB()).decryptor()
        self.tweak = Cipher(AES(tweak_key), ECB()).encryptor()


_scratch = _Scratch()


class PageCipher:
    """AES-XTS for whole pages under one key; any number of threads may share one object.

    Source: IEEE Std 1619-2018, clause 5; NIST SP 800-38E.
    """

    def __init__(self, key: bytes) -> None:
        """Take the data key followed by the tweak key.

        Args:
            key: 32 bytes for AES-128-XTS, 64 bytes for AES-256-XTS.

        Raises:
            ValueError: The key has another length, or its two halves are equal.
        """
        if len(key) not in _KEY_SIZES:
            raise ValueError(f"key: 32 or 64 bytes expected, got {len(key)}")
        half = len(key) // 2
        if key[:half] == key[half:]:
            raise ValueError("key: the data key and the tweak key must differ")
        self._contexts = _Contexts(key[:half], key[half:])

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
        return self._apply(self._contexts.encrypt, pfns, data)

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
        return self._apply(self._contexts.decrypt, pfns, data)

    def _apply(self, context: CipherContext, pfns: I64, data: U8) -> U8:
        _check(pfns, data)
        out = np.empty(data.shape, dtype=np.uint8)
        inner = _scratch.planes.view(np.uint8)
        with np.errstate():  # for its side effect: it confines setbufsize to this block and thread
            np.setbufsize(_UFUNC_BUFFER)
            for start in range(0, pfns.size, _BATCH):
                batch = out[start : start + _BATCH]
                tweaks = _tweaks(self._contexts.tweak, pfns[start : start + _BATCH])
                np.bitwise_xor(data[start : start + _BATCH], tweaks, batch)
                context.update_into(batch.reshape(-1).data, inner.data)
                np.bitwise_xor(inner[: batch.size].reshape(batch.shape), tweaks, batch)
        return out


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


def _tweaks(context: CipherContext, pfns: I64) -> U8:
    """Return the tweaks T[j] = E_k2(pfn) * x^j of a batch as they are xored, shape (n, 4096).

    The result lives in the thread's scratch. The low and the high words of all tweaks are computed
    apart, as planes (block, page), where every operation runs over contiguous memory.
    """
    npages = pfns.size
    width = _width(npages)
    units = np.zeros((npages, 2), dtype=_LE64)
    units[:, 0] = pfns
    context.update_into(units.view(np.uint8).reshape(-1).data, _scratch.first.data)
    first = _scratch.first[: _BLOCK * npages].view(_LE64).reshape(npages, 2)

    planes = _scratch.planes[: _WORDS * width].reshape(2, _BLOCKS * width)
    for plane, words in zip(planes, first.T, strict=True):
        plane[:npages] = words
    _times_small(planes, width, 1)
    _times_small(planes, 8 * width, 8)
    _times_x64(planes, 64 * width)
    rows = planes.reshape(2, _BLOCKS, width)
    tweaks = _scratch.tweaks[: _WORDS * npages].reshape(npages, _BLOCKS, 2)
    for word, plane in enumerate(rows):
        for start, stop in _RECURRENCE:
            target = plane[start:stop]
            np.bitwise_xor(plane[start - 128 : stop - 128], plane[start - 127 : stop - 127], target)
            target ^= plane[start - 126 : stop - 126]
            target ^= plane[start - 121 : stop - 121]
        tweaks[:, :, word] = plane[:, :npages].T
    return tweaks.view(np.uint8).reshape(npages, PAGE_SIZE)


def _times_small(planes: U64, size: int, power: int) -> None:
    """Fill words size..8*size of both planes with words 0..size times x^power ... x^(7*power)."""
    low, high = planes[:, :size]
    low_to, high_to = planes[:, size : 8 * size].reshape(2, 7, size)
    carry = _scratch.carry[: 7 * size].reshape(7, size)
    left = np.arange(power, 8 * power, power, dtype=np.uint64).reshape(7, 1)
    right = _64 - left
    np.left_shift(high, left, high_to)
    np.right_shift(low, right, carry)
    high_to |= carry
    np.right_shift(high, right, carry)
    np.left_shift(low, left, low_to)
    low_to ^= carry
    for step in (_1, _1, _5):
        carry <<= step
        low_to ^= carry


def _times_x64(planes: U64, size: int) -> None:
    """Fill words size..2*size of both planes with words 0..size times x^64."""
    low, high = planes[:, :size]
    low_to, high_to = planes[:, size : 2 * size]
    carry = _scratch.carry[:size]
    np.right_shift(high, _57, carry)
    np.bitwise_xor(low, carry, high_to)
    for step in (_5, _1):
        carry >>= step
        high_to ^= carry
    np.left_shift(high, _1, carry)
    np.bitwise_xor(high, carry, low_to)
    for step in (_1, _5):
        carry <<= step
        low_to ^= carry
