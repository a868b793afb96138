"""The memory controller against plaintext by frame: what the owner reads, what the bus shows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rmemd.errors import HW_POISON, Poisoned
from rmemd.hooks.tables import Space
from rmemd.hooks.tx import KEYS, ByteOp, Tx
from rmemd.hooks.types import KeySpec
from rmemd.model.host import Host, Stored
from rmemd.store.controller import MemoryController
from rmemd.units import PAGE_SIZE, pages

PLAIN, SECRET, GUARDED, OTHER = 1, 2, 3, 4
SPECS = (
    KeySpec(PLAIN, "vm/1", plain=True),
    KeySpec(SECRET, "vm/2"),
    KeySpec(GUARDED, "vm/3", integrity=True),
    KeySpec(OTHER, "vm/4", integrity=True),
)


class Bench:
    """A controller on a host of 512 frames; byte operations take effect at once."""

    def __init__(self, seed: int = 1) -> None:
        self.tx = Tx(Space(), "test")
        self.host = Host(self.tx.space, self.tx, 512, 1)
        keys: Any = self.tx.space.tables[KEYS]
        for spec in SPECS:
            self.tx.set(keys, spec.key_id, spec)
        self.controller = MemoryController(self.host, seed)

    def do(self, kind: str, pfns: np.ndarray, key: int = 0, **fields: Any) -> None:
        """Carry out one byte operation."""
        op = ByteOp(kind, pfns, key, **fields)
        self.controller.apply(self.tx, self.controller.perform([op]))

    def read(self, pfns: np.ndarray, key: int) -> np.ndarray:
        """Read as the key's owner; nothing may fail."""
        rows, failed = self.controller.read(pfns, key)
        assert not failed.any()
        return rows


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.controller.close()


def _rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, PAGE_SIZE), dtype=np.uint8)


every_key = pytest.mark.parametrize("key", [PLAIN, SECRET, GUARDED])
encrypted = pytest.mark.parametrize("key", [SECRET, GUARDED])


@every_key
def test_the_owner_reads_what_was_copied_in(bench: Bench, key: int) -> None:
    pfns = np.array([7, 300, 2, 8], dtype=np.int64)
    rows = _rows(4)
    bench.do("copy_in", pfns, key, rows=rows)
    assert np.array_equal(bench.read(pfns, key), rows)
    assert np.array_equal(bench.read(pfns[::-1].copy(), key), rows[::-1])


@encrypted
def test_the_bus_shows_no_plaintext(bench: Bench, key: int) -> None:
    pfns = pages(0, 16)
    rows = np.tile(_rows(1), (16, 1))
    bench.do("copy_in", pfns, key, rows=rows)
    raw = bench.controller.raw(pfns)
    lines = {line.tobytes() for line in raw.reshape(-1, 16)}
    assert lines.isdisjoint(line.tobytes() for line in rows.reshape(-1, 16))
    assert len(lines) == raw.size // 16, "equal plaintext shows as equal ciphertext"


def test_a_plain_key_hides_nothing(bench: Bench) -> None:
    bench.do("copy_in", pages(0, 2), PLAIN, rows=_rows(2))
    assert np.array_equal(bench.controller.raw(pages(0, 2)), _rows(2))


@every_key
def test_zero_under_a_key_equals_writing_zeros(bench: Bench, key: int) -> None:
    zeros = np.zeros((3, PAGE_SIZE), dtype=np.uint8)
    bench.do("zero", pages(8, 3), key)
    assert bench.host.stored.get(pages(8, 3)).tolist() == [Stored.KEY_ZERO] * 3
    shown = bench.controller.raw(pages(8, 3))
    read = bench.read(pages(8, 3), key)
    bench.do("copy_in", pages(8, 3), key, rows=zeros)
    assert np.array_equal(shown, bench.controller.raw(pages(8, 3)))
    assert np.array_equal(read, bench.read(pages(8, 3), key))
    assert not read.any()


@encrypted
def test_another_key_reads_noise_or_fails(bench: Bench, key: int) -> None:
    bench.do("copy_in", pages(0, 2), key, rows=_rows(2))
    other, failed = bench.controller.read(pages(0, 2), OTHER)
    assert failed.all()
    assert not other.any()
    noise = bench.controller.read(pages(0, 2), SECRET)[0]
    assert (key == SECRET) == np.array_equal(noise, _rows(2))


