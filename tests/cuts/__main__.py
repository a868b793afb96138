"""`make journal`: a long run's journal, cut at every byte and with bits flipped; the figure last.

NIGHTLY=1 does five times as much; RMEMD_SEED says by which seed.
"""

from __future__ import annotations

import os
import sys

from cuts.campaign import run

OPERATIONS, FLIPS = 10_000, 10_000


def main() -> int:
    """Run the campaign; exit 1 where it falls short, with what is wrong."""
    scale = 5 if os.environ.get("NIGHTLY") == "1" else 1
    figure = run(scale * OPERATIONS, scale * FLIPS, int(os.environ.get("RMEMD_SEED", "1")))
    for line in figure.wrong:
        print(line)
    print(figure)
    return int(not figure.holds)


if __name__ == "__main__":
    sys.exit(main())
