"""``rmem-vmm``: one guest by default, or ``rmem-vmm scenario`` for what VMMs do with memory."""

from __future__ import annotations

import click

from .scenario import scenario
from .vmm import main as run


class WithDefault(click.Group):
    """A group whose first command is meant where none is named: ``rmem-vmm --consumer …``."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take options that come first for those of ``run``."""
        if args and args[0] not in self.commands and args[0].startswith("-"):
            args = ["run", *args]
        return super().resolve_command(ctx, args)


@click.group(
    cls=WithDefault,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)
def main() -> None:
    """A multi-process VMM on rmemd, a mock hypervisor daemon.

    Without a command, the options are those of `run`.
    """


main.add_command(run, "run")
main.add_command(scenario, "scenario")


if __name__ == "__main__":
    main()
