"""Keys: ciphers and integrity codes, derived from the daemon's seed and a key's number.

Owns no state that is not derived: the same seed and key number give the same ciphertext, which is
what makes a run repeatable.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from rmemd.hooks.types import KeySpec
from rmemd.store.xts import PageCipher
from rmemd.units import I64, PAGE_SIZE, U8, U32, U64

_WORDS = PAGE_SIZE // 4
MAC_BITS = 28


class FrameKey:
    """One key at work: encryption tweaked by the frame's number, and a 28-bit integrity code.

    The code is a keyed multilinear hash of the ciphertext and the frame number (Lemire and Kaser,
    "Strongly universal string hashing is fast", 2014).
    Differs: Intel's MAC is 28 bits of a SHA-3-256 construction per 64-byte line (tdx.md §7); this
    one is per 4 KiB page.
    """

    def __init__(self, seed: int, spec: KeySpec) -> None:
        self.spec = spec
        self._cipher = None if spec.plain else PageCipher(_derive(seed, spec.key_id, b"xts", 64))
        self._mac_keys: U64 | None = None
        if spec.integrity:
            raw = hashlib.shake_256(_derive(seed, spec.key_id, b"mac", 32))
            self._mac_keys = np.frombuffer(raw.digest(8 * (_WORDS + 3)), dtype="<u8").copy()

    def encrypt(self, pfns: I64, rows: U8) -> U8:
        """Return what the bus sees of plaintext ``rows`` at frames ``pfns``."""
        return rows if self._cipher is None else self._cipher.encrypt(pfns, rows)

    def decrypt(self, pfns: I64, rows: U8) -> U8:
        """Return what the owner sees of bus bytes ``rows`` at frames ``pfns``."""
        return rows if self._cipher is None else self._cipher.decrypt(pfns, rows)

    def mac(self, pfns: I64, rows: U8) -> U32:
        """Return the integrity codes of bus bytes; zeros for a key without integrity."""
        if self._mac_keys is None:
            return np.zeros(pfns.size, dtype=np.uint32)
        keys = self._mac_keys
        words = rows.view("<u4").astype(np.uint64)
        total = words @ keys[3:]
        frame = pfns.astype(np.uint64)
        total += (
            keys[0] + (frame & np.uint64(0xFFFFFFFF)) * keys[1] + (frame >> np.uint64(32)) * keys[2]
        )
        return (total >> np.uint64(64 - MAC_BITS)).astype(np.uint32)


def _derive(seed: int, key_id: int, purpose: bytes, size: int) -> bytes:
    return hashlib.blake2b(
        struct.pack("<qq", seed, key_id), digest_size=size, person=b"rmemd " + purpose
    ).digest()
