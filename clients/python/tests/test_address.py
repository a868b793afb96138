"""Where a client goes: arguments, environment, TCP with and without TLS."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rmem_client import Client, DaemonUnreachable, InvalidArgument, Tls, aio
from rmem_client.address import find_address, find_token
from rmem_client.daemon_process import DaemonProcess, find_command

VARIABLES = (
    "RMEMD_ADDRESS",
    "RMEMD_CA",
    "RMEMD_CERTIFICATE",
    "RMEMD_KEY",
    "RMEMD_INSECURE",
    "RMEMD_TOKEN",
)
TENANT = "spiffe://rmemd.test/tenant/a"


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RMEMD_SOCKET_DIR", "/default")


def find(
    socket_dir: str | None = None,
    address: str | None = None,
    tls: Tls | None = None,
    insecure: bool = False,
) -> Any:
    return find_address(socket_dir, address, tls, insecure)


# --- which address -------------------------------------------------------------------------------
def test_arguments_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find().socket == Path("/default/rmemd.sock")
    monkeypatch.setenv("RMEMD_ADDRESS", "unix:/from/variable.sock")
    assert find().socket == Path("/from/variable.sock")
    assert find(socket_dir="/given").socket == Path("/given/rmemd.sock")
    assert find(address="unix:/given.sock").socket == Path("/given.sock")
    monkeypatch.setenv("RMEMD_TOKEN", "t")
    assert find_token(None) == "t"
    assert find_token("") == ""


def test_tcp_takes_its_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMEMD_ADDRESS", "host.example:7")
    for name in ("CA", "CERTIFICATE", "KEY"):
        with pytest.raises(InvalidArgument):  # none, or not all of them
            find()
        monkeypatch.setenv(f"RMEMD_{name}", f"/{name}")
    found = find()
    assert (found.text, found.socket) == ("host.example:7", None)
    assert found.tls == Tls("/CA", "/CERTIFICATE", "/KEY")
    assert find(tls=Tls("a", "b", "c", "name")).tls == Tls("a", "b", "c", "name")
    options = dict(find(tls=Tls("a", "b", "c", "name")).options())
    assert options["grpc.ssl_target_name_override"] == "name"
    assert options["grpc.keepalive_time_ms"] > 0
    assert "grpc.keepalive_time_ms" not in dict(find(socket_dir="/x").options())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "[::1]"])
def test_plain_tcp_is_for_loopback_and_by_leave(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    with pytest.raises(InvalidArgument, match="needs tls"):
        find(address=f"{host}:7")
    assert find(address=f"{host}:7", insecure=True).tls is None
    monkeypatch.setenv("RMEMD_INSECURE", "1")
    assert find(address=f"{host}:7").tls is None
    for elsewhere in ("10.0.0.1:7", "example.org:7", "[fe80::1]:7", "127.0.0.1.evil.org:7"):
        with pytest.raises(InvalidArgument, match="is not loopback"):
            find(address=elsewhere)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"socket_dir": "/a", "address": "unix:/b"}, "address"),
        ({"address": "host"}, "address"),
        ({"address": ":7"}, "address"),
        ({"address": "host:http"}, "address"),
        ({"address": "/a/path"}, "address"),
        ({"address": "localhost:7", "tls": Tls("a", "b", "c"), "insecure": True}, "insecure"),
    ],
)
def test_wrong_arguments_name_themselves(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Client(**arguments)
    assert (caught.value.reason, caught.value.field) == ("BAD_ADDRESS", field)


def test_keys_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "ca").touch()
    tls = Tls(tmp_path / "ca", tmp_path / "absent", tmp_path / "absent")
    with pytest.raises(InvalidArgument, match="absent: No such file"):
        Client(address="localhost:7", tls=tls)


# --- over TCP ------------------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA with a client, and another CA with the same client in ``other``."""
    directory = tmp_path_factory.mktemp("certificates")
    for one in (directory, directory / "other"):
        command = [find_command(), "certs", str(one), "--client", TENANT]
        subprocess.run(command, check=True, capture_output=True)
    return directory


def tls_of(directory: Path) -> Tls:
    client = directory / "client-tenant-a"
    return Tls(directory / "ca.pem", client.with_suffix(".pem"), client.with_suffix(".key"))


@pytest.fixture(scope="module")
def remote(certificates: Path) -> Iterator[str]:
    """A daemon behind mutual TLS; the address."""
    address = f"127.0.0.1:{free_port()}"
    daemon = DaemonProcess(
        [
            "--host-memory=64M",
            f"--tcp={address}",
            f'--set=tcp.certificate="{certificates}/server.pem"',
            f'--set=tcp.key="{certificates}/server.key"',
            f'--set=tcp.client_ca="{certificates}/ca.pem"',
        ]
    )
    daemon.start()
    yield address
    daemon.stop()


def test_mutual_tls(remote: str, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> Any:
        async with aio.Client(address=remote, tls=tls_of(certificates)) as client:
            await client.wait_ready()
            return await client.vms.list()

    asyncio.run(use())
    tls = tls_of(certificates)
    monkeypatch.setenv("RMEMD_ADDRESS", remote)
    monkeypatch.setenv("RMEMD_CA", str(tls.ca))
    monkeypatch.setenv("RMEMD_CERTIFICATE", str(tls.certificate))
    monkeypatch.setenv("RMEMD_KEY", str(tls.key))
    with Client() as client:
        vm = client.vms.create("null")
        assert client.vms.get(vm).vm == vm


def test_keys_of_another_ca_reach_nobody(remote: str, certificates: Path) -> None:
    ours, others = tls_of(certificates), tls_of(certificates / "other")
    for tls in (others, Tls(ours.ca, others.certificate, others.key)):
        with Client(address=remote, tls=tls) as client, pytest.raises(DaemonUnreachable) as caught:
            client.host.get()
        assert "certificate was refused" in str(caught.value)
    with Client(address=remote, insecure=True) as client, pytest.raises(DaemonUnreachable):
        client.host.get()


def test_plain_tcp_on_loopback() -> None:
    address = f"127.0.0.1:{free_port()}"
    daemon = DaemonProcess(["--host-memory=64M", f"--tcp={address}", "--insecure"])
    daemon.start()

    async def use() -> int:
        async with aio.Client(address=address, insecure=True) as client:
            await client.wait_ready()
            return (await client.host.get()).nframes

    with Client(address=address, insecure=True) as client:
        client.wait_ready()
        assert client.address == address
        assert client.host.get().nframes == asyncio.run(use()) == 16384
        daemon.stop()
        with pytest.raises(DaemonUnreachable, match=f"{address}: nobody answers"):
            Client(address=address, insecure=True).host.get()
