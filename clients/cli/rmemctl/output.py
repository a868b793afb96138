"""How results are printed: tables for people, JSON for programmes, handles for shells, and dot.

Owns all writing to stdout. A command says what it has (the reply, its parts as facts and tables,
the names of its items) and ``Output`` prints the form that was asked for. rich is imported when
the first table is drawn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from .plain import to_plain

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import Console, RenderableType
    from rich.text import Text

    Reply: TypeAlias = Message | Mapping[str, Any]

# Without a terminal nobody reads the lines but programmes: never wrap them.
UNLIMITED_WIDTH = 10_000

# a column of prose may be broken into lines, but not shorter ones than this
MIN_PROSE_WIDTH = 16

# The words that a table colours, wherever they are a whole cell of a column of words.
WORD_STYLES = {
    "yes": "green", "ok": "green", "moved": "green", "finalized": "green", "private": "green",
    "shared": "cyan", "building": "yellow", "scrubbing": "yellow", "unmovable": "yellow",
    "busy": "yellow", "leaked": "magenta", "failed": "red", "dead": "red", "poisoned": "bold red",
    "quarantined": "bold red", "offline": "blue", "free": "dim", "no": "dim", "-": "dim",
    "NULL": "bold yellow", "lost": "bold red", "waits": "yellow", "was refused": "red",
    "running": "cyan", "cancelling": "yellow", "cancelled": "yellow", "done": "green",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A table's column.

    Attributes:
        header: its header.
        text: a row's text in it.
        right: align to the right, for numbers.
        words: colour the words of ``WORD_STYLES``.
        wrap: whether a narrow terminal may break it over lines; for prose.
    """

    header: str
    text: Callable[[Any], str]
    right: bool = False
    words: bool = False
    wrap: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        columns: the columns.
        rows: the rows, whatever the columns' functions take.
        title: a line above.
        empty: what to say instead if there are no rows; "" to leave the table out.
    """

    columns: Sequence[Column]
    rows: Sequence[Any]
    title: str = ""
    empty: str = ""


@dataclass(frozen=True)
class Facts:
    """Labelled lines about one thing; pairs with an empty text are left out."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Styled:
    """Text in pieces of (text, rich style), for pictures made of characters."""

    spans: Sequence[tuple[str, str]]


Part: TypeAlias = Table | Facts | Styled | str


