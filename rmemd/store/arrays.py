"""Integer arrays as bytes, by the shape of what they hold: one page or a million in little room.

Owns the forms that an array takes in the journal: raw bytes where it is short or has no pattern, a
progression (start, step, n) where it is a range or a constant, runs where it is a few progressions
of the same step. Which form is taken depends on dtype and content alone, so that equal arrays give
equal bytes. Nothing here keeps an array or a view of one.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# the code of a dtype is its place; new ones go to the end
DTYPES = tuple(
    np.dtype(name)
    for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
)
# up to here an array is written as it lies: looking for a pattern would cost more
SHORT = 16
RAW, PROGRESSION, RUNS = range(3)

_CODES: dict[Any, int] = {dtype: code for code, dtype in enumerate(DTYPES)}
_NAMED = {dtype.str: code for code, dtype in enumerate(DTYPES)}
_U64 = struct.Struct("<Q")
_MASK = (1 << 64) - 1
_MAX_RUNS_SIZE = 1 << 32


def code_of(dtype: np.dtype[Any]) -> int:
    """Return the code of a dtype, whichever byte order it has.

    Raises:
        TypeError: it is not a plain number's.
    """
    code = _CODES.get(dtype)
    if code is None:
        code = _NAMED.get(dtype.newbyteorder("<").str)
        if code is None:
            raise TypeError(f"a journal holds no array of {dtype}")
        if dtype.isnative:
            # a second name of the same thing ("long long")
            _CODES[dtype] = code
    return code


def body(array: Array, code: int) -> list[Any]:
    """Return the form byte and what follows it, as buffers to be joined before the array changes.

    ``array`` is one-dimensional, of more than ``SHORT`` entries, and ``code`` that of its dtype.
    """
    dtype = DTYPES[code]
    plain = np.ascontiguousarray(array, dtype=dtype)
    if dtype.kind == "f":
        return [bytes((RAW,)), plain.data.cast("B")]
    numbers = plain.view(np.uint8) if dtype.kind == "b" else plain
    # differences wrap as the dtype does, and so does the sum of them
    steps = numbers[1:] - numbers[:-1]
    step = sorted((steps[0].item(), steps[steps.size // 2].item(), steps[-1].item()))[1]
    broken = steps != step
    nbreaks = int(np.count_nonzero(broken))
    if nbreaks == 0:
        return [
            bytes((PROGRESSION,)), _word(numbers[0]), _word(step),
        ]  # fmt: skip
    if numbers.size >= _MAX_RUNS_SIZE or (nbreaks + 1) * (numbers.itemsize + 4) > plain.nbytes // 2:
        return [bytes((RAW,)), plain.data.cast("B")]
    begins = np.flatnonzero(broken) + 1
    starts = numbers[np.concatenate((np.zeros(1, dtype=np.int64), begins))]
    return [
        bytes((RUNS,)), _word(step), _U64.pack(nbreaks),
        begins.astype("<u4").tobytes(), starts.tobytes(),
    ]  # fmt: skip


def read_body(data: memoryview, at: int, code: int, n: int) -> tuple[Array, int]:
    """Return the array of ``n`` entries that ``body`` wrote at ``at``, and where it ended.

    Raises:
        ValueError: the bytes say no such thing.
    """
    form, at = data[at], at + 1
    dtype = DTYPES[code]
    if form == RAW:
        return read_raw(data, at, code, n)
    number = np.dtype(np.uint8) if dtype.kind == "b" else dtype
    if form == PROGRESSION:
        start, step = _number(data, at, number), _number(data, at + 8, number)
        return _progression(start, step, n, number).view(dtype), at + 16
    if form != RUNS:
        raise ValueError(f"an array's form is {form}")
    step = _number(data, at, number)
    nbreaks = _U64.unpack_from(data, at + 8)[0]
    begins, at = read_raw(data, at + 16, _CODES[np.dtype("u4")], nbreaks)
    starts, at = read_raw(data, at, _CODES[number], nbreaks + 1)
    edges = np.concatenate(([0], begins.astype(np.int64), [n]))
    begun = starts - _progression(number.type(0), step, n, number)[edges[:-1]]
    out = np.repeat(begun, np.diff(edges)) + _progression(number.type(0), step, n, number)
    return out.view(dtype), at


def read_raw(data: memoryview, at: int, code: int, n: int) -> tuple[Array, int]:
    """Return a copy of ``n`` entries that lie at ``at`` as they are, and where they end.

    Raises:
        ValueError: there are not so many.
    """
    dtype = DTYPES[code]
    end = at + n * dtype.itemsize
    if end > len(data):
        raise ValueError(f"an array ends {end - len(data)} bytes past its entry")
    return np.frombuffer(data[at:end], dtype=dtype).copy(), end


def _progression(start: Any, step: Any, n: int, dtype: np.dtype[Any]) -> Array:
    if step == 0:
        return np.full(n, start, dtype=dtype)
    # the low bits of a 64-bit sum are what the narrower one wraps to
    out: Array = np.arange(n, dtype=np.uint64).astype(dtype)
    out *= step
    out += start
    return out


def _word(number: Any) -> bytes:
    return _U64.pack(int(number) & _MASK)


def _number(data: memoryview, at: int, dtype: np.dtype[Any]) -> Any:
    return np.array([_U64.unpack_from(data, at)[0]], dtype=np.uint64).astype(dtype)[0]
