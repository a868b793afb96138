"""How long to try to get a lost connection back, and the pauses between attempts.

Owns these numbers, for calls and for sessions: a daemon that is started again is there after a
fraction of a second, and one that is upgraded likewise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

DEFAULT_RECONNECT_S = 30.0

# Seconds before the second attempt, at most; each further pause may be twice as long. Their length
# is drawn, so that the clients of one daemon do not all come back in the same moment.
PAUSE_S = 0.02
PAUSE_MAX_S = 1.0


def pauses() -> Iterator[float]:
    """Yield the seconds to let pass before each further attempt."""
    longest = PAUSE_S
    while True:
        yield random.uniform(0.0, longest)
        longest = min(2 * longest, PAUSE_MAX_S)


def remaining(end: float) -> float:
    """Return the seconds until ``end``, a time of ``time.monotonic``, and at least 0."""
    return max(0.0, end - time.monotonic())
