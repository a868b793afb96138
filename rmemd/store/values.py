"""Bytes of plain values: what records, notes and writes are made of.

Owns the tags. Texts, classes and arrays are written once per ``Writer`` and named by number after
that. Equal values give equal bytes, whatever objects they are, and what is written is a copy once
the bytes are joined, so that an array may change afterwards.

A frozen dataclass or a member of an Enum is written by the names of its class and fields. Reading
constructs it from the fields that its class still has, so that a field which came later takes its
default, and one which is gone is left out.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

import numpy as np

from rmemd.store import arrays


class JournalUnreadable(Exception):
    """What is there was not written by a daemon that this one can follow; the text says why."""


def encode_value(value: Any) -> bytes:
    """Return a plain value as bytes, without an entry around it.

    Raises:
        TypeError: it is not plain.
    """
    writer = Writer()
    writer.value(value)
    return b"".join(writer.parts)


def decode_value(data: memoryview | bytes) -> Any:
    """Return the value that ``encode_value`` wrote.

    Raises:
        JournalUnreadable: the bytes say no such thing.
    """
    view = memoryview(data)
    return reading(view, len(view), Reader.value)


# --- writing -------------------------------------------------------------------------------------
_BYTE = tuple(bytes((n,)) for n in range(256))
_SMALL = 0x80
"""Tags from here on are the integers 0..127 themselves."""
(
    _NONE, _FALSE, _TRUE, _INT4, _INT8, _BIG, _FLOAT, _TEXT, _TEXT_AGAIN, _BYTES, _TUPLE, _LIST,
    _DICT, _FROZENSET, _CLASS, _OBJECT, _MEMBER, _SCALAR, _SHORT, _ARRAY, _ARRAY_AGAIN,
) = range(21)  # fmt: skip
_INTEGERS = tuple(bytes((_SMALL + n,)) for n in range(128))
_AGAIN = tuple(bytes((_TEXT_AGAIN, n)) for n in range(255))
_int4 = struct.Struct("<Bi").pack
_int8 = struct.Struct("<Bq").pack
_float = struct.Struct("<Bd").pack
_long = struct.Struct("<BQ").pack
_SHORT_HEADS = tuple(
    tuple(bytes((_SHORT, code, n)) for n in range(arrays.SHORT + 1))
    for code in range(len(arrays.DTYPES))
)


def count(n: int) -> bytes:
    """Return a count as bytes: one if it is below 255."""
    return _BYTE[n] if n < 255 else _long(255, n)


class Writer:
    """Values being written, in ``parts``, and what has been written of them already."""

    __slots__ = ("arrays", "classes", "long_arrays", "narrays", "parts", "texts")

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.texts: dict[str, int] = {}
        self.classes: dict[type, int] = {}
        self.arrays: dict[bytes, int] = {}
        self.long_arrays: dict[Any, list[tuple[int, arrays.Array]]] = {}
        self.narrays = 0

    def value(self, value: Any) -> None:
        """Write any plain value."""
        kind = type(value)
        (_WRITERS.get(kind) or _writer_of(kind))(self, value)

    def class_number(self, cls: type, definition: bytes) -> bytes:
        """Return the number of a class as bytes; its definition is written once before."""
        number = self.classes.get(cls)
        if number is None:
            number = self.classes[cls] = len(self.classes)
            self.parts.append(definition)
        return count(number)


def _write_int(writer: Writer, value: int) -> None:
    if 0 <= value < 128:
        writer.parts.append(_INTEGERS[value])
    elif -(1 << 31) <= value < 1 << 31:
        writer.parts.append(_int4(_INT4, value))
    elif -(1 << 63) <= value < 1 << 63:
        writer.parts.append(_int8(_INT8, value))
    else:
        data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        writer.parts += (_BYTE[_BIG], count(len(data)), data)


def _write_text(writer: Writer, value: str) -> None:
    number = writer.texts.get(value)
    if number is None:
        writer.texts[value] = len(writer.texts)
        data = value.encode("utf-8", "surrogatepass")
        writer.parts += (_BYTE[_TEXT], count(len(data)), data)
    elif number < 255:
        writer.parts.append(_AGAIN[number])
    else:
        writer.parts += (_BYTE[_TEXT_AGAIN], count(number))


def _write_bytes(writer: Writer, value: bytes) -> None:
    writer.parts += (_BYTE[_BYTES], count(len(value)), bytes(value))


def _items_writer(
    tag: int, order: Callable[[Any], Iterable[Any]] = iter
) -> Callable[[Writer, Any], None]:
    head = _BYTE[tag]

    def write(writer: Writer, value: Any) -> None:
        writer.parts += (head, count(len(value)))
        for item in order(value):
            writer.value(item)

    return write


def _write_dict(writer: Writer, value: dict[Any, Any]) -> None:
    writer.parts += (_BYTE[_DICT], count(len(value)))
    for key, item in value.items():
        writer.value(key)
        writer.value(item)


def _write_scalar(writer: Writer, value: Any) -> None:
    code = arrays.code_of(value.dtype)
    writer.parts += (_BYTE[_SCALAR], _BYTE[code], value.tobytes())


def _write_array(writer: Writer, value: arrays.Array) -> None:
    code = arrays.code_of(value.dtype)
    if value.ndim != 1:
        if value.ndim == 0:
            return _write_scalar(writer, value[()])
        raise TypeError(f"a journal holds arrays of one dimension, not {value.ndim}")
    if value.size > arrays.SHORT:
        return _write_long_array(writer, value, code)
    if not value.dtype.isnative:
        value = value.astype(arrays.DTYPES[code])
    data = _SHORT_HEADS[code][value.size] + value.tobytes()
    number = writer.arrays.get(data)
    if number is None:
        writer.arrays[data] = writer.narrays
        writer.narrays += 1
        writer.parts.append(data)
    else:
        writer.parts += (_BYTE[_ARRAY_AGAIN], count(number))
    return None


def _write_long_array(writer: Writer, value: arrays.Array, code: int) -> None:
    middle = value.size // 2
    # where two arrays differ here there is no need to compare the rest
    likeness = (code, value.size, value[0].item(), value[middle].item(), value[-1].item())
    alike = writer.long_arrays.setdefault(likeness, [])
    for number, other in alike:
        if value is other or np.array_equal(value, other):
            writer.parts += (_BYTE[_ARRAY_AGAIN], count(number))
            return
    if value.dtype.kind != "f":
        # zeros of either sign are equal, and not-a-numbers are not
        alike.append((writer.narrays, value))
    writer.narrays += 1
    writer.parts += (_BYTE[_ARRAY], _BYTE[code], count(value.size))
    writer.parts += arrays.body(value, code)


def _definition(cls: type, names: tuple[str, ...]) -> bytes:
    """Return what a class is known by: its module, its name in there, and its fields."""
    data = "\0".join((cls.__module__, cls.__qualname__, *names)).encode()
    return _BYTE[_CLASS] + count(len(data)) + data


def _dataclass_writer(cls: type) -> Callable[[Writer, Any], None]:
    """Return what writes instances of a frozen dataclass: its number, then its fields."""
    if not cls.__dataclass_params__.frozen or "<locals>" in cls.__qualname__:  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__qualname__} is no frozen dataclass of a module")
    names = tuple(field.name for field in fields(cls) if field.init)
    get: Callable[[Any], Any] = attrgetter(*names) if names else lambda _: ()
    several = len(names) != 1
    definition = _definition(cls, names)

    def write(writer: Writer, value: Any) -> None:
        number = writer.class_number(cls, definition)
        writer.parts += (_BYTE[_OBJECT], number)
        for item in get(value) if several else (get(value),):
            writer.value(item)

    return write


def _enum_writer(cls: type[Enum]) -> Callable[[Writer, Any], None]:
    if "<locals>" in cls.__qualname__:
        raise TypeError(f"{cls.__qualname__} is no Enum of a module")
    members = cls.__members__
    definition = _definition(cls, ())

    def write(writer: Writer, value: Enum) -> None:
        if members.get(value.name) is not value:
            raise TypeError(f"{value!r} is no single member")
        number = writer.class_number(cls, definition)
        writer.parts += (_BYTE[_MEMBER], number)
        _write_text(writer, value.name)

    return write


_WRITERS: dict[type, Callable[[Writer, Any], None]] = {
    type(None): lambda writer, _: writer.parts.append(_BYTE[_NONE]),
    bool: lambda writer, value: writer.parts.append(_BYTE[_TRUE if value else _FALSE]),
    int: _write_int,
    float: lambda writer, value: writer.parts.append(_float(_FLOAT, value)),
    str: _write_text,
    bytes: _write_bytes,
    tuple: _items_writer(_TUPLE),
    list: _items_writer(_LIST),
    dict: _write_dict,
    frozenset: _items_writer(_FROZENSET, lambda items: sorted(items, key=encode_value)),
    np.ndarray: _write_array,
}


def _writer_of(cls: type) -> Callable[[Writer, Any], None]:
    if issubclass(cls, Enum):
        writer = _enum_writer(cls)
    elif is_dataclass(cls):
        writer = _dataclass_writer(cls)
    elif issubclass(cls, np.generic):
        writer = _write_scalar
    else:
        raise TypeError(f"a journal holds plain values, not {cls.__module__}.{cls.__qualname__}")
    _WRITERS[cls] = writer
    return writer


# --- reading -------------------------------------------------------------------------------------
class Reader:
    """Values being read, and what has been read of them already."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0
        self.texts: list[str] = []
        self.classes: list[tuple[type, tuple[str | None, ...]]] = []
        self.arrays: list[arrays.Array] = []

    def value(self) -> Any:
        """Read any value."""
        tag = self.data[self.at]
        self.at += 1
        return tag - _SMALL if tag >= _SMALL else _READERS[tag](self)

    def count(self) -> int:
        """Read a count."""
        n = self.data[self.at]
        self.at += 1
        return n if n < 255 else int(self.number("<Q", 8))

    def number(self, form: str, size: int) -> Any:
        """Read a number of a fixed size."""
        self.at += size
        return struct.unpack_from(form, self.data, self.at - size)[0]

    def take(self, n: int) -> memoryview:
        """Read ``n`` bytes."""
        if self.at + n > len(self.data):
            raise ValueError(f"{n} bytes go past the entry")
        self.at += n
        return self.data[self.at - n : self.at]

    def values(self) -> list[Any]:
        """Read a count and as many values."""
        return [self.value() for _ in range(self.count())]


