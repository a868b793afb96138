"""docs/performance.md says what the benchmarks do."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from tests.bench.__main__ import COLUMNS
from tests.bench.harness import Figure
from tests.bench.regressions import SLACK, WATCHED
from tests.bench.topics import TOPICS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "performance.md").read_text()


def test_the_table_says_what_every_column_is() -> None:
    table = TEXT.partition("| column | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert [name for cell in cells for name in cell.split(", ")] == list(COLUMNS)


def test_every_field_of_a_line_is_a_column() -> None:
    named = {*COLUMNS, *re.findall(r"`(ratio_\w+)`", TEXT)}
    assert {field.name for field in fields(Figure)} <= named


def test_the_slack_is_the_one_that_is_given() -> None:
    assert f"bars are looser by {SLACK}," in TEXT


def test_every_topic_is_a_module_and_every_watched_one_a_topic() -> None:
    modules = {path.stem for path in (ROOT / "tests" / "bench").glob("*.py")}
    assert set(TOPICS) <= modules
    assert set(WATCHED) <= set(TOPICS)


def test_the_topics_of_its_examples_are_there() -> None:
    named = " ".join(re.findall(r"--only ([a-z ]+)", TEXT)).split()
    assert named
    assert set(named) <= set(TOPICS)
