"""A page fault handler for tests: what a session is told, and calls that wait, in threads."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from rmemd.engine.engine import Engine
from rmemd.engine.pendingfaults import Message

# how long an event may take on a loaded machine before a test gives up
PATIENCE_SECONDS = 20


class Handler:
    """The session of a page fault handler."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.session = engine.open_session("uid:1", "host", "socket").session
        self._news: queue.SimpleQueue[int] = queue.SimpleQueue()
        engine.on_userfault(self._news.put)

    def register(self, file: int, pgoff: int, npages: int) -> int:
        """Register a range."""
        return self.engine.register_userfault(file, pgoff, npages, self.session)

    def next(self) -> list[Message]:
        """Wait until there is something to take, and take it."""
        while True:
            self._news.get(timeout=PATIENCE_SECONDS)
            messages = self.engine.take_userfaults(self.session)
            if messages:
                return messages

    def one(self) -> Message:
        """Wait for a single message."""
        (message,) = self.next()
        return message

    def die(self) -> None:
        """End the session, as the daemon does when the process is gone."""
        self.engine.close_session(self.session)


@contextmanager
def calls(engine: Engine) -> Iterator[Callable[..., Future[Any]]]:
    """Make calls in threads; ``result`` waits for each. Where a test fails, all of them end."""
    with ThreadPoolExecutor(8) as pool:
        try:
            yield pool.submit
        except BaseException:
            engine.drain()
            raise


def result(call: Future[Any]) -> Any:
    """Return what a call returned."""
    return call.result(timeout=PATIENCE_SECONDS)
