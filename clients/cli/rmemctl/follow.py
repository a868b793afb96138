"""``--watch``: what a command shows, shown again whenever something happened.

Owns the loop. A thread reads the daemon's Watch stream and sets one flag; the command runs again
when the flag is set, so that a burst of events is one redraw, and nothing is ever asked by a timer.
On a terminal the picture is replaced in place; elsewhere each is a block of its own.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import IO, TYPE_CHECKING, Any

from .app import Settings

if TYPE_CHECKING:
    from rich.live import Live

    from rmem_client import Watch


class News:
    """A flag that a thread sets at every event, and what ended the stream."""

    def __init__(self, stream: Watch) -> None:
        self._stream = stream
        self._something = threading.Event()
        self._ended = False
        self._error: Exception | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def wait(self) -> bool:
        """Wait until something happened; return whether the daemon is still there.

        Raises:
            RmemError: what ended the stream, if it was no orderly end.
        """
        self._something.wait()
        # before the redraw, so that what happens during it is not missed
        self._something.clear()
        if self._error is not None:
            raise self._error
        return not self._ended

    def _read(self) -> None:
        from rmem_client import Progress

        try:
            for item in self._stream:
                if not isinstance(item, Progress):
                    self._something.set()
        except Exception as error:
            self._error = error
        self._ended = True
        self._something.set()


def follow(settings: Settings, show: Callable[[], Any]) -> None:
    """Run ``show`` now and whenever something happened, until interrupted or the daemon ends."""
    screen = _Screen(sys.stdout, settings.output)
    with settings.client.watch() as stream, screen:
        # from here on, nothing that happens is missed
        stream.start()
        news = News(stream)
        while True:
            settings.stream = screen.canvas()
            show()
            screen.draw(settings.stream)
            if not news.wait():
                return


class _Canvas(io.StringIO):
    """Where a command draws; a terminal if the real stream is one, so that it has colours."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


class _Screen(AbstractContextManager["_Screen"]):
    """The way of the pictures to the stream: in place on a terminal, one after the other else."""

    def __init__(self, stream: IO[str], form: str) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty() and form == "table"
        self._form = form
        self._drawn = 0
        self._live: Live | None = None

    def __enter__(self) -> _Screen:
        if self._is_terminal:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)
            self._live = Live(console=console, auto_refresh=False)
        (self._live or nullcontext()).__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exc_info)

    def canvas(self) -> _Canvas:
        """Return an empty picture to draw on."""
        return _Canvas(self._is_terminal)

    def draw(self, picture: IO[str]) -> None:
        """Show a picture."""
        text = picture.getvalue() if isinstance(picture, io.StringIO) else ""
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text.from_ansi(text.rstrip("\n")), refresh=True)
        else:
            # programmes read objects or lines; people want to see where a picture ends
            self._stream.write("\n" * (self._drawn > 0 and self._form == "table") + text)
            self._stream.flush()
        self._drawn += 1
