from __future__ import annotations

import socket
from pathlib import Path

import grpc
import pytest
from fake_daemon import BUSY, UNMOVABLE, FakeDaemon, Refuse

import rmem_client
from rmem.v1 import types_pb2, vm_pb2
from rmem_client import Client, DaemonUnreachable, Holder, RmemError


def refused(daemon: FakeDaemon, client: Client, answer: object) -> RmemError:
    daemon.answers["GetVm"] = answer
    with pytest.raises(RmemError) as caught:
        client.vms.get(3)
    return caught.value


def test_every_field_is_decoded(daemon: FakeDaemon, client: Client) -> None:
    error = refused(daemon, client, BUSY)
    assert isinstance(error, rmem_client.Busy)
    assert error.as_dict() == {
        "reason": "FOLIO_BUSY",
        "message": "gfn 0x42 is referenced",
        "code": "ABORTED",
        "errno": 11,
        "errno_name": "EAGAIN",
        "field": "gfns",
        "page": "gfn 0x42",
        "state": "MAPPED",
        "rule": "references must be the expected ones (restrictedmem.md §2)",
        "holders": [
            {"name": "vm/3", "purpose": "secure EPT", "count": 1, "longterm": False},
            {"name": "client 7", "purpose": "DMA", "count": 2, "longterm": True},
        ],
        "remedy": "Have the holders that are named let go, then try again.",
        "vendor_status": "TDX_OPERAND_BUSY",
        "vendor_value": 0x8000020000000000,
        "progress_pages": 3,
        "error_offset_bytes": 0x42000,
        "where": "tdx(vm/3).migrate_folio",
        "revision": 17,
        "correlation_id": "c-1f2e",
    }
    assert error.holders[1] == Holder("client 7", "DMA", 2, longterm=True)


def test_it_explains_itself_in_one_paragraph(daemon: FakeDaemon, client: Client) -> None:
    text = str(refused(daemon, client, BUSY))
    assert "\n" not in text
    assert text.startswith("FOLIO_BUSY (EAGAIN): gfn 0x42 is referenced: ")
    for part in (
        "page gfn 0x42; state MAPPED; rule references must be",
        "held by vm/3 (secure EPT: 1 reference) and client 7 (DMA: 2 long-term pins)",
        "vendor status TDX_OPERAND_BUSY (0x8000020000000000)",
    ):
        assert part in text
    assert text.endswith(". Have the holders that are named let go, then try again.")


def test_message_does_not_say_the_reason_twice(daemon: FakeDaemon, client: Client) -> None:
    said = Refuse(BUSY.code, "FOLIO_BUSY: it is held.", types_pb2.Refusal(reason="FOLIO_BUSY"))
    assert str(refused(daemon, client, said)) == "FOLIO_BUSY: it is held."


def test_absent_fields_are_none_or_empty(daemon: FakeDaemon, client: Client) -> None:
    bare = Refuse(grpc.StatusCode.NOT_FOUND, "vm/3 is not there", types_pb2.Refusal(reason="X"))
    error = refused(daemon, client, bare)
    assert (error.progress_pages, error.error_offset_bytes) == (None, None)
    assert (error.holders, error.facts(), error.correlation_id) == ([], [], "")
    assert str(error) == "X: vm/3 is not there."


def test_progress_of_nothing_is_told(daemon: FakeDaemon, client: Client) -> None:
    refusal = types_pb2.Refusal(reason="X", progress_pages=0, error_offset_bytes=0)
    error = refused(daemon, client, Refuse(grpc.StatusCode.ABORTED, "no", refusal))
    assert (error.progress_pages, error.error_offset_bytes) == (0, 0)
    assert ("done before", "0 pages") in error.facts()


def test_unsupported_and_refused_are_two_things(daemon: FakeDaemon, client: Client) -> None:
    assert type(refused(daemon, client, UNMOVABLE)) is rmem_client.Unsupported
    declined = types_pb2.Refusal(reason="NOT_FINALIZED", errno=22, errno_name="EINVAL")
    error = refused(daemon, client, Refuse(UNMOVABLE.code, "no", declined))
    assert type(error) is rmem_client.Refused


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, rmem_client.InvalidArgument),
        (grpc.StatusCode.NOT_FOUND, rmem_client.NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, rmem_client.AlreadyExists),
        (grpc.StatusCode.PERMISSION_DENIED, rmem_client.Denied),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, rmem_client.Exhausted),
        (grpc.StatusCode.OUT_OF_RANGE, rmem_client.OutOfRange),
        (grpc.StatusCode.DATA_LOSS, rmem_client.Poisoned),
        (grpc.StatusCode.INTERNAL, rmem_client.PluginFault),
        (grpc.StatusCode.UNAVAILABLE, rmem_client.Unavailable),
        (grpc.StatusCode.UNIMPLEMENTED, rmem_client.NotServed),
    ],
)
def test_class_follows_the_code(
    daemon: FakeDaemon, client: Client, code: grpc.StatusCode, kind: type[RmemError]
) -> None:
    error = refused(daemon, client, Refuse(code, "no", types_pb2.Refusal(reason="X")))
    assert type(error) is kind
    assert error.code is code


def test_vendor_errno_stays_negative(daemon: FakeDaemon, client: Client) -> None:
    refusal = types_pb2.Refusal(reason="X", vendor_status="EPERM", vendor_value=-1)
    error = refused(daemon, client, Refuse(grpc.StatusCode.ABORTED, "no", refusal))
    assert error.vendor_value == -1
    assert ("vendor status", "EPERM (-1)") in error.facts()


def test_too_big_a_message_is_a_typed_error(daemon: FakeDaemon, client: Client) -> None:
    with pytest.raises(rmem_client.Exhausted):
        client.host.write_physical(0, bytes(2 << 20))


def test_deadline(daemon: FakeDaemon) -> None:
    def slow(request: object) -> vm_pb2.GetVmResponse:
        stopped.wait(10)
        return vm_pb2.GetVmResponse()

    import threading

    stopped = threading.Event()
    daemon.answers["GetVm"] = slow
    with Client(daemon.socket_dir, deadline_s=0.2) as client:
        with pytest.raises(rmem_client.DeadlineExceeded):
            client.vms.get(1)
        stopped.set()


def test_no_daemon_names_path_and_remedy(socket_dir: Path) -> None:
    with Client(socket_dir) as client, pytest.raises(DaemonUnreachable) as caught:
        client.vms.list()
    assert caught.value.socket == socket_dir / "rmemd.sock"
    assert f"cannot reach rmemd at {socket_dir}/rmemd.sock: there is no such socket" in str(
        caught.value
    )
    assert "Start rmemd" in caught.value.remedy


def test_dead_daemon_is_told_from_a_missing_one(socket_dir: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(socket_dir / "rmemd.sock"))
    listener.close()
    with Client(socket_dir) as client, pytest.raises(DaemonUnreachable, match="nobody answers"):
        client.vms.list()


def test_file_in_the_socket_s_place(socket_dir: Path) -> None:
    (socket_dir / "rmemd.sock").touch()
    with Client(socket_dir) as client, pytest.raises(DaemonUnreachable, match="not a socket"):
        client.vms.list()


def test_path_too_long() -> None:
    with (
        Client("/tmp/" + "x" * 120) as client,
        pytest.raises(DaemonUnreachable, match="at most 107"),
    ):
        client.vms.list()
