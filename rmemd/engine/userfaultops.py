"""What a page fault handler asks for: ranges registered and let go, faults resolved.

Owns register, unregister, release, copy, zeropage, continue and wake, after userfaultfd's ioctls.
A session acts on the ranges that it registered, an admin (session 0) on all. The host gives bytes
to shared pages only: a private page's are the guest's, so that a fault on one can be continued,
which gives the guest the page that a fault would have given it, and nothing else.

Differs: UFFDIO_POISON is left out: it marks a page that has no frame, and poison is a frame's here.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from rmemd.engine import frames
from rmemd.engine.bracket import in_progress
from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.faultrules import at_step
from rmemd.engine.memory import BATCH_PAGES, settle
from rmemd.engine.reopen import FILLING
from rmemd.errors import (
    BAD_RANGE,
    NO_SUCH_USERFAULT,
    NOT_PAGE_ALIGNED,
    PAGE_PRESENT,
    PRIVATE_CONTENT,
    Kind,
    RmemError,
)
from rmemd.hooks.tx import Tx
from rmemd.model.files import FLAG_ANONYMOUS, PRIVATE, RestrictedFile
from rmemd.model.userfaults import Registration
from rmemd.store.memfd import Memfd
from rmemd.units import I64, PAGE_SIZE, U8, Bools, bytes_to_pages, is_page_aligned, pages

RULE = "Linux mm/userfaultfd.c; ioctl_userfaultfd(2)"
COPY = "userfault: copy"


# --- ranges ----------------------------------------------------------------------------------
def register(core: Core, number: int, pgoff: int, npages: int, session: int) -> Steps[int]:
    """Have faults on holes of a range wait for a session; return the registration's handle. ALL.

    Raises:
        InvalidArgument: BAD_RANGE.
        NotFound: NO_SUCH_FILE, NO_SUCH_SESSION.
        AlreadyExists: USERFAULT_TAKEN (EBUSY).
    """

    def one() -> Steps[int]:
        yield from ()
        if session:
            core.sessions.alive(session)
        _check_range(core.files.get(number), pgoff, npages)
        with core.tx("register userfault") as tx:
            handle = tx.next_id("userfault")
            core.userfaults.add(tx, Registration(handle, number, pgoff, npages, session))
            tx.emit(
                "userfault_registered", file=number, pgoff=pgoff, npages=npages, session=session
            )
        return handle

    return (yield from core.unit(one))


def unregister(core: Core, handle: int, session: int) -> Steps[None]:
    """Let a range go; faults that wait in it go on as if it had never been. ALL.

    Raises:
        NotFound: NO_SUCH_USERFAULT.
    """

    def one() -> Steps[None]:
        yield from ()
        gone = core.userfaults.get(handle, session or None)
        with core.tx("unregister userfault") as tx:
            _drop(core, tx, [gone])

    yield from core.unit(one)


def release(core: Core, tx: Tx, session: int) -> int:
    """Let all of a session's ranges go, in the transaction that ends it; return how many."""
    gone = core.userfaults.of_session(session)
    _drop(core, tx, gone)
    core.pending_faults.forget_session(session)
    return len(gone)


def _drop(core: Core, tx: Tx, gone: list[Registration]) -> None:
    core.userfaults.drop(tx, gone)
    for one in gone:
        tx.emit("userfault_unregistered", file=one.file, pgoff=one.pgoff, npages=one.npages)


def _check_range(file: RestrictedFile, pgoff: int, npages: int) -> None:
    if pgoff < 0 or npages <= 0 or pgoff + npages > file.info.size_pages:
        raise BAD_RANGE(
            f"pgoff {pgoff:#x}+{npages:#x} is not inside file/{file.info.file}", field="pgoff"
        )


