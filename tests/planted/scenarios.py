"""Short runs through the real engine that a planted bug must not survive.

Each scenario claims what reliability.md §3 demands and the tables alone cannot show, and asks
``check`` after each step. What is violated is raised by name: the invariant's number, or the
scenario's own name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
from guests import Guest, make_engine

from rmem.v1 import file_pb2, vm_pb2, watch_pb2
from rmemd.access.callers import SOCKET, TCP, UNIX, Access, Caller, Ticket, policy_of
from rmemd.access.rules import admit
from rmemd.engine import memory
from rmemd.engine.bracket import FAULT
from rmemd.engine.driver import Steps
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.migrate import Outcome
from rmemd.engine.quotas import Limits
from rmemd.errors import RmemError
from rmemd.hooks import Agent
from rmemd.hooks.hooktx import HookTx
from rmemd.hooks.tables import same_state
from rmemd.model.host import ARENA, Use
from rmemd.model.sessions import DEVICE, GUEST, HOST, GrantRange, Owner
from rmemd.model.vms import GUEST_MEMFD
from rmemd.rpc.watch import WatchService
from rmemd.units import MAX_GFN, PAGE_SIZE, pages

LOOKED_UP = "fault: looked up"
PATTERN = 0x5A
SCENARIOS: dict[str, Callable[[], None]] = {}


class Violated(Exception):
    """What was found: lines that begin with the name of the check."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


def scenario(run: Callable[[Engine], None]) -> Callable[[], None]:
    """Enter a scenario in the table; it gets a host of its own, which is well at the end."""

    @wraps(run)
    def once() -> None:
        engine = make_engine(2048, nnodes=2)
        try:
            run(engine)
            well(engine)
        finally:
            engine.core.hold = None
            engine.close()

    SCENARIOS[run.__name__] = once
    return once


def well(engine: Engine) -> None:
    """Require every invariant."""
    lines = check(engine.core)
    if lines:
        raise Violated(lines)


def claim(holds: object, text: str) -> None:
    """Require something in the name of the scenario that asks."""
    if not holds:
        raise Violated([f"{_asker()}: {text}"])


def refused(reason: str, call: Callable[[], object]) -> RmemError:
    """Require that a call is refused for a reason; return the refusal."""
    try:
        call()
    except RmemError as refusal:
        if refusal.reason.name != reason:
            raise Violated([f"{_asker()}: refused for {refusal}, not for {reason}"]) from refusal
        return refusal
    raise Violated([f"{_asker()}: not refused, though it is {reason}"])


def _asker() -> str:
    frame: Any = sys._getframe()
    while frame.f_code.co_name not in SCENARIOS:
        frame = frame.f_back
    return str(frame.f_code.co_name)


def attempt(call: Callable[[], object]) -> None:
    """Make a call that may be refused; what counts is the state after it."""
    with suppress(RmemError):
        call()


@contextmanager
def at(engine: Engine, step: str, change: Callable[[], object]) -> Iterator[None]:
    """Make one change when an operation first stands at a step."""
    pending = [change]

    def hold(name: str) -> None:
        if name == step and pending:
            pending.pop()()

    engine.core.hold = hold
    try:
        yield
    finally:
        engine.core.hold = None
    assert not pending, f"nothing came by {step}"


@contextmanager
def goes_wrong(guest: Guest, point: str, error: str = "PLUGIN_RAISED") -> Iterator[None]:
    """Have an op of the guest's consumer, or a command of its vendor, fail each time."""
    rule = guest.engine.add_fault_rule(guest.vm, point, error, nth=1, times=64)
    try:
        yield
    finally:
        guest.engine.remove_fault_rule(rule.rule)


def delete_slot(guest: Guest) -> None:
    """Delete the guest's one slot."""
    guest.engine.set_memory_region(guest.vm, 0, 0, guest.gpa(0), 0)


def add_slot(guest: Guest, flags: int = GUEST_MEMFD, page: int = 0) -> None:
    """Add the guest's slot, or change its flags or place."""
    size = guest.npages * PAGE_SIZE
    guest.engine.set_memory_region(guest.vm, 0, flags, guest.gpa(page), size, guest.file, 0)


def in_use(engine: Engine) -> int:
    """Count the frames that are not free."""
    return int((engine.core.host.use.view != Use.FREE).sum())


def held(engine: Engine) -> int:
    """Count the frames that anybody references or pins."""
    host = engine.core.host
    return int(((host.refs.view != 0) | (host.pins.view != 0)).sum())


def shared_file(engine: Engine, owner: Owner, npages: int = 16) -> tuple[int, int]:
    """Make a VM of an owner with a file behind a slot; return both."""
    vm = engine.create_vm("null", owner=owner).info.vm
    file = engine.create_file(vm, npages * PAGE_SIZE).info.file
    engine.set_memory_region(vm, 0, GUEST_MEMFD, 0, npages * PAGE_SIZE, file)
    return vm, file


