"""What hooks are given and what they may answer: closed, frozen, array-shaped types.

Owns the vocabulary shared by the engine and every plugin. Ranges are half-open and counted in
pages; arrays are int64 unless a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum

import numpy as np
from msgspec import Struct, field

from rmemd.units import I64, U8, Bools, expand, run_breaks


class Why(Enum):
    """Why an invalidation happens; only MIGRATE leaves the entry there to be relocated."""

    CONVERT = "convert"
    PUNCH = "punch"
    SLOT = "slot"
    MIGRATE = "migrate"
    POISON = "poison"
    CLOSE = "close"


class Content(Enum):
    """What a page holds after an in-place conversion."""

    PRESERVED = "preserved"
    ZERO = "zero"
    NOISE = "noise"
    DESTROYED = "destroyed"


class GuestCall(Enum):
    """What a guest may ask of its vendor about ranges of its memory."""

    ACCEPT = "accept"
    VALIDATE = "validate"
    RESCIND = "rescind"
    SHARE = "share"
    UNSHARE = "unshare"
    RELINQUISH = "relinquish"


class PageKind(IntEnum):
    """Kind of an initial page, numbered as SNP_LAUNCH_UPDATE numbers them (snp.md §1)."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


class AccessCode(IntEnum):
    """Verdict on one page of a guest access.

    FAULT: the vendor has no such entry, fault the page in again. EXCEPTION: the guest takes one.
    STOP: the VM is lost. EFAULT: KVM_RUN fails with -EFAULT, and the VM lives.
    """

    OK = 0
    FAULT = 1
    EXCEPTION = 2
    STOP = 3
    EFAULT = 4


class CallAction(Enum):
    """What the engine does after a guest call.

    DONE: ``done`` pages took effect and ``status`` goes to the guest. FAULT: the page after the
    first ``done`` has no mapping; fault it in and execute the call again from there. HYPERCALL:
    exit to the VMM, which converts (KVM_HC_MAP_GPA_RANGE). CONVERT: the engine converts the pages
    in place without an exit. EXCEPTION: the guest takes ``exception``.
    """

    DONE = "done"
    FAULT = "fault"
    HYPERCALL = "hypercall"
    CONVERT = "convert"
    EXCEPTION = "exception"


class Agent(Enum):
    """Who touches a frame by its physical address."""

    HOST_USER = "host-user"
    HOST_KERNEL = "host-kernel"
    DEVICE = "device"


class HostView(Enum):
    """What the host gets from a private frame: raw ciphertext, zeros, ones, or a fault."""

    RAW = "raw"
    ZEROS = "zeros"
    ONES = "ones"
    FAULT = "fault"


class Runs(Struct, frozen=True):
    """Parallel int64 arrays: run i maps gfn[i]..gfn[i]+npages[i] to pfn[i]..pfn[i]+npages[i]."""

    gfn: I64
    pfn: I64
    npages: I64

    @classmethod
    def of_pages(cls, gfns: I64, pfns: I64) -> Runs:
        """Coalesce parallel page arrays into runs, keeping their order."""
        if not gfns.size:
            return cls(gfns, pfns, gfns)
        breaks = run_breaks(gfns, pfns)
        counts = np.diff(np.append(breaks, gfns.size)).astype(np.int64)
        return cls(gfns[breaks], pfns[breaks], counts)

    @property
    def total(self) -> int:
        """Return how many pages the runs cover."""
        return int(self.npages.sum())

    def gfns(self) -> I64:
        """Return every gfn, shape (total,)."""
        return expand(self.gfn, self.npages)

    def pfns(self) -> I64:
        """Return every pfn, shape (total,)."""
        return expand(self.pfn, self.npages)


class GuestException(Struct, frozen=True):
    """An exception that the guest takes, in the vendor's own terms ("#VE", "#VC 0x404")."""

    vector: str
    code: int
    text: str


class AccessAnswer(Struct, frozen=True):
    """Verdicts on a guest access.

    Attributes:
        codes: uint8 AccessCode per page of the runs.
        exception: what the guest takes at the first EXCEPTION page.
        stop: why the VM stops at the first STOP page, or the run fails at the first EFAULT page.
        status: the vendor's status of that stop, 0 if it has none.
    """

    codes: U8
    exception: GuestException | None = None
    stop: str = ""
    status: int = 0


class CallAnswer(Struct, frozen=True):
    """Answer to a guest call; ``done`` pages from the front took effect.

    With CONVERT, ``refused`` is the status that the guest gets instead if the conversion is
    declined (somebody holds a page): everything is then as it was.
    """

    action: CallAction
    done: int = 0
    status: int = 0
    status_name: str = ""
    to_private: bool = False
    exception: GuestException | None = None
    refused: int = 0
    refused_name: str = ""


class Pin(Struct, frozen=True):
    """What a consumer holds while a page is mapped.

    ``longterm`` False is a plain page reference (get_page), True a long-term pin
    (FOLL_PIN|FOLL_LONGTERM: 1024 references, charged to the VM's locked memory).
    """

    purpose: str
    longterm: bool = False


class Populated(Struct, frozen=True):
    """Answer of ``populate``: whether the pages are mapped already (TDX) or not yet (SNP)."""

    mapped: bool


class PageStates(Struct, frozen=True):
    """Vendor states of pages: ``codes`` (uint8 per page) index into ``names``."""

    codes: U8
    names: tuple[str, ...]


class HostAccess(Struct, frozen=True):
    """A physical access by the host to whole frames, checked by the CPU (never the bus)."""

    agent: Agent
    write: bool


class HostAnswer(Struct, frozen=True):
    """What a platform does to a host access: uint8 index into ``HostView`` order, per frame.

    ``fault`` names the fault in the vendor's words where any frame's view is FAULT. With
    ``destroyed`` the frames set there lose their content (zeroed) and the access then goes on.
    """

    views: U8
    fault: str = ""
    rule: str = ""
    destroyed: Bools | None = None


HOST_VIEWS: tuple[HostView, ...] = tuple(HostView)


class KeySpec(Struct, frozen=True):
    """A memory key: AES-XTS unless ``plain``; with ``integrity`` each page has a MAC and an owner.

    The key's bytes are derived from the daemon's seed and ``key_id``, which is never used again,
    so an HKID or ASID that is reused gets a new key.
    """

    key_id: int
    owner: str
    plain: bool = False
    integrity: bool = False


class Variant(Struct, frozen=True):
    """A consumer that a platform offers: the kind of VM it makes, not what its ops can do.

    Attributes:
        name: the consumer's full name, "tdx-today".
        summary: one line: what it stands for.
        private_memory: whether its VMs have private memory (an ordinary VM has none).
        personalities: the ways its VMs can convert, the default first.
        options: config keys that make_consumer takes, each with its default.
        points: the injection points that it passes (``HookTx.injected``), for those who look for
            one; they need not be complete.
    """

    name: str
    summary: str
    private_memory: bool = True
    personalities: tuple[str, ...] = ("attributes", "in-place")
    options: Mapping[str, str] = field(default_factory=dict)
    points: tuple[str, ...] = ()
