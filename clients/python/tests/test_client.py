from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_daemon import BUSY, NOT_SERVING, SERVING, FakeDaemon
from hypothesis import given
from hypothesis import strategies as st

from rmem.v1 import file_pb2, host_pb2, vcpu_pb2, vm_pb2
from rmem_client import (
    Client,
    DaemonUnreachable,
    Frames,
    Range,
    RmemError,
    default_socket_dir,
    pack_ranges,
    unpack_frames,
    unpack_ranges,
    vcpus,
)
from rmem_client.packed import pieces

U64 = st.integers(0, (1 << 64) - 1)


def test_socket_dir_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMEMD_SOCKET_DIR", "/a")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/b")
    assert default_socket_dir() == Path("/a")
    monkeypatch.delenv("RMEMD_SOCKET_DIR")
    assert default_socket_dir() == Path("/b/rmemd")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert default_socket_dir() == Path("/run/rmemd")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert default_socket_dir() == Path("/tmp/rmemd-1000")


def test_ready_when_serving(daemon: FakeDaemon, client: Client) -> None:
    daemon.health.set("", SERVING)
    client.wait_ready(5)


def test_waits_for_a_daemon_that_starts_later(socket_dir: Path) -> None:
    daemon = FakeDaemon(socket_dir)
    daemon.health.set("", NOT_SERVING)
    ready = threading.Event()
    with Client(socket_dir) as client:
        waiter = threading.Thread(target=lambda: (client.wait_ready(20), ready.set()))
        waiter.start()
        daemon.start()
        assert not ready.is_set()
        daemon.health.set("", SERVING)
        waiter.join(20)
        assert ready.is_set()
    daemon.stop()


def test_not_ready_says_what_it_saw(daemon: FakeDaemon, client: Client) -> None:
    daemon.health.set("", NOT_SERVING)
    with pytest.raises(DaemonUnreachable, match="did not say SERVING"):
        client.wait_ready(0.3)


def test_not_ready_without_a_daemon(socket_dir: Path) -> None:
    with Client(socket_dir) as client, pytest.raises(DaemonUnreachable, match="no such socket"):
        client.wait_ready(0.1)


def test_odd_characters_in_the_path(socket_dir: Path) -> None:
    directory = socket_dir / "a %41?#b"
    directory.mkdir()
    (socket_dir / "link").symlink_to(directory)  # the server's own target is a URI too
    daemon = FakeDaemon(socket_dir / "link")
    daemon.start()
    with Client(directory) as client:
        assert client.vms.list().vms == []
    daemon.stop()


def test_newest_revision_is_kept(daemon: FakeDaemon, client: Client) -> None:
    daemon.answers["CreateVm"] = vm_pb2.CreateVmResponse(revision=7, vm=2)
    assert client.vms.create("tdx-today", config={"a": "b"}, name="n") == 2
    client.vms.list()
    assert client.last_revision == 7
    assert daemon.requests[0].config == {"a": "b"}


