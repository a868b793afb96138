"""Calls whose connection is lost, against real daemons: done once, answered, or refused."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from relay import Relay

from rmem.v1 import vcpu_pb2, vcpu_pb2_grpc, vm_pb2, vm_pb2_grpc
from rmem_client import Client, Event, InvalidArgument, MemoryLost, NotFound, aio, vcpus
from rmem_client.daemon_process import DaemonProcess

PATIENCE_S = 30
HOUR_S = 3600.0


@pytest.fixture
def real() -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(["--host-memory=64M"])
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture
def cuttable(real: DaemonProcess, socket_dir: Path) -> Iterator[Relay]:
    relay = Relay(socket_dir / "rmemd.sock", real.socket_dir / "rmemd.sock")
    yield relay
    relay.close()


class InThread:
    """A call on a thread of its own; ``result`` waits for it."""

    def __init__(self, function: Any, *arguments: Any, **keywords: Any) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(function, *arguments, **keywords)
        self._pool.shutdown(wait=False)

    def result(self) -> Any:
        return self._future.result(PATIENCE_S)


def wait_for(watch: Any, kind: str) -> Event:
    """Read a watch up to an event: what made it has been carried out."""
    return next(item for item in watch if isinstance(item, Event) and item.kind == kind)


# --- the reply is lost ---------------------------------------------------------------------------
@pytest.mark.parametrize("half", ["sync", "aio"])
def test_a_vm_is_made_once_though_its_reply_was_lost(
    real: DaemonProcess, cuttable: Relay, socket_dir: Path, half: str
) -> None:
    def create() -> int:
        with Client(socket_dir) as client:
            client.host.get()
            cuttable.hold()
            return client.vms.create("null", name="once")

    async def create_async() -> int:
        async with aio.Client(socket_dir) as client:
            await client.host.get()
            cuttable.hold()
            return await client.vms.create("null", name="once")

    with Client(real.socket_dir) as beside, beside.watch() as watch:
        watch.start()
        handle = InThread(create if half == "sync" else lambda: asyncio.run(create_async()))
        made = wait_for(watch, "vm_created")
        cuttable.cut()
        assert handle.result() == made.vm
        assert [(vm.vm, vm.name) for vm in beside.vms.list().vms] == [(made.vm, "once")]
    assert cuttable.accepted == 2


def test_an_object_that_is_gone_is_no_error_for_the_call_that_ended_it(
    real: DaemonProcess, cuttable: Relay, socket_dir: Path
) -> None:
    """The repeat is answered before it is asked whether the VM is there, and whose it is."""
    with Client(socket_dir) as client, Client(real.socket_dir) as beside:
        vm = client.vms.create("null")
        with beside.watch() as watch:
            watch.start()
            cuttable.hold()
            reply = InThread(client.vms.destroy, vm)
            revision = wait_for(watch, "vm_destroyed").revision
            cuttable.cut()
            assert reply.result().revision == revision
        with pytest.raises(NotFound):
            client.vms.destroy(vm)


def test_a_refusal_whose_status_was_lost_is_told_as_it_was(real: DaemonProcess) -> None:
    """By hand, since nothing tells from outside that a refusal has been said."""
    with grpc.insecure_channel(f"unix:{real.socket_dir}/rmemd.sock") as channel:
        stub = vm_pb2_grpc.VmServiceStub(channel)
        metadata = (("rmem-request-id", str(uuid.uuid4())),)
        told = []
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                stub.DestroyVm(vm_pb2.DestroyVmRequest(vm=99), metadata=metadata)
            told.append(caught.value.trailing_metadata())
            # the first was judged by the state of its own time
            stub.CreateVm(vm_pb2.CreateVmRequest(consumer="null"))
        assert told[0] == told[1]
        assert any(key == "grpc-status-details-bin" for key, _ in told[0])


# --- at the same time ----------------------------------------------------------------------------
def test_repeats_at_the_same_time_are_one_call(real: DaemonProcess) -> None:
    request = vm_pb2.CreateVmRequest(consumer="null", name="same")
    channels = [
        grpc.insecure_channel(
            f"unix:{real.socket_dir}/rmemd.sock", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        for _ in range(4)
    ]
    stubs = [vm_pb2_grpc.VmServiceStub(channel) for channel in channels]
    with Client(real.socket_dir) as client:
        for round_ in range(1, 21):
            metadata = (("rmem-request-id", str(uuid.uuid4())),)
            replies = [
                stub.CreateVm.future(request, metadata=metadata, timeout=PATIENCE_S)
                for stub in stubs * 4
            ]
            assert len({reply.result().SerializeToString() for reply in replies}) == 1
            assert len(client.vms.list().vms) == round_
    for channel in channels:
        channel.close()


def test_repeats_wait_for_a_call_that_is_at_work(real: DaemonProcess) -> None:
    """A vCPU that runs for a while: a second run of it would be refused, or be another run."""
    programme = [vcpus.touch(0, 4096), vcpus.loop(0, times=3000), vcpus.halt()]
    with Client(real.socket_dir) as client:
        vm = client.vms.create("gup")
        client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=1 << 16)
        client.vcpus.create(vm)
        client.vcpus.set_programme(vm, 0, programme)
        stub = vcpu_pb2_grpc.VcpuServiceStub(client._connection.channel)
        metadata = (("rmem-request-id", str(uuid.uuid4())),)
        request = vcpu_pb2.RunVcpuRequest(vm=vm)
        replies = [
            stub.RunVcpu.future(request, metadata=metadata, timeout=PATIENCE_S) for _ in range(6)
        ]
        assert len({reply.result().SerializeToString() for reply in replies}) == 1


def test_other_contents_under_the_same_id(real: DaemonProcess) -> None:
    with Client(real.socket_dir) as client:
        connection = client._connection
        stub = vm_pb2_grpc.VmServiceStub(connection.channel)
        metadata = (("rmem-request-id", str(uuid.uuid4())),)
        stub.CreateVm(vm_pb2.CreateVmRequest(consumer="null", name="a"), metadata=metadata)
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateVm(vm_pb2.CreateVmRequest(consumer="null", name="b"), metadata=metadata)
        error = connection.error(caught.value)
        assert isinstance(error, InvalidArgument)
        assert (error.reason, error.field) == ("REQUEST_ID_REUSED", "rmem-request-id")
        assert [vm.name for vm in client.vms.list().vms] == ["a"]


# --- the daemon is lost --------------------------------------------------------------------------
@pytest.mark.parametrize("half", ["sync", "aio"])
def test_a_call_waits_for_the_next_daemon(real: DaemonProcess, half: str) -> None:
    waits = threading.Event()

    def create() -> int:
        with Client(real.socket_dir, reconnect_s=HOUR_S) as client:
            client.host.get()
            real.kill()
            connected = client._connection._wait_connected
            client._connection._wait_connected = lambda end: (waits.set(), connected(end))
            return client.vms.create("null")

    async def create_async() -> int:
        async with aio.Client(real.socket_dir, reconnect_s=HOUR_S) as client:
            await client.host.get()
            real.kill()
            connected = client._connection._wait_connected

            async def wait_connected(end: float) -> None:
                waits.set()
                await connected(end)

            client._connection._wait_connected = wait_connected  # type: ignore[method-assign]
            return await client.vms.create("null")

    handle = InThread(create if half == "sync" else lambda: asyncio.run(create_async()))
    assert waits.wait(PATIENCE_S)
    real.start()
    # this one was not kept: it has none of the memory that the client knows of, and says so
    with pytest.raises(MemoryLost, match="not the daemon that the caller knew"):
        handle.result()
    with Client(real.socket_dir) as client:
        assert not client.vms.list().vms


def test_a_call_about_an_object_of_the_daemon_before_says_what_happened(
    real: DaemonProcess, cuttable: Relay, socket_dir: Path
) -> None:
    with Client(socket_dir, reconnect_s=HOUR_S) as client:
        vm = client.vms.create("null")
        cuttable.hold()
        with Client(real.socket_dir) as beside, beside.watch() as watch:
            watch.start()
            reply = InThread(client.vms.destroy, vm)
            wait_for(watch, "vm_destroyed")
        real.restart()
        cuttable.cut()
        with pytest.raises(MemoryLost) as caught:
            reply.result()
        assert caught.value.reason == "MEMORY_LOST"
        assert "started anew in between" in caught.value.remedy


# --- watches -------------------------------------------------------------------------------------
@pytest.mark.parametrize("half", ["sync", "aio"])
def test_a_watch_that_is_cut_tells_every_event_once(
    real: DaemonProcess, cuttable: Relay, socket_dir: Path, half: str
) -> None:
    names = [f"vm {number}" for number in range(30)]

    def make() -> None:
        with Client(real.socket_dir) as client:
            for number, name in enumerate(names):
                if number % 5 == 4:
                    cuttable.cut()
                client.vms.create("null", name=name)

    def watch() -> list[int]:
        with Client(socket_dir) as client, client.watch(kinds=["vm_created"]) as items:
            items.start()
            maker = InThread(make)
            events = (item.vm for item in items if isinstance(item, Event))
            seen = [next(events) for _ in names]
            maker.result()
            return seen

    async def watch_async() -> list[int]:
        seen: list[int] = []
        async with aio.Client(socket_dir) as client, client.watch(kinds=["vm_created"]) as items:
            await items.start()
            maker = InThread(make)
            async for item in items:
                if isinstance(item, Event):
                    seen.append(item.vm)
                if len(seen) == len(names):
                    break
            await asyncio.to_thread(maker.result)
        return seen

    found = watch() if half == "sync" else asyncio.run(watch_async())
    assert found == list(range(1, len(names) + 1))


@pytest.mark.parametrize("newer", [0, 9])
@pytest.mark.parametrize("half", ["sync", "aio"])
def test_a_watch_is_not_taken_for_one_of_the_next_daemon(
    real: DaemonProcess, cuttable: Relay, socket_dir: Path, newer: int, half: str
) -> None:
    """Whether the next daemon's revision is still behind (0 VMs more) or has passed by (9)."""

    def restart() -> None:
        real.restart()
        with Client(real.socket_dir) as beside:
            for _ in range(newer):
                beside.vms.create("null")
        cuttable.cut()

    def watch() -> None:
        with Client(socket_dir, reconnect_s=HOUR_S) as client, client.watch() as items:
            items.start()
            client.vms.create("null")
            wait_for(items, "vm_created")
            cuttable.hold()
            restart()
            for item in items:
                assert not isinstance(item, Event)

    async def watch_async() -> None:
        async with aio.Client(socket_dir, reconnect_s=HOUR_S) as client, client.watch() as items:
            await items.start()
            await client.vms.create("null")
            async for item in items:
                if isinstance(item, Event) and item.kind == "vm_created":
                    break
            cuttable.hold()
            await asyncio.to_thread(restart)
            async for item in items:
                assert not isinstance(item, Event)

    with pytest.raises(MemoryLost, match=r"MEMORY_LOST.*List the objects again"):
        watch() if half == "sync" else asyncio.run(watch_async())
