"""Mistakes planted in the engine, one at a time, for the oracle to see.

Each is a function that patches the engine of this process through ``monkeypatch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from rmemd.engine import convert, fault, frames, lifecycle, memory, migrate, physical, populate
from rmemd.engine.bracket import invalidating
from rmemd.errors import RmemError
from rmemd.hooks.types import Why
from rmemd.model.files import Files
from rmemd.model.ledger import Ledger

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
    real = convert._set_range
    patch.setattr(
        convert, "_set_range", lambda core, vm, at, n, private: real(core, vm, at, n + 1, private)
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
    real = Ledger.hold

    def broken(self: Ledger, tx: Any, entry: Any, pfns: Any) -> None:
        real(self, tx, entry, pfns[:0] if entry.longterm else pfns)

    patch.setattr(Ledger, "hold", broken)


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
        tx.set(file.bindings, (binding.vm, binding.slot), binding)

    patch.setattr(Files, "bind", broken)


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
    )
} | {
    "punch_leaves_the_mirror": _without_unmap(memory, Why.PUNCH),
    "close_leaves_the_mirror": _without_unmap(memory, Why.CLOSE),
    "conversion_leaves_the_mirror": _without_unmap(convert, Why.CONVERT),
    "slot_deletion_leaves_the_mirror": _without_unmap(lifecycle, Why.SLOT),
    "poison_leaves_the_mirror": _without_unmap(physical, Why.POISON),
}
