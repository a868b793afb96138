"""A VM's notifier ops: what KVM does with the RMP and the firmware at each event.

Owns the VM's nested page table (gfn to pfn of what is mapped, because PVALIDATE names only guest
pages) and its VMSA pages. ``SnpConsumer`` has everything but migrate_folio;
``SnpMovableConsumer`` adds it and nothing else.
"""

from __future__ import annotations

import numpy as np

from rmemd.errors import NOT_FINALIZED, SWAP_UNSAFE
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
    Populated,
    Runs,
    State,
    VmContext,
    Why,
    export_tables,
    hookimpl,
    import_tables,
)
from rmemd.units import I64, PMD_PAGES, U8
from rmemd_snp.firmware import Firmware, Guest
from rmemd_snp.rmp import injected_code
from rmemd_snp.tables import (
    ASSIGNED,
    EAX_NAMES,
    FAIL_INPUT,
    FAIL_SIZEMISMATCH,
    GUEST_STATE_NAMES,
    IMMUTABLE,
    PAGE_ASSIGNED,
    RUNNING,
    STATE_NAMES,
    SUCCESS,
    TO_GUEST_INVALID,
    TO_HYPERVISOR,
    TO_PRE_GUEST,
    VALIDATED,
    VMRUN_INVALID,
    VMSA,
)

SCHEMA = ("snp", 1)
UNMAPPED = -1
VMSA_GFN = 0xFFFFFFFFF
NOT_VALIDATED = GuestException(
    "#VC", 0x404, "PAGE_NOT_VALIDATED: the page is the guest's, but not validated; CR2 = GVA"
)


