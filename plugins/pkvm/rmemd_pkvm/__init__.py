"""Protected guests of Arm pKVM: the platform, which is one EL2 per host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rmemd.errors import NO_SUCH_CONSUMER
from rmemd.hooks import (
    HOST_VIEWS,
    Agent,
    HookTx,
    HostAccess,
    HostAnswer,
    HostContext,
    HostView,
    Variant,
    VmContext,
    hookimpl,
)
from rmemd.units import I64, Bools
from rmemd_pkvm.guest import MovableGuest, PinnedGuest, ProtectedGuest
from rmemd_pkvm.hypercalls import El2
from rmemd_pkvm.states import NOPAGE, OWNED, TRANSITIONS

GUESTS: dict[str, type[ProtectedGuest]] = {
    "pkvm-today": PinnedGuest,
    "pkvm-gmem": MovableGuest,
}
SUMMARIES = {
    "pkvm-today": "a protected guest as merged: each mapped page is pinned, none can move",
    "pkvm-gmem": "a protected guest on a restricted file: no pin, EL2 moves pages (design)",
}
RAW, FAULT = HOST_VIEWS.index(HostView.RAW), HOST_VIEWS.index(HostView.FAULT)
# what each agent gets from a page that the host has no access to
FAULTS = {
    Agent.HOST_USER: ("SIGSEGV, SEGV_ACCERR", "pkvm.md §8 rule 12"),
    Agent.HOST_KERNEL: ("kernel oops: access to hypervisor-protected memory", "pkvm.md §3 item 3"),
}


class PkvmPlatform:
    """pKVM on one host."""

    el2: El2

    @hookimpl
    def variants(self) -> Sequence[Variant]:
        """Name the two guests; both convert in place."""
        points = tuple(f"__pkvm_{name}" for name in TRANSITIONS)
        return [
            Variant(name, SUMMARIES[name], personalities=("in-place",), points=points)
            for name in GUESTS
        ]

    @hookimpl
    def start(self, host: HostContext) -> None:
        """Have EL2 take over a host that owns all of its memory."""
        self.el2 = El2(host)

    @hookimpl
    def make_consumer(
        self, vm: VmContext, tx: HookTx, variant: str, config: Mapping[str, str]
    ) -> object:
        """Make a protected VM, with a memory key of its own."""
        if variant not in GUESTS:
            raise NO_SUCH_CONSUMER(f"pkvm has no variant {variant!r}")
        guest = GUESTS[variant](vm, self.el2)
        if not vm.importing:
            tx.set(guest.facts, "handle", self.el2.init_vm(tx, protected=True))
            tx.set(guest.facts, "key", tx.new_key())
            tx.use_key(guest.facts["key"])
        return guest

    @hookimpl
    def destroy_consumer(self, tx: HookTx, consumer: object) -> None:
        """Tear the VM down: start, reclaim what is left (what the guest shared), finalize.

        Source: pkvm.md §1 "Teardown", §8 rules 15, 16.
        """
        assert isinstance(consumer, ProtectedGuest)
        handle = consumer.handle
        self.el2.start_teardown_vm(tx, handle)
        self.el2.reclaim_dying_guest_page(tx, handle, self.el2.mapped_gfns(handle))
        self.el2.finalize_teardown_vm(tx, handle)

    @hookimpl
    def host_access(self, tx: HookTx, pfns: I64, access: HostAccess) -> HostAnswer:
        """Judge the host's access to frames by its stage-2.

        EL0 gets SIGSEGV, and the page and its guest are unharmed. EL1 has the page taken by force:
        the IPA is poisoned, the content zeroed, and the access goes on; a page of EL2 is an oops.
        Devices are not checked, because the base tree programs no IOMMU.

        Source: pkvm.md §3, §8 rules 12, 13, 14.
        Differs: an exception fixup (a user copy that fails cleanly) is not modelled; what a device
        reads is ciphertext.
        """
        if access.agent is Agent.DEVICE:
            return HostAnswer(np.full(pfns.size, RAW, dtype=np.uint8))
        lost = np.zeros(pfns.size, dtype=np.bool_)
        if access.agent is Agent.HOST_KERNEL:
            lost = self.el2.host_force_reclaim_page_guest(tx, pfns) == 0
        denied = self.el2.host_states(pfns) == NOPAGE
        fault, rule = FAULTS[access.agent] if denied.any() else ("", "")
        return HostAnswer(np.where(denied, FAULT, RAW).astype(np.uint8), fault, rule, lost)

    @hookimpl
    def free(self, tx: HookTx, pfns: I64) -> Bools:
        """Refuse the frames that the host does not own, or has lent."""
        return np.asarray(self.el2.host_states(pfns) != OWNED)
