"""Long jobs over gRPC, of a server in this process: a test can hold a job between two steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.longrunning import operations_pb2
from google.rpc import code_pb2
from guests import Guest

from rmem.v1 import host_pb2
from rmem_client import Cancelled, Client, Exhausted, InvalidArgument, NotFound
from rmem_client.operation import Job, job_of
from rmemd.access.callers import Access, Caller
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.migrate import BATCH_PAGES, Report
from rmemd.rpc import jobs as jobs_module
from rmemd.rpc.dispatch import Front
from rmemd.rpc.jobs import FINISHED_MAX, RUNNING_MAX, Jobs
from rmemd.rpc.server import UNIX_OPTIONS, RpcServer, make_services

PATIENCE = 20.0
NPAGES = 4 * BATCH_PAGES
TENANT = "test-tenant"


class Gate:
    """Holds every passage of a step until it is let through; says when one has come."""

    def __init__(self, step: str) -> None:
        self.step = step
        self._arrived, self._through = threading.Semaphore(0), threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, step: str) -> None:
        if step == self.step and not self._open.is_set():
            self._arrived.release()
            assert self._through.acquire(timeout=PATIENCE)

    def arrived(self) -> None:
        assert self._arrived.acquire(timeout=PATIENCE), "nobody came to the step"

    def let_one(self) -> None:
        self._through.release()

    def open(self) -> None:
        self._open.set()
        for _ in range(RUNNING_MAX):
            self._through.release()


class Door:
    """Says that calls are whoever's the test says."""

    caller_now = Caller("", "admin")

    def caller(self, context: Any, sent: Any) -> Caller:
        return self.caller_now


@dataclass
class World:
    engine: Engine
    jobs: Jobs
    door: Door
    client: Client
    guest: Guest

    def gate(self, step: str = "migrate") -> Gate:
        gate = Gate(step)
        self.engine.core.hold = gate
        return gate

    def migrate(self) -> Job:
        return self.client.jobs.migrate(vm=self.guest.vm, gfns=[(self.guest.gfn, NPAGES)])

    def begun(self) -> tuple[Gate, Job]:
        """A migration that is held at its first batch."""
        gate = self.gate()
        job = self.migrate()
        gate.arrived()
        return gate, job


@pytest.fixture
def world(make_engine: Callable[..., Engine], tmp_path: Path) -> Iterator[World]:
    engine = make_engine(nframes=4 * NPAGES)
    jobs = Jobs(engine)
    door = Door()
    services = make_services(engine, Access(engine), "0", lambda tenant: 0, jobs)
    server = RpcServer(Front(engine, door), services, UNIX_OPTIONS, reflect=False)
    server.bind(f"unix:{tmp_path}/rmemd.sock")
    server.start()
    guest = Guest(engine, "tdx-relocate", npages=NPAGES)
    guest.fill(0, NPAGES, seed=1)
    with Client(tmp_path) as client:
        yield World(engine, jobs, door, client, guest)
        held = engine.core.hold
        if isinstance(held, Gate):
            held.open()
        jobs.close(PATIENCE)
    server.stop(1.0)


def test_a_job_does_what_the_call_does(world: World) -> None:
    before = world.guest.pfns(0, NPAGES)
    job = world.client.jobs.wait(world.migrate().name, PATIENCE)
    assert (job.done, job.kind, job.error) == (True, "migrate", None)
    progress = job.progress
    assert (progress.done_pages, progress.total_pages, progress.moved) == (NPAGES, NPAGES, NPAGES)
    reply = job.result()
    assert isinstance(reply, host_pb2.MigrateResponse)
    assert reply.report.moved == NPAGES
    assert not np.intersect1d(before, world.guest.pfns(0, NPAGES)).size
    assert world.guest.holds(0, NPAGES, seed=1)
    assert check(world.engine.core) == []