# --- bindings, slots, mappings ------------------------------------------------------------------
@scenario
def slots_come_and_go(engine: Engine) -> None:
    """Nothing that a slot gave is left when the slot goes, or when its file does."""
    guest = Guest(engine, "null", npages=16)
    guest.fault(0, 8)
    attempt(lambda: add_slot(guest, flags=0))
    well(engine)
    delete_slot(guest)
    well(engine)
    add_slot(guest, page=32)
    well(engine)
    guest.gfn += 32
    guest.fault(2, 4)
    engine.close_file(guest.file)
    well(engine)
    other = Guest(engine, "gup", npages=8)
    engine.set_memory_region(other.vm, 1, 0, other.gpa(64), 8 * PAGE_SIZE)
    other.write(64, 4, seed=1)
    engine.set_memory_region(other.vm, 1, 0, other.gpa(128), 8 * PAGE_SIZE)
    well(engine)
    engine.set_memory_region(other.vm, 1, 0, 0, 0)


@scenario
def a_vm_goes_and_its_file_stays(engine: Engine) -> None:
    """A VM's end cuts its bindings and drops its holds; the file's pages are the file's."""
    for name in ("tdx-2022", "null", "snp-move"):
        guest = Guest(engine, name, npages=16)
        guest.fault(0, 8)
        engine.destroy_vm(guest.vm)
        well(engine)
        claim(not held(engine), f"{name}: pages are held by nobody who lives")
        engine.close_file(guest.file)
        claim(in_use(engine) == 0, f"{name}: {in_use(engine)} frames did not come back")


@scenario
def pages_are_punched_and_converted(engine: Engine) -> None:
    """After an invalidation returned, nobody maps what was in the range."""
    guest = Guest(engine, "null", npages=16)
    guest.fault(0, 8)
    guest.punch(2, 2)
    well(engine)
    guest.convert(4, 2, private=False)
    well(engine)
    guest.write(4, 2, seed=1, private=False)
    guest.convert(4, 2, private=True)
    well(engine)
    moving = Guest(engine, "tdx-relocate", npages=8)
    moving.convert(0, 4, private=False)
    moving.write(0, 4, seed=2, private=False)
    moving.engine.migrate(np.array([moving.pfns(0)[0]]))


@scenario
def a_zap_between_lookup_and_installation(engine: Engine) -> None:
    """A fault that an invalidation overtook begins again, and held its page until then."""
    guest = Guest(engine, "null", npages=16)
    guest.allocate(0, 4)
    with at(engine, LOOKED_UP, lambda: guest.punch(0, 4)):
        guest.fault(0, 4)
    well(engine)
    claim((guest.pfns(0, 4) == guest.frames(0, 4)).all(), "a page is mapped that its file gave up")
    claim(not held(engine), "the look-up's reference is left")


@scenario
def a_refused_fault_holds_nothing(engine: Engine) -> None:
    """Whatever the look-up took, a fault that ends badly gives back."""
    for name in ("null", "tdx-2022", "tdx-today"):
        guest = Guest(engine, name, npages=16)
        guest.allocate(0, 4)
        with at(engine, LOOKED_UP, lambda guest=guest: delete_slot(guest)):
            attempt(lambda guest=guest: guest.fault(0, 4))
        claim(not _looked_up(engine), f"{name}: a lost race left references")
        well(engine)
        if name == "null":
            continue
        add_slot(guest)
        with goes_wrong(guest, "map"), at(engine, LOOKED_UP, lambda: None):
            attempt(lambda guest=guest: guest.fault(0, 4))
        claim(not _looked_up(engine), f"{name}: a refused installation left references")


def _looked_up(engine: Engine) -> int:
    ledger = engine.core.ledger
    return sum(ledger.count(entry) for entry in ledger.entries() if entry.purpose == FAULT)


@scenario
def vendors_agree_with_the_mirror(engine: Engine) -> None:
    """A vendor's tables map a page exactly if the mirror has it private (I7 for consumers)."""
    for name in ("tdx-relocate", "snp-move", "pkvm-gmem"):
        guest = Guest(engine, name, npages=16)
        guest.fault(0, 12)
        _agree(guest)
        guest.punch(2, 3)
        _agree(guest)
        engine.migrate(guest.frames(6, 2))
        _agree(guest)
        if name != "pkvm-gmem":
            guest.convert(8, 2, private=False)
            _agree(guest)
            delete_slot(guest)
            _agree(guest)


def _agree(guest: Guest) -> None:
    made: Any = guest.consumer.made
    gfns = pages(guest.gfn, guest.npages)
    if guest.platform == "tdx":
        theirs = np.where(made.td.sept.get(gfns) != 0, made.td.hpa.get(gfns), -1)
    elif guest.platform == "snp":
        theirs = made.npt.get(gfns)
    else:
        theirs = made._el2.guest_pfns(made.handle, gfns)
    ours = guest.pfns(0, guest.npages)
    bad = np.flatnonzero(theirs != ours)
    where = "" if not bad.size else f"gfn {int(gfns[bad[0]]):#x} is at {int(theirs[bad[0]]):#x}"
    claim(not bad.size, f"{guest.consumer_name}: {where}, the mirror says {ours[bad][:1]}")


