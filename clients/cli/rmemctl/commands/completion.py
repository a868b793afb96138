"""``rmemctl completion``: the script that teaches a shell rmemctl's commands and handles."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ..app import Command, Settings, pass_settings

PROGRAMME = "rmemctl"
# by this variable the scripts ask for completions
VARIABLE = "_RMEMCTL_COMPLETE"
SHELLS = ["bash", "zsh", "fish"]


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
@pass_settings
def completion(settings: Settings, ctx: click.Context, shell: str) -> None:
    """Print the completion script for a SHELL.

    \b
    bash:  eval "$(rmemctl completion bash)"                    in ~/.bashrc
    zsh:   eval "$(rmemctl completion zsh)"                     in ~/.zshrc
    fish:  rmemctl completion fish > ~/.config/fish/completions/rmemctl.fish

    VMs, files, pins, rules, jobs and consumers are completed from the daemon, if it is there.
    """
    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"no completions for {shell}")
    script = made(ctx.find_root().command, {}, PROGRAMME, VARIABLE).source()
    settings.out.show({"shell": shell, "script": script}, names=[])
    if settings.output == "table":
        settings.out.line(script)


COMMANDS = [completion]
