"""A daemon that is killed under its clients: nothing acknowledged is lost, nothing is done twice.

`make crash` does the same more often.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemon

from . import plans
from .campaign import Figure, run
from .client import WEIGHTS, CrashClient
from .holdings import Wrong

KILLS, CLIENTS, SEED = 8, 4, 2


@pytest.fixture(scope="module")
def figure(tmp_path_factory: pytest.TempPathFactory) -> Figure:
    """The campaign, smaller than `make crash` runs it."""
    return run(tmp_path_factory.mktemp("crash") / "d", KILLS, SEED, CLIENTS)


def test_nothing_that_was_acknowledged_is_lost(figure: Figure) -> None:
    print(figure, *figure.failures, sep="\n")
    assert figure.failures == []
    assert figure.holds
    assert figure.kills.total() >= KILLS
    assert len(figure.serving) > KILLS // 2
    assert sum(one.checked for one in figure.reports) > 20 * KILLS * CLIENTS


def test_half_of_the_kills_are_at_moments_of_the_daemons_own(figure: Figure) -> None:
    planned = figure.kills.total() - figure.kills["at any time"]
    assert planned >= figure.kills["at any time"] - 1
    assert figure.operations.total() > KILLS * CLIENTS


def test_every_moment_has_its_turn_before_any_has_a_second() -> None:
    moments = plans.every_moment()
    drawn = [plan for plan in plans.draw(2 * len(moments) + 1, SEED) if plan is not None]
    assert sorted((plan.point, plan.when, plan.at_start) for plan in drawn) == sorted(moments)
    assert {point for point, _, _ in moments} == set(plans.POINTS)


# --- a client sees what is not as it was told ----------------------------------------------------
@pytest.fixture
def client(tmp_path: Path) -> Iterator[CrashClient]:
    daemon = Daemon(tmp_path / "d", "--host-memory", "256M").start()
    made = CrashClient(0, SEED, str(daemon.socket_dir))
    yield made
    made._client.close()
    made._admin.close()
    made._session.close()
    daemon.stop()


def _lose_bytes(client: CrashClient) -> None:
    client._session.write_shared(client._store.file, 5000, b"x")


def _lose_a_guests_page(client: CrashClient) -> None:
    guest = next(one for one in client._guests if any(one._seeds))
    page = next(i for i, seed in enumerate(guest._seeds) if seed is not None)
    guest._seeds[page] = guest._seeds[page] + 1  # type: ignore[operator]


def _pin_twice(client: CrashClient) -> None:
    client._session.pin(client._store.file, 0, 4096)


def _make_twice(client: CrashClient) -> None:
    client._client.vms.create("null")


def _lose_a_file(client: CrashClient) -> None:
    client._client.files.close(client._store.counted)


def _punch_twice(client: CrashClient) -> None:
    client._client.files.allocate(client._store.counted, 0, 4096)
    client._store._allocated.add(0)
    client._client.files.punch(client._store.counted, 0, 4096)


@pytest.mark.parametrize(
    "harm", [_lose_bytes, _lose_a_guests_page, _pin_twice, _make_twice, _lose_a_file, _punch_twice]
)
def test_a_client_sees_what_is_lost_or_done_twice(client: CrashClient, harm: object) -> None:
    for name in sorted(WEIGHTS):
        for _ in range(2):
            client._do(name)
    client.verify()
    harm(client)  # type: ignore[operator]
    with pytest.raises(Wrong):
        client.verify()
