"""Bounce buffers of a confidential guest: a pool of shared memory, handed out in slots.

Owns which slots of the pool are taken. Devices reach the pool and nothing else, so that whatever
goes to or comes from one is copied through it; a pool that is too small is the guest's most common
I/O failure, and says so by name. Source: Linux kernel/dma/swiotlb.c (a mapping is contiguous, and
at most IO_TLB_SEGSIZE slots).
"""

from __future__ import annotations

from dataclasses import dataclass

from .machine import Range
from .units import size_text

# IO_TLB_SEGSIZE: slots that one mapping may have
SEGMENT_SLOTS = 128


class PoolFull(Exception):
    """No run of free slots is long enough; the message names the pool and how full it is."""


class MappingTooLong(Exception):
    """More bytes than one mapping of the pool may have (dma_max_mapping_size)."""


@dataclass(frozen=True)
class Mapping:
    """Some contiguous slots of a pool, and the bytes of them that are used."""

    first_slot: int
    slots: int
    where: Range


class Pool:
    """A pool of bounce buffers.

    Args:
        name: how messages call it.
        where: the guest's shared memory that it is.
        slot_bytes: bytes of one slot, whole pages.

    Attributes:
        high_water: the most slots that were ever taken at once.
        refused: mappings that found no room.
    """

    def __init__(self, name: str, where: Range, slot_bytes: int) -> None:
        if where.size_bytes < slot_bytes:
            raise ValueError(f"{name}: {where.size_bytes} bytes are no slot of {slot_bytes}")
        self.name = name
        self._where = where
        self._slot_bytes = slot_bytes
        self._taken = bytearray(where.size_bytes // slot_bytes)
        self.high_water = 0
        self.refused = 0

    @property
    def slots(self) -> int:
        """Return how many slots it has."""
        return len(self._taken)

    @property
    def taken(self) -> int:
        """Return how many of them are taken."""
        return sum(self._taken)

    def map(self, size_bytes: int) -> Mapping:
        """Take slots for so many bytes.

        Raises:
            PoolFull: there is no room now.
            MappingTooLong: there never is.
        """
        wanted = -(-size_bytes // self._slot_bytes)
        if not 0 < wanted <= min(SEGMENT_SLOTS, self.slots):
            raise MappingTooLong(
                f"{self.name}: a mapping of {size_text(size_bytes)} is longer than "
                f"{size_text(min(SEGMENT_SLOTS, self.slots) * self._slot_bytes)}"
            )
        first = self._taken.find(bytes(wanted))
        if first < 0:
            self.refused += 1
            raise PoolFull(
                f"{self.name} is full: {size_text(size_bytes)} wanted, {self.taken} of "
                f"{self.slots} slots of {size_text(self._slot_bytes)} are taken"
            )
        self._taken[first : first + wanted] = bytes([1]) * wanted
        self.high_water = max(self.high_water, self.taken)
        gpa = self._where.gpa + first * self._slot_bytes
        return Mapping(first, wanted, Range(gpa, size_bytes))

    def unmap(self, mapping: Mapping) -> None:
        """Give slots back.

        Raises:
            ValueError: they are not taken.
        """
        taken = slice(mapping.first_slot, mapping.first_slot + mapping.slots)
        if self._taken[taken] != bytes([1]) * mapping.slots:
            raise ValueError(f"{self.name}: slot {mapping.first_slot} is not taken")
        self._taken[taken] = bytes(mapping.slots)