class SnpConsumer:
    """An SNP guest whose pages do not move.

    Differs: vCPUs run at VMPL0 only, so no VMPL mask is ever in the way.
    """

    def __init__(self, vm: VmContext, firmware: Firmware, policy: int, hiding: bool) -> None:
        self.firmware = firmware
        self.rmp = firmware.rmp
        self.name = f"vm/{vm.vm}"
        # as the configuration wants them; both are fixed once the guest is started
        self.policy, self.hiding = policy, hiding
        self.npt = vm.sparse("npt", "i8", UNMAPPED)
        self.vmsas = vm.records("vmsas")
        self.facts = vm.records("facts")

    @property
    def context(self) -> int:
        """Return the pfn of the guest's context page."""
        context: int = self.facts["context"]
        return context

    @property
    def guest(self) -> Guest:
        """Return what the firmware knows of the guest."""
        return self.firmware.guest(self.context)

    # --- the nested page table ---------------------------------------------------------------
    @hookimpl
    def invalidate_start(self, tx: HookTx, runs: Runs, why: Why) -> None:
        """Zap the nested entries and flush; the RMP does not change.

        For MIGRATE vCPUs leave even if nothing is mapped: a VMSA cannot move in use.
        """
        tx.put(self.npt, runs.gfns(), UNMAPPED)
        if runs.total or why is Why.MIGRATE:
            tx.kick()

    @hookimpl
    def invalidate_end(self, tx: HookTx, runs: Runs, why: Why, ok: bool) -> None:
        """Map what was zapped for MIGRATE again, moved or not; nothing else stays mapped."""
        if why is Why.MIGRATE:
            tx.put(self.npt, runs.gfns(), runs.pfns())

    @hookimpl
    def map(self, tx: HookTx, runs: Runs) -> None:
        """Enter pages in the nested table."""
        tx.put(self.npt, runs.gfns(), runs.pfns())

    @hookimpl
    def prepare(self, tx: HookTx, runs: Runs) -> None:
        """Make frames Guest-Invalid; one that is assigned is taken as it is, whosever it is.

        Source: KVM sev_gmem_prepare; snp.md §4 (ASID and GPA are not compared).
        """
        gfns, pfns = runs.gfns(), runs.pfns()
        new = ~self.rmp.assigned(pfns)
        self.rmp.rmpupdate(tx, pfns[new], TO_GUEST_INVALID, gfns[new], self.guest.asid)

    # --- the launch --------------------------------------------------------------------------
    @hookimpl
    def populate(self, tx: HookTx, runs: Runs, kinds: U8, measure: bool, source: U8) -> Populated:
        """Launch pages: RMPUPDATE to Pre-Guest, then LAUNCH_UPDATE. ``measure`` False: UNMEASURED.

        The n-th VMSA page is vCPU n's; its entry's GPA is 0xFFFFFFFFF000, as KVM's. On an error
        KVM reclaims the page; here the transaction is undone, to the same state.
        Source: KVM sev_gmem_post_populate; snp.md §4.
        Differs: KVM builds and launches VMSAs itself inside LAUNCH_FINISH, in the kernel's
        memory, and refuses type 2 from user space; here the VMM brings them, so that the digest
        can be the real one. A batch is all or nothing (KVM keeps a prefix). The ioctl turns
        -EEXIST into -EIO when no page was done.
        """
        gfns, pfns = runs.gfns(), runs.pfns()
        taken = np.flatnonzero(self.rmp.assigned(pfns))
        if taken.size:
            gfn, pfn = int(gfns[taken[0]]), int(pfns[taken[0]])
            raise PAGE_ASSIGNED(
                f"gfn {gfn:#x} is on pfn {pfn:#x}, which is assigned",
                page=f"gfn {gfn:#x}",
                state=self.rmp.state_name(pfn),
                rule="snp.md §4 populate",
            )
        if not measure:
            kinds = np.where(kinds == PageKind.NORMAL, PageKind.UNMEASURED, kinds).astype(np.uint8)
        vmsa = kinds == PageKind.VMSA
        self.rmp.rmpupdate(tx, pfns, TO_PRE_GUEST, np.where(vmsa, VMSA_GFN, gfns), self.guest.asid)
        self.firmware.launch_update(tx, self.context, pfns, kinds, source)
        for vcpu, pfn in enumerate(pfns[vmsa].tolist(), start=len(self.vmsas)):
            tx.set(self.vmsas, vcpu, pfn)
        return Populated(mapped=False)

    @hookimpl
    def finalize(self, tx: HookTx) -> bytes:
        """LAUNCH_FINISH: return the launch digest, 48 bytes."""
        return self.firmware.launch_finish(tx, self.context)

    # --- running -----------------------------------------------------------------------------
    @hookimpl
    def enter(self, tx: HookTx, vcpu: int) -> None:
        """VMRUN: check the vCPU's VMSA page and hold it.

        Differs: a vCPU for which no VMSA was launched runs all the same.
        """
        guest = self.guest
        if guest.state != RUNNING:
            raise NOT_FINALIZED(
                f"{self.name} vCPU {vcpu} cannot run before LAUNCH_FINISH",
                state=f"guest {GUEST_STATE_NAMES[guest.state]}",
                rule="snp.md §4",
            )
        if vcpu not in self.vmsas:
            return
        pfn = self.vmsas[vcpu]
        bits = self.rmp.bits.at(pfn) & (ASSIGNED | IMMUTABLE | VMSA)
        if bits != ASSIGNED | VMSA or self.rmp.asid.at(pfn) != guest.asid:
            raise VMRUN_INVALID(
                f"the VMSA of {self.name} vCPU {vcpu}, pfn {pfn:#x}, is not runnable",
                page=f"pfn {pfn:#x}",
                state=self.rmp.state_name(pfn),
                rule="snp.md §2 VMRUN",
                vendor_status="VMEXIT_INVALID",
                vendor_value=-1,
            )
        tx.fill(self.rmp.in_use, pfn, 1, 1)

    @hookimpl
    def leave(self, tx: HookTx, vcpu: int) -> None:
        """#VMEXIT: let the VMSA page go."""
        if vcpu in self.vmsas:
            tx.fill(self.rmp.in_use, self.vmsas[vcpu], 1, 0)

    @hookimpl
    def guest_access(self, tx: HookTx, vcpu: int, runs: Runs, write: bool) -> AccessAnswer:
        """Check a C=1 access: the RMP entry (#NPF) before Validated (#VC 0x404). Source: §2."""
        gfns, pfns = runs.gfns(), runs.pfns()
        invalid = (self.rmp.bits.get(pfns) & VALIDATED) == 0
        codes = np.select(
            [self.rmp.faults(pfns, gfns, self.guest.asid), invalid],
            [AccessCode.FAULT, AccessCode.EXCEPTION],
            AccessCode.OK,
        ).astype(np.uint8)
        taken = (codes == AccessCode.EXCEPTION).any()
        return AccessAnswer(codes, exception=NOT_VALIDATED if taken else None)

    @hookimpl
    def guest_call(
        self, tx: HookTx, vcpu: int, call: GuestCall, gfns: I64, level: int
    ) -> CallAnswer:
        """Answer PVALIDATE (VALIDATE, RESCIND) and page state changes (SHARE, UNSHARE).

        Differs: a range is as many PSC requests (of up to 253 entries) as it takes.
        """
        if call in (GuestCall.SHARE, GuestCall.UNSHARE):
            return CallAnswer(CallAction.HYPERCALL, to_private=call is GuestCall.UNSHARE)
        if call in (GuestCall.VALIDATE, GuestCall.RESCIND):
            return self._pvalidate(tx, gfns, level, call is GuestCall.VALIDATE)
        undefined = GuestException("#UD", 6, f"an SNP guest has no instruction for {call.value}")
        return CallAnswer(CallAction.EXCEPTION, exception=undefined)

    def _pvalidate(self, tx: HookTx, gfns: I64, level: int, value: bool) -> CallAnswer:
        """PVALIDATE page by page, up to the first #NPF; at 2M it always finds 4K entries.

        Differs: CF is per instruction; for a range it is 1 if any entry was unchanged.
        """
        pfns = self.npt.get(gfns)
        faults = self.rmp.faults(np.maximum(pfns, 0), gfns, self.guest.asid) | (pfns == UNMAPPED)
        eax = SUCCESS
        if level and gfns[0] % PMD_PAGES:
            eax = FAIL_INPUT
        elif not faults[0]:
            eax = FAIL_SIZEMISMATCH if level else injected_code(tx, "PVALIDATE", EAX_NAMES)
        if eax:
            return CallAnswer(CallAction.DONE, status=eax, status_name=EAX_NAMES[eax])
        done = int(faults.argmax()) if faults.any() else gfns.size
        unchanged = self.rmp.pvalidate(tx, pfns[:done], value)
        action = CallAction.DONE if done == gfns.size else CallAction.FAULT
        name = "SUCCESS CF=1" if unchanged.any() else "SUCCESS"
        return CallAnswer(action, done=done, status_name=name)

    # --- the host's events -------------------------------------------------------------------
    @hookimpl
    def convert(self, tx: HookTx, runs: Runs, to_private: bool) -> Content:
        """In-place conversion: no state change touches contents, so either side reads noise.

        To shared, frames become Hypervisor, so that the host may write; to private, prepare
        assigns them when the guest comes. Source: snp.md §6 **[I]**: Linux has no such path yet.
        """
        if not to_private:
            self.rmp.rmpupdate(tx, runs.pfns(), TO_HYPERVISOR)
        return Content.NOISE

    @hookimpl
    def error(self, tx: HookTx, runs: Runs, consumed: bool) -> str:
        """A DRAM error. Found by the host: the page is unmapped, and the guest lives.

        SNP has no MAC: only an ECC error is ever consumed, never an integrity failure. The host
        takes the #MC, and cannot inject one into a guest whose registers it does not see.
        """
        if not consumed:
            return ""
        return (
            f"{self.name} consumed a memory error at gfn {int(runs.gfn[0]):#x}: #MC, BUS_MCEERR_AR"
        )

    @hookimpl
    def page_state(self, gfns: I64, pfns: I64) -> PageStates:
        """Name the RMP states."""
        return PageStates(self.rmp.states(pfns), STATE_NAMES)

    # --- the consumer changes ------------------------------------------------------------------
    @hookimpl
    def export_state(self) -> State:
        """Give the nested table, the VMSA pages and the context page; RMP and firmware stay."""
        return export_tables(*SCHEMA, self.npt, self.vmsas, self.facts)

    @hookimpl
    def import_state(self, tx: HookTx, state: State) -> None:
        """Drive a guest that was started: its policy and ciphertext hiding cannot change any more.

        The policy is LAUNCH_START's, and in every attestation report: a consumer that stands for
        another one would move pages that the guest was promised do not move, or the reverse.
        Source: snp.md §1 (LAUNCH_START wants INIT), §5 "Veto", §8, §9 rule 25.
        """
        import_tables(tx, state, *SCHEMA, self.npt, self.vmsas, self.facts)
        for name, has, wanted in (
            ("policy", self.guest.policy, self.policy),
            ("ciphertext hiding", int(self.facts["hiding"]), int(self.hiding)),
        ):
            if has != wanted:
                raise SWAP_UNSAFE(
                    f"{self.name} was started with {name} {has:#x}, and {wanted:#x} is asked for",
                    state=f"{name} {has:#x}", rule="snp.md §9 rule 25",
                )  # fmt: skip


