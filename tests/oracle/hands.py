"""The hands of the oracle: one operation made on an engine, and what it said in plain values.

Owns the only calls of the engine's doors here, by the operation's name. Nobody waits: a fault that
a page fault handler should resolve is that of a caller who has gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rmemd.engine.engine import Engine
from rmemd.engine.migrate import Moved, Report
from rmemd.engine.programme import Instruction, Opcode
from rmemd.engine.vcpu import Exit, Exited
from rmemd.errors import RmemError
from rmemd.model.sessions import Owner

from .holders import DEVICE
from .kinds import KINDS
from .objects import PAGE
from .oracle import Op, Outcome

TENANT = "uid:1000"
GUEST_MEMFD = 4
# exits that say where they happened
PLACED = (Exit.MEMORY_FAULT, Exit.MMIO)


def perform(engine: Engine, op: Op) -> Outcome:
    """Make an operation; a refusal is an outcome like any other."""
    try:
        return Outcome(HANDS[op[0]](engine, *op[1:]))
    except RmemError as refusal:
        details = refusal.details
        return Outcome(
            None, refusal.errno, refusal.reason.name, details.error_offset, details.progress_pages,
            str(refusal),
        )  # fmt: skip


def _has_gone(engine: Engine) -> Callable[[], bool]:
    return lambda: bool(engine.core.pending_faults.waiting)


# --- objects -----------------------------------------------------------------------------------
def _create_vm(engine: Engine, kind: str, session: int) -> int:
    traits = KINDS[kind]
    in_place = traits.in_place if traits.private_memory else None
    made = engine.create_vm(traits.consumer, in_place=in_place, owner=Owner(TENANT, session))
    engine.create_vcpu(made.info.vm, 0)
    engine.set_programme(made.info.vm, 0, (), lazy_accept=True)
    return made.info.vm


def _add_slot(
    engine: Engine, vm: int, slot: int, gpa: int, size: int, file: int | None, offset: int
) -> int | None:
    if file is not None:
        engine.set_memory_region(vm, slot, GUEST_MEMFD, gpa, size, file, offset)
        return None
    engine.set_memory_region(vm, slot, 0, gpa, size)
    found: int = engine.core.vms.get(vm).slots[slot].file
    return found


# --- guests ------------------------------------------------------------------------------------
def _run(engine: Engine, vm: int, instruction: Instruction) -> Exited:
    engine.set_programme(vm, 0, (instruction,), lazy_accept=True)
    return engine.run_vcpu(vm, 0, cancelled=_has_gone(engine))


def _touch(
    engine: Engine, vm: int, gpa: int, npages: int, private: bool
) -> tuple[str, int, int | None]:
    exited = _run(engine, vm, Instruction(Opcode.TOUCH, gpa, npages * PAGE, private=private))
    name = "" if exited.reason is Exit.INTERNAL_ERROR else exited.reason.name
    return name, exited.errno, exited.gpa if exited.reason in PLACED else None


def _map_gpa(
    engine: Engine, vm: int, gpa: int, npages: int, to_private: bool
) -> tuple[str, int, int, int]:
    opcode = Opcode.UNSHARE if to_private else Opcode.SHARE
    exited = _run(engine, vm, Instruction(opcode, gpa, npages * PAGE))
    return exited.reason.name, exited.gpa, exited.size, exited.value


# --- the host ----------------------------------------------------------------------------------
def _pin(engine: Engine, file: int, offset: int, length: int, session: int) -> int:
    owner = Owner(TENANT, session)
    gone = _has_gone(engine)
    return engine.pin(file, offset, length, "DMA", DEVICE, owner, cancelled=gone)


def _get_pages(
    engine: Engine, file: int, offset: int, length: int, session: int
) -> tuple[int, ...]:
    return tuple(engine.get_pages(file, offset, length, Owner(TENANT, session)).tolist())


def _put_pages(engine: Engine, pfns: tuple[int, ...], session: int) -> int:
    return engine.put_pages(np.array(pfns, dtype=np.int64), Owner(TENANT, session))


def _moves(report: Report) -> tuple[tuple[int, int, str, int, str], ...]:
    return tuple(move for moved in report.moves for move in _each(moved))


def _each(moved: Moved) -> list[tuple[int, int, str, int, str]]:
    refusal, name = moved.refusal, moved.outcome.name
    why = (refusal.errno, refusal.reason.name) if refusal is not None else (0, "")
    pairs = zip(moved.src.tolist(), moved.dst.tolist(), strict=True)
    return [(src, dst, name, *why) for src, dst in pairs]


def _migrate(engine: Engine, pfns: tuple[int, ...], node: int | None) -> Any:
    return _moves(engine.migrate(np.array(pfns, dtype=np.int64), node))


def _compact(engine: Engine, node: int) -> Any:
    done = engine.compact(node)
    return _moves(done.report), done.free_2m_before, done.free_2m_after


def _offline(engine: Engine, pfn: int, npages: int) -> Any:
    done = engine.offline(pfn, npages)
    return _moves(done.report), done.offline


HANDS: Mapping[str, Callable[..., Any]] = {
    "create_vm": _create_vm,
    "finalize": lambda e, vm: bool(e.finalize(vm)) or None,
    "destroy_vm": lambda e, vm: e.destroy_vm(vm),
    "swap": lambda e, vm, kind: e.swap_consumer(vm, KINDS[kind].consumer).vm,
    "create_file": lambda e, vm, n, flags: e.create_file(vm, n * PAGE, flags).info.file,
    "close_file": lambda e, file: e.close_file(file),
    "add_slot": _add_slot,
    "delete_slot": lambda e, vm, slot: e.set_memory_region(vm, slot, 0, 0, 0),
    "fallocate": lambda e, *args: e.fallocate(*args),
    "set_policy": lambda e, *args: e.set_policy(*args),
    "set_attributes": lambda e, vm, *which: e.set_attributes(vm, [which]),
    "convert_file": lambda e, *args: e.convert_file(*args).changed_pages,
    "pre_fault": lambda e, *args: e.pre_fault(*args, cancelled=_has_gone(e)).done_pages,
    "populate": lambda e, *args: e.populate(*args),
    "touch": _touch,
    "read_guest": lambda e, vm, *args: e.read_guest(vm, 0, *args, cancelled=_has_gone(e)),
    "write_guest": lambda e, vm, *args: e.write_guest(vm, 0, *args, cancelled=_has_gone(e)),
    "map_gpa": _map_gpa,
    "answer": lambda e, vm, code: e.run_vcpu(vm, 0, code).reason.name,
    "host_read": lambda e, *args: e.read_shared(*args, cancelled=_has_gone(e)),
    "host_write": lambda e, *args: e.write_shared(*args, cancelled=_has_gone(e)),
    "open_session": lambda e: e.open_session(TENANT, "host", "socket").session,
    "close_session": lambda e, session: e.close_session(session) and None,
    "pin": _pin,
    "unpin": lambda e, pin: e.unpin(pin),
    "get_pages": _get_pages,
    "put_pages": _put_pages,
    "migrate": _migrate,
    "compact": _compact,
    "offline": _offline,
    "online": lambda e, *args: e.online(*args),
    "poison": lambda e, pfn: e.poison(pfn).vm_lost,
    "register": lambda e, *args: e.register_userfault(*args),
    "unregister": lambda e, *args: e.unregister_userfault(*args),
    "uf_copy": lambda e, *args: e.userfault_copy(*args),
    "uf_zeropage": lambda e, *args: e.userfault_zeropage(*args),
    "uf_continue": lambda e, *args: e.userfault_continue(*args),
}
