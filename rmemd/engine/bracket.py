"""The invalidate bracket: start, change, end, on every VM that a range is bound to.

Owns the only calls of invalidate_start and invalidate_end. Both run in the transaction of the
change they enclose, so that every start has its end and a failure undoes both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from rmemd.engine import frames
from rmemd.engine.core import Core
from rmemd.engine.ranges import Ranges
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Runs, Why
from rmemd.model.files import RestrictedFile
from rmemd.model.host import KEPT
from rmemd.model.ledger import Entry
from rmemd.model.spans import Spans
from rmemd.model.vms import Vm
from rmemd.units import I64, Bools

NOTHING = np.empty(0, dtype=np.int64)


class View(Struct, frozen=True):
    """A range of guest frames of one VM; ``zapped`` says whose mappings go, None for all.

    A conversion leaves what has the wanted state already as it is, and a change to one half of a
    file what maps the other (Linux's attr_filter).
    """

    vm: Vm
    gfn: int
    npages: int
    zapped: bool | None = None

    def require_idle(self, ranges: Ranges) -> None:
        """Have the operation wait while any of it is in progress."""
        ranges.require_idle("vm", self.vm.info.vm, self.gfn, self.npages)

    def mapped(self) -> tuple[Runs, Runs]:
        """Return what it maps: (private runs, shared runs)."""
        return self.vm.mapped(self.gfn, self.npages)


class Scattered(View, frozen=True, kw_only=True):
    """Several ranges of guest frames of one VM, ``spans``; gfn..gfn+npages is their extent."""

    spans: Spans

    def require_idle(self, ranges: Ranges) -> None:
        """Have the operation wait while any of it is in progress."""
        if ranges.is_in_progress("vm", self.vm.info.vm, self.gfn, self.npages):
            for start, n in self.spans:
                ranges.require_idle("vm", self.vm.info.vm, start, n)

    def mapped(self) -> tuple[Runs, Runs]:
        """Return what it maps: (private runs, shared runs)."""
        return self.vm.runs_of(self.spans.touched(self.vm.mirror))


def views_of(core: Core, file: RestrictedFile, pgoff: int, npages: int) -> list[View]:
    """Return the guest ranges that a file range is bound to; bindings are stable in between."""
    return [
        View(core.vms.get(binding.vm), binding.gfn + lo - binding.pgoff, n)
        for binding, lo, n in file.bound(pgoff, npages)
    ]


def views_of_half(
    core: Core, file: RestrictedFile, pgoff: int, npages: int, private: bool
) -> list[View]:
    """Return the views of a file range, of which only the mappings of one half go.

    In place one half serves either state, so all of them do. Source: restrictedmem.md §2, flags.
    """
    zapped = None if file.info.in_place else private
    return [replace(view, zapped=zapped) for view in views_of(core, file, pgoff, npages)]


@contextmanager
def in_progress(core: Core, file: RestrictedFile, pgoff: int, npages: int) -> Iterator[None]:
    """Mark a file range, and every guest range it is bound to, while its bytes move."""
    with ExitStack() as stack:
        stack.enter_context(core.ranges.in_progress("file", file.info.file, pgoff, npages))
        for view in views_of(core, file, pgoff, npages):
            vm = view.vm.info.vm
            stack.enter_context(core.ranges.in_progress("vm", vm, view.gfn, view.npages))
        yield


@contextmanager
def invalidating(core: Core, tx: Tx, views: list[View], why: Why) -> Iterator[None]:
    """Unmap the views, let the block change what it will, and end the bracket.

    start(all) runs before the block, end(all) after it. An exception undoes the transaction, ends
    included, so nothing was started either.
    """
    started = [(view, unmap(core, tx, view, why)) for view in views]
    yield
    for view, runs in started:
        core.consumer(view.vm).call(tx, "invalidate_end", runs, why, True)


def unmap(core: Core, tx: Tx, view: View, why: Why) -> Runs:
    """Take what a view maps out of vendor and mirror; return the private runs that it had."""
    view.require_idle(core.ranges)
    private, shared = view.mapped()
    if view.zapped is True:
        shared = Runs.of_pages(NOTHING, NOTHING)
    elif view.zapped is False:
        private = Runs.of_pages(NOTHING, NOTHING)
    consumer = core.consumer(view.vm)
    consumer.call(tx, "invalidate_start", private, why)
    core.ranges.invalidated(view.vm.info.vm)
    view.vm.clear(tx, private)
    view.vm.clear(tx, shared)
    if consumer.ops.unpin is not None and private.total:
        _unpin(core, tx, view.vm, private)
    return private


def pin_entry(vm: Vm, purpose: str, longterm: bool) -> Entry:
    """Return the ledger entry of a consumer's hold on its VM's mapped pages."""
    return Entry(vm.info.label, purpose, longterm)


def pin_entries(core: Core, vm: Vm) -> list[Entry]:
    """Return the entries under which a VM's consumer may hold pages (its pin op names them)."""
    return [e for e in core.ledger.entries_of(vm.info.label) if e.purpose != FAULT]


def held_by_others(core: Core, vm: Vm, pfns: I64) -> Bools:
    """Return which frames are referenced beyond the page cache and the VM's own consumer."""
    refs = core.host.refs.get(pfns).astype(np.int64)
    pins = core.host.pins.get(pfns).astype(np.int64)
    for entry in pin_entries(core, vm):
        held = core.ledger.held(entry, pfns)
        if entry.longterm:
            pins -= held
        else:
            refs -= held
    return (refs > 0) | (pins > 0)


def _unpin(core: Core, tx: Tx, vm: Vm, runs: Runs) -> None:
    kept = np.asarray(core.consumer(vm).call(tx, "unpin", runs), dtype=np.bool_)
    every = runs.pfns()
    flags = core.host.flags.get(every)
    marked = np.where(kept, flags | KEPT, flags & ~KEPT)
    tx.put(core.host.flags, every[marked != flags], marked[marked != flags])
    pfns: I64 = every[~kept]
    for entry in pin_entries(core, vm):
        frames.drop(core, tx, entry, pfns[core.ledger.held(entry, pfns)])


FAULT = "fault"
