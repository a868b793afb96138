"""A call of many attribute ranges comes to what its ranges come to one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from guests import Guest, make_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from rmemd.engine import attributes
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.errors import FOLIO_BUSY, RmemError
from rmemd.hooks.tables import Space, TableSpec, same_state
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Runs
from rmemd.model.spans import SHORT_PAGES, Spans
from rmemd.units import PAGE_SIZE

GFN, NPAGES = 0x100, 48
CONSUMERS = ("tdx-today", "sw-protected", "null")

pages = st.integers(-4, NPAGES + 3)
asked = st.tuples(pages, st.integers(1, 6), st.booleans())
long_ones = st.tuples(pages, st.just(3 * SHORT_PAGES), st.booleans())


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Draw ranges (gpa, size, attributes): mostly apart and ascending, as VMMs have them."""
    rows = draw(st.lists(st.one_of(asked, asked, asked, long_ones), min_size=3, max_size=12))
    if draw(st.booleans()):
        rows = [
            (page, n, private) for (page, n, private), (after, _, _) in
            zip(sorted(rows), [*sorted(rows)[1:], (1 << 20, 1, True)], strict=True)
            if page + n <= after
        ]  # fmt: skip
    return [((GFN + page) * PAGE_SIZE, n * PAGE_SIZE, 8 * private) for page, n, private in rows]


class Twin:
    """An engine with one guest, some of which is mapped in either state, and some filled in."""

    def __init__(
        self, consumer: str, shared: list[int], mapped: list[int], found: list[int], busy: int
    ) -> None:
        self.engine = make_engine(512)
        self.guest = guest = Guest(self.engine, consumer, NPAGES, GFN, in_place=False)
        # another slot, with a gap before it
        file = self.engine.create_file(guest.vm, 4 * PAGE_SIZE, 0).info.file
        gpa = guest.gpa(NPAGES + 2)
        self.engine.set_memory_region(guest.vm, 1, 4, gpa, 4 * PAGE_SIZE, file, 0)
        for page in shared:
            guest.convert(page, 1, private=False)
        for page in mapped:
            guest.fault(page)
        memory = self.engine.core.shared_memory(self.engine.core.files.get(guest.file))
        memory.write(np.array(found, dtype=np.int64), np.ones((len(found), PAGE_SIZE), np.uint8))
        self._refuse(busy)

    def _refuse(self, busy: int) -> None:
        """Have the consumer refuse to unmap one page."""
        consumer = self.guest.consumer
        real = consumer.ops.invalidate_start

        def invalidate_start(tx: Any, runs: Runs, why: Any) -> None:
            real(tx, runs, why)
            if GFN + busy in runs.gfns():
                raise FOLIO_BUSY("not this one")

        consumer.ops = replace(consumer.ops, invalidate_start=invalidate_start)

    def outcome(self, *calls: Any) -> tuple[int, str, str]:
        """Make calls until one is refused: how many ranges were so already, and the refusal."""
        unchanged = 0
        try:
            for ranges in calls:
                unchanged += self.engine.set_attributes(self.guest.vm, ranges)
        except RmemError as refusal:
            return -1, refusal.reason.name, refusal.message
        return unchanged, "", ""

    def state(self) -> dict[str, Any]:
        """Return all state."""
        return self.engine.core.space.snapshot()


def rows_of(batch: list[tuple[int, int, int]]) -> np.ndarray:
    """Return ranges as they travel."""
    return np.array(batch, dtype=np.uint64).reshape(-1, 3)


some_pages = st.lists(st.integers(0, NPAGES - 1), min_size=6, max_size=24, unique=True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    consumer=st.sampled_from(CONSUMERS), shared=some_pages, mapped=some_pages, found=some_pages,
    busy=st.integers(-8, 5), batch=batches(),
)  # fmt: skip
def test_a_batch_is_its_ranges_one_by_one(
    consumer: str, shared: list[int], mapped: list[int], found: list[int], busy: int,
    batch: list[tuple[int, int, int]],
) -> None:  # fmt: skip
    # one that is mapped, in half of the runs
    made = consumer, shared, mapped, found, mapped[busy] if busy >= 0 else -1
    together, one_by_one = Twin(*made), Twin(*made)
    assert together.outcome(rows_of(batch)) == one_by_one.outcome(*([one] for one in batch))
    assert same_state(together.state(), one_by_one.state()) == []
    assert check(together.engine.core) == []
    for twin in (together, one_by_one):
        twin.engine.close()


def test_ranges_before_the_one_that_is_refused_stay() -> None:
    twin = Twin("tdx-today", shared=[], mapped=[0, 1, 2, 3, 4], found=[], busy=3)
    gpa, before = twin.guest.gpa, twin.engine.revision
    batch = rows_of([(gpa(page), PAGE_SIZE, 0) for page in range(5)])
    assert twin.outcome(batch) == (-1, "FOLIO_BUSY", "not this one")
    table = twin.engine.core.vms.get(twin.guest.vm).attributes
    assert table.get(GFN + np.arange(5)).tolist() == [0, 0, 0, 1, 1]
    assert twin.engine.revision == before + 3
    twin.engine.close()


