"""Pages as requests name them: addresses in one of three ways, ranges of frame numbers."""

from __future__ import annotations

from collections.abc import Iterable

from rmem.v1 import host_pb2, types_pb2


def page_address(
    *,
    pfn: int | None = None,
    vm: int | None = None,
    gfn: int | None = None,
    file: int | None = None,
    pgoff: int | None = None,
) -> host_pb2.PageAddress:
    """Name a page; raises ValueError unless it is named in exactly one of the three ways."""
    match (pfn, vm, gfn, file, pgoff):
        case (int(), None, None, None, None):
            return host_pb2.PageAddress(pfn=pfn)
        case (None, int(), int(), None, None):
            return host_pb2.PageAddress(guest=host_pb2.GuestPage(vm=vm, gfn=gfn))
        case (None, None, None, int(), int()):
            return host_pb2.PageAddress(file_page=host_pb2.FilePage(file=file, pgoff=pgoff))
        case _:
            raise ValueError("name the page by pfn, by vm and gfn, or by file and pgoff")


def page_range(start: int, npages: int) -> types_pb2.PageRange:
    """Return pages ``start`` to ``start + npages``."""
    return types_pb2.PageRange(start=start, npages=npages)


def page_ranges(ranges: Iterable[tuple[int, int]]) -> list[types_pb2.PageRange]:
    """Return (first, npages) pairs as messages."""
    return [page_range(start, npages) for start, npages in ranges]
