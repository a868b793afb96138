"""The compiler of hooks: what one plugin's object had is nothing to the next one's."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rmemd.errors import RmemError
from rmemd.hooks import hookimpl
from rmemd.hooks.ops import _parameters_of_method, compile_platform


class Sound:
    @hookimpl
    def variants(self) -> tuple[Any, ...]:
        return ()

    @hookimpl
    def start(self, host: Any) -> None: ...

    @hookimpl
    def make_consumer(self, vm: Any, tx: Any, variant: str, config: Any) -> object:
        return object()

    @hookimpl
    def destroy_consumer(self, tx: Any, consumer: object) -> None: ...


class Misspelt(Sound):
    @hookimpl
    def fre(self, tx: Any, pfns: Any) -> None: ...


class OtherSignature(Sound):
    @hookimpl
    def free(self, tx: Any, frames: Any) -> None: ...


def test_a_refused_plugin_leaves_nothing_behind() -> None:
    sound = Sound()
    for refused in (Misspelt(), OtherSignature(), Misspelt(), object()):
        with pytest.raises(RmemError):
            compile_platform(refused, "refused")
        ops = compile_platform(sound, "sound")
        assert (ops.variants, ops.free) == (sound.variants, None)


def _wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, one: Any) -> None: ...

    return wrapper


class Shapes:
    """Methods of every shape that a signature can have."""

    def none(self) -> None: ...
    def some(self, tx: Any, pfns: Any) -> int:
        local = pfns
        return len(local)

    def defaulted(self, tx: Any, pfns: Any = None) -> None: ...
    def positional(self, tx: Any, /, pfns: Any) -> None: ...
    def keyword(self, tx: Any, *, pfns: Any) -> None: ...
    def all_of_them(self, *args: Any, **kw: Any) -> None: ...
    def the_rest(self, tx: Any, *pfns: Any) -> None: ...
    def nobody(*args: Any) -> None: ...
    @staticmethod
    def static(tx: Any, pfns: Any) -> None: ...
    @classmethod
    def of_class(cls, tx: Any, pfns: Any) -> None: ...
    @_wrapping
    def wrapped(self, tx: Any, pfns: Any) -> None: ...


QUICK = {"none", "some", "defaulted", "positional", "keyword", "of_class"}


@pytest.mark.parametrize("name", [name for name in vars(Shapes) if not name.startswith("__")])
def test_a_method_s_parameters_are_those_of_its_signature(name: str) -> None:
    method = getattr(Shapes(), name)
    expected = list(inspect.signature(method).parameters) if name in QUICK else None
    assert _parameters_of_method(method) == expected


def test_a_method_that_no_call_can_reach_is_left_to_inspect() -> None:
    def method(*, pfns: Any) -> None: ...

    assert _parameters_of_method(method.__get__(object())) is None


@pytest.fixture
def busy() -> Iterator[None]:
    """Have threads take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy")
def test_objects_compiled_at_once_keep_their_own_hooks() -> None:
    plugins = [Sound() for _ in range(8)]
    made: dict[int, Any] = {}

    def compile_one(number: int) -> None:
        for _ in range(20):
            made[number] = compile_platform(plugins[number], f"plugin {number}")

    threads = [threading.Thread(target=compile_one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [made[number].start.__self__ for number in range(8)] == plugins
