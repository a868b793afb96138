"""The ledger against a counter per (holder, frame)."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rmemd.hooks.tables import Space, same_state
from rmemd.hooks.tx import Tx
from rmemd.model.host import Host
from rmemd.model.ledger import Entry, Ledger

N = 512
ENTRIES = [
    Entry("vm/1", "secure EPT", False),
    Entry("vm/1", "fault", False),
    Entry("vm/2", "protected guest", True),
    Entry("session/7", "DMA", True),
]
# held as a whole, so new each time
PINS = [
    Entry("session 7 pin 1", "DMA", True),
    Entry("session 7 pin 2", "DMA", True),
    Entry("session 8 pin 3", "get", False),
]
frames = st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True)
script = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.sampled_from(ENTRIES), frames),
        st.tuples(st.just("drop"), st.sampled_from(ENTRIES), frames),
        st.tuples(st.just("forget"), st.sampled_from(ENTRIES), frames),
        st.tuples(st.just("move"), st.sampled_from(ENTRIES), frames),
        st.tuples(st.just("hold whole"), st.sampled_from(PINS), frames),
        st.tuples(st.just("forget"), st.sampled_from(PINS), frames),
    ),
    max_size=15,
)


def _array(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def _check(host: Host, ledger: Ledger, model: Counter[tuple[Entry, int]]) -> None:
    refs, pins = np.zeros(N, dtype=np.int64), np.zeros(N, dtype=np.int64)
    for (entry, pfn), count in model.items():
        (pins if entry.longterm else refs)[pfn] += count
    assert np.array_equal(host.refs.view, refs)
    assert np.array_equal(host.pins.view, pins)
    for pfn in range(32):
        named = sorted((h.name, h.purpose, h.count) for h in ledger.holders(pfn))
        expected = sorted((e.holder, e.purpose, c) for (e, p), c in model.items() if p == pfn and c)
        assert named == expected
    for entry in [*ENTRIES, *PINS]:
        held = {p for (e, p), c in model.items() if e == entry and c}
        assert ledger.count(entry) == len(held)
        assert set(np.flatnonzero(ledger.held(entry, np.arange(N))).tolist()) == held


@given(script)
def test_columns_are_the_sums_over_named_holders(steps: list[tuple[str, Entry, list[int]]]) -> None:
    tx = Tx(Space(), "start")
    host = Host(tx.space, tx, N, 1)
    ledger = Ledger(host, tx)
    baseline = tx.space.snapshot()
    mark = tx.mark()
    model: Counter[tuple[Entry, int]] = Counter()
    for op, entry, pfns in steps:
        if op == "hold":
            ledger.hold(tx, entry, _array(pfns))
            model.update((entry, p) for p in pfns)
        elif op == "hold whole":
            ledger.forget(tx, entry.holder)
            ledger.hold_whole(tx, entry, _array(pfns))
            model = Counter({k: c for k, c in model.items() if k[0] != entry})
            model.update((entry, p) for p in pfns)
        elif op == "drop":
            pfns = [p for p in pfns if model[entry, p]]
            ledger.drop(tx, entry, _array(pfns))
            model.subtract((entry, p) for p in pfns)
        elif op == "forget":
            gone = ledger.forget(tx, entry.holder)
            mine = {p for (e, p), c in model.items() if e.holder == entry.holder and c}
            assert set(gone.tolist()) == mine
            model = Counter({k: c for k, c in model.items() if k[0].holder != entry.holder})
        elif all(c <= 1 for (_, p), c in model.items() if p in pfns):
            # whole frames move to frames that nobody holds, as in a migration
            free = [p for p in range(16, 32) if not any(c for (_, q), c in model.items() if q == p)]
            src, dst = pfns[: len(free)], free[: len(pfns)]
            for holder in sorted({entry.holder for entry in ENTRIES}):
                ledger.move(tx, _array(src), _array(dst), holder)
            for one, other in zip(src, dst, strict=True):
                for held in ENTRIES:
                    model[held, other] = model.pop((held, one), 0)
        _check(host, ledger, model)
    tx.rollback(mark)
    assert same_state(baseline, tx.space.snapshot()) == []


@given(script)
def test_when_every_holder_is_forgotten_the_baseline_is_left(
    steps: list[tuple[str, Entry, list[int]]],
) -> None:
    tx = Tx(Space(), "start")
    host = Host(tx.space, tx, N, 1)
    ledger = Ledger(host, tx)
    baseline = tx.space.snapshot()
    for _, entry, pfns in steps:
        if entry in PINS:
            ledger.forget(tx, entry.holder)
            ledger.hold_whole(tx, entry, _array(pfns))
        else:
            ledger.hold(tx, entry, _array(pfns))
    for holder in {entry.holder for entry in [*ENTRIES, *PINS]}:
        ledger.forget(tx, holder)
    assert same_state(baseline, tx.space.snapshot()) == []
