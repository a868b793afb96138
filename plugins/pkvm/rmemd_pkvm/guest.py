"""The consumers: a protected guest whose pages are pinned, and one whose pages can move.

Owns the guest's side of the hooks; every state is EL2's (``hypercalls.El2``). The two variants
share all ops but pin/unpin and migrate_folio.
"""

from __future__ import annotations

import errno

import numpy as np

from rmemd.errors import RmemError
from rmemd.hooks import (
    AccessAnswer,
    AccessCode,
    CallAction,
    CallAnswer,
    Content,
    GuestCall,
    HookTx,
    PageStates,
    Pin,
    Runs,
    State,
    VmContext,
    Why,
    export_tables,
    hookimpl,
    import_tables,
)
from rmemd.units import I64, Bools
from rmemd_pkvm.hypercalls import El2, is_valid, refusal
from rmemd_pkvm.reasons import PKVM_GUEST_OWNED, PKVM_MEMSLOT, PKVM_POISONED
from rmemd_pkvm.states import NOPAGE, OWNED, POISON, SHARED_OWNED, STATE_NAMES

SCHEMA = ("pkvm", 1)
SMCCC_SUCCESS, SMCCC_NOT_SUPPORTED, SMCCC_INVALID_PARAMETER = 0, -1, -3
# the EL2 half of each call; MEM_RELINQUISH is the Android common kernel's (ACK)
CALLS = {
    GuestCall.SHARE: "guest_share_host",
    GuestCall.UNSHARE: "guest_unshare_host",
    GuestCall.RELINQUISH: "guest_relinquish_to_host",
}
# by the leaf's state: OWNED, SHARED_OWNED, SHARED_BORROWED, NOPAGE, POISON
ACCESS = np.array(
    [AccessCode.OK, AccessCode.OK, AccessCode.OK, AccessCode.FAULT, AccessCode.EFAULT],
    dtype=np.uint8,
)
POISON_STOP = "-EFAULT: the host took the page back by force, and the guest touched it"


