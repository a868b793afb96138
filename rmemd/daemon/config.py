"""What a daemon is told: every section and key, with default, unit and rule.

Owns the frozen structs that the rest of the daemon reads, and the rules that span keys. What a key
means is said once, beside it, and shown by ``rmemd config dump|schema`` and docs/configuration.md.
Reads no file: that is ``configload``. Cheap to import, as ``rmemd --help`` has to be: no NumPy.
"""

# without postponed annotations: a start would compile each of them from its text

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from msgspec import Meta, Struct, field
from msgspec.structs import fields

from rmemd.daemon.sockets import default_socket_dir
from rmemd.daemon.values import (
    DOMAIN,
    is_endpoint,
    is_loopback,
    path_of,
    required_path_of,
    size_of,
    split_address,
    tenants_of,
    text_if,
)

# 2 MiB: what a node is made of (units.PMD_PAGES frames, without importing NumPy for it)
NODE_MIN_BYTES = 2 << 20
MEMORY_MAX_BYTES = 1 << 44
UNLIMITED = -1


# --- keys -----------------------------------------------------------------------------------------
def _key(
    description: str,
    *,
    reloadable: bool = False,
    legal: str = "",
    read: Callable[[object], object] | None = None,
    default: str = "",
    schema: dict[str, Any] | None = None,
    **limits: Any,
) -> Meta:
    """Return a key's metadata.

    ``legal`` says what it takes where its type does not, ``read`` reads such a value (ValueError:
    it is none), ``default`` names a default that is computed.
    """
    return Meta(
        description=description,
        extra={"reloadable": reloadable, "legal": legal, "read": read, "default": default},
        extra_json_schema={"x-reloadable": reloadable, **(schema or {})},
        **limits,
    )


def _address_key(description: str) -> Meta:
    return _key(
        description, read=text_if(split_address),
        legal='"host:port" ("127.0.0.1:0": a free port; "[::1]:9000"), or "" for off',
    )  # fmt: skip


def _file_key(description: str) -> Meta:
    return _key(
        description, read=path_of, legal='the path of a file, or "" for none',
        schema={"type": "string"},
    )  # fmt: skip


