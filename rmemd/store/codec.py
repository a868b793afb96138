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
    decode_value,
    encode_all,
    encode_value,
    reading,
)
from rmemd.units import I64, U64

FORMAT = 4
"""Raised with every change that an older reader would not understand."""

_RECORD, _NOTE = 0x21, 0x22
_HEAD = struct.Struct("<BI")
# the code of an op is its place; new ones go to the end
_OPS = (("put", 2), ("fill", 3), ("store", 2), ("set", 2), ("drop", 1), ("create", 5),
        ("destroy", 1))  # fmt: skip
_OP_CODES = {name: (code, arity) for code, (name, arity) in enumerate(_OPS)}
_NO_OP = (-1, -1)
# of a part of a note that is no tuple: how many it was spread into
_WHOLE = -1
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
    return _entry(_RECORD, encode_all(_parts_of(record)))


def encode_note(note: NoteEntry) -> bytes:
    """Return a note as bytes.

    Raises:
        TypeError: it holds something that is not plain.
    """
    # nearly all keys are tuples, and what a call came to is one: spread out, they need no shape
    key, value = note.key, note.value
    nkey = len(key) if type(key) is tuple else _WHOLE
    nvalue = len(value) if type(value) is tuple else _WHOLE
    parts = [note.kind, note.dropped, nkey, nvalue]
    parts += (key,) if nkey == _WHOLE else key
    parts += (value,) if nvalue == _WHOLE else value
    return _entry(_NOTE, encode_all(parts))


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


def _parts_of(record: Record) -> list[Any]:
    """Return what a record says, one value after another: what is nested costs a shape."""
    writes, events = record.writes, record.events
    parts: list[Any] = [record.revision, record.label, len(writes), len(events)]
    for write in writes:
        op, args = write.op, write.args
        code, arity = _OP_CODES.get(op, _NO_OP)
        given = _of_table(*args) if op == "create" else args
        if len(given) != arity:
            raise TypeError(f"{op} of {write.table} is no forward write")
        parts += (code, write.table)
        parts += given
    for kind, fields in events:
        parts += (kind, len(fields))
        parts += fields
        parts += fields.values()
    for pair in record.digests:
        parts += pair
    return parts


def _read_record(reader: Reader, shaped: Any) -> Record:
    revision, label, nwrites, nevents, *rest = reader.all(shaped)
    parts = iter(rest)
    writes = tuple([_write(parts) for _ in range(nwrites)])
    events = tuple([_event(parts) for _ in range(nevents)])
    digests = list(parts)
    return Record(
        revision, label, writes, events, tuple(zip(digests[::2], digests[1::2], strict=True))
    )


def _write(parts: Iterator[Any]) -> Write:
    op, arity = _OPS[_taken(parts, 1)[0]]
    table, *args = _taken(parts, arity + 1)
    return Write(table, op, (TableSpec(*args),) if op == "create" else tuple(args))


def _event(parts: Iterator[Any]) -> tuple[str, dict[str, Any]]:
    kind, nfields = _taken(parts, 2)
    names = _taken(parts, nfields)
    return kind, dict(zip(names, _taken(parts, nfields), strict=True))


def _taken(parts: Iterator[Any], count: int) -> list[Any]:
    found = list(islice(parts, count))
    if len(found) != count:
        raise ValueError(f"{len(found)} parts where there should be {count}")
    return found


def _read_note(reader: Reader, shaped: Any) -> NoteEntry:
    kind, dropped, nkey, nvalue, *rest = reader.all(shaped)
    parts = iter(rest)
    key, value = _gathered(parts, nkey), _gathered(parts, nvalue)
    if list(parts):
        raise ValueError(f"a note of {kind} has more parts than it says")
    return NoteEntry(kind, key, value, dropped)


def _gathered(parts: Iterator[Any], count: int) -> Any:
    """Return what was spread into so many parts."""
    return _taken(parts, 1)[0] if count == _WHOLE else tuple(_taken(parts, count))


_ENTRIES: dict[int, Callable[[Reader, Any], Any]] = {_RECORD: _read_record, _NOTE: _read_note}


__all__ = [
    "FORMAT", "JournalUnreadable", "NoteEntry", "Record", "decode", "decode_value", "encode_note",
    "encode_record", "encode_value",
]  # fmt: skip
