"""The rules of SNP as data: RMP states, status codes, and who may be where for which command.

Owns no state. Every table here is transcribed from ``snp.md``; the modules that act only look up.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

import numpy as np

from rmemd.errors import Kind, Reason
from rmemd.units import U8

# --- the RMP entry ---------------------------------------------------------------------------
# The bits of an entry that decide its state, in the order of STATES' columns. The ASID and GPA
# bits are not stored: they say whether those fields are non-zero.
ASSIGNED, VALIDATED, HAS_ASID, IMMUTABLE, VMSA, HAS_GPA = (1 << bit for bit in range(6))

#: state -> Assigned, Validated, ASID, Immutable, VMSA, GPA; "-": any. Source: snp.md §1 (FW).
STATES = {
    "Hypervisor":    "0000--",
    "HV-Fixed":      "0001--",
    "Reclaim":       "1000--",
    "Firmware":      "100100",
    "Context":       "100110",
    "Metadata":      "1001-1",
    "Pre-Guest":     "1011--",
    "Pre-Swap":      "1111--",
    "Guest-Invalid": "1010--",
    "Guest-Valid":   "1110--",
}  # fmt: skip
STATE_NAMES = tuple(STATES)

#: RMPUPDATE's Assigned and Immutable for the states that it can make.
TO_HYPERVISOR = 0
TO_GUEST_INVALID = ASSIGNED
TO_PRE_GUEST = ASSIGNED | IMMUTABLE
TO_FIRMWARE = ASSIGNED | IMMUTABLE


def _state_of_bits() -> U8:
    """Return the state of each of the 64 combinations of bits; what no row names is row 0."""
    codes = np.zeros(64, dtype=np.uint8)
    for code, pattern in enumerate(STATES.values()):
        for bits in range(64):
            if all(p in ("-", str(bits >> i & 1)) for i, p in enumerate(pattern)):
                codes[bits] = code
    return codes


STATE_OF_BITS = _state_of_bits()

# --- the CPU's instructions ------------------------------------------------------------------
#: EAX of RMPUPDATE and PVALIDATE. Source: snp.md §1 (VSM, SVSM, MSI).
SUCCESS, FAIL_INPUT, FAIL_PERMISSION, FAIL_INUSE, FAIL_OVERLAP = range(5)
FAIL_SIZEMISMATCH = 6
EAX_NAMES = {
    SUCCESS: "SUCCESS",
    FAIL_INPUT: "FAIL_INPUT",
    FAIL_PERMISSION: "FAIL_PERMISSION",
    FAIL_INUSE: "FAIL_INUSE",
    FAIL_OVERLAP: "FAIL_OVERLAP",
    FAIL_SIZEMISMATCH: "FAIL_SIZEMISMATCH",
}
RMPUPDATE_RULES = {
    FAIL_PERMISSION: "snp.md §9 rule 1",
    FAIL_INUSE: "snp.md §9 rule 5",
    FAIL_OVERLAP: "snp.md §9 rule 4",
}

# --- firmware status -------------------------------------------------------------------------
#: name -> (code, cause, remedy). Source: Linux include/uapi/linux/psp-sev.h; snp.md §1.
STATUS = {
    "INVALID_PLATFORM_STATE": (0x01, "The platform is not in INIT.", "Initialise SNP first."),
    "INVALID_GUEST_STATE": (
        0x02,
        "The guest is in a wrong state.",
        "Populate, finalize, then run.",
    ),
    "INVALID_CONFIG": (0x03, "The ASID still owns pages in the RMP.", "Free them first."),
    "INVALID_LENGTH": (0x04, "The buffer's length is wrong.", "Correct the length."),
    "POLICY_FAILURE": (0x07, "The guest's policy forbids it or is bad.", "Choose another policy."),
    "INACTIVE": (0x08, "The guest has no ASID.", "Activate the guest."),
    "INVALID_ADDRESS": (0x09, "An address is misaligned or out of range.", "Correct it."),
    "BAD_SIGNATURE": (0x0A, "A signature does not verify.", "Sign with the right key."),
    "BAD_MEASUREMENT": (0x0B, "A digest or tag does not match.", "Compare what was measured."),
    "ASID_OWNED": (0x0C, "Another guest has the ASID.", "Take another ASID."),
    "INVALID_ASID": (0x0D, "There is no such ASID.", "Take one between 1 and the maximum."),
    "WBINVD_REQUIRED": (0x0E, "Caches were not written back.", "Run WBINVD on all cores."),
    "DFFLUSH_REQUIRED": (0x0F, "The ASID is dirty.", "Run WBINVD, then DF_FLUSH."),
    "INVALID_GUEST": (0x10, "The page is no guest context.", "Name the guest's Context page."),
    "ACTIVE": (0x12, "The guest has an ASID already.", "Activate a guest once."),
    "INVALID_PARAM": (0x16, "A parameter is not valid.", "Correct the parameter."),
    "INVALID_PAGE_SIZE": (0x19, "The page size is not the RMP entry's.", "Use 4K pages."),
    "INVALID_PAGE_STATE": (0x1A, "A page's RMP state is not allowed.", "RMPUPDATE it first."),
    "INVALID_MDATA_ENTRY": (0x1B, "A swap entry is not valid.", "Use the entry of this swap."),
    "INVALID_PAGE_OWNER": (0x1C, "A page belongs to another guest.", "Name this guest's pages."),
    "AEAD_OFLOW": (0x1D, "The guest's IV counter overflowed.", "The guest cannot swap any more."),
    "RMP_INIT_REQUIRED": (0x20, "The RMP is not initialised.", "Run SNP_INIT."),
}
CODE = {name: code for name, (code, _, _) in STATUS.items()}
STATUS_NAMES = {code: name for name, code in CODE.items()}
FIRMWARE_REASONS = {
    code: Reason(f"SNP_{name}", Kind.REFUSED, errno.EIO, cause, remedy, "psp-sev.h; snp.md §1")
    for name, (code, cause, remedy) in STATUS.items()
}

# --- commands --------------------------------------------------------------------------------
INIT, LAUNCH, RUNNING = range(3)
GUEST_STATE_NAMES = ("INIT", "LAUNCH", "RUNNING")
_WRONG = CODE["INVALID_GUEST_STATE"]

#: command -> status by guest state (INIT, LAUNCH, RUNNING). Source: snp.md §1, §5.
GUEST_CODES: Mapping[str, tuple[int, int, int]] = {
    "SNP_LAUNCH_START": (0, _WRONG, _WRONG),
    "SNP_ACTIVATE": (_WRONG, 0, 0),
    "SNP_LAUNCH_UPDATE": (_WRONG, 0, _WRONG),
    "SNP_LAUNCH_FINISH": (_WRONG, 0, _WRONG),
    "SNP_PAGE_MOVE": (_WRONG, 0, 0),
}


def _only(*allowed: str) -> U8:
    """Return INVALID_PAGE_STATE for each state but those named."""
    wrong = CODE["INVALID_PAGE_STATE"]
    return np.array([0 if name in allowed else wrong for name in STATES], dtype=np.uint8)


#: operand -> status by page state. Source: snp.md §1, §5.
PAGE_CODES = {
    "SNP_GCTX_CREATE": _only("Firmware"),
    "SNP_LAUNCH_UPDATE": _only("Pre-Guest"),
    "SNP_PAGE_MOVE src": _only("Pre-Guest", "Pre-Swap"),
    "SNP_PAGE_MOVE dst": _only("Pre-Guest"),
    "SNP_PAGE_RECLAIM": _only(*(set(STATES) - {"Context", "HV-Fixed"})),
    "context": np.array(
        [0 if name == "Context" else CODE["INVALID_GUEST"] for name in STATES], dtype=np.uint8
    ),
}
COMMAND_RULES = {
    "SNP_GCTX_CREATE": "snp.md §1 GCTX_CREATE",
    "SNP_LAUNCH_START": "snp.md §1 LAUNCH_START",
    "SNP_ACTIVATE": "snp.md §9 rule 16",
    "SNP_DF_FLUSH": "snp.md §9 rule 16",
    "SNP_LAUNCH_UPDATE": "snp.md §9 rule 14",
    "SNP_LAUNCH_FINISH": "snp.md §1 LAUNCH_FINISH",
    "SNP_PAGE_MOVE": "snp.md §9 rule 19",
    "SNP_PAGE_RECLAIM": "snp.md §9 rule 23",
    "SNP_DECOMMISSION": "snp.md §1 DECOMMISSION",
}

# --- the guest policy ------------------------------------------------------------------------
POLICY_MUST_BE_ONE = 1 << 17
POLICY_SINGLE_SOCKET = 1 << 20
POLICY_CIPHERTEXT_HIDING = 1 << 24
POLICY_PAGE_SWAP_DISABLE = 1 << 25
POLICY_KNOWN = (1 << 26) - 1
POLICY_DEFAULT = 0x30000

# --- reasons that are KVM's or the CPU's -----------------------------------------------------
RMPUPDATE_FAILED = Reason(
    "SNP_RMPUPDATE_FAILED",
    Kind.REFUSED,
    errno.EINVAL,
    "RMPUPDATE refused the entry.",
    "An Immutable entry must be reclaimed by the firmware (PAGE_RECLAIM) first.",
    "APM 15.36.5; snp.md §1, §4",
)
RMP_IN_USE = Reason(
    "SNP_RMP_IN_USE",
    Kind.BUSY,
    errno.EINVAL,
    "RMPUPDATE found the page in use: it is the VMSA of a vCPU that is running.",
    "Have the vCPU leave the guest, then try again.",
    "APM 15.36.12; snp.md §9 rule 5",
)
PAGE_ASSIGNED = Reason(
    "SNP_PAGE_ASSIGNED",
    Kind.EXISTS,
    errno.EEXIST,
    "The frame is assigned in the RMP already, so it cannot be launched.",
    "Populate a page once, before anything else faults it in.",
    "KVM sev_gmem_post_populate; snp.md §4",
)
VMRUN_INVALID = Reason(
    "SNP_VMRUN_INVALID",
    Kind.REFUSED,
    0,
    "VMRUN refused the vCPU's VMSA page: VMEXIT_INVALID.",
    "The VMSA must be the guest's own, mutable, and marked VMSA by LAUNCH_UPDATE.",
    "APM 15.36.12; snp.md §2",
)
