"""`make crash`: kill -9 at any time and at every moment, under clients; the figure last.

NIGHTLY=1 kills 5,000 times; RMEMD_KILLS says how often, RMEMD_SEED by which seed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from crash.campaign import run

KILLS, NIGHTLY_KILLS = 200, 5000


def main() -> int:
    """Run the campaign; exit 1 where it falls short, with what the clients say."""
    usual = NIGHTLY_KILLS if os.environ.get("NIGHTLY") == "1" else KILLS
    kills = int(os.environ.get("RMEMD_KILLS", usual))
    with tempfile.TemporaryDirectory(prefix="rmemd-crash-") as folder:
        figure = run(Path(folder) / "d", kills, int(os.environ.get("RMEMD_SEED", "1")))
    for failure in figure.failures:
        print(failure)
    print(figure)
    return int(not figure.holds)


if __name__ == "__main__":
    sys.exit(main())
