"""The file of a trace: JSON Lines, a header first; docs/traces.md is its description.

Owns the version, the reading with all that can be wrong with a file, and ``Trace``, the lines by
operation. A line is an object whose first key says what it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import IO, Any

from msgspec import Struct, field

NAME = "rmem-trace"
VERSION = 1
"""Raised with every change that an older reader would not understand."""
STATE, STOP = "state", "stop"
Line = dict[str, Any]
Outcome = dict[str, Any]


class TraceError(Exception):
    """What is there is no trace that can be read; the text says why."""


def encode(line: Line) -> bytes:
    """Return a line as bytes."""
    return json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


class Asked(Struct, frozen=True):
    """An operation as it was asked for."""

    number: int
    method: str
    args: dict[str, Any]


class Trace(Struct):
    """A trace that was read.

    Attributes:
        header: the first line.
        lines: the others, in order.
        truncated: whether the last line is missing or torn: what is before it counts.
        asked: the operations by number.
        ends: how operations ended, by number; one that has no end was still under way.
        inputs: what operations met that is no state, by number, in order.
        last: index of the last line by which each operation goes on.
    """

    header: Line
    lines: list[Line]
    truncated: bool = False
    asked: dict[int, Asked] = field(default_factory=dict)
    ends: dict[int, Line] = field(default_factory=dict)
    inputs: dict[int, list[Line]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, line in enumerate(self.lines):
            kind, number = next(iter(line.items()))
            if kind == "begin":
                self.asked[number] = Asked(number, line["method"], line["args"])
            if kind in ("begin", "step"):
                self.last[number] = index
            elif kind == "end":
                self.ends[number] = line
            elif kind in ("read", "compared"):
                self.inputs.setdefault(number, []).append(line)

    @property
    def stop(self) -> str:
        """Return why the recording ended, "" if the file does not say."""
        last = self.lines[-1] if self.lines else {}
        return str(last.get(STOP, ""))

    def only(self, numbers: Iterable[int]) -> Trace:
        """Return the trace of some of the operations alone; states are of no use in it."""
        kept = set(numbers)
        lines = [
            line for line in self.lines
            if (first := next(iter(line)))  not in (STATE, STOP)
            and (first not in OF_OPERATIONS or line[first] in kept)
        ]  # fmt: skip
        return Trace(self.header, [*lines, {STOP: "shrunk", "operations": len(kept)}])

    def dump(self) -> bytes:
        """Return the trace as a file's bytes."""
        return b"".join(map(encode, [self.header, *self.lines]))


OF_OPERATIONS = frozenset(("begin", "step", "end", "read", "compared"))


def outcome_of(end: Line) -> Outcome:
    """Return of an end what came of the operation: "ok", "refused" or "failed"."""
    return {key: end[key] for key in ("ok", "refused", "failed") if key in end}


def read(file: IO[bytes]) -> Trace:
    """Read a trace.

    Raises:
        TraceError: it is none, or of a newer version.
    """
    first = file.readline()
    header = _parsed(first)
    if header is None or header.get("format") != NAME:
        raise TraceError("this is no trace: its first line is no header of format rmem-trace")
    version = header.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise TraceError(
            f"the trace is of version {version}, and this rmemd reads up to {VERSION}: "
            "read it with a newer rmemd"
        )
    lines: list[Line] = []
    truncated = False
    for data in file:
        line = _parsed(data) if data.endswith(b"\n") else None
        if line is None:
            truncated = True
            break
        lines.append(line)
    trace = _checked(header, lines)
    trace.truncated = truncated or not trace.stop
    return trace


def _checked(header: Line, lines: list[Line]) -> Trace:
    try:
        if not isinstance(header["options"]["nframes"], int):
            raise TypeError("options.nframes is no number")
        trace = Trace(header, lines)
        unknown = [n for n in (*trace.last, *trace.ends) if n not in trace.asked]
    except (KeyError, TypeError, StopIteration) as error:
        raise TraceError(f"the trace is damaged: {error!r}") from error
    if unknown:
        raise TraceError(f"the trace is damaged: operation {unknown[0]} never began")
    return trace


def _parsed(data: bytes) -> Line | None:
    try:
        line = json.loads(data)
    except ValueError:
        return None
    return line if isinstance(line, dict) and line else None
