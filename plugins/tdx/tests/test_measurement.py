"""A measurement that another process takes up again goes on as if nothing had happened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rmemd.hooks import Why
from rmemd.testing.hookbench import runs
from rmemd_tdx import measurement

PAGES = np.random.default_rng(1).integers(0, 256, (40, 4096), dtype=np.uint8)


def populate(host: Any, gfn: int, n: int = 1, measure: bool = True) -> None:
    host.populate(runs(gfn, 10 + gfn, n), PAGES[gfn : gfn + n], measure)


class Reader:
    """The TD's own pages, as the engine reads them; remembers what it was asked for."""

    def __init__(self, pages: Any = PAGES) -> None:
        self.pages = pages
        self.asked: list[int] = []

    def __call__(self, gfns: Any) -> Any:
        self.asked += gfns.tolist()
        return self.pages[gfns]


def restarted(host: Any, read: Any = None) -> str:
    """The daemon is killed, and another one resumes the TD."""
    host.td.streams.clear()
    with host.bench.unchanged():
        return measurement.resume(host.td, read or Reader())


def in_an_order_of_its_own(host: Any) -> None:
    populate(host, 7, 3)
    populate(host, 0, 4, measure=False)
    populate(host, 5)
    populate(host, 20, 2)
    populate(host, 4, 1, measure=False)


def finish(host: Any) -> bytes:
    populate(host, 30, 2)
    populate(host, 6, 1, measure=False)
    return bytes(host.finalize())


@pytest.mark.parametrize("batch", [1, 2, 3, 1024])
def test_mrtd_goes_on_as_if_there_had_been_no_restart(
    make_host: Any, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "BATCH", batch)
    never, killed = make_host(), make_host()
    read = Reader()
    for host in (never, killed):
        in_an_order_of_its_own(host)
    assert restarted(killed, read) == ""
    assert read.asked == [7, 8, 9, 5, 20, 21]
    assert finish(killed) == finish(never)


def test_a_td_that_has_no_page_yet_goes_on(make_host: Any) -> None:
    never, killed = make_host(), make_host()
    assert restarted(killed) == ""
    assert finish(killed) == finish(never)


def test_pages_that_moved_are_measured_where_they_are_now(make_host: Any) -> None:
    never, moved = make_host("tdx-relocate"), make_host("tdx-relocate")
    for host in (never, moved):
        in_an_order_of_its_own(host)
    moved.block(runs(7, 17))
    assert restarted(moved) == ""
    moved.run(moved.ops.invalidate_end, runs(7, 17), Why.MIGRATE, False)
    assert finish(moved) == finish(never)


def test_a_populate_that_was_undone_has_no_turn(make_host: Any) -> None:
    never, killed = make_host(), make_host()
    for host in (never, killed):
        in_an_order_of_its_own(host)

    def undone(tx: Any) -> None:
        ones = np.ones(2, dtype=np.uint8)
        killed.ops.populate(tx, runs(11, 21, 2), ones, True, PAGES[11:13])
        raise KeyError("the engine changed its mind")

    with pytest.raises(KeyError):
        killed.run(undone)
    assert restarted(killed) == ""
    assert finish(killed) == finish(never)


def test_pages_without_measured_bytes_may_have_been_removed(make_host: Any) -> None:
    never, killed = make_host(), make_host()
    for host in (never, killed):
        in_an_order_of_its_own(host)
        host.zap(runs(1, 11))
    assert restarted(killed) == ""
    assert finish(killed) == finish(never)


def test_a_measured_page_that_was_removed_makes_it_unresumable(host: Any) -> None:
    in_an_order_of_its_own(host)
    host.zap(runs(5, 15))
    assert restarted(host) == "gfn 0x5 was measured and removed before FINALIZE"


@pytest.mark.parametrize("measure", [True, False])
def test_a_page_that_was_measured_twice_makes_it_unresumable(host: Any, measure: bool) -> None:
    in_an_order_of_its_own(host)
    host.zap(runs(5, 15))
    populate(host, 5, measure=measure)
    assert "added again" in restarted(host)


def test_pages_that_are_not_what_was_measured_make_it_unresumable(host: Any) -> None:
    in_an_order_of_its_own(host)
    damaged = PAGES.copy()
    damaged[8, 100] ^= 1
    assert "not what was measured" in restarted(host, Reader(damaged))
    kinds = np.ones(1, dtype=np.uint8)
    refusal = host.refused(host.ops.populate, runs(30, 40), kinds, True, PAGES[30:31])
    assert refusal.reason.name == "TDX_MEASUREMENT_LOST"
    # what was measured until then can still be run
    assert len(host.finalize()) == 48


def test_nothing_is_read_where_there_is_nothing_to_resume(host: Any) -> None:
    in_an_order_of_its_own(host)
    read = Reader()
    assert measurement.resume(host.td, read) == ""
    host.finalize()
    assert restarted(host, read) == ""
    assert read.asked == []