class ProtectedGuest:
    """What every protected guest does.

    Source: Linux arch/arm64/kvm/{mmu,pkvm}.c; pkvm.md §2, §4.
    Differs: memory is encrypted at rest; on hardware it is plaintext behind stage-2. The
    restricted file stands for the VMM's own mapping, so file-backed (-EIO) and absent (-EFAULT)
    pages do not occur. Table memory and its charge are not modelled.
    """

    #: the invalidations on whose behalf the host takes mapped pages by force
    forced: frozenset[Why] = frozenset()

    def __init__(self, vm: VmContext, el2: El2) -> None:
        self.facts = vm.records("facts")
        self._el2 = el2

    @property
    def handle(self) -> int:
        """Return EL2's handle of the VM."""
        handle: int = self.facts["handle"]
        return handle

    @property
    def _key(self) -> int:
        key: int = self.facts["key"]
        return key

    @hookimpl
    def invalidate_start(self, tx: HookTx, runs: Runs, why: Why) -> None:
        """Unmap nothing that the guest owns, except at its end or by force.

        MIGRATE and POISON leave the leaves: EL2's locks are the wall of a move, and a frame that
        the host finds poisoned stays the guest's. CLOSE reclaims. CONVERT and SLOT are refused for
        pages that the guest has, because only the guest may share them and because the memslots of
        a VM that has run are fixed. PUNCH is refused while the pages are pinned; without a pin the
        frame would be freed under the guest, so it is taken by force: its IPA is poisoned.

        Source: pkvm.md §8 rules 13, 16, 19; §2 on pkvm_pgtable_stage2_unmap.
        Differs: where pages are pinned, Linux lets the VMM punch (0): pin and leaf stay, the guest
        goes on with the old frame and the hole takes a new one. One gfn has one frame here, so
        punch says the -EPERM that the unmap call says. Punch without a pin is design: no upstream
        has a file-backed protected guest. CLOSE comes before the VM is marked as dying.
        """
        if why in (Why.MIGRATE, Why.POISON):
            return
        if why is Why.SLOT and self._el2.has_run(self.handle):
            raise refusal(
                PKVM_MEMSLOT, "the VM has run, so its memslots are fixed", -errno.EPERM,
                "", "EL2 VM exists", "pkvm.md §4, memslots",
            )  # fmt: skip
        gfns = runs.gfns()
        states = self._el2.guest_states(self.handle, gfns)
        if why is Why.CLOSE:
            self._el2.host_reclaim_page_guest(tx, self.handle, gfns[states != NOPAGE])
            return
        mapped = gfns[is_valid(states)]
        if why in self.forced:
            self._take_by_force(tx, mapped)
        elif mapped.size:
            raise self._guest_owned(mapped[0], f"{why.value} would unmap it", 19)

    @hookimpl
    def invalidate_end(self, tx: HookTx, runs: Runs, why: Why, ok: bool) -> None:
        """Nothing was blocked."""

    @hookimpl
    def map(self, tx: HookTx, runs: Runs) -> None:
        """Donate the frames: __pkvm_host_donate_guest from the guest's fault.

        A gfn that has this very frame already is a lost race, which KVM counts as done; a poisoned
        one is -EFAULT out of KVM_RUN. A frame that never had the guest's bytes is zeroed under the
        guest's key: what the host wrote earlier carried over when it was converted.

        Source: pkvm.md §1, §3 item 4, §8 rules 1, 2.
        Differs: the engine may fault in ahead of a run, when no vCPU is loaded.
        """
        gfns, pfns = runs.gfns(), runs.pfns()
        poisoned = gfns[self._el2.guest_states(self.handle, gfns) == POISON]
        if poisoned.size:
            raise refusal(
                PKVM_POISONED, f"gfn {int(poisoned[0]):#x}: in_poison_fault", -errno.EFAULT,
                f"gfn {int(poisoned[0]):#x}", "guest POISON", "pkvm.md §8 rule 13",
            )  # fmt: skip
        fresh = self._el2.guest_pfns(self.handle, gfns) != pfns
        self._el2.host_donate_guest(tx, self.handle, pfns[fresh], gfns[fresh], in_fault=True)
        tx.zero(pfns[fresh & (tx.content_keys(pfns) != self._key)], self._key)

    @hookimpl
    def convert(self, tx: HookTx, runs: Runs, to_private: bool) -> Content:
        """Preserve every page; only the guest changes who may reach what it was given.

        A page that was never donated follows the host's wish (the VMM's image arrives this way).
        For one that was, the guest's call comes first and EL2 has done it already: to shared it
        must have shared it, to private it must have ended that.

        Source: pkvm.md §2, §4; restrictedmem.md §1 (v6 cover: must survive).
        """
        gfns = runs.gfns()
        states = self._el2.guest_states(self.handle, gfns)
        bad = gfns[states == (SHARED_OWNED if to_private else OWNED)]
        if bad.size:
            wish = "private" if to_private else "shared"
            raise self._guest_owned(bad[0], f"the host would make it {wish}", 10)
        return Content.PRESERVED

    @hookimpl
    def enter(self, tx: HookTx, vcpu: int) -> None:
        """Load the vCPU: teardown refuses while one is loaded (pkvm.md §8 rule 15)."""
        self._el2.vcpu_load(tx, self.handle, vcpu)

    @hookimpl
    def leave(self, tx: HookTx, vcpu: int) -> None:
        """Put the vCPU."""
        self._el2.vcpu_put(tx, self.handle, vcpu)

    @hookimpl
    def guest_access(self, tx: HookTx, vcpu: int, runs: Runs, write: bool) -> AccessAnswer:
        """Let the guest reach its pages; poison makes KVM_RUN fail with -EFAULT.

        A page that the guest relinquished has no leaf: it faults. Source: pkvm.md §3 item 4.
        """
        codes = ACCESS[self._el2.guest_states(self.handle, runs.gfns())]
        return AccessAnswer(codes, stop=POISON_STOP, status=-errno.EFAULT)

    @hookimpl
    def guest_call(
        self, tx: HookTx, vcpu: int, call: GuestCall, gfns: I64, level: int
    ) -> CallAnswer:
        """Answer MEM_SHARE, MEM_UNSHARE and MEM_RELINQUISH, one granule at a time.

        The pages up to the first that cannot take effect; if that one is the first of all, an
        unmapped page faults and any other failure is INVALID_PARAMETER. A relinquished page that
        is not mapped is a success without effect.

        Source: pkvm.md §4; §8 rule 10; ACK for RELINQUISH and for partial progress.
        Differs: the host keeps its pin on a relinquished page until it is unmapped.
        """
        if call not in CALLS:
            return CallAnswer(CallAction.DONE, 0, SMCCC_NOT_SUPPORTED, "SMCCC_RET_NOT_SUPPORTED")
        pages = self._el2.pages_of(self.handle, gfns)
        verdicts = self._el2.judge(tx, CALLS[call], pages)
        if level:
            verdicts[:] = -errno.EINVAL
        if call is GuestCall.RELINQUISH:
            verdicts[verdicts == -errno.ENOENT] = 0
        bad = np.flatnonzero(verdicts)
        done = int(bad[0]) if bad.size else gfns.size
        failed = int(verdicts[done]) if bad.size else 0
        if failed == -errno.ENOENT and done == 0:
            return CallAnswer(CallAction.FAULT)
        effective = pages.where(np.arange(gfns.size) < done)
        effective = effective.where(effective.pfns >= 0)
        self._el2.apply(tx, CALLS[call], effective)
        status, name = SMCCC_SUCCESS, "SMCCC_RET_SUCCESS"
        if failed not in (0, -errno.ENOENT):
            status, name = SMCCC_INVALID_PARAMETER, "SMCCC_RET_INVALID_PARAMETER"
        if call is GuestCall.RELINQUISH:
            tx.scrub(effective.pfns)
        if call is GuestCall.RELINQUISH or done == 0:
            return CallAnswer(CallAction.DONE, done, status, name)
        to_private = call is GuestCall.UNSHARE
        return CallAnswer(
            CallAction.CONVERT, done, status, name, to_private,
            refused=SMCCC_INVALID_PARAMETER, refused_name="SMCCC_RET_INVALID_PARAMETER",
        )  # fmt: skip

    @hookimpl
    def error(self, tx: HookTx, runs: Runs, consumed: bool) -> str:
        """Live on until the guest consumes the poison; then the VMM gets SIGBUS.

        Source: pkvm.md §8 rule 18 (a signal, KVM_RUN returns 0).
        Differs: a VMM may survive the signal and tell its guest; here the VM is lost.
        """
        return "SIGBUS, BUS_MCEERR_AR: the guest consumed a poisoned page" if consumed else ""

    @hookimpl
    def page_state(self, gfns: I64, pfns: I64) -> PageStates:
        """Name the states of the guest's leaves."""
        states = self._el2.guest_states(self.handle, gfns)
        return PageStates(states.astype(np.uint8), STATE_NAMES)

    @hookimpl
    def export_state(self) -> State:
        """Give handle and key: EL2 has everything else, and keeps it."""
        return export_tables(*SCHEMA, self.facts)

    @hookimpl
    def import_state(self, tx: HookTx, state: State) -> None:
        """Drive the VM that EL2 knows by this handle."""
        import_tables(tx, state, *SCHEMA, self.facts)

    def _take_by_force(self, tx: HookTx, gfns: I64) -> None:
        pfns = self._el2.guest_pfns(self.handle, gfns)
        bad = np.flatnonzero(self._el2.host_force_reclaim_page_guest(tx, pfns))
        if bad.size:
            raise self._guest_owned(gfns[bad[0]], "it cannot be taken by force", 14)
        tx.scrub(pfns)

    def _guest_owned(self, gfn: int, text: str, rule: int) -> RmemError:
        page = f"gfn {int(gfn):#x}"
        return refusal(
            PKVM_GUEST_OWNED, f"{page} is the guest's: {text}", -errno.EPERM,
            page, "guest OWNED", f"pkvm.md §8 rule {rule}",
        )  # fmt: skip


