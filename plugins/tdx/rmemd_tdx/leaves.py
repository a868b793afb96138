"""The SEAMCALL and TDCALL leaves as functions over pages, in the module's order of checks.

Owns the state of a TD (``Td``) and of the host's pages (``Pamt``) and every rule about them. Each
leaf checks all pages before it writes any and answers for the first page that fails, as a loop of
single calls would. Written by the consumer now and by a firmware-level service later; neither has
a second way in.

Source: intel/tdx-module TDX_1.5.01, api/*.c (tdx.md §1-§3, §5, §9).
Differs: every leaf is 4K and its parent SEPT pages exist by themselves, so EPT_WALK_FAILED,
SEPT.ADD, SEPT.REMOVE, PROMOTE and DEMOTE do not occur, and any level but 0 is OPERAND_INVALID|RCX
(ACCEPT takes level 1). TDR, TDCS, TDVPS and SEPT pages cost no frames. One call takes a lock once
for all of its pages, so an injected status meets the batch and not one page in it.
"""

from __future__ import annotations

import hashlib

import numpy as np
from msgspec import Struct, field

from rmemd.errors import BAD_REQUEST
from rmemd.hooks import Dense, HookTx, Records, Sparse
from rmemd.units import I64, PAGE_SHIFT, PAGE_SIZE, PMD_PAGES, U8, Bools
from rmemd_tdx import tables as t

CHUNK_BYTES = 256
LOCK_OPERAND = {
    "TDH_MEM_PAGE_ADD": "RDX", "TDH_MR_EXTEND": "RDX", "TDH_MR_FINALIZE": "RCX",
    "TDH_MEM_TRACK": "TD_EPOCH", "TDH_PHYMEM_PAGE_WBINVD": "RCX", "TDG_MEM_PAGE_ACCEPT": "RCX",
    "TDH_MNG_CREATE": "KOT", "TDH_MNG_KEY_CONFIG": "KET",
}  # fmt: skip
# these hold TDR exclusively, and so meet contention before they look at the TD's state
LOCKS_TDR = frozenset({"TDH_MEM_PAGE_ADD", "TDH_MR_EXTEND", "TDH_MR_FINALIZE"})
# the leaves that pass an injection point of their name
POINTS = (
    "TDH_MNG_CREATE", "TDH_MNG_KEY_CONFIG", "TDH_VP_ENTER", "TDH_MEM_PAGE_ADD", "TDH_MR_EXTEND",
    "TDH_MR_FINALIZE", "TDH_MEM_PAGE_AUG", "TDG_MEM_PAGE_ACCEPT", "TDH_MEM_RD", "TDH_MEM_WR",
    "TDH_MEM_RANGE_BLOCK", "TDH_MEM_RANGE_UNBLOCK", "TDH_MEM_TRACK", "TDH_MEM_PAGE_REMOVE",
    "TDH_MEM_PAGE_RELOCATE", "TDH_PHYMEM_PAGE_WBINVD",
)  # fmt: skip
NO_PAGES = np.empty(0, dtype=np.int64)


class Pamt(Struct, frozen=True):
    """Per-frame arrays: the PAMT entry, and whether a page taken from a TD still needs its reset.

    Attributes:
        page_type: PT_NDA or PT_REG.
        owner: the owning TD (0: none); the VM's number stands for the TDR's address.
        bepoch: TD_EPOCH when the page was blocked.
        unreset: 1 from REMOVE, RELOCATE or RECLAIM until the full-line write.
    """

    page_type: Dense
    owner: Dense
    bepoch: Dense
    unreset: Dense

    def unreturnable(self, pfns: I64) -> Bools:
        """Return which frames the host must not use: a TD has them, or they were not reset."""
        held: Bools = (self.page_type.get(pfns) != t.PT_NDA) | (self.unreset.get(pfns) != 0)
        return held


