"""The keeper's log: a line an event on stderr, looking as the daemon's do."""

from __future__ import annotations

import sys
import time

LEVELS = ("debug", "info", "warning", "error")


class Log:
    """Writes events.

    Args:
        as_json: a JSON object a line; otherwise for people.
        least: the least level that is written.
    """

    def __init__(self, as_json: bool, least: str) -> None:
        self._as_json = as_json
        self._least = LEVELS.index(least)

    def write(self, level: str, event: str, **facts: object) -> None:
        """Write an event with its facts; a stderr that is gone is no reason to end."""
        if LEVELS.index(level) < self._least:
            return
        now = time.time()
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        stamp = f"{second}.{int(now % 1 * 1e6):06d}Z"
        if self._as_json:
            import json

            line = json.dumps({**facts, "event": event, "level": level, "timestamp": stamp})
        else:
            said = " ".join(f"{name}={value}" for name, value in facts.items())
            line = f"{stamp} [{level:<9}] {event:<30} {said}"
        try:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        except OSError:
            return
