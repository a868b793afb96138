"""`make deaths`: VMM processes killed in random states, restarts included; the figure last.

NIGHTLY=1 kills 1,000; RMEMD_DEATHS says how many, RMEMD_SEED by which seed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from deaths.campaign import run

DEATHS, NIGHTLY_DEATHS = 100, 1000


def main() -> int:
    """Run the campaign; exit 1 where it falls short, with what was left behind."""
    usual = NIGHTLY_DEATHS if os.environ.get("NIGHTLY") == "1" else DEATHS
    deaths = int(os.environ.get("RMEMD_DEATHS", usual))
    with tempfile.TemporaryDirectory(prefix="rmemd-deaths-") as folder:
        figure = run(Path(folder) / "d", deaths, int(os.environ.get("RMEMD_SEED", "1")))
    for line in figure.wrong:
        print(line)
    print(figure)
    return int(not figure.holds)


if __name__ == "__main__":
    sys.exit(main())
