"""`make linearizability`: record histories, decide them, plant wrong replies, print the figure.

RMEMD_HISTORIES says how many histories (default 1000), RMEMD_SEED by which seed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from daemons import Daemon

from linearizability.campaign import run

HISTORIES = 1000
SEED = 1


def main() -> int:
    """Run the campaign; exit 1 where it falls short, with the histories that do."""
    wanted = int(os.environ.get("RMEMD_HISTORIES", HISTORIES))
    seed = int(os.environ.get("RMEMD_SEED", SEED))
    with tempfile.TemporaryDirectory(prefix="rmemd-histories-") as folder:
        daemon = Daemon(Path(folder), "--host-memory", "64M").start()
        try:
            figure = run(daemon, wanted, seed)
        finally:
            daemon.stop()
    for told in figure.explanations():
        print(told)
    print(figure)
    return int(not figure.holds)


if __name__ == "__main__":
    sys.exit(main())
