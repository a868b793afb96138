"""The SNP firmware: guest contexts, ASIDs, the launch digest and the commands of the mailbox.

Owns the guests by context pfn and the ASIDs' states. Each command is an array function whose
checks are a row of status codes in the firmware's order; everything is checked before anything is
written. It writes RMP entries directly, as the firmware does, Immutable ones included.

Differs: the platform is always in INIT (no 01); 4K pages only, so 19 and 09 are only ever
injected; absent are swap and metadata pages (MD_INIT, SWAP_OUT, SWAP_IN), PAGE_SET_STATE,
PAGE_UNSMASH, IMI guests, ID blocks, the check of CPUID leaves, attestation reports and the debug
commands. One core complex. Every command but DECOMMISSION passes an injection point of its name.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, NamedTuple

import numpy as np

from rmemd.hooks import HookTx, HostContext, PageKind
from rmemd.units import I64, PAGE_SHIFT, U8
from rmemd_snp.rmp import Rmp, distinct, injected_code
from rmemd_snp.tables import (
    CODE,
    COMMAND_RULES,
    FIRMWARE_REASONS,
    GUEST_CODES,
    GUEST_STATE_NAMES,
    IMMUTABLE,
    INIT,
    LAUNCH,
    PAGE_CODES,
    POLICY_CIPHERTEXT_HIDING,
    POLICY_KNOWN,
    POLICY_MUST_BE_ONE,
    POLICY_PAGE_SWAP_DISABLE,
    POLICY_SINGLE_SOCKET,
    RUNNING,
    STATUS_NAMES,
    VALIDATED,
    VMSA,
)

ASID_LIMIT = 2048
CACHES_WRITTEN = "wbinvd"
# current LD, contents, length, type, IMI, reserved, VMPL1, VMPL2, VMPL3, GPA (snp.md §7)
PAGE_INFO = struct.Struct("<48s48sHBBBBBBQ")
NO_DIGEST = bytes(48)
TSC_FIELDS = slice(0x2F0, 0x300)


class Guest(NamedTuple):
    """What a guest context holds; ``asid`` 0 is an inactive guest."""

    state: int = INIT
    policy: int = 0
    asid: int = 0
    key: int = 0
    digest: bytes = NO_DIGEST


class Firmware:
    """The firmware of one host.

    Attributes:
        guests: context pfn -> the fields of a Guest.
        clean: 1 per ASID that may be activated; SNP_INIT leaves every ASID dirty.
        caches: whether WBINVD ran since a running guest was last deactivated.
    """

    def __init__(self, host: HostContext, rmp: Rmp, max_asid: int) -> None:
        self.rmp = rmp
        self.max_asid = max_asid
        self.dies = host.npackages
        self.guests = host.records("guests")
        self.caches = host.records("caches")
        self.clean = host.dense("asid.clean", length=max_asid + 1)

    def guest(self, context: int) -> Guest:
        """Return the guest of a context page."""
        return Guest(*self.guests.get(context, ()))

    def owned(self, asid: int) -> bool:
        """Return whether a guest has the ASID."""
        return any(Guest(*fields).asid == asid for _, fields in self.guests.items())

    # --- contexts and ASIDs ------------------------------------------------------------------
    def gctx_create(self, tx: HookTx, context: int) -> None:
        """Make a guest context of a Firmware page."""
        page = _one(context)
        self._check(tx, "SNP_GCTX_CREATE", page, self._page("SNP_GCTX_CREATE", page))
        tx.put(self.rmp.bits, page, self.rmp.bits.get(page) | VMSA)
        self._store(tx, context, Guest())

    def launch_start(self, tx: HookTx, context: int, policy: int, hiding: bool) -> None:
        """Begin the launch under a policy.

        Differs: bits 21 to 25 are known, as in firmware 1.58 (snp.md §1 has 1.55, which refuses
        them). Bit 24 needs ciphertext hiding **[U]**. KVM refuses a bad policy with EINVAL before
        the firmware sees it; here it is the firmware's 07.
        """
        guest = self.guest(context)
        bad = (
            not policy & POLICY_MUST_BE_ONE
            or policy & ~POLICY_KNOWN
            or (policy & POLICY_CIPHERTEXT_HIDING and not hiding)
        )
        self._command(tx, "SNP_LAUNCH_START", context, _if(bad, "POLICY_FAILURE"))
        self._store(tx, context, guest._replace(state=LAUNCH, policy=policy))

    def activate(self, tx: HookTx, context: int, asid: int) -> None:
        """Give the guest an ASID, and a new memory key under it."""
        guest = self.guest(context)
        exists = 1 <= asid <= self.max_asid
        self._command(
            tx,
            "SNP_ACTIVATE",
            context,
            _if(asid >= ASID_LIMIT, "INVALID_ASID"),
            _if(self.rmp.pages_of(asid) > 0, "INVALID_CONFIG"),
            _if(guest.policy & POLICY_SINGLE_SOCKET and self.dies > 1, "POLICY_FAILURE"),
            _if(not exists, "INVALID_ASID"),
            _if(exists and self.owned(asid), "ASID_OWNED"),
            _if(guest.asid > 0, "ACTIVE"),
            _if(exists and not self.clean.at(asid), "DFFLUSH_REQUIRED"),
        )
        key = tx.new_key()
        self._store(tx, context, guest._replace(asid=asid, key=key))

    def wbinvd(self, tx: HookTx) -> None:
        """WBINVD on all cores: the instruction that DF_FLUSH asks for."""
        tx.set(self.caches, CACHES_WRITTEN, True)

    def df_flush(self, tx: HookTx) -> None:
        """Make every dirty ASID clean."""
        written = self.caches.get(CACHES_WRITTEN, False)
        self._check(tx, "SNP_DF_FLUSH", _one(-1), _if(not written, "WBINVD_REQUIRED"))
        tx.fill(self.clean, 0, self.max_asid + 1, 1)

    def decommission(self, tx: HookTx, context: int) -> None:
        """End a guest: its context becomes a Firmware page, its other pages stay as they are.

        The ASID is dirty if the guest reached RUNNING. Not injectable: KVM answers a failure by
        leaking the ASID, which nothing here could show.
        """
        guest = self.guest(context)
        page = _one(context)
        self._refuse("SNP_DECOMMISSION", page, self._page("context", page))
        tx.put(self.rmp.bits, page, self.rmp.bits.get(page) & ~np.uint8(VMSA))
        tx.drop(self.guests, context)
        if guest.state == RUNNING:
            tx.fill(self.clean, guest.asid, 1, 0)
            tx.set(self.caches, CACHES_WRITTEN, False)

    # --- the launch --------------------------------------------------------------------------
    def launch_update(
        self, tx: HookTx, context: int, pfns: I64, kinds: U8, rows: U8, vmpl: int = 0
    ) -> None:
        """Encrypt Pre-Guest pages, measure them and make them Guest-Valid.

        ``rows`` is what the pages hold; ``vmpl`` the masks of VMPL1 to 3 as in Rmp.vmpl.
        Differs: a SECRETS page keeps the caller's bytes (no VMPCK is made), and a CPUID page is
        taken as it is.
        """
        command = "SNP_LAUNCH_UPDATE"
        guest = self.guest(context)
        distinct(pfns)
        self._check(
            tx,
            command,
            pfns,
            self._page("context", _one(context)),
            self._page(command, pfns),
            _if((kinds < PageKind.NORMAL) | (kinds > PageKind.CPUID), "INVALID_PARAM"),
            GUEST_CODES[command][guest.state],
            _if(guest.asid == 0, "INACTIVE"),
            _if(self.rmp.asid.get(pfns) != guest.asid, "INVALID_PAGE_OWNER"),
            context=context,
        )
        digest = extend_digest(guest.digest, kinds, self.rmp.gpa.get(pfns), rows, vmpl)
        bits = self.rmp.bits.get(pfns) & ~np.uint8(IMMUTABLE) | VALIDATED
        tx.put(self.rmp.bits, pfns, bits | np.where(kinds == PageKind.VMSA, VMSA, 0))
        tx.put(self.rmp.vmpl, pfns, vmpl)
        zero = kinds == PageKind.ZERO
        tx.zero(pfns[zero], guest.key)
        tx.copy_in(pfns[~zero], guest.key, rows[~zero])
        self._store(tx, context, guest._replace(digest=digest))

    def launch_finish(self, tx: HookTx, context: int) -> bytes:
        """End the launch: the guest may run. Return its launch digest.

        Differs: the command itself returns nothing; the digest is in the attestation report.
        """
        guest = self.guest(context)
        self._command(tx, "SNP_LAUNCH_FINISH", context, _if(guest.asid == 0, "INACTIVE"))
        self._store(tx, context, guest._replace(state=RUNNING))
        return guest.digest

    # --- pages -------------------------------------------------------------------------------
    def page_move(self, tx: HookTx, context: int, src: I64, dst: I64) -> None:
        """Move guest pages: contents re-encrypted for the new address, the entry with them.

        ``src`` ends Guest-Invalid, with the guest's ASID and GPA. Source: snp.md §5. Where the
        policy is checked, and that ``src`` loses VMSA, is **[U]**.
        """
        command = "SNP_PAGE_MOVE"
        guest = self.guest(context)
        distinct(np.concatenate((src, dst)))
        asids = (self.rmp.asid.get(src) != guest.asid) | (self.rmp.asid.get(dst) != guest.asid)
        self._check(
            tx,
            command,
            src,
            self._page("context", _one(context)),
            GUEST_CODES[command][guest.state],
            _if(guest.asid == 0, "INACTIVE"),
            _if(guest.policy & POLICY_PAGE_SWAP_DISABLE, "POLICY_FAILURE"),
            self._page("SNP_PAGE_MOVE src", src),
            self._page("SNP_PAGE_MOVE dst", dst),
            _if(asids, "INVALID_PAGE_OWNER"),
            context=context,
        )
        bits = self.rmp.bits.get(src) & ~np.uint8(IMMUTABLE)
        tx.put(self.rmp.bits, dst, bits)
        tx.put(self.rmp.gpa, dst, self.rmp.gpa.get(src))
        tx.put(self.rmp.vmpl, dst, self.rmp.vmpl.get(src))
        tx.put(self.rmp.bits, src, bits & ~np.uint8(VALIDATED | VMSA))
        tx.relocate(src, dst, guest.key)

    def page_reclaim(self, tx: HookTx, pfns: I64) -> None:
        """Clear Immutable, so that RMPUPDATE may take the pages back; mutable ones succeed."""
        distinct(pfns)
        self._check(tx, "SNP_PAGE_RECLAIM", pfns, self._page("SNP_PAGE_RECLAIM", pfns))
        tx.put(self.rmp.bits, pfns, self.rmp.bits.get(pfns) & ~np.uint8(IMMUTABLE))

    # --- checks ------------------------------------------------------------------------------
    def _page(self, operand: str, pfns: I64) -> U8:
        codes: U8 = PAGE_CODES[operand][self.rmp.states(pfns)]
        return codes

    def _command(self, tx: HookTx, command: str, context: int, *codes: Any) -> None:
        """Check a command that has no page operand but the context."""
        state = GUEST_CODES[command][self.guest(context).state]
        page = _one(context)
        self._check(tx, command, page, self._page("context", page), state, *codes, context=context)

    def _check(
        self, tx: HookTx, command: str, pfns: I64, *codes: Any, context: int | None = None
    ) -> None:
        injected = injected_code(tx, command, STATUS_NAMES)
        self._refuse(command, pfns, injected, *codes, context=context)

    def _refuse(self, command: str, pfns: I64, *codes: Any, context: int | None = None) -> None:
        """Raise the first status that is not 0, of the first page that has one.

        ``codes`` are in the order of the firmware's checks: one status for the command, or one
        per page.
        """
        columns = [np.broadcast_to(np.asarray(code), pfns.shape) for code in codes]
        first = np.select([column != 0 for column in columns], columns, 0)
        bad = np.flatnonzero(first)
        if not bad.size:
            return
        code, pfn = int(first[bad[0]]), int(pfns[bad[0]])
        state = self.rmp.state_name(pfn) if pfn >= 0 else ""
        if context is not None:
            state += f", guest {GUEST_STATE_NAMES[self.guest(context).state]}"
        swap_disabled = command == "SNP_PAGE_MOVE" and code == CODE["POLICY_FAILURE"]
        raise FIRMWARE_REASONS[code](
            f"{command} of pfn {pfn:#x} ({state}) answers {STATUS_NAMES[code]}",
            page=f"pfn {pfn:#x}" if pfn >= 0 else "",
            state=state,
            rule="snp.md §9 rule 25" if swap_disabled else COMMAND_RULES[command],
            vendor_status=STATUS_NAMES[code],
            vendor_value=code,
        )

    def _store(self, tx: HookTx, context: int, guest: Guest) -> None:
        tx.set(self.guests, context, tuple(guest))


def extend_digest(digest: bytes, kinds: U8, gfns: I64, rows: U8, vmpl: int) -> bytes:
    """Fold pages into a launch digest, in order.

    The one loop over pages here: each SHA-384 takes the one before it. A VMSA is hashed without
    its TSC_SCALE and TSC_OFFSET. Source: snp.md §7 (FW; the masks in FW's order, not SSM's).
    """
    masks = vmpl.to_bytes(4, "little")[:3]
    for kind, gfn, row in zip(kinds.tolist(), gfns.tolist(), rows, strict=True):
        contents = NO_DIGEST
        if kind == PageKind.VMSA:
            row = row.copy()
            row[TSC_FIELDS] = 0
        if kind in (PageKind.NORMAL, PageKind.VMSA):
            contents = hashlib.sha384(row.tobytes()).digest()
        info = PAGE_INFO.pack(
            digest, contents, PAGE_INFO.size, kind, 0, 0, *masks, gfn << PAGE_SHIFT
        )
        digest = hashlib.sha384(info).digest()
    return digest


def _if(condition: Any, status: str) -> Any:
    """Return the status's code where ``condition`` holds, else 0."""
    return np.where(condition, CODE[status], 0)


def _one(pfn: int) -> I64:
    return np.array([pfn], dtype=np.int64)