# --- faults ----------------------------------------------------------------------------------
def copy(core: Core, session: int, number: int, pgoff: int, data: bytes) -> Steps[int]:
    """Fill shared holes with bytes (UFFDIO_COPY); return how many pages. PREFIX.

    Raises:
        InvalidArgument: NOT_PAGE_ALIGNED, BAD_RANGE.
        NotFound: NO_SUCH_USERFAULT; the page is in no range of the session.
        AlreadyExists: PAGE_PRESENT (EEXIST).
        Refused: PRIVATE_CONTENT.
    """
    if not is_page_aligned(len(data)):
        raise NOT_PAGE_ALIGNED(f"{len(data)} bytes", field="data")
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE)
    return (yield from _fill(core, session, number, pgoff, bytes_to_pages(len(data)), rows))


def zeropage(core: Core, session: int, number: int, pgoff: int, npages: int) -> Steps[int]:
    """Fill shared holes with zeros (UFFDIO_ZEROPAGE); return how many pages. PREFIX.

    Raises:
        RmemError: as ``copy`` does.
    """
    return (yield from _fill(core, session, number, pgoff, npages, None))


def _fill(
    core: Core, session: int, number: int, pgoff: int, npages: int, rows: U8 | None
) -> Steps[int]:
    _check_range(core.files.get(number), pgoff, npages)
    done, size = core.got_before(), npages

    def one() -> Steps[tuple[int, RmemError | None]]:
        file, at = core.files.get(number), pgoff + done
        core.ranges.require_idle("file", number, at, size)
        n, refusal = _holes_in_front(core, file, session, at, size)
        if n:
            with core.tx("userfault") as tx:
                wanted = pages(at, n)
                pfns = frames.allocate(core, tx, file, wanted, private=False)
                settle(core, tx, file, wanted, pfns)
                if rows is not None:
                    yield from _copy_in(core, tx, file, wanted, rows[done : done + n])
        return n, refusal

    while done < npages:
        size, at = min(size, npages - done), pgoff + done
        try:
            n, refusal = yield from core.unit(one)
            done += n
            # in the frame of the record, which the note's end writes
            core.got_to(done)
        except RmemError as stopped:
            size = _fewer(size, stopped, done)
            continue
        finally:
            core.notes.drop(FILLING, (number, at))
        if refusal is not None:
            raise refusal.with_details(progress_pages=done)
    return done


def _fewer(size: int, refusal: RmemError, done: int) -> int:
    """Return how many pages to try instead; what one page has no frame for is raised."""
    if size == 1 or refusal.reason.kind is not Kind.EXHAUSTED:
        raise refusal.with_details(progress_pages=done) from refusal
    return size // 2


def _copy_in(core: Core, tx: Tx, file: RestrictedFile, wanted: I64, rows: U8) -> Steps[None]:
    # the bytes come before the record, into a memfd where a client may put some of its own
    core.notes.set(FILLING, (file.info.file, int(wanted[0])), wanted.size)
    work = partial(_write_new, core.shared_memory(file), wanted, rows)
    between = core.hold is not None or core.rules.waits(file.info.vm, at_step(COPY))
    if wanted.size <= core.options.inline_pages and not between:
        work()
        return
    with in_progress(core, file, int(wanted[0]), wanted.size):
        yield Step(COPY, tx=tx, work=work, vm=file.info.vm)


def _write_new(shared: Memfd, wanted: I64, rows: U8) -> None:
    """Write to holes; where that fails, they are holes again."""
    try:
        shared.write(wanted, rows)
    except OSError:
        shared.punch(wanted)
        raise


def _holes_in_front(
    core: Core, file: RestrictedFile, session: int, pgoff: int, npages: int
) -> tuple[int, RmemError | None]:
    """Return how many pages from the front can be filled, and what is wrong with the next."""
    number, wanted = file.info.file, pages(pgoff, npages)
    foreign = ~core.userfaults.covers(number, wanted, session or None)
    private = _private(core, file, pgoff, npages)
    present = file.half(private=False).get(wanted) != 0
    # what a client wrote through its own descriptor is there, though nobody is charged for it
    present |= np.isin(wanted, frames.uncharged(core, file, pgoff, npages))
    bad = np.flatnonzero(foreign | private | present)
    if not bad.size:
        return npages, None
    at = int(bad[0])
    page = f"pgoff {pgoff + at:#x}"
    if foreign[at]:
        return at, _not_registered(number, pgoff + at)
    if private[at]:
        return at, PRIVATE_CONTENT(
            f"{page} of file/{number} is private", page=page, state="private",
            rule="DESIGN §4: the host knows no private page's bytes",
        )  # fmt: skip
    return at, PAGE_PRESENT(
        f"{page} of file/{number} is there already", page=page, state="present", rule=RULE
    )


