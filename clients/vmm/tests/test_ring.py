"""The virtqueue on plain memory: both sides, and a device that trusts nothing."""

from __future__ import annotations

import random
import struct

import pytest

from rmem_vmm.ring import (
    DESC_BYTES,
    F_INDIRECT,
    F_NEXT,
    F_WRITE,
    BadAddress,
    BadChain,
    Buffer,
    DeviceQueue,
    DriverQueue,
    Layout,
    Region,
    Regions,
    RingBroken,
    RingFull,
    View,
)

BASE, SIZE = 0x10000, 8
MEMORY_BYTES = 0x4000


@pytest.fixture
def regions() -> Regions:
    view = memoryview(bytearray(MEMORY_BYTES))
    return Regions([Region(BASE, MEMORY_BYTES, View(view))])


@pytest.fixture
def layout() -> Layout:
    return Layout.at(BASE, SIZE)


def test_layout_is_that_of_the_standard(layout: Layout) -> None:
    """virtio 1.2, 2.7.2: 16 bytes a descriptor, 6 + 2n, 6 + 8n, used aligned by 4."""
    assert layout.available == BASE + 16 * SIZE
    assert layout.used == (layout.available + 6 + 2 * SIZE + 3) & ~3
    assert layout.size_bytes == layout.used + 6 + 8 * SIZE - BASE


@pytest.mark.parametrize(("address", "size"), [(BASE, 6), (BASE, 0), (BASE + 8, 8), (BASE, 65536)])
def test_bad_layouts(address: int, size: int) -> None:
    with pytest.raises(ValueError, match="no queue"):
        Layout.at(address, size)


def test_bytes_in_memory_are_those_of_the_standard(regions: Regions, layout: Layout) -> None:
    driver = DriverQueue(regions, layout)
    driver.add([Buffer(BASE + 0x1000, 16), Buffer(BASE + 0x2000, 512, writable=True)])
    driver.offer()
    table = regions.load(layout.descriptors, 2 * DESC_BYTES)
    assert struct.unpack("<QIHHQIHH", table) == (
        BASE + 0x1000, 16, F_NEXT, 1, BASE + 0x2000, 512, F_WRITE, 0,
    )  # fmt: skip
    assert struct.unpack("<HHH", regions.load(layout.available, 6)) == (0, 1, 0)
    device = DeviceQueue(regions, layout)
    chain = device.pop()
    assert chain is not None
    device.push(chain.head, 99)
    assert struct.unpack("<HHII", regions.load(layout.used, 12)) == (0, 1, 0, 99)


def test_chains_go_round_and_round(regions: Regions, layout: Layout) -> None:
    """More chains than a 16-bit index counts, in random batches, each back once and unchanged."""
    driver, device = DriverQueue(regions, layout), DeviceQueue(regions, layout)
    choose = random.Random(7)
    sent = back = 0
    waiting: dict[int, tuple[int, int]] = {}
    held = []
    while back < 70_000:
        while len(waiting) < SIZE // 2 and choose.random() < 0.8:
            size = 1 + sent % 1000
            head = driver.add([Buffer(BASE + 0x1000, size), Buffer(BASE + 0x2000, 8, True)])
            waiting[head] = (size, sent)
            sent += 1
        driver.offer()
        while (chain := device.pop()) is not None:
            assert chain.reads[0].size == waiting[chain.head][0]
            held.append(chain.head)
        choose.shuffle(held)
        for head in held:
            device.push(head, waiting[head][1])
        held.clear()
        for used in driver.collect():
            assert used.written == waiting.pop(used.head)[1]
            back += 1
    assert driver.in_flight == len(waiting)


def test_nothing_is_seen_before_it_is_offered(regions: Regions, layout: Layout) -> None:
    driver, device = DriverQueue(regions, layout), DeviceQueue(regions, layout)
    driver.add([Buffer(BASE + 0x1000, 16)])
    assert device.pop() is None
    driver.offer()
    assert device.pop() is not None


