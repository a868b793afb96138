"""Sizes on the command line, and how figures are printed."""

from __future__ import annotations

import re

import click

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Size(click.ParamType[int]):
    """A number of bytes, with K, M, G or T."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the bytes; they are whole pages."""
        match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        nbytes = int(match[1]) * _UNITS[match[2].upper()] if match else 0
        if nbytes <= 0 or nbytes % 4096:
            self.fail(f"{value!r} is not a size in whole pages, such as 64M", param, ctx)
        return nbytes


SIZE = Size()


def size_text(nbytes: int) -> str:
    """Return a size as people write it: "64 MiB"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit and not nbytes % unit:
            return f"{nbytes // unit} {name}"
    return f"{nbytes} bytes"
