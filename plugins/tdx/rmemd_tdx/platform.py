"""The TDX platform: HKIDs, the PAMT of the whole host, and what the host may do to private pages.

Owns the platform's tables and the making and unmaking of TDs.

Source: tdx.md §1, §4 (teardown), §6, §7.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

import numpy as np

from rmemd.errors import BAD_REQUEST, NO_KEY_SLOTS
from rmemd.hooks import (
    HOST_VIEWS,
    HookTx,
    HostAccess,
    HostAnswer,
    HostContext,
    HostView,
    Records,
    Variant,
    VmContext,
    hookimpl,
)
from rmemd.units import I64, Bools
from rmemd_tdx import leaves
from rmemd_tdx import tables as t
from rmemd_tdx.consumer import Tdx2022, TdxConsumer, TdxRelocate, TdxToday
from rmemd_tdx.leaves import Pamt, Streams, Td

OPTIONS = {"sept_ve_disable": "0", "debug": "0"}
CONSUMERS: dict[str, type[TdxConsumer]] = {
    "tdx-today": TdxToday,
    "tdx-2022": Tdx2022,
    "tdx-relocate": TdxRelocate,
}


class TdxPlatform:
    """TDX on one host."""

    pamt: Pamt
    kot: Records

    def __init__(self) -> None:
        # VM -> its measurement's contexts, for as long as a consumer of it has them
        self.streams: WeakValueDictionary[int, Streams] = WeakValueDictionary()

    @hookimpl
    def variants(self) -> Sequence[Variant]:
        """Name the three sides of the argument."""
        summaries = (
            "Linux from 6.19: no page reference, migrate_folio NULL",
            "TDX as of 2022: a page reference while mapped, migrate_folio NULL",
            "what the architecture permits: migrate_folio by TDH.MEM.PAGE.RELOCATE",
        )
        return [
            Variant(name, summary, options=OPTIONS, points=leaves.POINTS)
            for name, summary in zip(CONSUMERS, summaries, strict=True)
        ]

    @hookimpl
    def start(self, host: HostContext) -> None:
        """Create the PAMT and the KOT.

        Differs: one PAMT entry per 4K page and none for 2M and 1G; the 1/256 of memory that a
        PAMT takes is not taken from the host. ``npackages`` plays no part (one flush serves all).
        """
        self.pamt = Pamt(
            page_type=host.dense("pamt_type"),
            owner=host.dense("pamt_owner", "u4"),
            bepoch=host.dense("pamt_bepoch", "u8"),
            unreset=host.dense("unreset"),
        )
        # HKID -> VM; an HKID that is not there is HKID_FREE
        self.kot = host.records("kot")

    @hookimpl
    def make_consumer(
        self, vm: VmContext, tx: HookTx, variant: str, config: Mapping[str, str]
    ) -> object:
        """MNG.CREATE, KEY.CONFIG, ADDCX, MNG.INIT: a TD that can be built (KVM_TDX_INIT_VM).

        Differs: KVM offers SEPT_VE_DISABLE but not DEBUG, which here obeys the module.
        """
        attributes = {name.upper(): _flag(name, config.get(name, "0")) for name in OPTIONS}
        empty = hashlib.sha384()
        running = self.streams.get(vm.vm) if vm.importing else None
        td = Td(
            vm=vm.vm,
            fields=vm.records("td"),
            inside=vm.records("inside"),
            sept=vm.sparse("sept"),
            hpa=vm.sparse("hpa", "i8"),
            order=vm.sparse("order", "i8"),
            pamt=self.pamt,
            streams=Streams({empty.digest(): empty}) if running is None else running,
        )
        if not vm.importing:
            self._create(tx, td, attributes)
        self.streams[vm.vm] = td.streams
        return CONSUMERS[variant](td, attributes)

    def _create(self, tx: HookTx, td: Td, attributes: Mapping[str, int]) -> None:
        hkid = next((hkid for hkid in t.GUEST_HKIDS if hkid not in self.kot), None)
        if hkid is None:
            raise NO_KEY_SLOTS(f"all {len(t.GUEST_HKIDS)} guest HKIDs are assigned")
        leaves.create(tx, self.kot, td.vm, hkid)
        key = tx.new_key(integrity=True)
        tx.use_key(key)
        fields = {
            "LIFECYCLE_STATE": "TD_KEYS_CONFIGURED", "OP_STATE": "INITIALIZED", "FATAL": 0,
            "HKID": hkid, "KEY": key, "TD_EPOCH": 1, "REFCOUNT0": 0, "REFCOUNT1": 0,
            "MRTD": hashlib.sha384().digest(), "ADDED": 0, "BUGGED": 0, **attributes,
        }  # fmt: skip
        for name, value in fields.items():
            tx.set(td.fields, name, value)

    @hookimpl
    def destroy_consumer(self, tx: HookTx, consumer: object) -> None:
        """Flush the vCPUs out, free the HKID, reclaim what the TD still has."""
        assert isinstance(consumer, TdxConsumer)
        tx.kick()
        leaves.teardown(tx, consumer.td, self.kot)

    @hookimpl
    def host_access(self, tx: HookTx, pfns: I64, access: HostAccess) -> HostAnswer:
        """Reads with a shared HKID give zeros where a TD wrote last; writes are never checked.

        Neither poisons anything by itself: a write breaks MAC and owner bit, so that the TD's
        next read does (the memory controller keeps both). Until the TD has written to a page
        (pending, or overwritten by the host), the host reads its own bytes there.
        Source: tdx.md §6, §9 rules 18, 19 (unconfirmed there).
        Differs: whole pages instead of 64-byte lines; no partial-write erratum of SPR and EMR.
        """
        td_owned = self.pamt.unreturnable(pfns) & (tx.content_keys(pfns) != 0)
        hidden = td_owned & (not access.write)
        zeros, raw = HOST_VIEWS.index(HostView.ZEROS), HOST_VIEWS.index(HostView.RAW)
        views = np.where(hidden, zeros, raw).astype(np.uint8)
        return HostAnswer(views, rule="tdx.md §6, §9 rule 19")

    @hookimpl
    def free(self, tx: HookTx, pfns: I64) -> Bools:
        """Keep back what a TD still has, and what was taken from one without a full-line write.

        Source: tdx.md §9 rules 20 (strict), 24.
        Differs: Linux 6.19 lets a page go whose removal failed, having bugged the VM.
        """
        return self.pamt.unreturnable(pfns)


def _flag(name: str, text: str) -> int:
    if text not in ("0", "1"):
        raise BAD_REQUEST(f"{name} is 0 or 1, not {text!r}", field=f"config.{name}")
    return int(text)