bad_words = st.sampled_from(
    [0, 1, 4095, 4097, 1 << 52, (1 << 52) + 4096, 1 << 63, (1 << 64) - 4096]
)


@given(
    at=st.integers(0, 5), column=st.integers(0, 2), word=bad_words,
    flags=st.sampled_from([0, 0, 1]), later=st.booleans(),
)  # fmt: skip
def test_the_first_wrong_range_is_named(
    vm: tuple[Engine, int], at: int, column: int, word: int, flags: int, later: bool
) -> None:
    engine, number = vm
    batch = [[page * PAGE_SIZE, PAGE_SIZE, 8 * (page % 2)] for page in range(8)]
    batch[at][column] = word
    if later:
        # it is not the one that is named
        batch[7][1] = 5
    told = []
    for ranges in (rows_of([(a, b, c) for a, b, c in batch]), [(a, b, c) for a, b, c in batch]):
        revision = engine.revision
        try:
            engine.set_attributes(number, ranges, flags)
        except RmemError as error:
            assert engine.revision == revision
            told.append((error.reason.name, error.message, error.details.field))
    assert told == told[:1] * 2
    assert told or not (later or flags)


@pytest.fixture(scope="module")
def vm() -> Any:
    """Return an engine and a VM of it."""
    engine = make_engine(64)
    yield engine, engine.create_vm("sw-protected", in_place=False).info.vm
    engine.close()


def test_thousands_of_ranges_are_one_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(4096)
    guest = Guest(engine, "tdx-today", 4096, in_place=False)
    guest.fault(0, 64)
    calls: list[Runs] = []
    real = guest.consumer.ops.invalidate_start

    def invalidate_start(tx: Any, runs: Runs, why: Any) -> None:
        calls.append(runs)
        real(tx, runs, why)

    guest.consumer.ops = replace(guest.consumer.ops, invalidate_start=invalidate_start)
    batch = rows_of([(guest.gpa(page), PAGE_SIZE, 0) for page in range(0, 4096, 2)])
    before = engine.revision
    assert engine.set_attributes(guest.vm, batch) == 0
    assert engine.revision == before + 1
    assert [runs.total for runs in calls] == [32]
    [told] = engine.core.journal.events_after(before)
    assert told.kind == "attributes_set"
    assert told.fields["npages"] == told.fields["ranges"] == "2048"
    assert engine.set_attributes(guest.vm, batch) == 2048
    assert engine.revision == before + 1
    # not more than a hook can be asked about at once
    monkeypatch.setattr(attributes, "TOGETHER_PAGES", 2047)
    batch[:, 2] = 8
    assert engine.set_attributes(guest.vm, batch) == 0
    assert engine.revision == before + 1 + 2048
    engine.close()


# --- spans ---------------------------------------------------------------------------------------
@st.composite
def spans(draw: st.DrawFn) -> Spans:
    """Draw ascending ranges apart from each other, or just adjacent."""
    lengths = draw(
        st.lists(
            st.tuples(st.sampled_from([0, 0, 1, 5, 4000]), st.sampled_from([1, 1, 2, 70, 9000])),
            min_size=1, max_size=8,
        )
    )  # fmt: skip
    at, starts, counts = 0, [], []
    for gap, n in lengths:
        starts.append(at + gap)
        counts.append(n)
        at += gap + n
    return Spans(np.array(starts, dtype=np.int64), np.array(counts, dtype=np.int64))


@given(spans(), st.integers(0, 12000), st.integers(1, 12000))
def test_spans_are_the_pages_that_they_name(some: Spans, start: int, npages: int) -> None:
    every = [page for first, n in some for page in range(first, first + n)]
    inside = [page for page in every if start <= page < start + npages]
    assert some.pages.tolist() == some.merged().pages.tolist() == every
    assert some.handled().pages.tolist() == every
    assert some.pieces == some.handled().pieces == some.merged().starts.size
    assert (np.diff(some.merged().starts) > some.merged().counts[:-1]).all()
    assert some.within(start, npages).pages.tolist() == inside
    assert some.meet(start, npages) == bool(inside)
    assert some.shifted(3).pages.tolist() == [page + 3 for page in every]
    numbers = np.arange(start, start + npages, dtype=np.int64)
    assert numbers[some.hold(numbers)].tolist() == inside


@given(spans(), spans(), st.data())
def test_what_spans_hold_in_a_table(some: Spans, other: Spans, data: st.DataObject) -> None:
    tx = Tx(Space(), "test")
    table = tx.create(TableSpec("t", "sparse", "u1", 1))
    model = np.ones(200_000, dtype=np.uint8)
    other.write(tx, table, 0)
    model[other.pages] = 0
    wanted = data.draw(st.lists(st.integers(0, 1), min_size=len(some.starts), max_size=12))
    values = np.array((wanted + [0] * len(some.starts))[: len(some.starts)], dtype=np.uint8)
    expected = [
        bool((model[first : first + n] == value).all())
        for (first, n), value in zip(some, values.tolist(), strict=True)
    ]
    assert some.are(table, values).tolist() == expected
    assert some.touched(table).tolist() == [page for page in some.pages if not model[page]]
