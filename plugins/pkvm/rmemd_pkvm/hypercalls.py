"""EL2: who owns each frame, who may reach it, and the hypercalls that change that.

Owns every table of the platform. The arrays by frame transpose ``struct hyp_page`` and the host's
stage-2; one sparse array holds the leaves of all guests, because EL2 goes from a frame to its
guest's leaf (the annotation names VM and gfn) and poisons it. Calls have the names of the
hypercalls, less ``__pkvm_``; what each asks and does is a row of ``states.TRANSITIONS``.

Differs: a range is checked whole before anything is written, and a request that names a page
twice is -EINVAL (a hypercall takes a range, which cannot). Page tables cost nothing, so -ENOMEM
comes only injected, at the point "__pkvm_host_donate_guest". Blocks (so -E2BIG), FF-A and the
permission calls of non-protected guests are absent; RAM is one region.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from rmemd.errors import Reason, RmemError
from rmemd.hooks import HookTx, HostContext
from rmemd.units import I64, Bools, distinct
from rmemd_pkvm.reasons import (
    PKVM_INVALID,
    PKVM_NO_MEMORY,
    PKVM_WRONG_STATE,
    REASON_OF_ERRNO,
    number_of,
    spelt,
)
from rmemd_pkvm.states import (
    FULL,
    NO,
    NOPAGE,
    OWNED,
    POISON,
    SHARED_OWNED,
    SOME,
    TRANSITIONS,
    YES,
    ZERO,
    Owner,
)

HANDLE_OFFSET = 0x1000
MAX_PVMS = 255
REFCOUNT_MAX = (1 << 16) - 1
SHARES_MAX = (1 << 32) - 1

# A donated page's leaf in the host's stage-2: type in 63:60, extra in 59:4, owner in 3:1, invalid
# (0). A guest's extra is its VM's handle (16 bits) below the gfn (40 bits). Source: pkvm.md §1.
DONATION = 2 << 60
GFN_SHIFT, HANDLE_SHIFT, OWNER_SHIFT = 20, 4, 1
GFN_BITS, GFN_MASK, HANDLE_MASK, OWNER_MASK = 40, (1 << 40) - 1, 0xFFFF, 0x7
# a guest's leaf as it is kept here: the frame above its state
STATE_BITS, STATE_MASK = 3, 0x7


class HypVm(NamedTuple):
    """struct pkvm_hyp_vm, as far as memory goes; kept as a plain tuple, which outlives a reload.

    Attributes:
        protected: whether memory is donated to it, or else shared with it.
        loaded: the vCPUs that are loaded; each is a reference.
        ran: whether a vCPU was ever loaded.
        dying: whether teardown has started.
    """

    protected: bool
    loaded: tuple[int, ...] = ()
    ran: bool = False
    dying: bool = False


class Pages(Struct, frozen=True):
    """The pages of a request: frames, and the indices of a guest's leaves (else empty)."""

    pfns: I64
    leaves: I64

    def where(self, chosen: Bools | slice) -> Pages:
        """Return some of the pages."""
        return Pages(self.pfns[chosen], self.leaves[chosen] if self.leaves.size else self.leaves)


def frames(pfns: I64) -> Pages:
    """Return frames that no guest is concerned with."""
    return Pages(pfns, np.empty(0, dtype=np.int64))


def refusal(
    reason: Reason, message: str, number: int, page: str, state: str, rule: str
) -> RmemError:
    """Build a refusal that carries EL2's negative errno."""
    return reason(
        message, errno=-number, page=page, state=state, rule=rule,
        vendor_status=spelt(number), vendor_value=number,
    )  # fmt: skip


