"""A real daemon's histories: linearizable, and wrong replies in them are seen.

`make linearizability` does the same with more of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemon

from linearizability.campaign import PLANTED, Figure, line, run, smallest
from linearizability.checker import OPEN, Operation, check
from linearizability.models import MODELS
from linearizability.plants import every_plant

HISTORIES = 120
SEED = 1


@pytest.fixture(scope="module")
def figure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Figure]:
    """The campaign, smaller than `make linearizability` runs it."""
    folder: Path = tmp_path_factory.mktemp("linearizability")
    daemon = Daemon(folder / "daemon", "--host-memory", "64M").start()
    try:
        yield run(daemon, HISTORIES, SEED)
    finally:
        daemon.stop()


def test_every_history_is_decided_and_linearizable(figure: Figure) -> None:
    print(figure)
    assert not figure.refuted, "\n".join(figure.explanations())
    assert not figure.undecided
    assert len(figure.histories) == HISTORIES


def test_the_clients_do_overlap_and_use_both_doors(figure: Figure) -> None:
    calls = [op for one in figure.histories for ops in one.objects for op in ops]
    assert figure.overlap > 2, figure
    assert min(sum(op.door == door for op in calls) for door in ("grpc", "session")) > 500
    assert any(op.returned == OPEN for op in calls)
    called = {(op.call, op.door) for op in calls}
    assert {call for call, _ in called} == {
        "allocate", "punch", "read", "write", "stat", "close", "pin", "unpin", "pins", "convert",
        "create", "set", "get", "look", "destroy",
    }  # fmt: skip
    for both in ("read", "write", "pin", "unpin", "convert", "set"):
        assert {(both, "grpc"), (both, "session")} <= called


def test_what_the_models_refuse_was_refused_by_the_daemon(figure: Figure) -> None:
    calls = [op for one in figure.histories for ops in one.objects for op in ops]
    reasons = {op.result.reason for op in calls if hasattr(op.result, "reason")}
    assert reasons == {"NO_SUCH_FILE", "NO_SUCH_VM", "HOST_SIGBUS", "FOLIO_BUSY"}


def test_every_planted_wrong_reply_is_refuted_and_fewer_without_revisions(figure: Figure) -> None:
    assert figure.seen == PLANTED == len(figure.planted), "\n".join(figure.explanations())
    assert figure.seen_without < figure.seen
    assert {plant.how for plant in figure.planted} == {
        "stale read", "lost write", "wrong count", "moved revision",
    }  # fmt: skip


def test_all_the_wrong_replies_that_there_is_room_for_are_refuted(figure: Figure) -> None:
    """So that 20 of 20 is no luck."""
    for pool in every_plant(figure.histories).values():
        for plant in pool:
            assert plant.refuted(), (plant.how, line(plant.right), plant.wrong.result)


def test_a_refuted_history_is_told_up_to_the_reply_that_cannot_be_explained() -> None:
    def call(name: str, at: int, result: object) -> Operation:
        return Operation(0, name, (0, 1), at, at + 1, result)

    calls = [
        call("allocate", 0, 1), call("punch", 2, 1), call("punch", 4, 1), call("allocate", 6, 1)
    ]  # fmt: skip
    assert check(calls, *MODELS["halves"]).linearizable is False
    assert smallest("halves", calls) == calls[:3]
