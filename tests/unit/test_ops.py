"""The compiler of hooks: what one plugin's object had is nothing to the next one's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rmemd.errors import RmemError
from rmemd.hooks import hookimpl
from rmemd.hooks.ops import compile_platform


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