def test_raw_bytes_on_another_frame_are_noise_without_integrity(bench: Bench) -> None:
    bench.do("copy_in", pages(0, 1), SECRET, rows=_rows(1))
    bench.do("zero", pages(1, 1), SECRET)
    contents, raw = bench.controller.write_plan(pages(1, 1), bench.controller.raw(pages(0, 1)), 0)
    bench.controller.apply(bench.tx, [contents])
    bench.controller.store_raw(pages(1, 1), raw)
    assert np.array_equal(bench.controller.raw(pages(0, 1)), bench.controller.raw(pages(1, 1)))
    found = bench.read(pages(1, 1), SECRET)
    assert (found != _rows(1)).mean() > 0.9
    assert np.array_equal(bench.read(pages(0, 1), SECRET), _rows(1))


def test_raw_bytes_on_another_frame_fail_with_integrity(bench: Bench) -> None:
    bench.do("copy_in", pages(0, 2), GUARDED, rows=_rows(2))
    contents, raw = bench.controller.write_plan(pages(1, 1), bench.controller.raw(pages(0, 1)), 0)
    bench.controller.apply(bench.tx, [contents])
    bench.controller.store_raw(pages(1, 1), raw)
    rows, failed = bench.controller.read(pages(0, 2), GUARDED)
    assert failed.tolist() == [False, True]
    assert not rows[1].any()


def test_one_bit_changed_on_the_bus_fails_with_integrity(bench: Bench) -> None:
    """Even if key and owner are those of the page: the MAC is what notices."""
    bench.do("copy_in", pages(0, 1), GUARDED, rows=_rows(1))
    raw = bench.controller.raw(pages(0, 1))
    raw[0, 1234] ^= 1
    bench.controller.store_raw(pages(0, 1), raw)
    assert bench.controller.read(pages(0, 1), GUARDED)[1].all()


def test_taint_is_sticky_until_a_full_write(bench: Bench) -> None:
    bench.do("copy_in", pages(0, 1), GUARDED, rows=_rows(1))
    bench.controller.taint(bench.tx, pages(0, 1))
    assert bench.controller.read(pages(0, 1), GUARDED)[1].all()
    with pytest.raises(Poisoned) as caught:
        bench.controller.raw(pages(0, 1))
    assert caught.value.reason is HW_POISON
    with pytest.raises(Poisoned):
        bench.do("relocate", pages(9, 1), GUARDED, src=pages(0, 1))
    bench.do("copy_in", pages(0, 1), GUARDED, rows=_rows(1))
    assert np.array_equal(bench.read(pages(0, 1), GUARDED), _rows(1))


@every_key
def test_relocation_keeps_the_plaintext_and_changes_the_ciphertext(bench: Bench, key: int) -> None:
    bench.do("copy_in", pages(0, 3), key, rows=_rows(3))
    bench.do("zero", pages(3, 1), key)
    before = bench.controller.raw(pages(0, 4))
    bench.do("relocate", pages(100, 4), key, src=pages(0, 4))
    expected = np.concatenate((_rows(3), np.zeros((1, PAGE_SIZE), dtype=np.uint8)))
    assert np.array_equal(bench.read(pages(100, 4), key), expected)
    after = bench.controller.raw(pages(100, 4))
    if key == PLAIN:
        assert np.array_equal(before, after)
    else:
        assert not (before.reshape(-1, 16) == after.reshape(-1, 16)).all(axis=1).any()


@every_key
def test_scrub_leaves_raw_zeros(bench: Bench, key: int) -> None:
    bench.do("copy_in", pages(0, 2), key, rows=_rows(2))
    bench.do("scrub", pages(0, 2))
    assert not bench.controller.raw(pages(0, 2)).any()
    assert not bench.host.key.get(pages(0, 2)).any()


def test_keys_come_from_seed_and_number() -> None:
    benches = [Bench(seed) for seed in (1, 1, 2)]
    for bench in benches:
        bench.do("copy_in", pages(0, 2), SECRET, rows=_rows(2))
        bench.do("copy_in", pages(2, 2), GUARDED, rows=_rows(2))
    one, same, other = (bench.controller.raw(pages(0, 4)) for bench in benches)
    assert np.array_equal(one, same)
    assert not (one == other).all(axis=1).any()
    assert not (one[:2] == one[2:]).all(axis=1).any()
    for bench in benches:
        bench.controller.close()


def test_punched_bytes_are_gone_from_the_arena(bench: Bench) -> None:
    bench.do("copy_in", pages(0, 2), SECRET, rows=_rows(2))
    bench.controller.punch(pages(0, 1))
    assert not bench.controller._arena.read(pages(0, 1)).any()
    assert bench.controller._arena.read(pages(1, 1)).any()