@scenario
def a_vmsa_moves_with_its_vcpu(engine: Engine) -> None:
    """A vCPU's save area that moved is found by the vCPU where it is now (CVE-2026-90040)."""
    guest = Guest(engine, "snp-move", npages=16, finalized=False)
    vmsa = 2
    engine.populate(guest.vm, guest.gpa(3), bytes(PAGE_SIZE), kind=vmsa)
    engine.finalize(guest.vm)
    (pfn,) = guest.frames(3).tolist()
    claim(guest.consumer.made.vmsas[0] == pfn, "the vCPU has no save area")  # type: ignore[attr-defined]
    guest.fill(0, 1, seed=1)
    report = engine.migrate(np.array([pfn]))
    claim(report.count(Outcome.MOVED) == 1, "the save area did not move")
    (now,) = guest.frames(3).tolist()
    claim(guest.consumer.made.vmsas[0] == now, "the vCPU runs on the old save area")  # type: ignore[attr-defined]
    attempt(lambda: guest.check(0, 1, seed=1))
    claim(guest.holds(0, 1, seed=1), "the vCPU does not run any more")


# --- refusals, transactions ---------------------------------------------------------------------
@scenario
def a_refusal_changes_nothing(engine: Engine) -> None:
    """Whatever an operation wrote before it was refused is taken back, in every kind of table."""
    guest = Guest(engine, "tdx-2022", npages=16)
    guest.fault(0, 4)
    place = Guest(engine, "pkvm-today", npages=16, gfn=0x400)

    def unchanged(call: Callable[[], object]) -> None:
        before = engine.core.space.snapshot()
        try:
            call()
        except RmemError:
            changed = same_state(before, engine.core.space.snapshot())
            claim(not changed, f"a refusal changed {changed[:4]}")
        else:
            claim(False, "what was to be refused was not")

    for one in (guest, place):
        with goes_wrong(one, "map"):
            unchanged(lambda one=one: one.fault(8, 4))
    with goes_wrong(guest, "invalidate_end"):
        unchanged(lambda: guest.punch(0, 2))
        unchanged(lambda: delete_slot(guest))
    # refused at its very end, with slots, bindings and mappings gone
    last = Guest(engine, "snp-move", npages=16, gfn=0x800)
    last.fault(0, 4)
    with goes_wrong(last, "SNP_PAGE_RECLAIM", "INVALID_PARAM"):
        unchanged(lambda: engine.destroy_vm(last.vm))
    info = engine.open_session("t", HOST, "socket")
    engine.destroy_vm(place.vm)
    unchanged(lambda: engine.create_vm("tdx-never", owner=info.owner))
    unchanged(lambda: engine.create_vm("tdx-today", config={"debug": "maybe"}))


@scenario
def half_a_move_is_seen_by_nobody(engine: Engine) -> None:
    """While bytes move without the lock the state is as before, and who meets them waits."""
    guest = Guest(engine, "tdx-relocate", npages=16)
    guest.fill(0, 4, seed=7)
    before = engine.core.space.snapshot()
    waited: list[Steps[Any]] = []

    def look() -> None:
        changed = same_state(before, engine.core.space.snapshot())
        claim(not changed, f"half a move is seen in {changed[:4]}")
        one = engine.core.and_scrub(lambda: memory.punch(engine.core, guest.file, 0, 2))
        waited.append(one)
        claim(next(one).wait, "a punch of pages that move did not wait")

    with at(engine, "migrate", look):
        engine.migrate(guest.frames(0, 4))
    well(engine)
    engine.core.run(lambda: waited[0])
    claim(guest.holds(2, 2, seed=7), "what moved does not hold its bytes")
    claim((guest.frames(0, 2) < 0).all(), "the punch that waited did nothing")


@scenario
def every_change_has_a_revision(engine: Engine) -> None:
    """I21: a state that differs has another revision, and the record of each is kept."""
    vm = engine.create_vm("null").info.vm
    for change in (
        lambda: engine.create_vcpu(vm, 0),
        lambda: engine.create_file(vm, PAGE_SIZE),
        lambda: engine.poison(77),
    ):
        before, state = engine.revision, engine.core.space.snapshot()
        change()
        claim(same_state(state, engine.core.space.snapshot()), "nothing changed")
        claim(engine.revision > before, f"a change without a revision after {before}")


@scenario
def handles_are_never_used_again(engine: Engine) -> None:
    """I16, for VMs, files, sessions and pins."""
    seen: set[tuple[str, int]] = set()
    for _ in range(3):
        info = engine.open_session("t", HOST, "socket")
        vm, file = shared_file(engine, info.owner)
        pin = engine.pin(file, 0, PAGE_SIZE, "DMA", "x", info.owner)
        made = {("session", info.session), ("vm", vm), ("file", file), ("pin", pin)}
        well(engine)
        claim(not made & seen, f"given out twice: {sorted(made & seen)}")
        seen |= made
        engine.close_session(info.session)


