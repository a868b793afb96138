"""What the executable specification is about: frames, files, slots and VMs as sets and dicts.

Owned by ``spec``. Shares no code with rmemd on purpose: nothing here may import it. A frame is an
identity; which number it has is nobody's promise, and is learned from the engine once it is taken.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

PAGE = 4096
ZERO = bytes(PAGE)

# the two halves of a file (DESIGN.md §4, shared half); in place there is only the first
PRIVATE, SHARED = "private", "shared"
# an errno that stands for any refusal, where the reference does not say which of two comes first
ANY = -1


@dataclass(eq=False)
class Frame:
    """A page of host memory that is not free.

    ``holds`` counts references by (holder, long-term); the page cache's own is ``page``.
    ``content`` None: what it holds is nobody's promise.
    """

    page: tuple[int, int, str] | None
    node: int
    pfn: int | None = None
    poisoned: bool = False
    offline: bool = False
    content: bytes | None = field(default=ZERO, repr=False)
    holds: Counter[tuple[str, bool]] = field(default_factory=Counter)

    @property
    def elevated(self) -> bool:
        """Return whether somebody but the page cache holds it."""
        return any(self.holds.values())

    def elevated_for(self, own: str) -> bool:
        """Return whether somebody but the page cache and one consumer's own pin holds it."""
        return any(n for (holder, _), n in self.holds.items() if holder != own)

    def write(self, at: int, data: bytes) -> None:
        """Change bytes; of a page that nobody knows, the others stay unknown."""
        if len(data) == PAGE:
            self.content = data
        elif self.content is not None:
            self.content = self.content[:at] + data + self.content[at + len(data) :]


@dataclass(eq=False)
class File:
    """A restricted file, or the memory behind an ordinary slot; ``shared_pgoffs`` is in place.

    ``policies`` has (mode, nodes) of those pages that do not have the default.
    """

    file: int
    vm: int
    npages: int
    in_place: bool
    session: int = 0
    anonymous: bool = False
    open: bool = True
    mappable: bool = True
    pages: dict[tuple[int, str], Frame] = field(default_factory=dict)
    shared_pgoffs: set[int] = field(default_factory=set)
    policies: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def half(self, private: bool) -> str:
        """Return the half that serves a page of a state."""
        return PRIVATE if private or self.in_place else SHARED


@dataclass(eq=False)
class Slot:
    """A memslot: gfn..gfn+npages is pgoff.. of a file."""

    slot: int
    gfn: int
    npages: int
    file: File
    pgoff: int
    restricted: bool

    def has(self, gfn: int) -> bool:
        """Return whether it covers a guest frame."""
        return self.gfn <= gfn < self.gfn + self.npages


@dataclass(frozen=True)
class Traits:
    """What a consumer declares, and nothing else of it: the generic layer sees no more.

    Attributes:
        consumer: its name; consumers of one ``platform`` can follow each other.
        measured: it is finalized before it runs, and takes initial pages until then.
        calls: what a guest's call about memory comes to: "exit", or "" for an unknown call.
        plain: the guest's bytes are the frame's, and nobody else's judgement comes between.
        dies_of_poison: it has no error op, and is killed when a private page of it fails.
        to_private: what a page holds once it is private (as the guest finds it): "preserved" or
            "zero"; ``to_shared`` the same the other way.
        unmapped: what a private page holds once it is mapped again, the same.
    """

    consumer: str
    platform: str
    private_memory: bool = True
    in_place: bool = False
    measured: bool = False
    movable: bool = False
    pins: bool = False
    plain: bool = True
    calls: str = ""
    dies_of_poison: bool = False
    to_private: str = "preserved"
    to_shared: str = "preserved"
    unmapped: str = "preserved"


@dataclass(eq=False)
class Vm:
    """A VM: slots, which guest frames are shared, and the secondary MMU gfn -> (frame, shared)."""

    vm: int
    traits: Traits
    session: int = 0
    dead: bool = False
    destroyed: bool = False
    finalized: bool = False
    calling: bool = False
    slots: dict[int, Slot] = field(default_factory=dict)
    shared_gfns: set[int] = field(default_factory=set)
    maps: dict[int, tuple[Frame, bool]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return how holders are named."""
        return f"vm/{self.vm}"

    @property
    def building(self) -> bool:
        """Return whether it must be finalized before it can run."""
        return self.traits.measured and not self.finalized

    def slot_at(self, gfn: int) -> Slot | None:
        """Return the slot that covers a guest frame."""
        return next((slot for slot in self.slots.values() if slot.has(gfn)), None)

    def is_private(self, gfn: int) -> bool:
        """Return a page's attribute; in place it is the file's, and without a slot shared."""
        if not self.traits.private_memory:
            return False
        if not self.traits.in_place:
            return gfn not in self.shared_gfns
        slot = self.slot_at(gfn)
        if slot is None or not slot.restricted or not slot.file.open:
            return False
        return gfn - slot.gfn + slot.pgoff not in slot.file.shared_pgoffs


@dataclass(frozen=True)
class Expected:
    """What an operation must say: a result (None: any), or a refusal; and where that is written.

    Attributes:
        offset: the error offset of a refusal, None for any.
        progress: the pages that a refused PREFIX operation has done, None for any.
        reading: the parts (frame, from, to) of pages that were read, to learn what nobody knew.
        moves: per frame number that may be reported as moved or not, which outcomes it may have.
        told: the numbers that must be reported.
    """

    section: str
    value: object = None
    errno: int = 0
    reason: str = ""
    offset: int | None = None
    progress: int | None = None
    reading: tuple[tuple[Frame, int, int], ...] = ()
    moves: dict[int, tuple[frozenset[str], str]] | None = None
    told: frozenset[int] = frozenset()

    def __str__(self) -> str:
        if not self.errno:
            return "ok" if self.value is None else f"ok, {_short(self.value)}"
        at = "" if self.offset is None else f" at offset {self.offset:#x}"
        done = "" if self.progress is None else f" after {self.progress} pages"
        return f"{self.reason or 'a refusal'} (errno {self.errno}){at}{done}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}... ({len(text)} characters)"


DEAD = Expected("DESIGN.md §4, kvm_vm_dead", errno=5, reason="VM_DEAD")
