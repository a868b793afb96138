"""Whatever a VMM and its guests do, alone or at once: a replay does the same."""

from __future__ import annotations

import threading

from guests import consumers, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from traced import assert_same, launch, live, recording

NAMES = consumers()


@settings(max_examples=25)
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
    seed=st.integers(0, 1 << 20),
    before=st.integers(0, 12),
    steps=st.integers(1, 40),
    inline_pages=st.sampled_from((0, 8)),
)
def test_random_operations_are_replayed_to_the_same_state(
    names: list[str], seed: int, before: int, steps: int, inline_pages: int
) -> None:
    host = make_engine(2048, nnodes=2, inline_pages=inline_pages)
    try:
        guests = [launch(host, name) for name in names] if before else []
        if guests:
            live(host, guests, seed, before)
        with recording(host, state_every=7) as found:
            guests += [launch(host, name) for name in names]
            live(host, guests, seed + 1, steps)
        assert_same(found, host)
    finally:
        host.close()


@settings(max_examples=8)
@given(seed=st.integers(0, 1 << 20), nthreads=st.integers(2, 5))
def test_operations_at_once_are_replayed_to_the_same_state(seed: int, nthreads: int) -> None:
    host = make_engine(2048, nnodes=2, inline_pages=0)
    try:
        with recording(host) as found:
            guests = [launch(host, name) for name in ("tdx-relocate", "sw-protected", "snp-move")]
            threads = [
                threading.Thread(target=live, args=(host, guests, seed + n, 12))
                for n in range(nthreads)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert_same(found, host)
    finally:
        host.close()
