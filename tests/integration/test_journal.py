"""The journal is the state: replayed it gives the live space back, and a run repeats itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import numpy as np
from acts import INSTALLED, PAGES, act, arena
from guests import Guest

from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.hooks.tables import Space, same_state
from rmemd.store.codec import Record, decode, encode_record

STEPS = 600


def replay(records: Iterable[Record]) -> Space:
    """Build the state that records describe; they must begin with revision 1."""
    space = Space()
    for record in records:
        for write in record.writes:
            space.apply(write)
    return space


def _long_run(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    guests = [Guest(engine, name, PAGES) for name in INSTALLED]
    for _ in range(STEPS):
        act(engine, guests, rng)
    assert check(engine.core) == []


def test_replayed_on_nothing_the_journal_gives_the_state(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(nframes=4096, nnodes=2, seed=7)
    _long_run(engine, 1)
    records = engine.core.journal.records
    assert [record.revision for record in records] == list(range(1, engine.revision + 1))
    assert len(records) > 500
    assert same_state(replay(records).snapshot(), engine.core.space.snapshot()) == []


def test_the_content_of_the_tables_gives_the_state_and_so_do_records_that_were_read(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(nframes=4096, nnodes=2, seed=7)
    _long_run(engine, 3)
    space, records = engine.core.space, engine.core.journal.records
    contents = (
        Record(engine.revision, "content", tuple(table.content()))
        for table in space.tables.values()
    )
    for source in (contents, records):
        data = b"".join(map(encode_record, source))
        read = [entry for entry in decode(data) if isinstance(entry, Record)]
        assert same_state(replay(read).snapshot(), space.snapshot()) == []
        assert b"".join(map(encode_record, read)) == data


def test_a_cut_journal_gives_an_earlier_state(make_engine: Callable[..., Engine]) -> None:
    """The comparison can fail: without its last record, the replay is another state."""
    engine = make_engine()
    Guest(engine, "null", PAGES).fault(0, 4)
    short = list(engine.core.journal.records)[:-1]
    assert same_state(replay(iter(short)).snapshot(), engine.core.space.snapshot()) != []


def test_the_same_requests_give_the_same_frames_keys_and_revisions(
    make_engine: Callable[..., Engine],
) -> None:
    one, other = (make_engine(nframes=4096, nnodes=2, seed=7) for _ in range(2))
    _long_run(one, 2)
    _long_run(other, 2)
    assert one.revision == other.revision
    assert same_state(one.core.space.snapshot(), other.core.space.snapshot()) == []
    assert arena(one) == arena(other)
    events = [engine.core.journal.events_after(0) for engine in (one, other)]
    assert events[0] == events[1]


def test_another_seed_gives_other_ciphertext_at_the_same_frames(
    make_engine: Callable[..., Engine],
) -> None:
    one, other = (make_engine(nframes=4096, seed=seed) for seed in (1, 2))
    found = []
    for engine in (one, other):
        guest = Guest(engine, "tdx-today", PAGES)
        guest.fill(0, 4, seed=3)
        found.append((guest.pfns(0, 4), engine.core.controller.raw(guest.pfns(0, 4))))
    assert np.array_equal(found[0][0], found[1][0])
    assert not (found[0][1] == found[1][1]).all(axis=1).any()


def test_what_was_told_is_a_text_that_nothing_changes(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(nframes=4096)
    pages = np.arange(3)
    before = engine.revision
    with engine.core.tx("telling") as tx:
        tx.emit("told", vm=7, flag=True, pages=pages, none=None)
    pages[:] = 9
    [event] = engine.core.journal.events_after(before)
    assert (event.revision, event.operation, event.kind, event.vm) == (
        before + 1, "telling", "told", 7,
    )  # fmt: skip
    assert event.fields == {"flag": "True", "pages": "[0 1 2]", "none": "None"}
    [carried] = [
        record for record in engine.core.journal.newest_events() if record.label == "telling"
    ]
    engine.core.journal.restore(carried)
    assert engine.core.journal.events_after(before)[-1] == event
