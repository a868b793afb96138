"""The reverse map table and the CPU's instructions on it: RMPUPDATE, PVALIDATE, the access check.

Owns the arrays by pfn; nobody else writes them but ``firmware``, which has its own rights to them.
Every function takes arrays of pages, checks all of them, and only then writes.

Differs: entries are 4K only (guest_memfd makes order-0 folios; snp.md §3), so there is no
Page_Size, no Subpage_Count, no PSMASH and no RMPADJUST; FAIL_OVERLAP is only ever injected. The
table also covers some frames behind the host's memory: the kernel's own pages, which hold guest
contexts and can never be handed out.
"""

from __future__ import annotations

import numpy as np

from rmemd.errors import BAD_REQUEST, RmemError
from rmemd.hooks import Dense, HookTx, HostContext
from rmemd.units import I64, U8, Bools
from rmemd_snp.tables import (
    ASSIGNED,
    EAX_NAMES,
    FAIL_INUSE,
    FAIL_OVERLAP,
    FAIL_PERMISSION,
    HAS_ASID,
    HAS_GPA,
    IMMUTABLE,
    RMP_IN_USE,
    RMPUPDATE_FAILED,
    RMPUPDATE_RULES,
    STATE_NAMES,
    STATE_OF_BITS,
    VALIDATED,
    VMSA,
)

OVERLAP_RETRIES = 8


