"""A configuration as text: what is in effect and why, the JSON schema, the manual's tables.

Owns ``rmemd config dump|schema`` and the tables of docs/configuration.md. What ``dump`` writes is a
file that ``rmemd serve --config`` takes, and that means the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmemd.daemon.config import Config, Key, keys, sections
from rmemd.daemon.configload import (
    DEFAULT,
    KeyPath,
    Loaded,
    json_text,
    key_of,
    spelt,
    values,
)
from rmemd.daemon.values import size_of, size_text


def dump(loaded: Loaded) -> str:
    """Return the effective settings as TOML, each with its origin, and whether it is reloadable."""
    lines: list[str] = []
    table: KeyPath = ()
    for path, value in _in_order(loaded):
        if path[:-1] != table:
            table = path[:-1]
            lines += ["", f"[{spelt(table)}]"]
        origin = loaded.origins.get(path, DEFAULT)
        reloadable = "; reloadable" if key_of(path).reloadable else ""
        # an origin can quote what somebody wrote: a comment ends with its line
        comment = origin if origin.isprintable() else json_text(origin)
        lines.append(f"{path[-1]} = {literal(key_of(path), value)}  # {comment}{reloadable}")
    return "\n".join(lines).lstrip() + "\n"


def _in_order(loaded: Loaded) -> Iterator[tuple[KeyPath, Any]]:
    """Yield what to write: every key, and of tenants' tables those that were set."""
    for path, value in values(loaded.config):
        if len(path) == 2 or path in loaded.origins:
            yield path, value


def literal(key: Key, value: Any) -> str:
    """Return a value as the file spells it."""
    if value is None:
        return '""'
    if isinstance(value, bool):
        return str(value).lower()
    if key.read is size_of:
        return json_text(size_text(value))
    if isinstance(value, (str, Path)):
        return json_text(str(value))
    if isinstance(value, tuple):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return repr(value)


def schema() -> str:
    """Return the JSON schema of the file; ``x-reloadable`` says what SIGHUP applies."""
    import msgspec

    def of_paths(kind: type) -> dict[str, Any]:
        return {"type": "string"}

    made = msgspec.json.schema(Config, schema_hook=of_paths)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "rmemd.toml"}
    for section in made["$defs"]["Config"]["properties"].values():
        section.pop("default", None)
    for definition in made["$defs"].values():
        for name, prop in definition.get("properties", {}).items():
            _tidy(name, prop)
    return json.dumps({**head, **made}, indent=2, ensure_ascii=False)


def _tidy(name: str, prop: dict[str, Any]) -> None:
    """Make a property say what the file takes: no null in TOML, no default of this machine."""
    if "anyOf" in prop:
        prop["type"] = "string"
        del prop["anyOf"]
    if prop.get("default", 0) is None:
        prop["default"] = ""
    if name == "host_memory":
        prop.update(type=["string", "integer"], default=size_text(prop["default"]))


def table(section: str) -> str:
    """Return a section's keys as a table of docs/configuration.md."""
    lines = ["| key | default | takes | reloadable | meaning |", "|---|---|---|---|---|"]
    for one in keys().values():
        if one.section == section:
            default = one.default_text or f"`{literal(one, one.default)}`"
            reloadable = "yes" if one.reloadable else "no"
            cells = (f"`{one.name}`", default, one.legal, reloadable, one.description)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def documentation() -> str:
    """Return all sections with their tables."""
    parts = []
    for name, cls in sections().items():
        doc = (cls.__doc__ or "").partition(": ")[2].strip()
        parts.append(f"### [{name}]\n\n{doc[:1].upper()}{doc[1:]}\n\n{table(name)}\n")
    return "\n".join(parts)
