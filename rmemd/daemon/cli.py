"""The command ``rmemd``: options, signals, exit codes.

Owns the command line. Exit codes: 2 usage, as click's programs have it; then those of sysexits: 65
a journal that this version cannot read, 73 cannot create, 75 another daemon serves the directory,
77 unsafe directory, 78 configuration; 133 it makes way for its successor.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from rmemd.daemon.lean import lean

with lean():
    from pathlib import Path

    import click

    from rmemd.daemon.tracecli import trace

if TYPE_CHECKING:
    from rmemd.daemon.app import Daemon
    from rmemd.daemon.configload import Loaded, Sources
    from rmemd.daemon.kept import Kept

EX_USAGE, EX_DATAERR, EX_CANTCREAT, EX_TEMPFAIL, EX_NOPERM, EX_CONFIG = 2, 65, 73, 75, 77, 78
ENDING = (signal.SIGTERM, signal.SIGINT)


class Size(click.ParamType[int]):
    """A number of bytes, with K, M, G or T."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the bytes."""
        from rmemd.daemon.values import size_of

        try:
            return size_of(value)
        except ValueError:
            self.fail(f"{value!r} is not a size such as 16G", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rmemd")
def main() -> None:
    """rmemd, a plugin-based mock hypervisor daemon: no hardware isolation."""


def _sources(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say where its configuration is."""
    command = click.option(
        "--set", "sets", multiple=True, metavar="KEY=VALUE",
        help="Override a key, as in daemon.nodes=2; repeatable.",
    )(command)  # fmt: skip
    return click.option(
        "--config", "file", type=click.Path(path_type=Path),
        help="Configuration. Default: $XDG_CONFIG_HOME/rmemd/rmemd.toml, /etc/rmemd/rmemd.toml "
        "for root; it may be absent.",
    )(command)  # fmt: skip


@main.command()
@_sources
@click.option(
    "--socket-dir", type=click.Path(), help="Private directory to serve in.  [daemon.socket_dir]"
)
@click.option("--ready-fd", type=int, help="Descriptor that gets a line once the daemon serves.")
@click.option("--host-memory", type=Size(), help="Mock host memory.  [daemon.host_memory: 16G]")
@click.option("--nodes", type=click.IntRange(1, 64), help="NUMA nodes.  [daemon.nodes: 1]")
@click.option("--seed", type=int, help="Seed of every key.  [daemon.seed: 0]")
@click.option(
    "--linux-release", type=click.Choice(["6.18", "7.2"]),
    help="Whose errno to give where releases differ.  [daemon.linux_release: 6.18]",
)  # fmt: skip
@click.option(
    "--hook-deadline", type=click.FloatRange(min=0.001),
    help="Seconds after which a hook freezes its VM.  [daemon.hook_deadline_seconds: 2]",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning"]),
    help="The least that is logged.  [daemon.log_level: info]",
)  # fmt: skip
@click.option(
    "--log-json/--log-console", default=None,
    help="Default: console on a tty.  [daemon.log_format: auto]",
)  # fmt: skip
@click.option(
    "--keeper/--no-keeper",
    default=None,
    help="Whether a keeper process keeps guests' memory.  [daemon.keeper: auto]",
)
@click.option("--tcp", metavar="HOST:PORT", help="Serve over TCP too.  [tcp.listen]")
@click.option(
    "--insecure", is_flag=True, help="Without TLS, on loopback only.  [tcp.insecure: false]"
)
def serve(file: Path | None, sets: tuple[str, ...], ready_fd: int | None, **options: Any) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends at once. SIGHUP reads the configuration
    anew. Options override --set, which overrides the file; in brackets: the key, and its default.

    This process becomes a small keeper, which starts the daemon again should it die, with all of
    guests' memory; see docs/operating.md.
    """
    # what a start makes stays: nothing to collect now, nor to go over later
    gc.disable()
    # imported where they are needed, so that --help is answered without NumPy and gRPC
    with lean():
        from rmemd.daemon import logs
        from rmemd.daemon.configload import Sources

    sources = Sources(file, sets, _overrides(options))
    loaded = _load(sources)
    settings = loaded.config.daemon
    # nobody else's: directories that are made first, then the socket and the lock
    os.umask(0o077)
    logs.configure(
        settings.log_level, {"json": True, "console": False, "auto": None}[settings.log_format]
    )
    from rmemd.daemon.hardening import harden
    from rmemd.daemon.lean import settle

    kept = _kept(loaded, ready_fd)
    harden(settings.debuggable)
    daemon = _started(loaded, sources, ready_fd if kept.is_first else None, kept)
    settle()
    status = daemon.wait()
    if status:
        # who makes way goes as if killed: nothing is waited for that a successor goes on with
        sys.stderr.flush()
        os._exit(status)


def _overrides(options: dict[str, Any]) -> dict[str, tuple[str, object]]:
    """Return the options that were given, by the key that each overrides."""
    if options["log_json"] is not None:
        options["log_json"] = "json" if options["log_json"] else "console"
    if options["keeper"] is not None:
        options["keeper"] = "on" if options["keeper"] else "off"
    keys = {
        "socket_dir": ("daemon.socket_dir", "--socket-dir"),
        "host_memory": ("daemon.host_memory", "--host-memory"),
        "nodes": ("daemon.nodes", "--nodes"),
        "seed": ("daemon.seed", "--seed"),
        "linux_release": ("daemon.linux_release", "--linux-release"),
        "hook_deadline": ("daemon.hook_deadline_seconds", "--hook-deadline"),
        "log_level": ("daemon.log_level", "--log-level"),
        "log_json": ("daemon.log_format", f"--log-{options['log_json']}"),
        "keeper": ("daemon.keeper", f"--{'' if options['keeper'] == 'on' else 'no-'}keeper"),
        "tcp": ("tcp.listen", "--tcp"),
        "insecure": ("tcp.insecure", "--insecure"),
    }
    return {
        key: (option, options[name])
        for name, (key, option) in keys.items()
        if options[name] not in (None, False)
    }


def _load(sources: Sources) -> Loaded:
    """Return the configuration, or end with everything that is wrong with it."""
    from rmemd.daemon.configload import ConfigError

    try:
        return sources.load()
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"rmemd: {problem}", err=True)
        sys.exit(EX_USAGE if error.is_usage else EX_CONFIG)


def _kept(loaded: Loaded, ready_fd: int | None) -> Kept:
    """Have the daemon kept; what returns may be a child of the process that was started."""
    from rmemd.daemon.kept import begin

    with _failures():
        return begin(loaded.config.daemon, loaded.config.access.mode == "shared", ready_fd)
    raise AssertionError("unreachable: failing exits")


def _started(loaded: Loaded, sources: Sources, ready_fd: int | None, kept: Kept) -> Daemon:
    from rmemd.daemon.switches import set_switches

    set_switches(os.environ)
    with lean():
        from rmemd.daemon.app import Daemon
    from rmemd.daemon.kept import OWN
    from rmemd.daemon.telemetry import ExtraMissing
    from rmemd.store.values import JournalUnreadable

    with _failures():
        try:
            daemon = Daemon(loaded.config, sources, kept)
        except ExtraMissing as error:
            _fail(error, EX_CONFIG)
        except JournalUnreadable as error:
            _fail(error, EX_DATAERR)
        os.umask(0o177)
        # our keeper sees to a second signal, and passes on a first one that we may have got too
        _on_signals(daemon.stop, daemon.wakeup_fd, repeats=kept.by != OWN)
        daemon.start(ready_fd)
        return daemon
    raise AssertionError("unreachable: failing exits")


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Exit with what is said of a failure to start."""
    from rmemd.daemon.sockets import AlreadyServed, UnsafeDirectory

    try:
        yield
    except AlreadyServed as error:
        _fail(error, EX_TEMPFAIL)
    except UnsafeDirectory as error:
        _fail(error, EX_NOPERM)
    except (OSError, RuntimeError) as error:
        _fail(error, EX_CANTCREAT)


def _on_signals(stop: Callable[[], None], wakeup_fd: int, repeats: bool) -> None:
    def end(number: int, frame: object) -> None:
        if repeats:
            signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
        else:
            # Python gives handlers up before its end, when a repetition may still be on its way
            for ignored in ENDING:
                signal.signal(ignored, signal.SIG_IGN)
        stop()

    # full of reloads that are still to be done: one more says nothing new
    signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
    for number in ENDING:
        signal.signal(number, end)
    # the byte that the system puts into the pipe is all there is to do; it needs a handler to be
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def _fail(error: Exception, code: int) -> NoReturn:
    click.echo(f"rmemd: {error}", err=True)
    sys.exit(code)


@main.command()
def unit() -> None:
    """Write a unit for systemd that has this rmemd kept by its descriptor store."""
    template = Path(__file__).with_name("rmemd.service").read_text()
    click.echo(template.replace("@RMEMD@", str(Path(sys.argv[0]).absolute())), nl=False)


# --- rmemd config ---------------------------------------------------------------------------------
@main.group()
def config() -> None:
    """What the daemon is told: docs/configuration.md has every key."""


@config.command()
@_sources
def check(file: Path | None, sets: tuple[str, ...]) -> None:
    """Say everything that is wrong with a configuration; exit with 78 if anything is."""
    from rmemd.daemon.configload import Sources

    loaded = _load(Sources(file, sets))
    click.echo(f"{loaded.file or 'no file'}: valid")


@config.command()
@_sources
def dump(file: Path | None, sets: tuple[str, ...]) -> None:
    """Write the settings in effect as TOML, each with where it is from."""
    from rmemd.daemon.configload import Sources
    from rmemd.daemon.configshow import dump as text

    click.echo(text(_load(Sources(file, sets))), nl=False)


@config.command()
def schema() -> None:
    """Write the JSON schema of the file."""
    from rmemd.daemon.configshow import schema as text

    click.echo(text())


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--server", "servers", multiple=True, metavar="NAME",
    help="Name or address of the server, beside localhost, 127.0.0.1 and ::1; repeatable.",
)  # fmt: skip
@click.option(
    "--client", "clients", multiple=True, metavar="SPIFFE-ID",
    help="A client, as in spiffe://rmemd.test/tenant/a; repeatable.",
)  # fmt: skip
@click.option(
    "--days", type=click.IntRange(1, 3650), default=30, show_default=True, help="How long valid."
)
@click.option(
    "--expired", multiple=True, metavar="SPIFFE-ID",
    help="A client whose certificate is out of date already; repeatable.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def certs(
    directory: Path,
    servers: tuple[str, ...],
    clients: tuple[str, ...],
    days: int,
    expired: tuple[str, ...],
    force: bool,
) -> None:
    """Make a test CA, a server certificate and client certificates in DIRECTORY, and write the
    lines for rmemd.toml. The CA's key stays there too: not for production.
    """
    from rmemd.daemon.certs import CertificateError, Wanted, make

    try:
        made = make(directory, Wanted(servers, clients, days, expired, force))
    except (CertificateError, OSError) as error:
        _fail(error, EX_CANTCREAT)
    for certificate, key in made.files.values():
        click.echo(f"# {certificate} and {key.name}")
    click.echo(made.toml)


main.add_command(trace)
