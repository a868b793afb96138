"""The host as adversary: frames touched by their physical address, and frames that fail.

Owns physical access and poison. SOFTWARE goes through the platforms' host_access (what the CPU's
checks allow); BUS is test surgery beneath them. No private page's plaintext leaves here: what
comes back is ciphertext, zeros, ones or a fault.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from rmemd.engine.bracket import invalidating, views_of_half
from rmemd.engine.compact import frame_range
from rmemd.engine.core import Core, kill
from rmemd.engine.driver import Steps
from rmemd.errors import BAD_RANGE, BAD_REQUEST, FRAME_NOT_OWNED, HOST_ACCESS_FAULT, HW_POISON
from rmemd.hooks.tx import ByteOp, Tx
from rmemd.hooks.types import HOST_VIEWS, Agent, HostAccess, HostAnswer, HostView, Runs, Why
from rmemd.model.buddy import take_exactly
from rmemd.model.files import RestrictedFile
from rmemd.model.host import POISON, Stored, Use
from rmemd.model.vms import Vm
from rmemd.units import I64, PAGE_SIZE, U8, distinct

ACCESS_PAGES_MAX = 256
_VIEW = {view: i for i, view in enumerate(HOST_VIEWS)}


class Poisoned(Struct, frozen=True):
    """What poisoning a frame did."""

    pfn: int
    vm: int
    vm_lost: bool
    text: str


def read(
    core: Core, start: int, npages: int, agent: Agent, bus: bool, field: str = "pfn"
) -> Steps[bytes]:
    """Read frames as the host would; ``field`` is the request's field that names them."""

    def one() -> Steps[bytes]:
        yield from ()
        pfns = _few(core, start, npages, field)
        with core.tx("physical read") as tx:
            views = _checked(core, tx, pfns, HostAccess(agent, write=False), bus)
            return _seen(core, pfns, views).tobytes()

    return (yield from core.unit(one))


def write(
    core: Core, start: int, data: bytes, agent: Agent, bus: bool, field: str = "pfn"
) -> Steps[None]:
    """Write whole frames as the host would; ``field`` is the request's field that names them."""
    if not data or len(data) % PAGE_SIZE:
        raise BAD_REQUEST("data is not whole pages", field="data")
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE)

    def one() -> Steps[None]:
        yield from ()
        pfns = _few(core, start, rows.shape[0], field)
        with core.tx("physical write") as tx:
            _checked(core, tx, pfns, HostAccess(agent, write=True), bus)
            shared, rest = _split(core, pfns)
            contents, raw = core.controller.write_plan(pfns[rest], rows[rest], 0)
            before = core.write_in_place(tx, contents, raw)
        core.store_in_place(contents, raw, before)
        _write_shared(core, pfns[shared], rows[shared])

    yield from core.unit(one)


def copy(core: Core, src: int, dst: int, npages: int, agent: Agent, bus: bool) -> Steps[None]:
    """Copy what the host sees of frames onto other frames: raw bytes, nothing else travels."""
    for start, field in ((src, "src_pfn"), (dst, "dst_pfn")):
        _few(core, start, npages, field)
    data = yield from read(core, src, npages, agent, bus, "src_pfn")
    yield from write(core, dst, data, agent, bus, "dst_pfn")


def _few(core: Core, start: int, npages: int, field: str) -> I64:
    if npages > ACCESS_PAGES_MAX:
        raise BAD_RANGE(f"{npages} frames; one call takes {ACCESS_PAGES_MAX}", field="npages")
    return frame_range(core, start, npages, field)


def _checked(core: Core, tx: Tx, pfns: I64, access: HostAccess, bus: bool) -> U8:
    """Have the platforms judge; return a view per frame, the first that is not RAW counting."""
    views = np.full(pfns.size, _VIEW[HostView.RAW], dtype=np.uint8)
    poisoned = core.host.poisoned(pfns)
    if poisoned.any():
        pfn = int(pfns[poisoned][0])
        raise HW_POISON(f"pfn {pfn:#x} is poisoned", page=f"pfn {pfn:#x}", state="poisoned")
    if bus:
        return views
    for platform in core.registry.platforms.values():
        if platform.ops.host_access is None:
            continue
        answer: HostAnswer = platform.call(tx, 0, "host_access", pfns, access)
        fault = np.flatnonzero(answer.views == _VIEW[HostView.FAULT])
        if fault.size:
            pfn = int(pfns[fault[0]])
            raise HOST_ACCESS_FAULT(
                f"{access.agent.value} may not {'write' if access.write else 'read'} pfn {pfn:#x}: "
                f"{answer.fault}", page=f"pfn {pfn:#x}", state="private", rule=answer.rule,
                vendor_status=answer.fault, where=f"{platform.name}.host_access",
            )  # fmt: skip
        if answer.destroyed is not None and answer.destroyed.any():
            scrub = ByteOp("scrub", pfns[answer.destroyed])
            core.controller.apply(tx, core.controller.perform([scrub]))
        views = np.where(views == _VIEW[HostView.RAW], answer.views, views)
    return views


