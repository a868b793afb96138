"""Devices on plain memory, with requests that are right, wrong and hostile."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from rmem_vmm import pattern
from rmem_vmm.pattern import PAGE_BYTES
from rmem_vmm.ring import BadChain, Buffer, Chain, Region, Regions, View
from rmem_vmm.virtio import (
    BLK_HEADER,
    BLK_IN,
    BLK_IOERR,
    BLK_OK,
    BLK_OUT,
    BLK_UNSUPP,
    CHECK_ECHO,
    CHECK_HEADER,
    CHECK_OK,
    CHECK_RECEIVE,
    CHECK_STATUS,
    CHECK_WRONG,
    BlockDevice,
    Checker,
    page_runs,
)

HEADER, STATUS, DATA, ANSWER = 0, 0x100, 0x1000, 0x5000
NPAGES, GPA, SEED, REPLY = 4, 0x7000, 5, 6
SIZE = NPAGES * PAGE_BYTES


@pytest.fixture
def memory() -> Regions:
    return Regions([Region(0, 0x10000, View(memoryview(bytearray(0x10000))))])


@pytest.fixture
def disk() -> Iterator[BlockDevice]:
    fd = os.memfd_create("disk")
    os.ftruncate(fd, 8192)
    yield BlockDevice(fd, 8192)
    os.close(fd)


def echo(memory: Regions, data: bytes, answer: int = ANSWER, npages: int = NPAGES) -> Chain:
    memory.store(HEADER, CHECK_HEADER.pack(CHECK_ECHO, npages, GPA, SEED, REPLY))
    memory.store(DATA, data)
    return Chain(
        0,
        (Buffer(HEADER, CHECK_HEADER.size), Buffer(DATA, len(data))),
        (Buffer(answer, len(data), True), Buffer(STATUS, CHECK_STATUS.size, True)),
    )


@pytest.mark.parametrize("answer", [ANSWER, DATA])
def test_checker_answers_with_the_other_pattern(memory: Regions, answer: int) -> None:
    checker = Checker()
    chain = echo(memory, pattern.words(SEED, GPA, SIZE), answer)
    assert checker.handle(chain, memory) == SIZE + CHECK_STATUS.size
    assert memory.load(answer, SIZE) == pattern.words(REPLY, GPA, SIZE)
    assert CHECK_STATUS.unpack(memory.load(STATUS, CHECK_STATUS.size)) == (CHECK_OK, 0)
    assert checker.figures() == {"pages": NPAGES, "wrong_pages": 0}


@pytest.mark.parametrize("bit", [0, 4095 * 8, (SIZE - 1) * 8 + 7])
def test_one_wrong_bit_is_found_and_never_answered_as_right(memory: Regions, bit: int) -> None:
    data = bytearray(pattern.words(SEED, GPA, SIZE))
    data[bit // 8] ^= 1 << bit % 8
    checker = Checker()
    checker.handle(echo(memory, bytes(data)), memory)
    assert CHECK_STATUS.unpack(memory.load(STATUS, CHECK_STATUS.size)) == (CHECK_WRONG, 1)
    answered = pattern.differing_pages(memory.load(ANSWER, SIZE), pattern.words(REPLY, GPA, SIZE))
    assert answered == 1
    assert checker.wrong_pages == 1


def test_pattern_of_another_place_is_wrong(memory: Regions) -> None:
    checker = Checker()
    checker.handle(echo(memory, pattern.words(SEED, GPA + PAGE_BYTES, SIZE)), memory)
    assert checker.wrong_pages == NPAGES


@pytest.mark.parametrize("npages", [NPAGES - 1, NPAGES + 1, 0xFFFFFFFF])
def test_checker_refuses_lengths_that_do_not_agree(memory: Regions, npages: int) -> None:
    with pytest.raises(BadChain, match="request 1"):
        Checker().handle(echo(memory, pattern.words(SEED, GPA, SIZE), npages=npages), memory)


def test_checker_keeps_a_receive_buffer_until_something_comes(memory: Regions) -> None:
    memory.store(HEADER, CHECK_HEADER.pack(CHECK_RECEIVE, 1, DATA, 0, 0))
    chain = Chain(
        3, (Buffer(HEADER, CHECK_HEADER.size),),
        (Buffer(DATA, 64, True), Buffer(STATUS, CHECK_STATUS.size, True)),
    )  # fmt: skip
    checker = Checker()
    assert checker.handle(chain, memory) is None
    assert checker.kept == [chain]
    back, written = checker.deliver(b"packet", memory)
    assert (back, written, checker.kept) == (chain, 6 + CHECK_STATUS.size, [])
    assert memory.load(DATA, 6) == b"packet"
    checker.handle(chain, memory)
    with pytest.raises(BadChain, match="65 bytes for a buffer of 64"):
        checker.deliver(bytes(65), memory)


def block(memory: Regions, kind: int, sector: int, data: Buffer, status: int = 1) -> Chain:
    memory.store(HEADER, BLK_HEADER.pack(kind, 0, sector))
    reads, writes = (Buffer(HEADER, BLK_HEADER.size),), (Buffer(STATUS, status, True),)
    if data.writable:
        return Chain(0, reads, (data, *writes))
    return Chain(0, (*reads, data), writes)


def test_disk_gives_back_what_was_written(memory: Regions, disk: BlockDevice) -> None:
    memory.store(DATA, bytes(range(256)) * 4)
    assert disk.handle(block(memory, BLK_OUT, 3, Buffer(DATA, 1024)), memory) == 1
    assert disk.handle(block(memory, BLK_IN, 3, Buffer(ANSWER, 1024, True)), memory) == 1025
    assert memory.load(ANSWER, 1024) == bytes(range(256)) * 4
    assert memory.load(STATUS, 1) == bytes([BLK_OK])


@pytest.mark.parametrize(
    ("kind", "sector", "size", "status"),
    [
        (BLK_OUT, 16, 512, BLK_IOERR), (BLK_OUT, 15, 1024, BLK_IOERR),
        (BLK_OUT, 2**64 - 1, 512, BLK_IOERR), (BLK_OUT, 0, 511, BLK_IOERR),
        (99, 0, 512, BLK_UNSUPP),
    ],
)  # fmt: skip
def test_disk_answers_what_it_cannot_do(
    memory: Regions, disk: BlockDevice, kind: int, sector: int, size: int, status: int
) -> None:
    disk.handle(block(memory, kind, sector, Buffer(DATA, size)), memory)
    assert memory.load(STATUS, 1) == bytes([status])


@pytest.mark.parametrize("status", [0x2, 0x1000])
def test_disk_without_a_status_byte(memory: Regions, disk: BlockDevice, status: int) -> None:
    with pytest.raises(BadChain, match="no status byte"):
        disk.handle(block(memory, BLK_OUT, 0, Buffer(DATA, 512), status), memory)


def test_header_of_another_size(memory: Regions, disk: BlockDevice) -> None:
    chain = Chain(0, (Buffer(HEADER, 15),), (Buffer(STATUS, 1, True),))
    for device in (disk, Checker()):
        with pytest.raises(BadChain, match="no header"):
            device.handle(chain, memory)


def test_pages_of_a_chain_are_merged() -> None:
    chain = Chain(
        0, (Buffer(0x10, 32), Buffer(0x2FF0, 0x20)), (Buffer(0x1000, 0x1000, True),
                                                      Buffer(0x9000, 1, True)),
    )  # fmt: skip
    assert page_runs(chain) == [(0, 0x4000), (0x9000, 0x1000)]
