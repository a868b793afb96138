"""Calls and watches whose connection is lost, in both halves of the library.

``Half`` makes the same calls through either: a test says what is called, not how it is awaited.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_daemon import FakeDaemon, Refuse
from relay import Relay

import rmem_client.aio.connection
import rmem_client.connection
from rmem.v1 import host_pb2, types_pb2, vm_pb2, watch_pb2
from rmem_client import (
    Client,
    DaemonUnreachable,
    Event,
    Lost,
    NotFound,
    OutOfRange,
    Progress,
    Unavailable,
    aio,
)

ID = "rmem-request-id"
HOUR_S = 3600.0


class Half:
    """One half: ``run(make, use)`` gives ``use`` a client, and an ``all`` for its watches."""

    def __init__(self, name: str) -> None:
        self.name = name

    def call(self, socket_dir: Path, *calls: Callable[[Any], Any], **options: Any) -> list[Any]:
        """Make calls one after the other on one client; return what each returned."""
        if self.name == "sync":
            with Client(socket_dir, **options) as client:
                return [call(client) for call in calls]

        async def run() -> list[Any]:
            async with aio.Client(socket_dir, **options) as client:
                return [await call(client) for call in calls]

        return asyncio.run(run())

    def watch(self, socket_dir: Path, **options: Any) -> list[Any]:
        """Watch until the daemon ends the stream in order; return all items."""
        if self.name == "sync":
            with Client(socket_dir) as client, client.watch(**options) as watch:
                return list(watch)

        async def run() -> list[Any]:
            async with aio.Client(socket_dir) as client, client.watch(**options) as watch:
                return [item async for item in watch]

        return asyncio.run(run())


@pytest.fixture(params=["sync", "aio"])
def half(request: pytest.FixtureRequest) -> Half:
    return Half(request.param)


class Cuts:
    """An answer whose first times are lost with the connection."""

    def __init__(self, relay: Relay, reply: Any, times: int = 1) -> None:
        self._relay, self._reply, self._times = relay, reply, times

    def __call__(self, request: object) -> Any:
        if self._times:
            self._times -= 1
            self._relay.cut()
        return self._reply


CREATED = vm_pb2.CreateVmResponse(revision=7, vm=2)


# --- calls ---------------------------------------------------------------------------------------
def test_a_lost_call_is_sent_again_under_its_id(
    half: Half, daemon: FakeDaemon, relay: Relay, socket_dir: Path
) -> None:
    daemon.answers["CreateVm"] = Cuts(relay, CREATED, times=3)
    create = lambda client: client.vms.create("null", name="n")  # noqa: E731
    assert half.call(socket_dir / "relay", create, create) == [2, 2]
    assert len({request.SerializeToString() for request in daemon.requests}) == 1
    ids = [metadata[ID] for metadata in daemon.metadata]
    assert [ids.count(one) for one in dict.fromkeys(ids)] == [4, 1]
    assert all(uuid.UUID(one).version == 4 for one in ids)


def test_reads_are_sent_again_without_an_id(
    half: Half, daemon: FakeDaemon, relay: Relay, socket_dir: Path
) -> None:
    daemon.answers["GetHost"] = Cuts(relay, host_pb2.GetHostResponse(nframes=9))
    (reply,) = half.call(socket_dir / "relay", lambda client: client.host.get())
    assert reply.nframes == 9
    assert len(daemon.requests) == 2
    assert not any(ID in metadata for metadata in daemon.metadata)


def test_each_piece_of_a_split_request_has_its_own_id(half: Half, daemon: FakeDaemon) -> None:
    half.call(daemon.socket_dir, lambda client: client.vms.populate(1, 0, bytes(300 * 4096)))
    assert len({metadata[ID] for metadata in daemon.metadata}) == 3


def test_what_the_daemon_says_is_not_asked_again(half: Half, daemon: FakeDaemon) -> None:
    daemon.answers["CreateVm"] = Refuse(
        grpc.StatusCode.UNAVAILABLE, "later", types_pb2.Refusal(reason="INTERRUPTED")
    )
    with pytest.raises(Unavailable) as caught:
        half.call(daemon.socket_dir, lambda client: client.vms.create("null"))
    assert len(daemon.requests) == 1
    assert "connection was lost" not in str(caught.value)


def test_a_refusal_of_a_call_that_was_sent_again_says_so(
    half: Half, daemon: FakeDaemon, relay: Relay, socket_dir: Path
) -> None:
    gone = Refuse(grpc.StatusCode.NOT_FOUND, "no vm 3", types_pb2.Refusal(reason="NO_SUCH_VM"))
    daemon.answers["DestroyVm"] = Cuts(relay, gone)
    with pytest.raises(NotFound, match=r"NO_SUCH_VM.*connection was lost.*started anew"):
        half.call(socket_dir / "relay", lambda client: client.vms.destroy(3))


def test_reconnection_can_be_declined(
    half: Half, daemon: FakeDaemon, relay: Relay, socket_dir: Path
) -> None:
    daemon.answers["CreateVm"] = Cuts(relay, CREATED)
    with pytest.raises(DaemonUnreachable):
        half.call(socket_dir / "relay", lambda client: client.vms.create("null"), reconnect_s=0)
    assert len(daemon.requests) == 1


def test_without_any_daemon_a_call_fails_at_once(half: Half, socket_dir: Path) -> None:
    # with the limits at an hour, only the test's own would end a call that waits
    with pytest.raises(DaemonUnreachable, match="no such socket"):
        half.call(
            socket_dir,
            lambda client: client.vms.list(),
            deadline_s=HOUR_S,
            reconnect_s=HOUR_S,
        )


def test_who_has_a_token_has_met_its_daemon(
    half: Half, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.stop()
    daemon.answers["GetHost"] = host_pb2.GetHostResponse(nframes=9)
    for connection in (rmem_client.connection.Connection, rmem_client.aio.connection.Connection):
        come_back = connection.come_back

        def start_it(*args: Any, come_back: Any = come_back) -> Any:
            monkeypatch.undo()
            daemon.start()
            return come_back(*args)

        monkeypatch.setattr(connection, "come_back", start_it)
    (reply,) = half.call(daemon.socket_dir, lambda client: client.host.get(), token="t")
    assert reply.nframes == 9


def test_who_met_nobody_has_still_met_nobody(half: Half, socket_dir: Path) -> None:
    async def fail_async(client: Any) -> None:
        for _ in range(2):
            with pytest.raises(DaemonUnreachable):
                await client.host.get()

    def fail_twice(client: Any) -> Any:
        if half.name == "aio":
            return fail_async(client)
        for _ in range(2):
            with pytest.raises(DaemonUnreachable):
                client.host.get()
        return None

    half.call(socket_dir, fail_twice, deadline_s=HOUR_S, reconnect_s=HOUR_S)


def test_it_gives_up_when_its_time_is_over(half: Half, daemon: FakeDaemon) -> None:
    def stop_it(client: Any) -> Any:
        daemon.stop()
        return client.vms.list()

    for options in ({"reconnect_s": 0.1}, {"deadline_s": 0.1, "reconnect_s": HOUR_S}):
        daemon.start()
        with pytest.raises(DaemonUnreachable, match="is not known"):
            half.call(daemon.socket_dir, lambda client: client.vms.list(), stop_it, **options)


def test_closing_the_client_ends_the_waiting(daemon: FakeDaemon) -> None:
    client = Client(daemon.socket_dir, deadline_s=HOUR_S, reconnect_s=HOUR_S)
    client.vms.list()
    daemon.stop()
    raised: list[BaseException] = []
    waits = threading.Event()
    connected = client._connection._wait_connected
    client._connection._wait_connected = lambda end: (waits.set(), connected(end))

    def call() -> None:
        try:
            client.vms.list()
        except DaemonUnreachable as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert waits.wait(20)
    client.close()
    thread.join(20)
    assert not thread.is_alive()
    assert "was closed" in str(raised[0])


def test_closing_the_asyncio_client_ends_the_waiting(daemon: FakeDaemon) -> None:
    async def run() -> None:
        client = aio.Client(daemon.socket_dir, deadline_s=HOUR_S, reconnect_s=HOUR_S)
        await client.vms.list()
        daemon.stop()
        waits = asyncio.Event()
        connected = client._connection._wait_connected

        async def wait_connected(end: float) -> None:
            waits.set()
            await connected(end)

        client._connection._wait_connected = wait_connected  # type: ignore[method-assign]
        call = asyncio.create_task(client.vms.list())
        await asyncio.wait_for(waits.wait(), 20)
        await client.close()
        with pytest.raises(DaemonUnreachable, match="was closed"):
            await asyncio.wait_for(call, 20)

    asyncio.run(run())


def test_cancelling_a_task_cancels_its_call(daemon: FakeDaemon) -> None:
    arrived, over = threading.Event(), threading.Event()

    def slow(request: object) -> vm_pb2.ListVmsResponse:
        arrived.set()
        over.wait(20)
        return vm_pb2.ListVmsResponse()

    daemon.answers["ListVms"] = slow

    async def run() -> None:
        async with aio.Client(daemon.socket_dir) as client:
            call = asyncio.create_task(client.vms.list())
            await asyncio.to_thread(arrived.wait, 20)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            over.set()
            assert (await client.host.get()).nframes == 0

    asyncio.run(run())


def test_pauses_grow_and_differ() -> None:
    from rmem_client.pauses import PAUSE_MAX_S, pauses

    drawn = [[next(one) for _ in range(12)] for one in (pauses() for _ in range(200))]
    longest = [max(column) for column in zip(*drawn, strict=True)]
    assert all(0.02 * 2**n * 0.5 < at_most <= 0.02 * 2**n for n, at_most in enumerate(longest[:6]))
    assert 0.5 < longest[-1] <= PAUSE_MAX_S
    assert len({tuple(row) for row in drawn}) == 200


# --- tokens --------------------------------------------------------------------------------------
def test_every_call_carries_the_token(half: Half, daemon: FakeDaemon) -> None:
    numbers = iter(range(9))
    half.call(
        daemon.socket_dir,
        lambda client: client.host.get(),
        lambda client: client.vms.create("null"),
        token=lambda: f"t{next(numbers)}",
    )
    assert [metadata["rmem-token"] for metadata in daemon.metadata] == ["t0", "t1"]


def test_a_watch_carries_the_token(half: Half, daemon: FakeDaemon, monkeypatch: Any) -> None:
    monkeypatch.setenv("RMEMD_TOKEN", "secret")
    assert half.watch(daemon.socket_dir) == []
    assert daemon.metadata[0]["rmem-token"] == "secret"


# --- watches -------------------------------------------------------------------------------------
def event(revision: int, kind: str) -> watch_pb2.WatchResponse:
    return watch_pb2.WatchResponse(event=watch_pb2.Event(revision=revision, kind=kind))


def progress(revision: int) -> watch_pb2.WatchResponse:
    return watch_pb2.WatchResponse(progress_revision=revision)


class Streams:
    """What a daemon tells from a revision on; each stream but the last is cut where it says."""

    HISTORY = ((6, "a"), (8, "b"), (8, "c"), (8, "d"), (9, "e"), (9, "f"))

    def __init__(self, relay: Relay, *told: int) -> None:
        self._relay, self._told = relay, list(told)

    def __call__(self, request: watch_pb2.WatchRequest) -> Iterator[watch_pb2.WatchResponse]:
        start = request.start_revision or 5
        yield progress(start)
        news = [one for one in self.HISTORY if one[0] > start]
        told = self._told.pop(0) if self._told else None
        yield from (event(*one) for one in news[:told])
        if told is not None:
            self._relay.cut()
        yield progress(9)


@pytest.mark.parametrize("told", [(0, 0), (1, 1), (2, 1), (3, 2), (4, 1), (5, 0, 1), (6, 2)])
def test_a_watch_goes_on_and_tells_each_event_once(
    half: Half, daemon: FakeDaemon, relay: Relay, socket_dir: Path, told: tuple[int, ...]
) -> None:
    daemon.answers["Watch"] = Streams(relay, *told)
    items = half.watch(socket_dir / "relay", kinds=["x"], vm=3)
    events = [(item.revision, item.kind) for item in items if isinstance(item, Event)]
    assert events == list(Streams.HISTORY)
    assert [item for item in items if isinstance(item, Progress)] in (
        [Progress(5), Progress(9)],
        [Progress(9)],  # cut before it was read
    )
    assert len(daemon.requests) == len(told) + 1
    assert all((list(r.kinds), r.vm) == (["x"], 3) for r in daemon.requests)


def test_a_watch_that_cannot_go_on_says_so(
    half: Half, daemon: FakeDaemon, relay: Relay, socket_dir: Path
) -> None:
    gone = Refuse(
        grpc.StatusCode.OUT_OF_RANGE,
        "revision 4 is gone",
        types_pb2.Refusal(reason="REVISION_COMPACTED"),
    )
    daemon.answers["Watch"] = Cuts(relay, gone)
    with pytest.raises(OutOfRange, match=r"is gone.*connection was lost"):
        half.watch(socket_dir / "relay", start_revision=4)
    assert [request.start_revision for request in daemon.requests] == [4, 4]


def test_what_was_lost_is_told_by_a_resumed_watch_too(
    half: Half, daemon: FakeDaemon, relay: Relay, socket_dir: Path
) -> None:
    stream = [progress(4), watch_pb2.WatchResponse(lost=3), event(9, "e")]
    daemon.answers["Watch"] = Cuts(relay, stream)
    assert half.watch(socket_dir / "relay", start_revision=4) == [Lost(3), Event(9, "e")]


def test_a_watch_without_any_daemon_fails_at_once(half: Half, socket_dir: Path) -> None:
    with pytest.raises(DaemonUnreachable, match="no such socket"):
        half.watch(socket_dir)


def test_closing_an_asyncio_watch_ends_it(daemon: FakeDaemon) -> None:
    over = threading.Event()

    def endless(request: object) -> Iterator[watch_pb2.WatchResponse]:
        yield progress(1)
        over.wait(20)

    daemon.answers["Watch"] = endless

    async def run() -> None:
        async with aio.Client(daemon.socket_dir) as client:
            watch = client.watch()
            assert await watch.start() == 1
            seen = []

            async def read() -> None:
                seen.extend([item async for item in watch])

            reader = asyncio.create_task(read())
            await asyncio.sleep(0)  # the reader reads
            await watch.close()
            await watch.close()
            await asyncio.wait_for(reader, 20)
            assert seen == [Progress(1)]
        over.set()

    asyncio.run(run())