class Streams(dict[bytes, "hashlib._Hash"]):
    """The running SHA-384 contexts of one TD, by their digest so far.

    A cache and no state: a context cannot be journalled, so the table keeps the digest, which also
    says which context an undone transaction falls back to. Each TD has its own; a consumer that
    takes over from one of the same platform finds it there, and a process that has none makes it
    again (``measurement.resume``).
    """


class Td(Struct, frozen=True):
    """One TD: its control structure fields, its secure EPT, and the vCPUs that are inside.

    Attributes:
        vm: the VM's number.
        fields: TDR and TDCS fields by name, and what KVM itself remembers about the VM.
        inside: vCPU -> the TD_EPOCH that it entered in.
        sept: state code by gfn.
        hpa: frame by gfn, where the state has one.
        order: by gfn, ``turn << 1 | whether its bytes were measured``: the page's turn to go into
            MRTD, from 1; 0 for pages that did not.
        pamt: the host's frames.
        streams: what its measurement goes on from.
    """

    vm: int
    fields: Records
    inside: Records
    sept: Sparse
    hpa: Sparse
    order: Sparse
    pamt: Pamt
    streams: Streams = field(default_factory=Streams)

    def tracked(self, pfns: I64) -> Bools:
        """Return for which blocked pages no vCPU can hold a translation any more (tdx.md §3)."""
        bepochs, last = self.pamt.bepoch.get(pfns), self.fields["TD_EPOCH"] - 1
        drained = self.fields[f"REFCOUNT{last & 1}"] == 0
        # bit 63 (blocked for live migration) makes a BEPOCH larger than any epoch: not tracked
        done: Bools = (bepochs < last) | ((bepochs == last) & drained)
        return done


class Check(Struct, frozen=True):
    """One check of a leaf: the pages that fail it, with which status and by which rule."""

    failed: Bools
    status: str
    rule: str


class Accepted(Struct, frozen=True):
    """What ACCEPT came to: pages done, then the status of the next one, or its TD exit."""

    done: int
    status: str = "TDX_SUCCESS"
    td_exit: bool = False


def _require(td: Td, leaf: str, gfns: I64, *checks: Check) -> None:
    failed = np.logical_or.reduce([check.failed for check in checks])
    if not failed.any():
        return
    page = int(failed.argmax())
    check = next(check for check in checks if check.failed[page])
    gfn = int(gfns[page])
    state = t.STATES[td.sept.at(gfn)]
    raise t.refusal(leaf, check.status, check.rule, page=f"gfn {gfn:#x}", state=state)


def contend(tx: HookTx, leaf: str) -> None:
    """Fail as a fault rule says: where the leaf takes its lock, with that lock's operand."""
    status = tx.injected(leaf)
    if status == "TDX_OPERAND_BUSY":
        status = f"{status}|{LOCK_OPERAND.get(leaf, 'SEPT_TREE')}"
    if status:
        raise t.refusal(leaf, status, "tdx.md §9 rule 24", state="injected")


def _common_checks(tx: HookTx, td: Td, leaf: str, gfns: I64 = NO_PAGES, level: int = 0) -> None:
    """Check what every TD-scoped leaf checks first, in the order of tdx.md §1."""
    if leaf in LOCKS_TDR:
        contend(tx, leaf)
    op_state = td.fields["OP_STATE"]
    if td.fields["FATAL"]:
        raise t.refusal(leaf, "TDX_TD_FATAL", "tdx.md §1, §9 rule 19", state="FATAL")
    if (lifecycle := td.fields["LIFECYCLE_STATE"]) != "TD_KEYS_CONFIGURED":
        raise t.refusal(leaf, "TDX_TD_KEYS_NOT_CONFIGURED", "tdx.md §1", state=lifecycle)
    if op_state not in t.OP_ALLOW[leaf]:
        raise t.refusal(leaf, "TDX_OP_STATE_INCORRECT", "tdx.md §9 rule 2", state=op_state)
    if repeated(gfns).any():
        raise BAD_REQUEST(f"{leaf}: a page is named twice", field="gfns")
    _require(td, leaf, gfns, _bad_gpa((gfns << PAGE_SHIFT) + (level != 0)))
    if leaf not in LOCKS_TDR:
        contend(tx, leaf)


