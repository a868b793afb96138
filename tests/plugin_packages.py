"""Plugins installed for one daemon: packages with dist-info in a directory on its PYTHONPATH.

Nothing is installed in the environment: importlib.metadata finds a ``*.dist-info`` wherever a path
entry has one, as it does for any installed distribution.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUP = "rmemd.platforms.v1"
HEAD = """
import threading
from rmemd.errors import *
from rmemd.hooks import *

class Guest:
    @hookimpl
    def invalidate_start(self, tx, runs, why):
        pass

    @hookimpl
    def invalidate_end(self, tx, runs, why, ok):
        pass

class Platform:
    @hookimpl
    def variants(self):
        return [Variant(NAME, "made for a test")]

    @hookimpl
    def start(self, host):
        pass

    @hookimpl
    def make_consumer(self, vm, tx, variant, config):
        tx.use_key(tx.new_key(plain=True))
        return Made()

    @hookimpl
    def destroy_consumer(self, tx, consumer):
        pass
"""


class SitePackages:
    """A directory of distributions; ``env`` is what a daemon must be started with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._platforms: dict[str, str] = {}
        self._edits = 0
        directory.mkdir()

    @property
    def env(self) -> dict[str, str]:
        """Return the environment that has the packages, before whatever else it has."""
        paths = [str(self.directory), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def plugin(self, name: str, hooks: str = "", *, source: str | None = None) -> None:
        """Install a plugin: a consumer ``name`` with the pair and ``hooks``, or a whole source."""
        if source is None:
            body = "".join(f"    {line}\n" if line else "\n" for line in hooks.splitlines())
            made = f"\nclass Made(Guest):\n    pass\n{body}"
            source = f"NAME = {name!r}\n{HEAD}{made}"
        package = self.directory / f"rmemd_{name}"
        package.mkdir()
        (package / "__init__.py").write_text(source)
        self._platforms[name] = "Platform"
        self.dist_info(f"rmemd-{name}", f"{name} = rmemd_{name}:Platform")

    def dist_info(self, distribution: str, entry_point: str, version: str = "9.9") -> None:
        """Write what makes a package an installed distribution."""
        info = self.directory / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry_point}\n")

    def edit(self, name: str, *changes: tuple[str, str], version: str) -> None:
        """Change a plugin's source, as the installation of another version of it would."""
        source = self.directory / f"rmemd_{name}" / "__init__.py"
        text = source.read_text()
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        source.write_text(text)
        # the byte code that is cached is told by seconds and size: an edit may have changed neither
        self._edits += 1
        later = source.stat().st_mtime + self._edits
        os.utime(source, (later, later))
        (info,) = self.directory.glob(f"rmemd_{name}-*.dist-info")
        shutil.rmtree(info)
        self.dist_info(f"rmemd-{name}", f"{name} = rmemd_{name}:{self._platforms[name]}", version)

    def remove(self, name: str) -> None:
        """Take a plugin away, as `pip uninstall` would."""
        (info,) = self.directory.glob(f"rmemd_{name}-*.dist-info")
        shutil.rmtree(info)
        shutil.rmtree(self.directory / f"rmemd_{name}")

    def from_template(self, name: str) -> Path:
        """Copy plugins/template under another name, and do nothing to it but rename."""
        package = self.directory / f"rmemd_{name}"
        package.mkdir()
        text = (ROOT / "plugins" / "template" / "rmemd_template" / "__init__.py").read_text()
        for old in ("template", "Template", "TEMPLATE"):
            new = name.upper() if old.isupper() else name.title() if old.istitle() else name
            text = text.replace(old, new)
        (package / "__init__.py").write_text(text)
        self._platforms[name] = f"{name.title()}Platform"
        self.dist_info(f"rmemd-{name}", f"{name} = rmemd_{name}:{name.title()}Platform")
        return package / "__init__.py"

    def copy_in_tree(self, name: str) -> Path:
        """Copy a plugin of this repository, so that it comes before the installed one."""
        package = self.directory / f"rmemd_{name}"
        shutil.copytree(ROOT / "plugins" / name / f"rmemd_{name}", package)
        for source in (ROOT / "plugins" / name / "pyproject.toml").read_text().splitlines():
            if source.startswith(f"{name} = "):
                point = source.split('"')[1]
        self.dist_info(f"rmemd-{name}", f"{name} = {point}", version="0.1.0+edited")
        return package
