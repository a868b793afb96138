"""The TDX consumer: what KVM does with the module's leaves, hook by hook.

Owns KVM's sequences and its reactions to failure. ``TdxConsumer`` has every hook that the variants
share; below it, each variant adds only its answer to "who keeps a page from moving?".

Source: Linux arch/x86/kvm/vmx/tdx.c, 6.16 (tdx.md §4, restrictedmem.md §1, pkvm.md §7).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from rmemd.errors import (
    BAD_REQUEST,
    NO_SUCH_VCPU,
    NOT_FINALIZED,
    NOT_PAUSED,
    SWAP_UNSAFE,
    VM_DEAD,
    RmemError,
)
from rmemd.hooks import (
    AccessAnswer,
    AccessCode,
    CallAction,
    CallAnswer,
    Content,
    GuestCall,
    GuestException,
    HookTx,
    PageKind,
    PageStates,
    Pin,
    Populated,
    Records,
    Runs,
    Sparse,
    State,
    Why,
    export_tables,
    hookimpl,
    import_tables,
)
from rmemd.units import I64, U8, Bools
from rmemd_tdx import leaves, measurement
from rmemd_tdx import tables as t
from rmemd_tdx.leaves import Td

T = TypeVar("T")
SCHEMA = ("tdx", 1)
EXIT_REASON_EPT_VIOLATION = 48
LOST = "TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE"


class TdxConsumer:
    """A TD as KVM drives it; which hooks are NULL depends on the subclass."""

    def __init__(self, td: Td, attributes: Mapping[str, int]) -> None:
        self.td = td
        #: the TD's attributes as its configuration wants them
        self.attributes = attributes

    # --- zap ------------------------------------------------------------------------------------
    @hookimpl
    def invalidate_start(self, tx: HookTx, runs: Runs, why: Why) -> None:
        """BLOCK, TRACK, kick; then, unless the pages only move, REMOVE, WBINVD and page reset.

        A zap cannot be refused: when a SEAMCALL fails, the VM is bugged and the pages stay where
        they are. Blocking for a move can: the page then stays mapped.
        Source: tdx_sept_remove_private_spte (tdx.md §4, §9 rules 10-14, 24).
        Differs: after a failed TRACK, KVM goes on to a REMOVE that must fail; here it stops.
        """
        gfns = runs.gfns()
        if not gfns.size:
            return
        if why is Why.MIGRATE:
            self._block(tx, gfns)
            return
        try:
            self._block(tx, gfns)
            pfns = self._retry_once(tx, lambda: leaves.remove(tx, self.td, gfns))
            leaves.wbinvd(tx, self.td, pfns)
        except RmemError as refusal:
            self._bug(tx, refusal)
            return
        leaves.reset(tx, self.td.pamt, pfns)

    @hookimpl
    def invalidate_end(self, tx: HookTx, runs: Runs, why: Why, ok: bool) -> None:
        """Unblock what was blocked for a move that did not happen; RELOCATE unblocks the rest."""
        if why is not Why.MIGRATE or ok:
            return
        gfns = runs.gfns()
        gfns = gfns[t.ANY_BLOCKED[self.td.sept.get(gfns)]]
        try:
            self._retry_once(tx, lambda: leaves.unblock(tx, self.td, gfns))
        except RmemError as refusal:
            self._bug(tx, refusal)

    def _block(self, tx: HookTx, gfns: I64) -> None:
        self._retry_once(tx, lambda: leaves.block(tx, self.td, gfns))
        if self._runnable:
            # before FINALIZE no vCPU has run, and KVM does not track either
            self._retry_once(tx, lambda: leaves.track(tx, self.td))
            tx.kick()

    def _retry_once(self, tx: HookTx, leaf: Callable[[], T]) -> T:
        """On contention have all vCPUs leave and try once more, which KVM expects to succeed."""
        try:
            return leaf()
        except RmemError as refusal:
            if refusal.reason is not t.REASONS["TDX_OPERAND_BUSY"]:
                raise
        tx.kick()
        return leaf()

    def _bug(self, tx: HookTx, refusal: RmemError) -> None:
        """KVM_BUG_ON: the VM can only be destroyed. Our own mistakes are not the TD's."""
        if not refusal.details.vendor_status:
            raise refusal
        tx.set(self.td.fields, "BUGGED", 1)
        tx.kill(f"bugged by a failed SEAMCALL: {refusal.details.vendor_status}")

    # --- map and launch -------------------------------------------------------------------------
    @property
    def _runnable(self) -> bool:
        return bool(self.td.fields["OP_STATE"] == "RUNNABLE")

    def _refuse_if_dead(self) -> None:
        if self.td.fields["BUGGED"]:
            raise VM_DEAD(f"vm/{self.td.vm} was bugged by a failed SEAMCALL or an unaccepted page")

    @hookimpl
    def map(self, tx: HookTx, runs: Runs) -> None:
        """MEM.PAGE.AUG: the guest finds the pages pending. A busy one is a fault to retry.

        Before FINALIZE only population maps, and prefault is not supported (EOPNOTSUPP).
        Source: tdx_sept_set_private_spte; kvm_arch_vcpu_pre_fault_memory (tdx.md §4).
        Differs: KVM bugs the VM when AUG fails for another reason; a refusal cannot say so here.
        """
        self._refuse_if_dead()
        if not self._runnable:
            raise NOT_FINALIZED(
                f"vm/{self.td.vm}: pages are mapped by faults only once it is finalized",
                errno=errno.EOPNOTSUPP,
                state=self.td.fields["OP_STATE"],
                rule="tdx.md §4",
            )
        leaves.aug(tx, self.td, runs.gfns(), runs.pfns())

    @hookimpl
    def populate(self, tx: HookTx, runs: Runs, kinds: U8, measure: bool, source: U8) -> Populated:
        """KVM_TDX_INIT_MEM_REGION: per page ADD and, if it is measured, 16 EXTENDs.

        Source: tdx_gmem_post_populate; the order is that of current KVM (tdx.md §4, §8).
        Differs: all or nothing where KVM keeps the pages before the one that failed.
        """
        self._refuse_if_dead()
        if self._runnable:
            raise NOT_PAUSED(f"vm/{self.td.vm} was finalized", state="RUNNABLE", rule="tdx.md §4")
        if tx.vcpu_count == 0:
            raise NO_SUCH_VCPU("KVM_TDX_INIT_MEM_REGION is a vCPU ioctl, and there is no vCPU")
        if (kinds != PageKind.NORMAL).any():
            raise BAD_REQUEST("TDX knows NORMAL initial pages only", field="kind")
        gfns, pfns = runs.gfns(), runs.pfns()
        leaves.add(tx, self.td, gfns, pfns)
        if measure:
            leaves.extend(tx, self.td, measurement.chunk_gpas(gfns))
        measurement.measure(tx, self.td, gfns, source if measure else None)
        tx.copy_in(pfns, self.td.fields["KEY"], source)
        return Populated(mapped=True)

    @hookimpl
    def finalize(self, tx: HookTx) -> bytes:
        """KVM_TDX_FINALIZE_VM: MR.FINALIZE, and MRTD is final."""
        self._refuse_if_dead()
        if self._runnable:
            raise NOT_PAUSED(f"vm/{self.td.vm} was finalized", state="RUNNABLE", rule="tdx.md §4")
        return leaves.finalize(tx, self.td)

    # --- the guest runs -------------------------------------------------------------------------
    @hookimpl
    def enter(self, tx: HookTx, vcpu: int) -> None:
        """VP.ENTER; KVM refuses to run a TD that is not finalized (-EINVAL)."""
        self._refuse_if_dead()
        if not self._runnable:
            state = self.td.fields["OP_STATE"]
            raise NOT_FINALIZED(f"vm/{self.td.vm} is {state}", state=state, rule="tdx.md §4")
        leaves.vp_enter(tx, self.td, vcpu)

    @hookimpl
    def leave(self, tx: HookTx, vcpu: int) -> None:
        """TD exit."""
        leaves.td_exit(tx, self.td, vcpu)

    @hookimpl
    def guest_access(self, tx: HookTx, vcpu: int, runs: Runs, write: bool) -> AccessAnswer:
        """Pending pages give #VE or, with sept_ve_disable, end the VM; others not there fault.

        Source: td_ept_violation.c; tdx_handle_ept_violation (tdx.md §3, §9 rule 7).
        """
        states = self.td.sept.get(runs.gfns())
        disabled = self.td.fields["SEPT_VE_DISABLE"]
        pending = AccessCode.STOP if disabled else AccessCode.EXCEPTION
        allowed = (t.WRITABLE if write else t.READABLE)[states]
        codes = np.full(states.size, AccessCode.FAULT, dtype=np.uint8)
        codes[t.ACCEPTABLE[states]] = pending
        codes[allowed] = AccessCode.OK
        text = "EPT violation on a page that the guest has not accepted"
        if not disabled:
            return AccessAnswer(codes, GuestException("#VE", EXIT_REASON_EPT_VIOLATION, text))
        # the pages before it are executed first, and then the engine asks again
        if codes[:1] == AccessCode.STOP:
            tx.set(self.td.fields, "BUGGED", 1)
        return AccessAnswer(codes, stop=f"-EIO, the VM is dead: {text}")

    @hookimpl
    def guest_call(
        self, tx: HookTx, vcpu: int, call: GuestCall, gfns: I64, level: int
    ) -> CallAnswer:
        """TDG.MEM.PAGE.ACCEPT and MapGPA; a TDCALL that TDX does not have is OPERAND_INVALID|RAX.

        Differs: MapGPA is one exit for its range; KVM makes one per 2 MiB of it. A run of ACCEPTs
        stops at the first that fails, as Linux guests do.
        """
        if call in (GuestCall.SHARE, GuestCall.UNSHARE):
            return CallAnswer(CallAction.HYPERCALL, to_private=call is GuestCall.UNSHARE)
        if call is not GuestCall.ACCEPT:
            return self._answer(leaves.Accepted(0, "TDX_OPERAND_INVALID|RAX"))
        return self._answer(leaves.accept(tx, self.td, gfns, level))

    def _answer(self, accepted: leaves.Accepted) -> CallAnswer:
        if accepted.td_exit:
            return CallAnswer(CallAction.FAULT, accepted.done)
        name, _, level = accepted.status.partition("|")
        # ACCEPT puts a SEPT level where every other status has an operand id
        value = t.STATUS[name] | int(level) if level.isdigit() else t.value_of(accepted.status)
        return CallAnswer(CallAction.DONE, accepted.done, value, accepted.status)

    # --- conversion and errors --------------------------------------------------------------------
    @hookimpl
    def convert(self, tx: HookTx, runs: Runs, to_private: bool) -> Content:
        """Shared pages were reset by the zap; private ones hold nothing until they are accepted.

        Differs: a page that the TD never had is zeroed with the others. A page that could not be
        removed (the VM is bugged) has no content that anyone could vouch for.
        """
        if to_private or self.td.pamt.unreturnable(runs.pfns()).any():
            return Content.DESTROYED
        return Content.ZERO

    @hookimpl
    def error(self, tx: HookTx, runs: Runs, consumed: bool) -> str:
        """Poison that the guest reads is a #MC inside the TD: FATAL; found otherwise, it lives on.

        Source: td_other_exits.c (tdx.md §6, §9 rules 18, 19).
        """
        if not consumed:
            return ""
        tx.set(self.td.fields, "FATAL", 1)
        return f"{LOST} ({t.STATUS[LOST]:#018x}): #MC inside the TD"

    @hookimpl
    def page_state(self, gfns: I64, pfns: I64) -> PageStates:
        """Name the pages' SEPT states."""
        return PageStates(self.td.sept.get(gfns), t.STATES)

    # --- the consumer changes -------------------------------------------------------------------
    @hookimpl
    def export_state(self) -> State:
        """Give the TD's fields and its secure EPT; the PAMT and the KOT are the host's, and stay.

        Differs: on hardware the module holds all of this, and KVM's half is next to nothing.
        """
        return export_tables(*SCHEMA, *self._tables)

    @hookimpl
    def import_state(self, tx: HookTx, state: State) -> None:
        """Drive a TD that is there: its HKID, key and attributes are what TDH.MNG.INIT made them.

        Attributes are measured and reported, so they cannot follow a new configuration; and a
        measurement that is under way can only go on in the process's memory that it began in.
        """
        td = self.td
        import_tables(tx, state, *SCHEMA, *self._tables)
        for name, wanted in self.attributes.items():
            if td.fields[name] != wanted:
                raise SWAP_UNSAFE(
                    f"{name} of vm/{td.vm} was fixed when it was made",
                    state=f"{name}={td.fields[name]}", rule="tdx.md §1: TD_PARAMS.ATTRIBUTES",
                )  # fmt: skip
        if not self._runnable and td.fields["MRTD"] not in td.streams:
            raise t.MEASUREMENT_LOST(f"vm/{td.vm} is being measured", state="INITIALIZED")

    @hookimpl
    def resume(self, read: Callable[[I64], U8]) -> str:
        """Take up the measurement of a TD that is being built; all else is in the tables."""
        return measurement.resume(self.td, read)

    @property
    def _tables(self) -> tuple[Sparse | Records, ...]:
        td = self.td
        return td.fields, td.inside, td.sept, td.hpa, td.order


