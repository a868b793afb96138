"""Sessions: opened, cut back, and let go with everything they hold.

Owns the end of a client. A dead client's pins, references, VMs and files are released, children's
before parents', and nothing of anybody else's changes (reliability.md §3, I14).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from msgspec import Struct

from rmemd.engine import frames, lifecycle, memory, pins, userfaultops
from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.listeners import Ended, Revoked
from rmemd.errors import (
    BAD_RANGE,
    BAD_REQUEST,
    FOLIO_BUSY,
    NO_SUCH_FILE,
    NO_SUCH_VM,
    SAFE_MODE,
    TOKEN_UNKNOWN,
)
from rmemd.model.sessions import DEVICE, GUEST, ROLES, GrantRange, SessionInfo
from rmemd.units import distinct

# the kind of notes that are tickets not redeemed yet
TICKETS = "tickets"


class Closed(Struct, frozen=True):
    """What went with a session."""

    sessions: tuple[int, ...]
    released_pages: int
    vms: tuple[int, ...]


def open_session(
    core: Core,
    tenant: str,
    role: str,
    door: str,
    pid: int = 0,
    parent: int = 0,
    vm: int = 0,
    grants: tuple[GrantRange, ...] = (),
    ticket: bytes = b"",
) -> Steps[SessionInfo]:
    """Open a session. ALL.

    Args:
        ticket: what the note of the ticket is known by that this uses up, in the same frame.

    Raises:
        InvalidArgument: BAD_REQUEST, BAD_RANGE; role, or a grant outside its file.
        NotFound: NO_SUCH_VM, NO_SUCH_FILE, NO_SUCH_SESSION; not there, or another tenant's.
        Unauthenticated: TOKEN_UNKNOWN; another has used the ticket up.
        Exhausted: QUOTA.
        Unavailable: SAFE_MODE.
    """
    yield from ()
    if core.read_only:
        raise SAFE_MODE(f"no session can be opened: {core.read_only}")
    if role not in ROLES:
        raise BAD_REQUEST(f"no role {role!r}", field="role")
    if (role == GUEST) != bool(vm):
        raise BAD_REQUEST("a guest session has a VM, and no other has", field="vm")
    if grants and role != DEVICE:
        raise BAD_REQUEST("ranges are granted to devices", field="grants")
    if vm and core.vms.get(vm).info.owner.tenant != tenant:
        raise NO_SUCH_VM(f"vm/{vm} does not exist", field="vm")
    for grant in grants:
        _check_grant(core, tenant, grant)
    if parent:
        core.sessions.alive(parent)
    if ticket and core.notes.get(TICKETS, ticket) is None:
        raise TOKEN_UNKNOWN("no such ticket", field="ticket", for_log="used up meanwhile")
    core.quotas.charge_session(core, tenant)
    with core.tx("open session") as tx:
        info = core.sessions.open(
            tx, tenant, role, door, pid=pid, parent=parent, vm=vm, grants=grants
        )
        tx.emit("session_opened", session=info.session, role=role, tenant=tenant)
    if ticket:
        core.notes.drop(TICKETS, ticket)
    return info


def _check_grant(core: Core, tenant: str, grant: GrantRange) -> None:
    file = core.files.get(grant.file)
    if file.info.owner.tenant != tenant:
        raise NO_SUCH_FILE(f"file/{grant.file} does not exist", field="file")
    if grant.pgoff < 0 or grant.npages <= 0 or grant.pgoff + grant.npages > file.info.size_pages:
        raise BAD_RANGE(
            f"pgoff {grant.pgoff:#x}+{grant.npages:#x} is not inside file/{grant.file}",
            field="grants",
        )


def revoke(
    core: Core, tenant: str, number: int, pgoff: int, npages: int
) -> Steps[list[SessionInfo]]:
    """Take a range back from every device that it was granted to. ALL.

    Returns:
        The sessions that lost something.

    Raises:
        Busy: FOLIO_BUSY; a device pins pages of it, and is named.
    """

    def one() -> Steps[list[SessionInfo]]:
        yield from ()
        file = core.files.get(number)
        core.ranges.require_idle("file", number, pgoff, npages)
        losers = [
            info for info in core.sessions.all()
            if info.tenant == tenant and any(_cuts(grant, number, pgoff, npages)
                                             for grant in info.grants)
        ]  # fmt: skip
        _refuse_pinned(core, losers, number, pgoff, npages)
        with core.tx("revoke grants") as tx:
            for info in losers:
                left = [
                    part for grant in info.grants
                    for part in (grant.without(pgoff, npages) if grant.file == number else (grant,))
                ]  # fmt: skip
                core.sessions.update(tx, info, grants=tuple(left))
                tx.emit(
                    "grant_revoked", session=info.session, file=file.info.file, pgoff=pgoff,
                    npages=npages, tenant=tenant,
                )  # fmt: skip
        for info in losers:
            core.listeners.tell(info.session, Revoked(number, pgoff, npages, core.journal.revision))
        return losers

    return (yield from core.unit(one))


def _cuts(grant: GrantRange, file: int, pgoff: int, npages: int) -> bool:
    return grant.file == file and grant.meets(pgoff, npages)


def _refuse_pinned(
    core: Core, losers: list[SessionInfo], file: int, pgoff: int, npages: int
) -> None:
    sessions = {info.session for info in losers}
    for pin in core.sessions.pins():
        held = GrantRange(pin.file, pin.pgoff, pin.npages)
        if pin.owner.session in sessions and _cuts(held, file, pgoff, npages):
            table = core.files.get(file).half(private=False)
            first = max(pin.pgoff, pgoff)
            pfn = table.at(first) - 1
            refusal = FOLIO_BUSY(
                f"pgoff {first:#x} of file/{file} is pinned", page=f"pgoff {first:#x}",
                state="pinned by a device",
                holders=core.ledger.holders(pfn) if pfn >= 0 else (),
                rule="a range is taken back when nobody pins it",
            )  # fmt: skip
            raise core.waits.refused(refusal, pfn)


def close_session(
    core: Core, number: int, check: Callable[[Core], None] = lambda core: None
) -> Steps[Closed]:
    """End a session and those below it; release what they hold. ALL.

    The sessions are marked first, in one transaction, so that a call of theirs that is under way
    can take nothing more; then vCPUs of their VMs are waited for. ``check`` may refuse it all.

    Raises:
        NotFound: NO_SUCH_SESSION.
    """
    check(core)
    doomed = yield from core.unit(lambda: _mark(core, number))
    core.will_come_to(_to_be_released(core, doomed))
    try:
        return (yield from _release(core, doomed))
    except Exception:
        # a vendor would not let its VM go, or the system refused: it can be asked for again
        yield from core.unit(lambda: _unmark(core, doomed))
        core.comes_to_nothing()
        raise


def _to_be_released(core: Core, doomed: list[SessionInfo]) -> Closed:
    numbers = tuple(info.session for info in doomed)
    vms = tuple(_of_sessions(core.vms.of_session, numbers))
    npages = sum(core.ledger.frames(info.label).size for info in doomed)
    npages += sum(pin.npages for number in numbers for pin in core.sessions.pins_of(number))
    return Closed(numbers, npages, vms)


def _of_sessions(of_session: Callable[[int], list[int]], numbers: Iterable[int]) -> list[int]:
    """Return the VMs, or files, of sessions, oldest first."""
    return sorted(owned for number in numbers for owned in of_session(number))


def finish_closing(core: Core) -> Steps[Closed]:
    """Let go of the sessions that were on their way out when the daemon's process ended."""
    return (yield from _release(core, [info for info in core.sessions.all() if info.closing]))