def repeated(numbers: I64) -> Bools:
    """Return which entries name a page that an earlier entry named."""
    again = np.zeros(numbers.size, dtype=np.bool_)
    if numbers.size > 1 and not (np.diff(numbers) > 0).all():
        again[:] = True
        again[np.unique(numbers, return_index=True)[1]] = False
    return again


def _bad_gpa(gpas: I64, alignment: int = PAGE_SIZE) -> Check:
    """Return which GPAs are shared, beyond the guest's width, or not aligned.

    A level that a leaf does not take arrives in the low bits, as in the module's operand.
    """
    bad = (gpas % alignment != 0) | (gpas < 0) | (gpas >= t.PRIVATE_GFNS << PAGE_SHIFT)
    return Check(bad, "TDX_OPERAND_INVALID|RCX", "tdx.md §1, §9 rules 3, 17")


def _wrong_state(leaf: str, states: U8, rule: str) -> Check:
    return Check(~t.ALLOW[leaf][states], "TDX_EPT_ENTRY_STATE_INCORRECT|RCX", rule)


def _not_free(td: Td, pfns: I64) -> Check:
    taken = (td.pamt.page_type.get(pfns) != t.PT_NDA) | repeated(pfns)
    return Check(taken, "TDX_PAGE_METADATA_INCORRECT|R8", "tdx.md §9 rule 1")


def _untracked(td: Td, states: U8, pfns: I64, operand: str = "RCX") -> tuple[Check, Check]:
    """Return the blocked and the tracked check, which only a TD that may be running demands."""
    due = t.MUST_TRACK[states] & (td.fields["OP_STATE"] in t.OP_MUST_TRACK)
    blocked = t.ANY_BLOCKED[states]
    return (
        Check(due & ~blocked, "TDX_GPA_RANGE_NOT_BLOCKED|RCX", "tdx.md §3, §9 rule 10"),
        Check(
            due & blocked & ~td.tracked(pfns),
            f"TDX_TLB_TRACKING_NOT_DONE|{operand}",
            "tdx.md §3, §9 rules 11, 12, 15",
        ),
    )


def _give(tx: HookTx, td: Td, pfns: I64) -> None:
    tx.put(td.pamt.page_type, pfns, t.PT_REG)
    tx.put(td.pamt.owner, pfns, td.vm)
    tx.put(td.pamt.bepoch, pfns, 0)


def _take(tx: HookTx, pamt: Pamt, pfns: I64) -> None:
    tx.put(pamt.page_type, pfns, t.PT_NDA)
    tx.put(pamt.owner, pfns, 0)
    tx.put(pamt.unreset, pfns, 1)


# --- pages in -------------------------------------------------------------------------------------
def add(tx: HookTx, td: Td, gfns: I64, pfns: I64, level: int = 0) -> None:
    """TDH.MEM.PAGE.ADD: enter initial pages; the caller copies the bytes and measures them."""
    _enter_pages(tx, td, "TDH_MEM_PAGE_ADD", gfns, pfns, level, t.MAPPED)


def aug(tx: HookTx, td: Td, gfns: I64, pfns: I64, level: int = 0) -> None:
    """TDH.MEM.PAGE.AUG: enter pages that the guest must accept; their bytes are not touched."""
    _enter_pages(tx, td, "TDH_MEM_PAGE_AUG", gfns, pfns, level, t.PENDING)


def _enter_pages(
    tx: HookTx, td: Td, leaf: str, gfns: I64, pfns: I64, level: int, state: int
) -> None:
    _common_checks(tx, td, leaf, gfns, level)
    wrong = _wrong_state(leaf, td.sept.get(gfns), "tdx.md §9 rule 6")
    _require(td, leaf, gfns, wrong, _not_free(td, pfns))
    tx.put(td.sept, gfns, state)
    tx.put(td.hpa, gfns, pfns)
    _give(tx, td, pfns)


