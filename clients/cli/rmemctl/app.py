"""What every command shares: the global options, the settings they make, the lazy client.

Owns ``Settings`` (click's context object) and the command classes that accept the global options
in either place: ``rmemctl -o json vm list`` and ``rmemctl vm list -o json``. A command that shows
state says so (``watchable``), and is then run again whenever something happened. Imports neither
grpc nor rich, so that ``--help`` is fast.
"""

from __future__ import annotations

import os
import sys
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rmem_client import Client

    from .output import Output

FORMATS = ["table", "json", "jsonl", "name", "dot"]
HINT = "`rmemctl watch` prints events"
# what Tab may take: a shell waits for it
COMPLETION_DEADLINE_S = 1.0


class Settings:
    """What the global options say, and the client and the output that follow from it."""

    def __init__(self) -> None:
        self.socket_dir: str | None = None
        self.output: str = "table"
        self.no_headers: bool = False
        self.watch: bool = False
        self.stream: IO[str] = sys.stdout
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The client, made when it is first needed (importing grpc takes 70 ms)."""
        if self._client is None:
            self._client = _client_class()(self.socket_dir)
        return self._client

    def completion_client(self) -> Client:
        """Make the client for completions, which does not wait long."""
        if self._client is None:
            self._client = _client_class()(
                self.socket_dir, deadline_s=COMPLETION_DEADLINE_S, reconnect_s=0
            )
        return self._client

    @property
    def out(self) -> Output:
        """Where a command's result goes."""
        from .output import Output

        return Output(self.output, headers=not self.no_headers, stream=self.stream)

    def close(self) -> None:
        """Close the client, if there is one."""
        if self._client is not None:
            self._client.close()


def _client_class() -> type[Client]:
    # gRPC's C core logs failed connections by itself; the error says it better
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from rmem_client import Client

    return Client


def _store(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep what was given; an option that was not given here may have been given before."""
    if value is not None and value is not False and param.name is not None:
        setattr(ctx.ensure_object(Settings), param.name, value)


def global_options(*, hidden: bool = False) -> list[click.Parameter]:
    """Return the global options, which write into the settings and reach no function."""
    return [
        click.Option(
            ["--socket-dir"],
            metavar="DIR",
            callback=_store,
            expose_value=False,
            hidden=hidden,
            help="Directory of the daemon's socket [default: $RMEMD_SOCKET_DIR, then "
            "$XDG_RUNTIME_DIR/rmemd, then /run/rmemd for root, /tmp/rmemd-UID otherwise].",
        ),
        click.Option(
            ["-o", "--output"],
            type=click.Choice(FORMATS),
            callback=_store,
            expose_value=False,
            hidden=hidden,
            help="How to print the result [default: table]. json is one object, jsonl one line "
            "per item, name only the handles; dot is for graphs.",
        ),
        click.Option(
            ["--no-headers"],
            is_flag=True,
            callback=_store,
            expose_value=False,
            hidden=hidden,
            help="Leave the header lines of tables out.",
        ),
        click.Option(
            ["-w", "--watch"],
            is_flag=True,
            callback=_store,
            expose_value=False,
            hidden=hidden,
            help="Show it again whenever something happens, until interrupted; for commands that "
            "show state.",
        ),
    ]


class Command(click.Command):
    """A command that takes the global options after its name too.

    Args:
        watchable: whether it only shows state, so that --watch can run it again.
        graph: whether it has a graph to draw, so that it takes -o dot.
    """

    def __init__(
        self, *args: Any, watchable: bool = False, graph: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.watchable = watchable
        self.graph = graph
        self.params += global_options(hidden=True)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it, once or whenever something happened."""
        settings = ctx.ensure_object(Settings)
        if settings.output == "dot" and not self.graph:
            raise click.UsageError("-o dot is for commands that show a graph (host graph)", ctx)
        if not settings.watch:
            return super().invoke(ctx)
        if not self.watchable:
            raise click.UsageError(f"--watch is for commands that show state; {HINT}", ctx)
        from .follow import follow

        follow(settings, lambda: super(Command, self).invoke(ctx))


class Group(click.Group):
    """A group of such commands, listed in the order in which they were written."""

    command_class = Command
    group_class = type

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in their own order: look, make, change, destroy."""
        return list(self.commands)


def _chosen(ctx: click.Context, param: click.Parameter, value: bool | None) -> bool:
    """Insist on one of two flags: click takes neither for an answer, even when required."""
    if value is None:
        raise click.UsageError("say what they are to be: --private or --shared", ctx)
    return value


private_option = click.option(
    "--private/--shared", default=None, callback=_chosen, help="What they are to be (required)."
)

pass_settings = click.make_pass_decorator(Settings, ensure=True)
