"""What a plugin's object keeps beside its tables: copies of its plain attributes, to compare.

Owns ``plain`` and ``changed``. What an attribute of another kind holds (a hash that runs, an object
of the plugin's own) is not looked at; it shows in what the plugin answers.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

PLAIN = (int, float, str, bytes, bytearray, tuple, list, dict, set, frozenset)


def plain(made: object) -> dict[str, Any]:
    """Return copies of an object's attributes that are plain values, collections or arrays."""
    found = getattr(made, "__dict__", {}).items()
    values = {name: copy.deepcopy(value) for name, value in found if isinstance(value, PLAIN)}
    arrays = {
        name: (value.dtype.str, value.shape, value.tobytes())
        for name, value in found
        if isinstance(value, np.ndarray)
    }
    return values | arrays


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what is in one and not in the other, or different."""
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