# what a reader stumbles over where the bytes are no writer's; a plugin's class may raise more
_UNREADABLE = (
    ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError, struct.error,
)  # fmt: skip


def reading(data: memoryview, length: int, read: Callable[[Reader], Any]) -> Any:
    """Return what ``read`` finds in ``data``, which must be ``length`` bytes, no more and no less.

    Raises:
        JournalUnreadable: what it says is not what a writer says, or of a class that is gone.
    """
    reader = Reader(data)
    try:
        value = read(reader)
    except _UNREADABLE as error:
        raise JournalUnreadable(f"an entry cannot be read: {error}") from error
    if reader.at != length:
        raise JournalUnreadable(f"an entry of {length} bytes says {reader.at} bytes' worth")
    return value


def _read_text(reader: Reader) -> str:
    text = str(reader.take(reader.count()), "utf-8", "surrogatepass")
    reader.texts.append(text)
    return text


def _read_class(reader: Reader) -> Any:
    """Read the definition of a class, and then the value that needed it."""
    definition = str(reader.take(reader.count()), "utf-8")
    module, name, *names = definition.split("\0")
    cls = _class_named(module, name)
    known = {field.name for field in fields(cls) if field.init} if is_dataclass(cls) else set()
    reader.classes.append((cls, tuple(name if name in known else None for name in names)))
    return reader.value()


