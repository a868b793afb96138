"""Checks of a running daemon's state, and faults and delays put into it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable

import pytest
from daemons import Daemon, eventually, run_cli

from rmem.v1 import host_pb2, session_pb2
from rmem_client import Client, RmemError, vcpus
from rmemd.daemon.app import Daemon as InProcess

PAGE = 4096
DAEMONS = Callable[..., Daemon]


def guest(client: Client, consumer: str = "tdx-today", pages: int = 64) -> int:
    """Make a VM that can fault pages in; return its handle."""
    vm = client.vms.create(consumer)
    file = client.files.create(vm, pages * PAGE)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=pages * PAGE, file=file)
    client.vcpus.create(vm, 0)
    client.vms.finalize(vm)
    return vm


# --- checks --------------------------------------------------------------------------------------
def test_all_invariants_hold_in_a_daemon_at_work(daemon: Daemon) -> None:
    client = daemon.client()
    vm = guest(client)
    client.vms.prefault(vm, 0, 8 * PAGE)
    reply = client.host.check()
    assert not reply.violations
    assert reply.revision == client.last_revision
    assert [one.invariant for one in reply.checked] == [f"I{n}" for n in range(1, 26)]
    assert all(one.meaning for one in reply.checked)
    assert {one.invariant: one.status for one in reply.checked}.items() >= {
        ("I1", host_pb2.INVARIANT_STATUS_CHECKED), ("I18", host_pb2.INVARIANT_STATUS_CHECKED),
        ("I24", host_pb2.INVARIANT_STATUS_SAMPLED), ("I8", host_pb2.INVARIANT_STATUS_UNWATCHED),
    }  # fmt: skip
    assert 0 < reply.held_seconds < 60
    done = run_cli(daemon, "host", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("I1, I2, I3, ")
    assert f"hold at revision {reply.revision}" in done.stdout


def test_a_broken_state_is_told_through_the_api(rmemd_in_process: InProcess) -> None:
    core = rmemd_in_process.engine.core
    with Client(rmemd_in_process.settings.socket_dir) as client:
        assert not client.host.check().violations
        with core.tx("break") as tx:
            tx.fill(core.host.pins, 5, 1, 1)
        found = {one.invariant: one.text for one in client.host.check().violations}
        assert found["I3"].startswith("page 0x5 is free with")
        with core.tx("mend") as tx:
            tx.fill(core.host.pins, 5, 1, 0)
        assert not client.host.check().violations


def test_only_an_admin_is_told(daemon: Daemon) -> None:
    client = daemon.client()
    vm = guest(client)
    opened = daemon.rpc().call("OpenSession", lease_seconds=60).reply
    mine = [("rmem-token", opened.token)]
    ticket = (
        daemon.rpc()
        .call("CreateTicket", metadata=mine, role=session_pb2.ROLE_GUEST, vm=vm)
        .reply.ticket
    )
    session = daemon.rpc().call("OpenSession", lease_seconds=60, ticket=ticket).reply
    for name in ("CheckHost", "ListFaultPoints"):
        answer = daemon.rpc().call(name, metadata=[("rmem-token", session.token)])
        assert answer.reason == "ROLE_DENIED", name


# --- faults under the seed -----------------------------------------------------------------------
def faults(daemon: Daemon) -> list[tuple[int, str]]:
    """Fault 60 pages in, one call each, under a rule of chance; return which were refused, why."""
    client = daemon.client()
    vm = guest(client)
    client.host.add_fault("map", "boom", vm=vm, times=10_000, probability=0.3)
    refused = []
    for page in range(60):
        try:
            client.vms.prefault(vm, page * PAGE, PAGE)
        except RmemError as error:
            refused.append((page, error.reason))
    (rule,) = client.host.list_faults().rules
    assert (rule.passages, rule.hits) == (60, len(refused))
    assert not client.host.check().violations
    return refused


def test_the_same_seed_and_requests_meet_the_same_faults(daemons: DAEMONS) -> None:
    first, again, other = (
        faults(daemons("--seed", seed)) for seed in ("7", "7", "8")
    )  # fmt: skip
    assert first == again
    assert first != other
    assert 5 < len(first) < 40
    assert {reason for _, reason in first} == {"PLUGIN_RAISED"}


# --- delays --------------------------------------------------------------------------------------
def test_a_delayed_operation_keeps_nobody_else_waiting(daemon: Daemon) -> None:
    client, runner = daemon.client(), daemon.client()
    vm = guest(client)
    client.vcpus.set_programme(vm, 0, [vcpus.accept(0, PAGE), vcpus.halt()])
    client.host.add_fault("step/guest", delay_ms=60_000, vm=vm, times=2)
    ended = threading.Event()

    def run() -> None:
        with contextlib.suppress(RmemError):
            runner.vcpus.run(vm, 0)
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: [rule.hits for rule in client.host.list_faults().rules] == [1])
    # others are served, the same VM's pages too
    client.vms.prefault(vm, 8 * PAGE, PAGE)
    client.vms.create("null")
    assert not client.host.check().violations
    assert not ended.is_set()
    # and the end does not wait for it
    daemon.stop()
    thread.join()


def test_a_delay_takes_its_time(daemon: Daemon) -> None:
    client = daemon.client()
    vm = guest(client)
    client.host.add_fault("step/fault-looked-up", delay_ms=300, vm=vm)
    begun = time.monotonic()
    client.vms.prefault(vm, 0, PAGE)
    assert time.monotonic() - begun >= 0.3
    assert not client.host.list_faults().rules


# --- rmemctl -------------------------------------------------------------------------------------
def test_rmemctl_adds_lists_and_is_refused(daemon: Daemon) -> None:
    client = daemon.client()
    vm = guest(client)
    chance = ("--nth", "2", "--times", "3", "--probability", "0.5", "--vm", str(vm))
    added = run_cli(daemon, "fault", "add", "map", "--error", "boom", *chance)
    assert added.stdout == "rule/1\n"
    client.vms.prefault(vm, 0, PAGE)
    (rule,) = json.loads(run_cli(daemon, "-o", "json", "fault", "list").stdout)["rules"]
    assert {name: rule[name] for name in ("passages", "hits", "probability", "times")} == {
        "passages": 1, "hits": 0, "probability": 0.5, "times": 3,
    }  # fmt: skip
    refused = run_cli(daemon, "fault", "add", "map", "--delay-ms", "5")
    assert refused.returncode != 0
    assert "POINT_NOT_A_STEP" in refused.stderr
    assert "step/migrate" in refused.stderr
    points = run_cli(daemon, "fault", "points").stdout
    for point in ("lost_race  ", "step/migrate  ", "TDH_MEM_PAGE_AUG  "):
        assert f"\n{point}" in points


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"probability": -1.0}, "rule.probability"),
        ({"probability": float("nan")}, "rule.probability"),
        ({"delay_ms": 5}, "rule.error"),
        ({"delay_ms": -5}, "rule.delay_ms"),
        ({"point": "step/guest"}, "rule.error"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_by_field(
    daemon: Daemon, fields: dict[str, float | str], field: str
) -> None:
    rule = host_pb2.FaultRule(**{"point": "map", "error": "boom", **fields})
    answer = daemon.rpc().call("AddFaultRule", host_pb2.AddFaultRuleRequest(rule=rule))
    assert (answer.reason, answer.refusal.field) == ("BAD_REQUEST", field)
