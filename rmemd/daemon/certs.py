"""Certificates for tests: a CA, the server's, and one a client with its SPIFFE id.

Owns ``rmemd certs``. Private keys lie beside their certificates, readable by the owner alone, and
the CA's too: whoever reads the directory can be anybody. For tests and demonstrations.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct, field

from rmemd.daemon.values import is_tenant

SERVER_NAMES = ("localhost", "127.0.0.1", "::1")
DAYS = 30
# clocks of two machines differ
BACKDATED = datetime.timedelta(hours=1)
_DAY = datetime.timedelta(days=1)
_Key = ec.EllipticCurvePrivateKey


class CertificateError(Exception):
    """What was asked for cannot be made; nothing was."""


class Wanted(Struct, frozen=True):
    """What to make.

    Attributes:
        servers: names and addresses of the server beside SERVER_NAMES.
        clients: SPIFFE ids, one certificate each.
        days: how long the certificates are valid.
        expired: SPIFFE ids whose certificates have been out of date for a day.
        force: whether files that exist are overwritten.
    """

    servers: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    days: int = DAYS
    expired: tuple[str, ...] = ()
    force: bool = False


class Made(Struct):
    """The files that were made, by what they are, and the lines for rmemd.toml."""

    directory: Path
    files: dict[str, tuple[Path, Path]] = field(default_factory=dict)

    @property
    def toml(self) -> str:
        """Return the [tcp] table that serves with them."""
        from rmemd.daemon.configload import json_text

        server, key = self.files["server"]
        ca, _ = self.files["ca"]
        return "\n".join([
            "[tcp]", 'listen = "127.0.0.1:0"', f"certificate = {json_text(str(server))}",
            f"key = {json_text(str(key))}", f"client_ca = {json_text(str(ca))}",
        ])  # fmt: skip


def make(directory: Path, wanted: Wanted, now: datetime.datetime | None = None) -> Made:
    """Make certificates in a directory, which is made too (mode 0700).

    Raises:
        CertificateError: an id or name is none, two have the same file, or a file exists.
        OSError: a file cannot be written.
    """
    directory = directory.absolute()
    now = now or datetime.datetime.now(datetime.UTC)
    made = Made(directory)
    names = _names(wanted)
    for name in names:
        made.files[name] = directory / f"{name}.pem", directory / f"{name}.key"
    _require_free([path for pair in made.files.values() for path in pair], wanted.force)
    issuer = _Issuer(now, wanted.days)
    server = issuer.server((*SERVER_NAMES, *wanted.servers))
    pairs = {"ca": (issuer.certificate, issuer.key), "server": server}
    for name, spiffe in names.items():
        if spiffe:
            pairs[name] = issuer.client(spiffe, spiffe in wanted.expired)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, (certificate, key) in pairs.items():
        _write(made.files[name], certificate, key)
    return made


def _names(wanted: Wanted) -> dict[str, str]:
    """Return the file name of everything that is to be made, with its SPIFFE id."""
    if wanted.days < 1:
        raise CertificateError("--days is 1 at least")
    names = {"ca": "", "server": ""}
    for spiffe in dict.fromkeys((*wanted.clients, *wanted.expired)):
        if not spiffe.startswith("spiffe://") or not is_tenant(spiffe):
            raise CertificateError(f"{spiffe!r} is no SPIFFE id such as spiffe://rmemd.test/a")
        path = spiffe.removeprefix("spiffe://").partition("/")[2]
        name = "client-" + re.sub(r"[^A-Za-z0-9.-]+", "-", path)[:100]
        if name in names:
            raise CertificateError(f"{spiffe} and {names[name]} would both be {name}.pem")
        names[name] = spiffe
    return names


def _require_free(paths: Sequence[Path], force: bool) -> None:
    found = [path for path in paths if os.path.lexists(path)]
    if found and not force:
        listed = ", ".join(map(str, found))
        raise CertificateError(f"already there (--force overwrites): {listed}")


class _Issuer:
    """A new CA. Its certificate must outlive those that have expired on purpose."""

    def __init__(self, now: datetime.datetime, days: int) -> None:
        self._now, self._end = now, now + days * _DAY
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rmemd test CA")])
        self.certificate = (
            self._begun(self._name, self.key, now - 10 * _DAY, self._end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def server(self, names: Sequence[str]) -> tuple[x509.Certificate, _Key]:
        """Return a certificate for DNS names and IP addresses."""
        general = [_general_name(name) for name in dict.fromkeys(names)]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rmemd")])
        begin = self._now - BACKDATED
        return self._leaf(subject, general, ExtendedKeyUsageOID.SERVER_AUTH, begin, self._end)

    def client(self, spiffe: str, expired: bool) -> tuple[x509.Certificate, _Key]:
        """Return a certificate whose one name is a SPIFFE id (X.509-SVID: exactly one URI SAN)."""
        uri = x509.UniformResourceIdentifier(spiffe)
        begin, end = self._now - BACKDATED, self._end
        if expired:
            begin, end = self._now - 2 * _DAY, self._now - _DAY
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        return self._leaf(x509.Name([]), [uri], usage, begin, end)

    def _leaf(
        self,
        subject: x509.Name,
        names: list[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        begin: datetime.datetime,
        end: datetime.datetime,
    ) -> tuple[x509.Certificate, _Key]:
        key = ec.generate_private_key(ec.SECP256R1())
        # RFC 5280 §4.2.1.6: without a subject the alternative name is critical
        san = x509.SubjectAlternativeName(names)
        certificate = (
            self._begun(subject, key, begin, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(san, critical=not subject.rdns)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return certificate, key

    def _begun(
        self, subject: x509.Name, key: _Key, begin: datetime.datetime, end: datetime.datetime
    ) -> x509.CertificateBuilder:
        """Return what a certificate of this issuer has in any case."""
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject).issuer_name(self._name).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin).not_valid_after(end)
            .add_extension(identifier, critical=False)
            .add_extension(issuer, critical=False)
        )  # fmt: skip


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise CertificateError(f"{name!r} is no DNS name: {error}") from error


def _usage(ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _write(paths: tuple[Path, Path], certificate: x509.Certificate, key: _Key) -> None:
    """Write a certificate (0644) and its key (0600), each whole or not at all."""
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _replace(paths[1], pem, 0o600)
    _replace(paths[0], certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _replace(path: Path, data: bytes, mode: int) -> None:
    # a new file and a rename: an old one's mode, links and readers have no part in it
    new = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(data)
    new.replace(path)
