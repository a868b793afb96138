"""What a write is, and what makes a table: plain values, without behaviour."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Write(Struct, frozen=True):
    """One write to one table: what a transaction applies, journals and can undo.

    ``op`` is "fill" (start, n, value), "put" (indices, values), "store" (start, values),
    "set" (key, value), "drop" (key), or, with the table name empty, "create" (TableSpec) and
    "destroy" (name). "restore" appears only as an inverse.
    """

    table: str
    op: str
    args: tuple[Any, ...]


class TableSpec(Struct, frozen=True):
    """What makes a table: ``kind`` is "dense", "sparse" or "records"."""

    name: str
    kind: str
    dtype: str = "u1"
    fill: int = 0
    length: int = 0
