"""Test certificates: what is in them, who vouches for them, modes, and never over another file."""

from __future__ import annotations

import datetime
import ipaddress
import stat
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from rmemd.daemon.certs import CertificateError, Made, Wanted, make
from rmemd.daemon.cli import main
from rmemd.daemon.configload import Sources

A, OLD = "spiffe://rmemd.test/tenant/a", "spiffe://rmemd.test/tenant/old"
EX_CANTCREAT = 73


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path / "certs", Wanted(("box.test", "10.1.2.3"), (A,), 5, (OLD,)))


def certificate(made: Made, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(made.files[name][0].read_bytes())


def policy(made: Made, when: datetime.datetime | None = None) -> PolicyBuilder:
    builder = PolicyBuilder().store(Store([certificate(made, "ca")]))
    return builder.time(when) if when else builder


def test_the_server_s_names_are_verified(made: Made) -> None:
    server = certificate(made, "server")
    for name in ("localhost", "box.test"):
        policy(made).build_server_verifier(x509.DNSName(name)).verify(server, [])
    for address in ("127.0.0.1", "::1", "10.1.2.3"):
        ip = x509.IPAddress(ipaddress.ip_address(address))
        policy(made).build_server_verifier(ip).verify(server, [])
    with pytest.raises(VerificationError):
        policy(made).build_server_verifier(x509.DNSName("elsewhere")).verify(server, [])


def test_a_client_has_exactly_one_uri_and_no_common_name(made: Made) -> None:
    client = certificate(made, "client-tenant-a")
    verified = policy(made).build_client_verifier().verify(client, [])
    assert verified.subjects == [x509.UniformResourceIdentifier(A)]
    assert not client.subject.rdns
    usage = client.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(VerificationError):
        policy(made).build_server_verifier(x509.DNSName("localhost")).verify(client, [])


def test_expired_is_expired_and_was_good_once(made: Made) -> None:
    old = certificate(made, "client-tenant-old")
    with pytest.raises(VerificationError):
        policy(made).build_client_verifier().verify(old, [])
    then = old.not_valid_before_utc + datetime.timedelta(hours=1)
    policy(made, then).build_client_verifier().verify(old, [])


def test_another_ca_does_not_vouch(made: Made, tmp_path: Path) -> None:
    other = make(tmp_path / "other", Wanted())
    with pytest.raises(VerificationError):
        policy(other).build_client_verifier().verify(certificate(made, "client-tenant-a"), [])


def test_days_are_how_long_they_last(made: Made) -> None:
    left = certificate(made, "server").not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=4, hours=23) < left <= datetime.timedelta(days=5)


def test_keys_are_the_owner_s_and_belong_to_the_certificates(made: Made) -> None:
    assert stat.S_IMODE(made.directory.stat().st_mode) == 0o700
    for name, (path, key) in made.files.items():
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        public = load_pem_private_key(key.read_bytes(), None).public_key()
        assert public == certificate(made, name).public_key()
    assert len(list(made.directory.iterdir())) == 2 * len(made.files)


def test_nothing_is_overwritten_unless_forced(tmp_path: Path) -> None:
    make(tmp_path, Wanted(clients=(A,)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CertificateError, match=r"--force overwrites\): .*ca\.pem"):
        make(tmp_path, Wanted())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "server.key").chmod(0o644)
    made = make(tmp_path, Wanted(force=True))
    assert stat.S_IMODE((tmp_path / "server.key").stat().st_mode) == 0o600
    assert made.files["ca"][0].read_bytes() != before[tmp_path / "ca.pem"]


@pytest.mark.parametrize(
    "wanted",
    [
        Wanted(clients=("uid:1",)),
        Wanted(clients=("spiffe://x",)),
        Wanted(expired=("spiffe://x/../y",)),
        Wanted(clients=("spiffe://x/a/b", "spiffe://x/a-b")),
        Wanted(clients=("spiffe://x/a", "spiffe://y/a")),
        Wanted(servers=("bücher.test",)),
        Wanted(days=0),
    ],
)
def test_what_cannot_be_made_leaves_nothing(tmp_path: Path, wanted: Wanted) -> None:
    with pytest.raises(CertificateError):
        make(tmp_path / "certs", wanted)
    assert not (tmp_path / "certs").exists()


def test_the_command_says_what_to_put_into_the_file(tmp_path: Path) -> None:
    directory = tmp_path / "certs"
    done = CliRunner().invoke(main, ["certs", str(directory), "--client", A])
    assert done.exit_code == 0, done.output
    assert "client-tenant-a.pem and client-tenant-a.key" in done.output
    file = tmp_path / "rmemd.toml"
    file.write_text(done.output)
    assert tomllib.loads(done.output).keys() == {"tcp"}
    tcp = Sources(file).load().config.tcp
    assert (tcp.certificate, tcp.key) == (directory / "server.pem", directory / "server.key")
    again = CliRunner().invoke(main, ["certs", str(directory)])
    assert again.exit_code == EX_CANTCREAT
    assert "already there" in again.output
    assert CliRunner().invoke(main, ["certs", str(directory), "--force"]).exit_code == 0
