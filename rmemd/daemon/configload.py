"""From a file, --set and options to one Config, or to everything that is wrong with them.

Owns the order (default < file < environment < --set < options), where each value came from, and the
messages: each names the origin, the key, what was found and what is legal, and all come at once.
msgspec's own decoder stops at the first error, so it is asked key by key.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, ValidationError, convert, field
from msgspec.structs import replace

from rmemd.daemon.config import Config, Key, TenantLimits, conflicts, keys, sections
from rmemd.daemon.values import is_tenant, size_of, size_text

FILE_NAME = "rmemd.toml"
FILE_MAX_BYTES = 1 << 20
SHOWN_MAX = 60
DEFAULT = "default"
SOCKET_DIR = "daemon.socket_dir"
SOCKET_DIR_VARIABLE = "RMEMD_SOCKET_DIR"
# how a key is addressed: ("daemon", "nodes"), ("limits", "tenants", "uid:1000", "frames")
KeyPath = tuple[str, ...]


class Problem(Struct, frozen=True):
    """One thing that is wrong: where it stands, the key, what was found, what is legal."""

    origin: str
    key: str
    found: str
    legal: str
    is_usage: bool = False

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        return f"{self.origin}: {key}found {self.found}; legal: {self.legal}"


class ConfigError(Exception):
    """Everything that is wrong with a configuration."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))

    @property
    def is_usage(self) -> bool:
        """Return whether only the command line is at fault, not a file."""
        return all(problem.is_usage for problem in self.problems)


class Loaded(Struct, frozen=True):
    """A configuration, the file that was read (None: none), and each set key's origin."""

    config: Config
    file: Path | None
    origins: Mapping[KeyPath, str]


class Sources(Struct, frozen=True):
    """Where to look: ``file`` None means the default place, where a file may be absent.

    ``sets`` are texts "section.key=value"; ``options`` maps "section.key" to (option, value).
    """

    file: Path | None = None
    sets: tuple[str, ...] = ()
    options: Mapping[str, tuple[str, object]] = field(default_factory=dict)

    def load(self) -> Loaded:
        """Read everything anew.

        Raises:
            ConfigError: with every problem there is.
        """
        return _Loading(self).load()


def default_file() -> Path:
    """Return /etc/rmemd/rmemd.toml for root, else rmemd/rmemd.toml in $XDG_CONFIG_HOME."""
    if os.geteuid() == 0:
        return Path("/etc/rmemd") / FILE_NAME
    home = os.environ.get("XDG_CONFIG_HOME", "")
    # a relative one is to be ignored (XDG Base Directory Specification)
    base = Path(home) if home.startswith("/") else Path.home() / ".config"
    return base / "rmemd" / FILE_NAME


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return (old, new) of every key whose value is another one."""
    before, after = dict(values(old)), dict(values(new))
    return {
        spelt(path): (before.get(path), after.get(path))
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    }


def values(config: Config) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every key's path and value; of tenants' tables too."""
    for one in keys().values():
        yield (one.section, one.name), getattr(getattr(config, one.section), one.attribute)
    for tenant, limits in config.limits.tenants.items():
        for one in _limit_keys().values():
            yield ("limits", "tenants", tenant, one.name), getattr(limits, one.attribute)


def key_of(path: KeyPath) -> Key:
    """Return the key that a path addresses."""
    return keys()[f"{path[0]}.{path[-1]}"]


def spelt(path: KeyPath) -> str:
    """Return a path as TOML spells it."""
    return ".".join(part if _is_bare(part) else f'"{part}"' for part in path)


def _is_bare(part: str) -> bool:
    return part.isascii() and part.replace("-", "_").isidentifier()


def _limit_keys() -> dict[str, Key]:
    return {one.name: one for one in keys().values() if one.section == "limits"}


