"""Messages as plain values: the proto3 JSON mapping, for people and jq.

Owns the mapping's two deviations from protobuf's own: 64-bit integers are numbers and not
strings, and fields without presence are always there. Otherwise as the mapping says: original
field names, enum names, base64 for bytes; unset messages and optional fields are left out.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from google.protobuf.message import Message

    # protobuf's types offer two descriptor classes wherever one is meant
    FieldDescriptor: TypeAlias = Any
    EnumDescriptor: TypeAlias = Any


def to_plain(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as dicts, lists, strings and numbers; a mapping is that already."""
    if isinstance(message, Mapping):
        return {key: _scalar(value) for key, value in message.items()}
    return {
        field.name: _field(message, field)
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    }


def enum_word(message: Message, field_name: str) -> str:
    """Return an enum field as a word: FRAME_USE_PRIVATE is "private"; "-" if not given."""
    enum = message.DESCRIPTOR.fields_by_name[field_name].enum_type
    if enum is None:
        raise TypeError(f"{field_name} is no enum")
    number: int = getattr(message, field_name)
    if number == 0:
        return "-"
    unspecified = enum.values_by_number[0].name
    name = str(_enum_name(enum, number))
    return name.removeprefix(unspecified.removesuffix("UNSPECIFIED")).lower().replace("_", "-")


def _field(message: Message, field: FieldDescriptor) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name["value"]
        return {str(key): _value(entry, value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_value(field, one) for one in value]
    return _value(field, value)


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return to_plain(value)
    if field.enum_type is not None:
        return _enum_name(field.enum_type, value)
    return _scalar(value)


def _scalar(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _enum_name(enum: EnumDescriptor, number: int) -> str | int:
    """Return a value's name; the number itself for one that a newer daemon has added."""
    known = enum.values_by_number.get(number)
    return known.name if known is not None else number
