from __future__ import annotations

import pytest

from rmem_client.constants import PAGE_BYTES
from rmem_vmm.machine import Range
from rmem_vmm.swiotlb import MappingTooLong, Pool, PoolFull

SLOT = 16 * PAGE_BYTES


@pytest.fixture
def pool() -> Pool:
    return Pool("swiotlb pool", Range(1 << 32, 8 * SLOT), SLOT)


def test_mappings_are_contiguous_and_apart(pool: Pool) -> None:
    one, two = pool.map(2 * SLOT), pool.map(SLOT + 1)
    assert (one.where.gpa, one.slots) == (1 << 32, 2)
    assert (two.where.gpa, two.slots) == ((1 << 32) + 2 * SLOT, 2)
    assert two.where.size_bytes == SLOT + 1
    assert (pool.taken, pool.high_water, pool.slots) == (4, 4, 8)


def test_a_full_pool_says_its_name_and_how_full_it_is(pool: Pool) -> None:
    pool.map(7 * SLOT)
    wanted = "swiotlb pool is full: 128 KiB wanted, 7 of 8 slots of 64 KiB are taken"
    with pytest.raises(PoolFull, match=wanted):
        pool.map(2 * SLOT)
    assert pool.refused == 1
    pool.map(SLOT)


def test_free_slots_that_are_apart_are_no_room(pool: Pool) -> None:
    mappings = [pool.map(SLOT) for _ in range(8)]
    for mapping in mappings[::2]:
        pool.unmap(mapping)
    assert pool.taken == 4
    with pytest.raises(PoolFull, match="4 of 8"):
        pool.map(2 * SLOT)
    pool.unmap(mappings[1])
    assert pool.map(3 * SLOT).first_slot == 0
    assert (pool.taken, pool.high_water) == (6, 8)


@pytest.mark.parametrize("size", [9 * SLOT, 0])
def test_a_mapping_that_never_fits(pool: Pool, size: int) -> None:
    with pytest.raises(MappingTooLong):
        pool.map(size)


def test_unmapping_twice(pool: Pool) -> None:
    mapping = pool.map(SLOT)
    pool.unmap(mapping)
    with pytest.raises(ValueError, match="slot 0 is not taken"):
        pool.unmap(mapping)