class Rmp:
    """One entry per frame.

    Attributes:
        bits: ASSIGNED, VALIDATED, IMMUTABLE and VMSA.
        gpa: the guest page number (GPA >> 12).
        asid: the owner's ASID, 0 for none.
        vmpl: the masks of VMPL1, 2 and 3 in bytes 0, 1 and 2. VMPL0's is always "all": no
            instruction or command can change it.
        in_use: 1 while VMRUN holds the page as a VMSA.
        kernel: the pfns of the kernel's own frames, behind the host's memory.
    """

    def __init__(self, host: HostContext, kernel_frames: int) -> None:
        def dense(table: str, dtype: str) -> Dense:
            return host.dense(table, dtype, length=host.nframes + kernel_frames)

        self.bits = dense("rmp.bits", "u1")
        self.gpa = dense("rmp.gpa", "i8")
        self.asid = dense("rmp.asid", "u2")
        self.vmpl = dense("rmp.vmpl", "u4")
        self.in_use = dense("rmp.in_use", "u1")
        self.kernel = range(host.nframes, host.nframes + kernel_frames)

    # --- reading -----------------------------------------------------------------------------
    def states(self, pfns: I64) -> U8:
        """Return the index into STATE_NAMES of each frame's state."""
        owned = np.where(self.asid.get(pfns) > 0, HAS_ASID, 0)
        mapped = np.where(self.gpa.get(pfns) > 0, HAS_GPA, 0)
        found: U8 = STATE_OF_BITS[self.bits.get(pfns) | owned | mapped]
        return found

    def state_name(self, pfn: int) -> str:
        """Return the name of one frame's state."""
        return STATE_NAMES[int(self.states(np.array([pfn], dtype=np.int64))[0])]

    def assigned(self, pfns: I64) -> Bools:
        """Return which frames are assigned."""
        found: Bools = (self.bits.get(pfns) & ASSIGNED) != 0
        return found

    def pages_of(self, asid: int) -> int:
        """Count the pages of an ASID: the hardware's per-ASID counter.

        Counted when asked for (only ACTIVATE asks), because a counter that every fault writes
        would be held by every transaction that waits for bytes. ASID 0 counts as none.
        """
        return int(self.asid.where(asid).size) if asid else 0

    def faults(self, pfns: I64, gfns: I64, asid: int) -> Bools:
        """Return where a guest's C=1 use of ``gfns``, mapped to ``pfns``, is an #NPF.

        The check before Validated: assigned, ASID, GPA, Immutable=0. Source: APM 15.36.10;
        snp.md §2.
        """
        bits = self.bits.get(pfns) & (ASSIGNED | IMMUTABLE)
        found: Bools = (
            (bits != ASSIGNED) | (self.asid.get(pfns) != asid) | (self.gpa.get(pfns) != gfns)
        )
        return found

    # --- instructions ------------------------------------------------------------------------
    def rmpupdate_codes(
        self, tx: HookTx, pfns: I64, bits: int, gfns: I64 | int = 0, asids: I64 | int = 0
    ) -> U8:
        """Return EAX of an RMPUPDATE per page, in the instruction's order; writes nothing.

        An injected code is the first page's. Linux repeats RMPUPDATE on FAIL_OVERLAP for ever;
        here it gives up after OVERLAP_RETRIES.
        Source: snp.md §1. That an unassigned entry must be all zero, and its code, is **[U]**.
        """
        distinct(pfns)
        stray = not bits & ASSIGNED and (bits | np.asarray(gfns) | np.asarray(asids)) != 0
        codes = np.select(
            [(self.bits.get(pfns) & IMMUTABLE) != 0, np.asarray(stray), self.in_use.get(pfns) != 0],
            [FAIL_PERMISSION, FAIL_PERMISSION, FAIL_INUSE],
            0,
        ).astype(np.uint8)
        if pfns.size:
            codes[0] = _injected(tx) or codes[0]
        return codes

    def rmpupdate(
        self, tx: HookTx, pfns: I64, bits: int, gfns: I64 | int = 0, asids: I64 | int = 0
    ) -> None:
        """RMPUPDATE each page, or none.

        Raises:
            Refused, Busy: the first page's EAX that is not 0.
        """
        codes = self.rmpupdate_codes(tx, pfns, bits, gfns, asids)
        bad = np.flatnonzero(codes)
        if bad.size:
            raise self._refusal(int(codes[bad[0]]), int(pfns[bad[0]]))
        self.write(tx, pfns, bits, gfns, asids)

    def write(
        self, tx: HookTx, pfns: I64, bits: int, gfns: I64 | int = 0, asids: I64 | int = 0
    ) -> None:
        """Write entries as RMPUPDATE does, for pages whose code was 0.

        Validated, VMSA and the VMPL masks survive only if nothing but Immutable changes
        (snp.md §9 rules 2 and 3).
        """
        old = self.bits.get(pfns)
        same = (
            ((old & ASSIGNED) == (bits & ASSIGNED))
            & (self.gpa.get(pfns) == gfns)
            & (self.asid.get(pfns) == asids)
        )
        kept = np.where(same, old & (VALIDATED | VMSA), 0)
        tx.put(self.vmpl, pfns, np.where(same, self.vmpl.get(pfns), 0))
        tx.put(self.bits, pfns, (bits | kept).astype(np.uint8))
        tx.put(self.gpa, pfns, gfns)
        tx.put(self.asid, pfns, asids)

    def pvalidate(self, tx: HookTx, pfns: I64, value: bool) -> Bools:
        """Set or clear Validated on 4K pages that passed ``faults``; return CF per page.

        CF is 1 where the entry had the value already (snp.md §9 rule 11).
        """
        old = self.bits.get(pfns)
        new = old | VALIDATED if value else old & ~np.uint8(VALIDATED)
        tx.put(self.bits, pfns, new)
        unchanged: Bools = old == new
        return unchanged

    def _refusal(self, code: int, pfn: int) -> RmemError:
        reason = RMP_IN_USE if code == FAIL_INUSE else RMPUPDATE_FAILED
        state = self.state_name(pfn)
        return reason(
            f"RMPUPDATE of pfn {pfn:#x} ({state}) answers {EAX_NAMES[code]}",
            page=f"pfn {pfn:#x}",
            state=state,
            rule=RMPUPDATE_RULES.get(code, "snp.md §1 RMPUPDATE"),
            vendor_status=EAX_NAMES[code],
            vendor_value=code,
        )


def distinct(pfns: I64) -> None:
    """Refuse a request that names a frame twice."""
    steps = np.diff(pfns)
    if (steps <= 0).any() and not np.diff(np.sort(pfns)).all():
        raise BAD_REQUEST("the request names a frame twice", field="pfns")


def _injected(tx: HookTx) -> int:
    code = injected_code(tx, "RMPUPDATE", EAX_NAMES)
    for _ in range(OVERLAP_RETRIES):
        if code != FAIL_OVERLAP:
            break
        code = injected_code(tx, "RMPUPDATE", EAX_NAMES)
    return code


def injected_code(tx: HookTx, point: str, names: dict[int, str]) -> int:
    """Return the code that a fault rule wants at ``point``, 0 for none.

    Raises:
        InvalidArgument: the rule names a code that the point does not have.
    """
    wanted = tx.injected(point)
    if not wanted:
        return 0
    for code, name in names.items():
        if name == wanted:
            return code
    raise BAD_REQUEST(f"{point} has no code {wanted}", field="error")