@scenario
def plugins_write_their_own_tables(engine: Engine) -> None:
    """A hook's transaction takes no write to a table of the engine or of another VM."""
    guest = Guest(engine, "null", npages=4)
    core = engine.core
    with core.tx("hook") as tx:
        hook = HookTx(tx, ("platform/null/", f"vm/{guest.vm}/null/"), guest.vm, core)
        for write in (
            lambda: hook.put(core.host.owner, pages(0, 2), 7),
            lambda: hook.set(core.host.keys, 1, None),
            lambda: hook.fill(core.vms.get(guest.vm).mirror, 0, 2, 3),
        ):
            try:
                write()
            except PermissionError:
                continue
            claim(False, "a hook wrote to a table that is not its own")


# --- movement -----------------------------------------------------------------------------------
@scenario
def pages_move_with_their_bytes(engine: Engine) -> None:
    """I10: a move has one owner at each point; the bytes are the same, the old frame is free."""
    for name in ("tdx-relocate", "snp-move", "pkvm-gmem"):
        guest = Guest(engine, name, npages=16)
        guest.fill(0, 6, seed=3)
        src, before = guest.frames(0, 6), in_use(engine)
        report = engine.migrate(src)
        well(engine)
        claim(report.count(Outcome.MOVED) == src.size, f"{name}: not all moved")
        claim(guest.holds(0, 6, seed=3), f"{name}: other bytes than before the move")
        claim(in_use(engine) == before, f"{name}: {in_use(engine) - before} frames are missing")


@scenario
def what_is_held_does_not_move(engine: Engine) -> None:
    """I9: an extra reference makes a page busy, and the frame meant for it goes back."""
    info = engine.open_session("t", HOST, "socket")
    guest = Guest(engine, "tdx-relocate", npages=16)
    guest.fill(0, 4, seed=3)
    engine.get_pages(guest.file, 0, 2 * PAGE_SIZE, info.owner)
    before, src = in_use(engine), guest.frames(0, 4)
    report = engine.migrate(src)
    well(engine)
    claim((guest.frames(0, 2) == src[:2]).all(), "a referenced page moved")
    claim(report.count(Outcome.BUSY) == 2, "a referenced page is not called busy")
    claim(in_use(engine) == before, "the frames meant for busy pages are lost")


@scenario
def null_is_unmovable(engine: Engine) -> None:
    """I9: without migrate_folio a private page stays, and nobody is asked."""
    guest = Guest(engine, "tdx-today", npages=16)
    guest.fill(0, 4, seed=3)
    well(engine)
    src = guest.frames(0, 4)
    report = engine.migrate(src)
    claim(report.count(Outcome.UNMOVABLE) == 4, "its pages are not called unmovable")
    claim((guest.frames(0, 4) == src).all(), "a page moved without migrate_folio")


@scenario
def what_cannot_be_reclaimed_is_leaked(engine: Engine) -> None:
    """I12: a page whose removal failed is the host's no more, whatever becomes of its VM."""
    guest = Guest(engine, "tdx-today", npages=16)
    guest.fault(0, 4)
    pfns = guest.pfns(0, 2)
    engine.add_fault_rule(guest.vm, "TDH_MEM_PAGE_REMOVE", "TDX_OPERAND_BUSY", nth=1, times=2)
    attempt(lambda: guest.punch(0, 2))
    well(engine)
    claim((engine.core.host.use.get(pfns) == Use.LEAKED).all(), "freed, and the TD still has it")
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)
    claim((engine.core.host.use.get(pfns) == Use.LEAKED).all(), "a leaked frame came back")


@scenario
def what_firmware_keeps_is_leaked(engine: Engine) -> None:
    """I12: a frame whose RMP entry cannot be taken back never reaches the free list."""
    guest = Guest(engine, "snp-move", npages=16)
    guest.fault(0, 4)
    pfns = guest.pfns(0, 1)
    platform = engine.core.registry.platforms["snp"]
    rmp = next(d for d in [guest.consumer.made.rmp])  # type: ignore[attr-defined]
    with engine.core.tx("firmware") as tx:
        # Immutable: RMPUPDATE answers FAIL_PERMISSION
        tx.put(rmp.bits, pfns, rmp.bits.get(pfns) | np.uint8(8))
    claim(platform.ops.free is not None, "the platform is not asked")
    guest.punch(0, 2)
    use = engine.core.host.use.get(pfns)
    claim((use == Use.LEAKED).all(), f"freed, and the RMP still has it: {use}")


