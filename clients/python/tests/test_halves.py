"""The two halves of the library are one: generated where they can be, equal where they show."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rmem_client

PACKAGE = Path(rmem_client.__file__).parent
UNASYNC = PACKAGE.parent / "unasync.py"
AWAITED = re.compile(r"Coroutine\[Any, Any, (.*)\]")


@pytest.fixture(scope="module")
def unasync() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unasync", UNASYNC)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules() -> list[str]:
    return sorted(path.stem for path in (PACKAGE / "aio").glob("*.py") if path.stem != "__init__")


# --- what is generated ---------------------------------------------------------------------------
def test_the_sync_half_is_what_the_asyncio_half_gives(unasync: ModuleType) -> None:
    sources = unasync.sources()
    assert {path.stem for path in sources} >= {"client", "files", "host", "vcpus", "vms"}
    for source in sources:
        made = unasync.target(source).read_text()
        assert made == unasync.generate(source), f"{source.name}: run `make client`"
        assert not re.search(r"\b(async|await|asyncio)\b|\.\.\w", made), source.name


def test_what_says_generated_has_a_source(unasync: ModuleType) -> None:
    header = unasync.HEADER.split("{")[0]
    said = {path.name for path in PACKAGE.glob("*.py") if path.read_text().startswith(header)}
    assert said == {path.name for path in unasync.sources()}


def test_every_rule_of_the_generator(unasync: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "aio" / "things.py"
    source.parent.mkdir()
    source.write_text(
        '''"""Things, as in::

    from rmem_client import aio

    async with aio.Client() as client:
        one = await client.things.one()
        async for thing in client.things.all(): ...

That is all.
"""

from collections.abc import AsyncIterator
from typing import Any

from ..errors import RmemError
from .connection import Connection


class Things:
    async def __aenter__(self) -> Any:
        return [await self.one(x) async for x in self.all() if x != "await ..y"]

    async def all(self) -> AsyncIterator[int]:
        # await self.one() comes later
        try:
            async with self.lock, self.other(
                1
            ):
                for thing in (await self.one(...)).things:
                    yield thing
        except (StopAsyncIteration, RmemError):
            reply = (
                await self._connection.call(Connection, 1)
            )
'''
    )
    assert unasync.generate(source).split("\n", 1)[1] == (
        '''"""Things, as in::

    from rmem_client import Client

    with Client() as client:
        one = client.things.one()
        for thing in client.things.all(): ...

That is all.
"""

from collections.abc import Iterator
from typing import Any

from .connection import Connection
from .errors import RmemError


class Things:
    def __enter__(self) -> Any:
        return [self.one(x) for x in self.all() if x != "await ..y"]

    def all(self) -> Iterator[int]:
        # self.one() comes later
        try:
            with self.lock, self.other(1):
                yield from (self.one(...)).things
        except (StopIteration, RmemError):
            reply = self._connection.call(Connection, 1)
'''
    )


# --- what is written twice -----------------------------------------------------------------------
def surface(module: ModuleType) -> dict[str, tuple[str, str]]:
    """Return every public name's signature and docstring, as its sync twin would have them."""
    found = {}
    for name, thing in vars(module).items():
        if name.startswith("_") or not inspect.isclass(thing):
            continue
        if thing.__module__ != module.__name__:
            continue
        for member in ("__init__", "__enter__", "__exit__", "__next__", *vars(thing)):
            if member.startswith("_") and not member.startswith("__a"):
                continue
            found[f"{name}.{member.replace('__a', '__')}"] = told(vars(thing)[member])
        found[name] = ("", text(thing))
    return found


def told(member: Any) -> tuple[str, str]:
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    signature = str(inspect.signature(function)) if callable(function) else repr(function)
    return signature.replace("AsyncIterator", "Iterator").replace("grpc.aio", "grpc"), text(member)


def text(thing: Any) -> str:
    lines = inspect.cleandoc(thing.__doc__ or "")
    lines = lines.replace("; belongs to one event loop", "").replace("any task", "any thread")
    return re.sub(r"\b(?:async|await) (?=with|for|def|\w+[.(])", "", lines)


@pytest.mark.parametrize("name", modules())
def test_the_halves_show_the_same(name: str) -> None:
    ours = surface(importlib.import_module(f"rmem_client.{name}"))
    theirs = surface(importlib.import_module(f"rmem_client.aio.{name}"))
    dunder = re.compile(r"\.__(a?)(\w+)__$")
    ours = {key: value for key, value in ours.items() if not dunder.search(key)}
    theirs = {key: value for key, value in theirs.items() if not dunder.search(key)}
    assert ours == theirs
    assert any("." in key for key in ours)


def test_the_front_pages_show_the_same() -> None:
    from rmem_client import aio

    for name in aio.__all__:
        assert name in rmem_client.__all__
        if name not in ("Client", "Watch"):
            assert getattr(aio, name) is getattr(rmem_client, name)
