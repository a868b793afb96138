"""VMs and their memslots: made, changed, destroyed.

Owns KVM_SET_USER_MEMORY_REGION2 with its checks in KVM's order (restrictedmem.md §2, bind), and
what happens to mappings, bindings and vendor resources when a VM goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from rmemd.engine import frames, keys, memory
from rmemd.engine.bracket import View, invalidating
from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps, decided
from rmemd.errors import (
    BAD_REQUEST,
    BINDING_FOREIGN,
    EXISTS,
    NO_SLOT_NUMBERS,
    NO_SUCH_FILE,
    NO_SUCH_SLOT,
    SLOT_IMMUTABLE,
    SLOT_INVALID,
    SLOT_OVERLAP,
    VM_IN_USE,
)
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Why
from rmemd.model.files import FLAG_ANONYMOUS, Binding, RestrictedFile
from rmemd.model.sessions import NOBODY, Owner
from rmemd.model.vms import (
    GUEST_MEMFD,
    LOG_DIRTY,
    NR_MEMSLOTS,
    READONLY,
    Slot,
    Vcpu,
    Vm,
    VmInfo,
)
from rmemd.units import MAX_GFN, PAGE_SIZE, bytes_to_pages, is_page_aligned

VCPUS_MAX = 1024
U64_MAX = (1 << 64) - 1
RULE = "restrictedmem.md §2: bind"


def create_vm(
    core: Core,
    consumer: str,
    in_place: bool | None,
    config: Mapping[str, str],
    memlock_pages: int,
    name: str,
    starts_private: bool | None = None,
    owner: Owner = NOBODY,
) -> Steps[Vm]:
    """Make a VM with a consumer of its own.

    ``starts_private`` is what its attributes are at first; left out, private if it has such memory.
    """
    yield from ()
    if memlock_pages < 0:
        raise BAD_REQUEST(f"memlock_pages {memlock_pages}", field="memlock_pages")
    offer = core.registry.offer(consumer)
    variant = offer.variant
    if owner.session:
        core.sessions.alive(owner.session)
    with core.tx("create VM") as tx:
        number = tx.next_id("vm")
        if in_place is None:
            in_place = variant.personalities[0] == "in-place"
        wanted = "in-place" if in_place else "attributes"
        if wanted not in variant.personalities:
            raise BAD_REQUEST(f"{consumer} cannot convert by {wanted}", field="personality")
        if starts_private is None:
            starts_private = variant.private_memory
        if starts_private and not variant.private_memory:
            raise BAD_REQUEST(f"{consumer} has no private memory", field="starts_private")
        info = VmInfo(
            number, name, consumer, offer.platform, variant.private_memory, in_place,
            memlock_pages, owner, dict(config),
        )  # fmt: skip
        vm = core.vms.create(tx, info, starts_private)
        core.consumers[number] = core.registry.make(tx, number, consumer, config)
        tx.emit("vm_created", vm=number, consumer=consumer, name=name)
        return vm


def destroy_vm(core: Core, number: int) -> Steps[None]:
    """Unmap everything, cut bindings, give the vendor's resources back. Files live on."""
    anonymous = yield from _destroy(core, number)
    return decided(None, partial(memory.forget, core, anonymous))


def end_vm(core: Core, number: int) -> Steps[None]:
    """Destroy a VM, as a part of another operation."""
    yield from memory.forget(core, (yield from _destroy(core, number)))


def _destroy(core: Core, number: int) -> Steps[list[int]]:
    """Destroy a VM and the memory behind its slots; return the files that this was."""

    def one() -> Steps[list[int]]:
        yield from ()
        vm = core.vms.get(number)
        if any(running == number for running, _ in core.running):
            raise VM_IN_USE(f"a vCPU of {vm.info.label} is running", state="running")
        with core.tx("destroy VM") as tx:
            # a frozen VM's are still in the guest, and nobody will run them any more
            core.kick(tx, number)
            slots = [slot for _, slot in vm.slots.items()]
            views = [View(vm, slot.gfn, slot.npages) for slot in slots]
            with invalidating(core, tx, views, Why.CLOSE):
                pass
            anonymous = [slot.file for slot in slots if not slot.restricted]
            for slot in slots:
                _unbind(core, tx, vm, slot)
            for file in anonymous:
                memory.drop(core, tx, file)
            consumer = core.consumer(vm)
            consumer.platform.call(tx, number, "destroy_consumer", ..., consumer.made)
            frames.free_orphans(core, tx, core.ledger.forget(tx, vm.info.label))
            if number in core.host.vm_keys:
                tx.drop(core.host.vm_keys, number)
            core.vms.destroy(tx, number)
            keys.forget(core, tx)
            tx.emit("vm_destroyed", vm=number, tenant=vm.info.owner.tenant)
        del core.consumers[number]
        core.ranges.forget("vm", number)
        return anonymous

    return (yield from core.unit(one))


