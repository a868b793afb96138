"""The TDX module's own tables: states, flags, allow-matrices and status codes, as arrays.

Owns what the csv files in ``data/`` say (generated from the module's sources) and the refusals
that the status codes become. Nothing here changes after import; every other module only looks up.

Source: intel/tdx-module, tag TDX_1.5.01, include/auto_gen (tdx.md §1, §2).
"""

from __future__ import annotations

import csv
import errno
from pathlib import Path
from typing import Any

import numpy as np

from rmemd.errors import BAD_REQUEST, Kind, Reason, RmemError
from rmemd.units import U8, Bools

PT_NDA, PT_REG = 0, 3
# A host that boots Linux with the private KeyIDs [16, 64): the first encrypts the module's own
# pages (TDR, PAMT), the others are for guests.
GLOBAL_HKID = 16
GUEST_HKIDS = range(GLOBAL_HKID + 1, 64)
# GPAW 52: bit 51 of a GPA says "shared", so private page numbers end below it.
PRIVATE_GFNS = 1 << (51 - 12)


# found without importlib.resources, which imports the reader of archives with it
_DATA = Path(__file__).with_name("data")


def _rows(name: str) -> list[dict[str, str]]:
    with (_DATA / name).open(encoding="ascii") as file:
        columns, *rows = csv.reader(file)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _flag(rows: list[dict[str, str]], column: str) -> Bools:
    return np.array([row[column] == "1" for row in rows])


# --- SEPT entry states: a code is an index into STATES, and FREE is 0 ---------------------------
_SEPT = _rows("sept_state_flags.csv")
STATES = tuple(row["state"] for row in _SEPT)
CODE = {name: code for code, name in enumerate(STATES)}
FREE, REMOVED, MAPPED, PENDING = (CODE[name] for name in ("FREE", "REMOVED", "MAPPED", "PENDING"))
ANY_BLOCKED = _flag(_SEPT, "any_blocked")
ANY_PENDING = _flag(_SEPT, "any_pending")
ACCEPTABLE = _flag(_SEPT, "any_pending_and_guest_acceptable")
READABLE = _flag(_SEPT, "guest_accessible_leaf")
WRITABLE = _flag(_SEPT, "guest_fully_accessible_leaf")
MUST_TRACK = _flag(_SEPT, "tlb_tracking_required")
ALLOW: dict[str, Bools] = {
    row["leaf"]: np.array([row[state] == "1" for state in STATES])
    for row in _rows("sept_state_allow.csv")
}

# --- OP_STATE: kept by name ---------------------------------------------------------------------
_OP = _rows("op_state_flags.csv")
OP_MUST_TRACK = frozenset(row["op_state"] for row in _OP if row["tlb_tracking_required"] == "1")
OP_IMPORTS = frozenset(row["op_state"] for row in _OP if row["import_in_progress"] == "1")
OP_ALLOW: dict[str, frozenset[str]] = {
    row["leaf"]: frozenset(op["op_state"] for op in _OP if row[op["op_state"]] == "1")
    for row in _rows("op_state_allow.csv")
}


def _moves(**pairs: str) -> U8:
    """Return a transition as an array by state code; a state that is not named stays."""
    table = np.arange(len(STATES), dtype=np.uint8)
    for before, after in pairs.items():
        table[CODE[before]] = CODE[after]
    return table


BLOCKS = _moves(
    MAPPED="BLOCKED", BLOCKEDW="BLOCKED",
    PENDING="PENDING_BLOCKED", PENDING_BLOCKEDW="PENDING_BLOCKED", NL_MAPPED="NL_BLOCKED",
)  # fmt: skip
UNBLOCKS = _moves(BLOCKED="MAPPED", PENDING_BLOCKED="PENDING", NL_BLOCKED="NL_MAPPED")
ACCEPTS = _moves(PENDING="MAPPED", PENDING_EXPORTED_DIRTY="EXPORTED_DIRTY")

# --- status codes -------------------------------------------------------------------------------
STATUS = {row["name"]: int(row["value"], 16) for row in _rows("status_codes.csv")}
OPERAND = {row["operand"]: int(row["id"]) for row in _rows("operand_ids.csv")}
_SOURCE = "intel/tdx-module TDX_1.5.01; tdx.md §2"


def _reason(name: str, cause: str, remedy: str, kind: Kind = Kind.REFUSED) -> Reason:
    # KVM passes contention on as EBUSY and every other failed SEAMCALL as EIO
    number = errno.EBUSY if name == "TDX_OPERAND_BUSY" else errno.EIO
    return Reason(name, kind, number, cause, remedy, _SOURCE)