def test_populate_goes_in_pieces(daemon: FakeDaemon, client: Client) -> None:
    daemon.answers["Populate"] = lambda request: vm_pb2.PopulateResponse(
        revision=len(daemon.requests), done_pages=len(request.source) // 4096
    )
    source = os.urandom(300 * 4096)
    reply = client.vms.populate(1, 0x10000, source, kind=vm_pb2.PAGE_KIND_ZERO)
    assert (reply.done_pages, reply.revision) == (300, 3)
    assert [len(request.source) // 4096 for request in daemon.requests] == [128, 128, 44]
    assert [request.gpa for request in daemon.requests] == [0x10000, 0x90000, 0x110000]
    assert b"".join(request.source for request in daemon.requests) == source


def test_populate_counts_the_prefix_over_all_pieces(daemon: FakeDaemon, client: Client) -> None:
    done = vm_pb2.PopulateResponse(done_pages=128)
    daemon.answers["Populate"] = lambda request: done if request.gpa == 0 else BUSY
    with pytest.raises(RmemError) as caught:
        client.vms.populate(1, 0, bytes(200 * 4096))
    assert caught.value.progress_pages == 128 + 3


def test_shared_bytes_go_in_pieces(daemon: FakeDaemon, client: Client) -> None:
    memory = bytearray(2 << 20)

    def write(request: file_pb2.WriteSharedRequest) -> file_pb2.WriteSharedResponse:
        end = request.offset_bytes + len(request.data)
        memory[request.offset_bytes : end] = request.data
        return file_pb2.WriteSharedResponse(revision=9)

    def read(request: file_pb2.ReadSharedRequest) -> file_pb2.ReadSharedResponse:
        end = request.offset_bytes + request.length_bytes
        return file_pb2.ReadSharedResponse(data=bytes(memory[request.offset_bytes : end]))

    daemon.answers |= {"WriteShared": write, "ReadShared": read}
    data = os.urandom((3 << 19) + 5)
    assert client.files.write_shared(1, 100, data) == 9
    assert client.files.read_shared(1, 100, len(data)) == data
    assert len(daemon.requests) == 8
    assert max(len(request.data) for request in daemon.requests[:4]) <= 512 * 1024


def test_attributes_travel_packed(daemon: FakeDaemon, client: Client) -> None:
    received: list[Range] = []

    def set_them(request: vm_pb2.SetMemoryAttributesRequest) -> object:
        ranges = unpack_ranges(request.packed)
        received.extend(ranges)
        return vm_pb2.SetMemoryAttributesResponse(done_ranges=len(ranges), unchanged_ranges=1)

    daemon.answers["SetMemoryAttributes"] = set_them
    ranges = [Range(index << 12, 4096, 8) for index in range(50_000)]
    reply = client.vms.set_memory_attributes(1, ranges)
    assert received == ranges
    assert (reply.done_ranges, reply.unchanged_ranges) == (50_000, 3)
    # who has them packed gives them so
    received.clear()
    client.vms.set_memory_attributes(1, pack_ranges(ranges))
    assert received == ranges


@given(st.lists(st.tuples(U64, U64, U64)))
def test_ranges_round_trip(rows: list[tuple[int, int, int]]) -> None:
    packed = pack_ranges(rows)
    assert len(packed) == 24 * len(rows)
    assert unpack_ranges(packed) == rows


def test_packed_layout_is_little_endian() -> None:
    assert pack_ranges([(1, 2, 8)]) == b"".join(n.to_bytes(8, "little") for n in (1, 2, 8))
    words = b"".join(n.to_bytes(8, "little", signed=True) for n in (5, 2, 1, 0, -1))
    assert unpack_frames(words) == [Frames(pfn=5, npages=2, use=1, vm=0, gfn=-1)]
    with pytest.raises(ValueError, match="whole number"):
        unpack_ranges(bytes(25))


@given(st.integers(0, 5000), st.integers(1, 700))
def test_pieces_cover_all_once(total: int, size: int) -> None:
    parts = list(pieces(total, size))
    assert [start for start, _ in parts] == list(range(0, max(total, 1), size))
    assert sum(length for _, length in parts) == total
    assert all(length <= size for _, length in parts)


def test_page_map_goes_on(daemon: FakeDaemon, client: Client) -> None:
    def answer(request: host_pb2.GetPageMapRequest) -> host_pb2.GetPageMapResponse:
        run = host_pb2.FrameRun(pfn=request.first_pfn, npages=10)
        ahead = request.first_pfn + 10
        return host_pb2.GetPageMapResponse(runs=[run], next_pfn=ahead if ahead < 30 else 0)

    daemon.answers["GetPageMap"] = answer
    assert [run.pfn for run in client.host.frame_runs()] == [0, 10, 20]
    assert [run.pfn for run in client.host.frame_runs(0, 20)] == [0, 10]


def test_page_is_named_in_one_way(daemon: FakeDaemon, client: Client) -> None:
    client.host.page(vm=3, gfn=0x42)
    assert daemon.requests[0].page.guest.gfn == 0x42
    client.host.page(pfn=0)
    assert daemon.requests[1].page.WhichOneof("address") == "pfn"
    for wrong in ({}, {"vm": 3}, {"pfn": 1, "vm": 3, "gfn": 4}):
        with pytest.raises(ValueError, match="name the page"):
            client.host.page(**wrong)


def test_migrate_tells_node_0_from_any_node(daemon: FakeDaemon, client: Client) -> None:
    client.host.migrate(pfns=[(1, 2)])
    client.host.migrate(vm=3, gfns=[(0x40, 16)], node=0)
    assert not daemon.requests[0].HasField("node")
    assert daemon.requests[1].HasField("node")
    assert daemon.requests[1].gfns[0].npages == 16


def test_slot_flags_follow_the_file(daemon: FakeDaemon, client: Client) -> None:
    client.vms.set_memory_region(1, 0, gpa=0, size_bytes=4096, file=7)
    client.vms.set_memory_region(1, 0, gpa=0, size_bytes=4096)
    client.vms.set_memory_region(1, 0, gpa=0, size_bytes=4096, file=7, flags=0)
    assert [request.flags for request in daemon.requests] == [4, 0, 0]


def test_supports_reads_the_table(daemon: FakeDaemon, client: Client) -> None:
    from rmem.v1 import consumer_pb2

    op = consumer_pb2.Op(name="migrate_folio", implemented=False)
    daemon.answers["GetOps"] = consumer_pb2.GetOpsResponse(ops=[op])
    assert client.consumers.supports(1, "migrate_folio") is False
    with pytest.raises(KeyError):
        client.consumers.supports(1, "migrate_foliio")


def test_programme(daemon: FakeDaemon, client: Client) -> None:
    client.vcpus.set_programme(
        1,
        0,
        [
            vcpus.accept(0, 4096, level=1),
            vcpus.write(0, 4096, seed=7, private=True),
            vcpus.check(0, 4096, byte=3),
            vcpus.copy(0, 4096, to_gpa=8192),
            vcpus.loop(1, times=2),
            vcpus.halt(),
        ],
    )
    accept, write, check, copy, loop, halt = daemon.requests[0].programme
    assert (accept.opcode, accept.level, accept.private) == (vcpu_pb2.OPCODE_ACCEPT, 1, True)
    assert (write.pattern, write.value) == (vcpu_pb2.PATTERN_WORDS, 7)
    assert (check.pattern, check.value) == (vcpu_pb2.PATTERN_BYTE, 3)
    assert (copy.value, loop.value, loop.times) == (8192, 1, 2)
    assert halt.opcode == vcpu_pb2.OPCODE_HALT


def test_a_process_that_needs_a_session_only_does_not_load_grpc() -> None:
    code = "import sys, rmem_client; rmem_client.Session; print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "False"
