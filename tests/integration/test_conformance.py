"""Every installed consumer passes the conformance kit; consumers with a mistake do not."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from guests import consumers, make_engine

from rmemd.consumers.guard import Consumer
from rmemd.hooks import ENTRY_POINTS, Why
from rmemd.testing.conformance import Report, check_consumer

TEMPLATE = Path(__file__).parents[2] / "plugins" / "template"
CONSUMERS = consumers()
# a frame that the guest shares when its file goes, or is punched, cannot be given back (by design)
LEAKY = ("pkvm-gmem",)
# what breaks -> the rule that it is found by
MUTANTS = {
    "ForgetsToRelocate": "content",
    "CopiesRaw": "content",
    "KeepsWhatWasPunched": "unmap",
    "AllowsEverything": "unmap",
    "LiesInItsStates": "answer",
    "ChangesItsKey": "content",
    "MakesNoiseOfPlainBytes": "stale",
    "KeepsStateInAttributes": "tables",
    "WritesBesideTheTransaction": "undo",
    "NeverUnblocks": "answer",
    "FreesNothing": "frames",
    "RunsOutOfKeys": "keys",
    "LeavesStateBehind": "answer",
    "TakesAnybodysState": "swap",
    "TakesAKeyAgain": "swap",
    "ExportsItsOwnClass": "answer",
    "PutsWhatIsNotPlain": "answer",
    "TellsWhatIsNotPlain": "answer",
    "ChangesARecordInPlace": "restart",
    "RemembersInAnObject": "restart",
    "BeginsAnewAtARestart": "restart",
    "FailsToResume": "restart",
    "ForgetsWhatItMeasured": "restart",
}
# mutant -> what its finding says
WORDS = {
    "PutsWhatIsNotPlain": r"mutant\(vm/\d+\)\.map wrote into vm/\d+/mutant/facts under 'last': "
    r"a journal holds plain values, not mutants\.Memory",
    "TellsWhatIsNotPlain": r"\.map told 'mapped': a journal holds plain values, not builtins\.set",
    "ChangesARecordInPlace": r"these tables are not what they were: \['vm/\d+/mutant/facts'\]",
    "RemembersInAnObject": r"page_state of gfn 0x\w+ was 'known' and is 'unknown'",
    "BeginsAnewAtARestart": r"these tables are not what they were: \['host/counters', 'host/keys'",
    "FailsToResume": r"lost in a kill: vm/\d+: .*resume raised RuntimeError",
    "ForgetsWhatItMeasured": r"finalize comes to .*; after a kill to ",
    "KeepsStateInAttributes": r"\['mapped'\] are kept outside of tables, and there is no resume",
}


def _null(variant: str) -> frozenset[str]:
    engine = make_engine()
    table = engine.core.registry.offers[variant].ops.implemented()
    engine.close()
    return frozenset(op for op, there in table.items() if not there)


@pytest.mark.parametrize("variant", CONSUMERS)
def test_every_installed_consumer_conforms(variant: str) -> None:
    report = check_consumer(variant, null=_null(variant), may_leak=variant in LEAKY, seed=1)
    report.require()
    assert report.steps == 300
    assert report.unreached <= {"error"}
    assert sum(report.undone.values()) >= 3
    assert report.restarts >= 12


def test_the_same_seed_gives_the_same_run() -> None:
    one, other, another = (
        check_consumer("pkvm-gmem", seed=seed, steps=60, may_leak=True) for seed in (5, 5, 6)
    )
    assert one == other
    assert one != another


def test_a_consumer_that_is_not_there_is_a_finding() -> None:
    report = check_consumer("no-such-consumer")
    assert [finding.rule for finding in report.findings] == ["registration"]
    with pytest.raises(AssertionError, match="there is no such consumer"):
        report.require()


def test_a_null_that_was_not_declared_is_a_finding() -> None:
    report = check_consumer("null", null=frozenset(("map",)), steps=5)
    assert [finding.rule for finding in report.findings] == ["null"]


def test_a_bracket_that_is_not_ended_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine never does that, so the test cuts the call between engine and consumer."""
    call = Consumer.call

    def cut(self: Consumer, tx: Any, op: str, *args: Any) -> Any:
        if op == "invalidate_end" and args[1] is Why.PUNCH:
            return None
        return call(self, tx, op, *args)

    monkeypatch.setattr(Consumer, "call", cut)
    report = check_consumer("sw-protected", steps=100)
    assert "brackets" in {finding.rule for finding in report.findings}


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the mutants import the template."""
    monkeypatch.syspath_prepend(TEMPLATE)
    yield
    for name in ("mutants", "rmemd_template"):
        sys.modules.pop(name, None)


def _checked(value: str, steps: int = 300) -> Report:
    point = EntryPoint(name="mutant", value=value, group=ENTRY_POINTS)
    return check_consumer("mutant", plugins=[point], steps=steps, seed=1)


def _said(report: Report) -> str:
    return "\n".join(map(str, report.findings))


@pytest.mark.usefixtures("template")
def test_the_mutants_ancestor_conforms() -> None:
    _checked("mutants:_Mutant").require()


@pytest.mark.usefixtures("template")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_found_by_its_rule(mutant: str) -> None:
    rules: set[str] = set()
    # most are found at once; a long run takes seconds
    for steps in (20, 60, 150, 300):
        report = _checked(f"mutants:{mutant}", steps)
        rules = {finding.rule for finding in report.findings}
        if MUTANTS[mutant] in rules and re.search(WORDS.get(mutant, ""), _said(report)):
            break
    assert MUTANTS[mutant] in rules, [str(finding) for finding in report.findings]
    assert re.search(WORDS.get(mutant, ""), _said(report)), _said(report)
    with pytest.raises(AssertionError, match=rf"\[{MUTANTS[mutant]}\] step \d+ \(\w+\), seed 1: "):
        report.require()
