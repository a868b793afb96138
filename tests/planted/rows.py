"""The classes of bugs: what went wrong in comparable systems, and what an anchor's tests are about.

A table of data: reliability.md §1 has the systems, §3 the invariants.
"""

from __future__ import annotations

#: a class -> what went wrong in which comparable system (reliability.md §1; §3 where it says so)
ROWS = {
    "CVE-2025-40274, -68810": "use after free: a binding outlives its memslot; a flag is toggled",
    "CVE-2021-47639, -22543": "a page is reachable after the notifier returned, or unreferenced",
    "CVE-2026-90040": "a consumer lacks an invalidate hook",
    "CVE-2026-46147": "an error path leaks pins; published before it is initialised",
    "CVE-2026-98433": "a failed migration leaks a bounded pool",
    "CVE-2024-36913": "a conversion fails, and its page is freed all the same",
    "TDX pin removal": "a refcount cannot tell transient from intended",
    "offset sign, CVE-2026-0028": "a range overflows",
    "SEV dirty cache lines": "no flush before reuse",
    "CVE-2026-31591": "the state changes while it is finalized",
    "CVE-2022-0669": "descriptors that nobody expects are not closed",
    "ARROW-1788": "one client's death aborts what is another's",
    "CVE-2026-1386": "a symbolic link is followed",
    "CVE-2023-33953, -4785": "memory or descriptors without a bound",
    "SQLite": "a system call fails, and half of a change stays",
    "FoundationDB": "the same seed makes another run",
    "etcd, Porcupine": "a reply speaks of another moment than its call's",
    "pKVM ghost spec": "the engine does what its specification does not say",
    "FDSTORE, QEMU CPR, Envoy": "a successor is handed less than there was, or what is not its",
    "PostgreSQL, ALICE": "a crash finds bytes without their record, or a record without its bytes",
    "§3 I10": "a page that moves has two owners, or none",
    "§3 I13": "poison that does not stay",
    "§3 I15": "authority that is not the caller's",
    "§3 I16, I21": "a handle, a revision or a reply that is not what it was",
    "§3 I19": "what is read back is not what was written",
    "§3 I22": "a page on a node that its policy has not",
    "§3 I24": "private bytes, or secrets, that are told or written down",
    "§3 I25": "hooks, or long work, where they must not be",
}
(
    BIND, REACH, HOOK, LEAK, POOL, FAILED, COUNT, RANGE, FLUSH, LAUNCH, RIGHTS, DEATH, LINK, BOUND,
    SYSTEM, SEED, MOMENT, SPEC, SUCCESSOR, CRASH, OWNER, POISON, AUTHORITY, HANDLE, LOG, NODE,
    SECRET, STEP,
) = ROWS  # fmt: skip