class SnpMovableConsumer(SnpConsumer):
    """An SNP guest whose policy lets the host move its pages."""

    @hookimpl
    def migrate_folio(self, tx: HookTx, gfns: I64, src: I64, dst: I64) -> None:
        """Move pages by SNP_PAGE_MOVE; ``src`` stays Guest-Invalid until it is freed.

        Steps 2 to 4 of the host recipe (snp.md §5): dst to Pre-Guest, src to Pre-Swap or
        Pre-Guest by an RMPUPDATE of Immutable alone, PAGE_MOVE. The engine did 1 and does 5 and
        6. Differs: no cache, so no WBINVD between (whether it is needed is **[U]**). Linux has no
        caller of the command.
        """
        held = self.rmp.assigned(src)
        tx.relocate(src[~held], dst[~held], 0)
        gfns, src, dst = gfns[held], src[held], dst[held]
        if not src.size:
            return
        self.rmp.rmpupdate(tx, dst, TO_PRE_GUEST, gfns, self.guest.asid)
        owners = self.rmp.asid.get(src)
        self.rmp.rmpupdate(tx, src, TO_PRE_GUEST, self.rmp.gpa.get(src), owners)
        self.firmware.page_move(tx, self.context, src, dst)
        for vcpu, pfn in self.vmsas.items():
            for at in np.flatnonzero(src == pfn).tolist():
                tx.set(self.vmsas, vcpu, int(dst[at]))
