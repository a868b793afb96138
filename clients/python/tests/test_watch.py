from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import pytest
from fake_daemon import FakeDaemon, Refuse

from rmem.v1 import types_pb2, watch_pb2
from rmem_client import Client, Event, Lost, OutOfRange, Progress


def replies() -> list[watch_pb2.WatchResponse]:
    event = watch_pb2.Event(revision=8, kind="vm_died", vm=3, operation="poison")
    event.fields["why"] = "poison"
    return [
        watch_pb2.WatchResponse(progress_revision=5),
        watch_pb2.WatchResponse(event=event),
        watch_pb2.WatchResponse(),  # a kind of message that this client does not know
        watch_pb2.WatchResponse(lost=2),
    ]


def test_items_are_typed(daemon: FakeDaemon, client: Client) -> None:
    daemon.answers["Watch"] = replies()
    with client.watch(start_revision=4, kinds=["vm_died"], vm=3) as watch:
        assert list(watch) == [
            Progress(5),
            Event(8, "vm_died", 3, "poison", {"why": "poison"}),
            Lost(2),
        ]
        assert watch.last_revision == 8
    request = daemon.requests[0]
    assert (request.start_revision, list(request.kinds), request.vm) == (4, ["vm_died"], 3)


def test_start_waits_and_loses_nothing(daemon: FakeDaemon, client: Client) -> None:
    daemon.answers["Watch"] = replies()
    with client.watch() as watch:
        assert watch.start() == 5
        assert watch.start() == 5
        assert next(watch) == Progress(5)


def test_close_from_another_thread_ends_it(daemon: FakeDaemon, client: Client) -> None:
    ended = threading.Event()

    def endless(request: object) -> Iterator[watch_pb2.WatchResponse]:
        yield watch_pb2.WatchResponse(progress_revision=1)
        ended.wait(20)

    daemon.answers["Watch"] = endless
    seen: list[object] = []
    watch = client.watch()
    reader = threading.Thread(target=lambda: seen.extend(watch))
    reader.start()
    watch.close()
    watch.close()
    reader.join(10)
    assert not reader.is_alive()
    ended.set()


def test_closing_the_client_ends_it(daemon: FakeDaemon) -> None:
    ended = threading.Event()

    def endless(request: object) -> Iterator[watch_pb2.WatchResponse]:
        yield watch_pb2.WatchResponse(progress_revision=1)
        ended.wait(20)

    daemon.answers["Watch"] = endless
    client = Client(daemon.socket_dir)
    watch = client.watch()
    watch.start()
    client.close()
    assert list(watch) == [Progress(1)]
    ended.set()


def test_refusal_is_typed(daemon: FakeDaemon, client: Client) -> None:
    refusal = types_pb2.Refusal(reason="REVISION_COMPACTED")
    daemon.answers["Watch"] = lambda request: Refuse(
        grpc.StatusCode.OUT_OF_RANGE, "revision 4 is gone", refusal
    )
    with pytest.raises(OutOfRange, match="is gone"):
        next(client.watch(start_revision=4))