# --- conversion ---------------------------------------------------------------------------------
@scenario
def nobody_holds_what_becomes_private(engine: Engine) -> None:
    """I11: in place, a page that a device pins does not become private; all of it or nothing."""
    guest = Guest(engine, "sw-protected", npages=16, in_place=True)
    guest.convert(0, 8, private=False)
    guest.write(0, 8, seed=1, private=False)
    handle = engine.pin(guest.file, 4 * PAGE_SIZE, PAGE_SIZE, "DMA", "device/1")
    refused("FOLIO_BUSY", lambda: guest.convert(0, 8, private=True))
    attributes = engine.core.files.get(guest.file).attributes.get(pages(0, 8))
    claim((attributes != 1).all(), "some pages were converted")
    engine.unpin(handle)
    guest.convert(0, 8, private=True)
    claim(guest.holds(0, 8, seed=1), "the bytes were not preserved")


@scenario
def neither_half_is_left(engine: Engine) -> None:
    """I5: after a conversion in place the other half holds no bytes."""
    guest = Guest(engine, "sw-protected", npages=16, in_place=True)
    guest.convert(0, 4, private=False)
    guest.write(0, 4, seed=1, private=False)
    guest.convert(0, 4, private=True)
    core = engine.core
    there = core.shared_memory(core.files.get(guest.file)).present(0, 4)
    claim(not there.size, "private pages are in the shared memfd")
    guest.write(0, 4, seed=2)
    pfns = guest.frames(0, 4)
    guest.convert(0, 4, private=False)
    left = [pfn for pfn in pfns.tolist() if core.controller._arena.present(pfn, 1).size]
    claim(not left, "shared pages are in the arena")


@scenario
def the_bus_sees_no_plaintext(engine: Engine) -> None:
    """P1: the same plaintext is other bytes on each frame, and under each guest's key."""
    plain = bytes([PATTERN]) * 64
    seen: dict[bytes, str] = {}
    for name in ("tdx-today", "tdx-today", "snp-move", "pkvm-today"):
        guest = Guest(engine, name, npages=16)
        guest.fill(0, 4, seed=9)
        guest.run(guest.do(_write(), 0, 4, pattern=_byte(), value=PATTERN))
        for page, row in enumerate(engine.core.controller.raw(guest.frames(0, 4))):
            raw = row.tobytes()
            where = f"{name} vm/{guest.vm} page {page}"
            claim(plain not in raw, f"{where} is on the bus as it is")
            claim(raw not in seen, f"{where} looks like {seen.get(raw)}")
            seen[raw] = where
    keys = [key for _, key in engine.core.host.vm_keys.items()]
    claim(len(keys) == len(set(keys)), "two guests share a key")
    # the same key number on the same frames must be told apart by the number alone
    controller, frames, rows = engine.core.controller, pages(8, 1), np.zeros((1, 4096), np.uint8)
    streams = {controller.key(key).encrypt(frames, rows).tobytes() for key in keys}
    claim(len(streams) == len(keys), "two keys give the same ciphertext")


def _write() -> Any:
    from rmemd.engine.programme import Opcode

    return Opcode.WRITE


def _byte() -> Any:
    from rmemd.engine.programme import Pattern

    return Pattern.BYTE


@scenario
def a_guest_s_own_conversion_is_sealed(engine: Engine) -> None:
    """P1: what a protected guest takes back in place is ciphertext again, and still its bytes."""
    from rmemd.engine.programme import Opcode

    guest = Guest(engine, "pkvm-gmem", npages=16)
    guest.fill(0, 2, seed=1)
    for opcode, private in ((Opcode.SHARE, False), (Opcode.UNSHARE, True)):
        guest.run(guest.do(opcode, 0, 2))
        if not private:
            guest.run(guest.do(_write(), 0, 2, pattern=_byte(), value=PATTERN, private=False))
    raw = engine.core.controller.raw(guest.frames(0, 2)).tobytes()
    claim(bytes([PATTERN]) * 64 not in raw, "the page is on the bus as it is")
    claim(guest.holds(0, 2, seed=PATTERN, pattern=_byte()), "the guest lost its bytes")


# --- reuse --------------------------------------------------------------------------------------
@scenario
def frames_are_scrubbed_before_reuse(engine: Engine) -> None:
    """P2, I4: no byte of a guest is in the arena once its frame can be taken again."""
    core = engine.core
    for name in ("null", "tdx-today"):
        guest = Guest(engine, name, npages=16)
        guest.fill(0, 8, seed=5)
        pfns = guest.frames(0, 8)
        guest.punch(0, 4)
        well(engine)
        engine.close_file(guest.file)
        well(engine)
        claim((core.host.use.get(pfns) == Use.FREE).all(), f"{name}: frames are not free")
        left = [pfn for pfn in pfns.tolist() if core.controller._arena.present(pfn, 1).size]
        claim(not left, f"{name}: {len(left)} free frames have bytes in the arena")
        claim(not (core.host.flags.get(pfns) & ARENA).any(), f"{name}: bytes that are gone count")


@scenario
def a_new_page_reads_zeros(engine: Engine) -> None:
    """What the host wrote to a frame while it was free is not what a guest finds there."""
    for pfn in range(256):
        engine.write_physical(pfn, b"\xee" * PAGE_SIZE, Agent.HOST_USER)
    guest = Guest(engine, "null", npages=16)
    guest.fault(0, 8)
    claim((guest.pfns(0, 8) < 256).all(), "other frames were taken")
    claim(guest.zero(0, 8), "a new page holds what the host wrote")


