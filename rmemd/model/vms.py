"""Virtual machines: facts, memslots, attributes, the mirror, vCPUs.

Owns the ``vm/*`` tables that are the engine's (a consumer's are below ``vm/N/<platform>/``). The
mirror is the generic secondary MMU: per gfn, 0 for nothing, else ``(pfn + 1) << 1 | shared``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from rmemd.errors import NO_SUCH_VCPU, NO_SUCH_VM, VM_DEAD, VM_FROZEN
from rmemd.hooks.tables import Records, Space, TableSpec
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Runs
from rmemd.model.sessions import NOBODY, Owner
from rmemd.units import I64, Bools

LOG_DIRTY = 1
READONLY = 2
GUEST_MEMFD = 4
NR_MEMSLOTS = 32764
ATTRIBUTE_PRIVATE = 8


class VmInfo(Struct, frozen=True):
    """A VM's facts.

    ``state`` is "building", "finalized", "frozen" or "dead"; ``measurement`` is set by finalize.
    """

    vm: int
    name: str
    consumer: str
    platform: str
    private_memory: bool
    in_place: bool
    memlock_pages: int
    owner: Owner = NOBODY
    config: Mapping[str, str] = field(default_factory=dict)
    state: str = "building"
    dead_reason: str = ""
    measurement: bytes = b""

    @property
    def label(self) -> str:
        """Return how messages name the VM."""
        return f"vm/{self.vm}"


class Slot(Struct, frozen=True):
    """A memslot; ``file`` is the restricted file, or the anonymous one behind an ordinary slot."""

    slot: int
    flags: int
    gfn: int
    npages: int
    file: int
    pgoff: int

    @property
    def restricted(self) -> bool:
        """Return whether it has a restricted file."""
        return bool(self.flags & GUEST_MEMFD)


class Vcpu(Struct, frozen=True):
    """A vCPU between two steps: its programme, and how far it is.

    Attributes:
        programme: the instructions (``engine.programme``).
        lazy_accept: whether the guest handles an exception of an unaccepted page by accepting.
        pc: index of the instruction to go on with.
        done: bytes (or, for calls, pages) of it that are done.
        loops: how often each loop instruction has gone back.
        inside: whether it is in the guest, for the vendor's TLB state.
        waiting: whether a hypercall exit waits for the VMM's answer.
    """

    vcpu: int
    programme: tuple[Any, ...] = ()
    lazy_accept: bool = False
    pc: int = 0
    done: int = 0
    loops: tuple[tuple[int, int], ...] = ()
    inside: bool = False
    waiting: bool = False
    instructions: int = 0
    checked: int = 0
    mismatched: int = 0
    first_mismatch: int = -1
    call_status: int = 0
    call_status_name: str = ""


class Vm:
    """A view of one VM's tables."""

    def __init__(self, space: Space, info: VmInfo) -> None:
        self.info = info
        prefix = f"vm/{info.vm}/"
        self.attributes = space.sparse(prefix + "attributes")
        self.mirror = space.sparse(prefix + "mirror")
        self.slotmap = space.sparse(prefix + "slotmap")
        self.slots = space.records(prefix + "slots")
        self.vcpus = space.records(prefix + "vcpus")

    def slot_at(self, gfn: int) -> Slot | None:
        """Return the slot that covers a guest frame."""
        number = self.slotmap.at(gfn)
        slot: Slot | None = self.slots[number - 1] if number else None
        return slot

    def vcpu(self, index: int) -> Vcpu:
        """Return a vCPU.

        Raises:
            NotFound: NO_SUCH_VCPU.
        """
        vcpu: Vcpu | None = self.vcpus.get(index)
        if vcpu is None:
            raise NO_SUCH_VCPU(f"{self.info.label} has no vCPU {index}", field="vcpu")
        return vcpu

    def mapped(self, gfn: int, npages: int) -> tuple[Runs, Runs]:
        """Return what the mirror maps of a range: (private runs, shared runs)."""
        return self.runs_of(self.mirror.touched(gfn, npages))

    def runs_of(self, gfns: I64) -> tuple[Runs, Runs]:
        """Return what the mirror maps at guest frames that it has: (private runs, shared runs)."""
        if not gfns.size:
            none = Runs(gfns, gfns, gfns)
            return none, none
        pfns, shared = unpack(self.mirror.get(gfns))
        return (
            Runs.of_pages(gfns[~shared], pfns[~shared]),
            Runs.of_pages(gfns[shared], pfns[shared]),
        )

    def install(self, tx: Tx, runs: Runs, shared: bool) -> None:
        """Enter runs in the mirror."""
        tx.put(self.mirror, runs.gfns(), ((runs.pfns() + 1) << 1) | int(shared))

    def clear(self, tx: Tx, runs: Runs) -> None:
        """Take runs out of the mirror."""
        if runs.npages.size:
            tx.put(self.mirror, runs.gfns(), 0)


