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
MIX = (0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB)
# their inverses modulo 2**64
UNMIX = tuple(pow(factor, -1, 1 << 64) for factor in MIX)


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
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX[1])
    return (x ^ (x >> np.uint64(31))).astype("<u8").tobytes()


def differing_pages(found: bytes, wanted: bytes) -> int:
    """Count the pages in which two byte strings of equal length differ."""
    a = np.frombuffer(found, dtype=np.uint8).reshape(-1, PAGE_BYTES)
    b = np.frombuffer(wanted, dtype=np.uint8).reshape(-1, PAGE_BYTES)
    return int((a != b).any(axis=1).sum())


def reseed(found: bytes, gpa: int, seed: int, reply_seed: int) -> tuple[int, bytes]:
    """Verify a pattern, and turn what was found into the pattern of another seed.

    Every step of splitmix64's finalizer can be undone, so that the answer depends on every bit
    found: bytes that were right become the other pattern, and those that were wrong do not.

    Args:
        found: whole pages.
        gpa: guest physical address, in bytes, that the pattern was made for.
        seed: the seed that it was made from.
        reply_seed: the seed of the answer.

    Returns:
        How many pages were not the pattern, and the answer.
    """
    first = gpa // PAGE_BYTES * WORDS_PER_PAGE
    x = np.frombuffer(found, dtype="<u8").astype(np.uint64)
    x ^= x >> np.uint64(31) ^ x >> np.uint64(62)
    x *= np.uint64(UNMIX[1])
    x ^= x >> np.uint64(27) ^ x >> np.uint64(54)
    x *= np.uint64(UNMIX[0])
    x ^= x >> np.uint64(30) ^ x >> np.uint64(60)
    x -= np.uint64(seed * GAMMA & MASK)
    wanted = np.arange(first, first + x.size, dtype=np.uint64)
    wrong = int((x != wanted).reshape(-1, WORDS_PER_PAGE).any(axis=1).sum())
    x += np.uint64(reply_seed * GAMMA & MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX[1])
    return wrong, (x ^ (x >> np.uint64(31))).astype("<u8").tobytes()
