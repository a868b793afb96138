"""The engine against the executable specification: operations at random, compared after each.

RMEMD_ORACLE_STEPS sets how many operations are made (20000 unless told); ``make oracle`` says how
many there were. Runs are made of their seed alone, so a difference can be had again.
"""

from __future__ import annotations

import ast
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from oracle.driver import KINDS, World
from oracle.mutants import MUTANTS
from oracle.pair import EXCUSED, Op
from oracle.runs import explain, make_run, play, shrink
from oracle.store import CHANGING_ONLY, NO_FILTER, WHOLE_BATCHES

STEPS = int(os.environ.get("RMEMD_ORACLE_STEPS", "20000"))
RUN_STEPS = 200
# a mutant that is not seen in as many operations counts as missed
MUTANT_STEPS_MAX = 12_000

# what is known and not mended: the shortest operations that show it with nothing excused
KNOWN: dict[str, list[Op]] = {
    WHOLE_BATCHES: [("create_vm", "null", True, 513), ("fallocate", 0, 1, 0, 513)],
    NO_FILTER: [
        ("create_vm", "null"),
        ("set_attributes", 0, 0, 1, 0),
        ("pre_fault", 0, 0, 1),
        ("fallocate", 0, 3, 0, 1),
    ],
    NO_FILTER + " (poison)": [
        ("create_vm", "sw-attributes"),
        ("fallocate", 0, 1, 0, 1),
        ("set_attributes", 0, 0, 1, 0),
        ("pre_fault", 0, 0, 1),
        ("poison", 0),
    ],
    CHANGING_ONLY: [
        ("create_vm", "sw-in-place"),
        ("get_pages", 0, 1, 1),
        ("convert_file", 0, 0, 1, 0),
        ("convert_file", 0, 0, 2, 8),
    ],
}

# runs that never get to one of these would say little
REACHED = {
    ("fallocate", "ok"), ("fallocate", "NO_FRAMES"), ("fallocate", "BAD_RANGE"),
    ("fallocate", "FALLOCATE_MODE"), ("fallocate", "NOT_PAGE_ALIGNED"),
    ("add_slot", "ok"), ("add_slot", "SLOT_OVERLAP"), ("add_slot", "BINDING_OVERLAP"),
    ("add_slot", "NO_SUCH_FILE"), ("add_slot", "BINDING_FOREIGN"), ("delete_slot", "ok"),
    ("set_attributes", "ok"), ("set_attributes", "WRONG_PERSONALITY"),
    ("set_attributes", "ATTRIBUTES_UNSUPPORTED"), ("convert_file", "ok"),
    ("convert_file", "FOLIO_BUSY"), ("convert_file", "WRONG_PERSONALITY"),
    ("pre_fault", "ok"), ("pre_fault", "NO_MEMSLOT"), ("pre_fault", "FILE_GONE"),
    ("pre_fault", "HW_POISON"), ("pre_fault", "NO_FRAMES"), ("touch", "ok"),
    ("host_read", "ok"), ("host_read", "HOST_SIGBUS"), ("pin", "ok"), ("pin", "HOST_SIGBUS"),
    ("unpin", "ok"), ("get_pages", "ok"), ("put_page", "ok"), ("close_file", "ok"),
    ("destroy_vm", "ok"), ("poison", "ok"), ("poison_free", "ok"), ("migrate", "MOVED"),
    ("migrate", "UNMOVABLE"), ("migrate", "BUSY"), ("migrate", "FAILED"),
}  # fmt: skip


@pytest.mark.timeout(max(120, STEPS // 100))
def test_the_engine_does_what_the_reference_says(capsys: pytest.CaptureFixture[str]) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    began, done = time.monotonic(), 0
    for seed in range(-(-STEPS // RUN_STEPS)):
        run = make_run(seed, RUN_STEPS)
        if play(run, seen=seen) is not None:
            pytest.fail(f"seed {seed}: {explain(run)}")
        done += len(run)
    with capsys.disabled():
        spent = time.monotonic() - began
        answers = sum(seen.values())
        print(f"\noracle: {done} operations, {answers} answers, no difference, {spent:.1f} s")
    if STEPS >= 20000:
        assert REACHED - set(seen) == set()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_engine_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    for seed in range(MUTANT_STEPS_MAX // RUN_STEPS):
        if play(make_run(seed, RUN_STEPS)) is not None:
            return
    pytest.fail(f"{name} was not seen in {MUTANT_STEPS_MAX} operations")


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="a known difference, reported and not mended yet"
)
def test_known_difference(name: str) -> None:
    assert play(KNOWN[name], excused=frozenset()) is None


@pytest.mark.parametrize("then", [("migrate", 0, 1), ("poison", 0)], ids=["migrate", "poison"])
def test_pages_of_an_ordinary_slot_are_unmapped_when_they_go(then: Op) -> None:
    assert play([("create_vm", "gup"), ("pre_fault", 0, 0, 1), then]) is None


def test_what_is_known_is_what_is_excused() -> None:
    assert {name.partition(" (")[0] for name in KNOWN} == EXCUSED


def test_a_difference_is_told_in_words_with_the_shortest_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    MUTANTS["punch_leaves_the_mirror"](monkeypatch)
    begin = [("create_vm", "sw-attributes"), ("pre_fault", 0, 3, 2), ("fallocate", 0, 3, 4, 1)]
    noise = [("create_vm", "gup"), ("pin", 1, 0, 2), ("delete_slot", 0, 2), ("pre_fault", 1, 0, 3)]
    run = [*begin[:2], *noise, begin[2], *noise]
    assert shrink(run) == begin
    told = explain(run)
    assert told.startswith("('fallocate', 0, 3, 4, 1): expected vm/1: mapped")
    assert "restrictedmem.md §2" in told


def test_a_run_is_made_of_its_seed_alone() -> None:
    ends = []
    for _ in range(2):
        world = World()
        for op in make_run(5, RUN_STEPS):
            world.step(op)
        ends.append((world.engine.revision, sorted(world.pfns.values()), world.seen))
        world.close()
    assert ends[0] == ends[1]
    assert make_run(5, RUN_STEPS) != make_run(6, RUN_STEPS)
    assert {op[1] for seed in range(9) for op in make_run(seed, 9) if op[0] == "create_vm"} == {
        *KINDS
    }


@pytest.mark.parametrize("module", ["objects.py", "store.py", "spec.py"])
def test_the_specification_shares_no_code(module: str) -> None:
    tree = ast.parse((Path(__file__).parent / module).read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names |= {node.module or "" for node in froms if not node.level}
    assert names <= {"__future__", "collections", "dataclasses", "errno"}
    assert {node.module for node in froms if node.level} <= {"objects", "store"}