def accept(tx: HookTx, td: Td, gfns: I64, level: int) -> Accepted:
    """TDG.MEM.PAGE.ACCEPT of consecutive pages, until one does not succeed.

    Source: td_dispatcher/vm_exits/tdg_mem_page_accept.c (tdx.md §2, §9 rules 8, 9).
    Differs: a 2M entry counts as a SEPT page exactly while one of its 512 children is in use;
    Linux keeps the SEPT page of a range that it has zapped.
    """
    leaf, first = "TDG_MEM_PAGE_ACCEPT", int(gfns[0])
    if level not in (0, 1) or first % PMD_PAGES**level or int(gfns[-1]) >= t.PRIVATE_GFNS:
        return Accepted(0, "TDX_OPERAND_INVALID|RCX")
    if status := tx.injected(leaf):
        return Accepted(0, f"{status}|RCX" if status == "TDX_OPERAND_BUSY" else status)
    if level == 1:
        if td.sept.equals(first, PMD_PAGES, t.FREE):
            return Accepted(0, td_exit=True)
        return Accepted(0, "TDX_PAGE_SIZE_MISMATCH|1")
    states = td.sept.get(gfns)
    refused = np.append(~t.ALLOW[leaf][states], True)
    done = int(refused.argmax())
    tx.put(td.sept, gfns[:done], t.ACCEPTS[states[:done]])
    tx.zero(td.hpa.get(gfns[:done]), td.fields["KEY"])
    if done == gfns.size:
        return Accepted(done)
    if t.READABLE[states[done]]:
        return Accepted(done, "TDX_PAGE_ALREADY_ACCEPTED|0")
    if states[done] == t.REMOVED:
        return Accepted(done, "TDX_PAGE_SIZE_MISMATCH|0")
    return Accepted(done, td_exit=True)


# --- pages out ------------------------------------------------------------------------------------
def block(tx: HookTx, td: Td, gfns: I64, level: int = 0) -> None:
    """TDH.MEM.RANGE.BLOCK: take the permissions away and stamp the epoch of doing so."""
    leaf = "TDH_MEM_RANGE_BLOCK"
    _common_checks(tx, td, leaf, gfns, level)
    states = td.sept.get(gfns)
    already = Check(t.ANY_BLOCKED[states], "TDX_GPA_RANGE_ALREADY_BLOCKED|RCX", "tdx.md §9 rule 14")
    _require(td, leaf, gfns, already, _wrong_state(leaf, states, "tdx.md §2"))
    tx.put(td.sept, gfns, t.BLOCKS[states])
    tx.put(td.pamt.bepoch, td.hpa.get(gfns), td.fields["TD_EPOCH"])


def track(tx: HookTx, td: Td) -> None:
    """TDH.MEM.TRACK: begin a new epoch, unless a vCPU is inside from the one before."""
    leaf = "TDH_MEM_TRACK"
    _common_checks(tx, td, leaf)
    epoch = td.fields["TD_EPOCH"]
    if td.fields[f"REFCOUNT{1 - (epoch & 1)}"]:
        raise t.refusal(leaf, "TDX_PREVIOUS_TLB_EPOCH_BUSY", "tdx.md §9 rule 13", state="inside")
    tx.set(td.fields, "TD_EPOCH", epoch + 1)


def unblock(tx: HookTx, td: Td, gfns: I64, level: int = 0) -> None:
    """TDH.MEM.RANGE.UNBLOCK: give the permissions back; the content was never touched."""
    leaf = "TDH_MEM_RANGE_UNBLOCK"
    _common_checks(tx, td, leaf, gfns, level)
    states = td.sept.get(gfns)
    _, untracked = _untracked(td, states, td.hpa.get(gfns), "SEPT_TREE")
    _require(td, leaf, gfns, _wrong_state(leaf, states, "tdx.md §9 rule 15"), untracked)
    tx.put(td.sept, gfns, t.UNBLOCKS[states])


