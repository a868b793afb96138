"""What the executable specification is about: frames, files, slots and VMs as sets and dicts.

Owned by ``spec``. Shares no code with rmemd on purpose: nothing here may import it. A frame is an
identity and not a number, because which frame is taken is nobody's promise; only that two pages
never have the same one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

PAGE = 4096

# the two halves of a file (DESIGN.md §4, shared half); in place there is only the first
PRIVATE, SHARED = "private", "shared"


@dataclass(eq=False)
class Frame:
    """A page of host memory that is not free.

    ``holds`` counts references by (holder, long-term); the page cache's own is ``page``.
    """

    page: tuple[int, int, str] | None
    poisoned: bool = False
    holds: Counter[tuple[str, bool]] = field(default_factory=Counter)

    @property
    def elevated(self) -> bool:
        """Return whether somebody but the page cache holds it."""
        return any(self.holds.values())

    def elevated_for(self, own: str) -> bool:
        """Return whether somebody but the page cache and one consumer's own pin holds it."""
        return any(n for (holder, _), n in self.holds.items() if holder != own)


@dataclass(eq=False)
class File:
    """A restricted file, or the memory behind an ordinary slot; ``shared_pgoffs`` is in place."""

    file: int
    vm: int
    npages: int
    in_place: bool
    anonymous: bool = False
    open: bool = True
    pages: dict[tuple[int, str], Frame] = field(default_factory=dict)
    shared_pgoffs: set[int] = field(default_factory=set)

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
    """What a consumer declares, and nothing else of it: the generic layer sees no more."""

    private_memory: bool = True
    in_place: bool = False
    movable: bool = False
    pins: bool = False
    # what the host's poisoning a mapped private page does: "killed", "lives", or "" for unknown
    poisoned: str = ""


@dataclass(eq=False)
class Vm:
    """A VM: slots, which guest frames are shared, and the secondary MMU gfn -> (frame, shared)."""

    vm: int
    traits: Traits
    dead: bool = False
    destroyed: bool = False
    slots: dict[int, Slot] = field(default_factory=dict)
    shared_gfns: set[int] = field(default_factory=set)
    maps: dict[int, tuple[Frame, bool]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return how holders are named."""
        return f"vm/{self.vm}"

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
        return slot is not None and gfn - slot.gfn + slot.pgoff not in slot.file.shared_pgoffs


@dataclass(frozen=True)
class Expected:
    """What an operation must say: a result (None: any), or a refusal; and where that is written."""

    section: str
    value: object = None
    errno: int = 0
    reason: str = ""
    offset: int | None = None

    def __str__(self) -> str:
        if not self.errno:
            return "ok" if self.value is None else f"ok, {self.value}"
        at = "" if self.offset is None else f" at offset {self.offset:#x}"
        return f"{self.reason or 'a refusal'} (errno {self.errno}){at}"
