"""Long jobs: what runs on its own thread, and what is kept of it when it is over.

Owns the threads, the cancelling and the results. A job is a call of the engine that moves pages;
its report grows while it runs and is its progress. Nothing here looks again and again: who waits
for a job is woken by it. Results are bounded in number and in bytes, the oldest go first. A job is
a note from its start on, so that a daemon which is started again has the results; one that ran when
the daemon died has ended, and says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from google.longrunning import operations_pb2
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from msgspec import Struct, field

from rmem.v1 import job_pb2
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.migrate import Outcome, Report
from rmemd.errors import (
    DAEMON_RESTARTED,
    JOB_CANCELLED,
    NO_SUCH_OPERATION,
    TOO_MANY,
    RmemError,
)
from rmemd.rpc.dispatch import name_error
from rmemd.rpc.replies import CallKey
from rmemd.rpc.status import status_of

PREFIX = "operations/"
# each is a thread that competes for the engine's lock
RUNNING_MAX = 4
FINISHED_MAX = 256
# a report of many runs is up to 4 MiB
FINISHED_BYTES_MAX = 64 << 20
# each occupies a worker of the server, as a watch does
WAITS_MAX = 16

# the kinds of notes: by number; and the last number, which is never given again
JOBS, LAST_JOB = "jobs", "last job"

log = structlog.get_logger("rmemd.jobs")

Work = Callable[[Report, str], Message]


class KeptJob(Struct, frozen=True):
    """A job as a note: what it is, by which call it was started, and its operation at its end."""

    kind: str
    tenant: str
    call: CallKey | None
    finished: bytes = b""


class Job(Struct, eq=False):
    """A long job: its report while it runs, its operation when it is over."""

    number: int
    kind: str
    tenant: str
    call: CallKey | None = None
    asked_to_stop: threading.Event = field(default_factory=threading.Event)
    report: Report = field(default_factory=Report)
    finished: operations_pb2.Operation | None = None

    def __post_init__(self) -> None:
        self.report.cancelled = self.asked_to_stop.is_set

    @property
    def name(self) -> str:
        """Return its operation's name."""
        return f"{PREFIX}{self.number}"

    def operation(self) -> operations_pb2.Operation:
        """Return it as the standard's message."""
        if self.finished is not None:
            return self.finished
        return operations_pb2.Operation(name=self.name, metadata=_packed(self.progress()))

    def progress(self) -> job_pb2.JobProgress:
        """Return how far it has come."""
        report = self.report
        not_moved = (Outcome.UNMOVABLE, Outcome.BUSY, Outcome.FAILED)
        return job_pb2.JobProgress(
            kind=self.kind, done_pages=report.done, total_pages=report.total,
            moved=report.count(Outcome.MOVED), refused=sum(map(report.count, not_moved)),
            cancelling=self.asked_to_stop.is_set(), tenant=self.tenant,
        )  # fmt: skip

    def end(self, response: Message | None, error: Status | None) -> None:
        """Keep what came of it; the report, which may be large, is let go."""
        over = operations_pb2.Operation(
            name=self.name, metadata=_packed(self.progress()), done=True
        )
        if error is not None:
            over.error.CopyFrom(error)
        elif response is not None:
            over.response.Pack(response)
        self.finished = over
        self.report = Report()

    def note(self) -> KeptJob:
        """Return it as a note."""
        over = b"" if self.finished is None else self.finished.SerializeToString()
        return KeptJob(self.kind, self.tenant, self.call, over)


