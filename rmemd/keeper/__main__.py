"""The keeper's process: ``python -I -S rmemd/keeper/__main__.py CHARGE``.

Run by its path, by an interpreter without site-packages, which is a third of the size and starts
before the daemon has asked for anything.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys

PR_SET_DUMPABLE = 4


def main() -> None:
    """Keep the daemon of the one argument, and end as it ends."""
    # last, so that nothing beside rmemd stands in for a module of Python's own
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # noqa: PTH100, PTH120
    from rmemd.keeper.charge import Charge
    from rmemd.keeper.child import end_like
    from rmemd.keeper.keeper import Keeper

    charge = Charge.decode(sys.argv[1])
    if not charge.debuggable:
        # what we hold is guests' memory: nobody is to open it anew by /proc/PID/fd
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keeper = Keeper(charge)
    try:
        ended = keeper.run()
    finally:
        keeper.close()
    end_like(ended)


if __name__ == "__main__":
    main()
