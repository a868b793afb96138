"""Logs: console for people on a tty, JSON lines otherwise. Never a page's content.

Owns the level, which may change while the daemon runs, and the stream, which moves to the real
stderr while ``corelog`` has taken descriptor 2.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO

from rmemd.daemon.lean import lean

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
_LEVEL_OF = {**LEVELS, "error": logging.ERROR, "critical": logging.CRITICAL}


class _Stream:
    """Where the log goes; loggers are made once and keep this, so it is this that changes."""

    def __init__(self) -> None:
        self._to: TextIO | None = None

    def redirect(self, to: TextIO | None) -> None:
        """Write there from now on; None: to sys.stderr, whatever that is at the time."""
        self._to = to

    def write(self, text: str) -> int:
        return (self._to or sys.stderr).write(text)

    def flush(self) -> None:
        (self._to or sys.stderr).flush()

    def fileno(self) -> int:
        return (self._to or sys.stderr).fileno()


class _Level:
    """The least that is logged, as logging counts."""

    least = logging.INFO


stream = _Stream()
_level = _Level()


def set_level(level: str) -> None:
    """Log what is of ``level`` ("debug", "info", "warning") and above from now on."""
    _level.least = LEVELS[level]


def configure(level: str, as_json: bool | None = None) -> None:
    """Set structlog up; ``as_json`` None means JSON unless stderr is a tty."""
    # imported here, so that --help is answered without it
    with lean():
        import structlog

    if as_json is None:
        as_json = not sys.stderr.isatty()
    set_level(level)
    # tracebacks without local variables: those of a guest access are its plaintext
    tracebacks = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    renderers: list[Processor] = (
        [tracebacks, structlog.processors.JSONRenderer()]
        if as_json
        else [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    )

    def drop_what_is_below(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        if _LEVEL_OF[method] < _level.least:
            raise structlog.DropEvent
        return event

    class _Logger(structlog.make_filtering_bound_logger(logging.DEBUG)):  # type: ignore[misc]
        """Makes nothing of what is said of every call, where nobody wants it."""

        def debug(self, event: str, *args: Any, **kw: Any) -> Any:
            return super().debug(event, *args, **kw) if _level.least <= logging.DEBUG else None

    to: Any = stream
    structlog.configure(
        processors=[
            drop_what_is_below,
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        # the level can fall while we run: that processor decides, not structlog's filter
        wrapper_class=_Logger,
        logger_factory=structlog.PrintLoggerFactory(to),
        cache_logger_on_first_use=True,
    )
