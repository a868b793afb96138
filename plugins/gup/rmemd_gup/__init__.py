"""Ordinary guests, found by get_user_pages, and x86's software-protected test guests.

Both keep nothing of their own: the engine's mirror is their page table. A reference is taken at
the fault and dropped once the page is mapped, so neither has a pin; the mapping is then protected
by the invalidate pair alone (pkvm.md §7, columns (a) and (b)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rmemd.errors import NO_SUCH_CONSUMER
from rmemd.hooks import (
    CallAction,
    CallAnswer,
    Content,
    GuestCall,
    HookTx,
    HostContext,
    Runs,
    State,
    Variant,
    VmContext,
    Why,
    export_tables,
    hookimpl,
    import_tables,
)
from rmemd.units import I64

KVM_ENOSYS = 1000
SCHEMA = ("gup", 1)


class OrdinaryGuest:
    """An ordinary VM: it has no private memory, so its hooks are asked next to nothing.

    Its pages move by invalidation, and a poisoned one is unmapped, which needs no hook: hooks are
    about private folios.
    Source: Linux virt/kvm/kvm_main.c, kvm_faultin_pfn; pkvm.md §7 "GUP VM".
    """

    @hookimpl
    def invalidate_start(self, tx: HookTx, runs: Runs, why: Why) -> None:
        """Keep nothing: clearing the mirror is the whole unmap."""

    @hookimpl
    def invalidate_end(self, tx: HookTx, runs: Runs, why: Why, ok: bool) -> None:
        """Keep nothing."""

    @hookimpl
    def export_state(self) -> State:
        """Have nothing to give."""
        return export_tables(*SCHEMA)

    @hookimpl
    def import_state(self, tx: HookTx, state: State) -> None:
        """Have nothing to take."""
        import_tables(tx, state, *SCHEMA)


class SoftwareProtectedGuest(OrdinaryGuest):
    """KVM_X86_SW_PROTECTED_VM: private memory without any protection, made for tests.

    migrate_folio is NULL, although a plain copy would do: guest_memfd refuses to migrate for
    every VM type, and the RFC of June 2026 moves the pages of VMs without private memory only.
    Source: pkvm.md §7; restrictedmem.md §1 "Migration", §4 "Migration".
    """

    @hookimpl
    def error(self, tx: HookTx, runs: Runs, consumed: bool) -> str:
        """Live on with the page unmapped, until the guest consumes the poison.

        Source: Linux mm/memory-failure.c, kill_proc.
        Differs: a VMM may survive the SIGBUS and give its guest a machine check; here it does not.
        """
        return "SIGBUS, BUS_MCEERR_AR: the guest consumed a poisoned page" if consumed else ""

    @hookimpl
    def convert(self, tx: HookTx, runs: Runs, to_private: bool) -> Content:
        """Preserve the bytes, as guest_memfd_conversions_test expects.

        Differs: newer kernels may leave the content unspecified (pkvm.md §7 [SWC]).
        """
        return Content.PRESERVED

    @hookimpl
    def guest_call(
        self, tx: HookTx, vcpu: int, call: GuestCall, gfns: I64, level: int
    ) -> CallAnswer:
        """Exit to the VMM for KVM_HC_MAP_GPA_RANGE; KVM knows no other call about memory.

        Source: Linux selftests x86/private_mem_conversions_test.c; arch/x86/kvm/x86.c.
        Differs: KVM_CAP_EXIT_HYPERCALL is always on.
        """
        if call in (GuestCall.SHARE, GuestCall.UNSHARE):
            return CallAnswer(CallAction.HYPERCALL, to_private=call is GuestCall.UNSHARE)
        return CallAnswer(CallAction.DONE, 0, -KVM_ENOSYS, "-KVM_ENOSYS")


GUESTS: dict[str, type[OrdinaryGuest]] = {
    "gup": OrdinaryGuest,
    "sw-protected": SoftwareProtectedGuest,
}


class GupPlatform:
    """A host without a vendor: it checks no access and reclaims nothing."""

    @hookimpl
    def variants(self) -> Sequence[Variant]:
        """Name the ordinary VM and the software-protected one."""
        return [
            Variant("gup", "an ordinary VM: pages found by GUP, no lasting reference",
                    private_memory=False),
            Variant("sw-protected", "KVM_X86_SW_PROTECTED_VM: private memory, no protection",
                    personalities=("in-place", "attributes")),
        ]  # fmt: skip

    @hookimpl
    def start(self, host: HostContext) -> None:
        """Keep no tables."""

    @hookimpl
    def make_consumer(
        self, vm: VmContext, tx: HookTx, variant: str, config: Mapping[str, str]
    ) -> object:
        """Make a guest whose memory is plain."""
        if variant not in GUESTS:
            raise NO_SUCH_CONSUMER(f"gup has no variant {variant!r}")
        if not vm.importing:
            tx.use_key(tx.new_key(plain=True))
        return GUESTS[variant]()

    @hookimpl
    def destroy_consumer(self, tx: HookTx, consumer: object) -> None:
        """Have nothing to give back."""
