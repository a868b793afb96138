"""Numbers as people type and read them: addresses, sizes, page ranges, handles.

Owns parsing, formatting and the click parameter types made of them. Page ranges are printed as
they are typed, START-END; sizes exactly, unless that takes five digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import click
from click.shell_completion import CompletionItem

from . import complete

PAGE_BYTES = 4096
SUFFIXES = ["", "K", "M", "G", "T"]

_NUMBER = re.compile(r"(0x[0-9a-f_]+|[0-9][0-9_]*)", re.IGNORECASE)
_SIZE = re.compile(rf"{_NUMBER.pattern}\s*(?:([KMGT])(?:iB)?)?", re.IGNORECASE)
_PAGES = re.compile(rf"{_NUMBER.pattern}(?:([+-]){_NUMBER.pattern})?", re.IGNORECASE)

Value = TypeVar("Value")


def parse_size(text: str) -> int:
    """Return the bytes that "4096", "0x1000", "4K", "4 KiB" mean; raises ValueError."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is no size or address; write 4096, 0x1000, 4K, 2M, 1G or 1T")
    number, suffix = found.groups()
    return _integer(number) << 10 * SUFFIXES.index((suffix or "").upper())


def parse_pages(text: str) -> tuple[int, int]:
    """Return (start, npages) of "START", "START+COUNT" or "START-END" (END not included)."""
    found = _PAGES.fullmatch(text.strip())
    if not found:
        raise ValueError(
            f"{text!r} is no page range; write START, START+COUNT or START-END, in pages"
        )
    first, sign, second = found.groups()
    start = _integer(first)
    if sign is None:
        return start, 1
    npages = _integer(second) - (start if sign == "-" else 0)
    if npages < 1:
        raise ValueError(f"the page range {text!r} is empty; END is the page after the last")
    return start, npages


def parse_page(text: str) -> int:
    """Return a page's number (pfn, gfn or pgoff); suffixes are for bytes, so there are none."""
    found = _PAGES.fullmatch(text.strip())
    if not found or found.group(2):
        raise ValueError(f"{text!r} is no page number; write 66 or 0x42")
    return _integer(text.strip())


def parse_handle(text: str, kind: str) -> int:
    """Return the number of a handle, written "3" or "vm/3"."""
    number = text.removeprefix(f"{kind}/")
    if not number.isdecimal():
        raise ValueError(f"{text!r} is no {kind}; write its number, or {kind}/NUMBER")
    return int(number)


def parse_operation(text: str) -> str:
    """Return a long job's name, written "3" or "operations/3"."""
    return f"operations/{parse_handle(text, 'operations')}"


def parse_setting(text: str) -> tuple[str, str]:
    """Return (key, value) of "KEY=VALUE"."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"{text!r} is no setting; write KEY=VALUE")
    return key, value


def _integer(text: str) -> int:
    return int(text, 16 if text[:2].lower() == "0x" else 10)


def size_text(nbytes: int) -> str:
    """Write a size: exactly ("2 MiB", "1996 KiB"), or rounded where that is long ("234.4 MiB")."""
    if nbytes < 1024:
        return f"{nbytes} B" if nbytes else "0"
    units = [(1 << 10 * exponent, suffix) for exponent, suffix in enumerate(SUFFIXES)]
    for unit, suffix in reversed(units[1:]):
        if nbytes % unit == 0 and nbytes // unit < 10_000:
            return f"{nbytes // unit} {suffix}iB"
    unit, suffix = max(one for one in units if one[0] <= nbytes)
    return f"{nbytes / unit:.1f} {suffix}iB"


def pages_text(npages: int) -> str:
    """Write a page count as the memory that it is."""
    return size_text(npages * PAGE_BYTES)


def range_text(start: int, npages: int) -> str:
    """Write a page range: "0x40" for one page, else "0x40-0x80" (the end not included)."""
    return f"{start:#x}" if npages == 1 else f"{start:#x}-{start + npages:#x}"


def count_text(number: int, noun: str) -> str:
    """Write a number with its noun: "1 page", "2 pages"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Parsed(click.ParamType[Any], Generic[Value]):
    """A parameter that ``parse`` turns into its value, saying what is wrong if it cannot.

    ``known`` asks the daemon what it may be, for completions.
    """

    def __init__(
        self,
        name: str,
        parse: Callable[[str], Value],
        known: complete.Known = complete.nothing,
    ) -> None:
        self.name = name
        self._parse = parse
        self._known = known

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Return what it may be that begins with what is typed."""
        return complete.matching(ctx, self._known, incomplete)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Value:
        """Convert what was typed; defaults come converted already."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Parsed("size", parse_size)
ADDRESS = Parsed("address", parse_size)
PAGE = Parsed("page", parse_page)
PAGES = Parsed("pages", parse_pages)
SETTING = Parsed("key=value", parse_setting)
VM = Parsed("vm", lambda text: parse_handle(text, "vm"), complete.vms)
FILE = Parsed("file", lambda text: parse_handle(text, "file"), complete.files)
PIN = Parsed("pin", lambda text: parse_handle(text, "pin"), complete.pins)
RULE = Parsed("rule", lambda text: parse_handle(text, "rule"), complete.rules)
OPERATION = Parsed("operation", parse_operation, complete.operations)
CONSUMER = Parsed("consumer", str, complete.consumers)