class El2:
    """The hypervisor of one host."""

    def __init__(self, host: HostContext) -> None:
        self._nframes = host.nframes
        self._host = host.dense("host_state")
        # few frames are ever the hypervisor's, and an array of a fill costs its whole length
        self._hyp = host.sparse("hyp_state", fill=NOPAGE)
        self._annotation = host.dense("annotation", dtype="i8")
        self._refcount = host.dense("hyp_refcount", dtype="u2")
        self._shares = host.dense("host_share_guest_count", dtype="u4")
        self._guest_s2 = host.sparse("guest_s2", "i8", NOPAGE)
        self._vms = host.records("vms")

    # --- reading -----------------------------------------------------------------------------
    def host_states(self, pfns: I64) -> I64:
        """Return the host's state of each frame."""
        return self._host.get(pfns).astype(np.int64)

    def guest_states(self, handle: int, gfns: I64) -> I64:
        """Return the state of each of a guest's leaves."""
        return np.asarray(self._guest_s2.get(_leaves(handle, gfns)) & STATE_MASK)

    def guest_pfns(self, handle: int, gfns: I64) -> I64:
        """Return the frame of each of a guest's leaves, -1 where it is not valid."""
        return self._frames_of(_leaves(handle, gfns))

    def mapped_gfns(self, handle: int) -> I64:
        """Return the gfns at which a guest has a leaf, or poison."""
        base = (handle - HANDLE_OFFSET) << GFN_BITS
        return self._guest_s2.touched(base, 1 << GFN_BITS) - base

    def pages_of(self, handle: int, gfns: I64) -> Pages:
        """Return a guest's pages with the frames that its leaves name."""
        leaves = _leaves(handle, gfns)
        return Pages(self._frames_of(leaves), leaves)

    def has_run(self, handle: int) -> bool:
        """Return whether a vCPU of the VM was ever loaded."""
        return self._vm(handle).ran

    # --- VMs -----------------------------------------------------------------------------------
    def init_vm(self, tx: HookTx, protected: bool) -> int:
        """Enter a VM in the table and return its handle."""
        free = [h for h in range(HANDLE_OFFSET, HANDLE_OFFSET + MAX_PVMS) if h not in self._vms]
        if not free:
            raise refusal(
                PKVM_NO_MEMORY, f"EL2 has {MAX_PVMS} VMs already", -errno.ENOMEM,
                "", "VM table full", "nvhe/pkvm.c, insert_vm_table_entry",
            )  # fmt: skip
        self._store(tx, free[0], HypVm(protected))
        return free[0]

    def vcpu_load(self, tx: HookTx, handle: int, vcpu: int) -> None:
        """Load a vCPU, which is a reference to its VM; a dying VM has none to give."""
        vm = self._vm(handle)
        _require(not vm.dying, handle, "dying", 15)
        loaded = tuple(sorted({*vm.loaded, vcpu}))
        self._store(tx, handle, vm._replace(loaded=loaded, ran=True))

    def vcpu_put(self, tx: HookTx, handle: int, vcpu: int) -> None:
        """Put a loaded vCPU."""
        vm = self._vm(handle)
        loaded = tuple(other for other in vm.loaded if other != vcpu)
        self._store(tx, handle, vm._replace(loaded=loaded))

    def start_teardown_vm(self, tx: HookTx, handle: int) -> None:
        """Mark a VM as dying; -EINVAL the second time, and while a vCPU is loaded."""
        vm = self._vm(handle)
        _require(not vm.dying, handle, "dying", 15)
        _require(not vm.loaded, handle, "a vCPU is loaded", 15)
        self._store(tx, handle, vm._replace(dying=True))

    def finalize_teardown_vm(self, tx: HookTx, handle: int) -> None:
        """Take a dying VM out of the table."""
        _require(self._vm(handle).dying, handle, "not dying", 15)
        tx.drop(self._vms, handle)

    # --- hypercalls on memory ------------------------------------------------------------------
    def call(self, tx: HookTx, name: str, pages: Pages) -> None:
        """Make a transition of ``TRANSITIONS`` on all the pages, or refuse it on the first bad one.

        The host's calls about the hypervisor and the guest's calls need no more than this.
        """
        verdicts = self.judge(tx, name, pages)
        bad = np.flatnonzero(verdicts)
        if bad.size:
            first = int(bad[0])
            raise self._refused(name, pages.where(slice(first, first + 1)), int(verdicts[first]))
        self.apply(tx, name, pages)

    def host_share_guest(self, tx: HookTx, handle: int, pfns: I64, gfns: I64) -> None:
        """Share the host's frames with a non-protected guest; each share is counted."""
        vm = self._vm(handle)
        _require(bool(vm.loaded), handle, "no vCPU is loaded", 3)
        _require(not vm.protected, handle, "protected", 3)
        self.call(tx, "host_share_guest", Pages(pfns, _leaves(handle, gfns)))

    def host_unshare_guest(self, tx: HookTx, handle: int, gfns: I64) -> None:
        """Take shares back; a frame is the host's alone after its last one."""
        _require(not self._vm(handle).protected, handle, "protected", 3)
        pages = self.pages_of(handle, gfns)
        self.call(tx, "host_unshare_guest", pages)
        tx.put(self._host, pages.pfns[self._shares.get(pages.pfns) == 0], OWNED)

    def host_donate_guest(
        self, tx: HookTx, handle: int, pfns: I64, gfns: I64, *, in_fault: bool = False
    ) -> None:
        """Give the host's frames to a protected guest.

        ``in_fault`` says that KVM's fault handler calls, which has the faulting vCPU loaded.
        """
        vm = self._vm(handle)
        _require(in_fault or bool(vm.loaded), handle, "no vCPU is loaded", 3)
        _require(vm.protected, handle, "not protected", 3)
        self.call(tx, "host_donate_guest", Pages(pfns, _leaves(handle, gfns)))

    def host_force_reclaim_page_guest(self, tx: HookTx, pfns: I64) -> I64:
        """Take guests' frames by force, each by itself; the caller names the zeroing.

        Returns a negative errno per frame, 0 where the leaf is poison now and the frame the host's.
        """
        name = "host_force_reclaim_page_guest"
        annotation = self._annotation.get(pfns)
        slots = ((annotation >> HANDLE_SHIFT) & HANDLE_MASK) - HANDLE_OFFSET
        leaves = (slots << GFN_BITS) | ((annotation >> GFN_SHIFT) & GFN_MASK)
        # an owner that is no guest names no leaf, and is refused before the leaf is asked
        pages = Pages(pfns, np.where(slots >= 0, leaves, -1))
        verdicts = self.judge(tx, name, pages)
        self.apply(tx, name, pages.where(verdicts == 0))
        return verdicts

    def host_reclaim_page_guest(self, tx: HookTx, handle: int, gfns: I64) -> None:
        """Take a guest's pages back at its end.

        What the guest owned is cleared first; what it shared comes back as it is; poison is only
        forgotten, since its frame is the host's already.
        """
        pages = self.pages_of(handle, gfns)
        states = self.guest_states(handle, gfns)
        tx.scrub(pages.pfns[states == OWNED])
        poison = states == POISON
        tx.put(self._guest_s2, pages.leaves[poison], NOPAGE)
        self.call(tx, "host_reclaim_page_guest", pages.where(~poison))

    def reclaim_dying_guest_page(self, tx: HookTx, handle: int, gfns: I64) -> None:
        """Reclaim pages of a VM whose teardown has started; -EINVAL before."""
        _require(self._vm(handle).dying, handle, "not dying", 15)
        self.host_reclaim_page_guest(tx, handle, gfns)

    def host_move_guest(self, tx: HookTx, handle: int, gfns: I64, dst: I64) -> None:
        """Move a guest's pages to the host's frames ``dst``; the caller names the copy.

        Differs: no upstream has this hypercall. It is the design of pkvm.md §8 rule 23: under
        EL2's locks both annotations change hands and the old frame returns to the host cleared.
        """
        src = self.guest_pfns(handle, gfns)
        self.call(tx, "host_move_guest", Pages(dst, _leaves(handle, gfns)))
        tx.put(self._host, src, OWNED)
        tx.put(self._annotation, src, 0)
        tx.scrub(src)

    # --- the table, applied ----------------------------------------------------------------------
    def judge(self, tx: HookTx, name: str, pages: Pages) -> I64:
        """Return a negative errno per page, of the first check that it fails, or 0."""
        for numbers, what in ((pages.pfns, "frame"), (pages.leaves, "gfn")):
            valid = numbers[numbers >= 0]
            if valid.size > 1 and distinct(valid).size != valid.size:
                raise refusal(
                    PKVM_INVALID, f"{name}: a {what} is named twice", -errno.EINVAL,
                    "", "named twice", "pkvm.md §8 rule 5",
                )  # fmt: skip
        if (pages.pfns >= self._nframes).any():
            raise refusal(
                PKVM_WRONG_STATE, f"{name}: a frame is not RAM", -errno.EPERM,
                f"pfn {int(pages.pfns.max()):#x}", "not RAM", "pkvm.md §8 rule 6",
            )  # fmt: skip
        injected = tx.injected(f"__pkvm_{name}")
        if injected:
            return np.full(pages.pfns.size, number_of(injected), dtype=np.int64)
        verdicts = np.zeros(pages.pfns.size, dtype=np.int64)
        for check in TRANSITIONS[name].checks:
            errnos = check.errnos[self._codes(check.component, pages)]
            verdicts = np.where(verdicts, verdicts, errnos)
        return verdicts

    def apply(self, tx: HookTx, name: str, pages: Pages) -> None:
        """Make a transition on pages that were judged."""
        change = TRANSITIONS[name]
        if change.host is not None:
            tx.put(self._host, pages.pfns, change.host)
        if change.hyp is not None:
            tx.put(self._hyp, pages.pfns, change.hyp)
        if change.owner is not None:
            tx.put(self._annotation, pages.pfns, _annotation(change.owner, pages.leaves))
        if change.guest is not None:
            valid = change.guest not in (NOPAGE, POISON)
            leaves = (pages.pfns << STATE_BITS | change.guest) if valid else change.guest
            tx.put(self._guest_s2, pages.leaves, leaves)
        if change.pins:
            counts = self._refcount.get(pages.pfns).astype(np.int64)
            tx.put(self._refcount, pages.pfns, counts + change.pins)
        if change.shares:
            counts = self._shares.get(pages.pfns).astype(np.int64)
            tx.put(self._shares, pages.pfns, counts + change.shares)

    def _codes(self, component: str, pages: Pages) -> I64:
        """Answer a check's question with a code per page."""
        if component == "guest":
            return np.asarray(self._guest_s2.get(pages.leaves) & STATE_MASK)
        if component == "vm":
            slots = [handle - HANDLE_OFFSET for handle, _ in self._vms.items()]
            return np.where(np.isin(pages.leaves >> GFN_BITS, slots), YES, NO)
        # an invalid leaf names no frame, but its own check has refused it before the frame's
        pfns = np.maximum(pages.pfns, 0)
        if component == "host":
            return self.host_states(pfns)
        if component == "hyp":
            return self._hyp.get(pfns).astype(np.int64)
        if component == "owner":
            return np.asarray((self._annotation.get(pfns) >> OWNER_SHIFT) & OWNER_MASK)
        if component == "pins":
            return _count_codes(self._refcount.get(pfns), REFCOUNT_MAX)
        counts = _count_codes(self._shares.get(pfns), SHARES_MAX)
        return np.where(self._host.get(pfns) == SHARED_OWNED, counts, SOME)

    def _refused(self, name: str, page: Pages, number: int) -> RmemError:
        where = f"pfn {int(page.pfns[0]):#x}" if page.pfns[0] >= 0 else ""
        if page.leaves.size:
            where = f"gfn {int(page.leaves[0]) & GFN_MASK:#x} {where}".rstrip()
        state, rule = "injected", "a fault rule"
        for check in TRANSITIONS[name].checks:
            code = int(self._codes(check.component, page)[0])
            if check.errnos[code] == number:
                state = f"{check.component} {check.names[code]}"
                rule = f"pkvm.md §8 rule {check.rule}"
                break
        message = f"__pkvm_{name}: {where} is {state}"
        reason = REASON_OF_ERRNO.get(-number, PKVM_WRONG_STATE)
        return refusal(reason, message, number, where, state, rule)

    def _frames_of(self, leaves: I64) -> I64:
        entries = self._guest_s2.get(leaves)
        return np.where(is_valid(entries & STATE_MASK), entries >> STATE_BITS, -1)

    def _vm(self, handle: int) -> HypVm:
        _require(handle in self._vms, handle, "unknown", 15)
        return HypVm(*self._vms[handle])

    def _store(self, tx: HookTx, handle: int, vm: HypVm) -> None:
        tx.set(self._vms, handle, tuple(vm))


def is_valid(states: I64) -> Bools:
    """Return which guest leaves map a frame."""
    return np.asarray((states != NOPAGE) & (states != POISON))


def _leaves(handle: int, gfns: I64) -> I64:
    return gfns | (handle - HANDLE_OFFSET) << GFN_BITS


def _annotation(owner: Owner, leaves: I64) -> I64 | int:
    """Return the host leaf of frames that ``owner`` has; the host's own is no annotation."""
    if owner is Owner.HOST:
        return 0
    donated = DONATION | owner << OWNER_SHIFT
    if owner is Owner.HYP:
        return donated
    handles = (leaves >> GFN_BITS) + HANDLE_OFFSET
    return (leaves & GFN_MASK) << GFN_SHIFT | handles << HANDLE_SHIFT | donated


def _count_codes(counts: I64, full: int) -> I64:
    return np.where(counts == 0, ZERO, np.where(counts == full, FULL, SOME))


def _require(holds: bool, handle: int, state: str, rule: int) -> None:
    if not holds:
        raise refusal(
            PKVM_INVALID, f"VM {handle:#x}: {state}", -errno.EINVAL,
            "", state, f"pkvm.md §8 rule {rule}",
        )  # fmt: skip
