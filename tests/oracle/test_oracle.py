"""The engine against the executable specification: operations at random, compared after each.

RMEMD_ORACLE_STEPS sets how many operations are made (20000 unless told); ``make oracle`` says how
many there were. Runs are made of their seed alone, so a difference can be had again.
"""

from __future__ import annotations

import ast
import os
from collections import Counter
from pathlib import Path

import pytest

from oracle.conftest import FIGURE
from oracle.driver import World
from oracle.hands import HANDS, perform
from oracle.kinds import KINDS
from oracle.mutants import MUTANTS
from oracle.oracle import Op, Outcome
from oracle.runs import RUN_STEPS, explain, make_run, play, shrink

STEPS = int(os.environ.get("RMEMD_ORACLE_STEPS", "20000"))
# a mutant that is not seen in as many operations counts as missed
MUTANT_STEPS_MAX = 12_000

# differences that there were, as the shortest operations that showed them
MENDED: dict[str, list[Op]] = {
    "an allocation that runs out keeps its prefix": [
        ("create_vm", "null", True, 513),
        ("fallocate", 0, 1, 0, 513),
    ],
    "a punch leaves the leaf of the shared half": [
        ("create_vm", "null"),
        ("set_attributes", 0, 0, 1, 0),
        ("pre_fault", 0, 0, 1),
        ("fallocate", 0, 3, 0, 1),
    ],
    "poison leaves the leaf of the other half": [
        ("create_vm", "sw-attributes"),
        ("fallocate", 0, 1, 0, 1),
        ("set_attributes", 0, 0, 1, 0),
        ("pre_fault", 0, 0, 1),
        ("poison", 0),
    ],
    "conversion in place checks every folio of its range": [
        ("open_session",),
        ("create_vm", "sw-in-place"),
        ("get_pages", 0, 1, 1, 0),
        ("convert_file", 1, 0, 1, 0),
        ("convert_file", 1, 0, 2, 8),
    ],
    "a guest gets the pages before the one that there is no frame for": [
        ("create_vm", "null", True, 513),
        ("fallocate", 0, 1, 0, 508),
        ("touch", 0, 500, 13, True),
    ],
    "a guest's exit names the page that is poisoned": [
        ("create_vm", "sw-attributes"),
        ("fallocate", 0, 1, 1, 1),
        ("poison", 0),
        ("touch", 0, 0, 3, True),
    ],
    "a guest's write keeps the pages before the one that is poisoned": [
        ("create_vm", "sw-attributes"),
        ("fallocate", 0, 1, 1, 1),
        ("poison", 0),
        ("guest_io", 0, 0, 8192, 2, 1),
    ],
    "pages move as long as there are frames": [
        ("create_vm", "gup", True, 300),
        ("pre_fault", 0, 0, 300),
        ("migrate", 0, 300),
    ],
    "a handler fills holes as long as there are frames": [
        ("create_vm", "null", True, 513),
        ("fallocate", 0, 1, 0, 510),
        ("set_attributes", 0, 0, 4, 0),
        ("register", 0, 0, 4, 0),
        ("resolve", "uf_zeropage", 0, 0, 4, 1),
    ],
    "ordinary memory is no restricted file": [
        ("open_session",),
        ("create_vm", "gup"),
        ("fallocate", 0, 1, 0, 1),
        ("get_pages", 0, 0, 1, 0),
    ],
    "ordinary memory gets no private half from a handler": [
        ("create_vm", "gup"),
        ("register", 0, 7, 5, 0),
        ("resolve", "uf_continue", 0, 0, 1, 1),
        ("migrate", 0, 1),
    ],
    "interleaving passes over a node that is full": [
        ("host", 1024, 2),
        ("create_vm", "null", True, 512),
        ("fallocate", 0, 1, 0, 512),
        ("create_vm", "sw-in-place"),
        ("set_policy", 1, 0, 12, 3, 1),
        ("fallocate", 1, 1, 0, 6),
    ],
    "initial pages are taken as long as there are frames": [
        ("create_vm", "null", True, 511),
        ("fallocate", 0, 1, 0, 511),
        ("create_vm", "gup"),
        ("create_vm", "tdx-today"),
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
    ("pre_fault", "HW_POISON"), ("pre_fault", "NO_FRAMES"), ("pre_fault", "INTERRUPTED"),
    ("pre_fault", "PRE_FAULT_TOO_EARLY"), ("touch", "ok"), ("populate", "ok"),
    ("populate", "NOT_PRIVATE"), ("populate", "NO_FRAMES"), ("finalize", "ok"),
    ("read_guest", "ok"), ("read_guest", "MEMORY_FAULT"), ("write_guest", "ok"),
    ("write_guest", "NO_FRAMES"), ("write_guest", "INTERRUPTED"), ("map_gpa", "ok"),
    ("answer", "ok"), ("host_read", "ok"), ("host_read", "HOST_SIGBUS"), ("host_write", "ok"),
    ("host_write", "INTERRUPTED"), ("pin", "ok"), ("pin", "HOST_SIGBUS"), ("pin", "INTERRUPTED"),
    ("unpin", "ok"), ("get_pages", "ok"), ("put_pages", "ok"), ("put_pages", "NOT_HELD"),
    ("close_session", "ok"), ("close_file", "ok"), ("destroy_vm", "ok"), ("swap", "ok"),
    ("swap", "SWAP_FOREIGN"), ("register", "ok"), ("register", "USERFAULT_TAKEN"),
    ("uf_copy", "ok"), ("uf_copy", "PAGE_PRESENT"), ("uf_copy", "PRIVATE_CONTENT"),
    ("uf_zeropage", "ok"), ("uf_continue", "ok"), ("uf_continue", "NO_SUCH_USERFAULT"),
    ("set_policy", "ok"), ("set_policy", "BAD_NODE"), ("poison", "ok"), ("poison", "HW_POISON"),
    ("migrate", "MOVED"), ("migrate", "UNMOVABLE"), ("migrate", "BUSY"), ("migrate", "FAILED"),
    ("compact", "MOVED"), ("compact", "UNMOVABLE"), ("offline", "MOVED"), ("offline", "UNMOVABLE"),
    ("online", "ok"),
}  # fmt: skip


@pytest.mark.timeout(max(180, STEPS // 60))
def test_the_engine_does_what_the_reference_says(request: pytest.FixtureRequest) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    done = sequences = 0
    while done < STEPS:
        run = make_run(sequences, min(RUN_STEPS, STEPS - done))
        if play(run, seen=seen) is not None:
            pytest.fail(f"seed {sequences}: {explain(run)}")
        done, sequences = done + len(run), sequences + 1
    if STEPS >= 20000:
        assert REACHED - set(seen) == set()
    request.config.stash[FIGURE] = f"{done} operations, {sequences} sequences, 0 differences"


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_the_engine_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    for seed in range(MUTANT_STEPS_MAX // RUN_STEPS):
        if play(make_run(seed, RUN_STEPS)) is not None:
            return
    pytest.fail(f"{name} was not seen in {MUTANT_STEPS_MAX} operations")


@pytest.mark.parametrize("name", MENDED)
def test_a_difference_that_was_mended_stays_mended(name: str) -> None:
    assert play(MENDED[name]) is None


@pytest.mark.parametrize("then", [("migrate", 0, 1), ("poison", 0)], ids=["migrate", "poison"])
def test_pages_of_an_ordinary_slot_are_unmapped_when_they_go(then: Op) -> None:
    assert play([("create_vm", "gup"), ("pre_fault", 0, 0, 1), then]) is None


def test_a_difference_is_told_in_words_with_the_shortest_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    MUTANTS["punch_leaves_the_mirror"](monkeypatch)
    begin = [("create_vm", "sw-attributes"), ("pre_fault", 0, 3, 2), ("fallocate", 0, 3, 4, 1)]
    noise = [
        ("create_vm", "gup"),
        ("pin", 1, 0, 2, -1),
        ("delete_slot", 0, 2),
        ("pre_fault", 1, 0, 3),
    ]
    run = [*begin[:2], *noise, begin[2], *noise]
    assert shrink(run) == begin
    told = explain(run)
    assert told.startswith("('fallocate', 1, 3, 16384, 4096): expected vm/1: mapped")
    assert "restrictedmem.md §2" in told


def test_a_run_is_made_of_its_seed_alone() -> None:
    ends = []
    for _ in range(2):
        world = World()
        for op in make_run(4, RUN_STEPS):
            world.step(op)
        ends.append((world.engine.revision, sorted(world.spec.by_pfn), world.seen))
        world.close()
    assert ends[0] == ends[1]
    assert make_run(5, RUN_STEPS) != make_run(6, RUN_STEPS)
    assert {op[1] for seed in range(9) for op in make_run(seed, 9) if op[0] == "create_vm"} == {
        *KINDS
    }


# --- the oracle as a part of other tests -------------------------------------------------------
def test_every_operation_is_one_of_the_specification() -> None:
    world = World()
    assert all(callable(getattr(world.spec, name)) for name in HANDS)
    world.close()


def test_a_copy_goes_its_own_way() -> None:
    """An operation that a crash may have undone: one of two oracles agrees with the engine."""
    world = World()
    world.create_vm("null")
    before, op = world.oracle.copy(), ("fallocate", 1, 1, 0, 4096)
    expected = world.oracle.apply(op)
    assert before.compare(world.engine) == []
    assert [str(one) for one in world.oracle.compare(world.engine)] != []
    assert world.oracle.judge(op, expected, perform(world.engine, op)) == []
    assert before.compare(world.engine) != []
    assert world.oracle.compare(world.engine, contents=True) == []
    world.close()


@pytest.mark.parametrize(
    "outcome",
    [Outcome(2), Outcome(errno=12, reason="NO_FRAMES"), Outcome(errno=22, reason="BAD_RANGE")],
)
def test_an_answer_that_is_not_the_expected_one_is_a_difference(outcome: Outcome) -> None:
    world = World()
    world.create_vm("null")
    op = ("fallocate", 1, 1, 0, 4096)
    assert world.oracle.judge(op, world.oracle.apply(op), outcome) != []
    world.close()


MODULES = (
    "objects.py", "kinds.py", "store.py", "layout.py", "conversion.py", "access.py", "holders.py",
    "spec.py",
)  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_the_specification_shares_no_code(module: str) -> None:
    tree = ast.parse((Path(__file__).parent / module).read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names |= {node.module or "" for node in froms if not node.level}
    allowed = {"__future__", "collections", "collections.abc", "dataclasses", "errno", "typing"}
    assert names <= allowed
    assert {f"{node.module}.py" for node in froms if node.level} <= {*MODULES}
