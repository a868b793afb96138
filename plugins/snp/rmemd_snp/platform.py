"""The host's half of SNP: one RMP, one firmware, ASIDs for guests, frames given back.

Owns which ASID and context page a guest gets, and what the CPU makes of the host's own accesses.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

import numpy as np

from rmemd.errors import BAD_REQUEST, NO_KEY_SLOTS, NO_SUCH_CONSUMER
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
from rmemd_snp.consumer import SnpConsumer, SnpMovableConsumer
from rmemd_snp.firmware import Firmware
from rmemd_snp.rmp import Rmp
from rmemd_snp.tables import (
    POLICY_DEFAULT,
    POLICY_PAGE_SWAP_DISABLE,
    TO_FIRMWARE,
    TO_HYPERVISOR,
)

OPTIONS = {"policy": hex(POLICY_DEFAULT), "ciphertext_hiding": "0"}
#: variant -> (summary, policy bits that it sets)
VARIANTS = {
    "snp-move": ("SNP_PAGE_MOVE relocates private pages", 0),
    "snp-swap-disable": (
        "the policy's PAGE_SWAP_DISABLE forbids moves: private pages are unmovable",
        POLICY_PAGE_SWAP_DISABLE,
    ),
}
#: where fault rules can strike: the instructions, and the firmware's commands
POINTS = (
    "RMPUPDATE", "PVALIDATE", "SNP_GCTX_CREATE", "SNP_LAUNCH_START", "SNP_ACTIVATE",
    "SNP_LAUNCH_UPDATE", "SNP_LAUNCH_FINISH", "SNP_PAGE_MOVE", "SNP_PAGE_RECLAIM", "SNP_DF_FLUSH",
)  # fmt: skip
#: who writes to an assigned frame -> what stops it
WRITE_FAULTS = {
    Agent.HOST_USER: "#PF (RMP, error bit 31)",
    Agent.HOST_KERNEL: "#PF (RMP, error bit 31)",
    Agent.DEVICE: "RMP_PAGE_FAULT (IOMMU)",
}


class SnpPlatform:
    """SEV-SNP on one host; ``max_asid`` is the highest ASID that a guest can have."""

    def __init__(self, max_asid: int = 99) -> None:
        self.max_asid = max_asid
        self.rmp: Rmp
        self.firmware: Firmware

    @hookimpl
    def variants(self) -> Sequence[Variant]:
        """Name the variants: they differ in migrate_folio only."""
        return [
            Variant(name, text, options=OPTIONS, points=POINTS)
            for name, (text, _) in VARIANTS.items()
        ]

    @hookimpl
    def start(self, host: HostContext) -> None:
        """SNP_INIT: an empty RMP, every ASID dirty."""
        self.rmp = Rmp(host, kernel_frames=self.max_asid)
        self.firmware = Firmware(host, self.rmp, self.max_asid)
        self.hiding = host.records("ciphertext_hiding")

    @hookimpl
    def make_consumer(
        self, vm: VmContext, tx: HookTx, variant: str, config: Mapping[str, str]
    ) -> object:
        """Create, start and activate a guest; its policy decides whether its folios move.

        The host flushes when the ASID is dirty. Source: KVM snp_launch_start, sev_asid_new.
        Differs: ciphertext hiding is asked for per guest; on hardware SNP_INIT_EX turns it on
        for a range of ASIDs.
        """
        if variant not in VARIANTS:
            raise NO_SUCH_CONSUMER(f"snp has no variant {variant}")
        policy, hiding = _parse(config)
        policy |= VARIANTS[variant][1]
        movable = not policy & POLICY_PAGE_SWAP_DISABLE
        kind = SnpMovableConsumer if movable else SnpConsumer
        guest = kind(vm, self.firmware, policy, hiding)
        if not vm.importing:
            self._start(tx, guest)
        return guest

    def _start(self, tx: HookTx, guest: SnpConsumer) -> None:
        asid = self._pick_asid()
        context = next(pfn for pfn in self.rmp.kernel if self.rmp.bits.at(pfn) == 0)
        tx.set(guest.facts, "context", context)
        tx.set(guest.facts, "hiding", guest.hiding)
        self.rmp.rmpupdate(tx, np.array([context], dtype=np.int64), TO_FIRMWARE)
        self.firmware.gctx_create(tx, context)
        self.firmware.launch_start(tx, context, guest.policy, guest.hiding)
        if not self.firmware.clean.at(asid):
            self.firmware.wbinvd(tx)
            self.firmware.df_flush(tx)
        self.firmware.activate(tx, context, asid)
        tx.set(self.hiding, asid, guest.hiding)
        tx.use_key(self.firmware.guest(context).key)

    @hookimpl
    def destroy_consumer(self, tx: HookTx, consumer: object) -> None:
        """DECOMMISSION, then take the context page back; guest pages keep their entries."""
        assert isinstance(consumer, SnpConsumer)
        page = np.array([consumer.context], dtype=np.int64)
        self.firmware.decommission(tx, consumer.context)
        self.firmware.page_reclaim(tx, page)
        self.rmp.rmpupdate(tx, page, TO_HYPERVISOR)

    @hookimpl
    def host_access(self, tx: HookTx, pfns: I64, access: HostAccess) -> HostAnswer:
        """Writes to assigned frames fault; reads give ciphertext, or ones if it is hidden.

        Source: snp.md §2, §9 rules 6 and 7; a device's fault as in Linux drivers/iommu/amd.
        """
        assigned = self.rmp.assigned(pfns)
        if access.write:
            views = np.where(assigned, _view(HostView.FAULT), _view(HostView.RAW))
            fault = WRITE_FAULTS[access.agent] if assigned.any() else ""
            return HostAnswer(views.astype(np.uint8), fault, "snp.md §9 rule 6")
        hiding = [asid for asid, hidden in self.hiding.items() if hidden]
        hidden = np.isin(self.rmp.asid.get(pfns), hiding)
        views = np.where(hidden, _view(HostView.ONES), _view(HostView.RAW))
        return HostAnswer(views.astype(np.uint8), rule="snp.md §9 rule 7")

    @hookimpl
    def free(self, tx: HookTx, pfns: I64) -> Bools:
        """RMPUPDATE assigned frames to Hypervisor; those that refuse must be leaked.

        Source: KVM sev_gmem_invalidate. Differs: KVM only warns and frees such a page all the
        same; the leak is what its reclaim paths do (snp.md §4, §9 rule 24). No cache, no CLFLUSH.
        """
        stuck = np.zeros(pfns.size, dtype=np.bool_)
        assigned = np.flatnonzero(self.rmp.assigned(pfns))
        codes = self.rmp.rmpupdate_codes(tx, pfns[assigned], TO_HYPERVISOR)
        self.rmp.write(tx, pfns[assigned[codes == 0]], TO_HYPERVISOR)
        stuck[assigned[codes != 0]] = True
        return stuck

    def _pick_asid(self) -> int:
        """Return the first ASID without guest and pages, a clean one if there is any.

        KVM knows nothing of pages left behind, and would be told 03; here another is taken.
        """
        every = np.arange(1, self.max_asid + 1)
        dirty_last = every[np.argsort(self.firmware.clean.get(every) == 0, kind="stable")]
        for asid in dirty_last.tolist():
            if not self.firmware.owned(asid) and self.rmp.pages_of(asid) == 0:
                return int(asid)
        raise NO_KEY_SLOTS(
            f"all {self.max_asid} SNP ASIDs have a guest or pages left",
            errno=errno.EBUSY,
            rule="snp.md §9 rule 16",
        )


def _parse(config: Mapping[str, str]) -> tuple[int, bool]:
    """Return (policy, ciphertext hiding) of a configuration."""
    values = {**OPTIONS, **config}
    if unknown := sorted(values.keys() - OPTIONS.keys()):
        raise BAD_REQUEST(f"snp has no option {unknown[0]}", field=f"config.{unknown[0]}")
    if values["ciphertext_hiding"] not in ("0", "1"):
        raise BAD_REQUEST("ciphertext_hiding is 0 or 1", field="config.ciphertext_hiding")
    try:
        policy = int(values["policy"], 16)
    except ValueError:
        policy = -1
    if not 0 <= policy < 1 << 64:
        raise BAD_REQUEST("policy is a 64-bit number in hex", field="config.policy")
    return policy, values["ciphertext_hiding"] == "1"


def _view(view: HostView) -> int:
    return HOST_VIEWS.index(view)