def _limit_key(description: str) -> Meta:
    return _key(
        f"{description} that a tenant may have; -1: no limit.", reloadable=True, ge=UNLIMITED,
        le=(1 << 53) - 1, legal="-1 or a whole number",
    )  # fmt: skip


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file."""


class DaemonSection(Section, frozen=True):
    """[daemon]: the mock host and the process."""

    socket_dir: Annotated[
        Path,
        _key(
            "Directory to serve in.",
            read=required_path_of, legal="the path of a directory", schema={"type": "string"},
            default="$RMEMD_SOCKET_DIR, else $XDG_RUNTIME_DIR/rmemd, else /run/rmemd for root and "
            "/tmp/rmemd-UID for others",
        ),
    ] = field(default_factory=default_socket_dir)  # fmt: skip
    host_memory_bytes: Annotated[
        int,
        _key(
            "Memory of the mock host, rounded down to 2 MiB; only what is touched costs memory.",
            read=size_of, legal='a size such as "16G" (K, M, G, T: powers of 1024), or bytes',
            default="`\"16G\"`",
        ),
    ] = field(default=16 << 30, name="host_memory")  # fmt: skip
    nodes: Annotated[int, _key("NUMA nodes that the memory is split into.", ge=1, le=64)] = 1
    seed: Annotated[
        int, _key("Seed of every key; the same seed gives the same bytes.", ge=-(1 << 63),
                 le=(1 << 63) - 1, legal="a 64-bit number")
    ] = 0  # fmt: skip
    linux_release: Annotated[
        Literal["6.18", "7.2"], _key("Whose errno to give where releases of Linux differ.")
    ] = "6.18"
    hook_deadline_seconds: Annotated[
        float,
        _key("Seconds after which a hook freezes its VM.", reloadable=True, ge=0.001, le=86400.0),
    ] = 2.0
    check_every_seconds: Annotated[
        float,
        _key(
            "Seconds between two checks of all invariants (rmemctl host check), each of which "
            "holds everything up for a sweep of the host; 0: none.",
            reloadable=True, ge=0.0, le=86400.0,
        ),
    ] = 0.0  # fmt: skip
    keeper: Annotated[
        Literal["auto", "on", "off"],
        _key(
            "Whether a small process keeps guests' memory beyond the daemon's death and starts it "
            "again. auto: unless the service manager has a descriptor store for it, which then "
            "does that; off: its memory goes with the daemon."
        ),
    ] = "auto"
    restart_delay_max_seconds: Annotated[
        float,
        _key(
            "The longest pause before the keeper starts a daemon again that dies again and again; "
            "0: none.",
            ge=0.0, le=86400.0,
        ),
    ] = 5.0  # fmt: skip
    crash_loop_starts: Annotated[
        int,
        _key(
            "After so many starts in a row, each less than 10 s after the one before, the daemon "
            "keeps its memory and changes nothing any more (safe mode); 0: never.",
            ge=0, le=1000,
        ),
    ] = 10  # fmt: skip
    watched_transactions: Annotated[
        int,
        _key(
            "Transactions after each such check that are watched for what no state shows, which "
            "more than doubles what they cost; 0: none.",
            reloadable=True, ge=0, le=1_000_000,
        ),
    ] = 0  # fmt: skip
    log_level: Annotated[
        Literal["debug", "info", "warning"], _key("The least that is logged.", reloadable=True)
    ] = "info"
    log_format: Annotated[
        Literal["auto", "console", "json"],
        _key("For people, or a JSON object a line; auto: console where stderr is a terminal."),
    ] = "auto"
    debuggable: Annotated[
        bool,
        _key(
            "Leave the process open to debuggers of the same user and to core dumps, which hold "
            "guests' plaintext."
        ),
    ] = False


class AccessSection(Section, frozen=True):
    """[access]: who may call."""

    mode: Annotated[
        Literal["private", "shared"],
        _key(
            "private: the socket directory is the daemon's user's alone, and a call without a "
            "token is that user as admin. shared: other uids may connect, and every call needs a "
            "token."
        ),
    ] = "private"
    admins: Annotated[
        tuple[str, ...],
        _key(
            "Tenants that are admins beside the daemon's own user.", reloadable=True,
            read=tenants_of, legal='a list of "uid:N" and "spiffe://DOMAIN/PATH"',
            schema={"items": {"type": "string"}},
        ),
    ] = ()  # fmt: skip


class TcpSection(Section, frozen=True):
    """[tcp]: the door for remote clients."""

    listen: Annotated[str, _address_key("Address that gRPC is served on over TCP.")] = ""
    certificate: Annotated[Path | None, _file_key("PEM chain of the server, leaf first.")] = None
    key: Annotated[Path | None, _file_key("PEM private key of the certificate.")] = None
    client_ca: Annotated[
        Path | None, _file_key("PEM certificates of those who vouch for clients.")
    ] = None
    insecure: Annotated[
        bool, _key("Serve without TLS; on a loopback address only, and anybody there is let in.")
    ] = False
    trust_domain: Annotated[
        str,
        _key(
            "Take clients of this SPIFFE trust domain only; empty: of any that the CA vouches for.",
            read=text_if(re.compile(DOMAIN).fullmatch), legal='such as "example.org", or ""',
        ),
    ] = ""  # fmt: skip


class TenantLimits(Section, frozen=True):
    """What one tenant may have at most; -1: no limit."""

    frames: Annotated[int, _limit_key("Frames of 4 KiB")] = UNLIMITED
    pinned_pages: Annotated[int, _limit_key("Pages pinned at a time")] = UNLIMITED
    sessions: Annotated[int, _limit_key("Sessions open at a time")] = 256
    fds: Annotated[int, _limit_key("Descriptors of the daemon")] = 1024
    watches: Annotated[int, _limit_key("Watches open at a time")] = 8


class LimitsSection(TenantLimits, frozen=True):
    """[limits]: what each tenant may have, and in ``tenants`` what some may have instead."""

    # whole: what a tenant's table leaves out is as in [limits]
    tenants: dict[str, TenantLimits] = field(default_factory=dict)

    def of(self, tenant: str) -> TenantLimits:
        """Return a tenant's limits ("uid:1000" or a SPIFFE id)."""
        return self.tenants.get(tenant, self)


class MetricsSection(Section, frozen=True):
    """[metrics]: Prometheus, see docs/metrics.md."""

    listen: Annotated[str, _address_key("Address that metrics are served on over HTTP.")] = ""
    public: Annotated[
        bool, _key("Allow an address that other machines reach; the page has no access control.")
    ] = False