class Output:
    """A result's way to the stream, in one of the forms table, json, jsonl, name and dot."""

    def __init__(self, form: str, *, headers: bool, stream: IO[str]) -> None:
        self.form = form
        self._headers = headers
        self._stream = stream

    @property
    def is_json(self) -> bool:
        """Whether the result goes to a programme as JSON."""
        return self.form in ("json", "jsonl")

    def show(
        self,
        reply: Reply,
        *parts: Part,
        items: Iterable[Reply] | None = None,
        names: Iterable[str] = (),
        dot: Iterable[str] = (),
    ) -> None:
        """Print a result.

        Args:
            reply: all of it, for json.
            parts: it as tables, facts and text, for table.
            items: its items, for jsonl; default: the reply as the only one.
            names: its items' handles, for name.
            dot: the lines of it as a graph, for dot.
        """
        match self.form:
            case "json":
                self.line(json.dumps(to_plain(reply), indent=2, ensure_ascii=False))
            case "jsonl":
                for item in [reply] if items is None else items:
                    self.json_line(item)
            case "name":
                for name in names:
                    self.line(name)
            case "dot":
                for text in dot:
                    self.line(text)
            case _:
                self._show_parts(parts)

    def json_line(self, item: Reply) -> None:
        """Print one JSON object on one line, at once: a reader may wait for it."""
        self.line(json.dumps(to_plain(item), ensure_ascii=False))
        self._stream.flush()

    def line(self, text: str) -> None:
        """Print a line as it is."""
        self._stream.write(text + "\n")

    def words(self, cells: Sequence[tuple[str, int]]) -> None:
        """Print one line of (text, width) at once, coloured like a table's: for streams."""
        console = self._console()
        spans = [
            (text if width == 0 else text.ljust(width) + "  ", WORD_STYLES.get(text, ""))
            for text, width in cells
        ]
        self._print(console, _styled(spans))
        self._stream.flush()

    def _show_parts(self, parts: Sequence[Part]) -> None:
        shown = [part for part in parts if part and not _left_out(part)]
        for index, part in enumerate(shown):
            console = self._console(_needed_width(part))
            # lines of text belong together, everything else stands alone
            if (
                index
                and self._headers
                and not (isinstance(part, str) and isinstance(shown[index - 1], str))
            ):
                self.line("")
            if isinstance(part, Table) and part.title and self._headers:
                self._print(console, _styled([(part.title, "bold")]))
            self._print(console, self._render(part))

    def _render(self, part: Part) -> RenderableType:
        match part:
            case Table(rows=[]):
                return _styled([(part.empty, "dim")])
            case Table():
                return _table(part, self._headers)
            case Facts():
                return _facts(part)
            case Styled():
                return _styled(part.spans)
            case _:
                return _styled([(part, "")])

    def _console(self, needed_width: int = 0) -> Console:
        """Return a console that is wide enough: a line too long is better than one cut short."""
        from rich.console import Console

        columns = os.environ.get("COLUMNS", "")
        width = (int(columns) if columns.isdecimal() else 0) or None
        if width is None and not self._stream.isatty():
            width = UNLIMITED_WIDTH
        # NO_COLOR: plain text altogether; rich alone would keep bold and dim
        system: Any = None if os.environ.get("NO_COLOR") else "auto"
        console = Console(file=self._stream, width=width, color_system=system, highlight=False)
        if console.width < needed_width:
            console.width = needed_width
        return console

    def _print(self, console: Console, renderable: RenderableType) -> None:
        with console.capture() as captured:
            console.print(renderable, soft_wrap=False)
        # rich fills cells up to their width; nobody wants the blanks at the end of a line
        for line in captured.get().rstrip("\n").split("\n"):
            self.line(line.rstrip())


def _left_out(part: Part) -> bool:
    if isinstance(part, Facts):
        return not any(text for _, text in part.pairs)
    return isinstance(part, Table) and not part.rows and not part.empty


def _needed_width(part: Part) -> int:
    """Return the width below which a table would lose what its columns say, or a word be broken."""
    if isinstance(part, str):
        return max(map(len, part.split()), default=0)
    if not isinstance(part, Table):
        return 0
    widths = [
        MIN_PROSE_WIDTH
        if column.wrap
        else max([*map(len, column.header.split("\n")), *(len(column.text(r)) for r in part.rows)])
        for column in part.columns
    ]
    return sum(widths) + 2 * (len(widths) - 1)


def _table(part: Table, headers: bool) -> RenderableType:
    from rich.table import Table as RichTable

    table = RichTable(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=headers, header_style="dim"
    )
    for column in part.columns:
        table.add_column(
            column.header,
            justify="right" if column.right else "left",
            no_wrap=not column.wrap,
            vertical="top",
        )
    for row in part.rows:
        table.add_row(*(_cell(column, row) for column in part.columns))
    return table


def _cell(column: Column, row: Any) -> Text:
    text = column.text(row)
    style = WORD_STYLES.get(text, "") if column.words or text == "-" else ""
    return _styled([(text, style)])


def _facts(part: Facts) -> RenderableType:
    from rich.table import Table as RichTable

    table = RichTable.grid(padding=(0, 3, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in part.pairs:
        if text:
            table.add_row(label, _styled([(text, WORD_STYLES.get(text, ""))]))
    return table


def _styled(spans: Iterable[tuple[str, str]]) -> Text:
    """Build text from spans; never markup, as what the daemon says may have brackets in it."""
    from rich.text import Text

    return Text.assemble(*spans)