def _not_registered(number: int, pgoff: int) -> RmemError:
    return NO_SUCH_USERFAULT(
        f"pgoff {pgoff:#x} of file/{number} is in no registered range", page=f"pgoff {pgoff:#x}",
        field="pgoff", rule=RULE,
    )  # fmt: skip


def _private(core: Core, file: RestrictedFile, pgoff: int, npages: int) -> Bools:
    """Return which pages are private, by the file or by the VM that a range is bound to."""
    if file.info.in_place:
        mine: Bools = file.attributes.get(pages(pgoff, npages)) == PRIVATE
        return mine
    private = np.zeros(npages, dtype=np.bool_)
    for binding, lo, n in file.bound(pgoff, npages):
        attributes = core.vms.get(binding.vm).attributes
        gfns = pages(binding.gfn + lo - binding.pgoff, n)
        private[lo - pgoff : lo - pgoff + n] = attributes.get(gfns) == PRIVATE
    return private


def continue_(
    core: Core, session: int, number: int, pgoff: int, npages: int, private: bool
) -> Steps[int]:
    """Have faults go on, on the pages that they would have got (UFFDIO_CONTINUE). PREFIX.

    A shared page holds what the handler wrote through its own mapping; a private one is empty.
    Pages that are there are passed over. ``private`` is the fault's; in place it does not matter.

    Returns:
        How many pages were continued.

    Raises:
        InvalidArgument: BAD_RANGE.
        NotFound: NO_SUCH_USERFAULT.
        Exhausted: NO_FRAMES, QUOTA.
    """
    _check_range(core.files.get(number), pgoff, npages)
    done, size = 0, BATCH_PAGES

    def one() -> Steps[int]:
        yield from ()
        file = core.files.get(number)
        wanted = pages(pgoff + done, size)
        core.ranges.require_idle("file", number, int(wanted[0]), wanted.size)
        covered = core.userfaults.covers(number, wanted, session or None)
        n = int(np.argmin(np.append(covered, False)))
        if not n:
            raise _not_registered(number, pgoff + done)
        _provide(core, file, wanted[:n], private)
        return n

    while done < npages:
        size = min(size, npages - done)
        try:
            done += yield from core.unit(one)
        except RmemError as refusal:
            size = _fewer(size, refusal, done)
    return done


def _provide(core: Core, file: RestrictedFile, wanted: I64, private: bool) -> None:
    # in place the private half is the only one, as for fallocate; ordinary memory has none
    private = file.info.in_place or (private and not file.info.flags & FLAG_ANONYMOUS)
    holes = wanted[file.half(private).get(wanted) == 0]
    if holes.size:
        with core.tx("userfault") as tx:
            pfns = frames.allocate(core, tx, file, holes, private)
            settle(core, tx, file, holes, pfns)


def wake(core: Core, session: int, number: int, pgoff: int, npages: int) -> Steps[None]:
    """Have what waits in a range fault again, which tells it again (UFFDIO_WAKE). ALL.

    Raises:
        InvalidArgument: BAD_RANGE.
        NotFound: NO_SUCH_USERFAULT.
    """
    yield from ()
    _check_range(core.files.get(number), pgoff, npages)
    covered = core.userfaults.covers(number, pages(pgoff, npages), session or None)
    if not covered.all():
        raise _not_registered(number, pgoff + int(np.argmin(covered)))
    core.pending_faults.again(number, pgoff, npages)
