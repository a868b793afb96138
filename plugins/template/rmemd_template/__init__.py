"""The plugin to copy: a small vendor whose guests have private memory that can move.

It keeps three tables. ``entries``, by gfn, is one VM's page table: none, mapped or blocked;
``facts`` are its records. ``owners``, by pfn, is the whole host's: which VM has the frame. Every
hook below reads them, checks first, and writes through ``tx``; the engine undoes what a hook wrote
if anybody refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rmemd.errors import NO_SUCH_CONSUMER, Kind, Reason
from rmemd.hooks import (
    AccessAnswer,
    AccessCode,
    Content,
    Dense,
    HookTx,
    HostContext,
    PageStates,
    Runs,
    State,
    Variant,
    VmContext,
    Why,
    export_tables,
    hookimpl,
    import_tables,
)
from rmemd.units import I64, Bools

VARIANT = "template"
# of the state that a swap carries over: raise it when a table changes its meaning
SCHEMA = ("template", 1)
# entry states; the order is that of STATES, so that a state is its own index
NONE, MAPPED, BLOCKED = 0, 1, 2
STATES = ("none", "mapped", "blocked")
# what a guest's access finds, by state: a table of data instead of a chain of ifs
VERDICTS = np.array([AccessCode.FAULT, AccessCode.OK, AccessCode.FAULT], dtype=np.uint8)
# every way to decline has a name, a kind, an errno, a cause and a remedy
FRAME_TAKEN = Reason(
    "TEMPLATE_FRAME_TAKEN", Kind.REFUSED, 16,
    "The frame belongs to another guest.", "Give a frame that is free.",
)  # fmt: skip


class TemplateGuest:
    """One VM's consumer. What it implements is what it supports; what is absent is NULL."""

    def __init__(self, vm: VmContext, owners: Dense) -> None:
        # state belongs in tables, or the engine can neither undo it nor carry it over
        self.vm, self.owners = vm.vm, owners
        self.entries, self.facts = vm.sparse("entries"), vm.records("facts")

    @property
    def key(self) -> int:
        """Return the guest's memory key."""
        key: int = self.facts["key"]
        return key

    # --- the mandatory pair: every change of a mapping happens between these two ----------------
    @hookimpl
    def invalidate_start(self, tx: HookTx, runs: Runs, why: Why) -> None:
        """Unmap: from here on the guest reaches none of these pages."""
        if why is Why.MIGRATE:
            # only block: migrate_folio comes next and needs the entry
            tx.put(self.entries, runs.gfns(), BLOCKED)
        else:
            tx.put(self.entries, runs.gfns(), NONE)
        # vCPUs may have the old entry in their TLBs: they leave the guest
        tx.kick()

    @hookimpl
    def invalidate_end(self, tx: HookTx, runs: Runs, why: Why, ok: bool) -> None:
        """Unblock what was to move, whether it did (``ok``) or stays where it was."""
        if why is Why.MIGRATE:
            tx.put(self.entries, runs.gfns(), MAPPED)

    # --- a page comes in --------------------------------------------------------------------------
    @hookimpl
    def prepare(self, tx: HookTx, runs: Runs) -> None:
        """Take the frames for this VM; check all of them before writing any."""
        pfns = runs.pfns()
        taken = pfns[~np.isin(self.owners.get(pfns), (0, self.vm))]
        if taken.size:
            raise FRAME_TAKEN("the frame is taken", page=f"pfn {int(taken[0]):#x}")
        # a frame that is new to the guest must not show what anybody else left in it
        fresh = pfns[tx.content_keys(pfns) != self.key]
        tx.zero(fresh, self.key)
        tx.put(self.owners, pfns, self.vm)

    @hookimpl
    def map(self, tx: HookTx, runs: Runs) -> None:
        """Enter the pages in the guest's table."""
        tx.put(self.entries, runs.gfns(), MAPPED)

    @hookimpl
    def guest_access(self, tx: HookTx, vcpu: int, runs: Runs, write: bool) -> AccessAnswer:
        """Judge page by page; FAULT has the engine fault the page in again."""
        return AccessAnswer(VERDICTS[self.entries.get(runs.gfns())])

    # --- a page changes ---------------------------------------------------------------------------
    @hookimpl
    def migrate_folio(self, tx: HookTx, gfns: I64, src: I64, dst: I64) -> None:
        """Move pages. Without this hook they are unmovable: the store cannot copy them.

        Bytes are encrypted for their frame, so only ``relocate`` moves them, under the key that
        they are under. Some pages were never this guest's: those are moved under no key.
        """
        keyed = tx.content_keys(src) == self.key
        tx.relocate(src[keyed], dst[keyed], self.key)
        tx.relocate(src[~keyed], dst[~keyed], 0)
        # the books follow the bytes; the entry follows in invalidate_end
        tx.put(self.owners, dst, self.owners.get(src))
        tx.put(self.owners, src, 0)

    @hookimpl
    def convert(self, tx: HookTx, runs: Runs, to_private: bool) -> Content:
        """In place: the frame stays and changes hands, and neither side sees the other's bytes."""
        tx.put(self.owners, runs.pfns(), self.vm if to_private else 0)
        return Content.ZERO

    @hookimpl
    def error(self, tx: HookTx, runs: Runs, consumed: bool) -> str:
        """Live on while the guest has not read the poison; then say why the VM is lost."""
        return "the guest read poisoned memory" if consumed else ""

    @hookimpl
    def page_state(self, gfns: I64, pfns: I64) -> PageStates:
        """Name the states for page maps and refusals; this hook only reads."""
        return PageStates(self.entries.get(gfns), STATES)

    # --- the consumer changes -------------------------------------------------------------------
    @hookimpl
    def export_state(self) -> State:
        """Give all tables of this guest to the object that takes over (a swap, a reload)."""
        return export_tables(*SCHEMA, self.entries, self.facts)

    @hookimpl
    def import_state(self, tx: HookTx, state: State) -> None:
        """Take them; a state of another schema is refused."""
        import_tables(tx, state, *SCHEMA, self.entries, self.facts)


class TemplatePlatform:
    """What there is once per host: the owners of frames, and the maker of consumers."""

    owners: Dense

    @hookimpl
    def variants(self) -> Sequence[Variant]:
        """Name the kinds of VM that ``make_consumer`` takes."""
        return [Variant(VARIANT, "the plugin to copy: private memory that can move")]

    @hookimpl
    def start(self, host: HostContext) -> None:
        """Create the host's tables, here and nowhere else."""
        self.owners = host.dense("owners", "u4")

    @hookimpl
    def make_consumer(
        self, vm: VmContext, tx: HookTx, variant: str, config: Mapping[str, str]
    ) -> object:
        """Make a guest with a memory key of its own, unless it brings the one that it has."""
        if variant != VARIANT:
            raise NO_SUCH_CONSUMER(f"template has no variant {variant!r}")
        guest = TemplateGuest(vm, self.owners)
        if not vm.importing:
            tx.set(guest.facts, "key", tx.new_key())
            tx.use_key(guest.key)
        return guest

    @hookimpl
    def destroy_consumer(self, tx: HookTx, consumer: object) -> None:
        """Have no key slot to give back: ``free`` hears of each frame, the VM's tables just go."""

    @hookimpl
    def free(self, tx: HookTx, pfns: I64) -> Bools:
        """Reclaim frames that go back to the host; True would leak one for ever."""
        tx.put(self.owners, pfns, 0)
        return np.zeros(pfns.size, dtype=np.bool_)