def _release(core: Core, doomed: list[SessionInfo]) -> Steps[Closed]:
    numbers = {info.session for info in doomed}
    vms = _of_sessions(core.vms.of_session, numbers)
    core.leaving.update(vms)
    core.wake_waiting()
    released = {}
    for info in reversed(doomed):
        released[info.session] = yield from core.unit(partial(_let_go, core, info))
    try:
        for vm in vms:
            while any(running == vm for running, _ in core.running):
                yield Step("vCPUs leave", wait=True)
            if core.vms.exists(vm):
                yield from lifecycle.end_vm(core, vm)
    finally:
        core.leaving.difference_update(vms)
    for file in _of_sessions(core.files.of_session, numbers):
        yield from memory.close(core, file)
    for number in numbers:
        core.shared.let_go(number)
    # before anybody is told: who hears of the end finds the frames free
    yield from core.scrub()
    with core.tx("close session") as tx:
        for info in doomed:
            core.sessions.end(tx, info.session)
            tx.emit(
                "session_closed", session=info.session, tenant=info.tenant,
                released_pages=released[info.session],
            )  # fmt: skip
    for info in doomed:
        core.listeners.tell(info.session, Ended(released[info.session], core.journal.revision))
    return Closed(tuple(info.session for info in doomed), sum(released.values()), tuple(vms))


def _mark(core: Core, number: int) -> Steps[list[SessionInfo]]:
    yield from ()
    core.sessions.alive(number)
    doomed = [info for info in core.sessions.below(number) if not info.closing]
    with core.tx("close session") as tx:
        return [core.sessions.update(tx, info, closing=True) for info in doomed]


def _unmark(core: Core, doomed: list[SessionInfo]) -> Steps[None]:
    yield from ()
    with core.tx("session stays") as tx:
        for info in doomed:
            if core.sessions.exists(info.session):
                core.sessions.update(tx, info, closing=False)


def _let_go(core: Core, info: SessionInfo) -> Steps[int]:
    yield from ()
    with core.tx("release session") as tx:
        userfaultops.release(core, tx, info.session)
        held = [core.ledger.forget(tx, info.label)]
        for pin in core.sessions.pins_of(info.session):
            held.append(pins.release_pin(core, tx, pin))
        frames.free_orphans(core, tx, distinct(np.concatenate(held)))
    return int(sum(pfns.size for pfns in held))
