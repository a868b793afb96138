"""Bytes of what the journal keeps: records and notes.

Owns the format of entries. An entry is a kind byte (which is its version, too), a length and a
body; entries follow one another without anything between. What repeats in an entry is written once
in it (``values``), never across entries, because a log may begin anywhere.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rmemd.hooks.writes import Write
from rmemd.store.values import (
    JournalUnreadable,
    Reader,
    Writer,
    count,
    decode_value,
    encode_value,
    reading,
)
from rmemd.units import I64, U64

FORMAT = 1
"""Raised with every change that an older reader would not understand."""

_RECORD, _NOTE = 0x11, 0x12
_HEAD = struct.Struct("<BI")
# the code of an op is its place; new ones go to the end
_OPS = (("put", 2), ("fill", 3), ("store", 2), ("set", 2), ("drop", 1), ("create", 1),
        ("destroy", 1))  # fmt: skip
_OP_CODES = {name: (bytes((code,)), arity) for code, (name, arity) in enumerate(_OPS)}


@dataclass(frozen=True)
class Record:
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


@dataclass(frozen=True)
class NoteEntry:
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
    writer = Writer()
    put, value = writer.parts.append, writer.value
    value(record.revision)
    value(record.label)
    put(count(len(record.writes)))
    for write in record.writes:
        code, arity = _OP_CODES.get(write.op, (b"", -1))
        if len(write.args) != arity:
            raise TypeError(f"{write.op} of {write.table} is no forward write")
        put(code)
        value(write.table)
        for arg in write.args:
            value(arg)
    put(count(len(record.events)))
    for kind, named in record.events:
        value(kind)
        value(named)
    put(count(len(record.digests)))
    for frames, digests in record.digests:
        value(frames)
        value(digests)
    return _entry(_RECORD, writer)


def encode_note(note: NoteEntry) -> bytes:
    """Return a note as bytes.

    Raises:
        TypeError: it holds something that is not plain.
    """
    writer = Writer()
    for part in (note.kind, note.key, note.value, note.dropped):
        writer.value(part)
    return _entry(_NOTE, writer)


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
        found.append(reading(view[at : at + length], length, read))
        at += length
    return found


def _entry(kind: int, writer: Writer) -> bytes:
    body = b"".join(writer.parts)
    return _HEAD.pack(kind, len(body)) + body


def _read_record(reader: Reader) -> Record:
    revision, label = reader.value(), reader.value()
    writes = tuple(_read_write(reader) for _ in range(reader.count()))
    events = tuple((reader.value(), reader.value()) for _ in range(reader.count()))
    digests = tuple((reader.value(), reader.value()) for _ in range(reader.count()))
    return Record(revision, label, writes, events, digests)


def _read_write(reader: Reader) -> Write:
    op, arity = _OPS[reader.take(1)[0]]
    return Write(reader.value(), op, tuple(reader.value() for _ in range(arity)))


def _read_note(reader: Reader) -> NoteEntry:
    return NoteEntry(reader.value(), reader.value(), reader.value(), reader.value())


_ENTRIES: dict[int, Callable[[Reader], Any]] = {_RECORD: _read_record, _NOTE: _read_note}


__all__ = [
    "FORMAT", "JournalUnreadable", "NoteEntry", "Record", "decode", "decode_value", "encode_note",
    "encode_record", "encode_value",
]  # fmt: skip
