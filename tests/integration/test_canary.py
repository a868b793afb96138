"""A guest's bytes are with the guest and nowhere else: bus, journal, events, replies.

TDX and SNP guests write 64 MiB each of known words and known bytes; every frame's raw bytes, every
event and every answer that the host can get is searched for them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from guests import Guest

from rmemd.engine.engine import Engine
from rmemd.engine.programme import Opcode, Pattern, make_rows
from rmemd.errors import HOST_ACCESS_FAULT, RmemError
from rmemd.hooks import Agent
from rmemd.model.host import Stored
from rmemd.units import PAGE_SIZE, pages

MIB = 256
SEED, BYTE = 0xC0FFEE, 0xA7
AGENTS = tuple(Agent)


def _raw(engine: Engine) -> Iterator[np.ndarray]:
    """Yield all of the arena's bytes, whatever the tables say of them, through its memfd."""
    arena = engine.core.controller._arena
    for at in range(0, engine.core.host.nframes, 4096):
        yield arena.read(pages(at, 4096))


def _canaries(guest: Guest, page: int, n: int) -> set[bytes]:
    """Return the first 16 bytes of every page that was written, and a line of the byte."""
    rows = make_rows(Pattern.WORDS, SEED, pages(guest.gfn + page, n))
    return {row[:16].tobytes() for row in rows} | {bytes([BYTE]) * 16}


def _seen(rows: np.ndarray, canaries: set[bytes]) -> bool:
    """Return whether any aligned 16 bytes are a canary: vectorised by the first eight of them."""
    words = rows.reshape(-1, 2, 8).view("<u8").reshape(-1, 2)
    first = np.frombuffer(b"".join(sorted(canaries)), dtype="<u8").reshape(-1, 2)
    hit = np.isin(words[:, 0], first[:, 0])
    return any(words[at].tobytes() in canaries for at in np.flatnonzero(hit).tolist())


def test_the_search_finds_what_is_there(engine: Engine) -> None:
    """A guest without a vendor is not encrypted: its bytes are on the bus, and are found."""
    guest = Guest(engine, "null", npages=16)
    guest.fill(0, 8, SEED)
    canaries = _canaries(guest, 0, 8)
    assert any(_seen(rows, canaries) for rows in _raw(engine))
    found = engine.read_physical(int(guest.pfns(3)[0]), 1, Agent.HOST_USER)
    assert _seen(np.frombuffer(found, dtype=np.uint8), canaries)


@pytest.mark.parametrize("consumer", ["tdx-today", "snp-move"])
def test_64_mib_of_a_guest_are_nowhere(make_engine: Callable[..., Engine], consumer: str) -> None:
    engine = make_engine(nframes=20480)
    npages = 64 * MIB
    guest = Guest(engine, consumer, npages=npages)
    guest.fill(0, npages - 64, SEED)
    guest.accept(npages - 64, 64)
    guest.write(npages - 64, 64, BYTE, pattern=Pattern.BYTE)
    canaries = _canaries(guest, 0, npages - 64)

    assert not any(_seen(rows, canaries) for rows in _raw(engine))
    told = pickle.dumps(engine.core.journal.events_after(0))
    assert not any(canary in told for canary in list(canaries)[:64])
    written = pickle.dumps([record.writes for record in engine.core.journal.records])
    assert not any(canary in written for canary in list(canaries)[:64])
    for agent in AGENTS:
        for bus in (False, True):
            pfns = [int(guest.pfns(page)[0]) for page in (0, 100, npages - 1)]
            for pfn in pfns:
                found = engine.read_physical(pfn, 1, agent, bus)
                assert not _seen(np.frombuffer(found, dtype=np.uint8), canaries)
    assert guest.holds(0, npages - 64, SEED)
    assert guest.holds(npages - 64, 64, BYTE, pattern=Pattern.BYTE)


