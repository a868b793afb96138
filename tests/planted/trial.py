"""One trial: run a check in this interpreter and say, as a line of JSON, what came of it.

Usage: python -m planted.trial DRIVER [CHECK]. The bug, if there is one, was planted before.
"""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import suppress
from pathlib import Path

PASSED, FOUND, CRASHED = "passed", "found", "crashed"
ROOT = Path(__file__).parents[2]


def try_scenario(driver: str, check: str) -> tuple[str, str]:
    """Run a scenario; "found" only if what it found carries the check's name."""
    from planted.watched_scenarios import SCENARIOS, Violated

    wanted = check or driver
    try:
        SCENARIOS[driver]()
    except Violated as violated:
        sound = [line for line in violated.lines if ": cannot be checked" not in line]
        named = [line for line in sound if line.startswith(f"{wanted}: ")]
        return (FOUND, named[0]) if named else (CRASHED, f"other checks: {violated}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return CRASHED, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    return PASSED, ""


class _Reports:
    """What pytest says of the test itself; a failure of its fixtures is a crash."""

    def __init__(self) -> None:
        self.outcome, self.text = CRASHED, "no such test was run"

    def pytest_runtest_logreport(self, report: object) -> None:
        when, failed = report.when, report.failed  # type: ignore[attr-defined]
        if self.outcome == FOUND:
            return
        if when == "call":
            self.outcome, self.text = (FOUND, "") if failed else (PASSED, "")
        elif failed and self.outcome != FOUND:
            self.outcome = CRASHED
        if failed:
            crash = getattr(report.longrepr, "reprcrash", None)  # type: ignore[attr-defined]
            self.text = str(getattr(crash, "message", when)).partition("\n")[0]


def try_test(test: str) -> tuple[str, str]:
    """Run one existing test."""
    import pytest

    reports = _Reports()
    # pytest's own import hook, which rewrites assertions, would come before the one that plants
    options = ["-q", "-x", "--no-header", "--no-summary", "--assert=plain"]
    options += ["-p", "no:cacheprovider"]
    with (Path("/dev/null")).open("w") as sink:
        out, sys.stdout = sys.stdout, sink
        try:
            # what a bug leaves behind, pytest may raise after the test was reported
            with suppress(Exception):
                pytest.main([*options, "--rootdir", str(ROOT), str(ROOT / test)], plugins=[reports])
        finally:
            sys.stdout = out
    return reports.outcome, reports.text


def main() -> None:
    """Make the trial that the command line names."""
    driver, check = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    outcome, text = try_test(driver) if "::" in driver else try_scenario(driver, check)
    print(json.dumps({"outcome": outcome, "text": text}))


if __name__ == "__main__":
    main()
