"""What lines hold: arguments, results and refusals as plain values, and bytes as digests.

Owns the way from the engine's types to JSON and back. Bytes that a caller brings or is given are
written as their length and one digest a page, under a key that is never written: equal pages can
be told from different ones within a trace, and nothing can be guessed from it. A replay has
stand-ins for them, made from the digests; a page of zeros stays one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.engine.migrate import Moved, Outcome
from rmemd.engine.programme import Instruction, Opcode, Pattern
from rmemd.errors import RmemError
from rmemd.hooks.types import Agent
from rmemd.model.files import RestrictedFile
from rmemd.model.sessions import GrantRange, Owner
from rmemd.model.vms import Vcpu, Vm
from rmemd.units import I64, PAGE_SIZE, run_breaks

ZERO = "zero"
DIGEST_BYTES = 8
# measured with a clock, so that no two runs agree on it
MEASURES = frozenset(("pause_us",))


# --- bytes ---------------------------------------------------------------------------------------
class Digests:
    """Digests of bytes under a key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def payload(self, data: bytes) -> dict[str, Any]:
        """Return what is written of bytes: their length, and a digest for each page of them."""
        pages = [self._of(data[at : at + PAGE_SIZE]) for at in range(0, len(data), PAGE_SIZE)]
        return {"length": len(data), "pages": pages}

    def _of(self, page: bytes) -> str:
        if not any(page):
            return ZERO
        return hashlib.blake2b(page, key=self._key, digest_size=DIGEST_BYTES).hexdigest()


def bytes_of(payload: Mapping[str, Any]) -> bytes:
    """Return bytes in place of a payload's: as many as it had, equal where they were equal."""
    left, found = payload["length"], []
    for digest in payload["pages"]:
        size = min(left, PAGE_SIZE)
        made = hashlib.shake_128(digest.encode()).digest(size)
        found.append(bytes(size) if digest == ZERO else made)
        left -= size
    return b"".join(found)


def stand_in_rows(pfns: I64) -> np.ndarray:
    """Return pages in place of those that frames held when a recording began: uint8 (n, 4096)."""
    made = [hashlib.shake_128(b"pfn %d" % pfn).digest(PAGE_SIZE) for pfn in pfns.tolist()]
    return np.frombuffer(b"".join(made), dtype=np.uint8).reshape(-1, PAGE_SIZE)


# --- arrays --------------------------------------------------------------------------------------
def runs_of(numbers: I64) -> list[list[int]]:
    """Return numbers as runs [first, count], in their order."""
    numbers = np.asarray(numbers, dtype=np.int64)
    starts = run_breaks(numbers)
    counts = np.diff(np.append(starts, numbers.size))
    return np.stack((numbers[starts], counts), axis=1).tolist() if numbers.size else []


def numbers_of(runs: Iterable[tuple[int, int]]) -> I64:
    """Return the numbers of runs."""
    parts = [np.arange(first, first + n, dtype=np.int64) for first, n in runs]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


# --- what was asked ------------------------------------------------------------------------------
def argument(name: str, value: Any, digests: Digests) -> Any:
    """Return an argument of an engine's method as a plain value."""
    if isinstance(value, bytes | bytearray | memoryview):
        return digests.payload(bytes(value))
    if isinstance(value, Instruction):
        return {key: one for key, one in _fields(value, digests).items() if one}
    if name == "ranges":
        return [[int(word) for word in one] for one in value]
    if isinstance(value, list | tuple) and name != "pfns":
        return [argument("", one, digests) for one in value]
    return plain(value, digests)


def asked(name: str, value: Any) -> Any:
    """Return an argument again, from a plain value."""
    read = _ARGUMENTS.get(name)
    if read is not None:
        return read(value)
    return bytes_of(value) if is_payload(value) else value


def is_payload(value: Any) -> bool:
    """Return whether a plain value stands for bytes."""
    return isinstance(value, dict) and value.keys() == {"length", "pages"}


_ARGUMENTS: Mapping[str, Any] = {
    "owner": lambda value: Owner(**value),
    "grants": lambda value: tuple(GrantRange(**one) for one in value),
    "programme": lambda value: tuple(map(_instruction, value)),
    "agent": lambda value: Agent[value],
    "pfns": numbers_of,
    "nodes": tuple,
    "ranges": lambda value: [tuple(one) for one in value],
}


def _instruction(value: Mapping[str, Any]) -> Instruction:
    named: dict[str, Any] = {
        **value, "opcode": Opcode[value["opcode"]],
        "pattern": Pattern[value.get("pattern", Pattern.BYTE.name)],
    }  # fmt: skip
    return Instruction(**named)


# --- what came of it -----------------------------------------------------------------------------
def plain(value: Any, digests: Digests) -> Any:
    """Return any value of the engine as a plain one; bytes become digests."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, int | np.integer | np.bool_):
        return int(value)
    if isinstance(value, bytes):
        return digests.payload(value)
    if isinstance(value, np.ndarray):
        return runs_of(value)
    if isinstance(value, RmemError):
        return refusal(value)
    if isinstance(value, Mapping):
        return {str(key): plain(one, digests) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one, digests) for one in value]
    return _object(value, digests)


def _object(value: Any, digests: Digests) -> Any:
    if isinstance(value, Vm):
        return {"vm": value.info.vm}
    if isinstance(value, RestrictedFile):
        return {"file": value.info.file}
    if isinstance(value, Moved) and value.outcome is not Outcome.MOVED:
        # nowhere
        return {**_fields(value, digests), "dst": []}
    if isinstance(value, Struct):
        return _fields(value, digests)
    return type(value).__name__


def _fields(value: Any, digests: Digests) -> dict[str, Any]:
    # a programme was said when it was given
    left_out = {"programme"} if isinstance(value, Vcpu) else MEASURES
    return {
        name: plain(one, digests)
        for name in value.__struct_fields__
        if name not in left_out and not callable(one := getattr(value, name))
    }


def refusal(error: RmemError) -> dict[str, Any]:
    """Return a refusal as a plain value; what it does not name is left out."""
    details = error.details
    said = {
        "reason": error.reason.name, "errno": error.errno_name, "message": error.message,
        "page": details.page, "state": details.state, "rule": details.rule,
        "holders": [str(holder) for holder in details.holders], "where": details.where,
        "field": details.field, "vendor_status": details.vendor_status,
    }  # fmt: skip
    found: dict[str, Any] = {key: one for key, one in said.items() if one}
    if details.progress_pages is not None:
        found["progress_pages"] = details.progress_pages
    return found


def outcome(result: Any, error: BaseException | None, digests: Digests) -> dict[str, Any]:
    """Return what came of an operation: {"ok": ...}, {"refused": ...} or {"failed": ...}."""
    if error is None:
        return {"ok": plain(result, digests)}
    if isinstance(error, RmemError):
        return {"refused": refusal(error)}
    return {"failed": type(error).__name__}


def comparable(value: Any) -> Any:
    """Return of an outcome what two runs with other bytes can be compared by: lengths of them."""
    if is_payload(value):
        return {"length": value["length"]}
    if isinstance(value, dict):
        return {key: comparable(one) for key, one in value.items()}
    return [comparable(one) for one in value] if isinstance(value, list) else value