REASONS: dict[str, Reason] = {
    reason.name: reason
    for reason in (
        _reason(
            "TDX_OPERAND_BUSY",
            "A lock that the SEAMCALL needs is held by another one.",
            "Try again; KVM retries a fault, and a zap once with all vCPUs out.",
            Kind.BUSY,
        ),
        _reason(
            "TDX_PREVIOUS_TLB_EPOCH_BUSY",
            "TDH.MEM.TRACK found a vCPU still inside from the epoch before.",
            "Have the vCPUs leave the guest between two TRACKs.",
            Kind.BUSY,
        ),
        _reason(
            "TDX_OPERAND_INVALID",
            "An operand is malformed: level, alignment, a GPA that is not private, the same HPA.",
            "Correct the operand that the status names.",
        ),
        _reason(
            "TDX_PAGE_METADATA_INCORRECT",
            "The page's PAMT entry has the wrong type: it is in use already, or not in use.",
            "Give a page that is PT_NDA; one HPA never backs two GPAs.",
        ),
        _reason(
            "TDX_TD_FATAL",
            "The TD consumed poison and can only be torn down.",
            "Destroy the VM.",
        ),
        _reason(
            "TDX_TD_KEYS_NOT_CONFIGURED",
            "The TD has no HKID with a configured key (any more).",
            "Configure the key, or do not use a TD that is torn down.",
        ),
        _reason(
            "TDX_TD_NON_DEBUG",
            "Private memory was to be read or written by the host, and the TD is no debug TD.",
            "Create the VM with debug=1.",
        ),
        _reason(
            "TDX_OP_STATE_INCORRECT",
            "The leaf is not allowed in the TD's OP_STATE.",
            "Build with ADD before MR.FINALIZE, and use AUG after it.",
        ),
        _reason(
            "TDX_NO_VCPUS",
            "TDH.MR.FINALIZE was called for a TD without a vCPU.",
            "Create a vCPU first.",
        ),
        _reason(
            "TDX_EPT_ENTRY_NOT_PRESENT",
            "No present leaf maps the GPA.",
            "Map the page first.",
        ),
        _reason(
            "TDX_EPT_ENTRY_STATE_INCORRECT",
            "The leaf is not allowed in the SEPT entry's state.",
            "Read the entry's state; sept_state_allow.csv says which leaf takes it.",
        ),
        _reason(
            "TDX_GPA_RANGE_NOT_BLOCKED",
            "A page of a running TD is to be removed or moved without being blocked.",
            "TDH.MEM.RANGE.BLOCK, TDH.MEM.TRACK, kick, then try again.",
        ),
        _reason(
            "TDX_GPA_RANGE_ALREADY_BLOCKED",
            "The page is blocked already (informational: nothing is wrong with it).",
            "Go on with TRACK.",
        ),
        _reason(
            "TDX_TLB_TRACKING_NOT_DONE",
            "The page was blocked, but a vCPU may still hold its translation.",
            "TDH.MEM.TRACK, then have every vCPU leave the guest.",
        ),
        _reason(
            "TDX_HKID_NOT_FREE",
            "The HKID belongs to another TD.",
            "Use one that is free.",
        ),
        _reason(
            "TDX_FLUSHVP_NOT_DONE",
            "A vCPU is still associated with a processor.",
            "Have it leave the guest and flush it.",
        ),
        _reason(
            "TDX_SEAMCALL_FAILED",
            "A fault rule had a SEAMCALL return this status.",
            "Remove the fault rule; `vendor_status` has the status.",
        ),
    )
}  # fmt: skip
MEASUREMENT_LOST = Reason(
    "TDX_MEASUREMENT_LOST",
    Kind.REFUSED,
    errno.EIO,
    "The daemon was restarted while the TD was being built, and with it went the running MRTD.",
    "Create the VM again; a finalized TD is not affected.",
    "rmemd; tdx.md §8",
)


def value_of(status: str) -> int:
    """Return the 64-bit value of a status spelt "NAME" or "NAME|OPERAND"."""
    name, _, operand = status.partition("|")
    if name not in STATUS or (operand and operand not in OPERAND):
        raise BAD_REQUEST(f"{status} is no TDX status", field="status")
    return STATUS[name] | (OPERAND[operand] if operand else 0)


def refusal(leaf: str, status: str, rule: str, **details: Any) -> RmemError:
    """Return the refusal that a leaf's status is, with the errno that KVM makes of it.

    Source: Linux arch/x86/kvm/vmx/tdx.c, 6.16: a busy EXTEND is EIO, unlike a busy ADD.
    """
    value = value_of(status)
    reason = REASONS.get(status.partition("|")[0], REASONS["TDX_SEAMCALL_FAILED"])
    where = f" at {details['page']}" if "page" in details else ""
    return reason(
        f"{leaf} returned {status} ({value:#018x}){where}",
        errno=errno.EIO if leaf == "TDH_MR_EXTEND" else None,
        rule=rule,
        vendor_status=status,
        vendor_value=value,
        **details,
    )
