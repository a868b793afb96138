"""The ledger against a counter per (holder, frame)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rmemd.hooks.tables import Space, same_state
from rmemd.hooks.tx import Tx
from rmemd.model.host import Host
from rmemd.model.ledger import Entry, Ledger, as_runs, frames_of
from rmemd.model.sessions import PagePin, Sessions

N = 512
ENTRIES = [
    Entry("vm/1", "secure EPT", False),
    Entry("vm/1", "fault", False),
    Entry("vm/2", "protected guest", True),
    Entry("session/7", "DMA", True),
]
# as the model counts pins
PINS = {number: Entry(f"session 7 pin {number}", "DMA", True) for number in (1, 2, 3)}
frames = st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True)
script = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.sampled_from(ENTRIES), frames),
        st.tuples(st.just("drop"), st.sampled_from(ENTRIES), frames),
        st.tuples(st.just("forget"), st.sampled_from(ENTRIES), frames),
        st.tuples(st.just("move"), st.sampled_from(ENTRIES), frames),
        st.tuples(st.just("pin"), st.sampled_from(sorted(PINS)), frames),
        st.tuples(st.just("unpin"), st.sampled_from(sorted(PINS)), frames),
    ),
    max_size=15,
)


def _array(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def _ledger(tx: Tx) -> tuple[Host, Sessions, Ledger]:
    host, sessions = Host(tx.space, tx, N, 1), Sessions(tx)
    return host, sessions, Ledger(host, sessions, tx)


def _pin(sessions: Sessions, ledger: Ledger, tx: Tx, number: int, pfns: list[int]) -> None:
    """Pin frames, under a handle that is not in use: what had it is released."""
    if any(pin.pin == number for pin in sessions.pins()):
        ledger.release_pin(tx, sessions.pin(number))
    frames, entry = _array(pfns), PINS[number]
    pin = PagePin(number, 1, 0, frames.size, entry.purpose, entry.holder, "", 7, as_runs(frames))
    ledger.hold_pin(tx, pin, frames)


def _check(
    host: Host, sessions: Sessions, ledger: Ledger, model: Counter[tuple[Entry, int]]
) -> None:
    refs, pins = np.zeros(N, dtype=np.int64), np.zeros(N, dtype=np.int64)
    for (entry, pfn), count in model.items():
        (pins if entry.longterm else refs)[pfn] += count
    assert np.array_equal(host.refs.view, refs)
    assert np.array_equal(host.pins.view, pins)
    for pfn in range(32):
        named = sorted((h.name, h.purpose, h.count) for h in ledger.holders(pfn))
        expected = sorted((e.holder, e.purpose, c) for (e, p), c in model.items() if p == pfn and c)
        assert named == expected
    for entry in ENTRIES:
        held = {p for (e, p), c in model.items() if e == entry and c}
        assert ledger.count(entry) == len(held)
        assert set(np.flatnonzero(ledger.held(entry, np.arange(N))).tolist()) == held
    for pin in sessions.pins():
        assert frames_of(pin).tolist() == sorted(p for e, p in model if e == PINS[pin.pin])


@given(script)
def test_columns_are_the_sums_over_named_holders(steps: list[tuple[str, Any, list[int]]]) -> None:
    tx = Tx(Space(), "start")
    host, sessions, ledger = _ledger(tx)
    baseline = tx.space.snapshot()
    mark = tx.mark()
    model: Counter[tuple[Entry, int]] = Counter()
    for op, who, pfns in steps:
        if op == "hold":
            ledger.hold(tx, who, _array(pfns))
            model.update((who, p) for p in pfns)
        elif op == "drop":
            pfns = [p for p in pfns if model[who, p]]
            ledger.drop(tx, who, _array(pfns))
            model.subtract((who, p) for p in pfns)
        elif op == "forget":
            gone = ledger.forget(tx, who.holder)
            mine = {p for (e, p), c in model.items() if e.holder == who.holder and c}
            assert set(gone.tolist()) == mine
            model = Counter({k: c for k, c in model.items() if k[0].holder != who.holder})
        elif op == "pin":
            _pin(sessions, ledger, tx, who, pfns)
            model = Counter({k: c for k, c in model.items() if k[0] != PINS[who]})
            model.update((PINS[who], p) for p in pfns)
        elif op == "unpin":
            mine = {p for e, p in model if e == PINS[who]}
            if mine:
                assert set(ledger.release_pin(tx, sessions.pin(who)).tolist()) == mine
            model = Counter({k: c for k, c in model.items() if k[0] != PINS[who]})
        elif all(c <= 1 for (_, p), c in model.items() if p in pfns):
            # whole frames move to frames that nobody holds, as in a migration
            free = [p for p in range(16, 32) if not any(c for (_, q), c in model.items() if q == p)]
            src, dst = pfns[: len(free)], free[: len(pfns)]
            for holder in sorted({entry.holder for entry in ENTRIES}):
                ledger.move(tx, _array(src), _array(dst), holder)
            for one, other in zip(src, dst, strict=True):
                for held in ENTRIES:
                    model[held, other] = model.pop((held, one), 0)
        _check(host, sessions, ledger, model)
    tx.rollback(mark)
    assert same_state(baseline, tx.space.snapshot()) == []


@given(script)
def test_when_every_holder_is_forgotten_the_baseline_is_left(
    steps: list[tuple[str, Any, list[int]]],
) -> None:
    tx = Tx(Space(), "start")
    _, sessions, ledger = _ledger(tx)
    baseline = tx.space.snapshot()
    for _, who, pfns in steps:
        if who in PINS:
            _pin(sessions, ledger, tx, who, pfns)
        else:
            ledger.hold(tx, who, _array(pfns))
    for entry in ENTRIES:
        ledger.forget(tx, entry.holder)
    for pin in sessions.pins():
        ledger.release_pin(tx, pin)
    assert same_state(baseline, tx.space.snapshot()) == []
