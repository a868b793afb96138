"""What every command shares: the global options, the settings they make, the lazy client.

Owns ``Settings`` (click's context object) and the command classes that accept the global options
in either place: ``rmemctl -o json vm list`` and ``rmemctl vm list -o json``. Imports neither grpc
nor rich, so that ``--help`` is fast.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rmem_client import Client

    from .output import Output

FORMATS = ["table", "json", "jsonl", "name"]


class Settings:
    """What the global options say, and the client and the output that follow from it."""

    def __init__(self) -> None:
        self.socket_dir: str | None = None
        self.output: str = "table"
        self.no_headers: bool = False
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The client, made when it is first needed (importing grpc takes 70 ms)."""
        if self._client is None:
            # gRPC's C core logs failed connections by itself; the error says it better
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
            from rmem_client import Client

            self._client = Client(self.socket_dir)
        return self._client

    @property
    def out(self) -> Output:
        """Where a command's result goes."""
        from .output import Output

        return Output(self.output, headers=not self.no_headers, stream=sys.stdout)

    def close(self) -> None:
        """Close the client, if there is one."""
        if self._client is not None:
            self._client.close()


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
            "per item, name only the handles.",
        ),
        click.Option(
            ["--no-headers"],
            is_flag=True,
            callback=_store,
            expose_value=False,
            hidden=hidden,
            help="Leave the header lines of tables out.",
        ),
    ]


class Command(click.Command):
    """A command that takes the global options after its name too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += global_options(hidden=True)


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
