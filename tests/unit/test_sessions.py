"""Sessions in the engine: grants, ends, quotas; and that a broken end is seen by the invariants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import MakeEngine, make_guest, refusal
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.listeners import Ended, News, Revoked
from rmemd.engine.quotas import Limits
from rmemd.errors import (
    BAD_RANGE,
    BAD_REQUEST,
    FOLIO_BUSY,
    NO_SUCH_FILE,
    NO_SUCH_SESSION,
    NO_SUCH_VM,
    NOT_GRANTED,
    QUOTA,
    Reason,
    RmemError,
)
from rmemd.hooks.tables import same_state
from rmemd.model.sessions import DEVICE, GUEST, HOST, GrantRange, Owner, SessionInfo
from rmemd.model.vms import GUEST_MEMFD
from rmemd.units import PAGE_SIZE

FILE = 1


def refused(reason: Reason, call: Callable[[], object], errno: int) -> RmemError:
    """Make a call that must be refused; return the refusal."""
    return refusal(call, reason=reason, errno=errno)


ranges = st.builds(GrantRange, st.just(FILE), st.integers(0, 20), st.integers(1, 10), st.booleans())
cuts = st.tuples(st.integers(0, 30), st.integers(1, 12))


def numbers(grant: GrantRange) -> set[int]:
    return set(range(grant.pgoff, grant.pgoff + grant.npages))


# --- grants, against sets ------------------------------------------------------------------------
@given(ranges, cuts)
def test_a_range_without_another_is_the_difference(grant: GrantRange, cut: tuple[int, int]) -> None:
    taken = set(range(cut[0], sum(cut)))
    parts = grant.without(*cut)
    assert set().union(*map(numbers, parts)) == numbers(grant) - taken
    assert sum(part.npages for part in parts) == len(numbers(grant) - taken), "they overlap"
    assert all(part.npages > 0 for part in parts)
    assert all((part.file, part.read_only) == (FILE, grant.read_only) for part in parts)
    assert grant.meets(*cut) == bool(numbers(grant) & taken)


@given(st.lists(ranges, max_size=5), cuts, st.booleans(), st.integers(FILE, FILE + 1))
def test_a_device_may_reach_what_its_grants_cover(
    grants: list[GrantRange], wanted: tuple[int, int], write: bool, file: int
) -> None:
    info = SessionInfo(1, "t", DEVICE, "socket", grants=tuple(grants))
    usable = [numbers(g) for g in grants if g.file == file and not (write and g.read_only)]
    covered = set(range(wanted[0], sum(wanted))) <= set().union(*usable)
    assert info.may_reach(file, *wanted, write) == covered


# --- ends ----------------------------------------------------------------------------------------
def opened(engine: Engine, role: str = HOST, tenant: str = "t", **facts: object) -> SessionInfo:
    return engine.open_session(tenant, role, "socket", **facts)  # type: ignore[arg-type]


def make_vm(engine: Engine, info: SessionInfo) -> tuple[int, int]:
    vm = engine.create_vm("null", owner=info.owner).info.vm
    file = engine.create_file(vm, 16 * PAGE_SIZE).info.file
    engine.set_memory_region(vm, 0, 4, 0, 16 * PAGE_SIZE, file=file)
    return vm, file


def test_an_end_leaves_nothing_and_touches_nobody(engine: Engine) -> None:
    other = opened(engine, tenant="other")
    _, foreign = make_vm(engine, other)
    engine.pin(foreign, 0, PAGE_SIZE, "DMA", "x", other.owner)
    engine.get_pages(foreign, 4 * PAGE_SIZE, 2 * PAGE_SIZE, other.owner)
    before = engine.core.space.snapshot()
    one = opened(engine)
    vm, file = make_vm(engine, one)
    below = opened(engine, GUEST, vm=vm, parent=one.session)
    engine.pin(file, 0, 2 * PAGE_SIZE, "DMA", "x", one.owner)
    engine.get_pages(file, 4 * PAGE_SIZE, 2 * PAGE_SIZE, one.owner)
    engine.register_userfault(file, 8, 2, one.session)
    heard: list[News] = []
    engine.core.listeners.add(below.session, heard.append)
    closed = engine.close_session(one.session)
    assert closed.sessions == (one.session, below.session)
    assert (closed.released_pages, closed.vms) == (4, (vm,))
    assert heard == [Ended(0, engine.revision)]
    # what only ever grows, and what a free frame's page was
    differs = set(same_state(before, engine.core.space.snapshot()))
    assert differs <= {"host/counters", "host/keys", "host/pgoff"}, differs
    assert check(engine.core) == []
    refused(NO_SUCH_SESSION, lambda: engine.close_session(one.session), errno=2)


def test_a_session_on_its_way_out_gets_nothing(engine: Engine) -> None:
    one = opened(engine)
    _, file = make_vm(engine, one)
    core = engine.core
    with core.tx("test") as tx:
        core.sessions.update(tx, one, closing=True)
    for call in (
        lambda: engine.pin(file, 0, PAGE_SIZE, "DMA", "x", one.owner),
        lambda: engine.get_pages(file, 0, PAGE_SIZE, one.owner),
        lambda: engine.create_vm("null", owner=one.owner),
        lambda: engine.register_userfault(file, 0, 1, one.session),
        lambda: engine.shared_descriptor(file, one.session, False),
        lambda: opened(engine, GUEST, vm=1, parent=one.session),
    ):
        refused(NO_SUCH_SESSION, call, errno=2)


def test_what_cannot_be_opened(engine: Engine) -> None:
    one = opened(engine)
    vm, file = make_vm(engine, one)
    grant = GrantRange(file, 0, 4)
    refused(BAD_REQUEST, lambda: opened(engine, "king"), errno=22)
    refused(BAD_REQUEST, lambda: opened(engine, HOST, vm=vm), errno=22)
    refused(BAD_REQUEST, lambda: opened(engine, GUEST), errno=22)
    refused(BAD_REQUEST, lambda: opened(engine, HOST, grants=(grant,)), errno=22)
    refused(NO_SUCH_VM, lambda: opened(engine, GUEST, "other", vm=vm), errno=2)
    refused(NO_SUCH_FILE, lambda: opened(engine, DEVICE, "other", grants=(grant,)), errno=9)
    for bad in (replace(grant, npages=17), replace(grant, npages=0), replace(grant, pgoff=-1)):
        refused(BAD_RANGE, lambda bad=bad: opened(engine, DEVICE, grants=(bad,)), errno=22)


def test_revocation(engine: Engine) -> None:
    one = opened(engine)
    _, file = make_vm(engine, one)
    device = opened(engine, DEVICE, grants=(GrantRange(file, 0, 8),), parent=one.session)
    heard: list[News] = []
    engine.core.listeners.add(device.session, heard.append)
    pin = engine.pin(file, 2 * PAGE_SIZE, PAGE_SIZE, "DMA", "x", device.owner)
    busy = refused(FOLIO_BUSY, lambda: engine.revoke("t", file, 0, 4), errno=11)
    assert [h.name for h in busy.details.holders] == [f"session {device.session} pin {pin}"]
    assert heard == []
    assert [info.session for info in engine.revoke("t", file, 4, 2)] == [device.session]
    assert heard == [Revoked(file, 4, 2, engine.revision)]
    engine.read_shared(file, 0, 1, device.session)
    refused(NOT_GRANTED, lambda: engine.read_shared(file, 4 * PAGE_SIZE, 1, device.session), 13)
    assert engine.revoke("other", file, 0, 8) == []


@pytest.mark.parametrize("what", ["pin", "get", "vm", "file", "child", "userfault"])
def test_the_invariant_sees_what_a_dead_session_left(engine: Engine, what: str) -> None:
    one = opened(engine)
    vm, file = make_vm(engine, one)
    guest = make_guest(engine, "null", 4)
    if what == "pin":
        engine.pin(guest.file, 0, PAGE_SIZE, "DMA", "x", one.owner)
    elif what == "get":
        engine.get_pages(guest.file, 0, PAGE_SIZE, one.owner)
    elif what == "child":
        opened(engine, parent=one.session)
    elif what == "userfault":
        engine.register_userfault(guest.file, 0, 1, one.session)
    assert check(engine.core) == []
    if what != "vm":
        engine.destroy_vm(vm)
    if what != "file":
        engine.close_file(file)
    core = engine.core
    with core.tx("test") as tx:
        core.sessions.end(tx, one.session)
    assert [line.split(":")[0] for line in check(core)] == ["I14"]


# --- quotas --------------------------------------------------------------------------------------
def test_quotas_count_what_is_held(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.core.quotas.set(Limits(pinned_pages=4, sessions=1), {"rich": Limits()})
    one = opened(engine)
    _, file = make_vm(engine, one)
    over = refused(QUOTA, lambda: opened(engine), errno=122)
    assert over.details.where == "sessions"
    rich = opened(engine, tenant="rich")
    opened(engine, tenant="rich", parent=rich.session)
    for _ in range(20):
        pins = [engine.pin(file, n * PAGE_SIZE, PAGE_SIZE, "DMA", "x", one.owner) for n in range(2)]
        pfns = engine.get_pages(file, 0, 2 * PAGE_SIZE, one.owner)
        for call in (
            lambda: engine.pin(file, 0, PAGE_SIZE, "DMA", "x", one.owner),
            lambda: engine.get_pages(file, 0, PAGE_SIZE, one.owner),
        ):
            assert refused(QUOTA, call, errno=122).details.where == "pinned_pages"
        engine.put_pages(pfns, one.owner)
        for pin in pins:
            engine.unpin(pin)
    assert engine.core.vms.all()[0].info.owner == Owner("t", one.session)


def test_a_slot_takes_another_tenants_file_for_absent(engine: Engine) -> None:
    vms = [engine.create_vm("sw-protected", owner=Owner(one)).info.vm for one in "ab"]
    file = engine.create_file(vms[1], PAGE_SIZE).info.file
    said = []
    for number in (file, 999):
        refusal_ = refused(
            NO_SUCH_FILE,
            lambda number=number: engine.set_memory_region(
                vms[0], 0, GUEST_MEMFD, 0, PAGE_SIZE, number
            ),
            9,
        )
        said.append((refusal_.message.replace(str(number), "N"), refusal_.details.rule))
    assert said[0] == said[1]
