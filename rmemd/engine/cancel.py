"""How an operation learns that its caller has gone.

Owns ``Cancelled``. A running vCPU asks between two steps; what waits inside a step cannot ask, so
it has itself woken, and only then: a call that never waits subscribes to nothing.
"""

from __future__ import annotations

from collections.abc import Callable


def never() -> bool:
    """Return that the caller is still there."""
    return False


class Cancelled:
    """Tells whether a caller has gone, and wakes who waits when it goes."""

    def __init__(
        self, is_over: Callable[[], bool], subscribe: Callable[[Callable[[], None]], object]
    ) -> None:
        """Ask ``is_over``; ``subscribe`` takes what is to be called once the caller is gone."""
        self._is_over = is_over
        self._subscribe = subscribe
        self._subscribed = False

    def __call__(self) -> bool:
        """Return whether the caller has gone."""
        return self._is_over()

    def wake(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called when the caller goes, from whatever thread learns of it."""
        if not self._subscribed:
            self._subscribed = True
            self._subscribe(wake)
