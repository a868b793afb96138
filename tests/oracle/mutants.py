"""Mistakes planted in the engine, one at a time, for the oracle to see.

Each is a function that patches the engine of this process through ``monkeypatch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from rmemd.engine import (
    attributes,
    compact,
    convert,
    fault,
    frames,
    guestcall,
    guestmemory,
    lifecycle,
    memory,
    migrate,
    physical,
    populate,
    swap,
    userfault,
    userfaultops,
)
from rmemd.engine.bracket import invalidating
from rmemd.errors import RmemError
from rmemd.hooks.types import Why
from rmemd.model.files import Files
from rmemd.model.host import Use
from rmemd.model.ledger import Ledger
from rmemd.model.spans import Spans
from rmemd.store.controller import MemoryController
from rmemd.store.memfd import Memfd

Plant = Callable[[pytest.MonkeyPatch], None]


def _without_unmap(module: Any, why: Why) -> Plant:
    """Have a module's brackets for one reason unmap nothing."""

    @contextmanager
    def broken(core: Any, tx: Any, views: Any, reason: Why) -> Iterator[None]:
        with invalidating(core, tx, [] if reason is why else views, reason):
            yield

    return lambda patch: patch.setattr(module, "invalidating", broken)


def conversion_ignores_holders(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(convert, "_require_unreferenced", lambda *args: None)


def conversion_names_another_offset(patch: pytest.MonkeyPatch) -> None:
    real = convert._require_unreferenced

    def broken(*args: Any) -> None:
        try:
            real(*args)
        except RmemError as refusal:
            at = refusal.details.error_offset or 0
            raise refusal.with_details(error_offset=at + 4096) from None

    patch.setattr(convert, "_require_unreferenced", broken)


def attribute_fill_is_a_page_too_long(patch: pytest.MonkeyPatch) -> None:
    real = Spans.write
    patch.setattr(
        Spans, "write", lambda spans, *args: real(Spans(spans.starts, spans.counts + 1), *args)
    )


def pre_fault_goes_past_the_slot(patch: pytest.MonkeyPatch) -> None:
    real = populate.slot_range
    patch.setattr(populate, "slot_range", lambda vm, gfn, n: (real(vm, gfn, n)[0], n))


def migration_moves_busy_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(migrate, "_busy", lambda core, file, src: np.zeros(src.size, dtype=np.bool_))


def migration_does_without_a_hook(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(migrate, "governed", lambda core, file, pfns: np.zeros(pfns.size, dtype=np.bool_))


def migration_keeps_the_old_entries(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(migrate, "_unblock", lambda *args: None)


def close_keeps_the_shared_frames(patch: pytest.MonkeyPatch) -> None:
    real = frames.remove

    def broken(core: Any, tx: Any, file: Any, pgoffs: Any, private: bool) -> Any:
        return real(core, tx, file, pgoffs if private else pgoffs[:0], private)

    patch.setattr(frames, "remove", broken)


def a_pin_is_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "hold_pin", lambda self, tx, pin, pfns: self._sessions.add_pin(tx, pin))


def allocate_counts_one_more(patch: pytest.MonkeyPatch) -> None:
    real = memory._allocate

    def broken(*args: Any) -> Any:
        return (yield from real(*args)) + 1

    patch.setattr(memory, "_allocate", broken)


def a_fault_keeps_its_reference(patch: pytest.MonkeyPatch) -> None:
    real = frames.drop

    def broken(core: Any, tx: Any, entry: Any, pfns: Any) -> None:
        real(core, tx, entry, pfns[:0] if entry.purpose == fault.FAULT else pfns)

    patch.setattr(frames, "drop", broken)


def held_pages_are_freed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(frames, "referenced", lambda core, pfns: np.zeros(pfns.size, dtype=np.bool_))


def the_last_reference_frees_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(frames, "free_orphans", lambda core, tx, pfns: None)


def poison_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(frames, "refuse_poisoned", lambda file, pgoffs, pfns: None)


def bindings_may_overlap(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Files, tx: Any, file: Any, binding: Any, overlap_errno: int) -> None:
        tx.set(self.bindings(tx, file), (binding.vm, binding.slot), binding)

    patch.setattr(Files, "bind", broken)


def conversion_drops_the_bytes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(convert, "_to_shared", lambda *args: None)


def punched_bytes_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Memfd, "punch", lambda self, numbers: None)


def relocation_moves_no_bytes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryController, "_relocate", lambda self, src, dst, key: [])