def remove(tx: HookTx, td: Td, gfns: I64, level: int = 0) -> I64:
    """TDH.MEM.PAGE.REMOVE: free the entries and return their frames, which nobody has reset."""
    leaf = "TDH_MEM_PAGE_REMOVE"
    _common_checks(tx, td, leaf, gfns, level)
    states, pfns = td.sept.get(gfns), td.hpa.get(gfns)
    wrong = _wrong_state(leaf, states, "tdx.md §2")
    _require(td, leaf, gfns, wrong, *_untracked(td, states, pfns))
    tx.put(td.sept, gfns, t.REMOVED if td.fields["OP_STATE"] in t.OP_IMPORTS else t.FREE)
    tx.put(td.hpa, gfns, 0)
    _take(tx, td.pamt, pfns)
    return pfns


def relocate(tx: HookTx, td: Td, gfns: I64, dst: I64, level: int = 0) -> I64:
    """TDH.MEM.PAGE.RELOCATE: move pages under the TD's key, unblock them, return the old frames.

    A page that was never accepted has no content to move, and is not copied.
    Source: api/tdh_mem_page_relocate.c (tdx.md §5, §9 rule 16).
    """
    leaf = "TDH_MEM_PAGE_RELOCATE"
    _common_checks(tx, td, leaf, gfns, level)
    states, src = td.sept.get(gfns), td.hpa.get(gfns)
    wrong = _wrong_state(leaf, states, "tdx.md §2")
    same = Check(src == dst, "TDX_OPERAND_INVALID|R8", "tdx.md §9 rule 16")
    _require(td, leaf, gfns, wrong, same, *_untracked(td, states, src), _not_free(td, dst))
    has_content = ~t.ANY_PENDING[states]
    tx.relocate(src[has_content], dst[has_content], td.fields["KEY"])
    tx.put(td.sept, gfns, t.UNBLOCKS[states])
    tx.put(td.hpa, gfns, dst)
    _take(tx, td.pamt, src)
    _give(tx, td, dst)
    return src


def wbinvd(tx: HookTx, td: Td, pfns: I64) -> None:
    """TDH.PHYMEM.PAGE.WBINVD: flush the lines of pages that no TD has any more."""
    leaf = "TDH_PHYMEM_PAGE_WBINVD"
    contend(tx, leaf)
    held = td.pamt.page_type.get(pfns) != t.PT_NDA
    if held.any():
        page = f"pfn {int(pfns[held][0]):#x}"
        status = "TDX_PAGE_METADATA_INCORRECT|RCX"
        raise t.refusal(leaf, status, "tdx.md §9 rule 21", page=page, state="PT_REG")


def reset(tx: HookTx, pamt: Pamt, pfns: I64) -> None:
    """Write whole lines over pages taken from a TD (MOVDIR64B: clears owner and poison)."""
    tx.scrub(pfns)
    tx.put(pamt.unreset, pfns, 0)


# --- measurement ----------------------------------------------------------------------------------
def extend(tx: HookTx, td: Td, gpas: I64) -> None:
    """TDH.MR.EXTEND: check the chunks at ``gpas``, in bytes; the caller measures them."""
    leaf = "TDH_MR_EXTEND"
    _common_checks(tx, td, leaf)
    gfns = gpas >> PAGE_SHIFT
    absent = Check(
        ~t.ALLOW[leaf][td.sept.get(gfns)], "TDX_EPT_ENTRY_NOT_PRESENT|RCX", "tdx.md §9 rule 3"
    )
    _require(td, leaf, gfns, _bad_gpa(gpas, CHUNK_BYTES), absent)


def finalize(tx: HookTx, td: Td) -> bytes:
    """TDH.MR.FINALIZE: close MRTD and let the TD run."""
    leaf = "TDH_MR_FINALIZE"
    _common_checks(tx, td, leaf)
    if tx.vcpu_count == 0:
        raise t.refusal(leaf, "TDX_NO_VCPUS", "tdx.md §9 rule 4", state="INITIALIZED")
    tx.set(td.fields, "OP_STATE", "RUNNABLE")
    mrtd: bytes = td.fields["MRTD"]
    return mrtd


