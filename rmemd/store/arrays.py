"""Integer arrays as bytes, by the shape of what they hold: one page or a million in little room.

Owns the forms that an array takes in the journal: raw bytes where it is short or has no pattern, a
progression (start, step, n) where it is a range or a constant, runs where it is a few progressions
of the same step, differences where it ascends in small steps, as scattered pages do. Which form is
taken depends on dtype and content alone, so that equal arrays give equal bytes. Nothing here keeps
an array or a view of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rmemd.units import NDArray

Array = NDArray[Any]

# the code of a dtype is its place; new ones go to the end
DTYPES = tuple(
    np.dtype(name)
    for name in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
)
# up to here an array is written as it lies: looking for a pattern would cost more
SHORT = 64
RAW, PROGRESSION, RUNS, DIFFERENCES = range(4)

_CODES: dict[Any, int] = {dtype: code for code, dtype in enumerate(DTYPES)}
_NAMED = {dtype.str: code for code, dtype in enumerate(DTYPES)}
_MAX_RUNS_SIZE = 1 << 32
_UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
# what differences may be written as, and the highest that it holds
_NARROW = tuple((_UNSIGNED[size], 256**size - 1) for size in (1, 2, 4))


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


def body(array: Array, code: int) -> tuple[Any, ...]:
    """Return the form and what goes with it, to be written before the array changes.

    ``array`` is one-dimensional, of more than ``SHORT`` entries, and ``code`` that of its dtype.
    """
    dtype = DTYPES[code]
    plain = np.ascontiguousarray(array, dtype=dtype)
    if dtype.kind == "f":
        return RAW, plain.data.cast("B")
    numbers = plain.view(np.uint8) if dtype.kind == "b" else plain
    # differences wrap as the dtype does, and so does the sum of them
    steps = numbers[1:] - numbers[:-1]
    step = sorted((steps[0].item(), steps[steps.size // 2].item(), steps[-1].item()))[1]
    broken = steps != step
    nbreaks = int(np.count_nonzero(broken))
    if nbreaks == 0:
        return PROGRESSION, numbers[0].item(), step
    if numbers.size >= _MAX_RUNS_SIZE or (nbreaks + 1) * (numbers.itemsize + 4) > plain.nbytes // 2:
        narrow = _narrower(steps)
        if narrow is None:
            return RAW, plain.data.cast("B")
        return DIFFERENCES, numbers[0].item(), _CODES[narrow], steps.astype(narrow).tobytes()
    begins = np.flatnonzero(broken) + 1
    starts = numbers[np.concatenate((np.zeros(1, dtype=np.int64), begins))]
    return RUNS, step, begins.astype("<u4").tobytes(), starts.tobytes()


def read_body(code: int, n: int, form: int, *parts: Any) -> Array:
    """Return the array of ``n`` entries that ``body`` made ``form`` and ``parts`` of.

    Raises:
        ValueError: they say no such thing.
    """
    dtype = DTYPES[code]
    if form == RAW:
        found = read_raw(code, *parts)
        if found.size != n:
            raise ValueError(f"an array of {n} entries has {found.size}")
        return found
    number = np.dtype(np.uint8) if dtype.kind == "b" else dtype
    if form == PROGRESSION:
        start, step = parts
        return _progression(number.type(start), number.type(step), n, number).view(dtype)
    if form == DIFFERENCES:
        start, narrow, steps = parts
        every = np.concatenate(([number.type(start)], read_raw(narrow, steps).astype(number)))
        if every.size != n:
            raise ValueError(f"an array of {n} entries has {every.size}")
        ascending: Array = np.cumsum(every, dtype=number)
        return ascending.view(dtype)
    if form != RUNS:
        raise ValueError(f"an array's form is {form}")
    step = number.type(parts[0])
    begins = read_raw(_CODES[np.dtype("u4")], parts[1])
    starts = read_raw(_CODES[number], parts[2])
    edges = np.concatenate(([0], begins.astype(np.int64), [n]))
    begun = starts - _progression(number.type(0), step, n, number)[edges[:-1]]
    out: Array = np.repeat(begun, np.diff(edges)) + _progression(number.type(0), step, n, number)
    return out.view(dtype)


def read_raw(code: int, data: bytes) -> Array:
    """Return a copy of the entries that ``data`` are.

    Raises:
        ValueError: they are no whole number of entries.
    """
    return np.frombuffer(data, dtype=DTYPES[code]).copy()


def _narrower(steps: Array) -> np.dtype[Any] | None:
    """Return a dtype of at most half the size that holds all of ``steps``, None without one."""
    # as an unsigned number, what is below 0 is higher than any narrower one
    highest = np.maximum.reduce(steps.view(_UNSIGNED[steps.itemsize]))
    for narrow, most in _NARROW:
        if 2 * narrow.itemsize <= steps.itemsize and highest <= most:
            return narrow
    return None


def _progression(start: Any, step: Any, n: int, dtype: np.dtype[Any]) -> Array:
    if step == 0:
        return np.full(n, start, dtype=dtype)
    # the low bits of a 64-bit sum are what the narrower one wraps to
    out: Array = np.arange(n, dtype=np.uint64).astype(dtype)
    out *= step
    out += start
    return out
