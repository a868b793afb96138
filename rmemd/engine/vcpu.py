"""vCPUs: a guest programme run until it exits, as KVM_RUN does.

Owns the run loop and the exits. A stretch of guest execution is one transaction of at most
``CHUNK_PAGES`` pages, after which others may come in; the vendor sees it as entering and leaving
the guest. Pages are faulted in, judged by the consumer, and then read or written.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.guestcall import make_call, take_exception
from rmemd.engine.guestmemory import Stop, access
from rmemd.engine.programme import ACCESSES, CALLS, Instruction, Opcode, check
from rmemd.errors import VCPU_BUSY, RmemError
from rmemd.hooks.tx import Tx
from rmemd.model.vms import Vcpu, Vm

T = TypeVar("T")
EINTR = 4


class Exit(IntEnum):
    """Why a vCPU came back; numbered as in vcpu.proto. NONE: only the errno counts."""

    NONE = 0
    HYPERCALL = 1
    MEMORY_FAULT = 2
    HLT = 3
    SHUTDOWN = 4
    INTERNAL_ERROR = 5
    MMIO = 6
    INTR = 7
    IO = 8


class Exited(Struct, frozen=True):
    """An exit, with what the VMM needs to handle it."""

    reason: Exit
    vcpu: Vcpu
    errno: int = 0
    flags: int = 0
    gpa: int = 0
    size: int = 0
    value: int = 0
    text: str = ""
    status: int = 0
    refusal: RmemError | None = None


def set_programme(
    core: Core, number: int, index: int, programme: tuple[Instruction, ...], lazy_accept: bool
) -> Steps[None]:
    """Give a vCPU a programme; it begins at the first instruction."""
    yield from ()
    check(programme)
    vm, vcpu = _at_rest(core, number, index)
    with core.tx("set programme") as tx:
        fresh = Vcpu(index, programme, lazy_accept, inside=vcpu.inside)
        tx.set(vm.vcpus, index, fresh)


def run(
    core: Core,
    number: int,
    index: int,
    answer: int,
    max_instructions: int,
    cancelled: Callable[[], bool],
) -> Steps[Exited]:
    """Run a vCPU until the guest exits."""
    running = partial(_run, core, number, index, answer, max_instructions, cancelled)
    return (yield from on_vcpu(core, number, index, running))


def on_vcpu(core: Core, number: int, index: int, running: Callable[[], Steps[T]]) -> Steps[T]:
    """Do something on a vCPU that is at rest, and on which nobody else does anything meanwhile.

    Raises:
        Busy: VCPU_BUSY.
    """
    _at_rest(core, number, index)
    core.running.add((number, index))
    try:
        return (yield from running())
    except Exception:
        yield from core.unit(lambda: leave(core, number, index))
        raise
    finally:
        core.running.discard((number, index))


def _at_rest(core: Core, number: int, index: int) -> tuple[Vm, Vcpu]:
    vm = core.vms.alive(number)
    vcpu = vm.vcpu(index)
    if (number, index) in core.running:
        raise VCPU_BUSY(f"vCPU {index} of {vm.info.label} is running", state="running")
    return vm, vcpu


def _run(
    core: Core,
    number: int,
    index: int,
    answer: int,
    max_instructions: int,
    cancelled: Callable[[], bool],
) -> Steps[Exited]:
    vcpu = core.vms.get(number).vcpu(index)
    if vcpu.waiting:
        yield from core.unit(lambda: _answer_hypercall(core, number, index, answer))
    # the vendor may refuse the entry, before anything is faulted in
    yield from core.unit(lambda: enter(core, number, index))
    begun = vcpu.instructions
    while True:
        exited = yield from core.unit(lambda: _instruction(core, number, index))
        if exited is None:
            done = core.vms.get(number).vcpu(index).instructions - begun
            ending = cancelled() or core.draining or number in core.leaving
            if ending or 0 < max_instructions <= done:
                exited = Exited(Exit.INTR, core.vms.get(number).vcpu(index), errno=EINTR)
        if exited is not None:
            yield from core.unit(lambda: leave(core, number, index))
            return replace(exited, vcpu=core.vms.get(number).vcpu(index))
        yield Step("guest", vm=number)


def enter(core: Core, number: int, index: int) -> Steps[None]:
    """Have the vCPU enter the guest; the vendor may refuse."""
    yield from ()
    with core.tx("enter") as tx:
        core.enter(tx, core.vms.alive(number), index)


def leave(core: Core, number: int, index: int) -> Steps[None]:
    """Have the vCPU leave the guest, if it is in it."""
    yield from ()
    vm = core.vms.get(number)
    if vm.vcpu(index).inside:
        with core.tx("leave") as tx:
            core.leave(tx, vm, index)


def _answer_hypercall(core: Core, number: int, index: int, answer: int) -> Steps[None]:
    """Give the guest the VMM's answer: done, or the call failed and the guest goes on."""
    yield from ()
    vm = core.vms.alive(number)
    vcpu = vm.vcpu(index)
    with core.tx("hypercall answered") as tx:
        status = answer & 0xFFFF_FFFF_FFFF_FFFF
        name = "success" if answer == 0 else f"errno {abs(answer)}"
        tx.set(vm.vcpus, index, _advanced(replace(vcpu, waiting=False), status, name))