@scenario
def poison_stays(engine: Engine) -> None:
    """I13: a failed frame is mapped, moved, copied from and given out no more."""
    guest = Guest(engine, "tdx-relocate", npages=16)
    guest.fill(0, 4, seed=5)
    bad, worse, free = guest.frames(0).item(), guest.frames(1).item(), 1999
    engine.poison(bad)
    well(engine)
    engine.poison(free)
    well(engine)
    clean = Guest(engine, "null", npages=4, gfn=0x400)
    clean.fault(0, 2)
    engine.poison(clean.frames(0).item())
    clean.punch(0)
    well(engine)
    report = engine.migrate(np.array([bad]))
    claim(report.count(Outcome.MOVED) == 0, "a poisoned page moved")
    well(engine)
    with at(engine, "scrub", lambda: engine.poison(worse)):
        guest.punch(1)
    well(engine)
    guest.punch(0)
    well(engine)
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)
    use = engine.core.host.use.get(np.array([bad, worse, free]))
    claim((use == Use.POISONED).all(), "a poisoned frame can be taken again")


# --- ranges -------------------------------------------------------------------------------------
@scenario
def ranges_end_inside(engine: Engine) -> None:
    """I17: bounds are those of unbounded integers; a range that wraps is refused as it is."""
    guest = Guest(engine, "sw-protected", npages=16, in_place=False)
    engine.set_memory_region(guest.vm, 0, 0, guest.gpa(0), 0)
    end = guest.npages * PAGE_SIZE
    for offset, size in (
        ((1 << 64) - 3 * PAGE_SIZE, PAGE_SIZE), (end, PAGE_SIZE), (end - PAGE_SIZE, 2 * PAGE_SIZE),
        ((1 << 63) - PAGE_SIZE, PAGE_SIZE),
    ):  # fmt: skip
        attempt(
            lambda offset=offset, size=size: engine.set_memory_region(
                guest.vm, 1, GUEST_MEMFD, guest.gpa(64), size, guest.file, offset
            )
        )
        well(engine)
    for offset, size in ((end - PAGE_SIZE, 2 * PAGE_SIZE), (end, PAGE_SIZE), (1 << 62, PAGE_SIZE)):
        for call in (
            lambda offset=offset, size=size: engine.fallocate(guest.file, 1, offset, size),
            lambda offset=offset, size=size: engine.pin(guest.file, offset, size, "DMA", "x"),
            lambda offset=offset, size=size: engine.write_shared(guest.file, offset, b"x" * size),
            lambda offset=offset, size=size: engine.register_userfault(
                guest.file, offset // PAGE_SIZE, size // PAGE_SIZE
            ),
        ):
            attempt(call)
            well(engine)
    top = MAX_GFN * PAGE_SIZE
    for start, size in (
        (top - PAGE_SIZE, 2 * PAGE_SIZE),
        (top, PAGE_SIZE),
        (-PAGE_SIZE, PAGE_SIZE),
    ):
        refused("BAD_RANGE", lambda s=start, n=size: engine.set_attributes(guest.vm, [(s, n, 8)]))
    for grant in (GrantRange(guest.file, 12, 8), GrantRange(guest.file, -1, 4)):
        attempt(lambda grant=grant: engine.open_session("", DEVICE, "socket", grants=(grant,)))
        well(engine)
    refused("BAD_RANGE", lambda: engine.read_physical(2047, 2, Agent.HOST_USER))


# --- sessions -----------------------------------------------------------------------------------
@scenario
def an_end_leaves_nothing(engine: Engine) -> None:
    """I14: pins, references, VMs, files, children and handlers go with a session."""
    info = engine.open_session("t", HOST, "socket")
    vm, file = shared_file(engine, info.owner)
    engine.open_session("t", GUEST, "socket", parent=info.session, vm=vm)
    engine.get_pages(file, 0, 2 * PAGE_SIZE, info.owner)
    engine.pin(file, 4 * PAGE_SIZE, 2 * PAGE_SIZE, "DMA", "x", info.owner)
    # of a file that stays
    _, other = shared_file(engine, Owner("t", 0))
    engine.register_userfault(other, 8, 4, info.session)
    engine.close_session(info.session)
    well(engine)
    claim(not held(engine), "pages are still held")
    claim(in_use(engine) == 0, "frames are still in use")