class TdxToday(TdxConsumer):
    """Linux from 6.19: no reference, no migration; the store keeps the page where it is."""


class Tdx2022(TdxConsumer):
    """TDX as posted in 2022, and Linux 6.16 to 6.18: its own reference while mapped."""

    @hookimpl
    def pin(self, tx: HookTx, runs: Runs) -> Pin:
        """get_page() at map: one plain reference."""
        return Pin("secure EPT")

    @hookimpl
    def unpin(self, tx: HookTx, runs: Runs) -> Bools:
        """put_page() after REMOVE, WBINVD and reset; where one of them failed, never."""
        return self.td.pamt.unreturnable(runs.pfns())


class TdxRelocate(TdxConsumer):
    """The hook that Linux never built: the architecture can move a page, so migration is on."""

    @hookimpl
    def migrate_folio(self, tx: HookTx, gfns: I64, src: I64, dst: I64) -> None:
        """RELOCATE what the TD has (blocked and tracked already), then reset the old pages.

        Source: tdx.md §5, from api/tdh_mem_page_relocate.c; Linux has no caller (I).
        """
        held = self.td.sept.get(gfns) != t.FREE
        tx.relocate(src[~held], dst[~held], 0)
        mine, there = gfns[held], dst[held]
        old = self._retry_once(tx, lambda: leaves.relocate(tx, self.td, mine, there))
        leaves.wbinvd(tx, self.td, old)
        leaves.reset(tx, self.td.pamt, old)
