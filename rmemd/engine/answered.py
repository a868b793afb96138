"""At which revision what a thread asked of the engine was carried out, for the reply that says so.

Owns ``Answered``. The journal goes on as soon as an operation lets the lock go, so a door that read
the revision afterwards would say one that is of somebody else's doing.
"""

from __future__ import annotations

import threading


class Answered(threading.local):
    """Of each thread for itself.

    Attributes:
        revision: at which the thread's last operation ended, or its last query was served, taken
            under the lock; 0 before the first since ``begin``.
    """

    revision = 0

    def begin(self) -> None:
        """Have a call begin: what the thread asked before is not for this one's reply."""
        self.revision = 0
