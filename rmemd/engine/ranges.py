"""Ranges in progress of VMs and files, and the invalidate sequence of each.

Owns what "in progress" means: bytes of the range are on their way without the lock, so faults and
accesses that meet it wait, and a fault that looked its page up before begins again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import Struct, field

from rmemd.engine.waits import RANGE, Operation, Retry, WaitFor, Waits, pages_text
from rmemd.units import I64


class _Ranges(Struct):
    """Ranges in progress of one VM or file with whose they are, and its invalidate sequence."""

    busy: list[tuple[int, int, Operation]] = field(default_factory=list)
    sequence: int = 0


class Ranges:
    """The ranges in progress of one engine; used under its lock.

    Args:
        waits: knows which operation runs now.
        wake: has everybody who waits look again.
    """

    def __init__(self, waits: Waits, wake: Callable[[], None]) -> None:
        self._waits = waits
        self._wake = wake
        self._ranges: dict[tuple[str, int], _Ranges] = {}

    @contextmanager
    def in_progress(self, kind: str, number: int, start: int, npages: int) -> Iterator[None]:
        """Mark a range of a "vm" or "file"; faults and accesses that meet it retry."""
        ranges = self._ranges.setdefault((kind, number), _Ranges())
        marked = (start, start + npages, self._waits.current)
        ranges.busy.append(marked)
        try:
            yield
        finally:
            ranges.busy.remove(marked)
            ranges.sequence += 1
            self._wake()

    @property
    def any_in_progress(self) -> bool:
        """Return whether any range is in progress."""
        return any(ranges.busy for ranges in self._ranges.values())

    def is_in_progress(self, kind: str, number: int, start: int, npages: int) -> bool:
        """Return whether a range meets one in progress."""
        return self._in_the_way(kind, number, start, npages) is not None

    def idle(self, kind: str, number: int, pages: I64) -> I64:
        """Return those pages that are in no range in progress."""
        ranges = self._ranges.get((kind, number))
        for lo, hi, _ in ranges.busy if ranges is not None else ():
            pages = pages[(pages < lo) | (pages >= hi)]
        return pages

    def require_idle(self, kind: str, number: int, start: int, npages: int) -> None:
        """Have the operation wait while a range is in progress."""
        met = self._in_the_way(kind, number, start, npages)
        if met is not None:
            lo, hi, owner = met
            raise Retry(WaitFor(owner, RANGE, pages_text(kind, number, lo, hi - lo)))

    def _in_the_way(
        self, kind: str, number: int, start: int, npages: int
    ) -> tuple[int, int, Operation] | None:
        ranges = self._ranges.get((kind, number))
        if ranges is None:
            return None
        end = start + npages
        return next((one for one in ranges.busy if one[0] < end and start < one[1]), None)

    def sequence(self, vm: int) -> int:
        """Return the VM's invalidate sequence (mmu_invalidate_seq)."""
        return self._ranges.setdefault(("vm", vm), _Ranges()).sequence

    def invalidated(self, vm: int) -> None:
        """Count an invalidation, so that a fault that looked its page up before retries."""
        self._ranges.setdefault(("vm", vm), _Ranges()).sequence += 1

    def forget(self, kind: str, number: int) -> None:
        """Know nothing more of a "vm" or "file" that is gone; its number never comes again."""
        self._ranges.pop((kind, number), None)