def _instruction(core: Core, number: int, index: int) -> Steps[Exited | None]:
    """Execute (part of) one instruction; return the exit it causes, or None."""
    vm = core.vms.alive(number)
    vcpu = vm.vcpu(index)
    if vcpu.pc >= len(vcpu.programme):
        return Exited(Exit.HLT, vcpu)
    instruction: Instruction = vcpu.programme[vcpu.pc]
    if instruction.opcode in ACCESSES:
        return (yield from _access(core, number, index, instruction))
    if instruction.opcode in CALLS:
        return (yield from _call(core, number, index, instruction))
    with core.tx("guest") as tx:
        vcpu = core.enter(tx, vm, index)
        return _control(tx, vm, vcpu, instruction)


def _control(tx: Tx, vm: Vm, vcpu: Vcpu, instruction: Instruction) -> Exited | None:
    if instruction.opcode is Opcode.HALT:
        tx.set(vm.vcpus, vcpu.vcpu, replace(vcpu, pc=len(vcpu.programme)))
        return Exited(Exit.HLT, vcpu)
    if instruction.opcode is Opcode.SIGNAL:
        tx.set(vm.vcpus, vcpu.vcpu, _advanced(vcpu))
        return Exited(Exit.IO, vcpu, value=instruction.value)
    loops = dict(vcpu.loops)
    gone_back = loops.pop(vcpu.pc, 0)
    if gone_back < instruction.times:
        loops[vcpu.pc] = gone_back + 1
        vcpu = replace(
            vcpu, pc=instruction.value, done=0, loops=tuple(sorted(loops.items())),
            instructions=vcpu.instructions + 1,
        )  # fmt: skip
    else:
        vcpu = _advanced(replace(vcpu, loops=tuple(sorted(loops.items()))))
    tx.set(vm.vcpus, vcpu.vcpu, vcpu)
    return None


def _access(core: Core, number: int, index: int, instruction: Instruction) -> Steps[Exited | None]:
    done = core.vms.get(number).vcpu(index).done
    result = yield from access(core, number, index, instruction, done)
    if isinstance(result, Stop):
        return _stopped(core, number, index, result)
    if result.exception:
        stop = yield from take_exception(core, number, index, result.gfn, result.exception)
        return None if stop is None else _stopped(core, number, index, stop)
    vm = core.vms.get(number)
    with core.tx("guest") as tx:
        vcpu = vm.vcpu(index)
        seen = vcpu.first_mismatch
        vcpu = replace(
            vcpu, done=done + result.nbytes, checked=vcpu.checked + result.checked,
            mismatched=vcpu.mismatched + result.mismatched,
            first_mismatch=seen if seen >= 0 else result.first_mismatch,
        )  # fmt: skip
        if vcpu.done >= instruction.length:
            vcpu = _advanced(vcpu)
        tx.set(vm.vcpus, index, vcpu)
    return None


def _call(core: Core, number: int, index: int, instruction: Instruction) -> Steps[Exited | None]:
    vcpu = core.vms.get(number).vcpu(index)
    result = yield from make_call(core, number, index, instruction, vcpu.done)
    if isinstance(result, Stop):
        return _stopped(core, number, index, result)
    vm = core.vms.get(number)
    vcpu = vm.vcpu(index)
    with core.tx("guest call") as tx:
        if result.hypercall:
            tx.set(vm.vcpus, index, replace(vcpu, waiting=True))
            size = instruction.length
            value = 8 if result.to_private else 0
            return Exited(Exit.HYPERCALL, vcpu, gpa=instruction.gpa, size=size, value=value)
        vcpu = replace(
            vcpu, done=vcpu.done + result.done, call_status=result.status,
            call_status_name=result.status_name,
        )  # fmt: skip
        if result.finished or vcpu.done * 4096 >= instruction.length:
            vcpu = _advanced(vcpu, result.status, result.status_name)
        tx.set(vm.vcpus, index, vcpu)
    return None


def _stopped(core: Core, number: int, index: int, stop: Stop) -> Exited:
    vcpu = core.vms.get(number).vcpu(index)
    return Exited(
        Exit[stop.exit], vcpu, stop.errno, stop.flags, stop.gpa, stop.size, 0, stop.text,
        stop.status, stop.refusal,
    )  # fmt: skip


def _advanced(vcpu: Vcpu, status: int | None = None, name: str = "") -> Vcpu:
    vcpu = replace(vcpu, pc=vcpu.pc + 1, done=0, instructions=vcpu.instructions + 1)
    if status is not None:
        vcpu = replace(vcpu, call_status=status, call_status_name=name)
    return vcpu
