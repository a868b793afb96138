"""A vendor whose variants can be swapped: one with every op, one without each, and broken ones.

The template with what it lacks added; import the module with plugins/template on the path.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rmemd.errors import NO_SUCH_CONSUMER
from rmemd.hooks import (
    CallAction,
    CallAnswer,
    GuestCall,
    Pin,
    Populated,
    Variant,
    export_tables,
    hookimpl,
    import_tables,
)
from rmemd_template import MAPPED, SCHEMA, TemplateGuest, TemplatePlatform

PAIRS = {"pin": "unpin", "enter": "leave", "export_state": "import_state"}
# a page with such a gfn is never let go once it is pinned
KEPT_GFN = 0x10F


class Full(TemplateGuest):
    """Every op there is."""

    @hookimpl
    def pin(self, tx: Any, runs: Any) -> Pin:
        return Pin("swappable", longterm=True)

    @hookimpl
    def unpin(self, tx: Any, runs: Any) -> Any:
        return np.asarray(runs.gfns() == KEPT_GFN)

    @hookimpl
    def populate(self, tx: Any, runs: Any, kinds: Any, measure: Any, source: Any) -> Populated:
        tx.put(self.owners, runs.pfns(), self.vm)
        tx.put(self.entries, runs.gfns(), MAPPED)
        tx.copy_in(runs.pfns(), self.key, source)
        return Populated(mapped=True)

    @hookimpl
    def finalize(self, tx: Any) -> bytes:
        return b"measured"

    @hookimpl
    def enter(self, tx: Any, vcpu: Any) -> None:
        tx.set(self.facts, ("inside", vcpu), True)

    @hookimpl
    def leave(self, tx: Any, vcpu: Any) -> None:
        tx.drop(self.facts, ("inside", vcpu))

    @hookimpl
    def guest_call(self, tx: Any, vcpu: Any, call: Any, gfns: Any, level: Any) -> CallAnswer:
        return CallAnswer(CallAction.HYPERCALL, to_private=call is GuestCall.UNSHARE)


class RaisesOnExport(Full):
    @hookimpl
    def export_state(self) -> Any:
        raise KeyError("lost")


class RaisesOnImport(Full):
    @hookimpl
    def import_state(self, tx: Any, state: Any) -> None:
        super().import_state(tx, state)
        raise KeyError("lost")


class ExitsOnImport(Full):
    @hookimpl
    def import_state(self, tx: Any, state: Any) -> None:
        raise SystemExit(3)


class AnswersNonsense(Full):
    @hookimpl
    def import_state(self, tx: Any, state: Any) -> Any:
        super().import_state(tx, state)
        return state


class LeavesItUnread(Full):
    @hookimpl
    def import_state(self, tx: Any, state: Any) -> None:
        tx.set(self.facts, "key", dict(state.tables["facts"].items)["key"])


class MakesItUp(Full):
    @hookimpl
    def import_state(self, tx: Any, state: Any) -> None:
        super().import_state(tx, state)
        tx.put(self.entries, np.array([0x999]), MAPPED)


class NamesBytes(Full):
    @hookimpl
    def import_state(self, tx: Any, state: Any) -> None:
        super().import_state(tx, state)
        tx.zero(np.flatnonzero(self.owners.view == self.vm).astype(np.int64), self.key)


class ChangesTheKey(Full):
    @hookimpl
    def import_state(self, tx: Any, state: Any) -> None:
        super().import_state(tx, state)
        tx.use_key(tx.new_key())


class OfAnotherKind(Full):
    @hookimpl
    def export_state(self) -> Any:
        return export_tables("other", 1, self.entries, self.facts)

    @hookimpl
    def import_state(self, tx: Any, state: Any) -> None:
        import_tables(tx, state, "other", 1, self.entries, self.facts)


class OfAnotherVersion(Full):
    @hookimpl
    def import_state(self, tx: Any, state: Any) -> None:
        import_tables(tx, state, SCHEMA[0], 2, self.entries, self.facts)


class PinsOtherwise(Full):
    @hookimpl
    def pin(self, tx: Any, runs: Any) -> Pin:
        return Pin("plainly")


BROKEN = {
    kind.__name__: kind
    for kind in (RaisesOnExport, RaisesOnImport, ExitsOnImport, AnswersNonsense, LeavesItUnread,
                 MakesItUp, NamesBytes, ChangesTheKey, OfAnotherKind, OfAnotherVersion)
}  # fmt: skip
OPTIONAL = ("prepare", "map", "pin", "migrate_folio", "convert", "populate", "finalize", "enter",
            "guest_access", "guest_call", "error", "page_state", "export_state")  # fmt: skip


def without(op: str) -> type[Full]:
    """Return the consumer that has every op but one, and its pair."""
    hidden = dict.fromkeys((op, PAIRS.get(op, op)))
    return type(f"Without_{op}", (Full,), hidden)


GUESTS: dict[str, type[Full]] = {
    "full": Full, "PinsOtherwise": PinsOtherwise, **BROKEN,
    **{f"no-{op}": without(op) for op in OPTIONAL},
}  # fmt: skip


class Platform(TemplatePlatform):
    @hookimpl
    def variants(self) -> Any:
        return [Variant(name, "made for a test") for name in GUESTS]

    @hookimpl
    def make_consumer(self, vm: Any, tx: Any, variant: Any, config: Any) -> object:
        if variant not in GUESTS:
            raise NO_SUCH_CONSUMER(variant)
        guest = GUESTS[variant](vm, self.owners)
        if not vm.importing:
            tx.set(guest.facts, "key", tx.new_key())
            tx.use_key(guest.key)
        return guest
