"""Views of VMs and files are made once, and never outlive the facts that they are of."""

from __future__ import annotations

from contextlib import suppress

from helpers import refusal

from rmemd.engine.engine import Engine
from rmemd.engine.memory import MPOL_BIND
from rmemd.errors import NO_SUCH_FILE, NO_SUCH_VM, VM_DEAD
from rmemd.model.files import Binding, Policy
from rmemd.units import PAGE_SIZE, pages


class Undone(Exception):
    """A transaction ends without effect."""


def test_a_view_is_made_once(engine: Engine) -> None:
    core = engine.core
    vm = engine.create_vm("null").info.vm
    file = engine.create_file(vm, PAGE_SIZE).info.file
    assert core.vms.get(vm) is core.vms.get(vm)
    assert core.files.get(file) is core.files.get(file)


def test_new_facts_are_another_view(engine: Engine) -> None:
    core = engine.core
    vm = engine.create_vm("null").info.vm
    before = core.vms.get(vm)
    with core.locked(), core.tx("kill") as tx:
        core.vms.update(tx, before, state="dead", dead_reason="a test")
    assert before.info.state != "dead"
    assert core.vms.get(vm).info.state == "dead"
    refusal(core.vms.alive, vm, reason=VM_DEAD, errno=VM_DEAD.errno)


def test_what_is_destroyed_and_undone_is_there_as_it_was(engine: Engine) -> None:
    core = engine.core
    vm = engine.create_vm("null").info.vm
    file = engine.create_file(vm, PAGE_SIZE).info.file
    mirror, frames = core.vms.get(vm).mirror, core.files.get(file).frames
    with core.locked(), suppress(Undone), core.tx("destroy") as tx:
        core.files.destroy(tx, file)
        core.vms.destroy(tx, vm)
        refusal(core.vms.get, vm, reason=NO_SUCH_VM, errno=NO_SUCH_VM.errno)
        refusal(core.files.get, file, reason=NO_SUCH_FILE, errno=NO_SUCH_FILE.errno)
        raise Undone
    assert core.vms.get(vm).mirror is mirror
    assert core.files.get(file).frames is frames


def test_a_number_that_was_undone_is_another_objects(engine: Engine) -> None:
    core = engine.core
    vm = engine.create_vm("null").info.vm
    with core.locked(), suppress(Undone), core.tx("create") as tx:
        made = core.files.create(tx, vm, 1, 0, False)
        number = made.info.file
        assert core.files.get(number).frames is made.frames
        raise Undone
    again = engine.create_file(vm, PAGE_SIZE)
    assert again.info.file == number
    assert core.files.get(number).frames is core.space.tables[f"file/{number}/frames"]
    assert core.files.get(number).frames is not made.frames


def test_tables_that_most_files_need_not_come_and_go_with_what_is_written(engine: Engine) -> None:
    core = engine.core
    vm = engine.create_vm("null").info.vm
    number = engine.create_file(vm, PAGE_SIZE).info.file
    file, owner = core.files.get(number), f"file/{number}"
    at_first = core.space.below(owner)
    binding = Binding(0, 1, vm, 0, 0x100)
    with core.locked(), suppress(Undone), core.tx("bind") as tx:
        core.files.bind(tx, file, binding, 17)
        core.files.policies(tx, file)
        assert file.bound(0, 1) == [(binding, 0, 1)]
        assert len(core.space.below(owner)) == len(at_first) + 3
        raise Undone
    assert core.space.below(owner) == at_first
    assert file.bound(0, 1) == []
    assert file.policy.at(0) == 0
    engine.set_policy(number, 0, PAGE_SIZE, MPOL_BIND, (0,))
    numbers, policies = file.policy_at(pages(0, 1))
    assert policies[int(numbers[0])] == Policy(MPOL_BIND, (0,))
    engine.close_file(number)
    assert core.space.below(owner) == []
