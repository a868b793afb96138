"""The optional compiled helper (native/), where it is installed; nothing depends on it.

Owns how it is found, checked and called: arrays in, one call without the interpreter lock, arrays
out. What it does, ``PageCipher`` and ``System`` do as well, more slowly.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import XTS

from rmemd.units import I64, PAGE_SIZE, U8

MODULE = "rmemd_helper"
# "off" does without the helper
VARIABLE = "RMEMD_HELPER"
# the first is what Python's own ssl most likely has loaded already
LIBRARIES = ("libcrypto.so.3", "libcrypto.so.4", "libcrypto.so.1.1")


class Helper:
    """The helper at work; any number of threads may share it.

    Args:
        module: the extension module that native/ builds.
        libraries: names of libcrypto, as the dynamic linker knows them; the first counts that is
            there and encrypts as ``cryptography`` does.

    Attributes:
        libcrypto: the one that was found; empty where none was, and ``xts`` must not be called.
    """

    def __init__(self, module: Any, libraries: tuple[str, ...] = LIBRARIES) -> None:
        self._ffi, self._lib = module.ffi, module.lib
        self.libcrypto = next((name for name in libraries if self._opens(name)), "")

    def xts(self, key: bytes, encrypt: bool, pfns: I64, rows: U8) -> U8:
        """Encrypt or decrypt pages, uint8 (n, 4096) of any strides, with their pfns as tweaks.

        Returns:
            A new C-contiguous uint8 array, shape (n, 4096).

        Raises:
            MemoryError: libcrypto has no memory left.
        """
        view = self._ffi.from_buffer
        out = np.empty(rows.shape, dtype=np.uint8)
        if self._lib.helper_xts(
            encrypt, key, len(key), view("int64_t[]", np.ascontiguousarray(pfns)), pfns.size,
            view("uint8_t[]", np.ascontiguousarray(rows)), view("uint8_t[]", out),
        ):  # fmt: skip
            raise MemoryError(f"{self.libcrypto} refused {pfns.size} pages")
        return out

    def fallocate(self, fd: int, mode: int, offsets: I64, lengths: I64) -> tuple[int, int]:
        """Allocate or punch ranges (bytes, int64, shape (n,)), in order.

        Returns:
            How many were done, and the errno of the one that was not; n and 0 for all of them.
        """
        view, error = self._ffi.from_buffer, self._ffi.new("int *")
        done = self._lib.helper_fallocate(
            fd, mode, view("int64_t[]", np.ascontiguousarray(offsets)),
            view("int64_t[]", np.ascontiguousarray(lengths)), offsets.size, error,
        )  # fmt: skip
        return done, error[0]

    def _opens(self, name: str) -> bool:
        return self._lib.helper_open(name.encode()) == 0 and all(
            self._agrees(bytes(range(size))) for size in (32, 64)
        )

    def _agrees(self, key: bytes) -> bool:
        pfns = np.array([0x0123456789ABCDEF, 1], dtype=np.int64)
        rows = np.arange(2 * PAGE_SIZE).astype(np.uint8).reshape(2, PAGE_SIZE)
        sealed = self.xts(key, True, pfns, rows)
        expected = b"".join(
            Cipher(AES(key), XTS(pfn.to_bytes(16, "little"))).encryptor().update(row.tobytes())
            for pfn, row in zip(pfns.tolist(), rows, strict=True)
        )
        opened = self.xts(key, False, pfns, sealed)
        return sealed.tobytes() == expected and np.array_equal(opened, rows)


@cache
def helper() -> Helper | None:
    """Return the helper, or None where it is not installed or switched off."""
    if os.environ.get(VARIABLE) == "off":
        return None
    try:
        return Helper(import_module(MODULE))
    except ImportError:
        return None


def told() -> str:
    """Return whether the helper is used, and with which libcrypto, for the log."""
    found = helper()
    if found is None:
        return "not used"
    return f"with {found.libcrypto}" if found.libcrypto else "without libcrypto"
