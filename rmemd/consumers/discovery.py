"""Installed plugins: found, imported, and taken out of the interpreter again.

Owns what is the process's and not the engine's: entry points, ``sys.path``, ``sys.modules`` and the
reasons that a plugin's modules declare. What is installed while the daemon runs is found; what is
reloaded is imported anew, and put back as it was if the new code is no good.
"""

from __future__ import annotations

import importlib
import site
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import (
    Distribution,
    EntryPoint,
    MetadataPathFinder,
    PackageNotFoundError,
    distributions,
)
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from msgspec import Struct

from rmemd.errors import REASONS, Reason
from rmemd.hooks.spec import ENTRY_POINTS

OURS = frozenset(("rmemd", "rmem"))


class TakenOut(Struct, frozen=True):
    """Modules and reasons of packages, as they were when they were taken out."""

    packages: frozenset[str]
    modules: dict[str, ModuleType]
    reasons: dict[str, Reason]


def installed() -> list[EntryPoint]:
    """Return the entry points of all plugins that are installed by now, in order of name."""
    _read_new_paths()
    importlib.invalidate_caches()
    # which does not reach the distributions before Python 3.12; an instance, since the method of
    # 3.11 is not the class method that it looks like
    MetadataPathFinder().invalidate_caches()
    # the first of a name hides the others, as ``entry_points`` has it, by the name that it takes
    name_of = attrgetter("_normalized_name")
    first = {name_of(one): one for one in reversed([*_distributions()])}
    points = (point for one in first.values() for point in one.entry_points)
    return sorted((one for one in points if one.group == ENTRY_POINTS), key=attrgetter("name"))


def version_of(name: str) -> str:
    """Return the version of the distribution of this name.

    Raises:
        PackageNotFoundError: none is installed.
    """
    for one in _distributions(name):
        return release_of(one)[1]
    raise PackageNotFoundError(name)


def release_of(distribution: Distribution) -> tuple[str, str]:
    """Return a distribution's name and version.

    Read from the first lines of what ``importlib.metadata`` has parsed as a mail for each of them.
    """
    said: dict[str, str] = {}
    for line in (distribution.read_text("METADATA") or "").splitlines():
        key, colon, value = line.partition(": ")
        if not colon:
            break
        said.setdefault(key, value)
    if "Name" in said and "Version" in said:
        return said["Name"], said["Version"]
    return distribution.name, distribution.version


def load(point: EntryPoint) -> Any:
    """Import what an entry point names, and know the reasons that this declares."""
    with _noting_reasons(packages_of(point)):
        return point.load()


def packages_of(point: EntryPoint) -> frozenset[str]:
    """Return the top-level packages of a plugin's distribution."""
    found = {point.module.partition(".")[0]}
    for file in (point.dist.files or []) if point.dist is not None else []:
        if file.suffix == ".py" and not file.is_absolute() and ".." not in file.parts:
            found.add(file.parts[0].removesuffix(".py"))
    return frozenset(found - OURS)


def take_out(packages: Iterable[str]) -> TakenOut:
    """Forget packages, so that they are imported anew; the code that runs goes on."""
    names = frozenset(packages)
    mine = [name for name in list(sys.modules) if name.partition(".")[0] in names]
    modules = {name: sys.modules.pop(name) for name in mine}
    declared = {name for package in names for name in _declared.pop(package, ())}
    reasons = {name: REASONS.pop(name) for name in sorted(declared) if name in REASONS}
    return TakenOut(names, modules, reasons)


def put_back(taken: TakenOut) -> None:
    """Undo ``take_out``, and forget what was imported since."""
    take_out(taken.packages)
    sys.modules.update(taken.modules)
    REASONS.update(taken.reasons)
    for package in taken.packages:
        _declared[package] = set(taken.reasons)


@contextmanager
def _noting_reasons(packages: frozenset[str]) -> Iterator[None]:
    before = set(REASONS)
    try:
        yield
    finally:
        for package in packages:
            _declared.setdefault(package, set()).update(REASONS.keys() - before)


def _distributions(name: str | None = None) -> Iterable[Distribution]:
    # a path that is not there, as the interpreter's own archive, would be looked into as a zip file
    return distributions(name=name, path=[one for one in sys.path if Path(one).exists()])


def _read_new_paths() -> None:
    """Honour the .pth files that came since the start (an editable install is one), each once."""
    found = _path_files()
    for directory, name, _ in sorted(found - _known_path_files):
        site.addpackage(directory, name, None)
    _known_path_files.update(found)


def _path_files() -> set[tuple[str, str, int]]:
    directories = [*site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        directories.append(site.getusersitepackages())
    return {
        (directory, file.name, file.stat().st_mtime_ns)
        for directory in directories
        for file in Path(directory).glob("*.pth")
    }


# the interpreter has one table of modules and one of reasons, so what is known of them is its own
_declared: dict[str, set[str]] = {}
_known_path_files = _path_files()
