"""``NamedTuple`` as ``typing`` has it, without ``typing``, a sixth of what the keeper would be."""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:

    class _Making(type):
        """Makes a tuple class of a class's annotations and defaults."""

        def __new__(cls, name, bases, body):
            fields = body.get("__annotations__", {})
            if not fields:
                return super().__new__(cls, name, bases, body)
            defaults = [body.pop(field) for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            return type(name, (made,), {**body, "__slots__": ()})

    class NamedTuple(metaclass=_Making):
        """What those classes inherit from in their text, and not in fact."""