class _Loading:
    """One reading of all sources."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._problems: list[Problem] = []
        self._found: dict[KeyPath, Any] = {}
        self._origins: dict[KeyPath, str] = {}
        self._usage: set[str] = set()

    def load(self) -> Loaded:
        file = self._read_file()
        self._read_environment()
        for text in self._sources.sets:
            self._read_set(text)
        for name, (option, value) in self._sources.options.items():
            self._usage.add(option)
            self._take(tuple(name.split(".")), value, option, Path.cwd())
        config = self._build()
        # a key that is wrong by itself stands at its default here: no consequences of that
        if not self._problems:
            self._check_conflicts(config)
        if self._problems:
            raise ConfigError(self._problems)
        return Loaded(config, file, self._origins)

    # --- sources -----------------------------------------------------------------------------
    def _read_file(self) -> Path | None:
        file = self._sources.file or default_file()
        try:
            with file.open("rb") as opened:
                self._check_owner(file, os.fstat(opened.fileno()))
                data = opened.read(FILE_MAX_BYTES + 1)
            if len(data) > FILE_MAX_BYTES:
                raise ValueError(f"more than {FILE_MAX_BYTES} bytes")
            tables = _toml(data.decode())
        except FileNotFoundError:
            if self._sources.file is not None:
                self._wrong(str(file), "", "no file", "a file, where --config names one")
            return None
        except OSError as error:
            self._wrong(str(file), "", error.strerror or str(error), "a file that can be read")
            return file
        except ValueError as error:
            self._wrong(str(file), "", f"no TOML ({error})", "TOML 1.0 in UTF-8")
            return file
        self._walk(tables, str(file), file.absolute().parent)
        return file

    def _check_owner(self, file: Path, info: os.stat_result) -> None:
        """Refuse a file that anybody may write: it says who is admin."""
        if not stat.S_ISREG(info.st_mode):
            return
        if info.st_uid not in (0, os.geteuid()):
            legal = f"a file of uid {os.geteuid()} or root"
            self._wrong(str(file), "", f"a file of uid {info.st_uid}", legal)
        if info.st_mode & stat.S_IWOTH:
            found = f"a file that everybody may write (mode {stat.S_IMODE(info.st_mode):o})"
            self._wrong(str(file), "", found, f"chmod o-w {file}")

    def _read_environment(self) -> None:
        named = os.environ.get(SOCKET_DIR_VARIABLE)
        if named:
            path = tuple(SOCKET_DIR.split("."))
            self._usage.add(f"${SOCKET_DIR_VARIABLE}")
            self._take(path, named, f"${SOCKET_DIR_VARIABLE}", Path.cwd())

    def _read_set(self, text: str) -> None:
        origin = "--set"
        self._usage.add(origin)
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError("no =")
            path, tree = _dotted(name)
        except ValueError:
            self._wrong(origin, "", json_text(text), 'section.key=value, a tenant in quotes ("")')
            return
        leaf = f"{path[0]}.{path[-1]}"
        plain = leaf in keys() and keys()[leaf].is_text and not value.strip().startswith(('"', "'"))
        try:
            _put(tree, path, value if plain else _toml(f"value = {value}")["value"])
        except ValueError:
            legal = keys()[leaf].legal if leaf in keys() else "a TOML value"
            self._wrong(origin, spelt(path), value, legal)
            return
        self._walk(tree, origin, Path.cwd())

    # --- keys --------------------------------------------------------------------------------
    def _walk(self, tables: Mapping[str, Any], origin: str, base: Path) -> None:
        for section, table in tables.items():
            if section not in sections():
                self._unknown(origin, (section,), list(sections()), table)
            elif not isinstance(table, dict):
                self._wrong(origin, section, shown(table), f"a table: [{section}]")
            else:
                for name, value in table.items():
                    if (section, name) == ("limits", "tenants"):
                        self._walk_tenants(value, origin, base)
                    else:
                        self._take((section, name), value, origin, base)

    def _walk_tenants(self, tenants: Any, origin: str, base: Path) -> None:
        if not isinstance(tenants, dict):
            self._wrong(origin, "limits.tenants", shown(tenants), '[limits.tenants."uid:1000"]')
            return
        for tenant, table in tenants.items():
            path = ("limits", "tenants", tenant)
            if not is_tenant(tenant):
                legal = 'tenants: "uid:N" or "spiffe://DOMAIN/PATH"'
                self._wrong(origin, spelt(path[:2]), json_text(tenant), legal)
            elif not isinstance(table, dict):
                self._wrong(origin, spelt(path), shown(table), "a table of limits")
            else:
                for name, value in table.items():
                    self._take((*path, name), value, origin, base)

    def _take(self, path: KeyPath, raw: Any, origin: str, base: Path) -> None:
        if f"{path[0]}.{path[-1]}" not in keys():
            section = [one.name for one in keys().values() if one.section == path[0]]
            self._unknown(origin, path, section, raw)
            return
        one = key_of(path)
        try:
            value = one.read(raw) if one.read else convert(raw, one.hint)
        except (ValueError, ValidationError):
            self._wrong(origin, spelt(path), shown(raw), one.legal)
            return
        if isinstance(value, Path):
            value = base / value
        self._found[path] = value
        self._origins[path] = origin

    def _unknown(self, origin: str, path: KeyPath, near: list[str], raw: Any) -> None:
        from difflib import get_close_matches  # who makes no mistake does not wait for it

        kind = "key" if len(path) > 1 else "section"
        close = get_close_matches(path[-1], near, 1, 0.6)
        elsewhere = [one.spelt for one in keys().values() if one.name == path[-1]]
        also = get_close_matches(path[-1], [one.name for one in keys().values()], 1, 0.75)
        if close:
            hint = f"; did you mean {spelt((*path[:-1], close[0]))}?"
        elif elsewhere:
            hint = f"; did you mean {elsewhere[0]}?"
        elif also:
            hint = "; did you mean " + next(
                one.spelt for one in keys().values() if one.name == also[0]
            ) + "?"  # fmt: skip
        else:
            hint = ""
        found = f"an unknown {kind} ({shown(raw)}){hint}"
        self._wrong(origin, spelt(path), found, "one of " + ", ".join(near))

    # --- the whole ---------------------------------------------------------------------------
    def _build(self) -> Config:
        tables: dict[str, dict[str, Any]] = {name: {} for name in sections()}
        tenants: dict[str, dict[str, Any]] = {}
        for path, value in self._found.items():
            table = tables[path[0]] if len(path) == 2 else tenants.setdefault(path[2], {})
            table[key_of(path).attribute] = value
        own = TenantLimits(**tables["limits"])
        tables["limits"]["tenants"] = {
            tenant: replace(own, **mine) for tenant, mine in sorted(tenants.items())
        }
        made: dict[str, Any] = {name: cls(**tables[name]) for name, cls in sections().items()}
        return Config(**made)

    def _check_conflicts(self, config: Config) -> None:
        shown_values = dict(values(config))
        for name, legal in conflicts(config):
            path = tuple(name.split("."))
            value = shown_values[path]
            found = size_text(value) if key_of(path).read is size_of else shown(value)
            self._wrong(self._origins.get(path, DEFAULT), name, found, legal)

    def _wrong(self, origin: str, key: str, found: str, legal: str) -> None:
        # a default that does not go with another key is that key's fault
        by_default = origin == DEFAULT and self._usage.issuperset(self._origins.values())
        usage = origin in self._usage or by_default
        self._problems.append(Problem(origin, key, found, legal, usage))


def _toml(text: str) -> dict[str, Any]:
    import tomllib  # 5 ms that a daemon without a file has better uses for

    return tomllib.loads(text)


def _dotted(name: str) -> tuple[KeyPath, dict[str, Any]]:
    """Return the path that a dotted key means, and empty tables down to it."""
    tree = _toml(f"{name} = 0")
    path: list[str] = []
    at: Any = tree
    while isinstance(at, dict):
        ((part, at),) = at.items()
        path.append(part)
    if len(path) < 2 or "\n" in name:
        raise ValueError(name)
    return tuple(path), tree


def _put(tree: dict[str, Any], path: KeyPath, value: Any) -> None:
    for part in path[:-1]:
        tree = tree[part]
    tree[path[-1]] = value


def json_text(text: str) -> str:
    """Return a text as TOML's basic string."""
    import json

    # TOML wants DEL escaped, which JSON does not
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def shown(value: Any) -> str:
    """Return what was found, with its type, short."""
    kinds = {
        str: "a string", bool: "a truth value", int: "a whole number", float: "a number",
        list: "a list", tuple: "a list", dict: "a table",
    }  # fmt: skip
    if value is None or isinstance(value, Path):
        value = str(value or "")
    if isinstance(value, str):
        text = json_text(value)
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(shown(one).rpartition(" (")[0] for one in value) + "]"
    else:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    text = text if len(text) <= SHOWN_MAX else f"{text[: SHOWN_MAX - 1]}…"
    return f"{text} ({kinds.get(type(value), 'a ' + type(value).__name__)})"