def _seen(core: Core, pfns: I64, views: U8) -> U8:
    out = np.zeros((pfns.size, PAGE_SIZE), dtype=np.uint8)
    out[views == _VIEW[HostView.ONES]] = 0xFF
    raw = views == _VIEW[HostView.RAW]
    shared, rest = _split(core, pfns)
    out[raw & rest] = core.controller.raw(pfns[raw & rest])
    out[raw & shared] = _read_shared(core, pfns[raw & shared])
    return out


def _split(core: Core, pfns: I64) -> tuple[np.ndarray, np.ndarray]:
    shared = (core.host.stored.get(pfns) == Stored.SHARED) & (core.host.owner.get(pfns) != 0)
    return shared, ~shared


def _read_shared(core: Core, pfns: I64) -> U8:
    out = np.zeros((pfns.size, PAGE_SIZE), dtype=np.uint8)
    for file, mine in _by_file(core, pfns):
        out[mine] = core.shared_memory(file).read(core.host.pgoff.get(pfns[mine]))
    return out


def _write_shared(core: Core, pfns: I64, rows: U8) -> None:
    for file, mine in _by_file(core, pfns):
        core.shared_memory(file).write(core.host.pgoff.get(pfns[mine]), rows[mine])


def _by_file(core: Core, pfns: I64) -> list[tuple[RestrictedFile, np.ndarray]]:
    owner = core.host.owner.get(pfns)
    return [(core.files.get(n), owner == n) for n in distinct(owner).tolist()]


# --- poison ----------------------------------------------------------------------------------
def poison(core: Core, pfn: int) -> Steps[Poisoned]:
    """Mark a frame failed, as found by the host (MF_DELAYED): unmapped, not truncated."""

    def one() -> Steps[Poisoned]:
        yield from ()
        pfns = frame_range(core, pfn, 1)
        host = core.host
        if host.poisoned(pfns).any():
            raise HW_POISON(f"pfn {pfn:#x} is poisoned already", page=f"pfn {pfn:#x}")
        use, owner = Use(host.use.at(pfn)), host.owner.at(pfn)
        with core.tx("poison") as tx:
            tx.put(host.flags, pfns, host.flags.get(pfns) | POISON)
            tx.emit("poisoned", pfn=pfn)
            if use is Use.FREE:
                take_exactly(core.host, tx, pfns, Use.POISONED)
            elif use is Use.OFFLINE:
                # going online must not give it back to the allocator
                tx.put(host.use, pfns, int(Use.POISONED))
            if not owner:
                return Poisoned(pfn, 0, False, "")
            return _tell_owner(core, tx, core.files.get(owner), pfns, use)

    return (yield from core.unit(one))


def _tell_owner(core: Core, tx: Tx, file: RestrictedFile, pfns: I64, use: Use) -> Poisoned:
    pgoff, pfn = core.host.pgoff.at(int(pfns[0])), int(pfns[0])
    views = views_of_half(core, file, pgoff, 1, private=use is Use.PRIVATE)
    lost = ""
    for view in views:
        if use is Use.PRIVATE:
            lost = judge_error(core, tx, view.vm, Runs(*map(_one, (view.gfn, pfn, 1))), False)
    with invalidating(core, tx, views, Why.POISON):
        pass
    return Poisoned(pfn, file.info.vm, bool(lost), lost)


def _one(value: int) -> I64:
    return np.array([value], dtype=np.int64)


def judge_error(core: Core, tx: Tx, vm: Vm, runs: Runs, consumed: bool) -> str:
    """Ask the consumer about a poisoned page; kill the VM if it is lost; return why, or ""."""
    consumer = core.consumer(vm)
    if consumer.ops.error is None:
        lost = f"{consumer.name} has no error hook"
    else:
        lost = consumer.call(tx, "error", runs, consumed)
    if lost:
        kill(core, tx, core.vms.get(vm.info.vm), lost)
    return lost


def frame_of_gfn(core: Core, vm: int, gfn: int) -> int:
    """Return the frame of a guest page, mapped or not.

    Raises:
        NotFound: NO_SUCH_VM.
        Refused: FRAME_NOT_OWNED, as the page has no frame.
    """
    view = core.vms.get(vm)
    if gfn >= 0:
        entry = view.mirror.at(gfn)
        if entry:
            return (entry >> 1) - 1
        slot = view.slot_at(gfn)
        if slot is not None and core.files.exists(slot.file):
            return frame_of_page(core, slot.file, gfn - slot.gfn + slot.pgoff)
    raise FRAME_NOT_OWNED(f"gfn {gfn:#x} has no frame", page=f"gfn {gfn:#x}")


def frame_of_page(core: Core, number: int, pgoff: int) -> int:
    """Return the frame of a file's page.

    Raises:
        NotFound: NO_SUCH_FILE.
        Refused: FRAME_NOT_OWNED, as the page is a hole.
    """
    file = core.files.get(number)
    found = file.frames.at(pgoff) or file.shared.at(pgoff) if pgoff >= 0 else 0
    if not found:
        raise FRAME_NOT_OWNED(
            f"pgoff {pgoff:#x} of file/{number} is a hole", page=f"pgoff {pgoff:#x}"
        )
    return found - 1