def create_vcpu(core: Core, number: int, index: int) -> Steps[None]:
    """Make a vCPU."""
    yield from ()
    vm = core.vms.alive(number)
    if not 0 <= index < VCPUS_MAX:
        raise BAD_REQUEST(f"vCPU {index} is not in 0..{VCPUS_MAX - 1}", field="vcpu")
    if index in vm.vcpus:
        raise EXISTS(f"{vm.info.label} has a vCPU {index}", field="vcpu")
    with core.tx("create vCPU") as tx:
        tx.set(vm.vcpus, index, Vcpu(index))


def set_memory_region(
    core: Core,
    number: int,
    index: int,
    flags: int,
    gpa: int,
    size: int,
    userspace_addr: int,
    file: int,
    offset: int,
) -> Steps[None]:
    """Add, re-set or delete a slot; what KVM refuses is refused in KVM's order."""
    vm = core.vms.alive(number)
    _check_shape(vm, index, flags, gpa, size, userspace_addr, offset)
    old: Slot | None = vm.slots.get(index)
    if size == 0:
        return (yield from _delete(core, number, index))
    slot = Slot(index, flags, gpa // PAGE_SIZE, bytes_to_pages(size), file, offset // PAGE_SIZE)
    if old is not None:
        _check_change(vm, old, slot)
        if old.gfn != slot.gfn:
            yield from _move(core, number, old, slot)
        elif old.flags != slot.flags:
            yield from core.unit(lambda: _set_flags(core, number, old, flags))
        return
    yield from core.unit(lambda: _add(core, number, slot))


def _check_shape(
    vm: Vm, index: int, flags: int, gpa: int, size: int, userspace_addr: int, offset: int
) -> None:
    allowed = READONLY | LOG_DIRTY
    if flags & GUEST_MEMFD:
        # a slot with a restricted file takes no other flag
        allowed = GUEST_MEMFD
    if flags & ~allowed:
        raise SLOT_INVALID(f"slot flags {flags:#x}", field="flags", rule=RULE)
    if not flags & GUEST_MEMFD:
        # the file's fields do not count
        offset = 0
    for field, value in (
        ("size_bytes", size),
        ("gpa", gpa),
        ("userspace_addr", userspace_addr),
        ("file_offset_bytes", offset),
    ):
        if not is_page_aligned(value):
            raise SLOT_INVALID(f"{field} {value:#x} is not page-aligned", field=field, rule=RULE)
    if offset + size > U64_MAX:
        raise SLOT_INVALID(
            f"{offset:#x}+{size:#x} wraps around", field="file_offset_bytes", rule=RULE
        )
    if gpa + size > MAX_GFN * PAGE_SIZE:
        raise SLOT_INVALID(
            f"{gpa:#x}+{size:#x} is past the guest's addresses", field="gpa", rule=RULE
        )
    if index >= NR_MEMSLOTS:
        raise NO_SLOT_NUMBERS(f"slot {index} is not below {NR_MEMSLOTS}", field="slot", rule=RULE)


def _check_change(vm: Vm, old: Slot, new: Slot) -> None:
    if old.restricted or new.restricted:
        raise SLOT_IMMUTABLE(
            f"slot {old.slot} of {vm.info.label} has a restricted file", field="slot",
            state=f"gfn {old.gfn:#x}+{old.npages:#x}", rule="restrictedmem.md §2: bound slot",
        )  # fmt: skip
    if old.npages != new.npages or (old.flags ^ new.flags) & READONLY:
        raise SLOT_INVALID(
            f"slot {old.slot} of {vm.info.label} cannot change its size or READONLY",
            field="size_bytes", rule="Linux kvm_set_memory_region",
        )  # fmt: skip


def _add(core: Core, number: int, slot: Slot) -> Steps[None]:
    yield from ()
    vm = core.vms.alive(number)
    _check_overlap(vm, slot)
    with core.tx("add slot") as tx:
        if slot.restricted:
            file = _bindable(core, vm, slot)
            # what goes on there began without these guest frames, and would leave them behind
            core.ranges.require_idle("file", slot.file, slot.pgoff, slot.npages)
            _bind(core, tx, file, number, slot)
        else:
            made = memory.new_file(core, tx, vm, slot.npages, FLAG_ANONYMOUS)
            slot = Slot(slot.slot, slot.flags, slot.gfn, slot.npages, made.info.file, 0)
            # what finds a page's guest frames finds this memory's too
            _bind(core, tx, made, number, slot)
        tx.set(vm.slots, slot.slot, slot)
        tx.fill(vm.slotmap, slot.gfn, slot.npages, slot.slot + 1)
        tx.emit("slot_added", vm=number, slot=slot.slot, gfn=slot.gfn, npages=slot.npages)


def _bind(core: Core, tx: Tx, file: RestrictedFile, vm: int, slot: Slot) -> None:
    binding = Binding(slot.pgoff, slot.npages, vm, slot.slot, slot.gfn)
    core.files.bind(tx, file, binding, core.options.binding_overlap_errno)


def _check_overlap(vm: Vm, slot: Slot, but: int = 0) -> None:
    _, _, values = vm.slotmap.runs(slot.gfn, slot.npages)
    others = values[(values != 0) & (values != but)]
    if others.size:
        other: Slot = vm.slots[int(others[0]) - 1]
        raise SLOT_OVERLAP(
            f"gfn {slot.gfn:#x}+{slot.npages:#x} overlaps slot {other.slot}", field="gpa",
            page=f"gfn {max(slot.gfn, other.gfn):#x}", state=f"in slot {other.slot}", rule=RULE,
        )  # fmt: skip


def _bindable(core: Core, vm: Vm, slot: Slot) -> RestrictedFile:
    if slot.file <= 0 or not core.files.exists(slot.file):
        raise NO_SUCH_FILE(f"file {slot.file} does not exist", field="file", rule=RULE)
    file = core.files.get(slot.file)
    if file.info.owner.tenant != vm.info.owner.tenant:
        raise NO_SUCH_FILE(
            f"file {slot.file} does not exist", field="file", rule=RULE,
            for_log=f"it is {file.info.owner.tenant}'s",
        )  # fmt: skip
    if file.info.vm != vm.info.vm or file.info.flags & FLAG_ANONYMOUS:
        raise BINDING_FOREIGN(
            f"file/{slot.file} is not a restricted file of {vm.info.label}", field="file", rule=RULE
        )
    if slot.pgoff + slot.npages > file.info.size_pages:
        raise SLOT_INVALID(
            f"pgoff {slot.pgoff:#x}+{slot.npages:#x} is past file/{slot.file} "
            f"of {file.info.size_pages} pages", field="file_offset_bytes", rule=RULE,
        )  # fmt: skip
    return file


def _delete(core: Core, number: int, index: int) -> Steps[None]:
    def one() -> Steps[Slot]:
        yield from ()
        vm = core.vms.alive(number)
        slot: Slot | None = vm.slots.get(index)
        if slot is None:
            raise NO_SUCH_SLOT(f"{vm.info.label} has no slot {index}", field="slot", rule=RULE)
        with core.tx("delete slot") as tx:
            with invalidating(core, tx, [View(vm, slot.gfn, slot.npages)], Why.SLOT):
                pass
            _unbind(core, tx, vm, slot)
            if not slot.restricted:
                memory.drop(core, tx, slot.file)
            tx.emit("slot_deleted", vm=number, slot=index)
        return slot

    slot = yield from core.unit(one)
    if not slot.restricted:
        return decided(None, partial(memory.forget, core, [slot.file]))


def _unbind(core: Core, tx: Tx, vm: Vm, slot: Slot) -> None:
    if core.files.exists(slot.file):
        file = core.files.get(slot.file)
        if (vm.info.vm, slot.slot) in file.bindings:
            core.files.unbind(tx, file, vm.info.vm, slot.slot)
    tx.drop(vm.slots, slot.slot)
    tx.fill(vm.slotmap, slot.gfn, slot.npages, 0)


def _move(core: Core, number: int, old: Slot, new: Slot) -> Steps[None]:
    def one() -> Steps[None]:
        yield from ()
        vm = core.vms.alive(number)
        _check_overlap(vm, new, but=old.slot + 1)
        with core.tx("move slot") as tx:
            with invalidating(core, tx, [View(vm, old.gfn, old.npages)], Why.SLOT):
                pass
            moved = Slot(old.slot, new.flags, new.gfn, old.npages, old.file, old.pgoff)
            file = core.files.get(old.file)
            core.files.unbind(tx, file, number, old.slot)
            _bind(core, tx, file, number, moved)
            tx.fill(vm.slotmap, old.gfn, old.npages, 0)
            tx.fill(vm.slotmap, new.gfn, old.npages, old.slot + 1)
            tx.set(vm.slots, old.slot, moved)
            tx.emit("slot_moved", vm=number, slot=old.slot, gfn=new.gfn)

    yield Step("move slot", vm=number)
    yield from core.unit(one)


def _set_flags(core: Core, number: int, old: Slot, flags: int) -> Steps[None]:
    yield from ()
    vm = core.vms.alive(number)
    with core.tx("set slot flags") as tx:
        tx.set(vm.slots, old.slot, Slot(old.slot, flags, old.gfn, old.npages, old.file, old.pgoff))