def test_compaction_and_offlining_are_jobs_too(world: World) -> None:
    compacted = world.client.jobs.wait(world.client.jobs.compact(0).name, PATIENCE).result()
    assert isinstance(compacted, host_pb2.CompactResponse)
    start = int(world.guest.pfns(0)[0])
    offlined = world.client.jobs.wait(world.client.jobs.offline(start, 8).name, PATIENCE).result()
    assert isinstance(offlined, host_pb2.OfflineResponse)
    assert offlined.offline == 8
    assert world.guest.holds(0, NPAGES, seed=1)


def test_progress_grows_with_every_batch(world: World) -> None:
    gate, job = world.begun()
    seen = []
    for _ in range(NPAGES // BATCH_PAGES):
        seen.append(world.client.jobs.get(job.name).progress)
        gate.let_one()
        if len(seen) < NPAGES // BATCH_PAGES:
            gate.arrived()
    assert [told.done_pages for told in seen] == [i * BATCH_PAGES for i in range(len(seen))]
    assert [told.moved for told in seen] == [i * BATCH_PAGES for i in range(len(seen))]
    assert {told.total_pages for told in seen} == {NPAGES}
    assert world.client.jobs.wait(job.name, PATIENCE).progress.done_pages == NPAGES


def test_cancel_stops_between_two_batches_and_what_is_moved_stays(world: World) -> None:
    before = world.guest.pfns(0, NPAGES)
    gate, job = world.begun()
    world.client.jobs.cancel(job.name)
    assert world.client.jobs.get(job.name).progress.cancelling
    gate.open()
    over = world.client.jobs.wait(job.name, PATIENCE)
    assert over.done
    assert isinstance(over.error, Cancelled)
    assert (over.error.reason, over.error.progress_pages) == ("JOB_CANCELLED", BATCH_PAGES)
    # what it did before is a detail of the status: AIP-151 wants an error there, not a response
    assert isinstance(over.response, host_pb2.MigrateResponse)
    assert over.response.report.moved == BATCH_PAGES
    moved = world.guest.pfns(0, NPAGES) != before
    assert int(moved.sum()) == BATCH_PAGES
    assert world.guest.holds(0, NPAGES, seed=1)
    assert check(world.engine.core) == []
    with pytest.raises(Cancelled):
        over.result()


def test_cancelled_is_the_standards_error(world: World) -> None:
    gate, job = world.begun()
    world.client.jobs.cancel(job.name)
    gate.open()
    world.client.jobs.wait(job.name, PATIENCE)
    stub = world.client.jobs._stub
    operation = stub.GetOperation(operations_pb2.GetOperationRequest(name=job.name))
    assert operation.WhichOneof("result") == "error"
    assert operation.error.code == code_pb2.CANCELLED


def test_a_job_that_waits_for_another_call_can_be_cancelled(world: World) -> None:
    """It waits for a range; nothing changes there, and yet it stops at once."""
    gate = world.gate()
    other = threading.Thread(target=lambda: world.engine.migrate(world.guest.pfns(0, 8)))
    other.start()
    gate.arrived()
    waits = world.engine.core.waits
    waiting = threading.Event()
    begun = waits.waiting

    def told(*args: Any) -> Any:
        waiting.set()
        return begun(*args)

    waits.waiting = told  # type: ignore[method-assign]
    job = world.migrate()
    assert waiting.wait(PATIENCE)
    (edge,) = world.client.host.wait_graph().edges
    assert (edge.waiter, edge.why) == (job.name, "range in progress")
    world.client.jobs.cancel(job.name)
    over = world.client.jobs.wait(job.name, PATIENCE)
    assert isinstance(over.error, Cancelled)
    assert over.progress.done_pages == 0
    gate.open()
    other.join(PATIENCE)


def test_cancelling_what_is_over_changes_nothing(world: World) -> None:
    job = world.client.jobs.wait(world.migrate().name, PATIENCE)
    world.client.jobs.cancel(job.name)
    assert world.client.jobs.get(job.name) == job


def test_wait_returns_when_the_job_is_over_and_at_the_latest_in_time(world: World) -> None:
    gate, job = world.begun()
    assert not world.client.jobs.wait(job.name, 0.0).done
    assert not world.client.jobs.wait(job.name, 0.05).done
    over: list[Job] = []
    waiter = threading.Thread(target=lambda: over.append(world.client.jobs.wait(job.name)))
    waiter.start()
    gate.open()
    waiter.join(PATIENCE)
    assert over[0].done


def test_a_waiter_that_gives_up_frees_its_place(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "WAITS_MAX", 1)
    gate, job = world.begun()
    in_place, ended = threading.Event(), threading.Event()
    wait = world.jobs.wait

    def told(job: Any, seconds: float | None, given_up: Callable[[], bool]) -> None:
        try:
            # asked once the place is taken
            wait(job, seconds, lambda: in_place.set() or given_up())  # type: ignore[func-returns-value]
        finally:
            ended.set()

    monkeypatch.setattr(world.jobs, "wait", told)
    request = operations_pb2.WaitOperationRequest(name=job.name)
    first = world.client.jobs._stub.WaitOperation.future(request)
    assert in_place.wait(PATIENCE)
    with pytest.raises(Exhausted):
        world.client.jobs.wait(job.name, 1.0)
    ended.clear()
    first.cancel()
    assert ended.wait(PATIENCE)
    assert not world.client.jobs.wait(job.name, 0.0).done
    assert not world.client.jobs.wait(job.name, 0.01).done
    gate.open()


def test_errors_are_those_of_the_call(world: World) -> None:
    job = world.client.jobs.wait(world.client.jobs.compact(7).name, PATIENCE)
    assert isinstance(job.error, InvalidArgument)
    assert (job.error.reason, job.error.field, job.response) == ("BAD_NODE", "node", None)
    with pytest.raises(InvalidArgument):
        job.result()


def test_what_has_no_name_is_internal_and_says_where_to_look(world: World) -> None:
    job = world.jobs.start("migrate", "", lambda report, who: 1 / 0)  # type: ignore[arg-type,return-value]
    over = world.client.jobs.wait(job.name, PATIENCE)
    assert over.error is not None
    assert (over.error.reason, over.error.correlation_id) == ("INTERNAL", job.name)
    assert "division" not in str(over.error)


def test_too_many_jobs_are_refused(world: World) -> None:
    gate, _ = world.begun()
    for _ in range(RUNNING_MAX - 1):
        world.client.jobs.migrate(vm=world.guest.vm, gfns=[(world.guest.gfn, 1)])
    with pytest.raises(Exhausted) as refused:
        world.migrate()
    assert refused.value.reason == "TOO_MANY"
    gate.open()
    for job in world.client.jobs.list():
        assert world.client.jobs.wait(job.name, PATIENCE).done
    assert world.client.jobs.wait(world.migrate().name, PATIENCE).done


def test_the_oldest_results_go_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = host_pb2.MigrateResponse()

    def one() -> str:
        job = world.jobs.start("migrate", "", lambda report, who: reply)
        world.jobs.wait(job, PATIENCE, lambda: False)
        return job.name

    names = [one() for _ in range(FINISHED_MAX + 3)]
    with pytest.raises(NotFound):
        world.client.jobs.get(names[2])
    assert [job.name for job in world.client.jobs.list()] == names[3:]
    # and by their size: all but what fits
    monkeypatch.setattr(jobs_module, "FINISHED_BYTES_MAX", 1000)
    last = one()
    kept = world.client.jobs.list()
    assert kept[-1].name == last
    assert 1 <= len(kept) < 20


def test_pages_of_the_list(world: World) -> None:
    names = [world.client.jobs.wait(world.client.jobs.compact().name).name for _ in range(5)]
    stub = world.client.jobs._stub
    got, token, replies = [], "", 0
    while token or not replies:
        request = operations_pb2.ListOperationsRequest(page_size=2, page_token=token)
        reply = stub.ListOperations(request)
        got += [operation.name for operation in reply.operations]
        token, replies = reply.next_page_token, replies + 1
    assert (got, replies) == (names, 3)
    gate, running = world.begun()
    assert [job.name for job in world.client.jobs.list(done=False)] == [running.name]
    assert [job.name for job in world.client.jobs.list(done=True)] == names
    gate.open()
    for bad in ({"filter": "kind=compact"}, {"page_token": "x"}, {"page_size": -1}, {"name": "x"}):
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListOperations(operations_pb2.ListOperationsRequest(**bad))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_large_report_goes_alone(world: World) -> None:
    text = "x" * (600 << 10)
    for _ in range(3):
        run = host_pb2.MoveRun(refusal={"reason": text})
        reply = host_pb2.MigrateResponse(report=host_pb2.MoveReport(runs=[run]))
        job = world.jobs.start("migrate", "", lambda report, who, reply=reply: reply)  # type: ignore[misc]
        world.jobs.wait(job, PATIENCE, lambda: False)
    first = world.client.jobs._stub.ListOperations(operations_pb2.ListOperationsRequest())
    assert len(first.operations) == 1
    assert len(world.client.jobs.list()) == 3


def test_delete_forgets_the_result_and_lets_the_job_run(world: World) -> None:
    gate, job = world.begun()
    world.client.jobs.delete(job.name)
    with pytest.raises(NotFound):
        world.client.jobs.get(job.name)
    thread = next(iter(world.jobs._threads.values()))
    gate.open()
    thread.join(PATIENCE)
    assert world.guest.holds(0, NPAGES, seed=1)
    assert world.client.jobs.list() == []


@pytest.mark.parametrize(
    "name", ["", "operations/", "operations/9", "operations/x", "1", "operations/1/2"]
)
def test_what_is_no_operation(world: World, name: str) -> None:
    world.client.jobs.wait(world.client.jobs.compact().name, PATIENCE)
    with pytest.raises(NotFound) as refused:
        world.client.jobs.get(name)
    assert refused.value.reason == "NO_SUCH_OPERATION"


def test_another_tenants_jobs_do_not_exist(world: World) -> None:
    job = world.client.jobs.wait(world.client.jobs.compact().name, PATIENCE)
    with pytest.raises(NotFound) as absent:
        world.client.jobs.get("operations/99")
    world.door.caller_now = Caller(TENANT, "host")
    assert world.client.jobs.list() == []
    for call in (world.client.jobs.get, world.client.jobs.wait, world.client.jobs.cancel,
                 world.client.jobs.delete):  # fmt: skip
        with pytest.raises(NotFound) as refused:
            call(job.name)
        told, expected = refused.value.as_dict(), absent.value.as_dict()
        assert told.pop("message") == expected.pop("message").replace("operations/99", job.name)
        assert told.pop("correlation_id") != expected.pop("correlation_id")
        assert told == expected
    world.door.caller_now = Caller("another", "admin")
    assert world.client.jobs.get(job.name) == job


def test_a_job_is_its_starters(world: World) -> None:
    world.door.caller_now = Caller(TENANT, "admin")
    job = world.client.jobs.wait(world.client.jobs.compact().name, PATIENCE)
    assert job.progress.tenant == TENANT
    world.door.caller_now = Caller(TENANT, "host")
    assert world.client.jobs.get(job.name) == job


def test_the_end_of_the_daemon_cancels_what_runs(world: World) -> None:
    gate, job = world.begun()
    closing = threading.Thread(target=lambda: world.jobs.close(PATIENCE))
    closing.start()
    assert world.jobs._known[1].asked_to_stop.wait(PATIENCE)
    gate.open()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert isinstance(world.client.jobs.get(job.name).error, Cancelled)
    with pytest.raises(Cancelled):
        world.migrate()


def test_a_report_says_what_is_left_of_a_stopped_job(world: World) -> None:
    """The engine's own part, without threads: asked before every batch, and stops for good."""
    asked = 0

    def after_two() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    report = Report(cancelled=after_two)
    world.engine.migrate(world.guest.pfns(0, NPAGES), report=report)
    assert report.stopped
    assert report.done == sum(moved.src.size for moved in report.moves) < NPAGES
    assert report.done % BATCH_PAGES == 0
    assert check(world.engine.core) == []


def test_an_operation_without_a_result_is_not_over() -> None:
    job = job_of(operations_pb2.Operation(name="operations/1"))
    assert not job.done
    with pytest.raises(RuntimeError, match="still runs"):
        job.result()