def unpack(entries: I64) -> tuple[I64, Bools]:
    """Split mirror entries into (pfns, shared); a pfn of -1 is no entry."""
    return (entries >> 1) - 1, (entries & 1).astype(np.bool_)


class Vms:
    """All VMs.

    Attributes:
        exists: returns whether a VM, by its number, is there.
    """

    def __init__(self, space: Space, tx: Tx) -> None:
        self._space = space
        self._info: Records = tx.create(TableSpec("vms", "records"))
        self._info.group_by(lambda _, info: info.owner.session)
        self.exists: Callable[[int], bool] = self._info.has
        self._views: dict[int, Vm] = {}

    def create(self, tx: Tx, info: VmInfo, starts_private: bool) -> Vm:
        """Make a VM whose attributes are all private, or all shared, at first."""
        prefix = f"vm/{info.vm}/"
        tx.create(TableSpec(prefix + "attributes", "sparse", "u1", int(starts_private)))
        tx.create(TableSpec(prefix + "mirror", "sparse", "i8"))
        tx.create(TableSpec(prefix + "slotmap", "sparse", "u2"))
        tx.create(TableSpec(prefix + "slots", "records"))
        tx.create(TableSpec(prefix + "vcpus", "records"))
        tx.set(self._info, info.vm, info)
        return Vm(self._space, info)

    def destroy(self, tx: Tx, vm: int) -> None:
        """Forget a VM and every table below it."""
        for name in self._space.below(f"vm/{vm}"):
            tx.destroy(name)
        tx.drop(self._info, vm)
        self._views.pop(vm, None)

    def update(self, tx: Tx, vm: Vm, **changes: Any) -> Vm:
        """Change facts of a VM and return the new view."""
        info = replace(vm.info, **changes)
        tx.set(self._info, info.vm, info)
        return Vm(self._space, info)

    def get(self, vm: int) -> Vm:
        """Return a VM, dead or alive.

        Raises:
            NotFound: NO_SUCH_VM.
        """
        info = self._info.get(vm)
        if info is None:
            raise NO_SUCH_VM(f"vm/{vm} does not exist", field="vm")
        view = self._views.get(vm)
        # facts that were written, or written back, are another object, and may be another VM's
        if view is None or view.info is not info:
            view = self._views[vm] = Vm(self._space, info)
        return view

    def alive(self, vm: int) -> Vm:
        """Return a VM that was neither killed nor frozen.

        Raises:
            NotFound: NO_SUCH_VM.
            Refused: VM_DEAD, VM_FROZEN.
        """
        found = self.get(vm)
        if found.info.state == "frozen":
            raise VM_FROZEN(f"{found.info.label}: {found.info.dead_reason}", state="frozen")
        if found.info.state == "dead":
            raise VM_DEAD(
                f"{found.info.label} is dead: {found.info.dead_reason}", state="dead",
                rule="kvm_vm_dead: every ioctl gives -EIO",
            )  # fmt: skip
        return found

    def of_session(self, session: int) -> list[int]:
        """Return a session's VMs, oldest first."""
        return self._info.grouped(session)

    def all(self) -> list[Vm]:
        """Return every VM, oldest first."""
        return [Vm(self._space, info) for _, info in self._info.items()]