def test_nothing_is_left_after_the_guest(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(nframes=4096)
    guest = Guest(engine, "null", npages=64)
    guest.fill(0, 64, SEED)
    canaries = _canaries(guest, 0, 64)
    assert any(_seen(rows, canaries) for rows in _raw(engine))
    engine.destroy_vm(guest.vm)
    engine.close_file(guest.file)
    assert not any(_seen(rows, canaries) for rows in _raw(engine))


def test_a_raw_copy_reads_as_noise_for_snp_and_the_vm_lives(engine: Engine) -> None:
    guest = Guest(engine, "snp-move")
    guest.fill(0, 8, SEED)
    src, dst = int(guest.pfns(0)[0]), int(guest.pfns(4)[0])
    engine.copy_physical(src, dst, 1, Agent.DEVICE, bus=True)
    exited = guest.check(0, 8, SEED)
    assert exited.reason.name == "HLT"
    assert (exited.vcpu.checked, exited.vcpu.mismatched) == (8, 1)
    assert exited.vcpu.first_mismatch == guest.gfn + 4
    # not the source's pattern either, wherever it is looked for
    rows = engine.core.controller.read(np.array([dst]), engine.core.host.vm_keys[guest.vm])[0]
    assert not _seen(rows, _canaries(guest, 0, 8))
    guest.write(4, 1, SEED)
    assert guest.holds(0, 8, SEED)


def test_a_raw_copy_is_poison_for_tdx_and_the_guest_is_lost(engine: Engine) -> None:
    guest = Guest(engine, "tdx-today")
    guest.fill(0, 8, SEED)
    src, dst = int(guest.pfns(0)[0]), int(guest.pfns(4)[0])
    engine.copy_physical(src, dst, 1, Agent.DEVICE, bus=True)
    assert guest.holds(0, 4, SEED)
    exited = guest.check(4, 1, SEED)
    assert exited.reason.name == "SHUTDOWN"
    assert exited.text.startswith("TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE (0x")
    assert exited.vcpu.checked == 0
    assert engine.core.vms.get(guest.vm).info.state == "dead"
    assert engine.core.host.stored.at(dst) == Stored.TAINTED


def test_tdx_gives_the_host_zeros(engine: Engine) -> None:
    guest = Guest(engine, "tdx-today")
    guest.fill(0, 1, SEED)
    for agent in AGENTS:
        assert engine.read_physical(int(guest.pfns(0)[0]), 1, agent) == bytes(PAGE_SIZE)
    assert guest.holds(0, 1, SEED)


@pytest.mark.parametrize("hiding", ["0", "1"])
def test_snp_gives_the_host_ciphertext_or_ones(engine: Engine, hiding: str) -> None:
    guest = Guest(engine, "snp-move", config={"ciphertext_hiding": hiding})
    guest.fill(0, 2, SEED)
    pfn = int(guest.pfns(0)[0])
    found = engine.read_physical(pfn, 1, Agent.HOST_KERNEL)
    if hiding == "1":
        assert found == b"\xff" * PAGE_SIZE
    else:
        assert found == engine.core.controller.raw(np.array([pfn])).tobytes()
        assert len(set(found)) > 200  # noise, not a constant
    for agent in AGENTS:
        with pytest.raises(RmemError) as caught:
            engine.write_physical(pfn, bytes(PAGE_SIZE), agent)
        assert caught.value.reason is HOST_ACCESS_FAULT
    assert guest.holds(0, 2, SEED)


def test_pkvm_gives_the_host_a_fault(engine: Engine) -> None:
    guest = Guest(engine, "pkvm-today")
    guest.fill(0, 2, SEED)
    pfn = int(guest.pfns(0)[0])
    for act in (
        lambda: engine.read_physical(pfn, 1, Agent.HOST_USER),
        lambda: engine.write_physical(pfn, bytes(PAGE_SIZE), Agent.HOST_USER),
    ):
        with pytest.raises(RmemError) as caught:
            act()
        assert caught.value.reason is HOST_ACCESS_FAULT
    assert guest.holds(0, 2, SEED)
    # the kernel's own touch takes the page by force: zeros, and the guest finds it poisoned
    assert engine.read_physical(pfn, 1, Agent.HOST_KERNEL) == bytes(PAGE_SIZE)
    exited = guest.run(guest.do(Opcode.TOUCH, 0))
    assert (exited.reason.name, exited.errno) in (("SHUTDOWN", 5), ("NONE", 14))
