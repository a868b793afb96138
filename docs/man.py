"""Makes the man pages of rmemctl and rmemd from their commands, as click knows them.

``python docs/man.py build/man`` writes one page per command, as git has them: ``rmemctl.1``,
``rmemctl-vm-list.1``. The text is that of --help, so that neither can lag behind the other; there
is no date in it, so that equal commands make equal pages.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path

import click

# programme: (its root command, the distribution that has its version)
PROGRAMMES = {
    "rmemctl": ("rmemctl.main:cli", "rmemctl"),
    "rmemd": ("rmemd.daemon.cli:main", "rmemd"),
}
MANUAL = "rmemd manual"
# what click marks a paragraph with that is to keep its lines
AS_IT_IS = "\b"


@dataclass(frozen=True)
class Page:
    """One command and the place that it has: ``words`` are what one types for it."""

    words: tuple[str, ...]
    context: click.Context
    version: str

    @property
    def name(self) -> str:
        """Return the page's name."""
        return "-".join(self.words)

    @property
    def command(self) -> click.Command:
        """Return the command."""
        return self.context.command

    def text(self) -> str:
        """Return the page in roff."""
        source = f"{self.words[0]} {self.version}"
        lines = [f'.TH "{quote(self.name.upper())}" "1" "" "{quote(source)}" "{MANUAL}"']
        lines += [".SH NAME", f"{quote(self.name)} \\- {quote(summary(self.command))}"]
        lines += [".SH SYNOPSIS", f".B {quote(' '.join(self.words))}", self._usage()]
        lines += [".SH DESCRIPTION", *paragraphs(self.command.help or "")]
        lines += section(".SH OPTIONS", options(self.context))
        lines += section(".SH COMMANDS", self._commands())
        lines += section(".SH NOTES", paragraphs(self.command.epilog or ""))
        lines += section(".SH SEE ALSO", self._see_also())
        return "\n".join(lines) + "\n"

    def _usage(self) -> str:
        pieces = self.command.collect_usage_pieces(self.context)
        return quote(" ".join(pieces))

    def _commands(self) -> Iterator[str]:
        for below in self.below():
            yield ".TP"
            yield f".BR {quote(below.name)} (1)"
            yield quote(summary(below.command))

    def _see_also(self) -> Iterator[str]:
        if len(self.words) > 1:
            root = self.words[0]
            if any(getattr(parameter, "hidden", False) for parameter in self.command.params):
                yield f"The options of {bold(root)}(1) may also follow this command."
                yield ".PP"
            above = {root: None, "-".join(self.words[:-1]): None}
            yield ", ".join(f"{bold(name)}(1)" for name in above)

    def below(self) -> Iterator[Page]:
        """Yield the pages of the commands below this one."""
        if not isinstance(self.command, click.Group):
            return
        for name in self.command.list_commands(self.context):
            found = self.command.get_command(self.context, name)
            if found is not None and not found.hidden:
                context = click.Context(
                    found, info_name=name, parent=self.context, **found.context_settings
                )
                yield Page((*self.words, name), context, self.version)

    def all(self) -> Iterator[Page]:
        """Yield this page and every one below it."""
        yield self
        for page in self.below():
            yield from page.all()


def pages() -> Iterator[Page]:
    """Yield every page there is."""
    for programme, (where, distribution) in PROGRAMMES.items():
        module, _, attribute = where.partition(":")
        root: click.Command = getattr(import_module(module), attribute)
        context = click.Context(root, info_name=programme, **root.context_settings)
        yield from Page((programme,), context, version(distribution)).all()


def summary(command: click.Command) -> str:
    """Return what a command does, in one line."""
    return command.get_short_help_str(limit=200).rstrip(".")


def options(context: click.Context) -> Iterator[str]:
    """Yield the options that are shown, with what --help says of each."""
    for parameter in context.command.get_params(context):
        names, text = parameter.get_help_record(context) or ("", "")
        # an argument without a text of its own is told of in the description
        if not text:
            continue
        yield ".TP"
        yield bold(names)
        yield quote(text)


def paragraphs(text: str) -> Iterator[str]:
    """Yield a text's paragraphs; those that are marked keep their lines."""
    for paragraph in re.split(r"\n\s*\n", cleaned(text)):
        lines = paragraph.split("\n")
        if lines and lines[0].strip() == AS_IT_IS:
            yield from (".PP", ".nf", *map(quote, lines[1:]), ".fi")
        elif paragraph.strip():
            yield from (".PP", quote(" ".join(line.strip() for line in lines)))


def cleaned(text: str) -> str:
    """Return a docstring without its indentation and what click leaves out after a form feed."""
    return cleandoc(text.partition("\f")[0])


def section(heading: str, lines: Iterator[str]) -> list[str]:
    """Return a section, or nothing if it has no lines."""
    found = list(lines)
    return [heading, *found] if found else []


def bold(text: str) -> str:
    """Set a text in bold."""
    return rf"\fB{quote(text)}\fR"


def quote(text: str) -> str:
    """Write a text so that roff takes it for nothing else."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    # a line that begins with one of these would be a request
    return "\\&" + text if text.startswith((".", "'")) else text


def write(directory: Path) -> list[Path]:
    """Write every page; return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for page in pages():
        path = directory / f"{page.name}.1"
        path.write_text(page.text())
        written.append(path)
    return written


def main() -> int:
    """Write the pages into the directory that is named."""
    parser = argparse.ArgumentParser(description="make the man pages")
    parser.add_argument("directory", type=Path)
    written = write(parser.parse_args().directory)
    print(f"{len(written)} pages in {written[0].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
