"""Bytes of what the journal keeps: records and notes.

Owns the format of entries. An entry is a kind byte (which is its version, too), a length and a
body; entries follow one another without anything between. What repeats in an entry is written once
in it (``values``), never across entries, because a log may begin anywhere.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple

from rmemd.hooks.writes import TableSpec, Write
from rmemd.store.values import (
    JournalUnreadable,
    Reader,
    Shaper,
    decode_value,
    encode,
    encode_value,
    reading,
)
from rmemd.units import I64, U64

FORMAT = 3
"""Raised with every change that an older reader would not understand."""

_RECORD, _NOTE = 0x21, 0x22
_HEAD = struct.Struct("<BI")
# the code of an op is its place; new ones go to the end
_OPS = (("put", 2), ("fill", 3), ("store", 2), ("set", 2), ("drop", 1), ("create", 5),
        ("destroy", 1))  # fmt: skip
_OP_CODES = {name: (code, arity) for code, (name, arity) in enumerate(_OPS)}
_NO_OP = (-1, -1)
_of_table = attrgetter("name", "kind", "dtype", "fill", "length")


class Record(NamedTuple):
    """One committed transaction.

    Attributes:
        revision: its number.
        label: the operation that it was part of.
        writes: forward writes, in order.
        events: what watchers were told.
        digests: pairs of arrays (frames, digests of their bytes), parallel.
    """

    revision: int
    label: str
    writes: tuple[Write, ...]
    events: tuple[tuple[str, dict[str, Any]], ...] = ()
    digests: tuple[tuple[I64, U64], ...] = ()

    @property
    def nbytes(self) -> int:
        """Return roughly how much memory the record's arrays take."""
        written = (arg for write in self.writes for arg in write.args)
        return 256 * len(self.writes) + sum(getattr(arg, "nbytes", 0) for arg in written)


class NoteEntry(NamedTuple):
    """A note that was set to ``value``, or ``dropped``."""

    kind: str
    key: Any
    value: Any
    dropped: bool


def encode_record(record: Record) -> bytes:
    """Return a record as bytes.

    Raises:
        TypeError: it holds something that is not plain, or a write that is no forward one.
    """
    return _entry(_RECORD, encode(_shape_record, record))


def encode_note(note: NoteEntry) -> bytes:
    """Return a note as bytes.

    Raises:
        TypeError: it holds something that is not plain.
    """
    return _entry(_NOTE, encode(Shaper.all_shaped, note))


def decode(data: memoryview | bytes) -> list[Record | NoteEntry]:
    """Return the entries that lie one after another in ``data``.

    Raises:
        JournalUnreadable: an entry is of an unknown kind, of a class that is no longer there, or
            does not say what an entry can say.
    """
    view = memoryview(data)
    found: list[Record | NoteEntry] = []
    at = 0
    while at < len(view):
        if at + _HEAD.size > len(view):
            raise JournalUnreadable(f"{len(view) - at} bytes after the last entry")
        kind, length = _HEAD.unpack_from(view, at)
        at += _HEAD.size
        read = _ENTRIES.get(kind)
        if read is None:
            raise JournalUnreadable(f"entries of kind {kind:#x} are of another version of rmemd")
        if at + length > len(view):
            raise JournalUnreadable(f"an entry of {length} bytes has {len(view) - at}")
        found.append(reading(view[at : at + length], read))
        at += length
    return found


def _entry(kind: int, body: bytes) -> bytes:
    return _HEAD.pack(kind, len(body)) + body


def _shape_record(shaper: Shaper, record: Record) -> Any:
    parts: list[Any] = [record.revision, record.label]
    for write in record.writes:
        op, args = write.op, write.args
        code, arity = _OP_CODES.get(op, _NO_OP)
        given = _of_table(*args) if op == "create" else args
        if len(given) != arity:
            raise TypeError(f"{op} of {write.table} is no forward write")
        parts += (code, write.table)
        parts += given
    events = [part for event in record.events for part in event]
    digests = [part for pair in record.digests for part in pair]
    shaped = shaper.all_shaped
    return shaped(parts), shaped(events), shaped(digests)


def _read_record(reader: Reader, shaped: Any) -> Record:
    (revision, label, *writes), events, digests = map(reader.all, shaped)
    return Record(revision, label, tuple(_writes(iter(writes))), _pairs(events), _pairs(digests))


def _writes(parts: Iterator[Any]) -> Iterator[Write]:
    for code in parts:
        op, arity = _OPS[code]
        table, *args = islice(parts, arity + 1)
        if len(args) != arity:
            raise ValueError(f"{op} of {table} has {len(args)} arguments")
        yield Write(table, op, (TableSpec(*args),) if op == "create" else tuple(args))


def _pairs(parts: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(parts[::2], parts[1::2], strict=True))


def _read_note(reader: Reader, shaped: Any) -> NoteEntry:
    return NoteEntry(*reader.all(shaped))


_ENTRIES: dict[int, Callable[[Reader, Any], Any]] = {_RECORD: _read_record, _NOTE: _read_note}


__all__ = [
    "FORMAT", "JournalUnreadable", "NoteEntry", "Record", "decode", "decode_value", "encode_note",
    "encode_record", "encode_value",
]  # fmt: skip