def shared_bytes_are_a_byte_off(patch: pytest.MonkeyPatch) -> None:
    real = Memfd.write_bytes
    patch.setattr(Memfd, "write_bytes", lambda self, at, data: real(self, at, data[:1] + data[:-1]))


def a_dead_session_keeps_its_pages(patch: pytest.MonkeyPatch) -> None:
    real = Ledger.forget

    def broken(self: Ledger, tx: Any, holder: str) -> Any:
        return self.frames(holder) if holder.startswith("session") else real(self, tx, holder)

    patch.setattr(Ledger, "forget", broken)


def faults_do_not_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(userfault, "missing", lambda core, file, pgoffs, private: pgoffs[:0])


def a_handler_fills_what_is_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        userfaultops, "_holes_in_front", lambda core, file, session, pgoff, npages: (npages, None)
    )


def a_dead_session_keeps_its_handlers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(userfaultops, "release", lambda core, tx, session: 0)


def policies_are_ignored(patch: pytest.MonkeyPatch) -> None:
    def broken(core: Any, file: Any, pgoffs: Any) -> Any:
        return [(np.ones(pgoffs.size, dtype=np.bool_), tuple(n.node for n in core.host.nodes))]

    patch.setattr(frames, "_by_policy", broken)


def offline_frames_stay_in_use(patch: pytest.MonkeyPatch) -> None:
    def broken(core: Any, pfns: Any) -> Any:
        yield from ()
        return int((core.host.use.get(pfns) == Use.FREE).sum())

    patch.setattr(compact, "_take_free", broken)


def a_swap_keeps_the_old_pins(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(swap, "_rehold", lambda *args: (0, 0))


def initial_pages_are_not_mapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(populate, "map_now", lambda *args: None)


def an_exit_names_the_first_page(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guestmemory, "is_one_pages", lambda refusal: False)


def a_call_asks_for_the_other_state(patch: pytest.MonkeyPatch) -> None:
    real = guestcall._called
    patch.setattr(
        guestcall, "_called", lambda answer: real(replace(answer, to_private=not answer.to_private))
    )


MUTANTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        conversion_ignores_holders,
        conversion_names_another_offset,
        attribute_fill_is_a_page_too_long,
        pre_fault_goes_past_the_slot,
        migration_moves_busy_pages,
        migration_does_without_a_hook,
        migration_keeps_the_old_entries,
        close_keeps_the_shared_frames,
        a_pin_is_not_counted,
        allocate_counts_one_more,
        a_fault_keeps_its_reference,
        held_pages_are_freed,
        the_last_reference_frees_nothing,
        poison_is_forgotten,
        bindings_may_overlap,
        conversion_drops_the_bytes,
        punched_bytes_stay,
        relocation_moves_no_bytes,
        shared_bytes_are_a_byte_off,
        a_dead_session_keeps_its_pages,
        faults_do_not_wait,
        a_handler_fills_what_is_there,
        a_dead_session_keeps_its_handlers,
        policies_are_ignored,
        offline_frames_stay_in_use,
        a_swap_keeps_the_old_pins,
        initial_pages_are_not_mapped,
        an_exit_names_the_first_page,
        a_call_asks_for_the_other_state,
    )
} | {
    "punch_leaves_the_mirror": _without_unmap(memory, Why.PUNCH),
    "close_leaves_the_mirror": _without_unmap(memory, Why.CLOSE),
    "conversion_leaves_the_mirror": _without_unmap(convert, Why.CONVERT),
    "attributes_leave_the_mirror": _without_unmap(attributes, Why.CONVERT),
    "slot_deletion_leaves_the_mirror": _without_unmap(lifecycle, Why.SLOT),
    "poison_leaves_the_mirror": _without_unmap(physical, Why.POISON),
}