def test_driver_runs_out_of_descriptors(regions: Regions, layout: Layout) -> None:
    driver = DriverQueue(regions, layout)
    for _ in range(SIZE // 2):
        driver.add([Buffer(BASE, 1), Buffer(BASE, 1)])
    with pytest.raises(RingFull, match="2 descriptors wanted, 0 are free"):
        driver.add([Buffer(BASE, 1), Buffer(BASE, 1)])
    with pytest.raises(ValueError, match="reads first"):
        driver.add([Buffer(BASE, 1, writable=True), Buffer(BASE, 1)])


def offer(regions: Regions, layout: Layout, *descriptors: tuple[int, int, int, int]) -> DeviceQueue:
    """What a hostile driver writes: descriptors as given, chain 0 offered."""
    for index, entry in enumerate(descriptors):
        at = layout.descriptors + index * DESC_BYTES
        regions.store(at, struct.pack("<QIHH", *entry))
    regions.store(layout.available, struct.pack("<HHH", 0, 1, 0))
    return DeviceQueue(regions, layout)


@pytest.mark.parametrize(
    ("descriptors", "why"),
    [
        ([(BASE - 1, 16, 0, 0)], "not in the memory"),
        ([(BASE + MEMORY_BYTES - 8, 16, 0, 0)], "not in the memory"),
        ([(2**64 - 8, 16, 0, 0)], "not in the memory"),
        ([(BASE, 2**32 - 1, 0, 0)], "not in the memory"),
        ([(BASE, 0, 0, 0)], "no bytes"),
        ([(BASE, 16, F_NEXT, SIZE)], "next is descriptor 8 of 8"),
        ([(BASE, 16, F_NEXT, 0xFFFF)], "next is descriptor 65535 of 8"),
        ([(BASE, 16, F_NEXT, 0)], "circle"),
        ([(BASE, 16, F_NEXT, 1), (BASE, 16, F_NEXT, 0)], "circle"),
        ([(BASE, 16, F_INDIRECT, 0)], "indirect"),
        ([(BASE, 16, F_WRITE | F_NEXT, 1), (BASE, 16, 0, 0)], "to read behind one to write"),
    ],
)
def test_bad_chains_are_refused_and_the_next_one_is_served(
    regions: Regions, layout: Layout, descriptors: list[tuple[int, int, int, int]], why: str
) -> None:
    device = offer(regions, layout, *descriptors)
    with pytest.raises(BadChain, match=why) as refused:
        device.pop()
    device.push(refused.value.head, 0)
    regions.store(layout.descriptors, struct.pack("<QIHH", BASE, 16, 0, 0))
    regions.store(layout.available, struct.pack("<HHHH", 0, 2, 0, 0))
    chain = device.pop()
    assert chain is not None
    assert chain.reads == (Buffer(BASE, 16),)


@pytest.mark.parametrize(("index", "entry"), [(SIZE + 1, 0), (0xFFFF, 0), (1, SIZE), (1, 0xFFFF)])
def test_an_impossible_ring_is_broken(
    regions: Regions, layout: Layout, index: int, entry: int
) -> None:
    regions.store(layout.available, struct.pack("<HHH", 0, index, entry))
    with pytest.raises(RingBroken):
        DeviceQueue(regions, layout).pop()


def test_random_bytes_never_crash_or_hang_a_device(layout: Layout) -> None:
    choose = random.Random(11)
    outcomes = set()
    for _ in range(3000):
        raw = bytearray(choose.randbytes(MEMORY_BYTES // 8))
        if choose.random() < 0.7:  # a plausible index, so that chains are followed
            raw[layout.available - BASE + 2 : layout.available - BASE + 4] = b"\x01\x00"
            raw[layout.available - BASE + 4 : layout.available - BASE + 6] = b"\x02\x00"
        device = DeviceQueue(Regions([Region(BASE, len(raw), View(memoryview(raw)))]), layout)
        try:
            chain = device.pop()
            outcomes.add("none" if chain is None else "chain")
        except (BadChain, RingBroken) as error:
            outcomes.add(type(error).__name__)
    assert {"BadChain", "RingBroken"} <= outcomes


def test_a_device_that_gives_back_what_it_never_had_is_caught(
    regions: Regions, layout: Layout
) -> None:
    driver = DriverQueue(regions, layout)
    regions.store(layout.used, struct.pack("<HHII", 0, 1, 5, 0))
    with pytest.raises(RingBroken, match="chain 5"):
        driver.collect()


def test_a_range_that_was_taken_back_is_out_of_reach(regions: Regions, layout: Layout) -> None:
    left = regions.without(BASE + 0x1000, 0x1000)
    left.store(BASE + 0xFFF, b"x")
    left.store(BASE + 0x2000, b"y")
    for address, size in ((BASE + 0x1000, 1), (BASE + 0xFFF, 2), (BASE + 0x1FFF, 2)):
        with pytest.raises(BadAddress):
            left.load(address, size)
    with pytest.raises(BadAddress):
        DeviceQueue(regions.without(layout.used, 8), layout)


def test_read_only_memory_is_not_written() -> None:
    regions = Regions([Region(0, 4096, View(memoryview(bytearray(4096))), read_only=True)])
    regions.load(0, 4096)
    with pytest.raises(BadAddress, match="read-only"):
        regions.store(0, b"x")
