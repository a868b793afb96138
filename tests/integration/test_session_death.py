"""Clients that die: everything that they held is released, and nobody else's is touched."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, eventually
from deaths.households import Bystander, Household, ledger
from session_clients import Clients
from session_world import NPAGES, PAGE, make_vm

from rmem_client import Client, Event, RmemError, Watch, vcpus
from rmem_client.errors import Busy

DEATHS = 100
RELEASED_SECONDS = 0.1


def fds(daemon: Daemon) -> Counter[str]:
    """Return the daemon's descriptors by what they are."""
    return Counter(name.split(":[")[0] for name in daemon.fds().values())


@pytest.fixture
def watch(daemon: Daemon) -> Iterator[Watch]:
    with daemon.client().watch(kinds=["session_closed"]) as opened:
        opened.start()
        yield opened


@pytest.fixture
def bystander(daemon: Daemon) -> Iterator[Bystander]:
    made = Bystander.make(daemon)
    with made.session:
        yield made


def wait_closed(watch: Watch, session: int) -> Event:
    """Wait for the event that says that a session is gone."""
    for item in watch:
        if isinstance(item, Event) and item.fields["session"] == str(session):
            return item
    raise AssertionError("the watch ended")


def test_a_hundred_deaths_in_random_states(
    daemon: Daemon,
    clients: Clients,
    watch: Watch,
    bystander: Bystander,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = ledger(daemon)
    # of gRPC's own there may be fewer in the end, since it opens and closes some as it likes
    fds_before = fds(daemon)
    took = []
    for seed in range(DEATHS):
        dice = random.Random(seed)
        household = Household(daemon, clients, dice)
        if dice.random() < 0.5:
            household.in_flight()
        for one in household.below:
            if dice.random() < 0.3:
                one.kill()
                wait_closed(watch, one.session)
        household.vmm.kill()
        dead = time.monotonic()
        wait_closed(watch, household.vmm.session)
        took.append(time.monotonic() - dead)
        household.rpc.close()
        assert ledger(daemon) == before, f"seed {seed}"
        for one in household.below:
            one.kill()
    # the sockets are closed by the time that everybody has read of the end
    assert eventually(lambda: not fds(daemon) - fds_before), fds(daemon) - fds_before
    bystander.require_untouched()
    inside = _inside(daemon, "pidfd") + _inside(daemon, "eof")
    with capsys.disabled():
        print(f"\n{DEATHS} deaths: released {sorted(took)[DEATHS // 2] * 1e3:.1f} ms (median), "
              f"{max(took) * 1e3:.1f} ms (max) after the pidfd event, as a watcher sees it; "
              f"{max(inside):.1f} ms (max) in the daemon")  # fmt: skip
    # a machine whose cores are busy elsewhere is late now and then, whoever it is that waits
    assert sorted(inside)[len(inside) * 95 // 100] < RELEASED_SECONDS * 1e3
    assert sorted(took)[DEATHS * 95 // 100] < RELEASED_SECONDS


def _inside(daemon: Daemon, why: str) -> list[float]:
    """Return the milliseconds from each end that the daemon noticed to its release."""
    lines = [line for line in daemon.log_lines if line["event"] == "session_closed"]
    return [line["ms"] for line in lines if line["why"] == why]


def test_a_child_that_has_the_socket_does_not_keep_it_alive(
    daemon: Daemon, clients: Clients, watch: Watch
) -> None:
    before = ledger(daemon)
    one = clients().open(daemon.socket_dir)
    _, file = make_vm(daemon.client(token=one.token))
    one.do("convert_file", file, 0, 4 * PAGE, private=False)
    one.do("pin", file, 0, 4 * PAGE)
    one.do("map", file)
    one.do("fork")
    one.kill()
    event = wait_closed(watch, one.session)
    assert event.fields["released_pages"] == "4"
    assert ledger(daemon) == before
    (line,) = [x for x in daemon.log_lines if x["event"] == "session_closed"]
    assert line["why"] == "pidfd", "the socket is still open in the child"


def test_a_socket_that_is_closed_ends_a_session_whose_process_lives(
    daemon: Daemon, clients: Clients, watch: Watch
) -> None:
    one = clients().open(daemon.socket_dir)
    _, file = make_vm(daemon.client(token=one.token))
    one.do("get", file, 0, 4 * PAGE)
    one.do("close")
    event = wait_closed(watch, one.session)
    assert event.fields["released_pages"] == "4"
    assert not daemon.client().vms.list().vms
    # the same process can come back
    again = clients().open(daemon.socket_dir)
    assert again.session > one.session
    again.kill()


def test_death_while_a_vcpu_runs(daemon: Daemon, clients: Clients, watch: Watch) -> None:
    """The VM goes with its session as soon as the vCPU, which would run for long, has left."""
    before = ledger(daemon)
    one = clients().open(daemon.socket_dir)
    client = daemon.client(token=one.token)
    vm, _ = make_vm(client)
    for_ever = [vcpus.touch(0, NPAGES * PAGE, private=True), vcpus.loop(0, 1 << 30)]
    client.vcpus.set_programme(vm, 0, for_ever)
    running = threading.Thread(target=_run, args=(client, vm))
    running.start()
    # it is inside the guest
    assert eventually(lambda: _is_running(client, vm, for_ever))
    one.kill()
    wait_closed(watch, one.session)
    running.join(30)
    assert not running.is_alive()
    assert ledger(daemon) == before


def _is_running(client: Client, vm: int, programme: list[Any]) -> bool:
    try:
        client.vcpus.set_programme(vm, 0, programme)
    except Busy:
        return True
    return False


def _run(client: Client, vm: int) -> None:
    with contextlib.suppress(RmemError):
        client.vcpus.run(vm, 0)


def test_death_while_its_own_call_waits_for_a_page(
    daemon: Daemon, clients: Clients, watch: Watch
) -> None:
    """A session whose thread is inside a long operation is released at once all the same."""
    before = ledger(daemon)
    vmm, handler = (clients().open(daemon.socket_dir) for _ in range(2))
    _, file = make_vm(daemon.client(token=vmm.token))
    vmm.do("convert_file", file, 0, 8 * PAGE, private=False)
    vmm.do("pin", file, 4 * PAGE, PAGE)
    handler.do("register_faults", file, 0, 4 * PAGE)
    vmm.begin("read_shared", file, 0, 1)
    assert handler.do("notice")["kind"] == "fault"
    vmm.kill()
    wait_closed(watch, vmm.session)
    handler.kill()
    wait_closed(watch, handler.session)
    assert ledger(daemon) == before
    assert eventually(lambda: not [t for t in _threads(daemon) if t in ("session", "release")])


def _threads(daemon: Daemon) -> list[str]:
    tasks = Path(f"/proc/{daemon.process.pid}/task")
    return [(task / "comm").read_text().strip() for task in tasks.iterdir()]
