"""The host's mapping of shared pages: reads, writes, descriptors, and what a device may reach.

Owns the checks of a touch through that mapping, which refuses like one (SIGBUS).
"""

from __future__ import annotations

import numpy as np

from rmemd.engine import frames, userfault
from rmemd.engine.core import Core
from rmemd.engine.driver import Steps
from rmemd.engine.memory import settle
from rmemd.errors import (
    BAD_RANGE,
    HOST_SIGBUS,
    NO_SUCH_FILE,
    NOT_GRANTED,
    NOT_MAPPABLE,
)
from rmemd.model.files import FLAG_ANONYMOUS, PRIVATE, RestrictedFile
from rmemd.model.sessions import DEVICE
from rmemd.units import I64, PAGE_SIZE, pages


def read_shared(
    core: Core, number: int, offset: int, length: int, session: int = 0
) -> Steps[bytes]:
    """Read through the host's mapping: faults pages in like one, refuses like one (SIGBUS)."""

    def one() -> bytes:
        require_granted(core, session, number, offset, length, write=False)
        file, _ = touch(core, number, offset, length, write=False)
        return core.shared_memory(file).read_bytes(offset, length)

    return userfault.at_once(core, one)


def write_shared(
    core: Core, number: int, offset: int, data: bytes, session: int = 0
) -> Steps[None]:
    """Write through the host's mapping: faults pages in like one, refuses like one (SIGBUS)."""

    def one() -> None:
        require_granted(core, session, number, offset, len(data), write=True)
        file, _ = touch(core, number, offset, len(data), write=True)
        core.shared_memory(file).write_bytes(offset, data)

    return userfault.at_once(core, one)


def require_granted(
    core: Core, session: int, number: int, offset: int, length: int, write: bool
) -> None:
    """Check, where pages are touched, that a device session was granted them.

    Raises:
        NotFound: NO_SUCH_SESSION, NO_SUCH_FILE; it has nothing of the file.
        Denied: NOT_GRANTED.
    """
    if not session:
        return
    info = core.sessions.alive(session)
    if info.role != DEVICE:
        return
    if not any(grant.file == number for grant in info.grants):
        raise NO_SUCH_FILE(f"file/{number} does not exist", field="file")
    first = offset // PAGE_SIZE
    npages = max(-(-(offset + length) // PAGE_SIZE) - first, 0)
    if not info.may_reach(number, first, npages, write):
        raise NOT_GRANTED(
            f"pgoff {first:#x}+{npages:#x} of file/{number} was not granted to {info.label}",
            page=f"pgoff {first:#x}", rule="a device reaches what it was granted",
        )  # fmt: skip


def shared_descriptor(core: Core, number: int, session: int, read_only: bool) -> int:
    """Return a descriptor of a file's shared half, to be passed on; the caller closes it.

    What is done through it raises no event (DESIGN §4), so a device gets one of a file only if it
    was granted all of it.

    Raises:
        NotFound: NO_SUCH_FILE, NO_SUCH_SESSION.
        Denied: NOT_GRANTED.
        Unsupported: NOT_MAPPABLE.
        OSError: the daemon has no descriptor left.
    """
    file = core.files.get(number)
    size_bytes = file.info.size_pages * PAGE_SIZE
    require_granted(core, session, number, 0, size_bytes, write=not read_only)
    _require_mappable(file)
    fd = core.shared_memory(file).open_anew(read_only)
    core.shared.give(number, session)
    return fd


def _require_mappable(file: RestrictedFile) -> None:
    if file.info.in_place and not file.info.mappable and not file.info.flags & FLAG_ANONYMOUS:
        raise NOT_MAPPABLE(
            f"file/{file.info.file} was created without MMAP", field="file",
            rule="restrictedmem.md §2: mmap",
        )  # fmt: skip


def touch(
    core: Core, number: int, offset: int, length: int, write: bool
) -> tuple[RestrictedFile, I64]:
    """Fault a range of bytes in, as a touch through the host's mapping does.

    Returns:
        The file, and the frames of the pages that were touched, int64.

    Raises:
        InvalidArgument: BAD_RANGE.
        Unsupported: NOT_MAPPABLE.
        Refused: HOST_SIGBUS.
        Poisoned: HW_POISON.
        Exhausted: NO_FRAMES, QUOTA.
    """
    file = core.files.get(number)
    if offset < 0 or length <= 0:
        raise BAD_RANGE(f"{offset}+{length} is no range of bytes", field="offset_bytes")
    start = offset // PAGE_SIZE
    npages = -(-(offset + length) // PAGE_SIZE) - start
    _require_mappable(file)
    if start + npages > file.info.size_pages:
        raise HOST_SIGBUS(
            f"pgoff {file.info.size_pages:#x} is past file/{number}", field="offset_bytes",
            page=f"pgoff {max(start, file.info.size_pages):#x}", state="past the file",
            rule="restrictedmem.md §2: host fault",
        )  # fmt: skip
    core.ranges.require_idle("file", number, start, npages)
    if npages == 1 and (one := _one_there(core, file, start)) is not None:
        return file, one
    wanted = pages(start, npages)
    if file.info.in_place:
        private = _private_pages(file, wanted)
        if private.size:
            raise HOST_SIGBUS(
                f"pgoff {int(private[0]):#x} of file/{number} is private",
                page=f"pgoff {int(private[0]):#x}", state="private",
                rule="restrictedmem.md §2: host fault",
            )  # fmt: skip
    found: I64 = np.asarray(file.half(private=False).get(wanted), dtype=np.int64) - 1
    there = found >= 0
    poisoned = core.host.poisoned(found[there])
    if np.count_nonzero(poisoned):
        at = np.flatnonzero(there)[poisoned]
        frames.refuse_poisoned(file, wanted[at], found[at])
    if np.count_nonzero(there) < npages:
        holes = wanted[~there]
        userfault.require_present(
            core, file, holes, private=False, write=write,
            unchanged=lambda: not file.info.in_place or not _private_pages(file, wanted).size,
        )  # fmt: skip
        with core.tx("host fault") as tx:
            pfns = frames.allocate(core, tx, file, holes, private=False)
            settle(core, tx, file, holes, pfns)
        found[~there] = pfns
    return file, found


def _one_there(core: Core, file: RestrictedFile, pgoff: int) -> I64 | None:
    """Return the frame of one page, shape (1,), if a touch finds it there, else None."""
    if file.info.in_place and file.attributes.at(pgoff) == PRIVATE:
        return None
    return frames.one_there(core, file.half(private=False), pgoff)


def _private_pages(file: RestrictedFile, wanted: I64) -> I64:
    """Return those pages that are private by the file's own attributes."""
    private: I64 = wanted[file.attributes.get(wanted) == PRIVATE]
    return private
