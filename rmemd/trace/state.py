"""What two states, and two sequences of writes, are compared by.

Owns the digests. Two things depend on bytes that a replay does not have, and are left out:
integrity codes, and bytes in records (measurements), of which only the length counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from enum import Enum
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import asdict

from rmemd.hooks.tables import CHUNK, Dense, Space, Sparse, Table
from rmemd.hooks.tx import Tx
from rmemd.hooks.writes import Write

MACS = "host/mac"
DIGEST_BYTES = 8


class Chain:
    """The digest of all that was committed so far, in order."""

    def __init__(self) -> None:
        self._value = bytes(DIGEST_BYTES)

    def add(self, tx: Tx) -> None:
        """Take in what a transaction wrote."""
        into = hashlib.blake2b(self._value, digest_size=DIGEST_BYTES)
        into.update(tx.label.encode())
        for write in tx.redo:
            if write.table != MACS:
                _take_in(into, write)
        self._value = into.digest()

    @property
    def digest(self) -> str:
        """Return the digest as text."""
        return self._value.hex()


def _take_in(into: Any, write: Write) -> None:
    into.update(f"{write.table} {write.op}".encode())
    for arg in write.args:
        if isinstance(arg, np.ndarray):
            into.update(np.ascontiguousarray(arg).astype("<i8", copy=False).data)
        else:
            into.update(_text(arg))


def digests(space: Space, platforms: Collection[str]) -> dict[str, str]:
    """Return the digest of each table; of platforms, those named only."""
    found = {}
    for name, table in sorted(space.tables.items()):
        foreign = name.startswith("platform/") and name.split("/")[1] not in platforms
        if name != MACS and not foreign:
            found[name] = _of(table)
    return found


def total(tables: dict[str, str]) -> str:
    """Return one digest of all tables'."""
    return hashlib.blake2b(
        json.dumps(tables, sort_keys=True).encode(), digest_size=DIGEST_BYTES
    ).hexdigest()


def _of(table: Table) -> str:
    into = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if isinstance(table, Dense):
        for chunk, values in _chunks(table):
            into.update(b"%d" % chunk)
            into.update(values.data)
    elif isinstance(table, Sparse):
        into.update(json.dumps(table.snapshot()).encode())
    else:
        for key, value in table.items():
            into.update(_text(key) + b"=" + _text(value) + b";")
    return into.hexdigest()


def _chunks(table: Dense) -> Iterator[tuple[int, Any]]:
    """Yield the chunks that are not wholly ``fill``; a host's frames are mostly untouched."""
    for write in table.content():
        if write.op != "store":
            continue
        start, values = write.args
        for at in range(0, len(values), CHUNK):
            part = values[at : at + CHUNK]
            if (part != table.spec.fill).any():
                yield start + at, part


def _text(value: Any) -> bytes:
    return json.dumps(_plain(value), sort_keys=True).encode()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, int | np.integer | np.bool_):
        return int(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, dict):
        return [[_plain(key), _plain(one)] for key, one in value.items()]
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, frozenset | set):
        return sorted(map(str, value))
    if isinstance(value, Struct):
        # a programme is long, is written at every step, and was said when it was given
        return [
            type(value).__name__,
            *(_plain(one) for name, one in asdict(value).items() if name != "programme"),
        ]
    return np.asarray(value).tolist() if isinstance(value, np.ndarray) else type(value).__name__
