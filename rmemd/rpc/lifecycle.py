"""How the daemon lives, as far as its doors tell it and act on it.

Owns what the daemon's own package knows and the services below it ask for: who keeps the memory,
how often the daemon was started, and the way by which it is asked to make way for a successor. That
means that calls are refused, with a reason by which clients send them again, and that those under
way are waited for until their replies have left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from msgspec import Struct

from rmemd.errors import HANDING_OVER, INTERRUPTED, NO_KEEPER, RmemError


class KeptBy(Struct, frozen=True):
    """Who keeps the memory: "keeper" (whose process ``pid`` is), "service manager" or ""."""

    name: str = ""
    pid: int = 0


class Lifecycle:
    """The life of one daemon.

    Attributes:
        kept_by: asked anew each time, as a keeper can be lost.
        starts_in_a_row: how often it was started, each time soon after the time before.
        make_way: has the daemon hand over once the call that asks for it is answered.
        handing_over: whether it does; then no call begins.
    """

    def __init__(
        self,
        kept_by: Callable[[], KeptBy] = KeptBy,
        starts_in_a_row: int = 1,
        make_way: Callable[[], None] = lambda: None,
    ) -> None:
        self.kept_by = kept_by
        self.starts_in_a_row = starts_in_a_row
        self.make_way = make_way
        self.handing_over = False
        self._calls = 0
        self._waiting = 0
        # taken by itself where nobody is waited for: a Condition's way to its lock is Python's
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)

    def begin(self, when_over: Callable[[Callable[[], None]], bool]) -> None:
        """Have a call begin.

        Args:
            when_over: has something called once its reply has left; False if it has ended.

        Raises:
            Unavailable: HANDING_OVER.
        """
        with self._lock:
            if self.handing_over:
                raise HANDING_OVER("the daemon makes way for its successor")
            self._calls += 1
        if not when_over(self._end):
            self._end()

    def hand_over(self) -> None:
        """Let no call begin any more."""
        with self._lock:
            self.handing_over = True

    def wait_idle(self, seconds: float) -> bool:
        """Wait until the replies of all calls have left; return whether they have in time."""
        with self._idle:
            self._waiting += 1
            idle = self._idle.wait_for(lambda: not self._calls, seconds)
            self._waiting -= 1
            return idle

    def _end(self) -> None:
        with self._lock:
            self._calls -= 1
            if self._waiting and not self._calls:
                self._idle.notify_all()

    def upgrade(self) -> None:
        """Have the daemon hand over.

        Raises:
            Refused: NO_KEEPER.
        """
        if not self.kept_by().name:
            raise NO_KEEPER("nobody keeps this daemon's memory", state="daemon.keeper is off")
        self.make_way()

    def seen_by_caller(self, error: BaseException) -> BaseException:
        """Return what a call ends with, which says so where it was stopped for a successor."""
        if self.handing_over and isinstance(error, RmemError) and error.reason is INTERRUPTED:
            return HANDING_OVER(error.message)
        return error
