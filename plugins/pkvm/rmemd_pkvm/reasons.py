"""Why pKVM refuses: its reasons, and which one speaks for an errno of EL2."""

from __future__ import annotations

import errno

from rmemd.errors import Kind, Reason

EHWPOISON = 133  # Linux asm-generic/errno.h; Python's errno module lacks it
SOURCE = "Linux arch/arm64/kvm/hyp/nvhe/mem_protect.c; pkvm.md §1"

PKVM_WRONG_STATE = Reason(
    "PKVM_WRONG_STATE", Kind.REFUSED, errno.EPERM,
    "EL2 found the frame or the guest's leaf in another state than the transition starts from.",
    "Read the page map; a protected guest's page changes hands when the guest asks.",
    SOURCE,
)  # fmt: skip
PKVM_GUEST_OWNED = Reason(
    "PKVM_GUEST_OWNED", Kind.REFUSED, errno.EPERM,
    "A protected guest owns the page, and the host's request would take or give it away.",
    "Have the guest share, unshare or relinquish the page, or destroy the VM.",
    "Linux arch/arm64/kvm/pkvm.c, pkvm_pgtable_stage2_unmap; pkvm.md §2",
)  # fmt: skip
PKVM_MEMSLOT = Reason(
    "PKVM_MEMSLOT", Kind.REFUSED, errno.EPERM,
    "Memslots of a protected VM cannot be moved or deleted once its EL2 VM exists.",
    "Lay out the memslots before the first run.",
    "Linux arch/arm64/kvm/mmu.c; pkvm.md §4",
)  # fmt: skip
PKVM_NOT_MAPPED = Reason(
    "PKVM_NOT_MAPPED", Kind.REFUSED, errno.ENOENT,
    "The guest's stage-2 has no leaf there.",
    "Fault the page in first.",
    SOURCE,
)  # fmt: skip
PKVM_POISONED = Reason(
    "PKVM_POISONED", Kind.REFUSED, EHWPOISON,
    "The host took the page back by force: this guest address is dead until teardown.",
    "Destroy the VM.",
    "pkvm.md §3",
)  # fmt: skip
PKVM_BUSY = Reason(
    "PKVM_BUSY", Kind.BUSY, errno.EBUSY,
    "EL2 holds references to the frame, or its counter is full.",
    "Unpin or unshare first.",
    SOURCE,
)  # fmt: skip
PKVM_AGAIN = Reason(
    "PKVM_AGAIN", Kind.BUSY, errno.EAGAIN,
    "The page or its VM changed under the request: a race, which the host counts as done.",
    "Look again.",
    SOURCE,
)  # fmt: skip
PKVM_INVALID = Reason(
    "PKVM_INVALID", Kind.INVALID, errno.EINVAL,
    "A page is named twice, or the VM is unknown, of the other kind, dying, or has a loaded vCPU.",
    "Correct the request; put the vCPUs before teardown.",
    "Linux arch/arm64/kvm/hyp/nvhe/{hyp-main,pkvm}.c; pkvm.md §1",
)  # fmt: skip
PKVM_NO_MEMORY = Reason(
    "PKVM_NO_MEMORY", Kind.EXHAUSTED, errno.ENOMEM,
    "EL2 has no slot for one more VM, or no memory for its page tables.",
    "Destroy a VM, or top the memcache up and try again.",
    SOURCE,
)  # fmt: skip
REASON_OF_ERRNO = {
    reason.errno: reason
    for reason in (
        PKVM_WRONG_STATE, PKVM_NOT_MAPPED, PKVM_POISONED, PKVM_BUSY, PKVM_AGAIN, PKVM_INVALID,
        PKVM_NO_MEMORY,
    )
}  # fmt: skip


ERRNO_NAMES = {**errno.errorcode, EHWPOISON: "EHWPOISON"}


def spelt(number: int) -> str:
    """Spell a negative errno as the kernel's sources do: "-EPERM"."""
    return f"-{ERRNO_NAMES[-number]}"


def number_of(spelling: str) -> int:
    """Return the negative errno that is spelt so."""
    return -next(n for n, name in ERRNO_NAMES.items() if f"-{name}" == spelling)