class Jobs:
    """The jobs of a daemon. Safe from any thread.

    The engine's lock, which notes take, may be asked for under the lock of these, never the other
    way round.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._count = 0
        self._known: dict[int, Job] = {}
        self._threads: dict[Job, threading.Thread] = {}
        self._waits = 0
        self._closing = False
        self._notes = engine.core.notes
        self._take_over()

    def _take_over(self) -> None:
        """Have the jobs of the daemon before this one; what ran has ended with it."""
        self._count = self._notes.get(LAST_JOB, "", 0)
        for number, kept in self._notes.items(JOBS):
            job = self._known[number] = Job(number, kept.kind, kept.tenant, kept.call)
            if kept.finished:
                job.finished = operations_pb2.Operation.FromString(kept.finished)
            else:
                refusal = DAEMON_RESTARTED(f"{job.name} ran when the daemon ended", where=job.kind)
                job.end(None, status_of(refusal, self._engine.revision, job.name))
                self._notes.set(JOBS, number, job.note())

    def start(self, kind: str, tenant: str, work: Work, call: CallKey | None = None) -> Job:
        """Run ``work(report, name)`` on a thread of its own; its message is the response.

        A repeat of the ``call`` that started one, before the daemon died, gets that one.

        Raises:
            Exhausted: TOO_MANY jobs run.
            Cancelled: JOB_CANCELLED; the daemon ends.
        """
        with self._changed:
            started = self._started_by(call)
            if started is not None:
                return started
            if self._closing:
                raise JOB_CANCELLED("the daemon ends and starts no jobs")
            if len(self._threads) >= RUNNING_MAX:
                raise TOO_MANY(f"{RUNNING_MAX} long jobs run", where="jobs")
            self._count += 1
            job = Job(self._count, kind, tenant, call)
            thread = threading.Thread(
                target=self._run, args=(job, work), name=job.name, daemon=True
            )
            self._known[job.number] = job
            self._threads[job] = thread
            self._notes.set(LAST_JOB, "", job.number, flush=False)
            self._notes.set(JOBS, job.number, job.note())
        thread.start()
        return job

    def _started_by(self, call: CallKey | None) -> Job | None:
        if call is None:
            return None
        return next((job for job in self._known.values() if job.call == call), None)

    def find(self, name: str, may_see: Callable[[str], bool]) -> Job:
        """Return a job by its operation's name, if its tenant may be seen.

        Raises:
            NotFound: NO_SUCH_OPERATION; of somebody else's it is the same.
        """
        number = name.removeprefix(PREFIX)
        with self._changed:
            known = number.isdecimal() and name.startswith(PREFIX) and len(number) < 20
            job = self._known.get(int(number)) if known else None
            if job is None or not may_see(job.tenant):
                raise NO_SUCH_OPERATION(f"no operation {name!r}", field="name")
            return job

    def all(self, may_see: Callable[[str], bool]) -> list[Job]:
        """Return the jobs of tenants that may be seen, oldest first."""
        with self._changed:
            return [job for job in self._known.values() if may_see(job.tenant)]

    def wait(self, job: Job, seconds: float, given_up: Callable[[], bool]) -> None:
        """Wait until a job is over, the time is, or the one who waits has gone.

        Raises:
            Exhausted: TOO_MANY wait.
        """
        with self._changed:
            if self._waits >= WAITS_MAX:
                raise TOO_MANY(f"{WAITS_MAX} calls wait for operations", where="jobs")
            self._waits += 1
            try:
                self._changed.wait_for(lambda: job.finished is not None or given_up(), seconds)
            finally:
                self._waits -= 1

    def look_again(self) -> None:
        """Have those who wait find out whether they still want to."""
        with self._changed:
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Ask a job to stop between two steps; one that is over stays as it is."""
        job.asked_to_stop.set()
        # it may wait for a range that is in progress elsewhere
        self._engine.core.wake()

    def delete(self, name: str, may_see: Callable[[str], bool]) -> None:
        """Forget a job and its result; one that runs goes on, and nobody will know.

        Raises:
            NotFound: as ``find``, unless a call that is repeated has deleted it.
        """

        def drop(core: Core) -> None:
            core.notes.drop(JOBS, number)

        if self._engine.core.calls.is_repeat():
            return
        number = self.find(name, may_see).number
        with self._changed:
            self._known.pop(number, None)
            self._engine.settle(drop)

    def close(self, seconds: float) -> None:
        """Cancel what runs and wait for it, up to ``seconds`` in all."""
        with self._changed:
            self._closing = True
            running = dict(self._threads)
        for job in running:
            self.cancel(job)
        end = time.monotonic() + seconds
        for thread in running.values():
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self, job: Job, work: Work) -> None:
        begun = time.perf_counter()
        with structlog.contextvars.bound_contextvars(correlation=job.name):
            response, error = self._outcome(job, work)
        with self._changed:
            job.end(response, error)
            # noted before anybody can be told
            if job.number in self._known:
                self._notes.set(JOBS, job.number, job.note())
            del self._threads[job]
            self._drop_oldest()
            self._changed.notify_all()
        took = round((time.perf_counter() - begun) * 1e3, 3)
        log.info("job", operation=job.name, kind=job.kind, ms=took, code=error.code if error else 0)

    def _outcome(self, job: Job, work: Work) -> tuple[Message | None, Status | None]:
        """Return the response, or the status that it ended with.

        Source: AIP-151: what was cancelled has an error of code CANCELLED. What it did before is
        the response that it has come to, as a detail of that status.
        """
        try:
            response = work(job.report, job.name)
        except Exception as error:
            refusal = name_error(error, job.name)
            return None, status_of(refusal, self._engine.answered, job.name)
        if not job.report.stopped:
            return response, None
        status = status_of(_cancelled(job), self._engine.answered, job.name)
        status.details.append(_packed(response))
        return None, status

    def _drop_oldest(self) -> None:
        sizes = {
            number: job.finished.ByteSize()
            for number, job in self._known.items()
            if job.finished is not None
        }
        kept, held = len(sizes), sum(sizes.values())
        for number, size in sizes.items():
            if kept <= FINISHED_MAX and held <= FINISHED_BYTES_MAX:
                return
            del self._known[number]
            self._notes.drop(JOBS, number)
            kept, held = kept - 1, held - size


def _cancelled(job: Job) -> RmemError:
    report = job.report
    return JOB_CANCELLED(
        f"{job.name} was cancelled; {report.done} of {report.total} pages were dealt with",
        progress_pages=report.done, where=job.kind,
    )  # fmt: skip


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
