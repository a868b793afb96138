"""How a bug is planted: a module's source, rewritten as it is imported.

Owns the import hook. A mutant's process is a fresh interpreter that has ``site`` on its path, whose
``sitecustomize`` calls ``plant``; daemons that a test starts inherit both, and are mutated as well.
A text that is not found exactly once is an error, and so is a module that nobody imported: the hook
notes in a file that the rewritten module was executed, and the parent looks for that note.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType

MUTANT = "RMEMD_PLANTED_MUTANT"
NOTE = "RMEMD_PLANTED_NOTE"


class NotPlanted(Exception):
    """A mutant's text is not in the module, or is there more than once."""


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
        name: what is wrong.
        row: the class of bugs that it is of: a key of ``catalogue.ROWS``.
        module: the module that is changed.
        old: source text that is there once; ``new`` replaces it.
        driver: a scenario's name, or a test's id, that runs into it.
        check: what must find it: "I3" (an invariant of ``rmemd.engine.invariants.check``), or ""
            for the driver's own claims.
        also: further texts of the module, each there once, and what replaces them.
    """

    name: str
    row: str
    module: str
    old: str
    new: str
    driver: str
    check: str = ""
    also: tuple[tuple[str, str], ...] = ()

    @property
    def killer(self) -> str:
        """Return the name of the check that must kill it."""
        return f"{self.check} in {self.driver}" if self.check else self.driver

    @property
    def is_by_test(self) -> bool:
        """Return whether an existing test is its check."""
        return "::" in self.driver


def rewrite(mutant: Mutant, source: str) -> str:
    """Return a module's source with the bug in it.

    Raises:
        NotPlanted: its text is not there exactly once, or nothing would change.
    """
    for old, new in ((mutant.old, mutant.new), *mutant.also):
        found = source.count(old)
        if found != 1 or old == new:
            raise NotPlanted(
                f"{mutant.name}: its text is in {mutant.module} {found} times, not once"
            )
        source = source.replace(old, new)
    return source


def source_of(module: str) -> Path:
    """Return where a module's source is."""
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin)


class _Loader(SourceFileLoader):
    """Compiles a module from rewritten source; no cached bytecode is read or written."""

    def __init__(self, mutant: Mutant, path: str) -> None:
        super().__init__(mutant.module, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = rewrite(self._mutant, Path(self.path).read_text())
        return compile(source, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if note := os.environ.get(NOTE):
            with Path(note).open("a") as file:
                file.write(f"{self._mutant.name}\n")


class _Finder(MetaPathFinder):
    """Finds the one module that is changed."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._mutant.module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None:
            raise NotPlanted(f"{self._mutant.name}: there is no module {fullname}")
        spec.loader = _Loader(self._mutant, spec.origin)
        return spec


def plant(mutant: Mutant) -> None:
    """Have the module be imported with the bug in it; nobody has imported it yet."""
    if mutant.module in sys.modules:
        raise NotPlanted(f"{mutant.name}: {mutant.module} is imported already")
    sys.meta_path.insert(0, _Finder(mutant))