@scenario
def an_end_touches_nobody_else(engine: Engine) -> None:
    """I14, ARROW-1788: what is another session's is as it was when one ends."""
    ends, lives = (engine.open_session("t", HOST, "socket") for _ in range(2))
    shared_file(engine, ends.owner)
    vm, file = shared_file(engine, lives.owner)
    mine = engine.create_vm("null").info.vm
    engine.pin(file, 0, 2 * PAGE_SIZE, "DMA", "x", lives.owner)
    engine.get_pages(file, 4 * PAGE_SIZE, 2 * PAGE_SIZE, lives.owner)
    handler = engine.register_userfault(file, 8, 4, lives.session)
    before = held(engine)
    engine.close_session(ends.session)
    well(engine)
    core = engine.core
    claim(core.vms.exists(vm) and core.vms.exists(mine), "a VM of somebody else is gone")
    claim(core.files.exists(file), "a file of somebody else is gone")
    claim(held(engine) == before, "pages that somebody else holds were let go")
    claim([one.userfault for one in core.userfaults.all()] == [handler], "a handler is gone")
    claim(core.sessions.exists(lives.session), "another session ended")


@scenario
def pins_come_and_go(engine: Engine) -> None:
    """I2: a pin is in the ledger as long as it is in the table, in the column that it is of."""
    info = engine.open_session("t", HOST, "socket")
    _, file = shared_file(engine, info.owner)
    for owner in (info.owner, Owner("t", 0)):
        handle = engine.pin(file, 0, 4 * PAGE_SIZE, "DMA", "device/1", owner)
        well(engine)
        claim(engine.core.host.pins.view.sum() == 4, "a pin is not counted as a pin")
        engine.unpin(handle)
        well(engine)
        claim(not held(engine), "an unpinned page is held")
    guest = Guest(engine, "pkvm-today", npages=16)
    guest.fault(0, 4)
    well(engine)
    claim(engine.core.host.pins.view.sum() == 4, "the guest's pins are not long-term")
    engine.destroy_vm(guest.vm)
    well(engine)


@scenario
def quotas_come_first(engine: Engine) -> None:
    """I18: a limit is asked before anything is taken, and is what it says."""
    info = engine.open_session("t", HOST, "socket")
    _, file = shared_file(engine, info.owner, npages=16)
    engine.core.quotas.set(Limits(frames=4, pinned_pages=2, sessions=2))
    engine.fallocate(file, 1, 0, 4 * PAGE_SIZE)
    refused("QUOTA", lambda: engine.fallocate(file, 1, 4 * PAGE_SIZE, PAGE_SIZE))
    engine.get_pages(file, 0, 2 * PAGE_SIZE, info.owner)
    refused("QUOTA", lambda: engine.get_pages(file, 2 * PAGE_SIZE, PAGE_SIZE, info.owner))
    engine.open_session("t", HOST, "socket")
    refused("QUOTA", lambda: engine.open_session("t", HOST, "socket"))
    other = Guest(engine, "null", npages=2048)
    free = int(engine.core.host.free_in_block.view.sum())
    engine.core.quotas.set(Limits(frames=4), {"": Limits()})
    other.allocate(0, free)
    # the tenant's limit is what it is told of, not how full the host is
    refused("QUOTA", lambda: engine.fallocate(file, 1, 4 * PAGE_SIZE, PAGE_SIZE))


# --- who may ------------------------------------------------------------------------------------
MINE, THEIRS = "uid:1", "uid:2"


@scenario
def a_ticket_is_good_once(engine: Engine) -> None:
    """P3: a secret is one redemption's, and a token its session's, its door's, its tenant's."""
    access = Access(engine, policy_of(False, 1, []), lambda: 0.0)
    parent, token = access.open(MINE, HOST, SOCKET)
    vm = engine.create_vm("null", owner=parent.owner).info.vm
    host = Caller(MINE, HOST, parent.session)
    secret = access.issue(host, Ticket(MINE, GUEST, parent.session, vm, ()))
    access.redeem(secret, SOCKET)
    refused("TOKEN_UNKNOWN", lambda: access.redeem(secret, SOCKET))
    refused("ROLE_DENIED", lambda: access.issue(host, Ticket(THEIRS, GUEST, 0, vm, ())))
    refused("ROLE_DENIED", lambda: access.open(THEIRS, "admin", SOCKET))
    left = access.issue(host, Ticket(MINE, GUEST, parent.session, vm, ()))
    refused("TOKEN_UNKNOWN", lambda: access.caller(TCP, "", token))
    _, far = access.open("spiffe://a/b", HOST, TCP)
    refused("TOKEN_UNKNOWN", lambda: access.caller(TCP, "spiffe://a/c", far))
    claim(access.caller(UNIX, "", token).session == parent.session, "a token is not its session's")
    with engine.core.tx("closing") as tx:
        engine.core.sessions.update(tx, parent, closing=True)
    refused("TOKEN_UNKNOWN", lambda: access.caller(UNIX, "", token))
    refused("TOKEN_UNKNOWN", lambda: access.redeem(left, SOCKET))
    with engine.core.tx("open again") as tx:
        engine.core.sessions.update(tx, parent, closing=False)
    access.close(parent.session)
    refused("TOKEN_UNKNOWN", lambda: access.caller(UNIX, "", token))


