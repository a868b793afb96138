"""Which op a VM cannot lose while it lives, and because of what.

Owns ``NEEDS``: op by op, what in the state relies on it. An op that is not in the table (enter and
leave, page_state, migrate_folio) can be lost at any time: vCPUs are out while a consumer is
swapped, and a folio that cannot move any more is only reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from rmemd.engine.bracket import pin_entries
from rmemd.engine.core import Core
from rmemd.hooks.state import SparseState, TableState
from rmemd.model.files import FLAG_ANONYMOUS, PRIVATE, RestrictedFile
from rmemd.model.vms import Vcpu, Vm
from rmemd.units import I64, MAX_GFN

Need = Callable[[Core, Vm, Mapping[str, TableState]], str]


def needed(op: str, core: Core, vm: Vm, held: Mapping[str, TableState]) -> str:
    """Return which live state of a VM relies on an op, "" for none.

    ``held`` is what the consumer's own tables hold, by their full names.
    """
    need = NEEDS.get(op)
    return "" if need is None else need(core, vm, held)


def files_of(core: Core, vm: Vm) -> list[RestrictedFile]:
    """Return the files that were made for a VM, ordinary slots' memory included."""
    return [file for file in core.files.all() if file.info.vm == vm.info.vm]


def strays(core: Core, vm: Vm) -> I64:
    """Return the frames that the VM's consumer holds and that are not mapped as private pages."""
    private, _ = vm.mapped(0, MAX_GFN)
    frames = core.ledger.frames(vm.info.label)
    held = np.zeros(frames.size, dtype=np.bool_)
    for entry in pin_entries(core, vm):
        held |= core.ledger.held(entry, frames)
    left: I64 = frames[held & ~np.isin(frames, private.pfns())]
    return left


def _mapped(core: Core, vm: Vm, held: Mapping[str, TableState]) -> str:
    private, _ = vm.mapped(0, MAX_GFN)
    return f"{private.total} private pages are mapped" if private.total else ""


def _entries(core: Core, vm: Vm, held: Mapping[str, TableState]) -> str:
    for name, table in held.items():
        if isinstance(table, SparseState) and table.indices.size:
            return f"{name} has {table.indices.size} entries"
    return _mapped(core, vm, held)


def _private_in_place(core: Core, vm: Vm, held: Mapping[str, TableState]) -> str:
    if not vm.info.in_place:
        return ""
    for file in files_of(core, vm):
        if file.info.flags & FLAG_ANONYMOUS:
            continue
        present = file.frames.touched(0, file.info.size_pages)
        private = int((file.attributes.get(present) == PRIVATE).sum())
        if private:
            return f"{private} pages of file/{file.info.file} are private, and converted in place"
    return ""


def _building(core: Core, vm: Vm, held: Mapping[str, TableState]) -> str:
    return f"{vm.info.label} is not finalized" if vm.info.state == "building" else ""


def _waiting(core: Core, vm: Vm, held: Mapping[str, TableState]) -> str:
    for index, vcpu in vm.vcpus.items():
        if isinstance(vcpu, Vcpu) and vcpu.waiting:
            return f"vCPU {index} waits for the answer to its call"
    return ""


def _poisoned(core: Core, vm: Vm, held: Mapping[str, TableState]) -> str:
    for file in files_of(core, vm):
        present = file.frames.touched(0, file.info.size_pages)
        pfns = np.asarray(file.frames.get(present), dtype=np.int64) - 1
        bad = pfns[core.host.poisoned(pfns)]
        if bad.size:
            return f"pfn {int(bad[0]):#x} of file/{file.info.file} is poisoned"
    return ""


NEEDS: Mapping[str, Need] = {
    "prepare": _entries,
    "map": _entries,
    "convert": _private_in_place,
    "populate": _building,
    "finalize": _building,
    "guest_access": _mapped,
    "guest_call": _waiting,
    "error": _poisoned,
}
