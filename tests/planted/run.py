"""Runs every mutant in an interpreter of its own, and every check without one.

Usage: python -m planted.run [NAME...]; `make mutants`. Exits with 1 where a mutant lives, is killed
by something else than its check, or was not planted, and where a check fails without any.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from planted.catalogue import MUTANTS
from planted.planting import MUTANT, NOTE, Mutant
from planted.rows import ROWS
from planted.trial import CRASHED, FOUND, PASSED

HERE = Path(__file__).parent
TESTS = HERE.parent
AT_ONCE = 2
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Trial:
    """What came of a check: ``outcome`` as in ``trial``, or "not planted"."""

    outcome: str
    text: str
    seconds: float


def trial(driver: str, check: str = "", mutant: Mutant | None = None) -> Trial:
    """Run a check in a fresh interpreter, with a bug in it or without."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        note = Path(directory) / "note"
        env = {**os.environ, "PYTHONPATH": f"{HERE / 'site'}{os.pathsep}{TESTS}"}
        env |= {MUTANT: mutant.name if mutant else "", NOTE: str(note)}
        command = [sys.executable, "-m", "planted.trial", driver, check]
        try:
            done = subprocess.run(
                command, env=env, cwd=TESTS.parent, capture_output=True, text=True, check=False,
                timeout=PATIENCE_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Trial(CRASHED, "it never ended", time.monotonic() - begun)
        planted = note.exists()
    seconds = time.monotonic() - begun
    if mutant and not planted:
        last = done.stderr.strip().rpartition("\n")[2]
        return Trial("not planted", f"{mutant.module} was not executed: {last}", seconds)
    try:
        said = json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        return Trial(CRASHED, done.stderr.strip()[-300:], seconds)
    return Trial(said["outcome"], said["text"], seconds)


def is_killed(mutant: Mutant) -> tuple[bool, Trial]:
    """Return whether a mutant's own check finds it, and the trial."""
    made = trial(mutant.driver, mutant.check, mutant)
    return made.outcome == FOUND, made


def _all(mutants: Iterable[Mutant]) -> Iterator[tuple[Mutant, bool, Trial]]:
    chosen = list(mutants)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutant, (killed, made) in zip(chosen, pool.map(is_killed, chosen), strict=True):
            yield mutant, killed, made


def _sound(drivers: Iterable[str]) -> bool:
    """Run every check without a bug; say which fail."""
    chosen = sorted(set(drivers))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = dict(zip(chosen, pool.map(trial, chosen), strict=True))
    bad = {driver: one for driver, one in made.items() if one.outcome != PASSED}
    for driver, one in bad.items():
        print(f"UNSOUND {driver}: {one.outcome}: {one.text}")
    print(f"{len(made) - len(bad)} of {len(made)} checks pass without a mutant\n", flush=True)
    return not bad


def main() -> int:
    """Print the table; return the exit code."""
    names = sys.argv[1:] or list(MUTANTS)
    chosen = [MUTANTS[name] for name in names]
    sound = _sound(mutant.driver for mutant in chosen)
    print(f"{'mutant':<46} {'class':<24} {'s':>5}  killed by")
    killed_count = 0
    for mutant, killed, made in _all(chosen):
        killed_count += killed
        by = mutant.killer if killed else f"NOT KILLED ({made.outcome}): {made.text}"
        print(f"{mutant.name:<46} {mutant.row:<24} {made.seconds:>5.1f}  {by}", flush=True)
    missing = sorted(ROWS.keys() - {mutant.row for mutant in chosen})
    if not sys.argv[1:] and missing:
        print(f"no mutant of: {', '.join(missing)}")
        sound = False
    classes = len({mutant.row for mutant in chosen})
    print(
        f"\n{len(chosen)} planted, {killed_count} killed, each by its named check, "
        f"{classes} classes"
    )
    return 0 if sound and killed_count == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