# --- vCPUs and debugging --------------------------------------------------------------------------
def vp_enter(tx: HookTx, td: Td, vcpu: int) -> None:
    """TDH.VP.ENTER: count the vCPU into the present epoch."""
    leaf = "TDH_VP_ENTER"
    if vcpu in td.inside:
        raise t.refusal(leaf, "TDX_OPERAND_BUSY|RCX", "tdx.md §1", state="inside")
    _common_checks(tx, td, leaf)
    epoch = td.fields["TD_EPOCH"]
    _count(tx, td, epoch, 1)
    tx.set(td.inside, vcpu, epoch)


def td_exit(tx: HookTx, td: Td, vcpu: int) -> None:
    """A TD exit: count the vCPU out of the epoch that it entered in."""
    _count(tx, td, td.inside[vcpu], -1)
    tx.drop(td.inside, vcpu)


def _count(tx: HookTx, td: Td, epoch: int, by: int) -> None:
    name = f"REFCOUNT{epoch & 1}"
    tx.set(td.fields, name, td.fields[name] + by)


def mem_rd_wr(tx: HookTx, td: Td, gfns: I64, write: bool) -> I64:
    """TDH.MEM.RD and TDH.MEM.WR: return the frames of pages that the host may peek or poke.

    Source: api/tdh_mem_rd_wr.c (tdx.md §2): debug TDs only.
    Differs: KVM creates no debug TDs.
    """
    leaf = "TDH_MEM_WR" if write else "TDH_MEM_RD"
    _common_checks(tx, td, leaf)
    if not td.fields["DEBUG"]:
        raise t.refusal(leaf, "TDX_TD_NON_DEBUG", "tdx.md §2", state="DEBUG=0")
    states = td.sept.get(gfns)
    absent = Check(~t.READABLE[states], "TDX_EPT_ENTRY_NOT_PRESENT|RCX", "tdx.md §2")
    wrong = _wrong_state(leaf, states, "tdx.md §2")
    _require(td, leaf, gfns, _bad_gpa(gfns << PAGE_SHIFT), absent, wrong)
    pfns: I64 = td.hpa.get(gfns)
    return pfns


# --- keys -----------------------------------------------------------------------------------------
def create(tx: HookTx, kot: Records, vm: int, hkid: int) -> None:
    """TDH.MNG.CREATE and KEY.CONFIG: take a free HKID, with a fresh key."""
    contend(tx, "TDH_MNG_CREATE")
    if hkid in kot:
        raise t.refusal(
            "TDH_MNG_CREATE", "TDX_HKID_NOT_FREE", "tdx.md §9 rule 25", state="ASSIGNED"
        )
    contend(tx, "TDH_MNG_KEY_CONFIG")
    tx.set(kot, hkid, vm)


def teardown(tx: HookTx, td: Td, kot: Records) -> None:
    """VPFLUSHDONE, PHYMEM.CACHE.WB, KEY.FREEID, and RECLAIM of every page that the TD still has.

    RECLAIM never looks at FATAL, so a TD that is lost gives its pages back here.
    Differs: the packages' caches are written back in this one step; a page whose removal failed
    is out of KVM's sight and stays with the TD for ever, here its PAMT entry is cleared too (the
    frame itself was leaked when it was freed).
    """
    if len(td.inside):
        leaf = "TDH_MNG_VPFLUSHDONE"
        raise t.refusal(leaf, "TDX_FLUSHVP_NOT_DONE", "tdx.md §9 rule 22", state="inside")
    tx.set(td.fields, "LIFECYCLE_STATE", "TD_TEARDOWN")
    tx.drop(kot, td.fields["HKID"])
    pfns = td.pamt.owner.where(td.vm)
    _take(tx, td.pamt, pfns)
    reset(tx, td.pamt, pfns)
