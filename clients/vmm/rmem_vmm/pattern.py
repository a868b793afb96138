"""The bytes that a guest's WRITE makes, made again, so that the VMM can verify what it is shown.

Owns a second implementation of ``PATTERN_WORDS`` (splitmix64 over seed and address): the VMM
compares what a guest publishes with this, and not with the daemon's own idea of it.
"""

from __future__ import annotations

import numpy as np

PAGE_BYTES = 4096
WORDS_PER_PAGE = PAGE_BYTES // 8
GAMMA = 0x9E37_79B9_7F4A_7C15
MASK = (1 << 64) - 1


def words(seed: int, gpa: int, size_bytes: int) -> bytes:
    """Return what ``write(gpa, size_bytes, seed=seed)`` puts there; both are whole pages.

    Args:
        seed: the seed.
        gpa: guest physical address in bytes.
        size_bytes: how many bytes.
    """
    first = gpa // PAGE_BYTES * WORDS_PER_PAGE
    x = np.arange(first, first + size_bytes // 8, dtype=np.uint64)
    x = x + np.uint64(seed * GAMMA & MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return (x ^ (x >> np.uint64(31))).astype("<u8").tobytes()


def differing_pages(found: bytes, wanted: bytes) -> int:
    """Count the pages in which two byte strings of equal length differ."""
    a = np.frombuffer(found, dtype=np.uint8).reshape(-1, PAGE_BYTES)
    b = np.frombuffer(wanted, dtype=np.uint8).reshape(-1, PAGE_BYTES)
    return int((a != b).any(axis=1).sum())
