"""Calls of gRPC whose daemon dies: every kind that changes something, between commit and reply.

``Dying`` copies what a kill -9 would leave at the moment when a call has been carried out and not
answered; the next daemon, made from that, is asked the same again.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import METHODS, Answer, Rpc
from google.protobuf.message_factory import GetMessageClass
from helpers import Clock
from keeping import Kept, kept_engine
from rpc_world import FRAMES, World

from rmemd.access.callers import UNIX, Access, policy_of
from rmemd.engine.engine import Engine
from rmemd.rpc.dispatch import Front
from rmemd.rpc.doors import REQUEST_ID, UnixDoor
from rmemd.rpc.jobs import Jobs
from rmemd.rpc.replies import KEPT_SECONDS, SECRET, Replies, Turn, mutates
from rmemd.rpc.server import UNIX_OPTIONS, RpcServer, make_services
from rmemd.units import PAGE_SIZE

LIFE = "5eaf00d5"
MUTATIONS = sorted(
    name for name, method in METHODS.items() if mutates(name) and not method.server_streaming
)
# done again on what the first left, as the kernel's own calls are that can be interrupted
AGAIN = frozenset({"Migrate", "Compact", "Offline", "PreFault"})
# what they change is the process, not its memory: plugins' code, fault rules, a recording
OF_THE_PROCESS = frozenset(
    {"LoadPlugins", "UnloadPlugin", "ReloadPlugin", "AddFaultRule", "RemoveFaultRule", "Upgrade",
     "StartTrace", "StopTrace", "DeleteTrace"}
)  # fmt: skip


class Daemon:
    """A daemon's gRPC door in this process."""

    def __init__(self, kept: Kept, directory: Path) -> None:
        directory.mkdir()
        self.kept = kept
        self.engine: Engine = kept_engine(kept, nframes=FRAMES, life=LIFE)
        self.clock = Clock()
        self.access = Access(self.engine, policy_of(False, os.getuid(), ()), self.clock)
        self.jobs = Jobs(self.engine)
        services = make_services(self.engine, self.access, "0", lambda tenant: 0, self.jobs)
        self.front = Front(self.engine, UnixDoor(self.access))
        self.server = RpcServer(self.front, services, UNIX_OPTIONS, reflect=False)
        self.server.bind(f"unix:{directory}/rmemd.sock")
        self.server.start()
        self.rpc = Rpc(directory / "rmemd.sock")

    def operation(self, verb: str, name: str) -> Answer:
        """Get, wait for or delete a job's operation."""
        method = METHODS[f"{verb}Operation"]
        return self.rpc.call(method.name, GetMessageClass(method.input_type)(name=name))

    def close(self) -> None:
        """End it."""
        self.rpc.close()
        self.jobs.close(20)
        self.server.stop(1)
        self.engine.close()
        self.kept.close()


class Dying:
    """Copies what is kept of a daemon when the next call has been carried out."""

    def __init__(self, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: dict[str, int] | None = None
        replied = Turn.replied

        def die(turn: Turn, reply: bytes) -> bytes:
            if self.left is None:
                self.left = daemon.kept.copied()
            return replied(turn, reply)

        monkeypatch.setattr(Turn, "replied", die)


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Any]:
    """Make daemons, each from what the one before left."""
    made: list[Daemon] = []

    def make(left: dict[str, int] | None = None) -> Daemon:
        made.append(Daemon(Kept(left), tmp_path / str(len(made))))
        return made[-1]

    yield make
    for one in made:
        one.close()


def same(name: str, first: Any, second: Any) -> bool:
    """Return whether two replies say the same, whatever the revision is by now."""
    for reply in (first, second):
        if "revision" in reply.DESCRIPTOR.fields_by_name:
            reply.revision = 0
        if f"SessionService/{name}" in SECRET:
            for field in ("token", "ticket"):
                if field in reply.DESCRIPTOR.fields_by_name:
                    reply.ClearField(field)
    return bool(first == second)