class TelemetrySection(Section, frozen=True):
    """[telemetry]: OpenTelemetry, a span a call; needs the extra rmemd[otel]."""

    otlp_endpoint: Annotated[
        str,
        _key(
            "Collector that spans go to by OTLP over gRPC.", read=text_if(is_endpoint),
            legal='"http://host:port" or, with TLS, "https://host:port"; "" for off',
        ),
    ] = ""  # fmt: skip


class Config(Section, frozen=True):
    """Everything a daemon is told."""

    daemon: DaemonSection = field(default_factory=DaemonSection)
    access: AccessSection = AccessSection()
    tcp: TcpSection = TcpSection()
    limits: LimitsSection = field(default_factory=LimitsSection)
    metrics: MetricsSection = MetricsSection()
    telemetry: TelemetrySection = TelemetrySection()


# --- rules that span keys -------------------------------------------------------------------------
def conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, what is legal there) of every key that does not go with another."""
    daemon, tcp, metrics = config.daemon, config.tcp, config.metrics
    if not daemon.nodes * NODE_MIN_BYTES <= daemon.host_memory_bytes <= MEMORY_MAX_BYTES:
        yield "daemon.host_memory", f"2M a node at least ({daemon.nodes} here), and 16T at most"
    if metrics.listen and not metrics.public and not is_loopback(metrics.listen):
        yield "metrics.listen", "a loopback address, unless metrics.public is true"
    files = {"certificate": tcp.certificate, "key": tcp.key, "client_ca": tcp.client_ca}
    if tcp.insecure:
        if tcp.listen and not is_loopback(tcp.listen):
            yield "tcp.listen", "a loopback address where tcp.insecure is true"
        for name, path in files.items():
            if path is not None:
                yield f"tcp.{name}", '"" where tcp.insecure is true: nothing would read it'
    elif tcp.listen:
        for name, path in files.items():
            if path is None:
                yield f"tcp.{name}", "a path, since tcp.listen is set and tcp.insecure is not"
    for name, path in files.items():
        if path is not None and not path.is_file():
            yield f"tcp.{name}", "a file that exists"


# --- what keys there are --------------------------------------------------------------------------
class Key(Struct, frozen=True):
    """One key as the file spells it: ``section``.``name``; ``attribute`` is the struct's."""

    section: str
    name: str
    attribute: str
    hint: Any
    meta: Meta
    default: Any

    @property
    def spelt(self) -> str:
        """Return "section.name"."""
        return f"{self.section}.{self.name}"

    @property
    def description(self) -> str:
        """Return what the key means."""
        return self.meta.description or ""

    @property
    def reloadable(self) -> bool:
        """Return whether SIGHUP applies a change."""
        return bool((self.meta.extra or {})["reloadable"])

    @property
    def read(self) -> Callable[[object], object] | None:
        """Return the reader of a value that its type alone does not say."""
        reader: Callable[[object], object] | None = (self.meta.extra or {})["read"]
        return reader

    @property
    def default_text(self) -> str:
        """Return the name of a default that is computed, "" where ``default`` is the value."""
        return str((self.meta.extra or {})["default"])

    @property
    def is_text(self) -> bool:
        """Return whether its value is a string in the file, so that --set needs no quotes."""
        base = get_args(self.hint)[0]
        if get_origin(base) is Literal:
            return True
        return base is str or Path in (base, *get_args(base)) or self.read is size_of

    @property
    def legal(self) -> str:
        """Return what the key takes, in words."""
        said = str((self.meta.extra or {})["legal"])
        base = get_args(self.hint)[0]
        if said:
            return said
        if get_origin(base) is Literal:
            return "one of " + ", ".join(f'"{value}"' for value in get_args(base))
        if base is bool:
            return "true or false"
        kind = "a whole number" if base is int else "a number"
        return f"{kind} from {self.meta.ge:g} to {self.meta.le}"


@cache
def sections() -> dict[str, type[Section]]:
    """Return the sections by name."""
    return dict(get_type_hints(Config))


@cache
def keys() -> MappingProxyType[str, Key]:
    """Return every key by its spelling; those of a tenant's table are [limits]'s."""
    found = {}
    for section, cls in sections().items():
        for one in fields(cls):
            metadata = getattr(one.type, "__metadata__", ())
            meta = next((m for m in metadata if isinstance(m, Meta)), None)
            if meta is not None:
                default = one.default_factory() if callable(one.default_factory) else one.default
                spelt = one.encode_name
                found[f"{section}.{spelt}"] = Key(section, spelt, one.name, one.type, meta, default)
    return MappingProxyType(found)
