"""What clients hold: long-term pins as DMA takes them, and plain references.

Owns pin and unpin, get and put. A session's holds carry its name in the ledger and go with it.
"""

from __future__ import annotations

import numpy as np

from rmemd.engine import frames, userfault
from rmemd.engine.core import Core
from rmemd.engine.driver import Steps
from rmemd.engine.hostmap import require_granted, touch
from rmemd.engine.memory import byte_range, restricted, settle
from rmemd.errors import BAD_REQUEST, NOT_HELD
from rmemd.hooks.tx import Tx
from rmemd.model.ledger import Entry, as_runs
from rmemd.model.sessions import NOBODY, Owner, PagePin
from rmemd.units import I64, distinct, pages

# the ledger's purpose of references that a session took
GET = "get"
# length of the names that a pin carries, which refusals quote
HOLDER_MAX = 64


def pin(
    core: Core,
    number: int,
    offset: int,
    length: int,
    purpose: str,
    holder: str,
    owner: Owner = NOBODY,
) -> Steps[int]:
    """Hold present pages (shared if they are shared) as DMA does; return the pin's handle.

    A pin of a session is named after it and goes with it; of others ``holder`` is the name.
    """  # fmt: skip
    start, npages = byte_range(core.files.get(number), offset, length)
    for field, value in (("purpose", purpose), ("holder", holder)):
        fits = 0 < len(value) <= HOLDER_MAX and value.isprintable()
        if not fits or ("/" in value and field == "purpose"):
            raise BAD_REQUEST(
                f"{field} must be printable text of at most {HOLDER_MAX} characters", field=field
            )

    def one() -> int:
        require_granted(core, owner.session, number, offset, length, write=True)
        core.quotas.charge_pins(core, owner.tenant, npages)
        file, pfns = touch(core, number, offset, length, write=True)
        with core.tx("pin") as tx:
            handle = tx.next_id("pin")
            who = f"session {owner.session}" if owner.session else holder
            holds = f"{who} pin {handle}"
            held = PagePin(
                handle, number, start, npages, purpose, holds, owner.tenant, owner.session,
                as_runs(pfns),
            )  # fmt: skip
            core.ledger.hold_pin(tx, held, pfns)
            whose = file.info.owner.tenant
            tx.emit("pinned", file=number, pgoff=start, npages=npages, pin=handle, tenant=whose)
            return handle

    return userfault.at_once(core, one)


def unpin(core: Core, handle: int) -> Steps[None]:
    """Let a pin go."""

    def one() -> None:
        held = core.sessions.pin(handle)
        with core.tx("unpin") as tx:
            frames.free_orphans(core, tx, release_pin(core, tx, held))

    return core.at_once(one)


def release_pin(core: Core, tx: Tx, held: PagePin) -> I64:
    """Take a pin out of the ledger; return the frames it held."""
    tx.emit("unpinned", pin=held.pin, file=held.file, tenant=held.tenant)
    return core.ledger.release_pin(tx, held)


def get_pages(core: Core, number: int, offset: int, length: int, owner: Owner) -> Steps[I64]:
    """Take a plain reference on each page, private ones too, as a consumer elsewhere would. ALL.

    Pages that are holes are allocated, as restrictedmem_get_page() does.

    Returns:
        Their frames, int64, one per page.

    Raises:
        Poisoned: HW_POISON.
        Exhausted: NO_FRAMES, QUOTA.
    """
    start, npages = byte_range(restricted(core, number), offset, length)

    def one() -> I64:
        info = core.sessions.alive(owner.session)
        core.ranges.require_idle("file", number, start, npages)
        core.quotas.charge_pins(core, owner.tenant, npages)
        file = core.files.get(number)
        wanted = pages(start, npages)
        with core.tx("get pages") as tx:
            if file.info.in_place:
                holes = file.frames.get(wanted) == 0
                pfns = frames.find(core, tx, file, wanted, private=True)
                settle(core, tx, file, wanted[holes], pfns[holes])
            else:
                pfns = frames.find(core, tx, file, wanted, private=True)
            core.ledger.hold(tx, Entry(info.label, GET, longterm=False), pfns)
            return pfns

    return core.at_once(one)


def put_pages(core: Core, pfns: I64, owner: Owner) -> Steps[int]:
    """Drop a reference that get_pages took, on each of these distinct frames. ALL.

    Frames are named, not pages: what was got may have been punched out of its file since.

    Raises:
        Refused: NOT_HELD; the session has no reference on one of them.
    """

    def one() -> int:
        info = core.sessions.alive(owner.session)
        entry = Entry(info.label, GET, longterm=False)
        held = core.ledger.held(entry, pfns)
        again = pfns.size > 1 and distinct(pfns).size != pfns.size
        if again or np.count_nonzero(held) < pfns.size:
            at = int(np.argmin(held))
            raise NOT_HELD(
                f"{info.label} has no reference on pfn {int(pfns[at]):#x} to drop",
                page=f"pfn {int(pfns[at]):#x}", rule="put_page() after get_page(), once each",
            )  # fmt: skip
        with core.tx("put pages") as tx:
            frames.drop(core, tx, entry, pfns)
        return int(pfns.size)

    return core.at_once(one)