@scenario
def a_grant_is_a_range(engine: Engine) -> None:
    """A device reaches the pages that it was granted, in the way it was, and none beside them."""
    info = engine.open_session("t", HOST, "socket")
    _, file = shared_file(engine, info.owner)
    grants = (GrantRange(file, 2, 4), GrantRange(file, 8, 2, read_only=True))
    device = engine.open_session("t", DEVICE, "socket", parent=info.session, grants=grants)

    def pin(page: int, n: int) -> int:
        return engine.pin(file, page * PAGE_SIZE, n * PAGE_SIZE, "DMA", "x", device.owner)

    pin(2, 4)
    for page, n in ((1, 2), (2, 5), (5, 2), (6, 1), (8, 1), (0, 16)):
        refused("NOT_GRANTED", lambda page=page, n=n: pin(page, n))
    engine.read_shared(file, 8 * PAGE_SIZE, 2 * PAGE_SIZE, device.session)
    refused("NOT_GRANTED", lambda: engine.read_shared(file, 7 * PAGE_SIZE, 1, device.session))
    refused("NOT_GRANTED", lambda: engine.write_shared(file, 8 * PAGE_SIZE, b"x", device.session))
    refused("FOLIO_BUSY", lambda: engine.revoke("t", file, 3, 1))
    engine.revoke("t", file, 8, 1)
    refused("NOT_GRANTED", lambda: engine.read_shared(file, 8 * PAGE_SIZE, 1, device.session))


@scenario
def others_objects_are_absent(engine: Engine) -> None:
    """I15: what is another tenant's is refused, in the words for what is not there."""
    mine, theirs = (engine.open_session(tenant, HOST, "socket") for tenant in (MINE, THEIRS))
    vm, file = shared_file(engine, theirs.owner)
    pin = engine.pin(file, 0, PAGE_SIZE, "DMA", "x", theirs.owner)
    core, caller = engine.core, Caller(MINE, HOST, mine.session)
    asked = [
        ("VmService/GetVm", "vm", vm, vm_pb2.GetVmRequest, "NO_SUCH_VM"),
        ("VmService/DestroyVm", "vm", vm, vm_pb2.DestroyVmRequest, "NO_SUCH_VM"),
        ("FileService/GetFile", "file", file, file_pb2.GetFileRequest, "NO_SUCH_FILE"),
        ("FileService/UnpinPages", "pin", pin, file_pb2.UnpinPagesRequest, "NO_SUCH_PIN"),
    ]
    for name, field, number, request, reason in asked:
        words = {}
        for which in (number, 9999):
            message = request(**{field: which})
            refusal = refused(reason, lambda name=name, m=message: admit(core, caller, name, m))
            words[which] = refusal.message.replace(str(which), "N")
        claim(len(set(words.values())) == 1, f"{name} tells others' from absent: {words}")
    refused("NO_SUCH_VM", lambda: engine.open_session(MINE, GUEST, "socket", vm=vm))
    grants = (GrantRange(file, 0, 1),)
    refused("NO_SUCH_FILE", lambda: engine.open_session(MINE, DEVICE, "socket", grants=grants))


@scenario
def events_are_for_their_tenant(engine: Engine) -> None:
    """I15: a watch tells a tenant what is its own, and an operator everything."""
    theirs = engine.open_session(THEIRS, HOST, "socket")
    start = engine.revision
    vm, file = shared_file(engine, theirs.owner)
    engine.pin(file, 0, PAGE_SIZE, "DMA", "x", theirs.owner)
    engine.close_session(theirs.session)
    request = watch_pb2.WatchRequest(start_revision=start)

    def told(caller: Caller) -> list[str]:
        call = SimpleNamespace(caller=caller, is_active=lambda: True)
        found = []
        for item in WatchService(engine).Watch(request, call):  # type: ignore[arg-type]
            if item.HasField("event"):
                found.append(item.event.kind)
            elif item.progress_revision >= engine.revision:
                break
        return found

    claim(told(Caller(MINE, HOST)) == [], "a tenant is told of another's")
    claim(told(Caller(MINE, GUEST, vm=vm + 1)) == [], "a guest is told of another VM")
    seen = told(Caller(THEIRS, HOST))
    claim({"vm_created", "pinned", "session_closed"} <= set(seen), f"it is told {seen} only")


# --- launch -------------------------------------------------------------------------------------
@scenario
def a_launch_is_closed_once(engine: Engine) -> None:
    """CVE-2026-31591: what was measured is what runs; nothing joins it after it was closed."""
    for name in ("tdx-today", "snp-move"):
        guest = Guest(engine, name, npages=16, finalized=False)
        page = bytes([PATTERN]) * PAGE_SIZE
        guest.populate(0, page)
        refused("NOT_FINALIZED", lambda guest=guest: guest.check(0, 1, seed=0))
        engine.finalize(guest.vm)
        late = partial(guest.populate, 1, page), partial(engine.finalize, guest.vm)
        for call in late:
            try:
                call()
            except RmemError:
                continue
            claim(False, f"{name}: the launch goes on after it was finalized")
