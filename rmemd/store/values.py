"""Bytes of plain values: what records, notes and writes are made of.

Owns the mapping onto MessagePack, which a compiled encoder writes in one go. What MessagePack has
is itself: None, booleans, floats, texts, bytes, integers of 64 bits, and dicts of such. Everything
else is *shaped* into an array that begins with a tag; a short numeric array is an extension whose
code is its dtype. Classes, and arrays that come again, are written once per ``Shaper`` and named
by number after that. Equal values give equal bytes, whatever objects they are, and what is written
is a copy, so that an array may change afterwards.

A frozen Struct or dataclass, or a member of an Enum, is written by the names of its class and
fields. Reading constructs it from the fields that its class still has, so that a field which came
later takes its default, and one which is gone is left out. Nothing else is constructed, and
nothing is executed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
from msgspec import MsgspecError, Struct, msgpack

from rmemd.store import arrays


class JournalUnreadable(Exception):
    """What is there was not written by a daemon that this one can follow; the text says why."""


def encode_value(value: Any) -> bytes:
    """Return a plain value as bytes, without an entry around it.

    Raises:
        TypeError: it is not plain.
    """
    return _encode(Shaper.shaped, value)


def encode_all(values: list[Any]) -> bytes:
    """Return plain values as the bytes of a list of them.

    Raises:
        TypeError: one of them is not plain.
    """
    if not _SCALARS.issuperset(map(type, values)):
        return _encode(Shaper.all_shaped, values)
    try:
        return msgpack.encode(values)
    except _TOO_MUCH:
        return _encode(Shaper.all_shaped, values)


def decode_value(data: memoryview | bytes) -> Any:
    """Return the value that ``encode_value`` wrote.

    Raises:
        JournalUnreadable: the bytes say no such thing.
    """
    return reading(data, Reader.value)


# --- writing -------------------------------------------------------------------------------------
(
    _BIG, _TEXT, _TUPLE, _LIST, _DICT, _FROZENSET, _OBJECT, _MEMBER, _SCALAR, _ARRAY, _ARRAY_AGAIN,
) = range(11)  # fmt: skip
_SCALARS = frozenset((type(None), bool, int, float, str, bytes))
# what needs no shape: of texts and integers nearly all, and arrays get theirs from the encoder
_DIRECT = _SCALARS | {np.ndarray}
_ALWAYS_DIRECT = _DIRECT - {int, str}
# what the encoder raises of a text with surrogates, or an integer of more than 64 bits: then each
# is looked at
_TOO_MUCH = (OverflowError, UnicodeEncodeError)
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1


def _encode(shape: Callable[[Shaper, Any], Any], value: Any) -> bytes:
    """Return what ``shape`` makes of something that is made of plain values as bytes.

    Raises:
        TypeError: one of them is not plain.
    """
    shaper = Shaper(_DIRECT)
    try:
        return msgpack.encode(shape(shaper, value), enc_hook=shaper.array)
    except _TOO_MUCH:
        shaper = Shaper(_ALWAYS_DIRECT)
        return msgpack.encode(shape(shaper, value), enc_hook=shaper.array)


class Shaper:
    """Values being shaped, in the order in which they are read, and what came already.

    Attributes:
        direct: the types of which every value is handed to the encoder as it is.
        classes: the numbers of the classes that came.
    """

    __slots__ = ("_long_arrays", "_narrays", "_short_arrays", "classes", "direct")

    def __init__(self, direct: frozenset[type]) -> None:
        self.direct = direct
        self.classes: dict[type, int] = {}
        self._short_arrays: dict[tuple[int, bytes], int] = {}
        self._long_arrays: dict[Any, list[tuple[int, arrays.Array]]] = {}
        self._narrays = 0

    def shaped(self, value: Any) -> Any:
        """Return what is written of any plain value."""
        return self.all_shaped((value,))[0]

    def all_shaped(self, values: Sequence[Any]) -> Sequence[Any]:
        """Return what is written of plain values."""
        direct = self.direct
        if direct.issuperset(map(type, values)):
            return values
        return [
            value
            if (kind := type(value)) in direct
            else (_SHAPES.get(kind) or _shape_of(kind))(self, value)
            for value in values
        ]

    def array(self, value: arrays.Array) -> Any:
        """Return what is written of an array; the encoder asks where one comes."""
        dtype = value.dtype
        code = arrays.code_of(dtype)
        if value.ndim != 1:
            if value.ndim == 0:
                return _shape_scalar(self, value[()])
            raise TypeError(f"a journal holds arrays of one dimension, not {value.ndim}")
        if value.size > arrays.SHORT:
            return self._long_array(value, code)
        if not dtype.isnative:
            value = value.astype(arrays.DTYPES[code])
        data = value.tobytes()
        number = self._short_arrays.setdefault((code, data), self._narrays)
        if number != self._narrays:
            return _ARRAY_AGAIN, number
        self._narrays += 1
        return msgpack.Ext(code, data)

    def _long_array(self, value: arrays.Array, code: int) -> Any:
        middle = value.size // 2
        # where two arrays differ here there is no need to compare the rest
        likeness = (code, value.size, value[0].item(), value[middle].item(), value[-1].item())
        alike = self._long_arrays.setdefault(likeness, [])
        for number, other in alike:
            if value is other or np.array_equal(value, other):
                return _ARRAY_AGAIN, number
        if value.dtype.kind != "f":
            # zeros of either sign are equal, and not-a-numbers are not
            alike.append((self._narrays, value))
        self._narrays += 1
        return _ARRAY, code, value.size, *arrays.body(value, code)


def _shape_int(_: Shaper, value: int) -> Any:
    if _INT_MIN <= value <= _INT_MAX:
        return value
    return _BIG, value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)


def _shape_text(_: Shaper, value: str) -> Any:
    return value if value.isascii() else (_TEXT, value.encode("utf-8", "surrogatepass"))


def _shape_dict(shaper: Shaper, value: dict[Any, Any]) -> Any:
    if shaper.direct.issuperset(map(type, (*value, *value.values()))):
        return value
    return _DICT, *shaper.all_shaped([part for item in value.items() for part in item])


def _shape_frozenset(shaper: Shaper, value: frozenset[Any]) -> Any:
    return _FROZENSET, *shaper.all_shaped(sorted(value, key=encode_value))


def _shape_scalar(_: Shaper, value: Any) -> Any:
    return _SCALAR, arrays.code_of(value.dtype), value.tobytes()


def _definition(cls: type, names: tuple[str, ...]) -> str:
    """Return what a class is known by: its module, its name in there, and its fields."""
    return "\0".join((cls.__module__, cls.__qualname__, *names))


def _number_of(shaper: Shaper, cls: type, definition: str) -> int | str:
    """Return the number of a class; where it comes first, its definition."""
    number = shaper.classes.get(cls)
    if number is None:
        shaper.classes[cls] = len(shaper.classes)
        return definition
    return number


def _is_record(cls: type) -> bool:
    return issubclass(cls, Struct) or is_dataclass(cls)


def _field_names(cls: Any) -> tuple[str, ...]:
    """Return the names of the fields that an instance is constructed from."""
    if issubclass(cls, Struct):
        names: tuple[str, ...] = cls.__struct_fields__
        return names
    return tuple(field.name for field in fields(cls) if field.init)


def _record_shape(cls: Any) -> Callable[[Shaper, Any], Any]:
    """Return what shapes instances of a frozen Struct or dataclass: its class, then its fields."""
    made = cls.__struct_config__ if issubclass(cls, Struct) else cls.__dataclass_params__
    if not made.frozen or "<locals>" in cls.__qualname__:
        raise TypeError(f"{cls.__qualname__} is no frozen Struct or dataclass of a module")
    names = _field_names(cls)
    get: Callable[[Any], tuple[Any, ...]] = (
        attrgetter(*names)
        # of one name, and of none, attrgetter makes no tuple
        if len(names) > 1
        else lambda value: tuple(getattr(value, name) for name in names)
    )
    definition = _definition(cls, names)

    def shape(shaper: Shaper, value: Any) -> Any:
        number = _number_of(shaper, cls, definition)
        return _OBJECT, number, *shaper.all_shaped(get(value))

    return shape


def _enum_shape(cls: type[Enum]) -> Callable[[Shaper, Any], Any]:
    if "<locals>" in cls.__qualname__:
        raise TypeError(f"{cls.__qualname__} is no Enum of a module")
    members = cls.__members__
    definition = _definition(cls, ())

    def shape(shaper: Shaper, value: Enum) -> Any:
        if members.get(value.name) is not value:
            raise TypeError(f"{value!r} is no single member")
        return _MEMBER, _number_of(shaper, cls, definition), shaper.shaped(value.name)

    return shape


_SHAPES: dict[type, Callable[[Shaper, Any], Any]] = {
    int: _shape_int,
    str: _shape_text,
    tuple: lambda shaper, value: (_TUPLE, *shaper.all_shaped(value)),
    list: lambda shaper, value: (_LIST, *shaper.all_shaped(value)),
    dict: _shape_dict,
    frozenset: _shape_frozenset,
}


def _shape_of(cls: type) -> Callable[[Shaper, Any], Any]:
    if issubclass(cls, Enum):
        shape = _enum_shape(cls)
    elif _is_record(cls):
        shape = _record_shape(cls)
    elif issubclass(cls, np.generic):
        shape = _shape_scalar
    else:
        raise TypeError(f"a journal holds plain values, not {cls.__module__}.{cls.__qualname__}")
    _SHAPES[cls] = shape
    return shape


# --- reading -------------------------------------------------------------------------------------
# what a reader stumbles over where the bytes are no writer's; a plugin's class may raise more
_UNREADABLE = (
    ArithmeticError, AttributeError, LookupError, MemoryError, MsgspecError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip


def reading(data: memoryview | bytes, read: Callable[[Reader, Any], Any]) -> Any:
    """Return what ``read`` makes of what ``encode`` wrote: all of ``data``.

    Raises:
        JournalUnreadable: what it says is not what a writer says, or of a class that is gone.
    """
    try:
        return read(Reader(), msgpack.decode(data))
    except _UNREADABLE as error:
        raise JournalUnreadable(f"an entry cannot be read: {error}") from error


class Reader:
    """Values being read, in the order in which they were shaped, and what came already."""

    __slots__ = ("arrays", "classes")

    def __init__(self) -> None:
        self.classes: list[tuple[type, tuple[str | None, ...]]] = []
        self.arrays: list[arrays.Array] = []

    def value(self, shaped: Any) -> Any:
        """Return the value that was shaped like this."""
        return self.all([shaped])[0]

    def all(self, shaped: list[Any]) -> list[Any]:
        """Return the values that were shaped like these."""
        if _SCALARS.issuperset(map(type, shaped)):
            return shaped
        # as many frames for each that lies in another as the shaper has: what was written is read
        return [
            one
            if (kind := type(one)) in _SCALARS
            else _VALUES[one[0]](self, *one[1:])
            if kind is list
            else self._other(one)
            for one in shaped
        ]

    def _other(self, shaped: Any) -> Any:
        if isinstance(shaped, msgpack.Ext):
            return self.came(arrays.read_raw(shaped.code, bytes(shaped.data)))
        if not isinstance(shaped, dict):
            raise ValueError(f"{type(shaped).__name__} is none of the forms of a value")
        return dict(zip(shaped, self.all(list(shaped.values())), strict=True))

    def class_of(self, known: Any) -> tuple[type, tuple[str | None, ...]]:
        """Return a class by its number, or by its definition where it comes first."""
        if type(known) is int:
            return self.classes[known]
        module, name, *names = known.split("\0")
        found = _readable(_class_named(module, name), tuple(names))
        self.classes.append(found)
        return found

    def came(self, array: arrays.Array) -> arrays.Array:
        """Return an array that is read for the first time."""
        self.arrays.append(array)
        return array


def _class_named(module: str, name: str) -> type:
    """Return a class by the name that it was written under.

    Raises:
        JournalUnreadable: it is gone, or no longer a Struct, a dataclass or an Enum.
    """
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise JournalUnreadable(f"{module}:{name} is not there any more: {error}") from error
    if not isinstance(found, type) or not (_is_record(found) or issubclass(found, Enum)):
        raise JournalUnreadable(f"{module}:{name} is no longer a Struct, a dataclass or an Enum")
    return found


@lru_cache(maxsize=256)
def _readable(cls: type, names: tuple[str, ...]) -> tuple[type, tuple[str | None, ...]]:
    """Return a class with those of the fields' names that it still has, the others None."""
    known = set(_field_names(cls)) if _is_record(cls) else set()
    return cls, tuple(name if name in known else None for name in names)


def _read_object(reader: Reader, known: Any, *shaped: Any) -> Any:
    cls, names = reader.class_of(known)
    given = zip(names, reader.all(list(shaped)), strict=True)
    return cls(**{name: value for name, value in given if name is not None})


def _read_member(reader: Reader, known: Any, name: Any) -> Any:
    members: Any = reader.class_of(known)[0]
    return members[reader.value(name)]


def _read_dict(reader: Reader, *shaped: Any) -> Any:
    parts = reader.all(list(shaped))
    return dict(zip(parts[::2], parts[1::2], strict=True))


# by tag
_VALUES: tuple[Callable[..., Any], ...] = (
    lambda _, data: int.from_bytes(data, "little", signed=True),
    lambda _, data: str(data, "utf-8", "surrogatepass"),
    lambda reader, *shaped: tuple(reader.all(list(shaped))),
    lambda reader, *shaped: reader.all(list(shaped)),
    _read_dict,
    lambda reader, *shaped: frozenset(reader.all(list(shaped))),
    _read_object,
    _read_member,
    lambda _, code, data: arrays.read_raw(code, data)[0],
    lambda reader, code, n, *body: reader.came(arrays.read_body(code, n, *body)),
    lambda reader, number: reader.arrays[number],
)
