"""Plants the bug that the environment names, in every interpreter that starts with this path."""

import os
import sys
from pathlib import Path

_tests = str(Path(__file__).parents[2])
if _name := os.environ.get("RMEMD_PLANTED_MUTANT"):
    sys.path.insert(0, _tests)
    try:
        from planted.catalogue import MUTANTS
        from planted.planting import plant

        plant(MUTANTS[_name])
    finally:
        sys.path.remove(_tests)
