"""gRPC over mutual TLS: who comes in is who the certificate says, and why not is for the log.

Certificates are those that ``rmemd certs`` makes; the handshakes are gRPC's own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from daemons import BIN, Daemon, Rpc, eventually

from rmem.v1 import session_pb2

A, B, OLD = "spiffe://rmemd.test/a", "spiffe://rmemd.test/b", "spiffe://rmemd.test/old"
NOT_FOUND, UNAVAILABLE = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE


@dataclass
class Served:
    """A daemon that serves over TCP with one CA; certificates of another CA lie beside."""

    daemon: Daemon
    certs: Path
    others: Path

    @property
    def address(self) -> str:
        """Return where it listens."""
        return next(line["tcp"] for line in self.daemon.log_lines if line.get("event") == "serving")

    def channel(self, tenant: str, certs: Path | None = None, anonymous: bool = False) -> Rpc:
        """Return a channel that shows a tenant's certificate, or none."""
        directory = certs or self.certs
        name = "client-" + tenant.rpartition("/")[2]
        shown = {} if anonymous else {
            "private_key": (directory / f"{name}.key").read_bytes(),
            "certificate_chain": (directory / f"{name}.pem").read_bytes(),
        }  # fmt: skip
        root = (self.certs / "ca.pem").read_bytes()
        credentials = grpc.ssl_channel_credentials(root, **shown)
        return Rpc.over(grpc.secure_channel(self.address, credentials))

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log's entries of an event, waiting until there is one."""
        entries = lambda: [e for e in self.daemon.log_lines if e.get("event") == event]  # noqa: E731
        return eventually(entries)


def make_certs(directory: Path, *clients: str, expired: str = "") -> Path:
    """Have ``rmemd certs`` make a CA, a server's and clients' certificates."""
    command = [str(BIN / "rmemd"), "certs", str(directory), "--server", "localhost"]
    for client in clients:
        command += ["--client", client]
    if expired:
        command += ["--expired", expired]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return directory


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon with mutual TLS, on the loopback."""
    top = tmp_path_factory.mktemp("tls")
    certs = make_certs(top / "certs", A, B, expired=OLD)
    others = make_certs(top / "others", A)
    daemon = Daemon(
        top / "daemon", "--host-memory", "64M", "--log-json", "--tcp", "127.0.0.1:0",
        *(part for key, file in (("certificate", "server.pem"), ("key", "server.key"),
                                 ("client_ca", "ca.pem"))
          for part in ("--set", f"tcp.{key}={certs / file}")),
    ).start()  # fmt: skip
    yield Served(daemon, certs, others)
    daemon.stop()


def test_the_certificate_says_who_calls(served: Served) -> None:
    reply = served.channel(A).call("WhoAmI").reply
    assert (reply.tenant, reply.role) == (A, session_pb2.ROLE_HOST)


@pytest.mark.parametrize(
    ("why", "show"),
    [
        ("unable to get local issuer certificate", {"certs": "others"}),
        ("the peer has no certificate", {"anonymous": True}),
        ("certificate has expired", {"tenant": OLD}),
    ],
    ids=["wrong CA", "no certificate", "expired"],
)
def test_a_bad_certificate_is_refused_and_only_the_log_says_why(
    served: Served, why: str, show: dict[str, Any]
) -> None:
    before = len([e for e in served.daemon.log_lines if e.get("event") == "tls_refused"])
    certs = served.others if show.get("certs") else None
    channel = served.channel(show.get("tenant", A), certs, show.get("anonymous", False))
    answer = channel.call("WhoAmI")
    assert answer.code is UNAVAILABLE
    for word in (why, "expired", "issuer", "CERTIFICATE", "verif"):
        assert word.lower() not in answer.message.lower()
    refused = eventually(
        lambda: [e for e in served.daemon.log_lines if e.get("event") == "tls_refused"][before:]
    )
    assert any(why in json.dumps(entry).lower() for entry in refused), refused


def test_another_tenants_objects_are_not_there_and_the_log_says_whose(served: Served) -> None:
    mine, other = served.channel(A), served.channel(B)
    vm = mine.call("CreateVm", consumer="null").reply.vm
    answer, absent = other.call("GetVm", vm=vm), other.call("GetVm", vm=999)
    assert answer.code is NOT_FOUND
    assert answer.message.replace(str(vm), "N") == absent.message.replace("999", "N")
    assert answer.refusal.state == absent.refusal.state == ""
    assert A not in str(answer.status)
    entry = next(e for e in served.logged("refused") if A in e.get("why", ""))
    assert (entry["tenant"], entry["method"]) == (B, "VmService/GetVm")
    assert [v.vm for v in other.call("ListVms").reply.vms] == []
    assert mine.call("DestroyVm", vm=vm).ok


def test_a_token_is_no_use_with_another_tenants_certificate(served: Served) -> None:
    token = served.channel(A).call("OpenSession").reply.token
    mine = served.channel(A).call("WhoAmI", metadata=[("rmem-token", token)])
    assert mine.reply.session
    other = served.channel(B).call("WhoAmI", metadata=[("rmem-token", token)])
    local = served.daemon.rpc().call("WhoAmI", metadata=[("rmem-token", token)])
    guessed = served.channel(A).call("WhoAmI", metadata=[("rmem-token", "0" * 64)])
    assert {a.code for a in (other, local, guessed)} == {grpc.StatusCode.UNAUTHENTICATED}
    assert other.message == local.message == guessed.message
    whys = {e["why"] for e in served.logged("refused") if e["reason"] == "TOKEN_UNKNOWN"}
    assert len(whys) == 2


def test_reflection_is_for_the_unix_socket_only(served: Served) -> None:
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    with pytest.raises(grpc.RpcError) as caught:
        next(served.channel(A).channel.stream_stream(path)(iter([b""]), timeout=20))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_rotated_certificates_are_taken_up_while_it_serves(served: Served, tmp_path: Path) -> None:
    fresh = make_certs(tmp_path / "fresh", A)
    kept = tmp_path / "kept"
    shutil.copytree(served.certs, kept)
    for file in ("server.pem", "server.key", "ca.pem"):
        shutil.copy(fresh / file, served.certs / file)
    try:
        new = Served(served.daemon, served.certs, served.others)
        assert new.channel(A, fresh).call("WhoAmI").reply.tenant == A
        assert new.channel(A, kept).call("WhoAmI").code is UNAVAILABLE
    finally:
        for file in ("server.pem", "server.key", "ca.pem"):
            shutil.copy(kept / file, served.certs / file)
    assert served.channel(A).call("WhoAmI").ok


def test_without_tls_everybody_on_the_loopback_is_one_tenant(tmp_path: Path) -> None:
    daemon = Daemon(
        tmp_path / "daemon", "--host-memory", "64M", "--log-json", "--tcp", "127.0.0.1:0",
        "--insecure",
    ).start()  # fmt: skip
    address = next(line["tcp"] for line in daemon.log_lines if line.get("event") == "serving")
    rpc = Rpc.over(grpc.insecure_channel(address))
    assert rpc.call("WhoAmI").reply.tenant == "insecure:loopback"
    assert rpc.call("Compact").reason == "ROLE_DENIED"
    rpc.close()
    daemon.stop()