class PinnedGuest(ProtectedGuest):
    """pKVM as merged: a long-term pin keeps each page, and nothing can move it.

    Source: pkvm.md §2 "Today", §7 column (d).
    """

    @hookimpl
    def pin(self, tx: HookTx, runs: Runs) -> Pin:
        """Hold a long-term write pin (FOLL_LONGTERM) while a page is mapped."""
        return Pin("protected guest", longterm=True)

    @hookimpl
    def unpin(self, tx: HookTx, runs: Runs) -> Bools:
        """Keep the pin of each page that EL2 still has a leaf, or poison, for.

        The host drops a pin together with its mapping record, which only reclaim removes.
        """
        states = self._el2.guest_states(self.handle, runs.gfns())
        return np.asarray(states != NOPAGE)


class MovableGuest(ProtectedGuest):
    """A guest of a restricted file: no pin, and EL2 moves pages.

    Source: pkvm.md §2 "guest_memfd variant", §7 column (b), §8 rule 23.
    Differs: design, no upstream has the move; the 2024 RFC has the file without a lasting
    reference.
    """

    forced = frozenset({Why.PUNCH})

    @hookimpl
    def migrate_folio(self, tx: HookTx, gfns: I64, src: I64, dst: I64) -> None:
        """Move pages at EL2; those that the guest never had are only copied."""
        held = self._el2.guest_pfns(self.handle, gfns) == src
        keyed = tx.content_keys(src) == self._key
        tx.relocate(src[keyed], dst[keyed], self._key)
        tx.relocate(src[~keyed], dst[~keyed], 0)
        self._el2.host_move_guest(tx, self.handle, gfns[held], dst[held])
