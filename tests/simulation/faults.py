"""What goes wrong, and where: system calls, consumers and the clock of a simulated engine.

Each fault waits for a call that is so many calls away, and strikes once; ``struck`` counts those
that did. Fault rules, poison, clients that die and crashes are the world's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from rmemd.consumers.guard import DEADLINE_SECONDS, Consumer
from rmemd.store.system import System

# what a call answers instead: an errno, or less than it was asked for
SHORT = "short"
FAILURES: tuple[int | str, ...] = (
    errno.ENOSPC, errno.ENOMEM, errno.EINTR, SHORT, errno.ENOSPC, errno.EIO,
)  # fmt: skip


class Clock:
    """Seconds that pass only when somebody lets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FaultySystem(System):
    """The kernel, until the Nth call from now."""

    def __init__(self) -> None:
        self._left = 0
        self._failure: int | str = 0
        self._watched = True
        self.struck = 0

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Do as asked meanwhile: it is the simulation itself that calls."""
        self._watched = False
        try:
            yield
        finally:
            self._watched = True

    def fail(self, nth: int, failure: int | str) -> None:
        """Have the ``nth`` call from now fail, 1 being the next."""
        self._left, self._failure = nth, failure

    def _strikes(self) -> bool:
        if not (self._left and self._watched):
            return False
        self._left -= 1
        if self._left:
            return False
        self.struck += 1
        return True

    def _refuse(self) -> None:
        if isinstance(self._failure, int):
            raise OSError(self._failure, os.strerror(self._failure))

    def make(self, name: str) -> int:
        if self._strikes():
            self._refuse()
        return super().make(name)

    def resize(self, fd: int, nbytes: int) -> None:
        if self._strikes():
            self._refuse()
        super().resize(fd, nbytes)

    def read(self, fd: int, view: memoryview, offset: int) -> int:
        return super().read(fd, self._cut(view), offset)

    def write(self, fd: int, view: memoryview, offset: int) -> int:
        return super().write(fd, self._cut(view), offset)

    def _cut(self, view: memoryview) -> memoryview:
        if not self._strikes():
            return view
        self._refuse()
        return view[: view.nbytes // 2] or view

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        if self._strikes():
            self._refuse()
        super().fallocate(fd, mode, offset, length)


@dataclass
class _Plan:
    left: int = 0
    misdeed: str = ""


MISDEEDS = ("raises", "nonsense", "overdue", "exits")


class FaultyConsumers:
    """Consumers that do as they should, until the Nth call of any of their ops from now."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._plan = _Plan()
        self.struck = 0

    def fail(self, nth: int, misdeed: str) -> None:
        """Have the ``nth`` call of an op from now be answered by a misdeed."""
        self._plan = _Plan(nth, misdeed)

    def watch(self, consumer: Consumer) -> None:
        """Come between the engine and a consumer; for ``registry.made``."""
        ops = {name: getattr(consumer.ops, name) for name in consumer.ops.__struct_fields__}
        between = {
            name: self._between(op)
            for name, op in ops.items()
            if op is not None and name != "page_state"
        }
        consumer.ops = replace(consumer.ops, **between)

    def _between(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            misdeed = self._misdeed()
            if misdeed == "overdue":
                self._clock.now += DEADLINE_SECONDS + 1
            elif misdeed == "raises":
                raise KeyError("a plugin's own mistake")
            elif misdeed == "exits":
                raise SystemExit(3)
            elif misdeed == "nonsense":
                op(*args)
                return object()
            return op(*args)

        return call

    def _misdeed(self) -> str:
        if not self._plan.left:
            return ""
        self._plan.left -= 1
        if self._plan.left:
            return ""
        self.struck += 1
        return self._plan.misdeed