@pytest.mark.parametrize("name", [n for n in MUTATIONS if n not in OF_THE_PROCESS])
def test_what_was_carried_out_is_answered_and_not_done_again(
    daemons: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = daemons()
    world = World(before.rpc)
    request = world.valid(name)
    metadata = [(REQUEST_ID, str(uuid.uuid4())), *world.sent_with(name)]
    dying = Dying(before, monkeypatch)
    first: Answer = before.rpc.call(name, request, metadata=metadata)
    assert first.ok, first.message
    after = daemons(dying.left)
    for _ in range(2):
        revision = after.engine.revision
        second: Answer = after.rpc.call(name, request, metadata=metadata)
        assert second.ok, f"{second.code}: {second.message}"
        if name not in AGAIN and not name.startswith("Start"):
            assert same(name, first.reply, second.reply), (first.reply, second.reply)
            assert after.engine.revision == revision
    kept = [run for run, _ in after.engine.core.notes.items("results")]
    assert len(kept) == (f"SessionService/{name}" in SECRET and name == "OpenSession")


def test_an_answer_that_left_is_given_again_by_the_next_daemon(daemons: Any) -> None:
    before = daemons()
    metadata = [(REQUEST_ID, str(uuid.uuid4()))]
    refused = [(REQUEST_ID, str(uuid.uuid4()))]
    # what is refused now, and would not be any more
    early = {"vm": 1, "size_bytes": PAGE_SIZE, "metadata": refused}
    no = before.rpc.call("CreateFile", **early)
    assert no.reason == "NO_SUCH_VM"
    first = before.rpc.call("CreateVm", consumer="null", metadata=metadata)
    assert first.reply.vm == 1
    after = daemons(before.kept.copied())
    again = after.rpc.call("CreateVm", consumer="null", metadata=metadata)
    assert again.reply == first.reply
    no_again = after.rpc.call("CreateFile", **early)
    assert (no_again.code, no_again.message) == (no.code, no.message)
    other = after.rpc.call("CreateVm", consumer="gup", metadata=metadata)
    assert "REQUEST_ID_REUSED" in other.message
    assert len(after.engine.core.vms.all()) == 1


def test_an_answer_is_forgotten_with_its_time(daemons: Any) -> None:
    before = daemons()
    metadata = [(REQUEST_ID, str(uuid.uuid4()))]
    before.rpc.call("CreateVm", consumer="null", metadata=metadata)
    after = daemons(before.kept.copied())
    clock = Clock()
    core = after.engine.core
    store = Replies(clock, core=core)
    assert len(store) == len(core.notes.items("replies")) == 1
    clock.advance(KEPT_SECONDS + 1)

    class Context:
        def invocation_metadata(self) -> list[tuple[str, str]]:
            return [(REQUEST_ID, str(uuid.uuid4()))]

    turn = store.turn("", 0, "VmService/CreateVm", b"", Context())  # type: ignore[arg-type]
    assert isinstance(turn, Turn)
    assert core.notes.items("replies") == []


# --- sessions ------------------------------------------------------------------------------------
@pytest.mark.parametrize("by_ticket", [False, True])
def test_the_repeat_of_an_opening_has_the_same_session_and_a_token_that_works(
    daemons: Any, monkeypatch: pytest.MonkeyPatch, by_ticket: bool
) -> None:
    before = daemons()
    world = World(before.rpc)
    ticket = before.rpc.call(
        "CreateTicket", metadata=[("rmem-token", world.token)], role=2, vm=world.sw.vm
    ).reply.ticket
    request = {"lease_seconds": 60, **({"ticket": ticket} if by_ticket else {})}
    metadata = [(REQUEST_ID, str(uuid.uuid4()))]
    dying = Dying(before, monkeypatch)
    first = before.rpc.call("OpenSession", metadata=metadata, **request).reply
    after = daemons(dying.left)
    again = after.rpc.call("OpenSession", metadata=metadata, **request)
    assert again.ok, again.message
    opened = again.reply
    assert opened.session.session == first.session.session
    assert opened.token != first.token
    caller = after.access.caller(UNIX, "", opened.token)
    assert caller.session == first.session.session
    # the first token reached nobody, and a ticket is good once
    assert (
        "TOKEN_UNKNOWN" in after.rpc.call("WhoAmI", metadata=[("rmem-token", first.token)]).message
    )
    if by_ticket:
        other = after.rpc.call("OpenSession", metadata=[(REQUEST_ID, str(uuid.uuid4()))], **request)
        assert "TOKEN_UNKNOWN" in other.message


def test_tokens_tickets_and_leases_outlive_the_daemon(daemons: Any) -> None:
    before = daemons()
    world = World(before.rpc)
    mine = [("rmem-token", world.token)]
    ticket = before.rpc.call("CreateTicket", metadata=mine, role=2, vm=world.sw.vm).reply.ticket
    after = daemons(before.kept.copied())
    assert after.rpc.call("WhoAmI", metadata=mine).reply.session == world.session
    assert after.access.lease_of(world.session) == 3600
    assert after.access.due(0.0)[0] == []
    after.clock.advance(3600)
    assert world.session in after.access.due(3600.0)[0]
    opened = after.rpc.call("OpenSession", ticket=ticket).reply
    assert opened.session.parent == world.session
    closed = after.rpc.call("CloseSession", session=world.session)
    assert closed.ok
    last = daemons(after.kept.copied())
    assert "TOKEN_UNKNOWN" in last.rpc.call("WhoAmI", metadata=mine).message
    for kind in ("tokens", "tickets", "leases"):
        assert last.engine.core.notes.items(kind) == []


def test_no_secret_is_kept(daemons: Any) -> None:
    daemon = daemons()
    world = World(daemon.rpc)
    named = [("rmem-token", world.token), (REQUEST_ID, str(uuid.uuid4()))]
    ticket = daemon.rpc.call("CreateTicket", metadata=named, role=2, vm=world.sw.vm).reply.ticket
    opened = daemon.rpc.call("OpenSession", metadata=[(REQUEST_ID, str(uuid.uuid4()))]).reply
    journals = [fd for name, fd in daemon.kept.fds.items() if name.startswith("journal")]
    kept = b"".join(os.pread(fd, os.fstat(fd).st_size, 0) for fd in journals)
    assert world.session
    assert b"tokens" in kept
    for secret in (ticket, opened.token.encode(), world.token.encode()):
        assert secret not in kept
        assert secret.partition(b".")[2] not in kept or b"." not in secret


# --- long jobs -----------------------------------------------------------------------------------
def test_a_job_that_ran_has_ended_and_finished_ones_keep_their_result(daemons: Any) -> None:
    before = daemons()
    done = before.rpc.call("StartCompact").reply.name
    finished = before.operation("Wait", done).reply
    assert finished.done
    metadata = [(REQUEST_ID, str(uuid.uuid4()))]
    copied: list[dict[str, int]] = []
    before.engine.core.hold = lambda step: None
    before.jobs.start("migrate", f"uid:{os.getuid()}", lambda report, name: _copy(before, copied))
    before.jobs.close(20)
    after = daemons(copied[0])
    assert after.operation("Get", done).reply == finished
    ran = after.operation("Get", "operations/2").reply
    assert ran.done
    assert ran.error.code == 10, "ABORTED"
    assert "DAEMON_RESTARTED" in ran.error.message
    # numbers are never given again, even of what was deleted
    assert after.operation("Delete", "operations/2").ok
    last = daemons(after.kept.copied())
    assert last.rpc.call("StartCompact", metadata=metadata).reply.name == "operations/3"


def _copy(daemon: Daemon, copied: list[dict[str, int]]) -> Any:
    from rmem.v1 import host_pb2

    copied.append(daemon.kept.copied())
    return host_pb2.MigrateResponse()


def test_a_start_that_is_repeated_is_the_job_that_was_started(
    daemons: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = daemons()
    metadata = [(REQUEST_ID, str(uuid.uuid4()))]
    dying = Dying(before, monkeypatch)
    first = before.rpc.call("StartCompact", metadata=metadata).reply
    after = daemons(dying.left)
    assert after.rpc.call("StartCompact", metadata=metadata).reply.name == first.name
    assert len(after.rpc.call("ListOperations").reply.operations) == 1


# --- another daemon ------------------------------------------------------------------------------
def test_who_means_another_daemon_is_told(daemons: Any) -> None:
    daemon = daemons()
    for metadata in (
        [("rmem-daemon", "another")],
        [("rmem-token", "0123abcd." + "0" * 64)],
    ):
        answer = daemon.rpc.call("GetHost", metadata=metadata)
        assert "MEMORY_LOST" in answer.message
    assert daemon.rpc.call("GetHost", metadata=[("rmem-daemon", LIFE)]).ok


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ((), False),
        ((("traceparent", "00-1-1-00"),), False),
        ((("rmem-daemon", ""),), True),
        ((("rmem-daemon", LIFE),), False),
        (((REQUEST_ID, str(uuid.uuid4())),), True),
    ],
)
def test_who_asks_or_may_mean_this_daemon_is_told_which_it_is(
    daemons: Any, sent: tuple[tuple[str, str], ...], told: bool
) -> None:
    who = daemons().rpc.channel.unary_unary("/rmem.v1.SessionService/WhoAmI")
    _, call = who.with_call(b"", metadata=sent)
    said = [pair for pair in call.trailing_metadata() if pair[0] == "rmem-daemon"]
    assert said == ([("rmem-daemon", LIFE)] if told else [])
