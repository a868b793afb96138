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
            under the lock. A call begins by setting it to 0, as what its thread asked before is
            not for its own reply.
    """

    revision = 0