def _class_named(module: str, name: str) -> type:
    """Return a class by the name that it was written under.

    Raises:
        JournalUnreadable: it is gone, or no longer a dataclass or an Enum.
    """
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise JournalUnreadable(f"{module}:{name} is not there any more: {error}") from error
    if not isinstance(found, type) or not (is_dataclass(found) or issubclass(found, Enum)):
        raise JournalUnreadable(f"{module}:{name} is no longer a dataclass or an Enum")
    return found


def _read_object(reader: Reader) -> Any:
    cls, names = reader.classes[reader.count()]
    given = [(name, reader.value()) for name in names]
    return cls(**{name: value for name, value in given if name is not None})


def _read_member(reader: Reader) -> Any:
    cls, _ = reader.classes[reader.count()]
    members: Any = cls
    return members[reader.value()]


def _read_scalar(reader: Reader) -> Any:
    code = reader.take(1)[0]
    found, reader.at = arrays.read_raw(reader.data, reader.at, code, 1)
    return found[0]


def _read_array(reader: Reader, read: Callable[..., Any], code: int, n: int) -> arrays.Array:
    found: arrays.Array
    found, reader.at = read(reader.data, reader.at, code, n)
    reader.arrays.append(found)
    return found


_READERS: dict[int, Callable[[Reader], Any]] = {
    _NONE: lambda _: None,
    _FALSE: lambda _: False,
    _TRUE: lambda _: True,
    _INT4: lambda reader: reader.number("<i", 4),
    _INT8: lambda reader: reader.number("<q", 8),
    _BIG: lambda reader: int.from_bytes(reader.take(reader.count()), "little", signed=True),
    _FLOAT: lambda reader: reader.number("<d", 8),
    _TEXT: _read_text,
    _TEXT_AGAIN: lambda reader: reader.texts[reader.count()],
    _BYTES: lambda reader: bytes(reader.take(reader.count())),
    _TUPLE: lambda reader: tuple(reader.values()),
    _LIST: Reader.values,
    _DICT: lambda reader: {reader.value(): reader.value() for _ in range(reader.count())},
    _FROZENSET: lambda reader: frozenset(reader.values()),
    _CLASS: _read_class,
    _OBJECT: _read_object,
    _MEMBER: _read_member,
    _SCALAR: _read_scalar,
    _SHORT: lambda reader: _read_array(reader, arrays.read_raw, *reader.take(2)),
    _ARRAY: lambda reader: _read_array(reader, arrays.read_body, reader.take(1)[0], reader.count()),
    _ARRAY_AGAIN: lambda reader: reader.arrays[reader.count()],
}
